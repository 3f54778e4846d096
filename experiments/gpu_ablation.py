"""What is each technique's share of the speed on one GPU, added alone and left out alone?

    python -m experiments.gpu_ablation [model=qwen3-0.6b] [techniques=preset,skinny_gemm]

One model with random weights of its true shape. The rows, all in one process and one set of
records: the core with the fewest techniques that serve the load (``base=``); that base with each
technique added; ``preset=gpu``; the preset with each technique left out; and those that the preset
lacks added to it. What a technique requires comes with it (see ``experiments/ablation_variants``),
so a row has two ratios: to its end of the table, and to the row that differs in the technique
alone. Both ends are measured once more at the end, which shows how far the machine drifted. Beside
them the rungs of Transformers at batch 1 on the same weights.

A row's outputs are compared with those of the core without any technique before it is timed: the
first token that differs must be a tie within ``epsilon`` logits. A row that cannot be built, or for
which no time was left, says why. The exit status is 0 only where both ends and every rung were
measured and no row failed or was left for want of time.
"""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments import ablation_rungs, command, peak
from experiments.ablation_report import draw, missing_evidence, reasons, result_tables, rung_table
from experiments.ablation_variants import PRESET, Plan, Variant, plan_ablation
from workbench.assemble import Limits, build_engine
from workbench.bench.environment import collect_environment
from workbench.configuration import Composed, compose_config, engine_config, load_markers
from workbench.core.errors import ConfigError, WorkbenchError, unknown_name
from workbench.core.sampling import SamplingParams
from workbench.core.step import StepRecord
from workbench.core.workload import WorkloadRequest
from workbench.engine.engine import Engine
from workbench.models.families import read_config, spec_from_hf

PROBE_TOKENS = 24
#: The load of the rungs, as it is, and what a row's measurement of it is called.
RUNG_LOAD = "bs1"
WHOLE = "bs1, whole"


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the experiment.

    Attributes
    ----------
    model
        Name or folder, as of ``model=``.
    preset
        Whose techniques are left out.
    base
        Techniques that every row has which others are added to.
    techniques
        Those that get rows; ``preset`` stands for all of the preset's.
    workloads
        Of ``experiments.peak``.
    output_len
        Most output tokens a request; 0 leaves the loads as they are. What is shortened says so.
    rounds
        Timed runs of each load in each row.
    probes
        Prompts whose outputs are compared.
    epsilon
        Logits by which a token that differs may lie below the core's own.
    seconds
        No row is begun after so many; rungs are measured whatever the time.
    baselines
        Rungs of Transformers; none for ``baselines=``.
    kv_tokens
        Tokens of KV; 0: all requests of the largest load at their longest, or what is free.
    results_dir
        Where records and figures go.
    """

    model: str = "llama-3.1-8b"
    preset: str = "gpu"
    base: tuple[str, ...] = ("continuous_batching", "paged_attention")
    techniques: tuple[str, ...] = (PRESET, "skinny_gemm")
    workloads: tuple[str, ...] = ("bs1", "bs32")
    output_len: int = 64
    rounds: int = 2
    probes: int = 24
    epsilon: float = 1.0
    seconds: float = 420.0
    baselines: tuple[str, ...] = ("hf_naive", "hf_compiled")
    kv_tokens: int = 0
    results_dir: str = "results/local"

    def __post_init__(self) -> None:
        for name in self.workloads:
            if name not in peak.LOADS:
                raise unknown_name("workload", name, peak.LOADS)
        for name in ("rounds", "probes", "seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive.")
        for name in ("output_len", "kv_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative.")


@dataclass(frozen=True, slots=True)
class Task:
    """What every row of a run is measured on.

    Attributes
    ----------
    loads
        Requests by name.
    whole
        Requests of the rungs; empty where there are none.
    prompts, expected
        Of the check: prompts, and the core's outputs with log-probabilities.
    expected_whole
        The core's outputs of ``whole``.
    """

    limits: Limits
    loads: dict[str, list[WorkloadRequest]]
    whole: list[WorkloadRequest]
    prompts: list[list[int]]
    expected: list[Any]
    expected_whole: list[Any]


# -- what is measured -------------------------------------------------------------------------


def build(composed: Composed, limits: Limits) -> Engine:
    """An engine of a composition."""
    return build_engine(engine_config(composed, limits))


def prepare(composed: Composed, options: Options) -> Task:
    """Make the loads, and run the core, without any technique, on what outputs are compared on."""
    spec = spec_from_hf(read_config(engine_config(composed, Limits()).source.config))
    context = spec.max_position_embeddings

    def requests(name: str) -> list[WorkloadRequest]:
        return peak.LOADS[name].workload.requests(0, None, spec.vocab_size, context)

    whole = requests(RUNG_LOAD) if options.baselines else []
    most = options.output_len or context
    loads = {
        name: [replace(r, max_tokens=min(r.max_tokens, most)) for r in requests(name)]
        for name in options.workloads
    }
    prompts = peak.probe_prompts(spec.vocab_size, options.probes)
    longest = max(
        *(len(r.prompt_token_ids) + r.max_tokens for rs in (whole, *loads.values()) for r in rs),
        *(len(prompt) + PROBE_TOKENS for prompt in prompts),
    )
    max_model_len = min(-(-longest // 64) * 64, context)
    most_requests = max(8, *(len(rs) for rs in loads.values()))
    limits = Limits(min(most_requests, peak.MAX_NUM_SEQS), max_model_len, options.kv_tokens)
    core = build(composed, Limits(8, max_model_len))
    expected = core.generate(prompts, greedy(PROBE_TOKENS, logprobs=20))
    expected_whole = [
        core.generate([list(r.prompt_token_ids)], greedy(r.max_tokens, logprobs=20))[0]
        for r in whole
    ]
    return Task(limits, loads, whole, prompts, expected, expected_whole)


def greedy(max_tokens: int, logprobs: int | None = None) -> SamplingParams:
    """Greedy decoding of a fixed length."""
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs)


def decode_step(steps: Sequence[StepRecord]) -> dict[str, float]:
    """Steps without a prompt: how many, and the medians of host and device in microseconds."""
    plain = [s for s in steps if not s.num_prompt_tokens]
    if not plain:
        return {"steps": 0}
    return {
        "steps": len(plain),
        "host_us": round(statistics.median(s.host_us for s in plain), 1),
        "device_us": round(statistics.median(s.device_us for s in plain), 1),
    }


def time_load(
    engine: Engine, requests: Sequence[WorkloadRequest], metric: str, rounds: int
) -> dict[str, Any]:
    """Serve a load ``rounds`` times, after a whole one that is not timed: ops that are launched one
    by one take seconds for what they do once a length."""
    peak.serve(engine, requests)
    runs = [peak.serve(engine, requests) for _ in range(rounds)]
    output = sum(r.max_tokens for r in requests)
    total = output + sum(len(r.prompt_token_ids) for r in requests)
    tokens = output if metric == "output_tok_s" else total
    return {
        "metric": metric,
        "values": [round(tokens / wall, 2) for wall, _ in runs],
        "wall_s": [round(wall, 4) for wall, _ in runs],
        "output_tokens": output,
        "total_tokens": total,
        "decode_step": decode_step(runs[-1][1]),
        "steps": peak.summarize(runs[-1][1]),
        "counters": engine.counters(),
    }


def check(engine: Engine, task: Task, epsilon: float) -> peak.Check:
    """The worse of two comparisons; in the second, what is cached and captured was used before."""
    checks = [
        peak.compare(engine.generate(task.prompts, greedy(PROBE_TOKENS)), task.expected, epsilon)
        for _ in "ab"
    ]
    return max(checks, key=lambda c: (not c.passed, c.ties))


def row_of(variant: Variant) -> dict[str, Any]:
    """What every record of a row of the engine has."""
    return {**asdict(variant), "row": "engine"}


def rung_row(name: str) -> dict[str, Any]:
    """What the record of a rung has."""
    return {"row": "rung", "name": name, "workload": WHOLE}


def measured_or_why(row: dict[str, Any], measure: Callable[[], list[Any]]) -> list[dict[str, Any]]:
    """What ``measure`` returns; where it raises, one record with the reason."""
    try:
        return measure()
    except WorkbenchError as error:
        return [{**row, "status": "unsupported", "reason": str(error)}]
    except Exception as error:  # the rows that follow would be lost
        traceback.print_exc()
        return [{**row, "status": "FAILED", "reason": f"{type(error).__name__}: {error}"}]


def run_variant(variant: Variant, plan: Plan, task: Task, options: Options) -> list[dict[str, Any]]:
    """A row's records, one a load; one alone where its outputs are wrong."""
    row = row_of(variant)
    began = time.perf_counter()
    composed = compose_config(
        [f"model={options.model}", "weights=random", *plan.overrides, *variant.override]
    )
    engine = build(composed, task.limits)
    info = engine.parts.info
    row |= {
        "components": {slot: node["_target_"] for slot, node in composed.components.items()},
        "build_s": round(time.perf_counter() - began, 2),
        "memory": engine.parts.ledger.predicted,
        **{key: info[key] for key in ("attention", "dtype", "kv_pool_tokens", "block_size")},
    }
    found = check(engine, task, options.epsilon)
    row["check"] = asdict(found)
    if not found.passed:
        return [{**row, "status": "FAILED", "reason": "its tokens differ from the core's"}]
    loads = {name: (rs, peak.LOADS[name].metric) for name, rs in task.loads.items()}
    if task.whole and variant.kind in ("full", "add_to_full"):
        loads[WHOLE] = (task.whole, "output_tok_s")
    records = []
    for name, (requests, metric) in loads.items():
        measured = time_load(engine, requests, metric, options.rounds)
        idle = missing_evidence(composed.techniques, measured["counters"])
        records.append({**row, "status": "ok", "workload": name, "idle": idle, **measured})
    return records


def run_rung(name: str, plan: Plan, task: Task, options: Options) -> list[dict[str, Any]]:
    """The record of one rung of Transformers, on the whole load at batch 1."""
    composed = compose_config([f"model={options.model}", "weights=random", *plan.overrides])
    settings = ablation_rungs.options_of_rung(composed, name)
    row = {**rung_row(name), "components": settings}
    device = composed.choices["engine/platform"]
    dtype = composed.cfg.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    config = engine_config(composed, task.limits)
    with ablation_rungs.rung(settings, config, dtype, device) as backend:
        measured = ablation_rungs.measure_rung(
            backend, settings, task.whole, task.expected_whole, options.rounds, options.epsilon
        )
    return [{**row, **measured}]


# -- the program ------------------------------------------------------------------------------


def again(variants: Sequence[Variant]) -> list[Variant]:
    """Both ends once more."""
    ends = [v for v in variants if v.kind in ("base", "full")]
    return [
        replace(v, name=f"{v.name}, again", kind=f"{v.kind}_again", end=v.name, against=v.name)
        for v in ends
    ]


def measure_all(
    plan: Plan, task: Task, options: Options, write: Any, began: float
) -> list[dict[str, Any]]:
    """Every row in turn, each on an engine of its own; records are written as they come."""
    records: list[dict[str, Any]] = []
    for variant in [*plan.variants, *again(plan.variants)]:
        spent = time.perf_counter() - began
        row = row_of(variant)
        if spent > options.seconds:
            why = f"{spent:.0f} s were over, of seconds={options.seconds:g}"
            found = [{**row, "status": "left", "reason": why}]
        else:
            found = measured_or_why(row, partial(run_variant, variant, plan, task, options))
            peak.free_memory()
        records += write(found)
    for name in options.baselines:
        measure = partial(run_rung, name, plan, task, options)
        records += write(measured_or_why(rung_row(name), measure))
        peak.free_memory()
    return records


def all_measured(records: Sequence[dict[str, Any]]) -> bool:
    """Whether both ends and every rung have numbers, and no row failed or was left."""
    needed = [r for r in records if r["row"] == "rung" or r["kind"] in ("base", "full")]
    return all(r["status"] == "ok" for r in needed) and not any(
        r["status"] in ("FAILED", "left") for r in records
    )


def main(arguments: Sequence[str]) -> int:
    """Measure every row, write records and a figure, print the tables."""
    options, overrides = command.parse(Options, arguments)
    plan = plan_ablation(
        options.preset, options.base, options.techniques, overrides, load_markers()
    )
    core = compose_config([f"model={options.model}", "weights=random", *plan.overrides])
    for name in options.baselines:
        ablation_rungs.options_of_rung(core, name)
    began = time.perf_counter()
    environment = collect_environment(core.choices["engine/platform"])
    now = time.gmtime()
    day, run_id = time.strftime("%Y-%m-%d", now), time.strftime("%Y%m%dT%H%M%S", now)
    folder = Path(options.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{environment.hardware_slug}_{day}_gpu_ablation.jsonl"
    task = prepare(core, options)
    peak.free_memory()
    common = {
        "experiment": "gpu_ablation",
        "run_id": run_id,
        "model": options.model,
        "options": asdict(options),
        "overrides": list(plan.overrides),
        "shortened_to": options.output_len or None,
        "limits": asdict(task.limits),
        "environment": environment.to_dict(),
        "command": command.command_line("gpu_ablation", arguments),
    }

    def write(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        with file.open("a") as out:
            out.writelines(json.dumps({**common, **row}) + "\n" for row in found)
        for row in found:
            told = row.get("values") or row["reason"]
            command.show(f"{row['name']} [{row.get('workload', '-')}]: {row['status']} {told}")
        return found

    records = measure_all(plan, task, options, write, began)
    figure = draw(records, common, file.with_name(f"{file.stem}_{run_id}.png"))
    note = f"{time.perf_counter() - began:.0f} s; records: {file}"
    tables = [*result_tables(records, common), *rung_table(records, WHOLE)]
    command.show(*tables, *reasons(records), note, f"figure: {figure}")
    return 0 if all_measured(records) else 1


if __name__ == "__main__":
    command.run(main)
