"""How fast is the whole engine on one GPU, and how far from the card's limit?

    python -m experiments.peak [models=llama-3.1-8b,qwen3-0.6b] [workloads=bs1,nano256] [rounds=2]

Serves five loads with random weights of the true shape, after the outputs of a probe were compared
with those of an eager engine without any technique on the same weights: the first token that
differs must lie within ``epsilon`` logits of the eager engine's own choice, which in half precision
is a tie. Weights and activations in few bits make every sum another one, and random weights choose
among tokens that are nearly alike: outputs of a lossy composition are held to those of an eager
engine of the same format, by how much less likely they are to the model that was not rounded.
Prints the best known engine's figures on the same card and the floor of the memory and arithmetic
that each load needs beside its own; where those come from stands in ``results/anchors/``.
Everything else on the command line goes to Hydra, over ``preset=gpu`` or the preset that it names,
with KV blocks of 64 tokens, which are cheaper to look up than the default's: ``preset=gpu_cascade
workloads=shared_prefix`` reads shared prefixes once, ``preset=gpu_fp8`` has weights and activations
in fp8, ``preset=gpu_int4`` weights in 4 bits, in the eager engine as well.
"""

from __future__ import annotations

import csv
import gc
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from omegaconf import OmegaConf
from rich.table import Table

from experiments import command
from workbench.assemble import Limits, build_engine
from workbench.bench.environment import collect_environment
from workbench.bench.timeline import summarize
from workbench.bench.workloads import (
    FixedWorkload,
    Nano256Workload,
    SharedPrefixWorkload,
    Workload,
)
from workbench.configuration import compose_config, engine_config
from workbench.core.errors import ConfigError, unknown_name
from workbench.core.sampling import SamplingParams
from workbench.core.step import StepRecord
from workbench.core.workload import WorkloadRequest
from workbench.engine.engine import Engine
from workbench.quality.prompt_logits import run_prompt

ANCHORS = Path(__file__).parents[1] / "results/anchors/vllm-0.26.0_nvidia-h100-80gb-hbm3.csv"
MAX_NUM_SEQS = 256
MAX_MODEL_LEN = 2304
#: Nats a token that ties of half precision are worth.
_FREE_NATS = 0.02


@dataclass(frozen=True, slots=True)
class Load:
    """Requests that are all there at the start, and the rate that is reported of them."""

    workload: Workload
    metric: str


LOADS = {
    "bs1": Load(FixedWorkload(num_requests=1), "output_tok_s"),
    "bs32": Load(FixedWorkload(num_requests=32), "output_tok_s"),
    "nano256": Load(Nano256Workload(), "output_tok_s"),
    "prefill": Load(FixedWorkload(num_requests=64, input_len=2048, output_len=1), "total_tok_s"),
    "shared_prefix": Load(SharedPrefixWorkload(), "total_tok_s"),
}


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the experiment.

    Attributes
    ----------
    models
        Names or folders, as of ``model=``.
    workloads
        Of :data:`LOADS`.
    rounds
        Timed runs of each load.
    epsilon
        Logits by which a token that differs may lie below the eager engine's own.
    kv_tokens
        Tokens of KV in the measured engine.
    results_dir
        Where records go.
    """

    models: tuple[str, ...] = ("llama-3.1-8b", "qwen3-0.6b")
    workloads: tuple[str, ...] = tuple(LOADS)
    rounds: int = 2
    epsilon: float = 1.0
    kv_tokens: int = 300_000
    results_dir: str = "results/local"

    def __post_init__(self) -> None:
        for name in self.workloads:
            if name not in LOADS:
                raise unknown_name("workload", name, LOADS)
        if self.rounds < 1:
            raise ConfigError(f"rounds={self.rounds} must be positive.")


def make_engine(
    model: str, overrides: Sequence[str], kv_tokens: int, max_num_seqs: int = MAX_NUM_SEQS
) -> tuple[Engine, dict[str, Any]]:
    """An engine on random weights, and the names of what fills its slots."""
    composed = compose_config([f"model={model}", "weights=random", *overrides])
    limits = Limits(max_num_seqs, MAX_MODEL_LEN, kv_tokens)
    engine = build_engine(engine_config(composed, limits))
    return engine, {slot: node["_target_"] for slot, node in composed.components.items()}


# -- correctness ------------------------------------------------------------------------------


def probe_prompts(vocab_size: int, count: int = 24) -> list[list[int]]:
    """Prompts of many lengths, two thirds of which share their beginning with another; a third
    share a long one."""
    ids = torch.randint(0, vocab_size, (count + 1, 420), generator=torch.Generator().manual_seed(1))
    *prompts, stem = [row[: 17 * n + 3].tolist() for n, row in enumerate(ids, start=1)]
    starts = [lambda n: [], lambda n: stem, lambda n: prompts[0] + prompts[n // 3]]
    return [starts[n % 3](n) + p for n, p in enumerate(prompts)]


@dataclass(frozen=True, slots=True)
class Check:
    """Outputs compared with the eager engine's: requests, ties, and the worst margin in logits; of
    a lossy composition, nats a token by which its outputs, and the eager engine's of the same
    format, are less likely than the choice of the model that was not rounded."""

    requests: int
    ties: int
    worst_margin: float | None
    passed: bool
    excess_nats: float | None = None
    eager_excess_nats: float | None = None


def compare(ours: Sequence[Any], eager: Sequence[Any], epsilon: float) -> Check:
    """Compare greedy outputs; eager ones come with the log-probabilities of their best tokens."""
    ties, worst, passed = 0, 0.0, True
    for mine, theirs in zip(ours, eager, strict=True):
        if len(mine.token_ids) != len(theirs.token_ids):
            passed = False
            continue
        place = next(
            (
                i
                for i, (a, b) in enumerate(zip(mine.token_ids, theirs.token_ids, strict=True))
                if a != b
            ),
            None,
        )
        if place is None:
            continue
        entry = theirs.outputs[0].logprobs[place]
        known = dict(entry.top)
        margin = entry.logprob - known.get(mine.token_ids[place], -torch.inf)
        ties, worst = ties + 1, max(worst, margin)
        passed &= margin <= epsilon
    return Check(len(ours), ties, worst, passed)


def lossy_part(model: str, overrides: Sequence[str]) -> list[str]:
    """What of a composition changes the model itself, as overrides of another."""
    composed = compose_config([f"model={model}", "weights=random", *overrides])
    lossy = [name for name, m in composed.techniques.items() if m.losslessness == "lossy"]
    if not lossy:
        return []
    slots = {slot for name in lossy for slot in composed.techniques[name].slots}
    options = [
        f"engine.{slot}.{key}={json.dumps(value)}"  # a preset may have set it
        for slot in sorted(slots)
        for key, value in OmegaConf.to_container(composed.cfg.engine[slot]).items()
        if key != "_target_"
    ]
    return [f"+technique=[{','.join(lossy)}]", *options]


def excess_nats(
    judge: Engine, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
) -> float:
    """Nats a token, on average, by which outputs are less likely to a model than its own choice."""
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = run_prompt(judge, [*prompt, *output[:-1]])
        rows = logits.rows(len(prompt) - 1, len(prompt) + len(output) - 1).float()
        tokens = torch.tensor(output, device=rows.device).unsqueeze(1)
        found += (rows.amax(1) - rows.gather(1, tokens).squeeze(1)).tolist()
    return statistics.mean(found)


def check_lossy(engine: Engine, model: str, lossy: Sequence[str], platform: str = "cuda") -> Check:
    """Outputs of a composition that changes the model may be no less likely to the model as it was
    than those of the core with what changes it alone."""
    prompts = probe_prompts(engine.parts.vocab_size)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    ours = [[o.token_ids for o in engine.generate(prompts, params)] for _ in "ab"]
    limits = (8 * MAX_MODEL_LEN, 8)
    core, _ = make_engine(model, [f"engine/platform={platform}", *lossy], *limits)
    eager = [o.token_ids for o in core.generate(prompts, params)]
    del core
    free_memory()
    judge, _ = make_engine(model, [f"engine/platform={platform}"], *limits)
    wanted = excess_nats(judge, prompts, eager)
    found = max(excess_nats(judge, prompts, outputs) for outputs in ours)
    parted = sum(a != b for a, b in zip(ours[0], eager, strict=True))
    passed = found <= 1.25 * wanted + _FREE_NATS
    return Check(len(prompts), parted, None, passed, found, wanted)


def check_outputs(
    engine: Engine, model: str, options: Options, overrides: Sequence[str] = ()
) -> Check:
    """The engine's greedy outputs against those of the core without any technique."""
    if lossy := lossy_part(model, overrides):
        return check_lossy(engine, model, lossy)
    prompts = probe_prompts(engine.parts.vocab_size)
    # Twice: the second time, what is cached and captured has been used before.
    ours = [engine.generate(prompts, SamplingParams(max_tokens=24, ignore_eos=True)) for _ in "ab"]
    core, _ = make_engine(model, ["engine/platform=cuda"], 8 * MAX_MODEL_LEN, max_num_seqs=8)
    params = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=20)
    eager = core.generate(prompts, params)
    del core
    free_memory()
    checks = [compare(outputs, eager, options.epsilon) for outputs in ours]
    return max(checks, key=lambda c: (not c.passed, c.ties))


def free_memory() -> None:
    """Give back what a dropped engine held."""
    gc.collect()
    torch.cuda.empty_cache()


# -- speed ------------------------------------------------------------------------------------


def serve(engine: Engine, requests: Sequence[WorkloadRequest]) -> tuple[float, list[StepRecord]]:
    """Seconds from the first request in to the last token out, cold; and what the steps were."""
    engine.clear_cached()
    engine.reset_counters()
    began = time.perf_counter()
    for request in requests:
        params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True)
        engine.add_request(request.prompt_token_ids, params, request.request_id)
    num_tokens = 0
    while engine.has_unfinished():
        num_tokens += sum(len(output.new_token_ids) for output in engine.step())
    wall_s = time.perf_counter() - began
    wanted = sum(request.max_tokens for request in requests)
    assert num_tokens == wanted, f"{num_tokens} tokens came out, not {wanted}"
    return wall_s, list(engine.steps)


def measure(engine: Engine, name: str, options: Options) -> dict[str, Any]:
    """Run a load ``rounds`` times, after a short one that warms up what it needs."""
    load = LOADS[name]
    requests = load.workload.requests(0, None, engine.parts.vocab_size, MAX_MODEL_LEN)
    output = sum(r.max_tokens for r in requests)
    total = output + sum(len(r.prompt_token_ids) for r in requests)
    serve(engine, [replace(r, max_tokens=min(2, r.max_tokens)) for r in requests])
    runs = [serve(engine, requests) for _ in range(options.rounds)]
    tokens = output if load.metric == "output_tok_s" else total
    return {
        "workload": name,
        "metric": load.metric,
        "values": [round(tokens / wall, 1) for wall, _ in runs],
        "wall_s": [round(wall, 4) for wall, _ in runs],
        "output_tokens": output,
        "total_tokens": total,
        "steps": summarize(runs[-1][1]),
        "counters": engine.counters(),
    }


# -- the program ------------------------------------------------------------------------------


def anchors() -> dict[tuple[str, str], dict[str, float]]:
    """Other figures on the same card, by model and workload."""
    with ANCHORS.open() as file:
        return {
            (row["model"], row["workload"]): {k: float(row[k]) for k in ("vllm", "floor")}
            for row in csv.DictReader(file)
        }


def run_model(model: str, options: Options, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Records of one model, the check first.

    The first model's first token counts from the start of the program, later ones' from here.
    """
    is_first = model == options.models[0]
    began = psutil.Process().create_time() if is_first else time.time()
    engine, components = make_engine(model, overrides, options.kv_tokens)
    engine.generate([1, 2, 3], SamplingParams(max_tokens=1, ignore_eos=True))
    first_token_s = time.time() - began
    check = check_outputs(engine, model, options, overrides)
    base = {
        "kind": "peak",
        "model": model,
        "components": components,
        "overrides": list(overrides),
        "check": asdict(check),
        "first_token_s": round(first_token_s, 2),
        "build_s": round(engine.parts.info["build_s"], 2),
        "counts_from": "program start" if is_first else "the model before",
        "memory": engine.parts.ledger.predicted,
        "environment": collect_environment("cuda").to_dict(),
    }
    command.show(f"{model}: first token after {first_token_s:.1f} s, {check}")
    if not check.passed:
        return [{**base, "status": "FAILED"}]
    from workbench.bench.timeline_report import timeline_table  # the first token does without

    records = []
    for name in options.workloads:
        records.append({**base, "status": "ok", **measure(engine, name, options)})
        values = ", ".join(f"{v:,.1f}" for v in records[-1]["values"])
        command.show(f"{model} {name}: {values} {records[-1]['metric']}")
        command.show(timeline_table(records[-1]["steps"], f"{model} {name}"))
    return records


def result_table(records: Sequence[dict[str, Any]]) -> Table:
    """Ours beside the best known figure and the floor."""
    table = command.new_table(
        "tok/s on this GPU, greedy, random weights",
        "model, load", "rate", "ours", "vLLM", "ratio", "floor", "% of it", "ties",
    )  # fmt: skip
    known = anchors()
    for record in records:
        label = f"{record['model']}, {record.get('workload', '-')}"
        if record["status"] != "ok":
            table.add_row(label, *["-"] * 6, "FAILED")
            continue
        ours = statistics.median(record["values"])
        other = known.get((record["model"], record["workload"]))
        check = record["check"]
        table.add_row(
            label,
            record["metric"].removesuffix("_tok_s"),
            f"{ours:,.1f}",
            f"{other['vllm']:,.1f}" if other else "-",
            f"{ours / other['vllm']:.2f}x" if other else "-",
            f"{other['floor']:,.0f}" if other else "-",
            f"{100 * ours / other['floor']:.0f}" if other else "-",
            f"{check['ties']} of {check['requests']}"
            if check.get("excess_nats") is None
            else f"{check['excess_nats']:.3f} nats, eager {check['eager_excess_nats']:.3f}",
        )
    return table


def main(arguments: Sequence[str]) -> int:
    """Check and measure every model, write records, print the table."""
    options, overrides = command.parse(Options, arguments)
    if not torch.cuda.is_available():
        raise ConfigError("this experiment needs a CUDA device.")
    if not any(text.startswith("preset=") for text in overrides):
        overrides = ["preset=gpu", *overrides]
    if not any(text.startswith("engine.kv_cache.block_size=") for text in overrides):
        overrides = ["engine.kv_cache.block_size=64", *overrides]
    line = command.command_line("peak", arguments)
    environment = collect_environment("cuda")
    folder = Path(options.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    file = (
        folder
        / f"{environment.hardware_slug}_{time.strftime('%Y-%m-%d', time.gmtime())}_peak.jsonl"
    )
    records: list[dict[str, Any]] = []
    for model in options.models:
        found = run_model(model, options, overrides)
        free_memory()
        with file.open("a") as out:
            out.writelines(json.dumps({**r, "command": line}) + "\n" for r in found)
        records += found
    command.show(result_table(records), f"records: {file}")
    return int(any(record["status"] != "ok" for record in records))


if __name__ == "__main__":
    command.run(main)
