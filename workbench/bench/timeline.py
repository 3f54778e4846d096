"""Where a run's time goes: steps by kind, what the host did in each and what the device did.

A record holds the sums of all steps, and the steps themselves as far as :data:`MAX_SAMPLE_BYTES`
go. The device's time is what the host sees of it (:class:`StepRecord`); kernels are not told apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from workbench.core.step import StepRecord

#: Most bytes of single steps in a record, as JSON.
MAX_SAMPLE_BYTES = 48 << 10
_ORDER = (
    "schedule",
    "prepare",
    "model",
    "sample",
    "queue",
    "assume",
    "wait",
    "draft",
    "collect",
    "update",
    "output",
)
_COUNTS = {
    "requests": "num_requests",
    "tokens": "num_scheduled_tokens",
    "padded": "num_padded_tokens",
    "cached": "num_cached_tokens",
    "output": "num_output_tokens",
}


def kind_of(step: StepRecord) -> str:
    """``verify`` (drafts), ``decode`` (single tokens), ``mixed`` (prompts beside single tokens) or
    ``prefill``; with the tokens of its graph, padding included, if it has one."""
    if step.num_draft_tokens:
        kind = "verify"
    elif step.num_scheduled_tokens == step.num_requests:
        kind = "decode"
    else:
        kind = "mixed" if step.num_single_tokens else "prefill"
    if step.graph_mode == "eager":
        return kind
    return f"{kind} {step.graph_mode} {step.num_scheduled_tokens + step.num_padded_tokens}"


def summarize(steps: Sequence[StepRecord]) -> dict[str, dict[str, Any]]:
    """Counts, and totals, medians and 95th percentiles in microseconds, by kind of step.

    The kind that took longest comes first. ``wall_us`` counts of a step the time from the end of
    the one before it, or from its own begin if that is later, to its own end, so that no moment
    counts twice where a step begins before the one ahead is through; ``share`` is of the sum over
    all kinds.
    """
    walls = _walls_us(steps)
    total = sum(walls)
    groups: dict[str, list[tuple[StepRecord, float]]] = {}
    for step, wall in zip(steps, walls, strict=True):
        groups.setdefault(kind_of(step), []).append((step, wall))
    found = {}
    for kind, members in sorted(groups.items(), key=lambda g: -sum(w for _, w in g[1])):
        group = [step for step, _ in members]
        wall_us = sum(wall for _, wall in members)
        rows = {"host": [s.host_us for s in group], "device": [s.device_us for s in group]}
        for part in _parts(group):
            rows[part] = [s.parts_us.get(part, 0.0) for s in group]
        found[kind] = {
            "steps": len(group),
            **{name: sum(getattr(s, field) for s in group) for name, field in _COUNTS.items()},
            "wall_us": round(wall_us, 1),
            "share": round(wall_us / total, 4) if total else 0.0,
            "total_us": {name: round(sum(values), 1) for name, values in rows.items()},
            "median_us": {name: _percentile(values, 50) for name, values in rows.items()},
            "p95_us": {name: _percentile(values, 95) for name, values in rows.items()},
        }
    return found


def timeline_of(
    steps: Sequence[StepRecord], max_bytes: int = MAX_SAMPLE_BYTES
) -> dict[str, Any] | None:
    """What a record holds of a run's steps; None where there were none.

    ``kinds`` is :func:`summarize` of all steps. ``sample`` has single steps: all where they fit,
    else as many from the begin as from the middle on. A row of ``rows`` is the step's number, its
    kind (an index into ``kind_names``), its counts, begin and length on the device, and begin and
    length of each part; in microseconds, the first step beginning at 0. What a step lacks is null.
    """
    if not steps:
        return None
    kinds, parts = summarize(steps), _parts(steps)
    names = list(kinds)
    origin = _began_s(steps[0])
    columns = ["step", "kind", *_COUNTS, "device_at", "device"]
    columns += [name for part in parts for name in (f"{part}_at", part)]

    def row(index: int) -> list[float | None]:
        step = steps[index]
        values: list[float | None] = [index, names.index(kind_of(step))]
        values += [getattr(step, field) for field in _COUNTS.values()]
        values += [_us(step.device_start_s, origin), round(step.device_us, 1)]
        for part in parts:
            start, length = step.starts_s.get(part), step.parts_us.get(part)
            values.append(None if start is None else _us(start, origin))
            values.append(None if length is None else round(length, 1))
        return values

    chosen = _within(steps, row, max_bytes)
    return {
        "num_steps": len(steps),
        "kinds": kinds,
        "sample": {
            "num_steps": len(chosen),
            "kind_names": names,
            "columns": columns,
            "rows": [row(index) for index in chosen],
        },
    }


def chrome_trace(timelines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The sampled steps for ``chrome://tracing`` or Perfetto: a process a run, in it a track of the
    host's parts and one of the device's steps.

    Parameters
    ----------
    timelines
        :func:`timeline_of` by name of the run.
    """
    events: list[dict[str, Any]] = []
    for pid, (name, timeline) in enumerate(timelines.items(), start=1):
        events.append(_named("process_name", pid, 0, name))
        events.append(_named("thread_name", pid, 1, "host: parts of a step"))
        events.append(_named("thread_name", pid, 2, "device: steps, as the host sees them"))
        sample = timeline["sample"]
        parts = [c.removesuffix("_at") for c in sample["columns"] if c.endswith("_at")]
        for values in sample["rows"]:
            row = dict(zip(sample["columns"], values, strict=True))
            kind = sample["kind_names"][row["kind"]]
            about = {"step": row["step"], "kind": kind, **{c: row[c] for c in _COUNTS}}
            for part in parts:
                if row[f"{part}_at"] is None or row[part] is None:
                    continue
                is_device = part == "device"
                events.append(
                    {
                        "name": kind if is_device else part,
                        "ph": "X",
                        "pid": pid,
                        "tid": 2 if is_device else 1,
                        "ts": row[f"{part}_at"],
                        "dur": row[part],
                        "args": about,
                    }
                )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _parts(steps: Sequence[StepRecord]) -> list[str]:
    """Parts that any of the steps has, in the order of a step."""
    found = dict.fromkeys(part for step in steps for part in step.parts_us)
    return sorted(found, key=lambda part: _ORDER.index(part) if part in _ORDER else len(_ORDER))


def _began_s(step: StepRecord) -> float:
    return min(step.starts_s.values(), default=step.device_start_s)


def _us(at_s: float, origin_s: float) -> float:
    return round((at_s - origin_s) * 1e6, 1)


def _walls_us(steps: Sequence[StepRecord]) -> list[float]:
    """Time of each step from the moment at which the one before it was through until it was through
    itself; time in which there was no step is nobody's."""
    walls: list[float] = []
    through = None
    for step in steps:
        end = max(
            (start + step.parts_us[part] * 1e-6 for part, start in step.starts_s.items()),
            default=0.0,
        )
        begin = _began_s(step)
        walls.append(max(0.0, end - (begin if through is None else max(begin, through))) * 1e6)
        through = end if through is None else max(through, end)
    return walls


def _percentile(values: Sequence[float], share: float) -> float:
    return round(float(np.percentile(values, share)), 1)


def _within(steps: Sequence[StepRecord], row: Any, max_bytes: int) -> list[int]:
    """Numbers of the steps whose rows fit."""
    spent = np.cumsum([len(json.dumps(row(index))) + 2 for index in range(len(steps))])
    if spent[-1] <= max_bytes:
        return list(range(len(steps)))
    head = int(np.searchsorted(spent, max_bytes / 2, side="right"))
    # The rest from the middle, or from where the head ends.
    first = max(head, len(steps) // 2)
    before = spent[first - 1] if first else 0
    last = int(np.searchsorted(spent, before + max_bytes / 2, side="right"))
    return [*range(head), *range(first, last)]
