"""What is a prefix cache worth, by the share of the prompts that it finds?

    python -m experiments.prefix_hit_rate [models_dir=...] [results_dir=results]

At each declared hit rate the engine serves the same requests without a cache, with one that finds
prefixes block by block and with one that finds them in a tree, in turn, in one process. A row
whose cache did not find the declared share is INVALID. Speed-ups are those of output tok/s, which
are those of the time, since all rows of a rate serve the same tokens. The ideal line is
``1 / (1 - h * p)``: the hit rate ``h`` of the prefill's share ``p`` of the time costs nothing.
``p`` is measured: the wall time of the requests with one output token each over that of the whole
requests, both without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from experiments import command, figures, rows
from workbench.bench.records import Record
from workbench.bench.report import print_table
from workbench.cli.run import measure
from workbench.core.errors import ConfigError

CACHES = {
    "block_hash_cache": ("+technique=block_hash_cache",),
    "radix_cache": ("+technique=radix_cache",),
}


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the experiment.

    Attributes
    ----------
    rates
        Declared shares of the prompt tokens.
    """

    rates: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        if not self.rates or not all(0 <= rate < 1 for rate in self.rates):
            raise ConfigError(f"rates={self.rates} must be shares from 0 up to below 1.")


def prefill_share(base: Record, overrides: Sequence[str], line: str) -> float | None:
    """Share of the wall time that prompts take without a cache; None where it has no speed."""
    results = measure([*overrides, "workload.hit_rate=0", "workload.output_len=1"], command=line)
    alone = results[0].record
    if base.metrics is None or alone.metrics is None:
        return None
    return min(1.0, rows.wall_s(alone) / rows.wall_s(base))


def ideal(hit_rate: float, share: float) -> float:
    """Speed-up where what the cache finds costs nothing (Amdahl's law)."""
    return 1.0 / (1.0 - hit_rate * share)


def ttft_speedup(record: Record, base: Record) -> float:
    """Median TTFT of the base over that of the record."""
    return rows.value(base, "ttft_ms", "p50") / rows.value(record, "ttft_ms", "p50")


def result_table(runs: dict[float, list[Record]], share: float | None) -> Table:
    """A row a hit rate and cache."""
    note = "" if share is None else f"; prefill takes {100 * share:.0f} % of the base's time"
    table = command.new_table(
        f"speed-up over no cache by prefix hit rate{note}",
        "hits, cache",
        "found %",
        "total tok/s",
        "speed-up",
        "95 %",
        "ideal",
        "TTFT ms",
        "TTFT gain",
        "correct?",
    )
    for rate, records in runs.items():
        base = records[0]
        for record in records:
            name = rows.cache_name(record)
            if record.metrics is None or base.metrics is None:
                table.add_row(f"{100 * rate:g} %, {name}", *["-"] * 7, record.verdict)
                continue
            table.add_row(
                f"{100 * rate:g} %, {name}",
                f"{100 * rows.hit_rate(record):.1f}",
                f"{rows.value(record, 'total_tok_s'):,.0f}",
                "1.00x" if record is base else f"{record.speedup:.2f}x",
                rows.interval(record),
                "-" if share is None else f"{ideal(rows.hit_rate(record), share):.2f}x",
                f"{rows.value(record, 'ttft_ms', 'p50'):,.0f}",
                f"{ttft_speedup(record, base):.2f}x",
                record.verdict,
            )
    return table


def draw(runs: dict[float, list[Record]], share: float | None, record_file: Path) -> Path | None:
    """Speed-ups over the hit rate that was reached; None where no row has a speed."""
    passed = {
        name: [
            (record, records[0])
            for records in runs.values()
            for record in records[1:]
            if record.variant == name and record.metrics and records[0].metrics
        ]
        for name in CACHES
    }
    if not any(passed.values()):
        return None
    first = next(iter(runs.values()))
    model = first[0].backend.get("details", {}).get("model", "")
    built = first[0].workload["config"]
    title = figures.title_of(
        f"prefix hit rate · {model}, {first[0].backend.get('dtype', '')}, "
        f"{built.get('input_len')} in / {built.get('output_len')} out",
        first,
    )
    figure, (speed, ttft) = figures.new_figure(title, 2)
    for index, (name, pairs) in enumerate(passed.items()):
        hits = [100 * rows.hit_rate(record) for record, _ in pairs]
        speedups = np.array([record.speedup for record, _ in pairs], dtype=float)
        edges = np.array([record.ci95 or (record.speedup,) * 2 for record, _ in pairs])
        style: dict[str, Any] = {
            "color": figures.colour(index),
            "marker": figures.marker(index),
            "ls": figures.line(index),
            "mfc": "none",
            "label": name.removesuffix("_cache"),
        }
        errors = np.abs(edges.T - speedups) if len(pairs) else None
        speed.errorbar(hits, speedups, yerr=errors, capsize=3, **style)
        ttft.plot(hits, [ttft_speedup(*pair) for pair in pairs], **style)
    if share is not None:
        shares = np.linspace(0, max(runs), 50)
        label = f"ideal: 1 / (1 - h p), p = {share:.2f}"
        speed.plot(100 * shares, ideal(shares, share), "k:", lw=1.2, label=label)  # type: ignore[arg-type]
    speed.set_ylabel("output tok/s over that without a cache")
    ttft.set_ylabel("median TTFT without a cache over that with it")
    for axes in (speed, ttft):
        axes.axhline(1.0, color="#999999", lw=0.8)
        axes.set_xlabel("prompt tokens found in the cache, %")
        axes.set_ylim(bottom=0)
        figures.legend(axes, loc="upper left")
    return figures.save(figure, record_file, "prefix_hit_rate", first[0].run_id)


def main(arguments: Sequence[str]) -> int:
    """Measure every rate, write records and the figure, print the tables."""
    options, rest = command.parse(Options, arguments)
    overrides = ["+experiment=prefix_hit_rate", *rest]
    line = command.command_line("prefix_hit_rate", arguments)
    runs: dict[float, list[Record]] = {}
    record_file = None
    for rate in options.rates:
        results = measure([*overrides, f"workload.hit_rate={rate}"], CACHES, line)
        print_table(results, command.console())
        runs[rate] = rows.records_of(results)
        record_file = rows.file_of(results)
    assert record_file is not None
    share = prefill_share(runs[options.rates[0]][0], overrides, line)
    path = draw(runs, share, record_file)
    command.show(result_table(runs, share), f"records: {record_file}", f"figure:  {path}")
    passed = all(record.is_passed for records in runs.values() for record in records)
    return 0 if passed and share is not None else 1


if __name__ == "__main__":
    command.run(main)
