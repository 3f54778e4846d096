"""The host tier under real engines: the tokens of Transformers, whatever is copied to and fro."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from typing import Any

import pytest

from tests.helpers.engines import FIRST_ORDINARY_ID, VOCAB_SIZE, run_to_end, tiny_engine
from tests.helpers.tiny_models import hf_greedy, tiny_model
from workbench.configuration import load_markers, options_of
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.core.step import ModelRunnerOutput, SchedulerOutput
from workbench.engine.engine import Engine
from workbench.engine.host_pool import HostPool
from workbench.slots.executor import Executor

CACHES = [name for name in options_of("engine/prefix_cache") if name != "none"]
PAGED = ("engine/scheduler=continuous", "engine/kv_cache=paged", "engine.kv_cache.block_size=4")
NEW_TOKENS = 8


@functools.cache
def prompts() -> list[list[int]]:
    """Requests that come back to one of four prefixes, in turn."""
    rng = random.Random(0)

    def draw(count: int) -> list[int]:
        return [rng.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(count)]

    stems = [draw(24) for _ in range(4)]
    return [stems[i % 4] + draw(rng.randint(1, 9)) for i in range(20)]


@functools.cache
def hf_tokens() -> list[list[int]]:
    return [hf_greedy(tiny_model("llama"), prompt, NEW_TOKENS) for prompt in prompts()]


def make_engine(cache: str, *overrides: str, swap: bool = False, **settings: Any) -> Engine:
    """Two requests at once in a pool that holds little more than those."""
    chosen = [f"engine/prefix_cache={cache}", *(["engine/eviction=lru"] if cache != "none" else [])]
    limits = {"max_num_seqs": 2, "kv_pool_tokens": 96, **settings}
    if swap:
        chosen += [
            "engine/admission=optimistic",
            "engine.admission.headroom_tokens=0",
            "engine.admission.preemption=swap",
        ]
    return tiny_engine(*PAGED, *chosen, *overrides, **limits)


def with_tier(num_blocks: int) -> tuple[str, str]:
    return "engine/kv_offload=host", f"engine.kv_offload.num_blocks={num_blocks}"


def serve(engine: Engine) -> list[list[int]]:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    names = [engine.add_request(prompt, params) for prompt in prompts()]
    tokens = run_to_end(engine)
    return [tokens[name] for name in names]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Blocks that were really copied."""
    counts = {"blocks_out": 0, "blocks_in": 0}
    copy = HostPool.copy

    def counting(self: HostPool, out: Any, into: Any) -> None:
        counts["blocks_out"] += len(out)
        counts["blocks_in"] += len(into)
        copy(self, out, into)

    monkeypatch.setattr(HostPool, "copy", counting)
    return counts


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("num_blocks", [5, 200])
def test_tokens_with_the_tier_are_those_without(
    cache: str, num_blocks: int, copied: dict[str, int]
) -> None:
    without = make_engine(cache)
    engine = make_engine(cache, *with_tier(num_blocks))
    assert serve(without) == serve(engine) == hf_tokens()
    counters = engine.counters()
    for name, count in copied.items():
        assert counters[f"kv_offload.{name}"] == count, "a copy was planned that did not run"
    assert without.counters()["prefix_cache.evicted_blocks"] > 0, "the pool is too large"
    assert counters["kv_offload.blocks_out"] > 0
    if num_blocks == 200:
        markers = load_markers().values()
        (marker,) = [m for m in markers if m.slots.get("kv_offload") == "host"]
        for name in marker.evidence:
            assert counters[name] > 0
        computed = [e.counters()["scheduler.scheduled_tokens"] for e in (without, engine)]
        hits = counters["kv_offload.hit_blocks"] * 4
        assert computed[0] - computed[1] == hits, "what was copied in was computed again"


@pytest.mark.parametrize("cache", ["none", *CACHES])
def test_swapped_out_requests_go_on_where_they_were(cache: str, copied: dict[str, int]) -> None:
    engine = make_engine(cache, *with_tier(80), swap=True, max_num_seqs=4, kv_pool_tokens=72)
    assert serve(engine) == hf_tokens()
    counters = engine.counters()
    assert counters["scheduler.preemptions"] > 0
    assert counters["scheduler.swaps_in"] == counters["scheduler.swaps_out"] > 0
    assert counters["scheduler.swaps_refused"] == 0
    assert counters["kv_offload.blocks_in"] == copied["blocks_in"] > 0


@pytest.mark.parametrize("cache", CACHES)
def test_drawn_tokens_are_the_same_too(cache: str) -> None:
    params = [
        SamplingParams(max_tokens=6, temperature=1.1, seed=i, repetition_penalty=1.2)
        for i in range(20)
    ]
    plain = make_engine("none", kv_pool_tokens=0).generate(prompts(), params)
    engine = make_engine(cache, *with_tier(60), swap=True, max_num_seqs=4, kv_pool_tokens=72)
    assert [o.token_ids for o in engine.generate(prompts(), params)] == [o.token_ids for o in plain]
    assert engine.counters()["kv_offload.blocks_in"] > 0


class FailsNowAndThen(Executor):
    """Raises before or after the real executor has run, every few steps."""

    def __init__(self, real: Executor, rng: random.Random) -> None:
        super().__init__()
        self.real, self.rng, self.num_faults = real, rng, 0

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        fault = self.rng.random()
        self.num_faults += fault < 0.2
        if fault < 0.1:
            raise InterruptedError
        result = self.real.execute(plan)
        if fault < 0.2:
            raise InterruptedError
        return result


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("seed", range(2))
def test_failed_steps_leave_no_wrong_copy_behind(cache: str, seed: int) -> None:
    engine = make_engine(cache, *with_tier(40), swap=True, max_num_seqs=4, kv_pool_tokens=72)
    faulty = FailsNowAndThen(engine.parts.executor, random.Random(seed))
    engine.parts = dataclasses.replace(engine.parts, executor=faulty)
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    names = [engine.add_request(prompt, params) for prompt in prompts()]
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished():
        try:
            for output in engine.step():
                tokens[output.request_id] = list(output.token_ids)
        except InterruptedError:
            engine.check_integrity()
    assert faulty.num_faults > 5
    assert [tokens[name] for name in names] == hf_tokens()


HostPool_copy = HostPool.copy


def out_after_in(self: HostPool, out: Any, into: Any) -> None:
    HostPool_copy(self, [], into)
    HostPool_copy(self, out, [])


def neighbour_out(self: HostPool, out: Any, into: Any) -> None:
    HostPool_copy(self, [((block + 1) % 24, host) for block, host in out], into)


def neighbour_in(self: HostPool, out: Any, into: Any) -> None:
    shifted = [((host + 1) % self.num_blocks, block) for host, block in into]
    HostPool_copy(self, out, shifted)


def nothing_out(self: HostPool, out: Any, into: Any) -> None:
    HostPool_copy(self, [], into)


def nothing_in(self: HostPool, out: Any, into: Any) -> None:
    HostPool_copy(self, out, [])


WRONG_COPIES = [neighbour_out, neighbour_in, nothing_out, nothing_in]


@pytest.mark.parametrize(
    ("wrong", "swap"),
    # No plan both swaps out and in here, so their order shows without swapping only.
    [(out_after_in, False), *itertools.product(WRONG_COPIES, [False, True])],
)
def test_a_wrong_copy_shows_in_the_tokens(
    wrong: Any, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostPool, "copy", wrong)
    cache = "none" if swap else "block_hash"
    sizes = {"max_num_seqs": 4, "kv_pool_tokens": 72} if swap else {}
    engine = make_engine(cache, *with_tier(20 if wrong is out_after_in else 60), swap=swap, **sizes)
    assert serve(engine) != hf_tokens()


def test_memory_of_the_tier_stands_in_the_ledger() -> None:
    engine = make_engine("block_hash", *with_tier(24))
    predicted = engine.parts.ledger.read().predicted
    per_block = predicted["kv_pool"] // (96 // 4)
    assert predicted["kv_trash_block"] == per_block
    assert engine.parts.info["kv_host_bytes"] == 24 * per_block
    assert predicted["kv_host"] == 3 * 24 * per_block, "host blocks, and two buffers as large"
    assert make_engine("block_hash").parts.ledger.read().predicted["kv_host"] == 0


def test_as_many_host_blocks_as_the_device_has_where_nobody_says() -> None:
    engine = make_engine("block_hash", "engine/kv_offload=host")
    assert engine.parts.scheduler.parts.offload.num_host_blocks == 24


def test_more_than_the_host_has_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError, match=r"needs 1000000\.00 GiB .* of host memory are free"):
        make_engine("block_hash", "engine/kv_offload=host", "engine.kv_offload.host_gib=1000000")
