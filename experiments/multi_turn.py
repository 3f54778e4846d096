"""How long does a conversation wait for its next answer, turn by turn, with and without a cache?

    python -m experiments.multi_turn [models_dir=...] [results_dir=results]

Each turn's prompt is everything before it and a new message, so without a cache the time to the
first token grows with every turn; with one only the new part is computed. All rows serve the same
prompts, in turn, in one process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from experiments import command, figures, rows
from experiments.prefix_hit_rate import CACHES
from workbench.bench.records import Record
from workbench.bench.report import print_table
from workbench.cli.run import measure


@dataclass(frozen=True, slots=True)
class Options:
    """The experiment has no options of its own; the workload's are Hydra's."""


def ttft_by_turn(record: Record) -> dict[int, list[float]]:
    """TTFT in ms by turn, from 1 on: every conversation of every round."""
    found: dict[int, list[float]] = defaultdict(list)
    for sample in record.samples:
        for request in sample.served:
            turn = int(request.request_id.rpartition("-")[2]) + 1
            found[turn].append(1e3 * request.ttft_s)
    return dict(sorted(found.items()))


def prompt_tokens_by_turn(record: Record) -> dict[int, int]:
    """Prompt tokens by turn; all conversations have the same."""
    return {
        int(request.request_id.rpartition("-")[2]) + 1: request.num_prompt_tokens
        for request in record.samples[0].served
    }


def result_table(records: Sequence[Record]) -> Table:
    """A row a turn."""
    passed = [record for record in records if record.metrics]
    names = [rows.cache_name(record) for record in passed]
    table = command.new_table(
        "median TTFT by turn, ms (over conversations and rounds)",
        "turn",
        "prompt tokens",
        *names,
    )
    if not passed:
        return table
    by_turn = [ttft_by_turn(record) for record in passed]
    for turn, tokens in prompt_tokens_by_turn(passed[0]).items():
        cells = [f"{np.median(found[turn]):,.0f}" for found in by_turn]
        table.add_row(f"{turn}", f"{tokens:,}", *cells)
    table.add_section()
    speedups = ["-" if r.speedup is None else f"{r.speedup:.2f}x" for r in passed]
    table.add_row("output tok/s", "", *speedups)
    table.add_row("prompt tokens found", "", *(f"{100 * rows.hit_rate(r):.0f} %" for r in passed))
    return table


def draw(records: Sequence[Record], record_file: Path) -> Path | None:
    """TTFT over turns: median, and where half of the turns lie; None where no row has a speed."""
    passed = [record for record in records if record.metrics]
    if not passed:
        return None
    details = passed[0].backend.get("details", {})
    config = passed[0].workload["config"]
    title = figures.title_of(
        f"conversations · {details.get('model', '')}, {passed[0].backend.get('dtype', '')}", passed
    )
    figure, (axes,) = figures.new_figure(title, 1, width=7.5)
    for index, record in enumerate(passed):
        found = ttft_by_turn(record)
        turns = np.array(list(found))
        low, middle, high = (
            np.array([np.percentile(values, mark) for values in found.values()])
            for mark in (25, 50, 75)
        )
        axes.errorbar(
            turns + 0.05 * (index - 1),
            middle,
            yerr=[middle - low, high - middle],
            capsize=3,
            color=figures.colour(index),
            ls=figures.line(index),
            marker=figures.marker(index),
            mfc="none",
            label=rows.cache_name(record),
        )
    tokens = prompt_tokens_by_turn(passed[0])
    axes.set_xticks(list(tokens), [f"{turn}\n{n} tokens" for turn, n in tokens.items()])
    axes.set_xlabel("turn, and its prompt")
    axes.set_ylabel("TTFT, ms (median; bars: middle half)")
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"{config['num_conversations']} conversations, system prompt {config['system_len']}, "
        f"message {config['user_len']}, answer {config['answer_len']} tokens",
        fontsize=9,
        loc="left",
    )
    figures.legend(axes, loc="upper left")
    return figures.save(figure, record_file, "multi_turn", passed[0].run_id)


def main(arguments: Sequence[str]) -> int:
    """Measure, write records and the figure, print the tables."""
    _, rest = command.parse(Options, arguments)
    line = command.command_line("multi_turn", arguments)
    results = measure(["+experiment=multi_turn", *rest], CACHES, line)
    print_table(results, command.console())
    records, record_file = rows.records_of(results), rows.file_of(results)
    path = draw(records, record_file)
    command.show(result_table(records), f"records: {record_file}", f"figure:  {path}")
    return 0 if all(record.is_passed for record in records) else 1


if __name__ == "__main__":
    command.run(main)
