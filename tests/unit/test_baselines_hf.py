"""The Hugging Face baselines: tokens, events, counters and errors, on a tiny random Llama."""

from __future__ import annotations

import gc
import shutil
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import GenerationConfig

from tests.helpers.baselines import (
    CONFIGS,
    CONTEXT,
    SHAPES,
    VOCAB_SIZE,
    Source,
    check_events,
    make_requests,
    one_thread,
    oracle,
    run,
    save_tiny_llama,
)
from workbench.baselines import intake
from workbench.baselines.hf_best import HfStaticBatchBest
from workbench.baselines.hf_continuous import HfContinuousBatching
from workbench.baselines.hf_generate import HfNaive, HfStaticBatch
from workbench.core.backend import TokenEvent
from workbench.core.errors import ConfigError
from workbench.core.workload import WorkloadRequest

_one_thread = pytest.fixture(one_thread, autouse=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


RUNGS: dict[str, Any] = {
    "naive": (HfNaive, {}),
    "static": (HfStaticBatch, {"batch_size": 3}),
    "static_cache": (HfStaticBatch, {"batch_size": 3, "cache_implementation": "static"}),
    "best": (HfStaticBatchBest, {"batch_sizes": (1, 2, 4), "calibration_budget_s": 5.0}),
    "continuous": (HfContinuousBatching, {"page_size": 16, "max_batch_tokens": 32}),
}


@pytest.fixture(params=RUNGS, scope="module")
def backend(request: pytest.FixtureRequest, folder: Path) -> Any:
    kind, options = RUNGS[request.param]
    backend = kind(folder, **options)
    yield backend
    backend.close()


@pytest.mark.parametrize("concurrency", [None, 3, 1])
def test_every_rung_gives_the_greedy_tokens(
    backend: Any, folder: Path, concurrency: int | None
) -> None:
    requests = make_requests(SHAPES)
    expected = oracle(folder, requests)
    for _ in range(2):
        start = time.perf_counter()
        source = Source(requests, concurrency)
        events: list[TokenEvent] = []
        backend.run(source, events.append)
        end = time.perf_counter()
        tokens: dict[str, list[int]] = {}
        for event in events:
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
        assert tokens == expected
        check_events(requests, events)
        assert all(start < event.time_s < end for event in events)
        assert source.most_in_flight == (concurrency or len(requests))
        counters = backend.counters()
        assert counters["output_tokens"] == sum(r.max_tokens for r in requests)
        assert counters["prompt_tokens"] == sum(len(r.prompt_token_ids) for r in requests)
        assert counters["steps"] >= max(r.max_tokens for r in requests)
        assert counters["failed_requests"] == 0


def test_requests_that_cannot_be_served_are_told_and_the_others_finish(
    backend: Any, folder: Path
) -> None:
    good = make_requests([(6, 4), (9, 2)])
    bad = {
        "empty": (WorkloadRequest("empty", (), 3), "prompt is empty"),
        "long": (WorkloadRequest("long", (1,) * CONTEXT, 1), f"context holds {CONTEXT}"),
        "high": (WorkloadRequest("high", (3, VOCAB_SIZE), 2), f"token id {VOCAB_SIZE}"),
        "negative": (WorkloadRequest("negative", (-1,), 2), "token id -1"),
        "none": (WorkloadRequest("none", (1,), 0), "max_tokens=0"),
    }
    requests = [bad["empty"][0], good[0], *(r for r, _ in list(bad.values())[1:]), good[1]]
    # One in flight: an error must make room at once, or the load would stall.
    tokens, events = run(backend, requests, concurrency=1)
    expected = oracle(folder, good)
    for name, (_, reason) in bad.items():
        (event,) = [e for e in events if e.request_id == name]
        assert event.finished
        assert not event.token_ids
        assert event.error is not None
        assert reason in event.error
    assert {name: ids for name, ids in tokens.items() if ids} == expected
    assert backend.counters()["failed_requests"] == len(bad)


def test_a_failed_request_makes_room_before_the_batch_starts(folder: Path) -> None:
    first, second = make_requests([(6, 4), (9, 4)])
    backend = HfStaticBatch(folder, batch_size=2)
    try:
        tokens, _ = run(backend, [first, WorkloadRequest("bad", (), 1), second], concurrency=2)
        assert {name: ids for name, ids in tokens.items() if ids} == oracle(folder, [first, second])
        assert backend.counters()["steps"] == max(first.max_tokens, second.max_tokens)
    finally:
        backend.close()


def test_a_request_that_fills_the_context_is_served(backend: Any, folder: Path) -> None:
    requests = make_requests([(CONTEXT - 3, 3)])
    tokens, _ = run(backend, requests)
    assert tokens == oracle(folder, requests)


@pytest.mark.parametrize("rung", RUNGS)
def test_end_of_sequence_is_honoured_unless_ignored(
    rung: str, folder: Path, tmp_path: Path
) -> None:
    shapes = [(4, 10), (7, 10), (3, 6)]
    free = oracle(folder, make_requests(shapes))
    eos = next(t for t in free["r0"] if t not in free["r0"][:1])
    other = shutil.copytree(folder, tmp_path / "eos")
    GenerationConfig(eos_token_id=[eos]).save_pretrained(other)

    def until_eos(ids: list[int]) -> list[int]:
        return ids[: ids.index(eos) + 1] if eos in ids else ids

    kind, options = RUNGS[rung]
    backend = kind(other, **options)
    try:
        tokens, _ = run(backend, make_requests(shapes, ignore_eos=False))
        assert tokens == {name: until_eos(ids) for name, ids in free.items()}
        assert len(tokens["r0"]) < len(free["r0"])
        tokens, _ = run(backend, make_requests(shapes))
        assert tokens == free
    finally:
        backend.close()


@pytest.mark.parametrize("rung", RUNGS)
def test_a_checkpoints_sampling_defaults_do_not_matter(
    rung: str, folder: Path, tmp_path: Path
) -> None:
    requests = make_requests([(6, 12), (3, 8)])
    expected = oracle(folder, requests)
    other = shutil.copytree(folder, tmp_path / "sampling")
    GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, min_new_tokens=1
    ).save_pretrained(other)
    kind, options = RUNGS[rung]
    backend = kind(other, **options)
    try:
        assert run(backend, requests)[0] == expected
    finally:
        backend.close()


def test_static_batch_counts_padding_waste_and_cache(folder: Path) -> None:
    requests = make_requests([(5, 7), (2, 3), (9, 4), (4, 6), (1, 1)])
    backend = HfStaticBatch(folder, batch_size=2)
    assert backend.memory() is None
    run(backend, requests)
    counters = backend.counters()
    ledger = backend.memory()
    backend.close()
    batches = [requests[0:2], requests[2:4], requests[4:5]]
    lengths = [[len(r.prompt_token_ids) for r in batch] for batch in batches]
    longest = [max(r.max_tokens for r in batch) for batch in batches]
    assert counters["steps"] == sum(longest)
    assert counters["padded_prompt_tokens"] == sum(len(n) * max(n) - sum(n) for n in lengths)
    assert counters["wasted_tokens"] == sum(
        most - r.max_tokens for batch, most in zip(batches, longest, strict=True) for r in batch
    )
    used = [
        sum(n) + sum(r.max_tokens - 1 for r in b) for n, b in zip(lengths, batches, strict=True)
    ]
    top = used.index(max(used))
    assert ledger is not None
    assert ledger.kv_used_tokens == used[top]
    assert ledger.kv_allocated_tokens == len(batches[top]) * (max(lengths[top]) + longest[top] - 1)


def test_naive_neither_pads_nor_wastes(folder: Path) -> None:
    requests = make_requests(SHAPES)
    backend = HfNaive(folder)
    run(backend, requests)
    counters = backend.counters()
    backend.close()
    assert counters["steps"] == counters["output_tokens"]
    assert counters["padded_prompt_tokens"] == counters["wasted_tokens"] == 0


def test_open_load_waits_for_arrivals(backend: Any, folder: Path) -> None:
    gap_s = 0.3
    requests = [
        WorkloadRequest(r.request_id, r.prompt_token_ids, r.max_tokens, arrival_s=index * gap_s)
        for index, r in enumerate(make_requests([(4, 2), (5, 3), (6, 2)]))
    ]
    source = Source(requests, is_open=True)
    events: list[TokenEvent] = []
    backend.run(source, events.append)
    assert source.start_s is not None
    for request in requests:
        first = next(event for event in events if event.request_id == request.request_id)
        assert first.time_s > source.start_s + request.arrival_s
    assert {e.request_id for e in events if e.finished} == {r.request_id for r in requests}


def test_a_failing_listener_ends_the_run_and_the_next_run_is_whole(
    backend: Any, folder: Path
) -> None:
    requests = make_requests(SHAPES)

    def fail(event: TokenEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backend.run(Source(requests), fail)
    assert run(backend, requests)[0] == oracle(folder, requests)


def test_a_source_that_never_goes_on_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_MAX_STALL_S", 0.05)

    class Stuck(Source):
        def poll(self, now_s: float, num_in_flight: int) -> list[WorkloadRequest]:
            return []

    backend = HfNaive(folder)
    try:
        with pytest.raises(RuntimeError, match="would never go on"):
            backend.run(Stuck(make_requests([(1, 1)])), lambda event: None)
    finally:
        backend.close()


def test_baselines_share_one_model_and_the_last_frees_it(folder: Path, tmp_path: Path) -> None:
    other_folder = shutil.copytree(folder, tmp_path / "shared")
    first, second = HfNaive(other_folder), HfContinuousBatching(other_folder, page_size=16)
    other = HfNaive(other_folder, dtype="bfloat16")
    assert first.shared is second.shared
    assert other.shared is not first.shared
    assert other.shared.model.dtype is torch.bfloat16
    model = weakref.ref(first.shared.model)
    first.close()
    first.close()
    requests = make_requests([(3, 2)])
    assert run(second, requests)[0] == oracle(folder, requests)
    second.close()
    other.close()
    gc.collect()
    assert model() is None
    with pytest.raises(RuntimeError, match="closed"):
        first.info()


def test_info_says_what_runs(backend: Any, folder: Path) -> None:
    run(backend, make_requests([(3, 2)]))
    info = backend.info()
    assert info.name == backend.name
    assert "transformers" in info.version
    assert torch.__version__ in info.version
    assert info.attention.removeprefix("paged|") == "sdpa"
    assert backend.shared.attention == "sdpa"
    assert (info.dtype, info.device) == ("float32", "cpu")
    assert info.details["weights"] == "checkpoint"


def test_eager_attention_beside_sdpa(folder: Path) -> None:
    requests = make_requests([(6, 5), (3, 4)])
    eager, sdpa = HfStaticBatch(folder, attn_implementation="eager"), HfStaticBatch(folder)
    try:
        assert run(eager, requests)[0] == run(sdpa, requests)[0] == oracle(folder, requests)
        assert (eager.info().attention, sdpa.info().attention) == ("eager", "sdpa")
    finally:
        eager.close()
        sdpa.close()


def test_random_weights_need_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    requests = make_requests([(6, 6)])
    torch.manual_seed(7)
    expected_draw = torch.rand(3)
    torch.manual_seed(7)

    def tokens(seed: int) -> dict[str, list[int]]:
        backend = HfNaive(tmp_path, weights="random", seed=seed)
        try:
            return run(backend, requests)[0]
        finally:
            backend.close()

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert torch.equal(torch.rand(3), expected_draw), "the caller's random state was changed"


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (HfNaive, {"dtype": "float33"}, "float32"),
        (HfNaive, {"weights": "checkpiont"}, "Did you mean 'checkpoint'"),
        (HfNaive, {"attn_implementation": "sdpaa"}, "sdpaa"),
        (HfNaive, {"max_model_len": CONTEXT + 1}, str(CONTEXT)),
        (HfStaticBatch, {"batch_size": 0}, "at least 1"),
        (HfStaticBatch, {"cache_implementation": "statik"}, "Did you mean 'static'"),
        (HfStaticBatchBest, {"batch_sizes": ()}, "batch_sizes"),
        (HfStaticBatchBest, {"cache_implementations": ("paged",)}, "dynamic, static"),
        (HfStaticBatchBest, {"calibration_steps": 2}, "at least 3"),
        (HfContinuousBatching, {"page_size": 0}, "page_size"),
        (HfContinuousBatching, {"max_cache_fraction": 0.0}, "max_cache_fraction"),
        (HfContinuousBatching, {"library_options": {"safety_margn": 0.1}}, "safety_margin"),
    ],
)
def test_wrong_options_are_named(
    kind: Any, options: dict[str, Any], reason: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        kind(folder, **options)


def test_broken_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no config"):
        HfNaive(tmp_path)
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="could not be loaded"):
        HfNaive(broken)


@pytest.mark.parametrize(
    "name",
    [
        "hf_naive",
        "hf_compiled",
        "hf_static_batch",
        "hf_static_batch_best",
        "hf_continuous_batching",
    ],
)
def test_the_configuration_builds_it(name: str, folder: Path) -> None:
    node = OmegaConf.load(CONFIGS / f"{name}.yaml")
    built = {"dtype": "float32", "device": "cpu", "weights": "checkpoint", "seed": 0}
    backend = instantiate(node, model_path=str(folder), **built)
    try:
        assert backend.name == name
        requests = make_requests([(6, 4), (3, 5)])
        assert run(backend, requests)[0] == oracle(folder, requests)
    finally:
        backend.close()
