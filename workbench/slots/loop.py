"""Slot ``loop``: in what order the host plans, runs and reads steps."""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass

from workbench.core.step import ModelRunnerOutput, SchedulerOutput
from workbench.slots.component import Component
from workbench.slots.executor import Executor
from workbench.slots.scheduler import Scheduler
from workbench.slots.step_plan import RequestUpdate


@dataclass(slots=True)
class FinishedStep:
    """A plan and what came of it.

    Attributes
    ----------
    updates
        What changed, where the scheduler has booked it already.
    spans
        Parts of the step that the loop saw: name, begin and end (``perf_counter``).
    ahead_s
        Seconds of the call that went into the step that follows.
    """

    plan: SchedulerOutput
    result: ModelRunnerOutput
    updates: list[RequestUpdate] | None = None
    spans: tuple[tuple[str, float, float], ...] = ()
    ahead_s: float = 0.0


class Loop(Component):
    """Drives scheduler and executor. All loops yield the same tokens."""

    #: Whether it plans a step before the tokens of the one before it are known, so that nothing
    #: that depends on them, such as drafts, can be part of the plan.
    plans_ahead: bool = False

    @abstractmethod
    def step(self, scheduler: Scheduler, executor: Executor) -> FinishedStep | None:
        """Finish one step and return it, or None where nothing could be scheduled.

        Where ``updates`` is None, the caller passes the result to ``Scheduler.update_from_output``
        before the next call.
        """


class SyncLoop(Loop):
    """Plan, run, return: the null object."""

    def step(self, scheduler: Scheduler, executor: Executor) -> FinishedStep | None:
        began = time.perf_counter()
        plan = scheduler.schedule()
        if plan is None:
            return None
        spans = (("schedule", began, time.perf_counter()),)
        try:
            return FinishedStep(plan, executor.execute(plan), spans=spans)
        except BaseException:
            scheduler.plan_failed(plan)
            raise
