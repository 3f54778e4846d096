"""How many drafts have to hold before speculation pays, at each batch size and draft length?

    python -m experiments.break_even [batch_sizes=1,8,32] [draft_lengths=1,3,5] [drafter=synthetic]

Drafts are accepted by chance, as often as told, so that speed can be measured with any weights: the
tokens mean nothing, and no output is compared. For each draft length an engine with a drafter and
one without serve the same batches in turn; only steps in which the whole batch decodes count. A
step of speculation that yields ``a`` tokens a request is worth ``a`` plain ones, so the speed-up is
``a * plain / step`` and drafts pay from ``a = step / plain`` on: that line is drawn, and beside it
the speed-ups that were measured. With ``drafter=synthetic`` drafts cost nothing but their
verification; another drafter is run for what it costs. With ``adaptive=true`` the engine with a
drafter chooses itself whether to draft, and how much: its speed-ups should not fall below 1, and
steps with drafts and without count alike. Everything else on the command line goes to
Hydra and holds for both engines.
"""

from __future__ import annotations

import json
import secrets
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from rich.table import Table

from experiments import command, figures
from experiments.peak import free_memory
from techniques.synthetic_acceptance import SyntheticVerifier
from workbench.assemble import Limits, build_engine
from workbench.bench.environment import collect_environment
from workbench.configuration import compose_config, engine_config
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.core.step import StepRecord
from workbench.engine.engine import Engine

#: Steps before the first that counts, in which graphs and caches are met for the first time.
_WARM_UP = 4


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the experiment.

    Attributes
    ----------
    batch_sizes
        Requests that decode at once.
    draft_lengths
        Drafts a request a step.
    acceptance_lengths
        Tokens a verification yields on average, the target's own included; those over a draft
        length plus one are left out.
    input_len
        Tokens of a prompt.
    num_steps
        Steps that are timed, of each kind and round.
    rounds
        How often the two engines take turns.
    drafter
        Option of ``engine/drafter``.
    techniques
        Of both engines.
    base_techniques
        Of the engine without speculation alone, such as ``overlap``.
    adaptive
        Whether ``adaptive_drafts`` chooses the length; then ``base_techniques`` hold for both, and
        steps are counted only once it had ``learning_steps``.
    learning_steps
        See there.
    results_dir
        Where records go.
    """

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    draft_lengths: tuple[int, ...] = (1, 3, 5, 8)
    acceptance_lengths: tuple[float, ...] = (1.5, 2.5, 3.5)
    input_len: int = 64
    num_steps: int = 24
    rounds: int = 3
    drafter: str = "synthetic"
    techniques: tuple[str, ...] = ("continuous_batching", "paged_attention")
    base_techniques: tuple[str, ...] = ("",)
    adaptive: bool = False
    learning_steps: int = 64
    results_dir: str = "results/local"

    def __post_init__(self) -> None:
        for name, values, least in (
            ("batch_sizes", self.batch_sizes, 1),
            ("draft_lengths", self.draft_lengths, 1),
            ("acceptance_lengths", self.acceptance_lengths, 1),
            ("input_len", (self.input_len,), 1),
            ("num_steps", (self.num_steps,), 1),
            ("rounds", (self.rounds,), 1),
            ("learning_steps", (self.learning_steps,), 0),
        ):
            if not values or min(values) < least:
                raise ConfigError(f"{name}={','.join(map(str, values))} must be {least} or more.")


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps in which a whole batch decoded: seconds each, tokens a request and step, and medians of
    microseconds by part of a step."""

    seconds: list[float]
    tokens_each: float
    parts_us: dict[str, float]


def make_engine(
    options: Options, overrides: Sequence[str], techniques: Sequence[str], longest: int
) -> Engine:
    """An engine for the largest batch."""
    names = [name for name in techniques if name]
    chosen = [f"+technique=[{','.join(names)}]"] if names else []
    limits = Limits(max(options.batch_sizes), options.input_len + longest)
    return build_engine(engine_config(compose_config([*overrides, *chosen]), limits))


def decode(
    engine: Engine, batch_size: int, options: Options, most_each: int, warm_up: int = _WARM_UP
) -> Steps:
    """Let a batch decode, and time the steps in which all of it does and nothing else runs."""
    engine.clear_cached()
    wanted = warm_up + options.num_steps
    params = SamplingParams(max_tokens=1 + most_each * (wanted + 2), ignore_eos=True)
    generator = torch.Generator().manual_seed(batch_size)
    prompts = torch.randint(
        0, engine.parts.vocab_size, (batch_size, options.input_len), generator=generator
    )
    ids = [engine.add_request(prompt, params) for prompt in prompts.tolist()]
    seconds: list[float] = []
    num_tokens, timed = 0, list[StepRecord]()
    while len(seconds) < wanted:
        began = time.perf_counter()
        engine.step()
        took = time.perf_counter() - began
        step = engine.steps[-1]
        if step.num_requests == batch_size and not step.num_prompt_tokens:
            seconds.append(took)
            if len(seconds) > warm_up:
                num_tokens += step.num_output_tokens
                timed.append(step)
    for request_id in ids:
        engine.abort(request_id)
    while engine.has_unfinished():
        engine.step()
    names = {name for step in timed for name in step.parts_us}
    parts = {
        name: round(statistics.median(step.parts_us.get(name, 0.0) for step in timed), 1)
        for name in sorted(names)
    }
    parts["device"] = round(statistics.median(step.device_us for step in timed), 1)
    return Steps(seconds[warm_up:], num_tokens / (batch_size * options.num_steps), parts)


def measure_length(
    options: Options, overrides: Sequence[str], plain: Engine, num_drafts: int
) -> list[dict[str, Any]]:
    """One entry a batch size: seconds of plain steps and of steps with so many drafts, and the
    speed-up at each acceptance length that is possible."""
    speculation = [
        f"engine/drafter={options.drafter}",
        "engine/verifier=synthetic",
        f"engine.drafter.num_draft_tokens={num_drafts}",
        "engine.verifier.mean_accepted_length=1.0",
    ]
    warm_up, techniques = _WARM_UP, list(options.techniques)
    if options.adaptive:
        warm_up = max(warm_up, options.learning_steps)
        speculation.append("engine/draft_length=adaptive")
        techniques += options.base_techniques
    longest = _longest(options, num_drafts + 1, warm_up)
    engine = make_engine(options, [*overrides, *speculation], techniques, longest)
    verifier = engine.parts.components["verifier"]
    assert isinstance(verifier, SyntheticVerifier)
    lengths = [a for a in options.acceptance_lengths if a <= num_drafts + 1]
    entries = []
    for batch_size in options.batch_sizes:
        plain_s: list[float] = []
        step_s: list[float] = []
        ratios: dict[float, list[float]] = {a: [] for a in lengths}
        yielded: dict[float, list[float]] = {a: [] for a in lengths}
        for _ in range(options.rounds):
            # As many steps before, so that contexts are as long; drafts that hold make them longer.
            base = decode(plain, batch_size, options, 1, warm_up)
            plain_s.append(statistics.median(base.seconds))
            for asked in lengths:
                verifier.accept(asked, num_drafts)
                found = decode(engine, batch_size, options, num_drafts + 1, warm_up)
                step_s.append(statistics.median(found.seconds))
                yielded[asked].append(found.tokens_each)
                rate = found.tokens_each / statistics.mean(found.seconds)
                ratios[asked].append(rate * statistics.mean(base.seconds) / base.tokens_each)
        one, many = statistics.median(plain_s), statistics.median(step_s)
        entries.append(
            {
                "batch_size": batch_size,
                "num_draft_tokens": num_drafts,
                "plain_step_ms": 1e3 * one,
                "step_ms": 1e3 * many,
                "break_even_length": many / one,
                "plain_parts_us": base.parts_us,
                "parts_us": found.parts_us,
                "plain_step_ms_by_round": [1e3 * s for s in plain_s],
                "step_ms_by_run": [1e3 * s for s in step_s],
                "measured": [
                    {
                        "asked_length": a,
                        "accepted_length": statistics.mean(yielded[a]),
                        "speedup": statistics.median(ratios[a]),
                        "speedups": ratios[a],
                    }
                    for a in lengths
                ],
            }
        )
    return entries


def _longest(options: Options, most_each: int, warm_up: int = _WARM_UP) -> int:
    return 2 + most_each * (warm_up + options.num_steps + 3)


def result_table(entries: Sequence[dict[str, Any]]) -> Table:
    """A row a batch size and draft length."""
    table = command.new_table(
        "tokens that a verification must yield before drafts pay",
        "requests, drafts", "plain ms", "with drafts ms", "break-even", "speed-up (tokens a step)",
    )  # fmt: skip
    for entry in entries:
        points = ", ".join(
            f"{p['speedup']:.2f}x ({p['accepted_length']:.2f})" for p in entry["measured"]
        )
        table.add_row(
            f"{entry['batch_size']}, {entry['num_draft_tokens']}",
            f"{entry['plain_step_ms']:.2f}",
            f"{entry['step_ms']:.2f}",
            f"{entry['break_even_length']:.2f}",
            points,
        )
    return table


def draw(record: dict[str, Any], file: Path) -> Path:
    """Break-even lengths over the batch, and speed-ups over what a verification yields."""
    entries, details = record["entries"], record["engine"]
    slug, day = record["environment"]["hardware_slug"], record["time"][:10]
    title = f"when drafts pay · {details['model']}, {details['dtype']} · {slug} · {day}"
    figure, (left, right) = figures.new_figure(title, 2, width=5.8)
    lengths = sorted({e["num_draft_tokens"] for e in entries})
    for index, num_drafts in enumerate(lengths):
        own = [e for e in entries if e["num_draft_tokens"] == num_drafts]
        left.plot(
            [e["batch_size"] for e in own],
            [e["break_even_length"] for e in own],
            color=figures.colour(index),
            marker=figures.marker(index),
            label=f"{num_drafts} drafts",
        )
        left.axhline(num_drafts + 1, color=figures.colour(index), lw=0.6, ls=":")
    left.set_xscale("log", base=2)
    left.set_xlabel("requests that decode at once")
    left.set_ylabel("tokens a verification must yield")
    left.set_title("break-even (dotted: all drafts hold)", fontsize=9, loc="left")
    figures.legend(left, loc="best")
    _draw_speedups(right, [e for e in entries if e["num_draft_tokens"] == lengths[-1]])
    return figures.save(figure, file.with_name(f"{slug}_{day}"), "break_even", record["run_id"])


def _draw_speedups(axes: Axes, entries: Sequence[dict[str, Any]]) -> None:
    for index, entry in enumerate(entries):
        accepted = np.linspace(1, entry["num_draft_tokens"] + 1, 50)
        axes.plot(
            accepted,
            accepted / entry["break_even_length"],
            color=figures.colour(index),
            label=f"{entry['batch_size']} requests",
        )
        axes.plot(
            [p["accepted_length"] for p in entry["measured"]],
            [p["speedup"] for p in entry["measured"]],
            color=figures.colour(index),
            marker=figures.marker(index),
            ls="none",
        )
    axes.axhline(1.0, color="#666666", lw=0.8)
    axes.set_xlabel("tokens a verification yields")
    axes.set_ylabel("speed-up over no drafts")
    drafts = entries[0]["num_draft_tokens"]
    axes.set_title(f"{drafts} drafts: by step times, and measured", fontsize=9, loc="left")
    figures.legend(axes, loc="upper left")


def main(arguments: Sequence[str]) -> int:
    """Measure, write the record and the figure, print the table."""
    options, overrides = command.parse(Options, arguments)
    line = command.command_line("break_even", arguments)
    longest = _longest(options, 1, options.learning_steps if options.adaptive else _WARM_UP)
    names = [*options.techniques, *options.base_techniques]
    plain = make_engine(options, overrides, names, longest)
    entries: list[dict[str, Any]] = []
    for num_drafts in options.draft_lengths:
        entries += measure_length(options, overrides, plain, num_drafts)
        free_memory()
        command.show(result_table(entries[-len(options.batch_sizes) :]))
    info = plain.parts.info
    environment = collect_environment("cuda" if "cuda" in info["device"] else "cpu")
    record: dict[str, Any] = {
        "kind": "break_even",
        "run_id": secrets.token_hex(4),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": line,
        "engine": {k: info[k] for k in ("model", "weights", "dtype", "device", "attention")},
        "drafter": options.drafter,
        "adaptive": options.adaptive,
        "techniques": [name for name in options.techniques if name],
        "base_techniques": [name for name in options.base_techniques if name],
        "entries": entries,
        "environment": environment.to_dict(),
    }
    day = record["time"][:10]
    file = Path(options.results_dir) / f"{environment.hardware_slug}_{day}_break_even.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.write(json.dumps(record) + "\n")
    figure = draw(record, file)
    command.show(result_table(entries), f"records: {file}", f"figure:  {figure}")
    return 0


if __name__ == "__main__":
    command.run(main)
