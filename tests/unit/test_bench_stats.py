"""The interval covers what it claims, and the rank test agrees with full enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.bench.stats import (
    RoundPair,
    paired_ratio,
    speed_p_value,
    verdict_word,
    wilcoxon_signed_rank,
)


def enumerate_signed_rank(diffs: list[float]) -> float:
    """Two-sided p over every assignment of signs."""
    diffs = [d for d in diffs if d != 0]
    sizes = np.abs(diffs)
    ranks = np.array([(sizes < s).sum() + ((sizes == s).sum() + 1) / 2 for s in sizes])
    observed = ranks[np.array(diffs) > 0].sum()
    sums = [
        ranks[np.array(signs)].sum()
        for signs in itertools.product([False, True], repeat=len(diffs))
    ]
    low = np.mean([s <= observed + 1e-9 for s in sums])
    high = np.mean([s >= observed - 1e-9 for s in sums])
    return min(1.0, 2 * min(low, high))


@given(st.lists(st.integers(-6, 6).map(float), min_size=1, max_size=9).filter(any))
@settings(max_examples=80, deadline=None)
def test_signed_rank_is_exact_with_and_without_ties(diffs: list[float]) -> None:
    assert wilcoxon_signed_rank(diffs) == pytest.approx(enumerate_signed_rank(diffs))


def test_large_samples_agree_with_the_exact_test_at_the_border() -> None:
    rng = np.random.default_rng(0)
    diffs = rng.normal(0.25, 1, 60).tolist()
    exact = wilcoxon_signed_rank(diffs)
    assert exact == pytest.approx(wilcoxon_signed_rank([*diffs, 1e-9, -1.1e-9]), rel=0.15)


def test_known_edges() -> None:
    assert wilcoxon_signed_rank([0.0, 0.0]) == 1.0
    assert wilcoxon_signed_rank([1, 2, 3, 4, 5]) == pytest.approx(2 / 2**5)
    assert wilcoxon_signed_rank([1, 2, 3]) == pytest.approx(0.25), "three rounds cannot reach 0.05"


def rounds_of(
    rng: np.random.Generator, num_rounds: int, ratio: np.ndarray, shared: float, own: float
) -> list[RoundPair]:
    """Rounds whose requests take ``1 / ratio`` as long, with noise by round and by request."""
    size = rng.gamma(4, 1, ratio.size)
    pairs = []
    for _ in range(num_rounds):
        base = size * np.exp(rng.normal(0, own, ratio.size) + rng.normal(0, shared))
        ours = size / ratio * np.exp(rng.normal(0, own, ratio.size) + rng.normal(0, shared))
        pairs.append(RoundPair(float(base.sum() / ours.sum()), tuple(base), tuple(ours)))
    return pairs


@pytest.mark.parametrize("num_rounds", [3, 5, 10])
def test_interval_covers_round_noise(num_rounds: int) -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(400):
        pairs = [RoundPair(float(1.3 * np.exp(rng.normal(0, 0.07)))) for _ in range(num_rounds)]
        low, high = paired_ratio(pairs, resamples=2000).ci95 or (0, 0)
        hits += low <= 1.3 <= high
    # 95 % nominal; 400 trials have a standard error of 1.1 points.
    assert hits / 400 == pytest.approx(0.95, abs=0.035)


def test_interval_covers_requests_that_gain_differently() -> None:
    rng = np.random.default_rng(11)
    truth = 1 / math.exp(-0.3 + 0.3**2 / 2)
    hits = 0
    for _ in range(200):
        ratio = np.exp(-rng.normal(-0.3, 0.3, 20))
        estimate = paired_ratio(rounds_of(rng, 3, ratio, 0.02, 0.03), resamples=2000)
        assert estimate.ci95 is not None
        hits += estimate.ci95[0] <= truth <= estimate.ci95[1]
    assert hits / 200 >= 0.90


def test_no_effect_is_seldom_called_one() -> None:
    rng = np.random.default_rng(3)
    called = 0
    for _ in range(200):
        pairs = rounds_of(rng, 3, np.ones(16), 0.03, 0.03)
        word = verdict_word(paired_ratio(pairs, resamples=2000).ci95, speed_p_value(pairs))
        called += word != "no difference shown"
    assert called / 200 <= 0.08


def test_a_large_effect_is_found_in_three_rounds() -> None:
    rng = np.random.default_rng(5)
    pairs = rounds_of(rng, 3, np.full(16, 1.5), 0.02, 0.05)
    estimate = paired_ratio(pairs)
    assert estimate.ratio == pytest.approx(1.5, rel=0.1)
    assert verdict_word(estimate.ci95, speed_p_value(pairs)) == "faster"
    turned = [RoundPair(1 / p.ratio, p.variant_s, p.baseline_s) for p in pairs]
    assert verdict_word(paired_ratio(turned).ci95, speed_p_value(turned)) == "slower"


def test_estimate_is_the_median_ratio_and_lies_in_its_interval() -> None:
    pairs = [RoundPair(r) for r in (1.0, 1.1, 9.0)]
    estimate = paired_ratio(pairs)
    assert estimate.ratio == pytest.approx(1.1)
    assert estimate.ci95 is not None and estimate.ci95[0] <= 1.1 <= estimate.ci95[1]
    assert estimate.ci95[0] < 1 and estimate.ci95[1] > 9, "wider than the range of three rounds"


def test_deterministic_by_seed() -> None:
    pairs = rounds_of(np.random.default_rng(1), 3, np.ones(8), 0.05, 0.05)
    assert paired_ratio(pairs, seed=4) == paired_ratio(pairs, seed=4)
    assert paired_ratio(pairs, seed=4) != paired_ratio(pairs, seed=5)


def test_what_cannot_be_estimated() -> None:
    assert paired_ratio([RoundPair(2.0)]).ci95 is None
    assert verdict_word(None, 0.001) == "no difference shown"
    assert verdict_word((1.2, 1.4), 0.2) == "no difference shown"
    assert verdict_word((0.9, 1.4), 0.001) == "no difference shown"
    assert speed_p_value([RoundPair(2.0)]) is None
    for pairs, match in [([], "at least one round"), ([RoundPair(float("nan"))], "positive")]:
        with pytest.raises(ValueError, match=match):
            paired_ratio(pairs)
    with pytest.raises(ValueError, match="2000"):
        paired_ratio([RoundPair(1.0)], resamples=100)


def test_few_requests_are_paired_in_every_round() -> None:
    pairs = [RoundPair(2.0, (2.0 + 0.01 * i, 4.0), (1.0, 2.0 + 0.01 * i)) for i in range(3)]
    assert speed_p_value(pairs) == pytest.approx(2 / 2**6)
