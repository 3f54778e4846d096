"""Iteration-level scheduling (Orca, Yu et al., OSDI 2022, section 3.1)."""

from __future__ import annotations

from workbench.slots.scheduler import Scheduler


class ContinuousScheduler(Scheduler):
    """A waiting request joins as soon as there is a row, KV and budget for it."""

    def _may_admit(self) -> bool:
        return True
