"""The steady window: where it begins and ends, and what its figures leave out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.fake_backend import FakeBackend, FakeClock, make_requests
from workbench.bench.load import Closed, Constant, LoadGenerator, Offline
from workbench.bench.metrics import (
    RoundSample,
    collect,
    metrics_over_rounds,
    round_metrics,
    steady_metrics,
)
from workbench.bench.samples import RequestSample
from workbench.bench.steady import counts_over_time, steady_window
from workbench.core.backend import TokenEvent


def served(name: str, first_s: float, last_s: float) -> RequestSample:
    """Released at 0, one token at each end of its decode."""
    gaps = (last_s - first_s,) if last_s > first_s else ()
    events = (1,) * (1 + len(gaps))
    return RequestSample(name, "", 4, len(events), 0.0, 0.0, first_s, last_s, events, gaps)


def round_of(*spans: tuple[float, float], wall_s: float | None = None) -> RoundSample:
    requests = tuple(served(f"r{i}", *span) for i, span in enumerate(spans))
    return RoundSample(wall_s or max(last for _, last in spans), requests)


def run(load: LoadGenerator, **backend: float) -> RoundSample:
    clock = FakeClock(0.0)
    events: list[TokenEvent] = []
    watched = load.watch(events.append)
    FakeBackend(clock, **backend).run(load, watched)  # type: ignore[arg-type]
    assert load.start_s is not None
    return collect(events, load.requests, load.release_s, load.taken_s, load.start_s)[0]


def test_by_hand() -> None:
    """1 decodes from 1 s, 2 from 2 s, 3 from 4 to 5 s, 2 to 8 s, 1 to 10 s: for most, 2."""
    window = steady_window(round_of((1, 8), (2, 10), (4, 5)))
    assert window is not None
    assert (window.start_s, window.end_s, window.level) == (2, 8, 2)


def test_a_level_that_dips_in_between_does_not_end_the_window() -> None:
    window = steady_window(round_of((0, 10), (0, 4), (5, 10)))
    assert window is not None and window.span == (0, 10) and window.level == 2


def test_a_run_that_mostly_waits_is_steady_from_its_first_to_its_last_decode() -> None:
    window = steady_window(round_of((10, 11), (30, 31)))
    assert window is not None and window.level == 1 and window.span == (10, 31)


def test_no_window_where_nothing_decodes() -> None:
    assert steady_window(round_of((1, 1), (2, 2))) is None
    assert steady_metrics([round_of((1, 1))]) is None
    assert steady_metrics([round_of((1, 2)), round_of((1, 1))]) is None
    assert steady_metrics([]) is None


def test_offline_without_its_ramp_and_its_drain() -> None:
    """Four at once, of 20, 40, 60, ... tokens: the drain is when fewer than four are left."""
    requests = [replace(r, max_tokens=20 * (i + 1)) for i, r in enumerate(make_requests(12))]
    sample = run(Offline(requests), max_num_seqs=4, step_s=1.0)
    window = steady_window(sample)
    assert window is not None and window.level == 4
    ends = sorted(r.last_s for r in sample.served if r.last_s is not None)
    assert window.end_s == ends[-4], "the last moment at which four run"
    whole, steady = round_metrics(sample), round_metrics(sample, window.span)
    assert steady["output_tok_s"] > whole["output_tok_s"]
    assert steady["output_tok_s"] == pytest.approx(4.0, rel=0.05)


def test_a_closed_load_at_one_leaves_out_only_the_first_prompt() -> None:
    sample = run(Closed(make_requests(5, max_tokens=10), 1), step_s=0.5)
    window = steady_window(sample)
    assert window is not None and window.level == 1
    assert window.start_s == sample.requests[0].first_s and window.end_s == sample.wall_s


def test_an_open_load_that_the_backend_cannot_follow_is_judged_at_saturation() -> None:
    sample = run(Constant(make_requests(40, max_tokens=8), 2.0), max_num_seqs=3, step_s=0.5)
    window = steady_window(sample)
    assert window is not None and window.level == 3
    assert 0 < window.start_s < 5 and sample.wall_s - window.end_s < 5


def test_medians_over_rounds_of_both() -> None:
    rounds = [run(Closed(make_requests(9, max_tokens=6), 3), step_s=s) for s in (0.1, 0.4, 0.2)]
    steady = steady_metrics(rounds)
    assert steady is not None
    whole = metrics_over_rounds(rounds)
    assert set(steady["metrics"]) == set(whole)
    spans = [window.span for r in rounds if (window := steady_window(r)) is not None]
    each = [round_metrics(r, s)["output_tok_s"] for r, s in zip(rounds, spans, strict=True)]
    assert steady["metrics"]["output_tok_s"]["per_round"] == each
    assert steady["metrics"]["output_tok_s"]["value"] == np.median(each)
    assert steady["level"] == 3 and 0 < steady["share"] <= 1
    assert steady["share"] == pytest.approx(np.median(
        [(s[1] - s[0]) / r.wall_s for r, s in zip(rounds, spans, strict=True)]
    ))  # fmt: skip


spans_of = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 25)).map(lambda x: (x[0], x[0] + x[1])),
    min_size=1,
    max_size=12,
)


@given(spans=spans_of)
def test_counts_against_a_plain_count(spans: list[tuple[int, int]]) -> None:
    times, counts = counts_over_time(spans)
    assert list(times) == sorted({edge for span in spans for edge in span})
    for time, count in zip(times, counts, strict=True):
        assert count == sum(start <= time < end for start, end in spans)


@given(spans=spans_of, tail=st.integers(0, 30))
def test_window_against_its_definition(spans: list[tuple[int, int]], tail: int) -> None:
    """Second by second: the median of what decodes, its first and its last moment."""
    wall_s = max(end for _, end in spans) + tail
    sample = round_of(*[(float(a), float(b)) for a, b in spans], wall_s=float(wall_s))
    levels = [sum(a <= second < b for a, b in spans) for second in range(wall_s)]
    window = steady_window(sample)
    if not any(levels):
        assert window is None
        return
    assert window is not None
    level = max(1, sorted(levels)[(len(levels) - 1) // 2])
    reached = [second for second, count in enumerate(levels) if count >= level]
    assert window.level == level
    assert window.span == (reached[0], reached[-1] + 1)
