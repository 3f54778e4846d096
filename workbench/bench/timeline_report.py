"""The timeline of recorded runs as a person sees it: a table, a figure, a file for a trace viewer.

``python -m workbench report --timeline FILE.jsonl``
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich import box
from rich.table import Table
from rich.text import Text

from workbench.bench.figure import COLOURS, save_png
from workbench.bench.timeline import chrome_trace

#: Kinds under this share of the time are one line of the table each, without their parts.
_MIN_SHARE = 0.02
_SUMS = ("host", "device")
_MAX_BARS = 8
_REST, _DEVICE = "#666666", "#BBBBBB"


def read_timelines(file: str | Path) -> dict[str, dict[str, Any]]:
    """Timelines of the last run of a record file, by row.

    Records of ``experiments.peak`` have sums by kind and no single steps.

    Raises
    ------
    ValueError
        No record of the file has one.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for data in _lines(Path(file)):
        if data.get("timeline"):
            found[str(data["variant"])] = (str(data["run_id"]), data["timeline"])
        elif data.get("kind") == "peak" and "wall_us" in next(iter(data["steps"].values()), {}):
            name = f"{data['model']} {data['workload']}"
            found[name] = ("", {"kinds": data["steps"], "sample": None})
    if not found:
        raise ValueError(
            f"{file} holds no timeline: rows of the engine that passed their gate have one, save "
            "those of older versions. Measure again, or name another file."
        )
    last = list(found.values())[-1][0]
    return {name: timeline for name, (run_id, timeline) in found.items() if run_id == last}


def _lines(file: Path) -> list[dict[str, Any]]:
    lines = []
    for line in file.read_text().splitlines():
        try:
            data = json.loads(line)
        except ValueError:  # a tail that was cut off; the other lines stand
            continue
        if isinstance(data, dict):
            lines.append(data)
    return lines


def write_trace(timelines: Mapping[str, Mapping[str, Any]], file: str | Path) -> int:
    """Write the single steps for ``chrome://tracing`` or Perfetto.

    Returns
    -------
    How many steps the file has.

    Raises
    ------
    ValueError
        The records hold sums alone.
    """
    sampled = {name: t for name, t in timelines.items() if t["sample"]}
    if not sampled:
        raise ValueError("these records hold sums by kind and no single step to trace.")
    Path(file).write_text(json.dumps(chrome_trace(sampled)))
    return sum(t["sample"]["num_steps"] for t in sampled.values())


def timeline_table(kinds: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """The sums of :func:`workbench.bench.timeline.summarize`: a row a kind, below it one a part.

    ``share`` is of the time of all kinds; host and device of a step may work at once, so
    those of a kind may add up to more than its own.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("kind, part", no_wrap=True)
    for header in ("steps", "total s", "share %", "median us", "p95 us", "tokens", "padded"):
        table.add_column(header, justify="right", no_wrap=True)
    for kind, row in kinds.items():
        table.add_row(
            Text(kind, style="bold"),
            f"{row['steps']:,}",
            f"{row['wall_us'] * 1e-6:.4f}",
            f"{100 * row['share']:.1f}",
            "",
            "",
            f"{row['tokens']:,}",
            f"{row['padded']:,}",
        )
        parts = row["total_us"].items() if row["share"] >= _MIN_SHARE else ()
        for part, total_us in parts:
            table.add_row(
                Text(f"  {part}", style="" if part in _SUMS else "dim"),
                "",
                f"{total_us * 1e-6:.4f}",
                f"{100 * row['share'] * total_us / row['wall_us']:.1f}" if row["wall_us"] else "-",
                f"{row['median_us'][part]:,.1f}",
                f"{row['p95_us'][part]:,.1f}",
            )
    return table


def draw_timeline(timelines: Mapping[str, Mapping[str, Any]], path: str | Path) -> Path:
    """Draw the time of each kind of step as PNG: a panel a row of the run, for each kind the host's
    parts stacked, and below them the device's time.

    Returns
    -------
    ``path``.
    """
    shown = {name: list(t["kinds"].items())[:_MAX_BARS] for name, t in timelines.items()}
    heights = [max(1, len(kinds)) for kinds in shown.values()]
    figure = Figure(figsize=(10.5, 1.6 + 0.62 * sum(heights) + 0.9 * len(heights)))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shown), 1, squeeze=False, sharex=True, height_ratios=heights)
    panels = list(grid[:, 0])
    colours = _part_colours([row for kinds in shown.values() for _, row in kinds])
    for axes, (name, kinds) in zip(panels, shown.items(), strict=True):
        _draw_kinds(axes, kinds, colours)
        more = len(timelines[name]["kinds"]) - len(kinds)
        axes.set_title(name + (f" (and {more} more kinds)" if more else ""), fontsize=9, loc="left")
    panels[-1].set_xlabel("seconds in all steps of the kind")
    named = {**colours, "smaller parts": _REST, "device": _DEVICE}
    handles = [Patch(color=colour, label=name) for name, colour in named.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return save_png(figure, path)


def _part_colours(rows: list[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for each of the parts that took longest, in the order of a step."""
    totals: dict[str, float] = {}
    for row in rows:
        for part, total_us in row["total_us"].items():
            if part not in _SUMS:
                totals[part] = totals.get(part, 0.0) + total_us
    largest = sorted(totals, key=lambda part: -totals[part])[: len(COLOURS)]
    return dict(zip([part for part in totals if part in largest], COLOURS, strict=False))


def _draw_kinds(
    axes: Axes, kinds: list[tuple[str, Mapping[str, Any]]], colours: Mapping[str, str]
) -> None:
    for index, (_, row) in enumerate(kinds):
        left = 0.0
        for part, colour in colours.items():
            width = row["total_us"].get(part, 0.0) * 1e-6
            axes.barh(index - 0.18, width, left=left, height=0.34, color=colour)
            left += width
        rest = [v for p, v in row["total_us"].items() if p not in colours and p not in _SUMS]
        axes.barh(index - 0.18, sum(rest) * 1e-6, left=left, height=0.34, color=_REST)
        axes.barh(index + 0.2, row["total_us"]["device"] * 1e-6, height=0.28, color=_DEVICE)
    labels = [f"{kind}\n{row['steps']:,} steps" for kind, row in kinds]
    axes.set_yticks(range(len(kinds)), labels, fontsize=8)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
