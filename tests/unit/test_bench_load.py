"""Load generators: when requests are released, and what the book says of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.helpers.fake_backend import FakeBackend, FakeClock, make_requests
from workbench.bench.load import Closed, LoadGenerator, Offline
from workbench.core.backend import TokenEvent

CONF = Path(__file__).parents[2] / "conf" / "load"


def serve(load: LoadGenerator, backend: FakeBackend, clock: FakeClock) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    watched = load.watch(events.append)
    load.start(clock())
    backend.run(load, watched)
    return events


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


class Open(LoadGenerator):
    """Arrivals by the clock: what the base class must leave room for."""

    name = "open"

    def _next_due_s(self, now_s: float, num_in_flight: int) -> float | None:
        assert self.start_s is not None
        return self.start_s + self._queue[0].arrival_s if self._queue else None


def test_open_arrivals_fit_the_base_class() -> None:
    from dataclasses import replace

    clock = FakeClock(50.0)
    requests = [replace(r, arrival_s=0.5 * i) for i, r in enumerate(make_requests(4, 2))]
    load = Open(requests)
    serve(load, FakeBackend(clock, step_s=0.2), clock)
    assert list(load.release_s.values()) == pytest.approx([50.0, 50.5, 51.0, 51.5])
    assert all(load.taken_s[k] >= load.release_s[k] for k in load.release_s)


def test_bad_loads_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Closed(make_requests(1), 0)
    with pytest.raises(ValueError, match="no requests"):
        Offline([])
    with pytest.raises(ValueError, match="unique"):
        Offline(make_requests(1) * 2)


@pytest.mark.parametrize("name", ["offline", "closed"])
def test_config_makes_a_factory(name: str) -> None:
    factory = instantiate(OmegaConf.load(CONF / f"{name}.yaml"))
    assert isinstance(factory, partial)
    load = factory(make_requests(3))
    assert load.describe()["name"] == name and load.describe()["num_requests"] == 3
