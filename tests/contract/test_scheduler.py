"""Contract of slot ``scheduler`` with every ``prefill`` and ``kv_cache``: traffic, no model."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.helpers.fake_runner import Choice, FakeRunner, make_request, make_scheduler
from workbench.configuration import options_of
from workbench.core.errors import ConfigError, RequestError
from workbench.core.request import FinishReason, Request, RequestStatus
from workbench.core.step import SchedulerOutput
from workbench.slots.scheduler import Scheduler

SCHEDULERS = options_of("engine/scheduler")
COMBINATIONS = list(
    itertools.product(
        SCHEDULERS,
        options_of("engine/prefill"),
        options_of("engine/kv_cache"),
        options_of("engine/admission"),
    )
)
MAX_LEN = 32
BUDGET = 12

combinations = pytest.mark.parametrize(
    ("scheduler", "prefill", "kv_cache", "admission"), COMBINATIONS
)


def choice(
    scheduler: str, prefill: str, kv_cache: str, admission: str, budget: int = BUDGET
) -> Choice:
    return Choice(
        scheduler=scheduler,
        prefill=prefill,
        kv_cache=kv_cache,
        admission=admission,
        max_model_len=MAX_LEN,
        pool_tokens=3 * MAX_LEN,
        settings={
            "scheduler": {"max_num_batched_tokens": budget},
            **({"prefill": {"chunk_tokens": budget - 2}} if prefill == "chunked" else {}),
            **({"kv_cache": {"block_size": 4}} if kv_cache == "paged" else {}),
        },
    )


def check_budget(scheduler: Scheduler, plan: SchedulerOutput) -> None:
    """A step keeps to the budget, but for one prompt that is longer and then runs alone."""
    total = plan.total_num_scheduled_tokens
    if total > scheduler.token_budget:
        assert len(plan.request_ids) == 1, "over the budget with company"
        assert plan.new_requests, "over the budget without a new prompt"


class Traffic:
    """Arrivals, aborts in every state, ends; and what is owed to each request."""

    def __init__(self, scheduler: Scheduler, seed: int, max_drafts: int) -> None:
        self.rng = random.Random(seed)
        self.scheduler = scheduler
        self.runner = FakeRunner(scheduler, seed, max_drafts)
        self.live: dict[str, Request] = {}
        self.done: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.idle_steps: dict[str, int] = {}
        self.count = 0

    def arrive(self) -> None:
        request = make_request(
            f"r{self.count}",
            prompt_len=self.rng.randint(1, MAX_LEN - 1),
            max_tokens=self.rng.randint(1, 20),
            ignore_eos=self.rng.random() < 0.5,
            stop_token_ids=(99,),
        )
        self.count += 1
        self.scheduler.add(request)
        self.live[request.request_id] = request
        self.tokens[request.request_id] = []

    def abort(self) -> None:
        """Abort one that waits, runs or has drafts, or one that ended long ago."""
        name = self.rng.choice([*self.live, *list(self.done)[-3:], "never seen"])
        ended = self.scheduler.finish(name, FinishReason.ABORT)
        assert (ended is not None) == (name in self.live)
        if ended is not None:
            assert ended.finish_reason is FinishReason.ABORT
            self.done[name] = self.live.pop(name)

    def step(self) -> None:
        running = dict(self.scheduler.running)
        plan, updates = self.runner.step()
        if plan is None:
            assert not self.scheduler.running, "somebody runs, yet nothing was scheduled"
            return
        check_budget(self.scheduler, plan)
        self._check_nobody_starves(plan, running)
        for update in updates:
            request = update.request
            name = request.request_id
            assert update.new_token_ids, "an update without a token"
            self.tokens[name] += update.new_token_ids
            assert self.tokens[name] == request.output_token_ids
            if request.is_finished:
                self.done[name] = self.live.pop(name)
                self._check_end(request)
            else:
                room = request.max_total_tokens - request.num_tokens - 1
                assert len(request.draft_token_ids) <= room, "drafts past the request's end"

    def _check_nobody_starves(self, plan: SchedulerOutput, running: dict[str, Request]) -> None:
        """Every running request moves in every step."""
        for name in running:
            assert name in plan.request_ids, f"{name} runs, but was left out of the step"

    def _check_end(self, request: Request) -> None:
        assert request.num_tokens <= request.max_total_tokens <= MAX_LEN
        output, sampling = request.output_token_ids, request.sampling
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else request.eos_token_ids)}
        assert not stops & set(output[:-1]), "tokens after the end"
        if output[-1] in stops:
            assert request.finish_reason is FinishReason.STOP
        else:
            assert request.finish_reason is FinishReason.LENGTH
            assert request.num_tokens == request.max_total_tokens

    def drain(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_unfinished():
                break
            self.step()
        assert not self.live, f"never finished: {list(self.live)}"
        usage = self.scheduler.parts.kv_cache.usage()
        assert (usage.allocated_tokens, usage.used_tokens) == (0, 0)
        assert not self.scheduler.running
        assert not self.scheduler.has_unfinished()
        assert self.scheduler.schedule() is None


@combinations
@pytest.mark.parametrize("max_drafts", [0, 5])
@pytest.mark.parametrize("seed", range(4))
def test_random_traffic(
    scheduler: str, prefill: str, kv_cache: str, admission: str, max_drafts: int, seed: int
) -> None:
    traffic = Traffic(
        make_scheduler(choice(scheduler, prefill, kv_cache, admission)), seed, max_drafts
    )
    for _ in range(150):
        roll = traffic.rng.random()
        if roll < 0.45:
            traffic.arrive()
        elif roll < 0.52:
            traffic.abort()
        traffic.step()
    assert traffic.count > 40
    traffic.drain()
    reasons = {request.finish_reason for request in traffic.done.values()}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT}
    assert (traffic.runner.accepted > 0) == (max_drafts > 0)
    # The plan after the last end tells it, so that no row stays taken.
    traffic.arrive()
    traffic.step()
    assert set(traffic.runner.num_known) <= {f"r{traffic.count - 1}"}


@combinations
def test_aborting_everything_at_any_moment_leaves_nothing(
    scheduler: str, prefill: str, kv_cache: str, admission: str
) -> None:
    for moment in range(12):
        traffic = Traffic(
            make_scheduler(choice(scheduler, prefill, kv_cache, admission)), moment, 3
        )
        for _ in range(8):
            traffic.arrive()
        for _ in range(moment):
            traffic.step()
        for name in list(traffic.live):
            traffic.scheduler.finish(name, FinishReason.ABORT)
            traffic.scheduler.check_integrity()
            traffic.live.pop(name)
        traffic.drain()


@combinations
def test_first_come_is_admitted_first(
    scheduler: str, prefill: str, kv_cache: str, admission: str
) -> None:
    traffic = Traffic(make_scheduler(choice(scheduler, prefill, kv_cache, admission)), 3, 2)
    started: list[str] = []
    execute = traffic.runner._apply

    def spy(plan: SchedulerOutput) -> None:
        started.extend(new.request_id for new in plan.new_requests)
        execute(plan)

    traffic.runner._apply = spy  # type: ignore[method-assign]
    for _ in range(20):
        traffic.arrive()
    traffic.drain()
    assert started == [f"r{i}" for i in range(20)]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("prefill", options_of("engine/prefill"))
def test_drafts_of_one_request_never_leave_another_out(scheduler: str, prefill: str) -> None:
    """Drafts are optional: with a budget of one token a row, every row still gets its token."""
    built = make_scheduler(
        Choice(
            scheduler=scheduler,
            prefill=prefill,
            max_num_seqs=4,
            max_model_len=64,
            pool_tokens=512,
            settings={
                "scheduler": {"max_num_batched_tokens": 4},
                **({"prefill": {"chunk_tokens": 4}} if prefill == "chunked" else {}),
            },
        )
    )
    runner = FakeRunner(built, max_drafts=6)
    runner.eos_rate = 0.0
    for index in range(4):
        built.add(make_request(f"r{index}", prompt_len=1, max_tokens=40, ignore_eos=True))
    while len(built.running) < 4:
        runner.step()
    for _ in range(10):
        plan, _ = runner.step()
        assert plan is not None
        assert plan.request_ids == [f"r{i}" for i in range(4)]
        assert plan.total_num_scheduled_tokens <= 4


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_budget_under_one_token_a_row_is_refused(scheduler: str) -> None:
    with pytest.raises(ConfigError, match="max_num_seqs=4"):
        make_scheduler(
            Choice(scheduler=scheduler, settings={"scheduler": {"max_num_batched_tokens": 3}})
        )


@combinations
def test_requests_that_can_never_be_held_are_refused(
    scheduler: str, prefill: str, kv_cache: str, admission: str
) -> None:
    built = make_scheduler(choice(scheduler, prefill, kv_cache, admission))
    with pytest.raises(RequestError, match=f"context of {MAX_LEN}"):
        built.add(make_request("long", prompt_len=MAX_LEN))
    built.add(make_request("fits", prompt_len=MAX_LEN - 1))
    with pytest.raises(RequestError, match="in use already"):
        built.add(make_request("fits"))
    assert len(built.waiting) == 1
    built.check_integrity()


def test_pool_smaller_than_one_request_is_told() -> None:
    built = make_scheduler(Choice(pool_tokens=16))
    with pytest.raises(RequestError, match="pool of 16 tokens"):
        built.add(make_request("big", prompt_len=10, max_tokens=10))
    built.add(make_request("small", prompt_len=10, max_tokens=6))
    assert FakeRunner(built).step()[0] is not None
    assert list(built.requests) == ["small"]


@combinations
def test_output_is_clipped_to_the_context(
    scheduler: str, prefill: str, kv_cache: str, admission: str
) -> None:
    traffic = Traffic(make_scheduler(choice(scheduler, prefill, kv_cache, admission)), 0, 4)
    traffic.runner.eos_rate = 0.0
    request = make_request("r", prompt_len=20, max_tokens=1000, ignore_eos=True)
    traffic.scheduler.add(request)
    traffic.live["r"], traffic.tokens["r"] = request, []
    traffic.drain()
    assert request.num_tokens == MAX_LEN
    assert request.finish_reason is FinishReason.LENGTH
    assert request.status is RequestStatus.FINISHED


def test_id_can_be_used_again_right_after_an_abort() -> None:
    built = make_scheduler(Choice())
    runner = FakeRunner(built)
    built.add(make_request("again"))
    runner.step()
    built.finish("again", FinishReason.ABORT)
    built.add(make_request("again", prompt_len=7))
    plan, _ = runner.step()
    assert plan is not None
    assert plan.finished_request_ids == ["again"]
    assert [new.request_id for new in plan.new_requests] == ["again"]
    assert runner.num_known["again"] == 8


def test_static_batch_closes_and_counts_idle_rows() -> None:
    built = make_scheduler(Choice(scheduler="static_batch", max_num_seqs=2))
    runner = FakeRunner(built)
    runner.eos_rate = 0.0
    for name, length in (("short", 1), ("long", 6), ("next", 1)):
        built.add(make_request(name, max_tokens=length, ignore_eos=True))
    batches = []
    while built.has_unfinished():
        plan, _ = runner.step()
        assert plan is not None
        batches.append((plan.request_ids, plan.num_idle_rows))
    assert batches == [(["short", "long"], 0), *[(["long"], 1)] * 5, (["next"], 0)]


def test_continuous_joins_while_others_run() -> None:
    built = make_scheduler(Choice(scheduler="continuous", max_num_seqs=2))
    runner = FakeRunner(built)
    runner.eos_rate = 0.0
    for name, length in (("short", 1), ("long", 6), ("next", 1)):
        built.add(make_request(name, max_tokens=length, ignore_eos=True))
    batches = []
    while built.has_unfinished():
        plan, _ = runner.step()
        assert plan is not None
        batches.append(plan.request_ids)
    assert batches == [["short", "long"], ["long", "next"], *[["long"]] * 4]
    assert built.counters()["joins_while_others_run"] == 1
