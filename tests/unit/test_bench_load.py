"""Load generators: when requests are released, and what the book says of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.engines import check_idle, shared_engine
from tests.helpers.fake_backend import FakeBackend, FakeClock, make_requests
from tests.helpers.virtual_time import VirtualTime
from workbench.baselines.intake import Intake, RequestLimits
from workbench.bench.load import (
    Closed,
    Constant,
    Gamma,
    LoadGenerator,
    Offline,
    OpenLoad,
    Poisson,
    TraceReplay,
)
from workbench.bench.load.arrivals import gamma_arrivals, gamma_gaps
from workbench.bench.metrics import RoundSample, collect, load_metrics
from workbench.cli.variants import check_load
from workbench.configuration import compose_config, options_of
from workbench.core.backend import TokenEvent
from workbench.core.workload import WorkloadRequest
from workbench.engine.backend import EngineBackend


def serve(load: LoadGenerator, backend: FakeBackend, clock: FakeClock) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    watched = load.watch(events.append)
    load.start(clock())
    backend.run(load, watched)
    return events


def sample_of(load: LoadGenerator, events: Sequence[TokenEvent]) -> RoundSample:
    assert load.start_s is not None
    return collect(events, load.requests, load.release_s, load.taken_s, load.start_s)[0]


def test_offline_releases_all_at_the_start() -> None:
    clock = FakeClock(5.0)
    requests = make_requests(4)
    load = Offline(requests)
    load.start(clock())
    assert load.next_due_s() == 5.0 and not load.exhausted
    assert load.poll(9.0, 0) == requests
    assert load.exhausted and load.next_due_s() is None
    assert load.poll(9.5, 4) == []
    assert set(load.release_s.values()) == {5.0} and set(load.taken_s.values()) == {9.0}


@pytest.mark.parametrize("concurrency", [1, 2, 3, 7])
def test_closed_never_holds_more_than_its_clients(concurrency: int) -> None:
    clock = FakeClock()
    backend = FakeBackend(clock)
    load = Closed(make_requests(7, max_tokens=3), concurrency)
    serve(load, backend, clock)
    assert load.exhausted
    assert max(backend.batches) == concurrency
    assert backend.runs[0] == [f"r{i}" for i in range(7)]


def test_closed_releases_when_the_place_became_free_not_when_polled() -> None:
    load = Closed(make_requests(3), concurrency=2)
    watched = load.watch(lambda event: None)
    load.start(10.0)
    assert [r.request_id for r in load.poll(10.5, 0)] == ["r0", "r1"]
    assert load.poll(11.0, 0) == [], "its own count, not the backend's, decides"
    assert load.next_due_s() is None
    watched(TokenEvent("r0", 12.0, (1,), finished=True))
    assert load.next_due_s() == 12.0
    assert [r.request_id for r in load.poll(20.0, 1)] == ["r2"]
    assert load.release_s == {"r0": 10.0, "r1": 10.0, "r2": 12.0}
    assert load.taken_s["r2"] == 20.0


def test_closed_goes_on_after_a_refused_request_and_counts_it_once() -> None:
    load = Closed(make_requests(3), concurrency=1)
    watched = load.watch(lambda event: None)
    load.start(0.0)
    load.poll(0.0, 0)
    watched(TokenEvent("r0", 1.0, (), error="no"))
    watched(TokenEvent("r0", 1.0, (), finished=True))
    assert len(load.poll(1.0, 0)) == 1
    assert load.poll(1.0, 0) == []


def test_closed_without_watching_trusts_the_backend() -> None:
    load = Closed(make_requests(3), concurrency=2)
    assert len(load.poll(1.0, 0)) == 2
    assert load.poll(2.0, 2) == []
    assert len(load.poll(3.0, 1)) == 1


# -- arrival processes --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rate", [0.1, 40.0])
@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_their_mean_and_variation(
    burstiness: float, rate: float, seed: int
) -> None:
    """Within five standard errors; those of the variation by the delta method."""
    num = 20_000
    gaps = np.asarray(gamma_gaps(num, rate, burstiness, seed))
    cv = 1 / math.sqrt(burstiness)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / rate, rel=5 * cv / math.sqrt(num))
    excess_kurtosis = 6 / burstiness
    error = math.sqrt(((excess_kurtosis + 2) / 4 + cv**2) / num)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=5 * error)
    # Renewal processes: one gap says nothing of the next.
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 5 / math.sqrt(num)


@given(
    num=st.integers(1, 60),
    rate=st.floats(1e-3, 1e4),
    burstiness=st.floats(0.05, 50),
    seed=st.integers(0, 2**32),
)
def test_gamma_arrivals_are_sorted_end_where_the_rate_says_and_repeat(
    num: int, rate: float, burstiness: float, seed: int
) -> None:
    times = gamma_arrivals(num, rate, burstiness, seed)
    assert len(times) == num and times[0] >= 0 and times == sorted(times)
    raw = gamma_arrivals(num, rate, burstiness, seed, rescale=False)
    if raw[-1] > 0:
        assert times[-1] == pytest.approx(num / rate)
        assert np.asarray(times) == pytest.approx(np.asarray(raw) * (times[-1] / raw[-1]))
    assert gamma_arrivals(num, rate, burstiness, seed) == times


def test_a_poisson_load_is_a_gamma_load_of_shape_one() -> None:
    requests = make_requests(50)
    assert Poisson(requests, 2.0, seed=3).arrivals_s == Gamma(requests, 2.0, 1.0, 3).arrivals_s
    assert Poisson(requests, 2.0, seed=3).arrivals_s != Poisson(requests, 2.0, seed=4).arrivals_s
    assert Poisson(requests, 2.0).target_request_s == pytest.approx(2.0)
    free = Poisson(requests, 2.0, rescale=False)
    assert free.target_request_s != pytest.approx(2.0)
    assert free.arrivals_s == tuple(gamma_arrivals(50, 2.0, 1.0, 0, rescale=False))


def recorded(*times_s: float) -> list[WorkloadRequest]:
    requests = make_requests(len(times_s))
    return [replace(r, arrival_s=t) for r, t in zip(requests, times_s, strict=True)]


def test_replay_counts_from_the_first_and_scales() -> None:
    requests = recorded(30.0, 31.0, 31.0, 34.0)
    assert TraceReplay(requests).arrivals_s == (0.0, 1.0, 1.0, 4.0)
    assert TraceReplay(requests).target_request_s == pytest.approx(4 / 4.0)
    assert TraceReplay(requests, time_scale=0.5).arrivals_s == (0.0, 0.5, 0.5, 2.0)
    to_rate = TraceReplay(requests, rate=8.0)
    assert to_rate.arrivals_s == (0.0, 0.125, 0.125, 0.5)
    assert to_rate.target_request_s == pytest.approx(8.0)
    assert TraceReplay(recorded(0.0)).arrivals_s == (0.0,)


@pytest.mark.parametrize(
    ("times_s", "match"),
    [
        ((0.0, 2.0, 1.0), r"request 2 .*arrives at 1 s, before the one ahead of it \(2 s\)"),
        ((-1.0, 2.0), "request 0 of the workload arrives at -1 s; valid: a finite time"),
        ((0.0, math.nan), "arrives at nan s; valid"),
        ((0.0, math.inf), "arrives at inf s; valid"),
        ((0.0, 0.0), "nothing to replay. Use a recorded workload .*poisson"),
    ],
)
def test_bad_traces_are_refused(times_s: tuple[float, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TraceReplay(recorded(*times_s))


def test_a_trace_without_a_span_has_no_rate_to_scale() -> None:
    with pytest.raises(ValueError, match=r"all requests .* arrive at 3 s.*load=poisson"):
        TraceReplay(recorded(3.0, 3.0), rate=1.0)
    assert TraceReplay(recorded(3.0, 3.0)).target_request_s is None


BAD_NUMBERS = [0, -1.0, math.nan, "2", True, None]


@pytest.mark.parametrize("value", BAD_NUMBERS)
@pytest.mark.parametrize(
    ("load", "setting"),
    [
        (Poisson, "rate"),
        (Gamma, "rate"),
        (Gamma, "burstiness"),
        (Constant, "rate"),
        (TraceReplay, "time_scale"),
    ],
)
def test_bad_rates_shapes_and_scales(load: Any, setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"load.{setting} is .*; valid: a finite number above 0"):
        load(recorded(0.0, 1.0), **{setting: value})


def test_other_bad_settings_of_open_loads() -> None:
    requests = recorded(0.0, 1.0)
    with pytest.raises(ValueError, match="use load=offline"):
        Poisson(requests, math.inf)
    with pytest.raises(ValueError, match=r"load\.rate is -1"):
        TraceReplay(requests, rate=-1)
    with pytest.raises(ValueError, match="both scale the trace"):
        TraceReplay(requests, 0.5, rate=1.0)
    with pytest.raises(ValueError, match=r"load.seed is -1; valid: a whole number"):
        Poisson(requests, seed=-1)
    with pytest.raises(ValueError, match=r"load\.rescale is 'no'; valid: true, false"):
        Gamma(requests, rescale="no")  # type: ignore[arg-type]


def test_bad_loads_are_refused() -> None:
    for concurrency in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="at least 1"):
            Closed(make_requests(1), concurrency)  # type: ignore[arg-type]
    for load in (Offline, Closed, Poisson, Constant, TraceReplay):
        with pytest.raises(ValueError, match="no requests"):
            load([])
    with pytest.raises(ValueError, match="unique"):
        Offline(make_requests(1) * 2)
    first, second = make_requests(2)
    for after in ("r1", "r9", "r0"):
        with pytest.raises(ValueError, match=f"is sent after '{after}', which is no request"):
            Offline([replace(first, after=after), second])


# -- open loads under a backend ------------------------------------------------------------------


def test_open_arrivals_come_at_their_times_whatever_the_backend_does() -> None:
    clock = FakeClock(50.0)
    load = OpenLoad(make_requests(4, 2), [0.0, 0.5, 1.0, 1.5])
    serve(load, FakeBackend(clock, step_s=0.2), clock)
    assert list(load.release_s.values()) == pytest.approx([50.0, 50.5, 51.0, 51.5])
    assert list(load.taken_s.values()) == pytest.approx([50.0, 50.5, 51.0, 51.5]), "it was idle"


def test_latency_counts_from_the_intended_time_of_a_late_send() -> None:
    """A stall of the backend is a wait of every request that was due in it, not of one alone."""
    clock = FakeClock(0.0)
    rate, step_s, stall_s, stalled_step = 20.0, 0.01, 1.02, 10

    def stall(backend: FakeBackend, step: int) -> None:
        if step == stalled_step:
            clock.now_s += stall_s

    load = Constant(make_requests(40, max_tokens=1), rate)
    sample = sample_of(load, serve(load, FakeBackend(clock, step_s=step_s, on_step=stall), clock))
    assert [r.release_s for r in sample.requests] == pytest.approx(load.arrivals_s)
    victim = sample.requests[stalled_step - 1]
    end_s = victim.release_s + stall_s + step_s
    assert victim.ttft_s == pytest.approx(stall_s + step_s)
    waiting = [r for r in sample.requests if victim.release_s < r.release_s < end_s]
    assert len(waiting) == int(stall_s * rate)
    for request in waiting:
        assert request.ttft_s == pytest.approx(end_s + step_s - request.release_s)
    rest = [r for r in sample.requests if r is not victim and r not in waiting]
    assert [r.ttft_s for r in rest] == pytest.approx([step_s] * len(rest))
    found = load_metrics(sample)
    assert found["num_late_sends"] == len(waiting), "the victim itself was taken in time"
    assert found["max_taken_late_s"] == pytest.approx(end_s - waiting[0].release_s)
    assert found["sent_request_s"] == pytest.approx(rate)


def test_next_due_tells_an_idle_backend_how_long_to_sleep() -> None:
    load = OpenLoad(make_requests(2), [1.0, 3.0])
    assert load.next_due_s() is None, "the clock has not started"
    assert load.poll(100.0, 0) == []
    assert load.next_due_s() == 101.0
    assert [r.request_id for r in load.poll(101.0, 0)] == ["r0"]
    assert load.next_due_s() == 103.0 and not load.exhausted
    assert [r.request_id for r in load.poll(110.0, 1)] == ["r1"]
    assert load.exhausted and load.next_due_s() is None


# -- requests that follow one another ------------------------------------------------------------


def chains(lengths: Sequence[int], interleave: bool = False) -> list[WorkloadRequest]:
    """Conversations ``c0``, ``c1``, ... of so many turns."""
    found = []
    for number, length in enumerate(lengths):
        for turn in range(length):
            after = f"c{number}t{turn - 1}" if turn else None
            request = WorkloadRequest(f"c{number}t{turn}", (1, 2, 3), 3 + number, after=after)
            found.append((turn, number, request))
    if interleave:
        found.sort(key=lambda item: item[:2])
    return [request for _, _, request in found]


def test_offline_sends_a_turn_when_the_one_before_it_has_ended() -> None:
    clock = FakeClock(0.0)
    load = Offline(chains([3, 2]))
    backend = FakeBackend(clock, step_s=1.0)
    events = serve(load, backend, clock)
    ends = {e.request_id: e.time_s for e in events if e.finished}
    assert load.concurrency == 2
    assert load.release_s["c0t0"] == load.release_s["c1t0"] == 0.0
    for request in load.requests:
        if request.after is not None:
            assert load.release_s[request.request_id] == ends[request.after]
    assert max(backend.batches) == 2


def test_a_client_keeps_to_its_conversation_unless_they_are_interleaved() -> None:
    def order(requests: list[WorkloadRequest]) -> list[str]:
        clock = FakeClock(0.0)
        backend = FakeBackend(clock)
        serve(Closed(requests, 1), backend, clock)
        return backend.runs[0]

    assert order(chains([2, 2])) == ["c0t0", "c0t1", "c1t0", "c1t1"]
    assert order(chains([2, 2], interleave=True)) == ["c0t0", "c1t0", "c0t1", "c1t1"]


def test_an_open_load_sends_a_turn_at_its_time_or_after_the_last_one() -> None:
    clock = FakeClock(0.0)
    load = OpenLoad(chains([3]), [0.0, 1.0, 10.0])
    serve(load, FakeBackend(clock, step_s=1.0), clock)
    assert load.release_s == {"c0t0": 0.0, "c0t1": 3.0, "c0t2": 10.0}


def test_a_refused_request_lets_its_followers_go() -> None:
    clock = FakeClock(0.0)
    backend = FakeBackend(clock, refuse=frozenset({"c0t0"}))
    load = Closed(chains([2]), 1)
    serve(load, backend, clock)
    assert backend.runs[0] == ["c0t0", "c0t1"]


def test_a_load_that_nobody_watches_sends_followers_by_the_schedule_alone() -> None:
    load = Offline(chains([2, 1]))
    assert len(load.poll(0.0, 0)) == 3 and load.exhausted


def make_load(
    kind: str, requests: list[WorkloadRequest], concurrency: int, seed: int
) -> LoadGenerator:
    if kind == "trace":
        requests = [replace(r, arrival_s=0.07 * i * i) for i, r in enumerate(requests)]
    loads: dict[str, Callable[[], LoadGenerator]] = {
        "closed": lambda: Closed(requests, concurrency),
        "offline": lambda: Offline(requests),
        "poisson": lambda: Poisson(requests, 5.0, seed),
        "gamma": lambda: Gamma(requests, 5.0, 0.3, seed),
        "constant": lambda: Constant(requests, 5.0),
        "trace": lambda: TraceReplay(requests),
    }
    assert set(loads) == set(options_of("load"))
    return loads[kind]()


@pytest.mark.parametrize("kind", options_of("load"))
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_request_is_sent_exactly_once_and_never_before_its_time(
    kind: str, data: st.DataObject
) -> None:
    num = data.draw(st.integers(1, 25))
    requests = make_requests(num, max_tokens=data.draw(st.integers(1, 6)))
    for index in range(1, num):
        if data.draw(st.booleans()):
            after = requests[data.draw(st.integers(0, index - 1))].request_id
            requests[index] = replace(requests[index], after=after)
    concurrency = data.draw(st.integers(1, 5))
    load = make_load(kind, requests, concurrency, data.draw(st.integers(0, 99)))
    clock = FakeClock(7.0)
    backend = FakeBackend(
        clock,
        step_s=data.draw(st.sampled_from([0.001, 0.05, 0.7])),
        max_num_seqs=data.draw(st.integers(1, 4)),
        tokens_per_step=data.draw(st.integers(1, 3)),
    )
    events = serve(load, backend, clock)
    assert Counter(backend.runs[0]) == Counter(r.request_id for r in requests)
    assert load.exhausted
    ends = {e.request_id: e.time_s for e in events if e.finished}
    for index, request in enumerate(load.requests):
        released, taken = load.release_s[request.request_id], load.taken_s[request.request_id]
        assert 7.0 <= released <= taken
        if request.after is not None:
            assert released >= ends[request.after]
        if isinstance(load, OpenLoad):
            due = 7.0 + load.arrivals_s[index]
            expected = due if request.after is None else max(due, ends[request.after])
            assert released == expected
    sample = sample_of(load, events)
    found = load_metrics(sample)
    assert found["max_in_flight"] <= load.concurrency
    # Little's law: the time average of what is in flight is arrivals a second times time in flight.
    assert found["achieved_request_s"] is not None and found["mean_in_flight"] is not None
    mean_s = np.mean([r.e2el_s for r in sample.requests])
    assert found["mean_in_flight"] == pytest.approx(found["achieved_request_s"] * mean_s)


def test_variants_and_rounds_meet_the_same_arrivals() -> None:
    requests = make_requests(20)
    factory = partial(Gamma, rate=3.0, burstiness=0.5, seed=9)
    slow, fast = FakeClock(0.0), FakeClock(1000.0)
    loads = [factory(requests), factory(requests)]
    serve(loads[0], FakeBackend(slow, step_s=0.5), slow)
    serve(loads[1], FakeBackend(fast, step_s=0.01), fast)
    released = [np.asarray(list(load.release_s.values())) - load.start_s for load in loads]
    assert released[0] == pytest.approx(released[1])


# -- real backends in virtual time ---------------------------------------------------------------


def test_the_engine_serves_an_open_load(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = VirtualTime()
    monkeypatch.setattr("workbench.engine.backend.time", clock)
    engine = shared_engine(max_num_seqs=2)
    requests = [WorkloadRequest(f"r{i}", (5 + i, 6, 7), max_tokens=3) for i in range(5)]
    load = Poisson(requests, rate=4.0, seed=1)
    events: list[TokenEvent] = []
    EngineBackend("engine", engine, engine.parts.info).run(load, load.watch(events.append))
    check_idle(engine)
    sample = sample_of(load, events)
    assert [r.num_output_tokens for r in sample.requests] == [3] * 5
    assert [r.release_s for r in sample.requests] == pytest.approx(load.arrivals_s)
    assert clock.slept_s and sum(clock.slept_s) < load.arrivals_s[-1]
    # It slept to the very moment, so what came to an idle engine was taken at once.
    assert min(r.taken_s - r.release_s for r in sample.requests) < 3 * clock.tick_s


def test_the_intake_of_the_baselines_sleeps_until_the_next_arrival(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = VirtualTime()
    monkeypatch.setattr("workbench.baselines.intake.time", clock)
    load = Constant(make_requests(4), rate=2.0)
    events: list[TokenEvent] = []
    intake = Intake(load, load.watch(events.append), RequestLimits(1000, 100))
    served = []
    while taken := intake.wait():
        for request in taken:
            served.append(request.request_id)
            intake.tell(request.request_id, (1,), time_s=clock.perf_counter(), finished=True)
    assert served == [f"r{i}" for i in range(4)] and intake.is_done
    assert all(r.ttft_s < 10 * clock.tick_s for r in sample_of(load, events).requests)
    assert clock.now_s == pytest.approx(1000 + load.arrivals_s[-1], abs=0.1)


# -- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", options_of("load"))
def test_config_makes_a_factory(name: str) -> None:
    cfg = compose_config([f"load={name}", "seed=17"]).cfg
    check_load(cfg)
    factory = instantiate(cfg.load)
    assert isinstance(factory, partial)
    load = factory(recorded(0.0, 1.0, 2.0))
    told = load.describe()
    assert told["name"] == name and told["num_requests"] == 3
    options = {k: v for k, v in cfg.load.items() if not str(k).startswith("_")}
    assert {k: told[k] for k in options} == options, "the record says every setting"
    assert told.get("target_request_s") == load.target_request_s
    assert told.get("seed", 17) == 17, "the run's seed draws the arrivals"
    assert isinstance(load.for_warmup(make_requests(2)), Closed | Offline)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["load=poisson", "load.rate=0"], "load.rate is 0; valid: a finite number above 0"),
        (["load=poisson", "load.rate=inf"], "load=offline"),
        (["load=gamma", "load.burstiness=-1"], "load.burstiness is -1"),
        (["load=trace", "load.time_scale=0"], "load.time_scale is 0"),
        (["load=constant", "load.rate=fast"], "load.rate is 'fast'"),
        (["load.concurrency=0"], "at least 1"),
        (["load=poison"], "unknown option of group load 'poison'.*'poisson'.*offline"),
        (["load=poisson", "load.speed=1"], "unknown key of load 'speed'.*rate"),
    ],
)
def test_wrong_loads_are_told_before_a_model_is_fetched(overrides: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_load(compose_config(overrides).cfg)
