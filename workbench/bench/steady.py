"""The steady window of a run: what is left without its ramp and its drain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workbench.bench.samples import RoundSample

Span = tuple[float, float]
"""Start and end in seconds after the start of the load; what happens at the end is inside, what
happens at the start is not, so that spans that touch share nothing."""


def counts_over_time(spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Count how many of ``spans`` are open at each moment.

    Returns
    -------
    times, counts
        ``counts[i]`` are open from ``times[i]`` to ``times[i + 1]``: float64 [m], int64 [m]. One
        that closes at the moment another one opens is not counted beside it.
    """
    edges = np.asarray(spans, dtype=np.float64).reshape(-1, 2)
    times, inverse = np.unique(edges.T.ravel(), return_inverse=True)
    steps = np.repeat([1, -1], len(edges))
    change = np.zeros(len(times), dtype=np.int64)
    np.add.at(change, inverse.ravel(), steps)
    return times, np.cumsum(change)


@dataclass(frozen=True, slots=True)
class SteadyWindow:
    """When a run was at its typical level.

    Attributes
    ----------
    start_s, end_s
        Seconds after the start of the load.
    level
        Requests decoding together for the median moment of the run.
    """

    start_s: float
    end_s: float
    level: int

    @property
    def span(self) -> Span:
        """Start and end."""
        return self.start_s, self.end_s


def steady_window(round_: RoundSample) -> SteadyWindow | None:
    """Return the steady window of a round.

    A request *decodes* from its first token on the host to its last. The **level** of the round is
    the median over time, from the start of the load to the last token, of the number of requests
    that decode, and at least 1. The window runs from the first moment at which so many decode to
    the last one. It leaves out the ramp (the first prompts, and the wait until as many requests
    run as usually do) and the drain (the tail in which no new request takes a finished one's
    place), for every load alike: requests in flight would not do, since offline all of them are
    in flight at once and then ever fewer.

    The window covers at least half of a round whose requests decode for half of it. It is None
    where no request brings tokens at two moments.
    """
    spans = [
        (request.first_s, request.last_s)
        for request in round_.served
        if request.first_s is not None
        and request.last_s is not None
        and request.last_s > request.first_s
    ]
    if not spans:
        return None
    times, counts = counts_over_time(spans)
    level = max(1, _median_over_time(times, counts, round_.wall_s))
    reached = np.flatnonzero(counts >= level)
    # The count is 0 after the last edge, so what is reached has an edge behind it.
    return SteadyWindow(float(times[reached[0]]), float(times[reached[-1] + 1]), level)


def _median_over_time(times: np.ndarray, counts: np.ndarray, wall_s: float) -> int:
    """The lowest count that is not exceeded for half of the time from 0 to ``wall_s``."""
    held_s = np.diff(np.concatenate([[0.0], times, [max(wall_s, times[-1])]]))
    levels = np.concatenate([[0], counts])
    order = np.argsort(levels, kind="stable")
    passed_s = np.cumsum(held_s[order])
    middle = int(np.searchsorted(passed_s, passed_s[-1] / 2))
    return int(levels[order][middle])
