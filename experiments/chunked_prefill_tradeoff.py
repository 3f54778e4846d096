"""What does running prompts in chunks cost in TTFT, and what does it save in gaps?

    python -m experiments.chunked_prefill_tradeoff [models_dir=...] [results_dir=results]

The two-by-two of Sarathi-Serve (Agrawal et al., OSDI 2024, arXiv:2403.02310): prompts whole or in
chunks, on a load of long prompts and on one of long outputs. While a whole prompt runs, every
other request of the batch waits for its next token; chunks bound that wait, and make the prompt
itself wait for its first token. All rows of a load serve the same requests, in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from experiments import command, figures, rows
from workbench.bench.records import Record
from workbench.bench.report import print_table
from workbench.cli.run import measure
from workbench.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the experiment.

    Attributes
    ----------
    chunks
        Tokens that a step may run.
    prefill_heavy, decode_heavy
        Of the two loads: requests, least and most prompt tokens, least and most output tokens.
    """

    chunks: tuple[int, ...] = (64, 128, 256)
    prefill_heavy: tuple[int, ...] = (6, 256, 768, 8, 32)
    decode_heavy: tuple[int, ...] = (8, 128, 384, 32, 64)

    def __post_init__(self) -> None:
        if min(self.chunks, default=0) < 1:
            raise ConfigError(f"chunks={self.chunks} must be 1 or more, each.")
        for name in ("prefill_heavy", "decode_heavy"):
            if len(getattr(self, name)) != 5:
                raise ConfigError(
                    f"{name}={getattr(self, name)} must be five numbers: requests, least and most "
                    "prompt tokens, least and most output tokens."
                )

    def loads(self) -> dict[str, list[str]]:
        """Overrides of each load."""
        keys = (
            "num_requests",
            "min_input_len",
            "max_input_len",
            "min_output_len",
            "max_output_len",
        )
        sizes = {"prefill-heavy": self.prefill_heavy, "decode-heavy": self.decode_heavy}
        return {
            name: [f"workload.{key}={size}" for key, size in zip(keys, given, strict=True)]
            for name, given in sizes.items()
        }


def alternatives(options: Options) -> dict[str, tuple[str, ...]]:
    """A row a chunk size."""
    return {
        f"chunks of {size}": ("+technique=chunked_prefill", f"engine.prefill.chunk_tokens={size}")
        for size in options.chunks
    }


def result_table(load: str, records: Sequence[Record]) -> Table:
    """A row a chunk size."""
    table = command.new_table(
        f"{load} load",
        "prompts",
        "TTFT p50 ms",
        "p99",
        "TBT p50 ms",
        "p99",
        "longest gap p50",
        "p99",
        "tok/s",
        "speed-up",
        "correct?",
    )
    for record in records:
        name = "whole" if record is records[0] else record.variant
        if record.metrics is None:
            table.add_row(name, *["-"] * 8, record.verdict)
            continue
        table.add_row(
            name,
            *(
                f"{rows.value(record, metric, mark):,.0f}"
                for metric in ("ttft_ms", "itl_ms", "max_gap_ms")
                for mark in ("p50", "p99")
            ),
            f"{rows.value(record, 'output_tok_s'):.1f}",
            "-" if record.speedup is None else f"{record.speedup:.2f}x",
            record.verdict,
        )
    return table


def draw(runs: dict[str, list[Record]], record_file: Path) -> Path | None:
    """TTFT against the 99th percentile of gaps, a panel a load; None where no row has a speed."""
    passed = {load: [r for r in records if r.metrics] for load, records in runs.items()}
    known = [record for records in passed.values() for record in records]
    if not known:
        return None
    details = known[0].backend.get("details", {})
    title = figures.title_of(
        f"chunked prefill · {details.get('model', '')}, {known[0].backend.get('dtype', '')}", known
    )
    figure, panels = figures.new_figure(title, len(runs))
    for axes, (load, records) in zip(panels, passed.items(), strict=True):
        points = [
            (rows.value(r, "ttft_ms", "p50"), rows.value(r, "itl_ms", "p99")) for r in records
        ]
        chunked = [p for r, p in zip(records, points, strict=True) if r is not runs[load][0]]
        if chunked:
            axes.plot(*zip(*chunked, strict=True), color="#bbbbbb", lw=1.0, zorder=1)
        for index, (record, (x, y)) in enumerate(zip(records, points, strict=True)):
            is_base = record is runs[load][0]
            label = "whole prompts" if is_base else record.variant
            axes.plot(
                x,
                y,
                color=figures.colour(index),
                marker=figures.marker(index),
                ms=8,
                ls="none",
                label=label,
                zorder=2,
            )
        axes.set_xlabel("TTFT, ms (median)")
        axes.set_ylabel("time between tokens, ms (99th percentile)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        config = runs[load][0].workload["config"]
        axes.set_title(
            f"{load}: {config['min_input_len']}-{config['max_input_len']} in, "
            f"{config['min_output_len']}-{config['max_output_len']} out",
            fontsize=9,
            loc="left",
        )
        figures.legend(axes, loc="best")
    return figures.save(figure, record_file, "chunked_prefill_tradeoff", known[0].run_id)


def main(arguments: Sequence[str]) -> int:
    """Measure both loads, write records and the figure, print the tables."""
    options, rest = command.parse(Options, arguments)
    line = command.command_line("chunked_prefill_tradeoff", arguments)
    runs: dict[str, list[Record]] = {}
    record_file = None
    for load, chosen in options.loads().items():
        overrides = ["+experiment=chunked_prefill_tradeoff", *chosen, *rest]
        results = measure(overrides, alternatives(options), line)
        print_table(results, command.console())
        runs[load], record_file = rows.records_of(results), rows.file_of(results)
    assert record_file is not None
    path = draw(runs, record_file)
    tables = [result_table(load, records) for load, records in runs.items()]
    command.show(*tables, f"records: {record_file}", f"figure:  {path}")
    return 0 if all(r.is_passed for records in runs.values() for r in records) else 1


if __name__ == "__main__":
    command.run(main)
