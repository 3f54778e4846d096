"""Slot ``executor``: where the model runner lives."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

from workbench.core.step import ModelRunnerOutput, SchedulerOutput
from workbench.slots.component import Component


class Runner(Protocol):
    """What an executor drives."""

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step."""
        ...


class Executor(Component):
    """Carries a step's plan to the runner or runners and brings the result back."""

    @abstractmethod
    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step. The plan is plain data and is not mutated."""


class InProcess(Executor):
    """Calls the runner in this process: the null object."""

    def __init__(self, config: object = None, *, runner: Runner) -> None:
        super().__init__(config)
        self.runner = runner

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        return self.runner.execute(plan)
