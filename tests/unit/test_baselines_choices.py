"""How the Hugging Face baselines choose: batch size, cache and cache size; and a dead library."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.baselines import (
    CONTEXT,
    SHAPES,
    check_events,
    make_requests,
    one_thread,
    oracle,
    plain_model,
    run,
    save_tiny_llama,
)
from workbench.baselines.hf_best import HfStaticBatchBest, estimate_output_tok_s
from workbench.baselines.hf_continuous import HfContinuousBatching, kv_bytes_per_token

_one_thread = pytest.fixture(one_thread, autouse=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


def test_estimate_adds_prefill_and_steps_of_each_batch() -> None:
    requests = make_requests([(10, 5), (20, 3), (4, 2)])
    # Batches of two: 2 x 20 and 1 x 4 prompt tokens, 4 and 1 further steps.
    seconds = (2 * 20 + 4) / 100.0 + (4 + 1) * 0.5
    assert math.isclose(estimate_output_tok_s(requests, 2, 100.0, 0.5), (5 + 3 + 2) / seconds)


def test_best_calibrates_once_before_the_run(folder: Path) -> None:
    requests = make_requests(SHAPES)
    backend = HfStaticBatchBest(folder, batch_sizes=(1, 2, 4, 64), calibration_budget_s=5.0)
    try:
        assert not backend.info().details["is_calibrated"]
        backend.prepare(requests, max_concurrency=3)
        details = backend.info().details
        trials = details["trials"]
        assert {t["batch_size"] for t in trials} <= {1, 2}, "a size over the concurrency was tried"
        assert {t["cache_implementation"] for t in trials} == {"dynamic", "static"}
        best = max(trials, key=lambda t: t["output_tok_s"])
        assert details["batch_size"] == best["batch_size"]
        assert details["cache_implementation"] == best["cache_implementation"]
        tokens, _ = run(backend, requests, concurrency=3)
        assert tokens == oracle(folder, requests)
        assert backend.info().details["trials"] == trials, "it calibrated again in the run"
        assert backend.counters()["output_tokens"] == sum(r.max_tokens for r in requests)
    finally:
        backend.close()


def test_best_built_again_keeps_its_choice(folder: Path) -> None:
    requests = make_requests([(7, 3), (9, 4), (2, 6)])

    def details(ladder: tuple[int, ...]) -> dict[str, Any]:
        backend = HfStaticBatchBest(folder, batch_sizes=ladder)
        try:
            backend.prepare(requests)
            return backend.info().details
        finally:
            backend.close()

    assert details((1, 2)) == details((1, 2))
    assert details((1, 3))["trials"] != details((1, 2))["trials"]


def test_best_calibrates_on_what_arrives_without_prepare(folder: Path) -> None:
    backend = HfStaticBatchBest(folder, batch_sizes=(1, 2), calibration_budget_s=5.0)
    try:
        requests = make_requests([(CONTEXT - 2, 2), (3, 4)])
        assert run(backend, requests, concurrency=1)[0] == oracle(folder, requests)
        assert {t["batch_size"] for t in backend.info().details["trials"]} == {1, 2}
    finally:
        backend.close()


def test_best_stops_at_its_budget(folder: Path) -> None:
    backend = HfStaticBatchBest(folder, batch_sizes=(1, 2, 4), calibration_budget_s=1e-6)
    try:
        backend.prepare(make_requests(SHAPES))
        details = backend.info().details
        assert len(details["trials"]) == 1
        assert details["calibration_prompt_tokens"] == 1
    finally:
        backend.close()


def test_continuous_cache_is_sized_from_the_workload(folder: Path) -> None:
    page = 16
    requests = make_requests([(page, 1), (3 * page, page), (2 * page, page)])
    blocks = [math.ceil((len(r.prompt_token_ids) + r.max_tokens) / page) for r in requests]
    backend = HfContinuousBatching(folder, page_size=page)
    try:
        backend.prepare(requests, max_concurrency=2)
        assert run(backend, requests, concurrency=2)[0] == oracle(folder, requests)
        two_largest = sum(sorted(blocks)[-2:])
        num_blocks = backend.info().details["num_blocks"]
        assert two_largest <= num_blocks <= 2 * two_largest
        ledger = backend.memory()
        assert ledger is not None
        assert ledger.kv_allocated_tokens == num_blocks * page
        together = [len(r.prompt_token_ids) + r.max_tokens - 1 for r in requests]
        assert max(together) <= ledger.kv_used_tokens <= sum(together)
    finally:
        backend.close()


def test_continuous_grows_its_cache_for_a_larger_request(folder: Path) -> None:
    backend = HfContinuousBatching(folder, page_size=16, max_requests_per_batch=2)
    try:
        requests = make_requests([(4, 3), (5, 2), (100, 20), (6, 4)])
        tokens, events = run(backend, requests, concurrency=2)
        assert tokens == oracle(folder, requests)
        check_events(requests, events)
        needed = math.ceil((100 + 20) / 16)
        assert backend.info().details["num_blocks"] >= needed
    finally:
        backend.close()


def test_continuous_with_a_cache_too_small_fails_that_request_alone(folder: Path) -> None:
    backend = HfContinuousBatching(folder, page_size=16, num_blocks=2)
    try:
        requests = make_requests([(6, 4), (40, 4), (5, 3)])
        tokens, events = run(backend, requests)
        (failed,) = [event for event in events if event.error is not None]
        assert failed.request_id == "r1"
        assert "needs 3 blocks" in (failed.error or "")
        small = [requests[0], requests[2]]
        assert {k: v for k, v in tokens.items() if v} == oracle(folder, small)
    finally:
        backend.close()


def test_continuous_starts_each_run_with_an_empty_prefix_cache(folder: Path) -> None:
    page = 16
    requests = make_requests([(5 * page, 2)])
    backend = HfContinuousBatching(folder, page_size=page, max_batch_tokens=page)
    try:
        steps = []
        for _ in range(2):
            run(backend, requests)
            steps.append(backend.counters()["steps"])
        # The prompt goes in a page a step; a cached prefix would spare steps.
        assert steps[0] == steps[1] >= 5 + 1
    finally:
        backend.close()


def test_continuous_reports_a_library_that_dies(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = HfContinuousBatching(folder, page_size=16)
    requests = make_requests([(6, 4), (5, 3)])
    calls = []

    def explode(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        raise RuntimeError("the model exploded")

    try:
        with monkeypatch.context() as patch:
            patch.setattr(backend.shared.model, "forward", explode)
            tokens, events = run(backend, requests)
        assert calls
        assert not any(tokens.values())
        assert {e.request_id for e in events} == {"r0", "r1"}
        assert all(e.error is not None and "transformers" in e.error for e in events)
        assert run(backend, requests)[0] == oracle(folder, requests)
    finally:
        backend.close()


def test_kv_bytes_per_token_matches_a_real_cache(folder: Path) -> None:
    model = plain_model(folder)
    with torch.no_grad():
        cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes_per_token(model) == held // 3
