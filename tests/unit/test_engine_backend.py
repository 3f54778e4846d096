"""The engine behind the bench's protocol: every token told once, errors as events, nothing left."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.helpers.engines import (
    check_idle,
    mixed_prompts,
    shared_engine,
    tiny_engine,
    together,
    with_requirements,
)
from tests.helpers.tiny_models import hf_greedy, tiny_model
from workbench.bench.assess import is_timing
from workbench.bench.load import Closed, LoadGenerator, Offline
from workbench.configuration import load_markers
from workbench.core.backend import TokenEvent
from workbench.core.workload import WorkloadRequest
from workbench.engine.backend import EngineBackend

PROMPTS = mixed_prompts(7, seed=5)
CACHES = [name for name, marker in load_markers().items() if "prefix_cache" in marker.slots]


@pytest.fixture(params=["core", "all techniques"])
def backend(request: pytest.FixtureRequest) -> Iterator[EngineBackend]:
    # How many drafts pay is a matter of time: two runs may be cut into other steps. Without what
    # switches drafts off, no step is planned ahead.
    names = [name for name in together() if name not in ("adaptive_drafts", "overlap")]
    names = [] if request.param == "core" else names
    engine = shared_engine(techniques=names, max_num_seqs=3)
    yield EngineBackend("engine", engine, engine.parts.info)
    check_idle(engine)


def requests() -> list[WorkloadRequest]:
    return [WorkloadRequest(f"r{i}", tuple(p), max_tokens=3 + 2 * i) for i, p in enumerate(PROMPTS)]


def serve(backend: EngineBackend, load: LoadGenerator) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    backend.run(load, load.watch(events.append))
    return events


@pytest.mark.parametrize("concurrency", [None, 1, 2, 50])
def test_every_token_is_told_once_and_in_time(
    backend: EngineBackend, concurrency: int | None
) -> None:
    asked = requests()
    load = Offline(asked) if concurrency is None else Closed(asked, concurrency)
    before = time.perf_counter()
    events = serve(backend, load)
    times = [event.time_s for event in events]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= time.perf_counter()
    for request in asked:
        mine = [e for e in events if e.request_id == request.request_id]
        tokens = [t for e in mine for t in e.token_ids]
        expected = hf_greedy(tiny_model("llama"), request.prompt_token_ids, request.max_tokens)
        assert tokens == expected
        assert [e.finished for e in mine] == [False] * (len(mine) - 1) + [True]
    counters = backend.counters()
    assert counters["step.num_output_tokens"] == sum(r.max_tokens for r in asked)
    assert counters["host_us_per_step"] > 0
    assert counters["bytes_moved"] > 0


def test_runs_are_independent_and_counters_start_anew(backend: EngineBackend) -> None:
    first = [(e.request_id, e.token_ids) for e in serve(backend, Offline(requests()))]
    kept = {k: v for k, v in backend.counters().items() if not is_timing(k)}
    second = [(e.request_id, e.token_ids) for e in serve(backend, Offline(requests()))]
    assert first == second
    again = backend.counters()
    assert {k: again[k] for k in kept} == kept, "counts of the same work differ"


def test_requests_that_cannot_be_served_are_told_and_the_others_go_on(
    backend: EngineBackend,
) -> None:
    asked = requests()
    asked[1:1] = [WorkloadRequest("long", (5,) * 500, 4), WorkloadRequest("bad", (99999,), 4)]
    for load in (Offline(asked), Closed(asked, 1)):
        events = serve(backend, load)
        errors = {e.request_id: e.error for e in events if e.error is not None}
        assert set(errors) == {"long", "bad"}
        assert "context" in str(errors["long"])
        assert "vocabulary" in str(errors["bad"])
        done = {e.request_id for e in events if e.finished}
        assert done == {r.request_id for r in asked}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_the_middle_leaves_no_request_behind(
    backend: EngineBackend, error: type[BaseException]
) -> None:
    for after in (1, 5, 20):
        seen = 0

        def explode(event: TokenEvent, after: int = after) -> None:
            nonlocal seen
            seen += 1
            if seen == after:
                raise error("injected")

        with pytest.raises(error, match="injected"):
            backend.run(Offline(requests()), explode)
        check_idle(backend.engine)
    test_runs_are_independent_and_counters_start_anew(backend)


def test_ledger_is_within_its_pool(backend: EngineBackend) -> None:
    serve(backend, Offline(requests()))
    ledger = backend.memory()
    assert ledger is not None
    total = backend.engine.parts.info["kv_pool_tokens"]
    assert 0 < ledger.kv_used_tokens <= ledger.kv_allocated_tokens <= total
    assert ledger.kv_mean_waste is not None
    assert 0 <= ledger.kv_mean_waste < 1
    assert all(value >= 0 for value in ledger.predicted.values())
    info = backend.info()
    assert info.device == "cpu"
    assert info.dtype == "float32"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("keeps_cache", [False, True])
def test_a_run_starts_with_a_cold_cache_unless_told_to_keep_it(
    keeps_cache: bool, cache: str, chunked: bool
) -> None:
    overrides = ["engine.kv_cache.block_size=4"]
    overrides += ["engine.prefill.chunk_tokens=6"] if chunked else []
    names = with_requirements([cache, *(["chunked_prefill"] if chunked else [])])
    cached = tiny_engine(*overrides, techniques=names)
    backend = EngineBackend("cached", cached, cached.parts.info, keeps_cache=keeps_cache)
    prompt = tuple(range(10, 31))
    for run in range(2):
        events = serve(backend, Offline([WorkloadRequest("r", prompt, 9)]))
        hit = backend.counters()["step.num_cached_tokens"]
        assert hit == (20 if run and keeps_cache else 0)
        tokens = [token for event in events for token in event.token_ids]
        assert tokens == hf_greedy(tiny_model("llama"), prompt, 9)
        cached.check_integrity()
