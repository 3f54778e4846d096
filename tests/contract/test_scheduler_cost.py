"""What a step of the scheduler costs, counted instead of timed: it must not grow with who waits,
nor, while nothing changes, with who runs."""

from __future__ import annotations

import functools
import heapq
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from tests.helpers.busy_scheduler import BLOCK_SIZE, NUM_RUNNING, BusyScheduler
from tests.helpers.engines import component
from tests.helpers.fake_runner import Choice, FakeRunner, make_request, make_scheduler
from workbench.configuration import options_of
from workbench.core.request import Request
from workbench.slots.policy import Policy, WaitingQueue
from workbench.slots.scheduler import Scheduler

POLICIES = options_of("engine/policy")
CACHES = options_of("engine/prefix_cache")
#: A policy that needs a cache gets one in any case.
POLICIES_AND_CACHES = [
    (policy, cache)
    for policy in POLICIES
    for cache in CACHES
    if cache != "none" or not component("policy", policy).needs_prefix_cache
]


def num_calls(work: Callable[[], Any]) -> int:
    """Calls of functions, Python's and C's, that ``work`` makes."""
    count = 0

    def count_call(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(count_call)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def calls_of_steps(busy: BusyScheduler, num_steps: int, end_one: bool = False) -> list[int]:
    """Calls of ``schedule()`` alone in each of some steps."""
    calls = []
    for _ in range(num_steps):
        if end_one:
            busy.end_one()
        calls.append(num_calls(busy.plan_step))
        busy.finish_step()
    return calls


@pytest.mark.parametrize(("policy", "cache"), POLICIES_AND_CACHES)
def test_steady_steps_cost_the_blocks_that_are_taken(policy: str, cache: str) -> None:
    few = BusyScheduler.build(policy, cache, num_running=8, num_waiting=10)
    many = BusyScheduler.build(policy, cache, num_running=128, num_waiting=500)
    idle_few, idle_many = (min(calls_of_steps(b, BLOCK_SIZE)) for b in (few, many))
    taken = many.scheduler.counters()["scheduled_tokens"]
    blocks = many.scheduler.parts.kv_cache.counters()["blocks_allocated"]
    cost = sum(calls_of_steps(many, BLOCK_SIZE)) - BLOCK_SIZE * idle_few
    blocks = many.scheduler.parts.kv_cache.counters()["blocks_allocated"] - blocks
    taken = many.scheduler.counters()["scheduled_tokens"] - taken
    assert taken == BLOCK_SIZE * blocks == BLOCK_SIZE * 128
    assert cost < 25 * blocks, "a block costs more than it should"
    assert idle_few < 40
    # No request was looked at that needed nothing: the rest is work on the blocks of the step.
    assert idle_many < idle_few + 25 * blocks / BLOCK_SIZE


@pytest.mark.parametrize(("policy", "cache"), POLICIES_AND_CACHES)
def test_a_start_costs_the_same_however_many_run_and_wait(policy: str, cache: str) -> None:
    few = BusyScheduler.build(policy, cache, num_running=32, num_waiting=200)
    many = BusyScheduler.build(policy, cache, num_running=96, num_waiting=3000)
    costs = [sorted(calls_of_steps(b, 30, end_one=True))[15] for b in (few, many)]
    # Three times as many run: as many more blocks are taken; and a heap is log2(15) deeper.
    blocks_a_step = (96 - 32) / BLOCK_SIZE
    assert costs[1] < costs[0] + 25 * blocks_a_step + 60


def test_a_step_at_the_size_of_a_busy_server_keeps_to_a_bound() -> None:
    """256 run and 10,000 wait: calls of a steady step, of one that takes a block for each, and of
    one in which one ends and one joins."""
    busy = BusyScheduler.build("fcfs", "radix")
    steady = sorted(calls_of_steps(busy, 2 * BLOCK_SIZE))
    assert steady[0] < 40 + 25 * NUM_RUNNING / BLOCK_SIZE
    assert sum(steady) < 2 * BLOCK_SIZE * 40 + 2 * 25 * NUM_RUNNING
    joins = sorted(calls_of_steps(busy, 30, end_one=True))
    assert joins[15] < 40 + 25 * NUM_RUNNING / BLOCK_SIZE + 500


@pytest.mark.parametrize("policy", POLICIES)
def test_a_blocked_queue_is_not_asked_again_until_something_changes(policy: str) -> None:
    cache = "radix" if component("policy", policy).needs_prefix_cache else "none"
    busy = BusyScheduler.build(policy, cache, num_running=16, num_waiting=30)
    scheduler = busy.scheduler
    busy.end_one()
    scheduler.parts.kv_cache.admit = lambda *args: False  # type: ignore[method-assign]
    finds = 0
    find = scheduler.space.find

    def count_find(request: Request) -> Any:
        nonlocal finds
        finds += 1
        return find(request)

    scheduler.space.find = count_find  # type: ignore[method-assign]
    for _ in range(20):
        busy.plan_step()
        busy.finish_step()
    assert finds == 1
    busy.end_one()
    busy.plan_step()
    assert finds == 2


def drafting(policy: str, cache: str, pool_tokens: int) -> tuple[Scheduler, FakeRunner, list[int]]:
    """A request with drafts in nearly every step, and another amid its prompt of 80 tokens; and
    how often a waiting one was looked up, in a list of one."""
    if component("policy", policy).needs_prefix_cache and cache == "none":
        cache = "radix"
    choice = Choice(
        policy=policy,
        prefix_cache=cache,
        eviction="none" if cache == "none" else "lru",
        prefill="chunked",
        max_num_seqs=4,
        max_model_len=256,
        pool_tokens=pool_tokens,
        settings={
            "kv_cache": {"block_size": 4},
            "prefill": {"chunk_tokens": 24},
            "policy": {"steps_between_prompts": 0} if policy == "decode_first" else {},
        },
    )
    scheduler = make_scheduler(choice)
    runner = FakeRunner(scheduler, seed=1, max_drafts=6)
    runner.eos_rate = 0.0
    scheduler.add(make_request("drafts", prompt_len=8, max_tokens=160, ignore_eos=True))
    scheduler.add(make_request("prompt", prompt=PROMPT, max_tokens=40, ignore_eos=True))
    runner.step()
    runner.step()
    finds, find = [0], scheduler.space.find

    def count_find(request: Request) -> Any:
        finds[0] += 1
        return find(request)

    scheduler.space.find = count_find  # type: ignore[method-assign]
    assert scheduler.requests["prompt"].num_computed_tokens < len(PROMPT)
    return scheduler, runner, finds


PROMPT = range(100, 180)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cache", CACHES)
def test_a_head_without_kv_is_not_looked_up_again_for_drafts(policy: str, cache: str) -> None:
    scheduler, runner, finds = drafting(policy, cache, pool_tokens=320)
    head = make_request("head", prompt=range(300, 400), max_tokens=90, ignore_eos=True)
    scheduler.add(head)
    prompt = scheduler.requests["prompt"]
    while prompt.num_computed_tokens < len(PROMPT):
        runner.step()
    runner.step()  # the last of the prompt is published: one more look
    seen, num_drafts = finds[0], 0
    while not prompt.is_finished:
        plan, _ = runner.step()
        num_drafts += sum(plan.num_draft_tokens) if plan is not None else 0
    assert num_drafts > 20
    assert finds[0] == seen
    runner.step()
    assert finds[0] == seen + 1, "somebody ended, so there may be room"


@pytest.mark.parametrize("cache", [name for name in CACHES if name != "none"])
def test_a_head_without_kv_starts_once_a_running_prompt_shares_its_own(cache: str) -> None:
    """Nobody ends, and it waits for all the blocks that the prompt publishes."""
    scheduler, runner, _ = drafting("fcfs", cache, pool_tokens=4 * (42 + 30 + 2))
    scheduler.add(make_request("head", prompt=[*PROMPT, 7], max_tokens=7, ignore_eos=True))
    prompt = scheduler.requests["prompt"]
    while prompt.num_computed_tokens < len(PROMPT):
        assert "head" not in scheduler.running
        runner.step()
    assert [*scheduler.running] == ["drafts", "prompt", "head"]


# -- the queue ------------------------------------------------------------------------------------


@functools.total_ordering
class _Key:
    """Counts comparisons."""

    comparisons = 0

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, _Key)
        return self.value == other.value

    def __lt__(self, other: _Key) -> bool:
        _Key.comparisons += 1
        return self.value < other.value


class _Reversed(Policy):
    """The worst for a heap: each that comes goes before all that wait."""

    max_overtakes = 1 << 30
    keys = 0

    def key(self, request: Request, arrival_index: int) -> _Key:
        self.keys += 1
        return _Key(-arrival_index)


@pytest.fixture
def policy() -> Iterator[_Reversed]:
    """Counts from zero."""
    _Key.comparisons = 0
    yield _Reversed()


NUM = 10_000


def test_ten_thousand_arrivals_and_starts_are_n_log_n(policy: _Reversed) -> None:
    queue = WaitingQueue(policy)
    for index in range(NUM):
        queue.push(make_request(f"r{index}"))
    assert policy.keys == NUM
    depth = NUM.bit_length()
    assert _Key.comparisons <= NUM * depth
    _Key.comparisons = 0
    popped = [queue.pop().arrival_index for _ in range(NUM)]
    assert popped == list(range(NUM))[::-1]
    assert policy.keys == NUM
    assert _Key.comparisons <= 2 * NUM * depth


def test_removal_is_constant(policy: _Reversed, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = WaitingQueue(policy)
    for index in range(NUM):
        queue.push(make_request(f"r{index}"))
    touched = 0
    heapify = heapq.heapify

    def count_heapify(heap: list[Any]) -> None:
        nonlocal touched
        touched += len(heap)
        heapify(heap)

    monkeypatch.setattr("workbench.slots.policy.heapq.heapify", count_heapify)
    _Key.comparisons = 0
    for index in range(NUM):
        assert queue.remove(f"r{index}") is not None
    assert len(queue) == 0
    assert touched < NUM, "clearing out what is gone costs more than what goes"
    assert _Key.comparisons < 3 * NUM
    assert len(queue._heap) <= 64, "what is gone is kept for ever"
    assert queue.peek() is None
