"""What each policy is for, and how the queue keeps its promises."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.helpers.engines import component
from tests.helpers.fake_runner import Choice, FakeRunner, make_request, make_scheduler
from workbench.core.request import Request
from workbench.slots.policy import Fcfs, Policy, WaitingQueue
from workbench.slots.scheduler import Scheduler


def starts(scheduler: Scheduler, num_steps: int = 400) -> list[str]:
    """Ids in the order in which they start, all of them served."""
    runner = FakeRunner(scheduler)
    runner.eos_rate = 0.0
    started: list[str] = []
    for _ in range(num_steps):
        if not scheduler.has_unfinished():
            return started
        plan, _ = runner.step()
        started += [new.request_id for new in plan.new_requests] if plan else []
    raise AssertionError("never finished")


def with_policy(policy: str, **fields: object) -> Scheduler:
    settings = {"policy": fields, "kv_cache": {"block_size": 4}}
    cached = component("policy", policy).needs_prefix_cache
    return make_scheduler(
        Choice(
            policy=policy,
            prefix_cache="radix" if cached else "none",
            eviction="lru" if cached else "none",
            max_num_seqs=1,
            max_model_len=64,
            pool_tokens=256,
            settings=settings,
        )
    )


def test_sjf_counts_prompt_and_possible_output() -> None:
    scheduler = with_policy("sjf")
    for name, prompt_len, max_tokens in (("a", 20, 5), ("b", 4, 30), ("c", 10, 10), ("d", 3, 3)):
        scheduler.add(
            make_request(name, prompt_len=prompt_len, max_tokens=max_tokens, ignore_eos=True)
        )
    assert starts(scheduler) == ["d", "c", "a", "b"]
    assert scheduler.parts.policy.counters() == {"overtakes": 2}


def test_lpm_serves_a_prefix_while_it_is_cached() -> None:
    scheduler = with_policy("lpm")
    stems = {"x": [7] * 16, "y": [8] * 16}
    for index, stem in enumerate("xyxyxy"):
        prompt = [*stems[stem], 20 + index]
        scheduler.add(make_request(f"{stem}{index}", prompt=prompt, max_tokens=2, ignore_eos=True))
    assert starts(scheduler) == ["x0", "x2", "x4", "y1", "y3", "y5"]
    counters = scheduler.parts.prefix_cache.counters()
    assert counters["hits"] == 4


def test_priority_rises_by_waiting() -> None:
    policy = component("policy", "priority", settings={"requests_per_level": 10})
    queue = WaitingQueue(policy)
    queue.push(make_request("first", priority=0))
    for index in range(30):
        queue.push(make_request(f"r{index}", priority=2))
    order = [queue.pop().request_id for _ in range(31)]
    # Twenty arrivals make up for two levels; who comes after them does not overtake.
    assert order.index("first") == 19
    assert order[:19] == [f"r{i}" for i in range(19)]


@pytest.mark.parametrize("between", [0, 1, 5])
def test_decode_first_spaces_starts(between: int) -> None:
    scheduler = make_scheduler(
        Choice(
            policy="decode_first",
            max_num_seqs=3,
            max_model_len=64,
            pool_tokens=256,
            settings={"policy": {"steps_between_prompts": between}},
        )
    )
    runner = FakeRunner(scheduler)
    runner.eos_rate = 0.0
    rng = random.Random(0)
    scheduler.add(make_request("long", max_tokens=60, ignore_eos=True))
    with_prompts: list[int] = []
    while "long" in scheduler.requests:
        if len(scheduler.waiting) < 4:
            name = f"r{rng.random()}"
            scheduler.add(make_request(name, max_tokens=rng.randint(1, 4), ignore_eos=True))
        plan, _ = runner.step()
        assert plan is not None
        if plan.new_requests:
            with_prompts.append(plan.step)
    gaps = [b - a for a, b in itertools.pairwise(with_prompts)]
    assert min(gaps) == between + 1
    assert max(gaps) <= between + 4, "held back for longer than it says"
    held_back = scheduler.parts.policy.counters()["held_back_steps"]
    assert (held_back > 0) == (between > 0)


def test_decode_first_holds_nobody_back_when_nothing_runs() -> None:
    scheduler = with_policy("decode_first", steps_between_prompts=50)
    for name in "abc":
        scheduler.add(make_request(name, max_tokens=2, ignore_eos=True))
    assert starts(scheduler, num_steps=7) == ["a", "b", "c"]


# -- the queue ------------------------------------------------------------------------------------


class _Latest(Policy):
    """The last to come goes first."""

    max_overtakes = 3

    def key(self, request: Request, arrival_index: int) -> int:
        return -arrival_index


def test_aborts_are_no_overtakes() -> None:
    policy = _Latest()
    queue = WaitingQueue(policy)
    for index in range(10):
        queue.push(make_request(f"r{index}"))
    for index in range(5, 9):
        queue.remove(f"r{index}")
    assert queue.pop().request_id == "r9"
    assert policy.num_overtakes == 1
    assert [queue.pop().request_id for _ in range(3)] == ["r4", "r3", "r0"]
    assert policy.num_overtakes == 3


def test_the_oldest_that_had_to_wait_counts_anew_for_the_next() -> None:
    queue = WaitingQueue(_Latest())
    for index in range(12):
        queue.push(make_request(f"r{index}"))
    order = [queue.pop().request_id for _ in range(12)]
    numbers = [11, 10, 9, 0, 8, 7, 6, 1, 5, 4, 3, 2]
    assert order == [f"r{i}" for i in numbers]


def test_a_preempted_request_stands_where_it_stood() -> None:
    queue = WaitingQueue(Fcfs())
    requests = [make_request(f"r{index}") for index in range(4)]
    for request in requests:
        queue.push(request)
    first, second = queue.pop(), queue.pop()
    for request in (second, first):
        request.num_preemptions += 1
        queue.push(request)
    assert [queue.pop().request_id for _ in range(4)] == ["r0", "r1", "r2", "r3"]


def test_a_preempted_request_is_found_however_often_it_comes_back() -> None:
    """Entries of its earlier waits must not show up, whatever their keys were."""
    policy = component("policy", "sjf")
    queue = WaitingQueue(policy)
    rng = random.Random(0)
    waiting: dict[str, Request] = {}
    out: dict[str, Request] = {}
    for step in range(3000):
        roll = rng.random()
        if roll < 0.3:
            request = make_request(f"r{step}", prompt_len=rng.randint(1, 9))
            queue.push(request)
            waiting[request.request_id] = request
        elif roll < 0.5 and out:
            request = out.pop(rng.choice(list(out)))
            request.num_preemptions += rng.random() < 0.3
            request.max_total_tokens = rng.randint(2, 30)  # so that its key is another
            queue.push(request)
            waiting[request.request_id] = request
        elif roll < 0.6 and waiting:
            name = rng.choice(list(waiting))
            assert queue.remove(name) is waiting.pop(name)
            assert queue.remove(name) is None
        elif waiting:
            shown = queue.peek()
            assert shown is not None
            wanted = min(waiting.values(), key=queue.place_of)
            assert shown is wanted or shown.is_overdue
            assert queue.pop() is shown
            out[shown.request_id] = waiting.pop(shown.request_id)
        assert len(queue) == len(waiting)


def test_a_window_is_asked_in_turn_and_the_winner_again() -> None:
    """A start asks a few, however many wait, and is never led by what was evicted meanwhile."""
    policy = component("policy", "lpm", settings={"window": 32})
    matched: dict[str, int] = {}
    asked: list[str] = []

    def match_length(request: Request) -> int:
        asked.append(request.request_id)
        return matched[request.request_id]

    queue = WaitingQueue(policy, match_length)
    rng = random.Random(0)
    for index in range(1000):
        matched[f"r{index}"] = rng.randrange(100)
        queue.push(make_request(f"r{index}"))
    first = queue.pop().request_id
    assert matched[first] == max(matched[f"r{i}"] for i in range(32))
    for _ in range(100):
        asked.clear()
        shown = queue.peek()
        assert shown is not None
        assert len(asked) <= 8 + 1 + 1, "in turn, new in the window, and the winner"
        assert asked[-1] == shown.request_id
        queue.pop()
    best = queue.peek()
    assert best is not None
    matched[best.request_id] = 0
    queue.push(make_request("another"))  # somebody may go next now
    matched["another"] = 0
    assert queue.peek() is not best
