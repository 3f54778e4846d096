"""Figures of experiments, in the style of the runs' own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from workbench.bench.figure import COLOURS, LINES, save_png
from workbench.bench.records import Record

MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def colour(index: int) -> str:
    """Colour of a series; all can be told apart with the common colour blindnesses."""
    return COLOURS[index % len(COLOURS)]


def line(index: int) -> str:
    """Line style of a series."""
    return LINES[index % len(LINES)]


def marker(index: int) -> str:
    """Marker of a series."""
    return MARKERS[index % len(MARKERS)]


def new_figure(title: str, num_panels: int, width: float = 5.2) -> tuple[Figure, list[Axes]]:
    """A row of panels under one title."""
    figure = Figure(figsize=(max(6.0, width * num_panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    panels = [figure.add_subplot(1, num_panels, index + 1) for index in range(num_panels)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
    return figure, panels


def legend(axes: Axes, **options: object) -> None:
    """A legend within its panel."""
    axes.legend(fontsize=8, frameon=False, **options)


def title_of(what: str, records: Sequence[Record]) -> str:
    """What a figure shows, on which machine, and when."""
    first = records[0]
    slug = str(first.environment.get("hardware_slug", ""))
    return " · ".join(part for part in (what, slug, first.time[:10]) if part)


def save(figure: Figure, record_file: Path, name: str, run_id: str) -> Path:
    """Write a figure beside the records that it shows, named after them and one of their runs."""
    return save_png(figure, record_file.with_name(f"{record_file.stem}_{name}_{run_id}.png"))
