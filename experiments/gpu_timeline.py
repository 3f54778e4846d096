"""Where does a step's time go on the GPU?

    python -m experiments.gpu_timeline [model=qwen3-0.6b] [requests=1] [context=512] [trace=FILE]
    python -m experiments.gpu_timeline phase=prefill requests=16 context=2048 steps=4
    python -m experiments.gpu_timeline tokens_each=6 preset=core engine/drafter=eagle \\
        engine/verifier=exact_match '+technique=[paged_attention,triton_attention,cuda_graphs]'

Brings requests to a steady step of single tokens with random weights, or begins with their prompts
(``phase=prefill``), records some steps with torch's profiler, and prints how long each kernel ran
in a step, how often, and how long the GPU had nothing to do. ``trace=`` writes the recording for
Perfetto or chrome://tracing. Everything else on the command line goes to Hydra, over ``preset=gpu``
or the preset that it names: ``preset=gpu_cascade requests=256 context=2176 shared=2048 groups=8``.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from experiments import command
from workbench.assemble import Limits, build_engine
from workbench.configuration import compose_config, engine_config
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the experiment.

    Attributes
    ----------
    model
        Name or folder.
    requests, context
        Requests in the step, and tokens that each has at its start.
    phase
        ``decode``: steps of single tokens; ``prefill``: the first steps of the requests.
    shared, groups
        Leading ones of these tokens that the requests of a group have in common, and groups.
    steps
        Steps to record.
    tokens_each
        Most tokens that a step yields a request: with drafts, one more than these.
    trace
        Where to write the recording; empty for nowhere.
    """

    model: str = "qwen3-0.6b"
    requests: int = 1
    context: int = 512
    phase: str = "decode"
    shared: int = 0
    groups: int = 1
    steps: int = 20
    tokens_each: int = 1
    trace: str = ""

    def __post_init__(self) -> None:
        if self.phase not in ("decode", "prefill"):
            raise ConfigError(f"phase={self.phase} must be decode or prefill.")
        if not 0 <= self.shared < self.context or not 1 <= self.groups <= self.requests:
            raise ConfigError(
                f"shared={self.shared} must be under context={self.context}, and "
                f"groups={self.groups} from 1 to requests={self.requests}."
            )


def most_new_tokens(options: Options) -> int:
    """Tokens a request, of a run that records decoding."""
    return (3 * options.steps + 20) * options.tokens_each


def add_requests(engine: Engine, options: Options, name: str) -> None:
    """Random prompts."""
    num_tokens = most_new_tokens(options) if options.phase == "decode" else 1
    ids = torch.randint(0, engine.parts.vocab_size, (options.requests, options.context))
    ids[:, : options.shared] = ids[torch.arange(len(ids)) % options.groups, : options.shared]
    for index, prompt in enumerate(ids.tolist()):
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        engine.add_request(prompt, params, f"{name}-{index}")


def time_steps(engine: Engine, count: int) -> list[float]:
    """Wall times of steps, in us."""
    walls = []
    for _ in range(count):
        began = time.perf_counter()
        engine.step()
        walls.append((time.perf_counter() - began) * 1e6)
    return walls


def record_steps(engine: Engine, options: Options) -> tuple[list[dict[str, Any]], float]:
    """Events of the GPU in some steady steps, and the median wall time of one, in us, without the
    profiler."""
    if options.phase == "prefill":
        # Twice alike: the first time for what is compiled and allocated once.
        for name in ("warm", "timed"):
            add_requests(engine, options, name)
            walls = time_steps(engine, options.steps)
            while engine.has_unfinished():
                engine.step()
        add_requests(engine, options, "recorded")
    else:
        add_requests(engine, options, "recorded")
        while len(engine.steps) < 2 or engine.steps[-1].num_requests < options.requests:
            engine.step()
        time_steps(engine, 5)
        walls = time_steps(engine, options.steps)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recording:
        for _ in range(options.steps):
            engine.step()
        torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(options.trace or f"{folder}/trace.json")
        recording.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return [e for e in events if e.get("cat") in kinds], statistics.median(walls)


def short_name(kernel: str) -> str:
    """A kernel's name without its template arguments."""
    name = re.sub(r"<.*", "", kernel).removeprefix("void ")
    return name.split("::")[-1][:60] if "::" in name else name[:60]


def busy_us(events: Sequence[dict[str, Any]]) -> float:
    """Time in which at least one of the events ran."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def main(arguments: Sequence[str]) -> int:
    """Record, and print a row a kernel."""
    options, overrides = command.parse(Options, arguments)
    if not torch.cuda.is_available():
        raise ConfigError("this experiment needs a CUDA device.")
    if not any(text.startswith("preset=") for text in overrides):
        overrides = ["preset=gpu", *overrides]
    composed = compose_config([f"model={options.model}", "weights=random", *overrides])
    most = options.context + most_new_tokens(options)
    turns = 3 if options.phase == "prefill" else 1
    pool = (
        turns * options.requests * (most - options.shared + 64)
        + turns * options.groups * most
        + 4096
    )
    limits = Limits(max(options.requests, 8), -(-most // 64) * 64, pool)
    engine = build_engine(engine_config(composed, limits))
    events, wall = record_steps(engine, options)
    span = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        by_name[short_name(event["name"])].append(event["dur"])
    table = command.new_table(
        f"{options.model}, {options.requests} x {options.context}: GPU time of a step",
        "kernel", "a step", "us each", "us a step", "%",
    )  # fmt: skip
    total = sum(sum(durations) for durations in by_name.values())
    for name, durations in sorted(by_name.items(), key=lambda item: -sum(item[1])):
        table.add_row(
            name,
            f"{len(durations) / options.steps:.1f}",
            f"{statistics.median(durations):.2f}",
            f"{sum(durations) / options.steps:.1f}",
            f"{100 * sum(durations) / total:.1f}",
        )
    busy = busy_us(events) / options.steps
    command.show(
        table,
        f"wall {wall:.0f} us a step; recorded: {span / options.steps:.0f} us a step, of which the "
        f"GPU was busy {busy:.0f}; kernels one after another {total / options.steps:.0f}",
    )
    parts = defaultdict(list)
    for step in list(engine.steps)[-2 * options.steps :]:
        for part, value in step.parts_us.items():
            parts[part].append(value)
    medians = {part: round(statistics.median(values), 1) for part, values in parts.items()}
    command.show(f"host, us a step (medians): {medians}")
    return 0


if __name__ == "__main__":
    command.run(main)
