"""Slot ``executor``: where the model runner lives."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

from workbench.core.step import ModelRunnerOutput, SchedulerOutput
from workbench.slots.component import Component


class Running(Protocol):
    """A step that was queued."""

    @property
    def is_read_first(self) -> bool:
        """Whether the next step must not be planned before this one's tokens are read, since drafts
        may follow them."""
        ...

    def result(self) -> ModelRunnerOutput:
        """Wait for it. To be called once, in the order in which steps were queued."""
        ...


@dataclass(frozen=True, slots=True)
class Ran:
    """A step that has run already."""

    output: ModelRunnerOutput

    @property
    def is_read_first(self) -> bool:
        """Whether drafts did follow."""
        return any(self.output.draft_token_ids)

    def result(self) -> ModelRunnerOutput:
        """What came of it."""
        return self.output


class Runner(Protocol):
    """What an executor drives."""

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step."""
        ...

    def submit(self, plan: SchedulerOutput) -> Running:
        """Queue one step, without waiting for its tokens."""
        ...


class Executor(Component):
    """Carries a step's plan to the runner or runners and brings the result back."""

    @abstractmethod
    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step. The plan is plain data and is not mutated."""

    def submit(self, plan: SchedulerOutput) -> Running:
        """Queue one step behind those queued before. One that cannot queue runs it now."""
        return Ran(self.execute(plan))


class InProcess(Executor):
    """Calls the runner in this process: the null object."""

    def __init__(self, config: object = None, *, runner: Runner) -> None:
        super().__init__(config)
        self.runner = runner

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        return self.runner.execute(plan)

    def submit(self, plan: SchedulerOutput) -> Running:
        return self.runner.submit(plan)
