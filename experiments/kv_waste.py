"""How much KV memory holds nothing: blocks of several sizes against one region a request?

    python -m experiments.kv_waste [results_dir=results]

The same requests, all there from the start, go through the scheduler in a pool of the same size,
without a model: what is wasted depends on lengths and scheduling alone. Waste is the share of the
taken token slots that hold no token, as a mean over steps; fewer steps mean that more requests ran
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.utils import instantiate

from experiments import command, figures
from experiments.dry import DryRecorder, at_once, check_overrides, count
from workbench.assemble import build_scheduler
from workbench.bench.records import Record
from workbench.configuration import Composed, compose_config, limits_of
from workbench.core.errors import ConfigError
from workbench.simulate.dry_run import DryRun, DryRunResult

_VOCAB_SIZE = 32_000  # ids are never looked at


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the experiment.

    Attributes
    ----------
    block_sizes
        Of the paged manager, in tokens.
    check_every
        Check all books every so many steps; 0 at the end of each run.
    """

    block_sizes: tuple[int, ...] = (1, 16, 32, 64)
    check_every: int = 0

    def __post_init__(self) -> None:
        if min(self.block_sizes, default=0) < 1:
            raise ConfigError(f"block_sizes={self.block_sizes} must be 1 or more, each.")


@dataclass(frozen=True, slots=True)
class Run:
    """One manager's dry run."""

    label: str
    record: Record
    result: DryRunResult


def compositions(options: Options, overrides: Sequence[str]) -> dict[str, Composed]:
    """By label: one region a request, then blocks of each size."""
    base = ["+experiment=kv_waste", *overrides]
    found = {"contiguous": compose_config([*base, "engine/kv_cache=contiguous"])}
    for size in options.block_sizes:
        found[f"paged, blocks of {size}"] = compose_config(
            [*base, "engine/kv_cache=paged", f"engine.kv_cache.block_size={size}"]
        )
    return found


def measure_waste(label: str, composed: Composed, recorder: DryRecorder, check_every: int) -> Run:
    """Serve the workload once, and record it."""
    cfg = composed.cfg
    workload = instantiate(cfg.workload)
    requests = workload.requests(cfg.seed, vocab_size=_VOCAB_SIZE)
    limits = limits_of(cfg, max_num_seqs=256, max_model_len=2048)
    scheduler = build_scheduler(composed.components, limits)
    result = DryRun(scheduler, check_every=check_every).serve(at_once(requests))
    described = {
        "name": workload.name,
        "digest": workload.digest(requests),
        **workload.describe(),
    }
    record = recorder.add(label, result, composed, limits, described, {"name": "offline"})
    return Run(label, record, result)


def draw(runs: Sequence[Run], recorder: DryRecorder) -> Path:
    """Left, waste by manager; right, tokens held over the run."""
    title = figures.title_of("KV memory that holds nothing (counted, no model)", recorder.records)
    figure, (bars, over_time) = figures.new_figure(title, 2)
    for index, run in enumerate(runs):
        waste = 100 * count(run.record, "mean_kv_waste")
        bars.bar(index, waste, color=figures.colour(index), width=0.65)
        bars.annotate(f"{waste:.2g} %", (index, waste), ha="center", va="bottom", fontsize=8)
        over_time.plot(
            run.result.kv_used_tokens,
            color=figures.colour(index),
            ls=figures.line(index),
            lw=1.4,
            label=run.label,
        )
    bars.set_xticks(
        range(len(runs)), [run.label.replace(", ", ",\n") for run in runs], fontsize=7.5
    )
    bars.set_ylabel("slots taken that hold no token, % (mean over steps)")
    bars.set_ylim(top=bars.get_ylim()[1] * 1.08)
    pool = runs[0].record.resolved_config["limits"]["kv_pool_tokens"]
    over_time.axhline(pool, color="black", lw=1.0, ls=":")
    over_time.annotate("pool", (0, pool), xytext=(2, 3), textcoords="offset points", fontsize=8)
    over_time.set_xlabel("step")
    over_time.set_ylabel("tokens held")
    over_time.set_ylim(0, pool * 1.55)
    figures.legend(over_time)
    assert recorder.file is not None
    return figures.save(figure, recorder.file, "kv_waste", recorder.run_id)


def main(arguments: Sequence[str]) -> int:
    """Serve the workload with each manager, write records and the figure, print the table."""
    options, overrides = command.parse(Options, arguments)
    keys = ("workload", "limits", "seed", "results_dir")
    check_overrides(overrides, Options, keys, {"kv_cache": "block_sizes"})
    found = compositions(options, overrides)
    results_dir = str(found["contiguous"].cfg.results_dir)
    recorder = DryRecorder(results_dir, command.command_line("kv_waste", arguments))
    runs = [
        measure_waste(label, composed, recorder, options.check_every)
        for label, composed in found.items()
    ]
    table = command.new_table(
        f"KV waste on {recorder.records[0].workload['name']}, counted",
        "manager",
        "mean waste %",
        "at the fullest step %",
        "most tokens held",
        "steps",
        "mean wait, steps",
    )
    for run in runs:
        table.add_row(
            run.label,
            f"{100 * count(run.record, 'mean_kv_waste'):.2f}",
            f"{100 * count(run.record, 'kv_waste_at_fullest'):.2f}",
            f"{count(run.record, 'max_kv_used_tokens'):,.0f}",
            f"{count(run.record, 'steps'):,.0f}",
            f"{count(run.record, 'mean_waited_steps'):,.1f}",
        )
    command.show(table, f"records: {recorder.file}", f"figure:  {draw(runs, recorder)}")
    return 0


if __name__ == "__main__":
    command.run(main)
