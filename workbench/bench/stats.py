"""How sure a speed-up is: a paired interval for its size, a rank test for the word "faster".

Both are small and exact where samples are small, so that they need no statistics library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Two-sided 97.5 % quantiles of Student's t by degrees of freedom; 1.96 is the limit.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_Z975 = 1.959964
_EXACT_MAX_PAIRS = 60
_CHUNK_ELEMENTS = 1_000_000


@dataclass(frozen=True, slots=True)
class RoundPair:
    """One round of a variant beside the same round of its baseline.

    Attributes
    ----------
    ratio
        Speed of the variant / speed of the baseline (above 1: the variant is faster).
    baseline_s, variant_s
        End-to-end seconds of the same requests in the same order, or empty where unknown.
    """

    ratio: float
    baseline_s: tuple[float, ...] = ()
    variant_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RatioEstimate:
    """A speed-up with its 95 % interval; ``ci95`` is None with fewer than two rounds."""

    ratio: float
    ci95: tuple[float, float] | None
    num_rounds: int
    num_requests: int


def small_sample_factor(num_rounds: int) -> float:
    """How much wider than the bootstrap's own an interval over few rounds has to be.

    A bootstrap of ``R`` values has ``(R - 1) / R`` of the variance and normal instead of Student
    tails; both shortfalls are put right by one factor (Hesterberg 2015, "What teachers should
    know about the bootstrap", section 3): 2.7 for three rounds, 1.2 for ten.
    """
    assert num_rounds >= 2
    df = num_rounds - 1
    t = _T975[df - 1] if df <= len(_T975) else _Z975 * (1 + 1 / (4 * df)) / (1 - 1 / (4 * df))
    return math.sqrt(num_rounds / df) * t / _Z975


def paired_ratio(
    pairs: Sequence[RoundPair], *, resamples: int = 4000, seed: int = 0
) -> RatioEstimate:
    """Estimate a speed-up and its 95 % interval from paired rounds.

    The estimate is the **median of the paired ratios**: pairing cancels a drift of the machine
    that both sides of a round share, which a ratio of two medians would keep, and the median
    survives one disturbed round.

    The interval is a percentile bootstrap on the log ratio over two crossed factors, rounds and
    requests, since every round serves the same requests (Owen 2007, "The pigeonhole bootstrap").
    A draw takes R rounds of R with replacement, and n requests of n, which move the ratio of the
    summed end-to-end times; both deviations add on the log scale. The round part is taken about
    the mean of the log ratios, where the bootstrap of a median of three or five is erratic
    (simulated coverage 92 % and 98 %, against 95 % and 94 %), and is widened by
    :func:`small_sample_factor`: a bare bootstrap of three rounds is no wider than their range
    and covers about 75 %. The interval is stretched to the estimate should it lie outside.

    It assumes that rounds are exchangeable (alternated, warmed up), that the log ratio's noise
    over rounds has no heavier tails than a normal one when R is small, and that requests are
    drawn from the use the workload stands for. Requests that shared a batch are not independent;
    what they share within a round is carried by the round part. By Little's law summed
    end-to-end times stand for wall time as long as the mean number in flight does not hang on
    which requests are drawn.

    Parameters
    ----------
    pairs
        One a round. Per-request times are used when every pair has them for the same number of
        requests.
    resamples
        At least 2000.
    seed
        The same seed gives the same interval.
    """
    if not pairs:
        raise ValueError("no paired rounds; a speed-up needs at least one round of both sides.")
    if resamples < 2000:
        raise ValueError(f"resamples is {resamples}; it must be at least 2000.")
    if any(not (pair.ratio > 0 and math.isfinite(pair.ratio)) for pair in pairs):
        raise ValueError("a paired ratio is not a positive number; a round was not measured.")
    logs = np.log([pair.ratio for pair in pairs])
    estimate, centre = float(np.median(logs)), float(logs.mean())
    num_rounds, num_requests = len(pairs), _num_common_requests(pairs)
    if num_rounds < 2:
        return RatioEstimate(math.exp(estimate), None, num_rounds, num_requests)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(num_rounds, size=(resamples, num_rounds))
    drawn = (logs[chosen].mean(axis=1) - centre) * small_sample_factor(num_rounds)
    if num_requests > 1:
        drawn = drawn + _request_deviation(pairs, chosen, rng)
    low, high = np.percentile(drawn, (2.5, 97.5))
    ci95 = (math.exp(min(centre + low, estimate)), math.exp(max(centre + high, estimate)))
    return RatioEstimate(math.exp(estimate), ci95, num_rounds, num_requests)


def _num_common_requests(pairs: Sequence[RoundPair]) -> int:
    lengths = {len(pair.baseline_s) for pair in pairs} | {len(pair.variant_s) for pair in pairs}
    return lengths.pop() if len(lengths) == 1 else 0


def _request_deviation(
    pairs: Sequence[RoundPair], chosen: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Log change of the summed-time ratio when the requests are drawn anew: float64 [draws]."""
    baseline = np.asarray([pair.baseline_s for pair in pairs])
    variant = np.asarray([pair.variant_s for pair in pairs])
    whole = np.log(baseline.sum(axis=1) / variant.sum(axis=1))
    num_draws, num_requests = chosen.shape[0], baseline.shape[1]
    deviations = np.empty(num_draws)
    step = max(1, _CHUNK_ELEMENTS // num_requests)
    for start in range(0, num_draws, step):
        part = chosen[start : start + step]
        counts = rng.multinomial(num_requests, np.full(num_requests, 1 / num_requests), len(part))
        logs = np.log((counts @ baseline.T) / (counts @ variant.T)) - whole
        deviations[start : start + step] = np.take_along_axis(logs, part, axis=1).mean(axis=1)
    return deviations


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank: float64 [n]."""
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values))
    bounds = np.flatnonzero(np.diff(values[order]) != 0) + 1
    for first, end in pairwise([0, *bounds.tolist(), len(values)]):
        ranks[order[first:end]] = (first + 1 + end) / 2
    return ranks


def _two_sided_normal(z: float) -> float:
    return min(1.0, math.erfc(abs(z) / math.sqrt(2)))


def wilcoxon_signed_rank(differences: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test that paired differences centre on zero.

    Zero differences are left out. Exact (every assignment of signs counted, ties included) up to
    60 pairs; the normal approximation with tie and continuity correction above.

    Parameters
    ----------
    differences
        One a pair.

    Returns
    -------
    The p value; 1.0 where no pair differs. Five pairs or fewer cannot reach 0.05.
    """
    diffs = np.asarray(differences, dtype=np.float64)
    diffs = diffs[diffs != 0]
    if diffs.size == 0:
        return 1.0
    ranks = _average_ranks(np.abs(diffs))
    positive = float(ranks[diffs > 0].sum())
    if diffs.size <= _EXACT_MAX_PAIRS:
        # Mean ranks are halves at worst, so doubled ranks are whole.
        doubled = np.rint(2 * ranks).astype(int)
        ways = np.zeros(int(doubled.sum()) + 1)
        ways[0] = 1.0
        for rank in doubled:
            ways[rank:] += ways[:-rank].copy()
        ways /= ways.sum()
        observed = round(2 * positive)
        tail = min(ways[: observed + 1].sum(), ways[observed:].sum())
        return min(1.0, 2 * float(tail))
    mean = float(ranks.sum()) / 2
    spread = math.sqrt(float((ranks**2).sum()) / 4)
    return _two_sided_normal(max(0.0, abs(positive - mean) - 0.5) / spread)


def speed_p_value(pairs: Sequence[RoundPair]) -> float | None:
    """P value of a rank test that variant and baseline take equally long a request.

    Wilcoxon's signed-rank test on the requests' median end-to-end times over rounds, so that
    each request counts once. With fewer than six requests such a test cannot reach 0.05; every
    (request, round) is a pair then, which also assumes that rounds are independent.

    Returns
    -------
    None where there are no per-request times to test.
    """
    num_requests = _num_common_requests(pairs)
    if num_requests == 0:
        return None
    baseline = np.asarray([pair.baseline_s for pair in pairs])
    variant = np.asarray([pair.variant_s for pair in pairs])
    if num_requests < 6:
        return wilcoxon_signed_rank((baseline - variant).ravel().tolist())
    diffs = np.median(baseline, axis=0) - np.median(variant, axis=0)
    return wilcoxon_signed_rank(diffs.tolist())


def verdict_word(ci95: tuple[float, float] | None, p: float | None, *, alpha: float = 0.05) -> str:
    """Say "faster" or "slower" only where interval and rank test agree.

    Parameters
    ----------
    ci95
        Interval of the speed-up, or None where rounds were too few.
    p
        From :func:`speed_p_value`.

    Returns
    -------
    ``"faster"``, ``"slower"`` or ``"no difference shown"``.
    """
    if ci95 is None or p is None or p >= alpha:
        return "no difference shown"
    if ci95[0] > 1:
        return "faster"
    return "slower" if ci95[1] < 1 else "no difference shown"
