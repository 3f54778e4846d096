"""Slot ``policy``: who among the waiting goes first."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from workbench.core.request import Request
from workbench.slots.component import Component


class Policy(Component):
    """Order of the waiting queue, apart from the mechanism that keeps it."""

    @abstractmethod
    def key(self, request: Request, arrival_index: int) -> Any:
        """Return a sortable key; the smallest goes first.

        Must not mutate the request, and must return keys comparable with each other.
        """


class Fcfs(Policy):
    """First come, first served: the null object."""

    def key(self, request: Request, arrival_index: int) -> Any:
        return arrival_index
