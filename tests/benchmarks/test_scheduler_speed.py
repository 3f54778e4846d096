"""Host time of ``schedule()``: 256 requests run, 10,000 wait.

``make bench`` runs them. ``tests/contract/test_scheduler_cost.py`` counts the same work without a
clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.busy_scheduler import NUM_RUNNING, NUM_WAITING, BusyScheduler
from tests.helpers.fake_runner import make_request
from workbench.configuration import options_of
from workbench.core.request import FinishReason

LIMIT_S = 150e-6
POLICIES = options_of("engine/policy")


def timed(benchmark: Any, busy: BusyScheduler, change: Callable[[], None], rounds: int) -> None:
    """Time ``schedule()`` alone, with ``change`` before and the results' books after it."""

    def setup() -> None:
        busy.finish_step()
        change()

    benchmark.pedantic(busy.plan_step, setup=setup, rounds=rounds)
    busy.finish_step()
    busy.scheduler.check_integrity()
    benchmark.extra_info["median_us"] = benchmark.stats.stats.median * 1e6
    assert benchmark.stats.stats.median < LIMIT_S


@pytest.mark.parametrize("cache", options_of("engine/prefix_cache"))
@pytest.mark.parametrize("policy", POLICIES)
def test_steady_step(benchmark: Any, policy: str, cache: str) -> None:
    """Nobody comes or goes; over a block's length, every request needs one block."""
    busy = BusyScheduler.build(policy, cache)
    timed(benchmark, busy, lambda: None, rounds=320)


@pytest.mark.parametrize("cache", options_of("engine/prefix_cache"))
@pytest.mark.parametrize("policy", POLICIES)
def test_one_ends_and_one_joins(benchmark: Any, policy: str, cache: str) -> None:
    busy = BusyScheduler.build(policy, cache)
    started = busy.scheduler.counters()["admitted"]
    timed(benchmark, busy, busy.end_one, rounds=300)
    assert busy.scheduler.counters()["admitted"] >= started + 290


@pytest.mark.parametrize("policy", POLICIES)
def test_adding_and_aborting_with_many_waiting(benchmark: Any, policy: str) -> None:
    """Off the step's path, but a server does it between steps."""
    busy = BusyScheduler.build(policy, "none")
    rng = random.Random(0)

    def add_and_abort() -> None:
        for index in range(100):
            busy.scheduler.add(make_request(f"x{index}", prompt_len=rng.randint(4, 64)))
        for index in range(100):
            busy.scheduler.finish(f"x{index}", FinishReason.ABORT)

    benchmark.pedantic(add_and_abort, rounds=20)
    assert len(busy.scheduler.waiting) == NUM_WAITING
    assert len(busy.scheduler.running) == NUM_RUNNING
    assert benchmark.stats.stats.median / 200 < LIMIT_S / 3
