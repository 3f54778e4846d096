"""KV between manager, prefix cache and host tier, driven by a scheduler on symbols of KV."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.helpers.fake_runner import Choice, make_request, make_scheduler
from tests.helpers.symbolic_kv import SymbolicRunner, expected_tokens
from workbench.configuration import options_of
from workbench.core.errors import ConfigError
from workbench.core.request import FinishReason, Request
from workbench.slots.kv_space import KVSpace
from workbench.slots.scheduler import Scheduler

CACHES = options_of("engine/prefix_cache")
BLOCK_SIZE = 4
Outputs = dict[str, tuple[Request, list[int]]]


def scheduler_of(
    cache: str,
    num_host_blocks: int,
    *,
    swap: bool = False,
    pool_tokens: int = 64,
    share_in_flight: bool = True,
    **fields: Any,
) -> Scheduler:
    """A small device pool, and a host tier where ``num_host_blocks`` is above zero."""
    settings: dict[str, dict[str, Any]] = {
        "kv_cache": {"block_size": BLOCK_SIZE},
        "admission": {"headroom_tokens": 0, "preemption": "swap" if swap else "recompute"},
    }
    if cache != "none":
        settings["prefix_cache"] = {"share_in_flight": share_in_flight}
    if num_host_blocks:
        settings["kv_offload"] = {"num_blocks": num_host_blocks}
    choice = Choice(
        prefix_cache=cache,
        eviction="none" if cache == "none" else "lru",
        kv_offload="host" if num_host_blocks else "none",
        admission="optimistic",
        pool_tokens=pool_tokens,
        settings=settings,
        **fields,
    )
    return make_scheduler(choice)


class Traffic:
    """Requests that share prefixes, of two tenants, some longer than others."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.stems = [[self.rng.randrange(3, 99) for _ in range(16)] for _ in range(4)]
        self.said: list[tuple[list[int], tuple[str, ...]]] = []
        self.count = 0

    def next(self) -> Request:
        stem, tenant = self._stem()
        own = [self.rng.randrange(3, 99) for _ in range(self.rng.randint(1, 6))]
        name = f"q{self.count}"
        self.count += 1
        request = make_request(
            name, prompt=stem + own, max_tokens=self.rng.randint(1, 9), ignore_eos=True
        )
        request.extra_keys = tenant
        self.said.append((request.prompt_token_ids + expected_tokens(request), tenant))
        return request

    def _stem(self) -> tuple[list[int], tuple[str, ...]]:
        """A prefix of many requests, or what one has said, as the next turn of a conversation."""
        if self.said and self.rng.random() < 0.3:
            text, tenant = self.rng.choice(self.said[-6:])
            if len(text) <= 16:
                return text, tenant
        stem = self.rng.choice(self.stems)[: self.rng.choice([3, 8, 11, 16])]
        return stem, self.rng.choice([(), (), ("tenant",)])


def drive(
    scheduler: Scheduler, seed: int, num_requests: int, *, fault_rate: float = 0.0, abort: float = 0
) -> tuple[SymbolicRunner, Outputs]:
    """Run random traffic to its end; what each request that was not aborted put out."""
    runner = SymbolicRunner(scheduler, seed=seed, fault_rate=fault_rate)
    rng, traffic = random.Random(seed), Traffic(seed)
    requests: dict[str, Request] = {}
    for _ in range(40 * num_requests):
        while len(requests) < num_requests and rng.random() < 0.4:
            request = traffic.next()
            requests[request.request_id] = request
            scheduler.add(request)
        if rng.random() < abort and scheduler.requests:
            name = rng.choice(list(scheduler.requests))  # it may wait, run, or be swapped out
            scheduler.finish(name, FinishReason.ABORT)
            scheduler.check_integrity()
            requests[name].finish_reason = FinishReason.ABORT
        runner.step()
        if len(requests) == num_requests and not scheduler.has_unfinished():
            break
    assert not scheduler.has_unfinished(), "requests starve"
    check_all_free(scheduler)
    outputs = {
        name: (request, list(request.output_token_ids))
        for name, request in requests.items()
        if request.finish_reason is not FinishReason.ABORT
    }
    return runner, outputs


def start(space: KVSpace, request: Request) -> None:
    """Admit a request and run all of its known tokens but the last, as one step would."""
    found = space.find(request)
    assert space.admit(request, found, request.num_tokens, request.num_tokens) is not None
    request.num_computed_tokens = request.num_tokens - 1
    space.take_copies()


def check_all_free(scheduler: Scheduler) -> None:
    space = scheduler.space
    space.clear_cached()
    scheduler.check_integrity()
    usage = scheduler.kv_usage()
    assert (usage.allocated_tokens, usage.used_tokens) == (0, 0)
    for book in (space._held, space._swapped, space._digests, space._digest_of):
        assert not book, "a request or a block is remembered for ever"
    assert space.offload.find([b"x"]) == []
    assert not space.copies_in and not space.copies_out


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("num_host_blocks", [0, 2, 9, 60])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("prefill", ["whole_prompt", "chunked"])
def test_every_slot_that_is_read_holds_the_reader_s_own_tokens(
    cache: str, num_host_blocks: int, swap: bool, prefill: str
) -> None:
    if swap and not num_host_blocks:
        pytest.skip("nothing to swap to")
    if num_host_blocks and cache == "none" and not swap:
        pytest.skip("nothing to keep")
    scheduler = scheduler_of(cache, num_host_blocks, swap=swap, prefill=prefill)
    if prefill == "chunked":
        scheduler.token_budget = 7
    runner, outputs = drive(scheduler, seed=num_host_blocks, num_requests=120)
    assert len(outputs) == 120
    for request, tokens in outputs.values():
        assert tokens == expected_tokens(request)
    assert scheduler.counters()["preemptions"] > 0, "the pool never ran dry"
    counts = scheduler.parts.offload.counters()
    if num_host_blocks:
        assert (runner.counts["out"], runner.counts["in"]) == (
            counts["blocks_out"],
            counts["blocks_in"],
        )
    if num_host_blocks >= 9:
        swaps = scheduler.counters()
        assert swap == (swaps["swaps_out"] > 0) == (swaps["swaps_in"] > 0)
        assert (cache != "none") == (counts["hit_blocks"] > 0)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("seed", range(6))
def test_aborts_and_failed_steps_leave_nothing_wrong_behind(cache: str, seed: int) -> None:
    """Copies may have run or not when a step fails; none of it may be read afterwards."""
    scheduler = scheduler_of(cache, 12, swap=True)
    runner, outputs = drive(scheduler, seed, 150, fault_rate=0.1, abort=0.04)
    assert runner.counts["faults"] > 5
    assert 50 < len(outputs) < 150
    for request, tokens in outputs.values():
        assert tokens == expected_tokens(request)


@pytest.mark.parametrize("cache", [c for c in CACHES if c != "none"])
@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("prefill", ["whole_prompt", "chunked"])
def test_requests_that_start_together_compute_what_they_share_once(
    cache: str, shares: bool, prefill: str
) -> None:
    """The runner checks that what a request reads was written, in its own step at the latest."""
    scheduler = scheduler_of(
        cache, 0, pool_tokens=256, max_num_seqs=8, prefill=prefill, share_in_flight=shares
    )
    runner = SymbolicRunner(scheduler)
    stem = list(range(3, 19))
    requests = [
        make_request(f"r{i}", prompt=[*stem, 40 + i, 50 + i], max_tokens=3, ignore_eos=True)
        for i in range(8)
    ]
    for request in requests:
        scheduler.add(request)
    plan, _ = runner.step()
    assert plan is not None and len(plan.request_ids) == 8
    assert plan.num_scheduled_tokens == [18, *([2] * 7 if shares else [18] * 7)]
    while scheduler.has_unfinished():
        runner.step()
    assert all(r.output_token_ids == expected_tokens(r) for r in requests)
    counted = [r.num_cached_tokens for r in requests]
    assert counted == [0, *[16 if shares else 0] * 7]
    assert scheduler.counters()["in_flight_tokens"] == sum(counted)
    check_all_free(scheduler)


@pytest.mark.parametrize("cache", [c for c in CACHES if c != "none"])
def test_what_a_failed_step_was_to_write_is_found_by_nobody(cache: str) -> None:
    scheduler = scheduler_of(cache, 0, pool_tokens=256, max_num_seqs=8)
    runner = SymbolicRunner(scheduler)
    done = make_request("done", prompt=range(3, 20), max_tokens=1, ignore_eos=True)
    scheduler.add(done)
    runner.step()
    prompts = [[*range(3, 15), *range(60, 70), 40 + i] for i in range(4)]
    requests = [
        make_request(f"r{i}", prompt=prompt, max_tokens=3, ignore_eos=True)
        for i, prompt in enumerate(prompts)
    ]
    for request in requests:
        scheduler.add(request)
    runner.fault_rate = 1.0
    runner.step()
    assert runner.counts["faults"] == 1
    assert [scheduler.space.find(request).num_tokens for request in requests] == [0] * 4
    runner.fault_rate = 0.0
    while scheduler.has_unfinished():
        runner.step()
    assert all(r.output_token_ids == expected_tokens(r) for r in requests)
    # A step that starts nobody publishes nothing, and what is cached outlives its failure.
    again = make_request("again", prompt=prompts[0], max_tokens=5, ignore_eos=True)
    scheduler.add(again)
    runner.step()
    runner.step()
    runner.fault_rate = 1.0
    runner.step()
    assert scheduler.space.find(requests[1]).num_tokens == 24
    runner.fault_rate = 0.0
    while scheduler.has_unfinished():
        runner.step()
    assert again.output_token_ids == expected_tokens(again)
    check_all_free(scheduler)


@pytest.mark.parametrize("cache", [c for c in CACHES if c != "none"])
@pytest.mark.parametrize("seed", range(3))
def test_bursts_share_in_flight_through_faults_and_aborts(cache: str, seed: int) -> None:
    scheduler = scheduler_of(cache, 12, swap=True, pool_tokens=128, max_num_seqs=6)
    runner, rng, traffic = SymbolicRunner(scheduler, seed, 0.15), random.Random(seed), Traffic(seed)
    served: list[Request] = []
    for _ in range(25):
        burst = [traffic.next() for _ in range(rng.randint(1, 6))]
        for request in burst:
            scheduler.add(request)
        for _ in range(rng.randint(1, 12)):
            if rng.random() < 0.1 and scheduler.requests:
                name = rng.choice(list(scheduler.requests))
                scheduler.finish(name, FinishReason.ABORT)
                served = [r for r in served if r.request_id != name]
                burst = [r for r in burst if r.request_id != name]
            runner.step()
        served += burst
    for _ in range(2000):
        if not scheduler.has_unfinished():
            break
        runner.step()
    assert len(served) > 20
    assert all(request.output_token_ids == expected_tokens(request) for request in served)
    assert scheduler.counters()["in_flight_tokens"] > 0 and runner.counts["faults"] > 5
    check_all_free(scheduler)


@pytest.mark.parametrize("cache", [c for c in CACHES if c != "none"])
@pytest.mark.parametrize(("length", "cached"), [(17, 16), (16, 12)])
def test_tokens_that_the_device_gave_up_come_from_the_host(
    cache: str, length: int, cached: int
) -> None:
    """One request after the other, so that what is cached can be counted; one token is to run."""
    scheduler = scheduler_of(cache, 100, pool_tokens=24)
    runner = SymbolicRunner(scheduler)
    prompts = [[10 * n + i for i in range(10)] + [99] * (length - 10) for n in range(5)]
    for index, prompt in enumerate(prompts * 2):
        request = make_request(f"r{index}", prompt=prompt, max_tokens=2, ignore_eos=True)
        scheduler.add(request)
        while scheduler.has_unfinished():
            runner.step()
        assert request.num_cached_tokens == (cached if index >= 5 else 0)
    assert scheduler.parts.offload.counters()["hit_blocks"] == 5 * cached // BLOCK_SIZE


def test_a_tenant_finds_nothing_of_another_on_the_host() -> None:
    scheduler = scheduler_of("block_hash", 100, pool_tokens=24)
    runner = SymbolicRunner(scheduler)
    cached = []
    for index, salt in enumerate(["a", "b", "a", "c", "b"]):
        request = make_request(f"r{index}", prompt=list(range(10, 27)), max_tokens=1)
        request.extra_keys = (salt,)
        scheduler.add(request)
        while scheduler.has_unfinished():
            runner.step()
        cached.append(request.num_cached_tokens)
    assert [n > 0 for n in cached] == [False, False, True, False, True]


def test_what_the_device_still_holds_of_a_swapped_request_is_not_copied() -> None:
    """The victim's own prefix stays in the cache: only what follows it comes from the host."""
    space = scheduler_of("block_hash", 40).space
    request = make_request("r", prompt=list(range(10, 26)))
    space.prepare(request)
    start(space, request)
    assert space.preempt(request, to_host=True)
    out, _ = space.take_copies()
    assert len(out) == 4
    found = space.find(request)
    assert found.swapped and found.num_tokens == 15
    assert (len(found.match.block_ids), len(found.host_blocks)) == (3, 1)
    assert found.host_blocks == [host for _, host in out][3:]
    blocks = space.admit(request, found, 16, 16)
    assert blocks is not None and blocks[:3] == list(found.match.block_ids)
    _, into = space.take_copies()
    assert into == [(found.host_blocks[0], blocks[3])]
    assert not space.find(request).swapped, "its host blocks are given back"
    space.check_integrity({"r": request})


def test_without_room_on_the_host_a_victim_s_kv_is_given_up() -> None:
    space = scheduler_of("none", 3, swap=True).space
    request = make_request("r", prompt=list(range(10, 26)))
    space.prepare(request)
    start(space, request)
    assert not space.preempt(request, to_host=True)
    assert space.take_copies() == ([], [])
    assert space.find(request).num_tokens == 0
    assert space.offload.counters()["refused"] == 1


def test_an_aborted_request_that_was_swapped_out_frees_its_host_blocks() -> None:
    space = scheduler_of("none", 4, swap=True).space
    request = make_request("r", prompt=list(range(10, 26)))
    space.prepare(request)
    start(space, request)
    assert space.preempt(request, to_host=True)
    space.forget(request)
    assert space.offload.swap_out("somebody", 4) is None, "its copies out are still to run"
    space.take_copies()
    assert space.offload.swap_out("somebody", 4) is not None


def test_copies_that_are_still_to_be_planned_are_forgotten_with_the_host() -> None:
    space = scheduler_of("none", 4, swap=True).space
    request = make_request("r", prompt=list(range(10, 26)))
    space.prepare(request)
    start(space, request)
    assert space.preempt(request, to_host=True)
    space.distrust_host()
    assert space.find(request).num_tokens == 0
    start(space, request)
    request.num_computed_tokens = 15
    assert space.preempt(request, to_host=True)
    assert len(space.take_copies()[0]) == 4
    space.check_integrity({})


def test_a_request_that_does_not_fit_moves_and_locks_nothing() -> None:
    space = scheduler_of("block_hash", 40, pool_tokens=32).space
    request = make_request("r", prompt=list(range(10, 26)))
    space.prepare(request)
    start(space, request)
    space.release(request)
    found = space.find(request)
    assert found.num_tokens == 12
    before = space.prefix_cache.counters()
    assert space.admit(request, found, 33, 16) is None
    assert space.prefix_cache.counters() == before, "a request that waits is counted every step"
    space.check_integrity({})
    assert space.prefix_cache.num_evictable == space.prefix_cache.num_blocks == 3
    assert space.take_copies() == ([], [])


def test_prefix_cache_needs_a_manager_whose_blocks_can_be_shared() -> None:
    scheduler = scheduler_of("block_hash", 0)
    contiguous = make_scheduler(Choice(kv_cache="contiguous"))
    with pytest.raises(ConfigError, match="engine/kv_cache=paged"):
        KVSpace(contiguous.parts.kv_cache, scheduler.parts.prefix_cache, scheduler.parts.offload)
