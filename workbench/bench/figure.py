"""The figure of a run: throughput under its ceiling, and the latencies behind the medians."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from workbench.bench.metrics import latency_samples_ms
from workbench.bench.records import Record, ResultStore
from workbench.bench.report import evidence_lines, load_label, quantity, records_of
from workbench.bench.run import VariantResult

# Okabe and Ito (2008): told apart with every common colour blindness; the last ones need lines.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
_MAX_EVIDENCE = 3


def draw(results: Sequence[VariantResult | Record], path: str | Path) -> Path:
    """Draw the figure of one run as PNG.

    Left, output tok/s by variant: the bar is the median over rounds, the dots are the rounds, the
    bracket is the 95 % interval of the speed-up laid on the baseline's bar, and the tick is the
    bandwidth ceiling where the bytes that had to move are known. Right, the distribution of TTFT
    and TPOT over requests, all rounds pooled.

    Parameters
    ----------
    path
        Where to write; its folder is made.

    Returns
    -------
    ``path``.
    """
    records = records_of(results)
    if not records:
        raise ValueError("there are no records to draw.")
    return save_png(_figure(records), path)


def save_png(figure: Figure, path: str | Path) -> Path:
    """Write a figure; its folder is made.

    Returns
    -------
    ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own until it is whole, so that an interrupted run leaves no broken PNG.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, dpi=150, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def report(jsonl: str | Path, path: str | Path | None = None, run_id: str | None = None) -> Path:
    """Draw the figure of a run again from its records.

    Parameters
    ----------
    jsonl
        File of records.
    path
        Where to write; beside the records, named after the run, by default.
    run_id
        Which run; the last one of the file by default.
    """
    jsonl = Path(jsonl)
    records, problems = ResultStore(jsonl.parent).read(jsonl)
    if not records:
        why = f" ({problems[0]})" if problems else ""
        raise ValueError(f"{jsonl} holds no readable record{why}.")
    runs = list(dict.fromkeys(record.run_id for record in records))
    run_id = run_id or runs[-1]
    if run_id not in runs:
        raise ValueError(f"{jsonl} has no run {run_id!r}. Valid: {', '.join(runs)}.")
    chosen = [record for record in records if record.run_id == run_id]
    return draw(chosen, path or figure_path(jsonl, run_id))


def figure_path(record_file: str | Path, run_id: str) -> Path:
    """Where the figure of a run lies: beside its records."""
    record_file = Path(record_file)
    return record_file.with_name(f"{record_file.stem}_{run_id}.png")


def _figure(records: Sequence[Record]) -> Figure:
    rows = len(records)
    figure = Figure(figsize=(12.5, max(4.2, 1.7 + 0.75 * rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 3, width_ratios=(2, 1, 1))
    bars, ttft, tpot = (figure.add_subplot(grid[0, column]) for column in range(3))
    _draw_bars(bars, records)
    _draw_ecdf(ttft, records, "ttft_ms", "TTFT, ms (with queueing)")
    _draw_ecdf(tpot, records, "tpot_ms", "TPOT, ms")
    _legend(figure, records)
    figure.suptitle(_title(records), fontsize=11, x=0.01, ha="left")
    return figure


def _title(records: Sequence[Record]) -> str:
    first = records[0]
    settings: dict[str, Any] = next(
        (r.load["settings"] for r in records if r.load.get("settings")), {}
    )
    parts = [f"{first.workload.get('name', '?')}"]
    if settings:
        parts.append(f"load {load_label(settings)}")
    parts += [str(first.environment.get("hardware_slug", "")), first.time[:10]]
    return " · ".join(part for part in parts if part)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _draw_bars(axes: Axes, records: Sequence[Record]) -> None:
    """Horizontal bars, the first variant on top."""
    speeds = {r.variant: _speed(r) for r in records}
    ceilings = [_ceiling(record) for record in records]
    top = max([v for v in [*speeds.values(), *ceilings] if v is not None], default=1.0)
    # What is printed beside a bar needs room to its right.
    axes.set_xlim(0, top * 2.1)
    for index, (record, ceiling) in enumerate(zip(records, ceilings, strict=True)):
        speed = speeds[record.variant]
        if speed is None:
            text = f"{record.verdict}: {record.status.lower().replace('_', ' ')}, no speed"
            axes.text(top * 0.015, index, text, va="center", color="#882222", fontsize=9)
            continue
        axes.barh(index, speed, height=0.62, color=_colour(index), alpha=0.85)
        rounds = (record.metrics or {})["output_tok_s"]["per_round"]
        axes.plot(
            rounds, [index + 0.22] * len(rounds), "o", ms=3.5, mfc="white", mec="black", mew=0.8
        )
        base = speeds.get(record.baseline or "")
        reach = speed
        if base and record.ci95:
            low, high = (base * edge for edge in record.ci95)
            axes.errorbar(
                [(low + high) / 2],
                [index],
                xerr=[[(high - low) / 2]],
                fmt="none",
                ecolor="black",
                capsize=4,
                lw=1.2,
            )
            reach = max(reach, high)
        if ceiling is not None:
            axes.plot([ceiling] * 2, [index - 0.38, index + 0.38], color="#AA0000", lw=2.2)
            reach = max(reach, ceiling)
        _annotate(axes, record, index, speed, reach + top * 0.025)
    axes.set_yticks(range(len(records)), [_wrapped(record.variant) for record in records])
    axes.set_ylim(len(records) - 0.45, -0.55)
    axes.set_xlabel("output tok/s (median of rounds; dots: rounds)")
    axes.set_title(_bars_title(records, ceilings), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _bars_title(records: Sequence[Record], ceilings: Sequence[float | None]) -> str:
    """Say what the marks are, of those that are there."""
    marks = []
    if any(record.ci95 for record in records):
        marks.append("bracket: 95 % interval against the baseline")
    if any(ceiling is not None for ceiling in ceilings):
        marks.append("red: bandwidth ceiling")
    return "; ".join(marks)


def _wrapped(name: str) -> str:
    return name.replace(" + ", "\n+ ") if len(name) > 16 else name


def _annotate(axes: Axes, record: Record, index: int, speed: float, x: float) -> None:
    text = f"{quantity(speed)}  {record.verdict}"
    if record.speedup is not None:
        text += f"  {record.speedup:.2f}x ({record.word})"
    elif record.status == "INTERRUPTED":
        text += "  INTERRUPTED"
    lines = evidence_lines(record)
    rest = len(lines) - _MAX_EVIDENCE
    rows = lines[:_MAX_EVIDENCE] + ([f"and {rest} more"] if rest > 0 else [])
    # Long texts may leave the axes, but must not squeeze them.
    axes.text(x, index - (0.16 if rows else 0), text, va="center", fontsize=8.5, in_layout=False)
    axes.text(
        x, index + 0.02, "\n".join(rows), va="top", fontsize=7, color="#444444", in_layout=False
    )


def _speed(record: Record) -> float | None:
    value: float | None = record.metrics["output_tok_s"]["value"] if record.metrics else None
    return value


def _ceiling(record: Record) -> float | None:
    """Output tok/s at which the bytes that had to move would fill the measured bandwidth."""
    speed, roofline = _speed(record), record.roofline or {}
    if speed is None or not roofline.get("mbu") or not record.samples:
        return None
    wall_s = float(np.median([sample.wall_s for sample in record.samples]))
    return float(speed * wall_s / (roofline["mbu"] * roofline["seconds"]))


def _draw_ecdf(axes: Axes, records: Sequence[Record], name: str, label: str) -> None:
    values_seen = []
    for index, record in enumerate(records):
        parts = [latency_samples_ms(sample)[name] for sample in record.samples]
        values = np.sort(np.concatenate(parts)) if parts else np.empty(0)
        if not values.size:
            continue
        values_seen.append(values)
        share = np.arange(1, values.size + 1) / values.size
        axes.step(
            np.concatenate([values[:1], values]),
            np.concatenate([[0.0], share]),
            where="post",
            color=_colour(index),
            ls=LINES[index % len(LINES)],
            lw=1.8,
        )
    if values_seen:
        pooled = np.concatenate(values_seen)
        if pooled.min() > 0 and pooled.max() / pooled.min() > 20:
            axes.set_xscale("log")
    else:
        axes.text(0.5, 0.5, "no valid sample", ha="center", transform=axes.transAxes)
    axes.set_ylim(0, 1.02)
    axes.axhline(0.5, color="#999999", lw=0.6)
    axes.set_xlabel(label)
    axes.set_ylabel("share of requests")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, records: Sequence[Record]) -> None:
    drawn = [(i, record) for i, record in enumerate(records) if record.metrics is not None]
    if not drawn:
        return
    handles = [Line2D([], [], color=_colour(i), ls=LINES[i % len(LINES)], lw=1.8) for i, _ in drawn]
    labels = [record.variant for _, record in drawn]
    figure.legend(
        handles,
        labels,
        loc="outside lower right",
        ncols=min(4, len(labels)),
        fontsize=8,
        frameon=False,
    )
