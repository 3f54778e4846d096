"""Contract of slot ``scheduler`` with every ``prefill`` and ``kv_cache``: traffic, no model."""

from __future__ import annotations

import itertools

import pytest

from tests.helpers.fake_runner import Choice, FakeRunner, make_request, make_scheduler
from tests.helpers.traffic import Traffic
from workbench.configuration import options_of
from workbench.core.errors import ConfigError, RequestError
from workbench.core.request import FinishReason, RequestStatus

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


@combinations
@pytest.mark.parametrize("max_drafts", [0, 5])
@pytest.mark.parametrize("seed", range(2))
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
        traffic.step(abort_meanwhile=traffic.rng.random() < 0.05)
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
        traffic.check_nothing_is_held()


@combinations
def test_first_come_is_admitted_first(
    scheduler: str, prefill: str, kv_cache: str, admission: str
) -> None:
    traffic = Traffic(make_scheduler(choice(scheduler, prefill, kv_cache, admission)), 3, 2)
    for _ in range(20):
        traffic.arrive()
    traffic.drain()
    assert traffic.started == [f"r{i}" for i in range(20)]


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
        assert sorted(plan.request_ids) == [f"r{i}" for i in range(4)]
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


def test_a_chunk_under_one_token_a_row_is_refused() -> None:
    settings = {"prefill": {"chunk_tokens": 3}}
    with pytest.raises(ConfigError, match=r"budget of 3 .*max_num_seqs=4.*chunk_tokens"):
        make_scheduler(Choice(prefill="chunked", max_num_seqs=4, settings=settings))


@pytest.mark.parametrize("admission", options_of("engine/admission"))
def test_pool_smaller_than_one_request_is_told(admission: str) -> None:
    built = make_scheduler(Choice(pool_tokens=16, admission=admission))
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
    traffic.arrive(request)
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


def test_an_id_may_come_back_while_the_step_of_its_last_bearer_runs() -> None:
    for max_drafts in (0, 3):
        built = make_scheduler(Choice())
        runner = FakeRunner(built, max_drafts=max_drafts)
        runner.eos_rate = 0.0
        for name in ("again", "other"):
            built.add(make_request(name, max_tokens=9, ignore_eos=True))
        runner.step()
        plan = built.schedule()
        assert plan is not None
        result = runner.execute(plan)
        built.finish("again", FinishReason.ABORT)
        built.add(make_request("again", prompt_len=7))
        updates = built.update_from_output(plan, result)
        assert [u.request.request_id for u in updates] == ["other"]
        assert built.requests["again"].output_token_ids == []
        built.check_integrity()
        plan, _ = runner.step()
        assert plan is not None
        assert plan.finished_request_ids == ["again"]
        assert [new.request_id for new in plan.new_requests] == ["again"]


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
