"""Contracts of policy, admission, prefill, loop and executor."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.helpers.engines import component
from tests.helpers.fake_runner import Choice, FakeRunner, make_request, make_scheduler
from workbench.configuration import options_of
from workbench.core.request import FinishReason, Request
from workbench.core.step import ModelRunnerOutput, SchedulerOutput
from workbench.slots.executor import InProcess, Ran
from workbench.slots.loop import FinishedStep
from workbench.slots.policy import WaitingQueue
from workbench.slots.scheduler import Scheduler


def some_requests(count: int = 12) -> list[Request]:
    rng = random.Random(0)
    requests = [
        make_request(f"r{i}", prompt_len=rng.randint(1, 9), max_tokens=rng.randint(1, 9))
        for i in range(count)
    ]
    for request in requests:
        request.priority = rng.randint(0, 3)
    return requests


def state_of(request: Request) -> tuple[object, ...]:
    return tuple(getattr(request, name) for name in Request.__slots__)


@pytest.mark.parametrize("option", options_of("engine/policy"))
class TestPolicy:
    def test_keys_order_every_pair_and_change_nothing(self, option: str) -> None:
        policy = component("policy", option)
        requests = some_requests()
        before = [state_of(r) for r in requests]
        keys = [policy.key(r, i) for i, r in enumerate(requests)]
        for a, b in itertools.combinations(keys, 2):
            assert (a < b) + (b < a) + (a == b) == 1
        assert [state_of(r) for r in requests] == before
        assert keys == [policy.key(r, i) for i, r in enumerate(requests)]

    def test_queue_hands_out_in_the_order_of_the_keys(self, option: str) -> None:
        policy = component("policy", option)
        queue = WaitingQueue(policy)
        requests = some_requests()
        for request in requests:
            queue.push(request)
        assert len(queue) == len(requests)
        gone = {requests[3].request_id, requests[7].request_id}
        for name in gone:
            assert queue.remove(name) is not None
            assert queue.remove(name) is None
        order = sorted(range(len(requests)), key=lambda i: (policy.key(requests[i], i), i))
        expected = [requests[i].request_id for i in order if requests[i].request_id not in gone]
        popped = []
        while len(queue):
            shown = queue.peek()
            popped.append(queue.pop())
            assert shown is popped[-1]
        assert [r.request_id for r in popped] == expected
        assert queue.peek() is None


@pytest.mark.parametrize("option", options_of("engine/admission"))
def test_admission_reserves_at_least_the_prompt_and_at_most_the_end(option: str) -> None:
    admission = component("admission", option)
    for request in some_requests():
        reserved = admission.reserve_tokens(request)
        assert request.num_prompt_tokens <= reserved <= request.max_total_tokens


def test_reserve_full_reserves_all_that_a_request_may_become() -> None:
    admission = component("admission", "reserve_full")
    assert [admission.reserve_tokens(r) for r in some_requests()] == [
        r.num_prompt_tokens + r.sampling.max_tokens for r in some_requests()
    ]


@pytest.mark.parametrize("option", options_of("engine/prefill"))
class TestPrefill:
    def test_answers_stay_within_their_bounds(self, option: str) -> None:
        prefill = component("prefill", option)
        for outstanding, budget, empty in itertools.product(
            [1, 2, 7, 100, 5000], [1, 3, 256, 8192], [False, True]
        ):
            tokens = prefill.num_tokens(outstanding, budget, empty)
            assert 0 <= tokens <= outstanding
            if not empty:
                assert tokens <= budget, "over the budget beside others"

    def test_one_token_always_fits_and_an_empty_step_is_never_left_empty(self, option: str) -> None:
        prefill = component("prefill", option)
        assert prefill.num_tokens(1, 1, False) == 1
        for outstanding in (1, 10, 10_000):
            assert prefill.num_tokens(outstanding, 5, True) >= 1

    def test_budget_is_no_more_than_the_engine_s(self, option: str) -> None:
        prefill = component("prefill", option)
        for limit in (1, 64, 100_000):
            assert 1 <= prefill.token_budget(limit) <= limit

    def test_every_prompt_gets_through(self, option: str) -> None:
        prefill = component("prefill", option)
        for length in (1, 99, 1000, 9001):
            left, steps = length, 0
            while left:
                left -= prefill.num_tokens(left, prefill.token_budget(8192), True)
                steps += 1
                assert steps <= length


def test_whole_prompt_never_splits_and_chunked_fills_the_budget() -> None:
    whole = component("prefill", "whole_prompt")
    assert [whole.num_tokens(n, 10, False) for n in (9, 10, 11)] == [9, 10, 0]
    assert whole.num_tokens(11, 10, True) == 11
    chunked = component("prefill", "chunked", settings={"chunk_tokens": 10})
    assert chunked.token_budget(8192) == 10
    assert [chunked.num_tokens(n, 10, e) for n in (9, 11) for e in (False, True)] == [9, 9, 10, 10]
    with pytest.raises(ValueError, match="chunk_tokens"):
        component("prefill", "chunked", settings={"chunk_tokens": 0})


def book(scheduler: Scheduler, done: FinishedStep) -> None:
    """As the engine does."""
    if done.updates is None:
        scheduler.update_from_output(done.plan, done.result)


@pytest.mark.parametrize("option", options_of("engine/loop"))
class TestLoop:
    def test_every_step_is_planned_run_and_returned_once(self, option: str) -> None:
        scheduler = make_scheduler(Choice())
        loop = component("loop", option)
        runner = FakeRunner(scheduler, max_drafts=2)
        executor = InProcess(runner=runner)
        for index in range(9):
            scheduler.add(make_request(f"r{index}", prompt_len=3 + index, max_tokens=5))
        steps = []
        while scheduler.has_unfinished():
            done = loop.step(scheduler, executor)
            assert done is not None
            assert len(done.result.token_ids) == len(done.plan.request_ids)
            steps.append(done.plan.step)
            book(scheduler, done)
            scheduler.check_integrity()
        assert steps == list(range(len(steps)))
        assert loop.step(scheduler, executor) is None

    def test_what_a_failed_step_was_to_free_is_told_again(self, option: str) -> None:
        """An interrupt before the runner saw the plan must not leave rows taken for ever."""
        scheduler = make_scheduler(Choice())
        runner = FakeRunner(scheduler)
        runner.eos_rate = 0.0
        loop, executor = component("loop", option), _Failing(runner)
        for name, length in (("short", 1), ("long", 9)):
            scheduler.add(make_request(name, max_tokens=length, ignore_eos=True))
        done = loop.step(scheduler, executor)
        assert done is not None
        book(scheduler, done)
        executor.fail = True
        with pytest.raises(KeyboardInterrupt):
            for _ in range(2):  # a loop that plans ahead has a step to return first
                done = loop.step(scheduler, executor)
                assert done is not None
                book(scheduler, done)
        executor.fail = False
        for name in list(scheduler.requests):
            scheduler.finish(name, FinishReason.ABORT)
        scheduler.add(make_request("after"))
        assert loop.step(scheduler, executor) is not None
        assert set(runner.num_known) == {"after"}


class _Failing(InProcess):
    """Raises before the runner sees the plan."""

    fail = False

    def __init__(self, runner: FakeRunner) -> None:
        super().__init__(runner=runner)

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        if self.fail:
            raise KeyboardInterrupt
        return super().execute(plan)

    def submit(self, plan: SchedulerOutput) -> Ran:
        return Ran(self.execute(plan))


@pytest.mark.parametrize("option", options_of("engine/executor"))
def test_executor_hands_the_plan_over_unchanged(option: str) -> None:
    scheduler = make_scheduler(Choice())
    runner = FakeRunner(scheduler)
    scheduler.add(make_request("r"))
    plan = scheduler.schedule()
    assert plan is not None
    before = repr(plan)
    result = component("executor", option, runner=runner).execute(plan)
    assert repr(plan) == before
    assert len(result.token_ids) == 1
    assert runner.num_known == {"r": 5}
