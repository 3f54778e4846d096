"""A declared prefix hit rate is reached, or the row is INVALID and says what was reached."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.fake_backend import FakeBackend, FakeClock, make_requests, reference
from workbench.bench.hit_rate import CACHED_TOKENS, HIT_RATE_TOLERANCE, check_hit_rate, check_use
from workbench.bench.load import Closed
from workbench.bench.report import to_document
from workbench.bench.run import Variant, VariantResult, run_bench

REQUESTS = make_requests(30)
PROMPT_TOKENS = sum(len(r.prompt_token_ids) for r in REQUESTS)
TECHNIQUE = {"cache": {"evidence": ["hits"], "slots": {"prefix_cache": "some"}}}


def run(
    declared: float | None, counts: dict[str, float], has_cache: bool = True, **variant: Any
) -> VariantResult:
    clock = FakeClock()
    workload = {"name": "w", "digest": "d"}
    (result,) = run_bench(
        [
            Variant(
                "A",
                lambda: FakeBackend(clock, counts=counts),
                has_prefix_cache=has_cache,
                **variant,
            )
        ],
        REQUESTS,
        Closed,
        reference=reference,
        workload=workload if declared is None else {**workload, "declared_hit_rate": declared},
        clock=clock,
    )
    return result


#: Counters of a cache that was asked and kept what it was given.
IN_USE = {"prefix_cache.lookups": 30.0, "prefix_cache.inserted_blocks": 60.0}


def cached(share: float) -> dict[str, float]:
    return {CACHED_TOKENS: share * PROMPT_TOKENS}


@pytest.mark.parametrize("off", [0.0, 0.9 * HIT_RATE_TOLERANCE, -0.9 * HIT_RATE_TOLERANCE])
def test_a_rate_that_is_reached_is_recorded(off: float) -> None:
    record = run(0.5, cached(0.5 + off)).record
    assert (record.status, record.verdict) == ("OK", "exact")
    assert record.load["declared_hit_rate"] == 0.5
    assert record.load["hit_rate"] == pytest.approx(0.5 + off)


@pytest.mark.parametrize(
    ("achieved", "cause"),
    [(0.31, "a pool too small"), (0.929, "warm before the run"), (0.0, "never published")],
)
def test_a_rate_that_is_missed_voids_the_row(achieved: float, cause: str) -> None:
    result = run(0.5, cached(achieved))
    record = result.record
    assert (record.status, record.verdict) == ("INVALID_EVIDENCE", "INVALID")
    assert record.metrics is None and record.samples == ()
    assert "50.0 %" in (record.error or "") and f"{100 * achieved:.1f} %" in (record.error or "")
    assert cause in (record.error or "")
    assert record.load["declared_hit_rate"] == 0.5
    assert record.load["hit_rate"] == pytest.approx(achieved)
    assert record.gate["details"]["declared_hit_rate"] == 0.5
    assert record.gate["details"]["achieved_hit_rate"] == pytest.approx(achieved)
    assert to_document([result])["exit_status"] == 1


def test_a_cache_whose_hits_nobody_counts_shows_nothing() -> None:
    record = run(0.5, {}).record
    assert record.verdict == "INVALID" and CACHED_TOKENS in (record.error or "")
    assert record.load["hit_rate"] is None


def test_rows_without_a_cache_are_the_baseline_of_such_a_run() -> None:
    for counts in ({}, cached(0.0)):
        record = run(0.5, counts, has_cache=False).record
        assert record.status == "OK" and record.load["declared_hit_rate"] == 0.5


def test_no_declaration_no_gate() -> None:
    record = run(None, cached(0.2)).record
    assert record.status == "OK" and record.load["hit_rate"] == pytest.approx(0.2)
    assert "declared_hit_rate" not in record.load
    assert check_hit_rate(None, None) is None


def test_at_a_declared_rate_of_zero_no_hit_is_the_proof() -> None:
    """A cache that finds nothing has no hits to show; any other technique still must show its."""
    idle = {**cached(0.0), **IN_USE, "hits": 0.0}
    assert run(0.0, idle, techniques=TECHNIQUE).record.status == "OK"
    assert run(0.0, {**cached(0.3), "hits": 9.0}, techniques=TECHNIQUE).record.verdict == "INVALID"
    unproved = {**cached(0.5), "hits": 0.0}
    assert run(0.5, unproved, techniques=TECHNIQUE).record.verdict == "INVALID"
    other = {"other": {"evidence": ["hits"], "slots": {"drafter": "some"}}}
    assert run(0.0, idle, techniques=other).record.verdict == "INVALID"
    assert run(None, idle, techniques=TECHNIQUE).record.verdict == "INVALID"


@pytest.mark.parametrize(
    ("counts", "what"),
    [
        ({}, "never asked"),
        ({"prefix_cache.inserted_blocks": 60.0}, "never asked"),
        ({**IN_USE, "prefix_cache.lookups": 0.0}, "never asked"),
        ({**IN_USE, "prefix_cache.inserted_blocks": 0.0}, "never given anything to keep"),
    ],
)
def test_at_a_declared_rate_of_zero_a_cache_that_does_nothing_is_invalid(
    counts: dict[str, float], what: str
) -> None:
    for techniques in (TECHNIQUE, {}):  # a technique's row, and an engine that has a cache anyway
        record = run(0.0, {**cached(0.0), **counts, "hits": 0.0}, techniques=techniques).record
        assert (record.status, record.verdict) == ("INVALID_EVIDENCE", "INVALID")
        assert f"no evidence: the prefix cache was {what}" in (record.error or "")
        assert record.metrics is None
    assert run(0.0, {**cached(0.0), **counts}, has_cache=False).record.status == "OK"
    assert check_use(0.5, counts) is None and check_use(None, counts) is None
