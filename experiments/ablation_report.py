"""The tables and the figure of an ablation's records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.table import Table

from experiments import command
from experiments.figures import colour, legend, new_figure
from workbench.bench.figure import save_png
from workbench.bench.gates import check_evidence
from workbench.configuration import Marker

Row = Mapping[str, Any]
#: How much faster than a rung the preset is meant to be, at batch 1 on a GPU.
TARGETS = {"hf_naive": 10.0, "hf_compiled": 1.4}


def missing_evidence(techniques: Mapping[str, Marker], counters: Mapping[str, float]) -> list[str]:
    """Techniques of a row that had nothing to do in a load: a counter of theirs did not move."""
    return [
        name
        for name, marker in techniques.items()
        if check_evidence({name: {"evidence": marker.evidence}}, counters)[1] is not None
    ]


def speeds(records: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Median rate by row and load, of the rows that have one."""
    return {
        (r["name"], r["workload"]): statistics.median(r["values"])
        for r in records
        if r["status"] == "ok"
    }


def was_idle(record: Row, records: Sequence[Row]) -> bool:
    """Whether the technique that a row is about had nothing to do in its load.

    Of a technique that was left out, the row that it is held against tells.
    """
    name = record["technique"]
    partner = record["against"] if record["kind"] == "leave_one_out" else record["name"]
    return any(
        name in r["idle"]
        for r in records
        if r["status"] == "ok" and (r["name"], r["workload"]) == (partner, record["workload"])
        and r["row"] == "engine"
    )  # fmt: skip


def reasons(records: Sequence[Row]) -> list[str]:
    """Why rows have no number."""
    return [f"{r['name']}: {r['status']}: {r['reason']}" for r in records if r["status"] != "ok"]


def result_tables(records: Sequence[Row], common: Row) -> list[Table]:
    """A table a load: every row, with its two ratios."""
    known, cut = speeds(records), common["shortened_to"]
    tables = []
    for load in common["options"]["workloads"]:
        table = command.new_table(
            f"{Path(common['model']).name}, {load}, random weights, greedy"
            + (f", cut to {cut} output tokens a request" if cut else ""),
            "row", "tok/s", "spread", "over its end", "technique alone", "host µs", "device µs",
            "ties", "note",
        )  # fmt: skip
        for record in records:
            if record["row"] == "engine" and record.get("workload", load) == load:
                table.add_row(record["name"], *_cells(record, load, known, records))
        tables.append(table)
    return tables


def _cells(
    record: Row, load: str, known: Mapping[tuple[str, str], float], records: Sequence[Row]
) -> list[str]:
    if record["status"] != "ok":
        return [*["-"] * 7, record["status"]]
    values, step = record["values"], record["decode_step"]
    rate = statistics.median(values)
    ends = [known.get((record[key], load)) if record[key] else None for key in ("end", "against")]
    tied = record["check"]
    return [
        f"{rate:,.1f}",
        f"{100 * (max(values) - min(values)) / rate:.1f} %",
        *(f"{rate / other:.2f}x" if other else "-" for other in ends),
        *(f"{step[key]:,.0f}" if key in step else "-" for key in ("host_us", "device_us")),
        f"{tied['ties']} of {tied['requests']}",
        "nothing to do" if was_idle(record, records) else "",
    ]


def rung_table(records: Sequence[Row], load: str) -> list[Table]:
    """The preset's rows over each rung of Transformers; none where no rung was asked for."""
    rungs = [r for r in records if r["row"] == "rung"]
    if not rungs:
        return []
    known = speeds(records)
    table = command.new_table(
        "output tok/s at batch 1, over Transformers",
        "row", "tok/s", *(_against(r["name"]) for r in rungs),
    )  # fmt: skip
    names = dict.fromkeys(name for name, of in known if of == load)
    for name in sorted(names, key=lambda name: known[name, load]):
        rate = known[name, load]
        others = [known.get((rung["name"], load)) for rung in rungs]
        table.add_row(
            name, f"{rate:,.1f}", *(f"{rate / other:.2f}x" if other else "-" for other in others)
        )
    return [table]


def _against(rung: str) -> str:
    return f"over {rung}" + (f" (target {TARGETS[rung]:g}x)" if rung in TARGETS else "")


# -- the figure -------------------------------------------------------------------------------


def draw(records: Sequence[Row], common: Row, path: Path) -> Path:
    """Left, the base with each technique over the same without it; right, the preset likewise.

    A bar is the ratio of medians over rounds, a dot one round over the other row's median.
    """
    loads = list(common["options"]["workloads"])
    panels = {
        "added to the base": [r for r in records if r.get("kind") == "add_one"],
        "left out of, or added to, the preset": [
            r for r in records if r.get("kind") in ("leave_one_out", "add_to_full")
        ],
    }
    title = " · ".join(
        [
            f"share of each technique, {Path(common['model']).name}",
            common["environment"]["hardware_slug"],
            common["run_id"][:8],
        ]
    )
    figure, axes = new_figure(title, len(panels), width=6.4)
    most = max(len({r["name"] for r in rows}) for rows in panels.values())
    figure.set_size_inches(12.8, max(4.2, 1.4 + 0.55 * most))
    for panel, (name, rows) in zip(axes, panels.items(), strict=True):
        _panel(panel, rows, speeds(records), loads)
        panel.set_title(name, fontsize=9, loc="left")
    return save_png(figure, path)


def _panel(
    axes: Axes,
    rows: Sequence[Row],
    known: Mapping[tuple[str, str], float],
    loads: Sequence[str],
) -> None:
    names = list(dict.fromkeys(row["name"] for row in rows))
    height = 0.8 / len(loads)
    for row in rows:
        index = names.index(row["name"])
        if row["status"] != "ok":
            axes.text(0.02, index, row["status"], va="center", color="#882222", fontsize=8)
            continue
        other = known.get((row["against"], row["workload"]))
        if row["workload"] not in loads:
            continue
        of_load = loads.index(row["workload"])
        y = index + (of_load - (len(loads) - 1) / 2) * height
        if not other:
            why = f"{row['against']} has no number"
            axes.text(0.02, y, why, va="center", color="#882222", fontsize=8)
            continue
        ratio = statistics.median(row["values"]) / other
        axes.barh(y, ratio, height=0.9 * height, color=colour(of_load), alpha=0.85)
        rounds = [value / other for value in row["values"]]
        axes.plot(rounds, [y] * len(rounds), "o", ms=3, mfc="white", mec="black", mew=0.7)
        axes.text(max(rounds), y, f"  {ratio:.2f}x", va="center", fontsize=7.5)
    for of_load, load in enumerate(loads):
        axes.barh(0, 0, color=colour(of_load), label=load)
    axes.axvline(1.0, color="#AA0000", lw=1.2)
    axes.margins(x=0.15)
    axes.set_yticks(range(len(names)), [_label(rows, name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("tok/s over the row that differs in this technique alone")
    legend(axes, loc="best")


def _label(rows: Sequence[Row], name: str) -> str:
    """``+`` or ``-`` technique, and below it what came or went with it."""
    row = next(row for row in rows if row["name"] == name)
    sign = "-" if row["kind"] == "leave_one_out" else "+"
    along = f"\n(beside {sign} {', '.join(row['along'])})" if row["along"] else ""
    return f"{sign} {row['technique']}{along}"
