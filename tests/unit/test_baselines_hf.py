"""The Hugging Face baselines: tokens, events, counters and errors, on a tiny random Llama."""

from __future__ import annotations

import functools
import gc
import math
import shutil
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from workbench.baselines import hf_model, intake
from workbench.baselines.hf_best import HfStaticBatchBest, estimate_output_tok_s
from workbench.baselines.hf_continuous import HfContinuousBatching, kv_bytes_per_token
from workbench.baselines.hf_generate import HfNaive, HfStaticBatch
from workbench.core.backend import TokenEvent
from workbench.core.errors import ConfigError
from workbench.core.workload import WorkloadRequest

VOCAB_SIZE = 256
CONTEXT = 128
CONFIGS = Path(__file__).parents[2] / "conf" / "baseline"


class Source:
    """Hands out requests: at most ``concurrency`` in flight, none before its arrival."""

    def __init__(
        self, requests: list[WorkloadRequest], concurrency: int | None = None, is_open: bool = False
    ) -> None:
        self.pending = list(requests)
        self.concurrency = concurrency or len(requests)
        self.is_open = is_open
        self.start_s: float | None = None
        self.most_in_flight = 0

    def _due_s(self, request: WorkloadRequest) -> float:
        assert self.start_s is not None
        return self.start_s + (request.arrival_s if self.is_open else 0.0)

    def poll(self, now_s: float, num_in_flight: int) -> list[WorkloadRequest]:
        self.start_s = now_s if self.start_s is None else self.start_s
        out: list[WorkloadRequest] = []
        while (
            self.pending
            and num_in_flight + len(out) < self.concurrency
            and self._due_s(self.pending[0]) <= now_s
        ):
            out.append(self.pending.pop(0))
        self.most_in_flight = max(self.most_in_flight, num_in_flight + len(out))
        return out

    def next_due_s(self) -> float | None:
        return self._due_s(self.pending[0]) if self.is_open and self.pending else None

    @property
    def exhausted(self) -> bool:
        return not self.pending


def save_tiny_llama(folder: Path, **generation: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        # Wide weights keep logits apart, so that rounding decides nothing.
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    if generation:
        GenerationConfig(**generation).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def _cheap_collections() -> Any:
    # Every run collects garbage; what the imported libraries hold need not be looked at again.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before, loaded = torch.get_num_threads(), set(hf_model._loaded)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    assert set(hf_model._loaded) <= loaded, "a test left a model open"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


def make_requests(shapes: list[tuple[int, int]], **fields: Any) -> list[WorkloadRequest]:
    """One request for each (prompt length, max_tokens), with prompts of their own."""
    generator = torch.Generator().manual_seed(1)
    return [
        WorkloadRequest(
            f"r{index}",
            tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()),
            max_tokens,
            **fields,
        )
        for index, (length, max_tokens) in enumerate(shapes)
    ]


@functools.cache
def plain_model(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def oracle(folder: Path, requests: list[WorkloadRequest]) -> dict[str, list[int]]:
    """Greedy tokens by a whole forward for each of them: no cache, no generate."""
    model = plain_model(folder)
    tokens = {}
    for request in requests:
        ids = list(request.prompt_token_ids)
        with torch.no_grad():
            for _ in range(request.max_tokens):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        tokens[request.request_id] = ids[len(request.prompt_token_ids) :]
    return tokens


def run(
    backend: Any, requests: list[WorkloadRequest], **source: Any
) -> tuple[dict[str, list[int]], list[TokenEvent]]:
    events: list[TokenEvent] = []
    backend.run(Source(requests, **source), events.append)
    tokens: dict[str, list[int]] = {}
    for event in events:
        tokens.setdefault(event.request_id, []).extend(event.token_ids)
    return tokens, events


RUNGS: dict[str, Any] = {
    "naive": (HfNaive, {}),
    "static": (HfStaticBatch, {"batch_size": 3}),
    "static_cache": (HfStaticBatch, {"batch_size": 3, "cache_implementation": "static"}),
    "best": (HfStaticBatchBest, {"batch_sizes": (1, 2, 4), "calibration_budget_s": 5.0}),
    "continuous": (HfContinuousBatching, {"page_size": 16, "max_batch_tokens": 32}),
}
SHAPES = [(5, 7), (1, 3), (19, 12), (40, 1), (8, 9), (33, 5), (2, 16)]


@pytest.fixture(params=RUNGS, scope="module")
def backend(request: pytest.FixtureRequest, folder: Path) -> Any:
    kind, options = RUNGS[request.param]
    backend = kind(folder, **options)
    yield backend
    backend.close()


def check_events(requests: list[WorkloadRequest], events: list[TokenEvent]) -> None:
    """A token an event, times that never go back, and one end for each request, at its last."""
    for request in requests:
        mine = [event for event in events if event.request_id == request.request_id]
        assert [len(event.token_ids) for event in mine] == [1] * request.max_tokens
        assert [event.finished for event in mine] == [False] * (request.max_tokens - 1) + [True]
        assert all(event.error is None for event in mine)
        times = [event.time_s for event in mine]
        assert times == sorted(times)
        assert len(set(times)) == len(times)


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


@pytest.mark.parametrize(
    "name", ["hf_naive", "hf_static_batch", "hf_static_batch_best", "hf_continuous_batching"]
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
