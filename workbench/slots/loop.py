"""Slot ``loop``: in what order the host plans, runs and reads steps."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from workbench.core.step import ModelRunnerOutput, SchedulerOutput
from workbench.slots.component import Component
from workbench.slots.executor import Executor
from workbench.slots.scheduler import Scheduler


@dataclass(slots=True)
class FinishedStep:
    """A plan and what came of it."""

    plan: SchedulerOutput
    result: ModelRunnerOutput


class Loop(Component):
    """Drives scheduler and executor. All loops yield the same tokens."""

    @abstractmethod
    def step(self, scheduler: Scheduler, executor: Executor) -> FinishedStep | None:
        """Finish one step and return it, or None where nothing could be scheduled.

        The caller passes the result to ``Scheduler.update_from_output`` before the next call.
        """


class SyncLoop(Loop):
    """Plan, run, return: the null object."""

    def step(self, scheduler: Scheduler, executor: Executor) -> FinishedStep | None:
        plan = scheduler.schedule()
        if plan is None:
            return None
        try:
            return FinishedStep(plan, executor.execute(plan))
        except BaseException:
            scheduler.plan_failed(plan)
            raise
