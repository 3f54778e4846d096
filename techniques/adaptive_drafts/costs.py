"""What steps cost and how drafts fare, as measured."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from typing import TypeAlias

import numpy as np

#: Drafts a request and seconds over those of a step without any, in order from ``(0, 1)``.
Curve: TypeAlias = list[tuple[float, float]]

#: Samples a knot; their median is not moved by a step that something held up.
_SAMPLES = 9
#: Requests up to which every number has costs of its own; above, eight a doubling.
_EXACT = 16
#: Verifications after which old ones count for 1/e.
_WINDOW = 200.0
#: Conditional acceptance of the first draft, before any was verified.
_PRIOR = 0.8


class StepCosts:
    """Seconds of steps by number of requests and drafts a request, interpolated.

    Steps of about as many requests share a bucket; one that was not measured yet is taken to rise
    with its drafts as the nearest one that was.
    """

    def __init__(self) -> None:
        #: By bucket and drafts a request, rounded up: those drafts and seconds, and their middle.
        self._samples: dict[tuple[int, int], deque[tuple[float, float]]] = {}
        self._middles: dict[int, dict[int, tuple[float, float]]] = {}
        self._knots: dict[int, Curve] = {}

    def add(self, num_requests: int, num_drafts: int, seconds: float) -> None:
        """Note a step."""
        bucket, drafts = bucket_of(num_requests), num_drafts / num_requests
        key = math.ceil(drafts)
        samples = self._samples.setdefault((bucket, key), deque(maxlen=_SAMPLES))
        samples.append((drafts, seconds))
        middles = self._middles.setdefault(bucket, {})
        middles[key] = (
            sum([d for d, _ in samples]) / len(samples),
            statistics.median([s for _, s in samples]),
        )
        knots: Curve = []
        most = math.inf
        for key in sorted(middles, reverse=True):
            # Fewer drafts never take longer: one slow step among few does not raise its knot.
            at, found = middles[key]
            most = min(most, found)
            knots.append((at, most if key else found))
        self._knots[bucket] = knots[::-1]

    def plain(self, num_requests: int) -> float | None:
        """Seconds of a step without drafts; None where none of about as many requests ran."""
        knots = self._knots.get(bucket_of(num_requests))
        return knots[0][1] if knots and knots[0][0] == 0 else None

    def curve(self, num_requests: int, most_apart: int | None = None) -> Curve | None:
        """Drafts a request, and seconds over those without drafts, in order from ``(0, 1)``: of the
        nearest bucket, at most so many apart, where both kinds were measured; None without one."""
        bucket = bucket_of(num_requests)
        known = [b for b, knots in self._knots.items() if knots[0][0] == 0 and len(knots) > 1]
        if not known:
            return None
        nearest = min(known, key=lambda b: (abs(b - bucket), b))
        if most_apart is not None and abs(nearest - bucket) > most_apart:
            return None
        knots = self._knots[nearest]
        return [(d, max(1.0, seconds / knots[0][1])) for d, seconds in knots]


def bucket_of(num_requests: int) -> int:
    """Steps of about as many requests have the same; neighbours are one apart."""
    if num_requests <= _EXACT:
        return num_requests
    return _EXACT + round(8 * math.log2(num_requests / _EXACT))


def interpolate(curve: Curve, at: float) -> float:
    """A piecewise linear curve at a place; beyond its end it goes on as it rose last."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    (x0, y0), (x1, y1) = curve[-2:]
    return y1 + max(0.0, (y1 - y0) / (x1 - x0)) * (at - x1)


class Acceptance:
    """How often there is a draft at a position, and how often it holds once those before it do."""

    def __init__(self, num_positions: int) -> None:
        self._asked = [0.0] * num_positions
        self._given = [0.0] * num_positions
        self._tested = [0.0] * num_positions
        self._held = [0.0] * num_positions

    def add(self, num_drafts: list[int], num_accepted: list[int], num_allowed: int) -> None:
        """Note a step with drafts."""
        count = len(num_drafts)
        decay = math.exp(-count / _WINDOW)
        given = _at_least(num_drafts)
        held = _at_least(num_accepted)
        # A position is tested where there is a draft and all before it hold.
        tested = _at_least(list(map(min, num_drafts, [n + 1 for n in num_accepted])))
        for i in range(min(num_allowed, len(self._asked))):
            self._asked[i] = self._asked[i] * decay + count
            for sums, new in ((self._given, given), (self._held, held), (self._tested, tested)):
                sums[i] = sums[i] * decay + (new[i] if i < len(new) else 0)

    def expected(self, num_deviations: float = 0.0) -> list[tuple[float, float]]:
        """Drafts and tokens a request that a step with drafts has on average, by how many are
        allowed, from 0; what was not seen yet is like the position before it. With acceptance
        raised by so many standard deviations of what was seen."""
        drafts, tokens = 0.0, 1.0
        found = [(drafts, tokens)]
        is_given, holds, all_hold = 1.0, _PRIOR, 1.0
        for asked, given, tested, held in zip(
            self._asked, self._given, self._tested, self._held, strict=True
        ):
            is_given = (given + is_given) / (asked + 1)
            holds = (held + holds) / (tested + 1)
            deviation = math.sqrt(max(0.0, holds * (1 - holds)) / (tested + 1))
            all_hold *= min(1.0, holds + num_deviations * deviation)
            drafts += is_given
            tokens += is_given * all_hold
            found.append((drafts, tokens))
        return found


def _at_least(counts: list[int]) -> list[int]:
    """How many counts are at least 1, 2, and so on up to the largest."""
    by_count = np.bincount(counts)[1:]
    found: list[int] = by_count[::-1].cumsum()[::-1].tolist()
    return found
