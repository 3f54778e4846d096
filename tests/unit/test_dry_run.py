"""The dry run: what it counts is what happened, and what an engine with a model would count."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from experiments.dry import at_once, make_request, summary
from tests.helpers.engines import FIRST_ORDINARY_ID, VOCAB_SIZE, tiny_engine
from workbench.assemble import Limits, build_scheduler
from workbench.bench.load import Offline
from workbench.configuration import compose_config
from workbench.core.errors import ConfigError
from workbench.core.request import Request
from workbench.core.workload import WorkloadRequest
from workbench.engine.backend import EngineBackend
from workbench.simulate.dry_run import DryRun, DryRunner, DryRunResult
from workbench.slots.scheduler import Scheduler


def scheduler_of(*overrides: str, max_num_seqs: int = 4, pool: int = 256) -> Scheduler:
    composed = compose_config(["engine/scheduler=continuous", "engine/kv_cache=paged", *overrides])
    return build_scheduler(composed.components, Limits(max_num_seqs, 64, pool))


def request(name: str, prompt_len: int = 4, max_tokens: int = 3) -> Request:
    return make_request(name, range(prompt_len), max_tokens)


def serve(
    scheduler: Scheduler, arrivals: Sequence[tuple[int, Request]], most: int | None = None
) -> DryRunResult:
    return DryRun(scheduler, max_arrivals_per_step=most, check_every=1).serve(arrivals)


def test_a_request_s_steps() -> None:
    line = serve(scheduler_of(), [(0, request("a"))]).timelines["a"]
    assert (line.arrived, line.started, line.first_token, line.ended) == (0, 0, 0, 2)
    assert (line.waited, line.turnaround, line.num_output_tokens) == (0, 3, 3)


def test_a_host_tier_is_as_large_as_the_pool_or_counted_in_blocks() -> None:
    tier = ["engine/kv_offload=host", "engine/prefix_cache=radix", "engine/eviction=lru"]
    pool = scheduler_of(pool=256).parts.kv_cache.num_blocks
    assert scheduler_of(*tier, pool=256).parts.offload.num_host_blocks == pool
    blocks = scheduler_of(*tier, "engine.kv_offload.num_blocks=7").parts.offload.num_host_blocks
    assert blocks == 7
    with pytest.raises(ConfigError, match=r"without a model.*kv_offload\.num_blocks"):
        scheduler_of(*tier, "engine.kv_offload.host_gib=1.0")


def test_a_pool_that_holds_no_block_is_told() -> None:
    with pytest.raises(ConfigError, match="holds no block of"):
        scheduler_of(pool=1)


def test_chunks_put_off_the_first_token() -> None:
    chunked = scheduler_of("engine/prefill=chunked", "engine.prefill.chunk_tokens=4")
    line = serve(chunked, [(0, request("a", prompt_len=10))]).timelines["a"]
    assert (line.started, line.first_token) == (0, 2)


def test_the_clock_jumps_over_steps_without_requests() -> None:
    result = serve(scheduler_of(), [(0, request("a")), (50, request("b"))])
    assert result.num_steps == 6
    assert result.num_idle_steps == 47
    assert (result.timelines["b"].arrived, result.timelines["b"].ended) == (50, 52)


def test_waits_are_counted_from_arrival() -> None:
    arrivals = [(0, request("a")), (1, request("b")), (1, request("c"))]
    result = serve(scheduler_of(max_num_seqs=1), arrivals)
    assert [line.waited for line in result.timelines.values()] == [0, 2, 5]
    counts = summary(result)
    assert counts["mean_waited_steps"] == pytest.approx(7 / 3)
    assert counts["mean_turnaround_steps"] == pytest.approx((3 + 5 + 8) / 3)


def test_arrivals_may_be_handed_over_one_a_step() -> None:
    arrivals = [(0, request(name)) for name in "abc"]
    together = serve(scheduler_of(), arrivals).timelines.values()
    arrivals = [(0, request(name)) for name in "abc"]
    apart = serve(scheduler_of(), arrivals, most=1).timelines.values()
    assert [line.started for line in together] == [0, 0, 0]
    assert [line.started for line in apart] == [0, 1, 2]


def test_waste_is_what_slots_hold_no_token() -> None:
    composed = compose_config(["engine/scheduler=continuous", "engine/kv_cache=contiguous"])
    scheduler = build_scheduler(composed.components, Limits(2, 64, 128))
    result = serve(scheduler, [(0, request("a", prompt_len=16, max_tokens=2))])
    # One region of 64; the second step ends the request, so nothing is taken after it.
    assert result.kv_allocated_tokens == [64, 0]
    assert result.mean_waste() == result.waste_at_fullest() == 1 - 16 / 64


def test_arrivals_must_be_sorted() -> None:
    with pytest.raises(ValueError, match=r"'b' arrives at step 3.*sort them"):
        serve(scheduler_of(), [(5, request("a")), (3, request("b"))])
    with pytest.raises(ValueError, match="max_arrivals_per_step=0"):
        DryRun(scheduler_of(), max_arrivals_per_step=0)


def test_the_runner_gives_one_token_to_whoever_samples() -> None:
    chunked = scheduler_of("engine/prefill=chunked", "engine.prefill.chunk_tokens=4")
    chunked.add(request("a", prompt_len=6))
    runner = DryRunner(token_id=7)
    seen = []
    while chunked.has_unfinished():
        plan = chunked.schedule()
        assert plan is not None
        result = runner.execute(plan)
        seen.append(result.token_ids)
        chunked.update_from_output(plan, result)
    assert seen == [[[]], [[7]], [[7]], [[7]]]


def shared_prompts() -> list[WorkloadRequest]:
    """Prompts in two groups that share 40 tokens, of lengths that fill and do not fill blocks."""
    rng = random.Random(0)
    ids = range(FIRST_ORDINARY_ID, VOCAB_SIZE)
    starts = [rng.choices(ids, k=40) for _ in range(2)]
    return [
        WorkloadRequest(
            f"r{i}", (*starts[i % 2], *rng.choices(ids, k=3 + 5 * i)), max_tokens=2 + 3 * (i % 4)
        )
        for i in range(10)
    ]


@pytest.mark.parametrize("prefix_cache", ["none", "block_hash", "radix"])
@pytest.mark.parametrize("prefill", ["whole_prompt", "chunked"])
def test_an_engine_with_a_model_counts_the_same(prefix_cache: str, prefill: str) -> None:
    overrides = [
        "engine/scheduler=continuous",
        "engine/kv_cache=paged",
        f"engine/prefill={prefill}",
        f"engine/prefix_cache={prefix_cache}",
        f"engine/eviction={'none' if prefix_cache == 'none' else 'lru'}",
    ]
    if prefill == "chunked":
        overrides.append("engine.prefill.chunk_tokens=32")
    sizes: dict[str, Any] = {"max_num_seqs": 3, "max_model_len": 128, "kv_pool_tokens": 320}
    engine = tiny_engine(*overrides, **sizes)
    backend = EngineBackend("engine", engine, engine.parts.info)
    backend.run(Offline(shared_prompts()), lambda event: None)
    real = backend.counters()
    scheduler = build_scheduler(compose_config(overrides).components, Limits(**sizes))
    result = DryRun(scheduler, DryRunner(-1), check_every=1).serve(at_once(shared_prompts()))
    assert result.num_steps == real["step.steps"]
    assert result.num_cached_tokens == real["step.num_cached_tokens"]
    assert (result.num_cached_tokens > 0) == (prefix_cache != "none")
    counted = {k: v for k, v in result.counters.items() if k.startswith("scheduler.")}
    assert counted == {k: v for k, v in real.items() if k.startswith("scheduler.")}
    assert result.counters["kv_cache.blocks_allocated"] == real["kv_cache.blocks_allocated"]
