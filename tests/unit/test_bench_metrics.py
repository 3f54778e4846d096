"""Metrics against values worked out by hand."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from workbench.bench.jsonsafe import to_json
from workbench.bench.metrics import (
    LATE_SEND_S,
    METRICS,
    RoundSample,
    collect,
    load_metrics,
    metrics_over_rounds,
    round_metrics,
    summarise,
)
from workbench.core.backend import TokenEvent
from workbench.core.workload import WorkloadRequest

START = 1000.0
REQUESTS = [
    WorkloadRequest("a", (1, 2, 3), 4),
    WorkloadRequest("b", (4, 5), 5),
    WorkloadRequest("c", (6,), 1),
]


def by_hand() -> tuple[RoundSample, dict[str, tuple[int, ...]]]:
    """a: 1 token an event; b: speculation, 1 then 3 then 1; c: a single token."""
    events = [
        TokenEvent("a", START + 1.0, (10,)),
        TokenEvent("b", START + 1.0, (20,)),
        TokenEvent("a", START + 1.5, (11,)),
        TokenEvent("b", START + 1.6, (21, 22, 23)),
        TokenEvent("a", START + 2.0, (12,)),
        TokenEvent("b", START + 2.0, (24,), finished=True),
        TokenEvent("a", START + 3.0, (13,)),
        TokenEvent("a", START + 3.25, (), finished=True),
        TokenEvent("c", START + 4.0, (30,), finished=True),
    ]
    release = {"a": START, "b": START + 0.5, "c": START + 3.0}
    taken = {"a": START, "b": START + 0.75, "c": START + 3.0}
    return collect(events, REQUESTS, release, taken, START, START + 5.0)


def test_rates_and_latencies_by_hand() -> None:
    sample, outputs = by_hand()
    assert outputs == {"a": (10, 11, 12, 13), "b": (20, 21, 22, 23, 24), "c": (30,)}
    assert sample.wall_s == pytest.approx(4.0), "to the last token, not to the end of run()"
    found = round_metrics(sample)
    assert found["output_tok_s"] == pytest.approx(10 / 4)
    assert found["total_tok_s"] == pytest.approx(16 / 4)
    assert found["request_s"] == pytest.approx(3 / 4)
    assert found["ttft_ms"]["mean"] == pytest.approx((1000 + 500 + 1000) / 3)
    assert found["ttft_ms"]["p50"] == pytest.approx(1000)
    # a: 2 s for 3 tokens, b: 1 s for 4; c has one token and is left out.
    assert found["tpot_ms"]["n"] == 2
    assert found["tpot_ms"]["mean"] == pytest.approx((2000 / 3 + 250) / 2)
    assert found["e2el_ms"]["mean"] == pytest.approx((3000 + 1500 + 1000) / 3)
    gaps = [500, 500, 1000, 200, 200, 200, 400]
    assert found["itl_ms"]["n"] == len(gaps)
    assert found["itl_ms"]["mean"] == pytest.approx(np.mean(gaps))
    assert found["itl_ms"]["std"] == pytest.approx(np.std(gaps, ddof=1))
    assert found["itl_ms"]["p50"] == pytest.approx(400)


def test_normalised_latency_and_longest_gap_by_hand() -> None:
    found = round_metrics(by_hand()[0])
    assert found["norm_latency_ms"]["n"] == 3
    assert found["norm_latency_ms"]["mean"] == pytest.approx((3000 / 4 + 1500 / 5 + 1000 / 1) / 3)
    # The event of three tokens came after 600 ms: that is what its reader waited. c has no gap.
    assert found["max_gap_ms"]["n"] == 2
    assert found["max_gap_ms"]["mean"] == pytest.approx((1000 + 600) / 2)


def test_a_span_takes_what_became_known_in_it() -> None:
    """From 1.0 to 2.0, the end included: what the first moment brought is outside."""
    sample = by_hand()[0]
    found = round_metrics(sample, (1.0, 2.0))
    assert found["output_tok_s"] == pytest.approx(1 + 3 + 1 + 1), "a, b, a, b: first tokens are not"
    assert found["total_tok_s"] == found["output_tok_s"], "no prompt was done within"
    assert found["request_s"] == pytest.approx(1), "b ended"
    assert found["ttft_ms"]["n"] == 0
    assert found["e2el_ms"]["n"] == found["tpot_ms"]["n"] == found["norm_latency_ms"]["n"] == 1
    assert found["e2el_ms"]["mean"] == pytest.approx(1500)
    assert found["max_gap_ms"]["mean"] == pytest.approx(600)
    assert found["itl_ms"]["n"] == 6
    assert found["itl_ms"]["mean"] == pytest.approx((500 + 3 * 200 + 500 + 400) / 6)


def test_spans_that_touch_add_up_to_the_round() -> None:
    sample = by_hand()[0]
    edges = [-1.0, 0.4, 1.0, 1.5, 1.6, 2.0, 2.7, sample.wall_s]
    parts = [(b - a, round_metrics(sample, (a, b))) for a, b in pairwise(edges)]
    whole = round_metrics(sample)
    for name, metric in METRICS.items():
        if metric.is_distribution:
            assert sum(found[name]["n"] for _, found in parts) == whole[name]["n"]
        else:
            total = sum(length * found[name] for length, found in parts)
            assert total == pytest.approx(whole[name] * sample.wall_s)


def test_itl_adds_up_to_what_follows_the_first_token() -> None:
    for request in by_hand()[0].requests:
        assert request.itl_s().sum() == pytest.approx(request.e2el_s - request.ttft_s)


def test_what_the_load_achieved() -> None:
    found = load_metrics(by_hand()[0])
    assert found["achieved_request_s"] == pytest.approx(3 / 4)
    assert found["mean_in_flight"] == pytest.approx((3 + 1.5 + 1) / 4)
    assert found["max_queue"] == 2
    assert found["max_taken_late_s"] == pytest.approx(0.25)
    assert found["num_late_sends"] == 1
    assert found["max_in_flight"] == 2
    assert found["duration_s"] == pytest.approx(4)
    assert found["sent_request_s"] == pytest.approx(3 / 3)


def test_lateness_counts_above_its_bound() -> None:
    times = {"a": START, "b": START, "c": START}
    events = [TokenEvent(key, START + 1, (1,), True) for key in times]
    taken = {"a": START, "b": START + 0.9 * LATE_SEND_S, "c": START + 1.1 * LATE_SEND_S}
    found = load_metrics(collect(events, REQUESTS, times, taken, START)[0])
    assert found["num_late_sends"] == 1
    assert found["max_taken_late_s"] == pytest.approx(1.1 * LATE_SEND_S)


def test_first_event_with_several_tokens_has_no_gap() -> None:
    events = [TokenEvent("a", START + 1, (1, 2)), TokenEvent("a", START + 2, (3, 4), True)]
    sample, _ = collect(events, REQUESTS[:1], {"a": START}, {"a": START}, START)
    (request,) = sample.requests
    assert request.itl_s().tolist() == pytest.approx([0.5, 0.5])
    assert request.tpot_s == pytest.approx(1 / 3)


def test_errors_do_not_count_as_served() -> None:
    events = [
        TokenEvent("a", START + 1, (1,)),
        TokenEvent("a", START + 2, (), error="pool too small"),
        TokenEvent("b", START + 2, (2,), finished=True),
    ]
    times = {"a": START, "b": START}
    sample, _ = collect(events, REQUESTS, times, times, START)
    assert [r.is_served for r in sample.requests] == [False, True, False]
    assert sample.requests[0].error == "pool too small"
    assert "never took" in (sample.requests[2].error or "")
    assert round_metrics(sample)["output_tok_s"] == pytest.approx(1 / 2)


def test_a_request_left_unfinished_is_an_error() -> None:
    sample, _ = collect(
        [TokenEvent("a", START + 1, (1,))], REQUESTS[:1], {"a": START}, {"a": START}, START
    )
    assert "without finishing" in (sample.requests[0].error or "")


@pytest.mark.parametrize(
    ("events", "match"),
    [
        ([TokenEvent("zz", START + 1, (1,))], "unknown request 'zz'"),
        ([TokenEvent("a", START - 1, (1,), True)], "before its release"),
        ([TokenEvent("a", START + 2, (1,)), TokenEvent("a", START + 1, (2,), True)], "previous"),
        ([TokenEvent("a", START + 9, (1,), True)], "later than the end"),
    ],
)
def test_a_clock_that_cannot_be_trusted_is_refused(events: list[TokenEvent], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        collect(events, REQUESTS[:1], {"a": START}, {"a": START}, START, START + 5)


def test_summary_of_little() -> None:
    assert summarise([])["p50"] is None and summarise([])["n"] == 0
    assert summarise([3.0]) == {
        "mean": 3.0, "std": None, "p50": 3.0, "p90": 3.0, "p95": 3.0, "p99": 3.0, "n": 1,
    }  # fmt: skip
    assert summarise(range(101))["p95"] == pytest.approx(95)


def test_median_over_rounds_and_units() -> None:
    sample, _ = by_hand()
    slow = RoundSample(sample.wall_s * 2, sample.requests)
    slower = RoundSample(sample.wall_s * 4, sample.requests)
    table = metrics_over_rounds([slower, sample, slow])
    assert set(table) == set(METRICS)
    assert table["output_tok_s"]["value"] == pytest.approx(10 / 8)
    assert table["output_tok_s"]["per_round"] == pytest.approx([10 / 16, 10 / 4, 10 / 8])
    for name, metric in METRICS.items():
        assert table[name]["unit"] == metric.unit and table[name]["better"] == metric.better
        assert name.endswith("_ms") == (metric.unit == "ms")
        assert metric.definition and metric.source


def test_samples_survive_json() -> None:
    sample, _ = by_hand()
    again = RoundSample.from_dict(json.loads(to_json(sample.to_dict())))
    assert again.wall_s == pytest.approx(sample.wall_s, abs=1e-6)
    for ours, theirs in zip(again.requests, sample.requests, strict=True):
        assert ours.event_tokens == theirs.event_tokens
        assert ours.gaps_s == pytest.approx(theirs.gaps_s, abs=1e-6), "to the microsecond"
        assert ours.ttft_s == pytest.approx(theirs.ttft_s, abs=1e-6)
        assert (ours.request_id, ours.error) == (theirs.request_id, theirs.error)


def test_json_has_no_nan() -> None:
    text = to_json({"a": float("nan"), "b": [np.float32("inf"), np.int64(3)], "c": {1: (2,)}})
    assert json.loads(text) == {"a": None, "b": [None, 3], "c": {"1": [2]}}
