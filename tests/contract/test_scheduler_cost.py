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

from tests.helpers.busy_scheduler import BLOCK_SIZE, BusyScheduler
from tests.helpers.engines import component
from tests.helpers.fake_runner import make_request
from workbench.configuration import options_of
from workbench.core.request import Request
from workbench.slots.policy import Policy, WaitingQueue

POLICIES = options_of("engine/policy")
CACHES = options_of("engine/prefix_cache")


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


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("policy", POLICIES)
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


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_start_costs_the_same_however_many_run_and_wait(policy: str, cache: str) -> None:
    few = BusyScheduler.build(policy, cache, num_running=32, num_waiting=200)
    many = BusyScheduler.build(policy, cache, num_running=96, num_waiting=3000)
    costs = [sorted(calls_of_steps(b, 30, end_one=True))[15] for b in (few, many)]
    # Three times as many run: as many more blocks are taken; and a heap is log2(15) deeper.
    blocks_a_step = (96 - 32) / BLOCK_SIZE
    assert costs[1] < costs[0] + 25 * blocks_a_step + 60


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
