"""Who should go first: what does the order of the waiting queue do to hits and to waits?

    python -m experiments.policy_comparison [results_dir=results]

Two loads, all requests there from the start, go through the scheduler and a prefix cache without a
model, under every policy. Chunked prefill bounds what a step runs, so waits are told in steps.

- **shared**: groups of requests with a long common prefix, shuffled, in a pool that holds a few of
  the prefixes: the order decides what the cache still has.
- **mixed**: requests of all lengths that share nothing; every fourth has priority 1, the others 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hydra.utils import instantiate
from rich.table import Table

from experiments import command, figures
from experiments.dry import DryRecorder, at_once, check_overrides, count
from workbench.assemble import build_scheduler
from workbench.bench.records import Record
from workbench.configuration import compose_config, limits_of, options_of
from workbench.core.errors import unknown_name
from workbench.simulate.dry_run import DryRun

_VOCAB_SIZE = 32_000


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the experiment.

    Attributes
    ----------
    policies
        Options of slot ``policy``; all by default.
    num_groups, requests_per_group, shared_len, order
        Of the shared load (``interleaved`` is the hardest order).
    num_requests
        Of the mixed load.
    check_every
        Check all books every so many steps; 0 at the end of each run.
    """

    policies: tuple[str, ...] = ("all",)
    num_groups: int = 8
    requests_per_group: int = 32
    shared_len: int = 2048
    order: str = "shuffled"
    num_requests: int = 512
    check_every: int = 0

    def chosen(self) -> list[str]:
        """Policies to compare, the null object first."""
        known = sorted(options_of("engine/policy"), key=lambda name: (name != "fcfs", name))
        if self.policies == ("all",):
            return known
        for name in self.policies:
            if name not in known:
                raise unknown_name("policy", name, known)
        return list(self.policies)


def loads(options: Options) -> dict[str, list[str]]:
    """Overrides of each load: the workload, and a pool in which order matters."""
    own_len, output_len = 128, 64
    # What 16 requests hold of their own, and three of the prefixes.
    shared_pool = 16 * (own_len + output_len) + 3 * options.shared_len
    longest = options.shared_len + own_len + output_len
    return {
        "shared": [
            "workload=shared_prefix",
            f"workload.num_groups={options.num_groups}",
            f"workload.requests_per_group={options.requests_per_group}",
            f"workload.shared_len={options.shared_len}",
            f"workload.own_len={own_len}",
            f"workload.output_len={output_len}",
            f"workload.order={options.order}",
            f"limits.kv_pool_tokens={shared_pool + 128}",
            f"limits.max_model_len={longest + 64}",
        ],
        "mixed": [
            "workload=mixed",
            f"workload.num_requests={options.num_requests}",
            "workload.min_input_len=16",
            "workload.max_input_len=1024",
            "workload.min_output_len=8",
            "workload.max_output_len=256",
            "limits.kv_pool_tokens=16384",
            "limits.max_model_len=1280",
        ],
    }


def serve(
    policy: str,
    load: str,
    load_overrides: Sequence[str],
    overrides: Sequence[str],
    recorder: DryRecorder,
    check_every: int,
) -> Record:
    """Serve a load under a policy, and record it."""
    composed = compose_config(
        [
            "+experiment=policy_comparison",
            *load_overrides,
            f"engine/policy={policy}",
            *overrides,
        ]
    )
    cfg = composed.cfg
    workload = instantiate(cfg.workload)
    requests = workload.requests(cfg.seed, vocab_size=_VOCAB_SIZE)
    limits = limits_of(cfg, max_num_seqs=16, max_model_len=0)
    scheduler = build_scheduler(composed.components, limits)

    def priority_of(index: int) -> int:
        return int(load == "mixed" and index % 4 == 0)

    result = DryRun(scheduler, check_every=check_every).serve(at_once(requests, priority_of))
    waited = {
        level: [t.waited for t in result.timelines.values() if t.priority == level]
        for level in (0, 1)
    }
    more = {
        f"mean_waited_steps_priority_{level}": float(np.mean(values))
        for level, values in waited.items()
        if values
    }
    described = {"name": workload.name, "digest": workload.digest(requests), **workload.describe()}
    settings = {"name": "offline", "priority_1": "every fourth" if load == "mixed" else "none"}
    return recorder.add(f"{load}: {policy}", result, composed, limits, described, settings, more)


def draw(records: dict[str, list[Record]], recorder: DryRecorder) -> Path:
    """Hit rate on the shared load, then waits on both."""
    title = figures.title_of("orders of the waiting queue (counted, no model)", recorder.records)
    figure, panels = figures.new_figure(title, 3, width=4.6)
    names = [record.variant.partition(": ")[2] for record in records["shared"]]
    places = np.arange(len(names))
    for place, record in zip(places, records["shared"], strict=True):
        rate = 100 * count(record, "hit_rate")
        panels[0].bar(place, rate, color=figures.colour(int(place)), width=0.65)
        panels[0].annotate(f"{rate:.0f} %", (place, rate), ha="center", va="bottom", fontsize=8)
    panels[0].set_ylabel("prompt tokens found in the cache, %")
    panels[0].set_title("shared load: hits", fontsize=9, loc="left")
    panels[0].set_ylim(0, 105)
    for axes, (load, found) in zip(panels[1:], records.items(), strict=True):
        for offset, (name, label) in enumerate(
            (("mean_waited_steps", "mean"), ("p99_waited_steps", "99th percentile"))
        ):
            axes.bar(
                places + 0.38 * (offset - 0.5),
                [count(record, name) for record in found],
                width=0.36,
                color=figures.colour(offset),
                label=label,
            )
        axes.set_ylabel("wait before the first token runs, steps")
        axes.set_title(f"{load} load: waits", fontsize=9, loc="left")
        axes.set_ylim(top=axes.get_ylim()[1] * 1.2)
        figures.legend(axes, loc="upper left", ncols=2)
    for axes in panels:
        axes.set_xticks(places, names, rotation=20, fontsize=8)
    assert recorder.file is not None
    return figures.save(figure, recorder.file, "policy_comparison", recorder.run_id)


def tables(records: dict[str, list[Record]]) -> list[Table]:
    """One table a load."""
    found = []
    for load, rows in records.items():
        table = command.new_table(
            f"{load} load, counted",
            "policy",
            "hit rate %",
            "steps",
            "wait mean",
            "wait p99",
            "turnaround mean",
            "p99",
            "wait of priority 1 / 0",
        )
        for record in rows:
            levels = [
                record.counters.get(f"dry_run.mean_waited_steps_priority_{level}")
                for level in (1, 0)
            ]
            table.add_row(
                record.variant.partition(": ")[2],
                f"{100 * count(record, 'hit_rate'):.1f}",
                *(
                    f"{count(record, name):,.0f}"
                    for name in (
                        "steps",
                        "mean_waited_steps",
                        "p99_waited_steps",
                        "mean_turnaround_steps",
                        "p99_turnaround_steps",
                    )
                ),
                " / ".join("-" if value is None else f"{value:,.0f}" for value in levels),
            )
        found.append(table)
    return found


def main(arguments: Sequence[str]) -> int:
    """Serve both loads under every policy, write records and the figure, print the tables."""
    options, overrides = command.parse(Options, arguments)
    keys = ("workload", "limits", "seed", "results_dir")
    check_overrides(overrides, Options, keys, {"policy": "policies"})
    policies = options.chosen()
    composed = compose_config(["+experiment=policy_comparison", *overrides])
    recorder = DryRecorder(
        str(composed.cfg.results_dir), command.command_line("policy_comparison", arguments)
    )
    records = {
        load: [
            serve(policy, load, chosen, overrides, recorder, options.check_every)
            for policy in policies
        ]
        for load, chosen in loads(options).items()
    }
    path = draw(records, recorder)
    command.show(*tables(records), f"records: {recorder.file}", f"figure:  {path}")
    return 0


if __name__ == "__main__":
    command.run(main)
