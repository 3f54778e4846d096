"""Which drafter helps which text, and how far do its drafts hold?

    python -m experiments.drafting [texts=code_edit,summarize,chat] [results_dir=results]

Every drafter serves the prompts of every category beside the engine without speculation, in turn,
in one process, at one request at a time; the outputs are held to those of Transformers. A draft
that is not accepted costs the time to verify it, so what copies most of its prompt gains and what
is new may lose: both are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from rich.table import Table

from experiments import command, figures, rows
from workbench.bench.records import Record
from workbench.bench.report import print_table
from workbench.cli.run import measure
from workbench.configuration import options_of
from workbench.core.errors import unknown_name

DRAFTERS = {
    "ngram": ("+technique=spec_decode",),
    "suffix": ("+technique=suffix_decoding",),
    "suffix_tree": ("+technique=[suffix_decoding,suffix_tree]",),
    "lookahead": ("+technique=lookahead_decoding",),
}
#: Drafters with a trained head, by techniques; the first names the option that gives the head.
HEADS = {
    "eagle": ("eagle",),
    "eagle_tree": ("eagle", "eagle_tree"),
    "medusa": ("medusa",),
    "medusa_tree": ("medusa", "medusa_tree"),
}
NAMES = (*DRAFTERS, *HEADS)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the experiment.

    Attributes
    ----------
    texts
        Workloads, one after the other; ``spec_bench:rag`` is one category of a workload that has
        ``categories``.
    eagle, medusa
        Folders of trained heads, as of ``train_head``, which add rows: as chains, and as trees;
        ``none`` adds none, ``shipped`` takes the head that comes with the workbench for the model.
    """

    texts: tuple[str, ...] = ("code_edit", "summarize", "chat")
    eagle: str = "shipped"
    medusa: str = "none"

    def __post_init__(self) -> None:
        for text in self.texts:
            name = text.partition(":")[0]
            if name not in options_of("workload"):
                raise unknown_name("workload", name, options_of("workload"))

    def drafters(self) -> dict[str, tuple[str, ...]]:
        """Overrides by drafter."""
        more = {
            name: (
                f"+technique=[{','.join(techniques)}]",
                f"engine.drafter.head={'null' if folder == 'shipped' else folder}",
            )
            for name, techniques in HEADS.items()
            if (folder := getattr(self, techniques[0])) != "none"
        }
        return {**DRAFTERS, **more}


def drafting_rows(records: Sequence[Record]) -> list[Record]:
    """Those of drafters that passed every gate."""
    return [r for r in records if r.variant in NAMES and r.metrics]


def acceptance_by_position(record: Record) -> list[float]:
    """Share of the drafts at each position that were accepted, from the first one on."""
    counts, found = record.counters, []
    while (verified := counts.get(f"verifier.verified_at_{len(found) + 1}", 0)) > 0:
        found.append(counts.get(f"verifier.accepted_at_{len(found) + 1}", 0) / verified)
    return found


def step_parts(record: Record) -> dict[str, float]:
    """Milliseconds of a mean step: the target's forward pass, drafting, and all else."""
    prefix = "us_per_step."
    split = {k.removeprefix(prefix): v for k, v in record.counters.items() if k.startswith(prefix)}
    model = split.pop("model", 0.0) + split.pop("wait", 0.0)
    draft = split.pop("draft", 0.0)
    return {"model": model / 1e3, "draft": draft / 1e3, "host": sum(split.values()) / 1e3}


def result_table(groups: Mapping[str, Sequence[Record]]) -> Table:
    """A row a text and drafter."""
    table = command.new_table(
        "output tok/s over the engine without speculation, one request at a time",
        "text, drafter", "speed-up", "95 %", "tokens a step", "accepted %", "drafted",
        "ms a step: model, draft, host", "verdict",
    )  # fmt: skip
    for text, records in groups.items():
        for record in records:
            if record.variant not in NAMES:
                continue
            name = f"{text}, {record.variant}"
            if record.speedup is None or record.ci95 is None:
                table.add_row(name, *["-"] * 6, record.verdict)
                continue
            counts = record.counters
            table.add_row(
                name,
                f"{record.speedup:.2f}x",
                f"[{record.ci95[0]:.2f}, {record.ci95[1]:.2f}]",
                f"{counts['verifier.mean_accepted_length']:.2f}",
                f"{100 * counts['verifier.acceptance_rate']:.0f}",
                f"{counts['drafter.drafted_tokens']:,.0f}",
                ", ".join(f"{ms:.1f}" for ms in step_parts(record).values()),
                record.verdict,
            )
    return table


def draw(groups: Mapping[str, Sequence[Record]], record_file: Path) -> Path | None:
    """Speed-ups by text, acceptance by position, and where steps spend their time; None where no
    row has a speed."""
    passed = [r for records in groups.values() for r in drafting_rows(records)]
    if not passed:
        return None
    details = passed[0].backend.get("details", {})
    what = f"drafters by text · {details.get('model', '')}, {passed[0].backend.get('dtype', '')}"
    figure, (left, middle, right) = figures.new_figure(figures.title_of(what, passed), 3, width=5.8)
    _draw_speedups(left, groups)
    _draw_acceptance(middle, groups)
    _draw_parts(right, groups)
    return figures.save(figure, record_file, "drafting", passed[0].run_id)


def _draw_speedups(axes: Axes, groups: Mapping[str, Sequence[Record]]) -> None:
    present = {r.variant for records in groups.values() for r in drafting_rows(records)}
    names = [name for name in NAMES if name in present]
    width = 0.8 / len(names)
    for text_index, records in enumerate(groups.values()):
        for record in drafting_rows(records):
            assert record.speedup is not None
            low, high = record.ci95 or (record.speedup, record.speedup)
            index = names.index(record.variant)
            axes.bar(
                text_index + (index - (len(names) - 1) / 2) * width,
                record.speedup,
                0.9 * width,
                yerr=[[max(0.0, record.speedup - low)], [max(0.0, high - record.speedup)]],
                color=figures.colour(NAMES.index(record.variant)),
                ecolor="#333333",
                capsize=3,
            )
    axes.axhline(1.0, color="#666666", lw=0.8)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel("output tok/s over no speculation")
    axes.set_title("speed-up, one request at a time (95 %)", fontsize=9, loc="left")
    for name in names:
        axes.bar(0, 0, color=figures.colour(NAMES.index(name)), label=name)
    figures.legend(axes, loc="upper right")


def _draw_acceptance(axes: Axes, groups: Mapping[str, Sequence[Record]]) -> None:
    for text_index, (text, records) in enumerate(groups.items()):
        for record in drafting_rows(records):
            shares = acceptance_by_position(record)
            axes.plot(
                np.arange(1, len(shares) + 1),
                [100 * share for share in shares],
                color=figures.colour(NAMES.index(record.variant)),
                ls=figures.line(text_index),
                marker=figures.marker(text_index),
                mfc="none",
                label=f"{text}, {record.variant}",
            )
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("accepted of those verified there, %")
    axes.set_ylim(0, 105)
    axes.set_title("acceptance by position", fontsize=9, loc="left")
    figures.legend(axes, loc="best")


def _draw_parts(axes: Axes, groups: Mapping[str, Sequence[Record]]) -> None:
    """A bar a text and drafter, and one a text without speculation."""
    names: list[str] = []
    for text, records in groups.items():
        for record in records:
            if not record.metrics or record.variant not in (*NAMES, "engine"):
                continue
            start = 0.0
            for index, (part, ms) in enumerate(step_parts(record).items()):
                label = None if names else part
                axes.barh(len(names), ms, left=start, color=figures.colour(index), label=label)
                start += ms
            names.append(f"{text}, {'no drafts' if record.variant == 'engine' else record.variant}")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms a step")
    axes.set_title("where a step's time goes", fontsize=9, loc="left")
    figures.legend(axes, loc="lower right")


def main(arguments: Sequence[str]) -> int:
    """Measure, write records and the figure, print the tables."""
    options, rest = command.parse(Options, arguments)
    line = command.command_line("drafting", arguments)
    groups: dict[str, list[Record]] = {}
    record_file = Path()
    for text in options.texts:
        name, _, category = text.partition(":")
        chosen = [f"workload={name}"] + ([f"workload.categories=[{category}]"] if category else [])
        overrides = ["+experiment=drafting", *chosen, *rest]
        results = measure(overrides, options.drafters(), line)
        print_table(results, command.console())
        groups[category or name], record_file = rows.records_of(results), rows.file_of(results)
    path = draw(groups, record_file)
    command.show(result_table(groups), f"records: {record_file}", f"figure:  {path}")
    return int(not all(r.is_passed for records in groups.values() for r in records))


if __name__ == "__main__":
    command.run(main)
