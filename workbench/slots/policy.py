"""Slot ``policy``: who among the waiting goes first."""

from __future__ import annotations

import heapq
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


class WaitingQueue:
    """Requests ordered by a policy's key; O(log n) in and out, O(1) removal (lazy)."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[tuple[Any, int, Request]] = []
        self._live: dict[str, Request] = {}
        self._arrivals = 0

    def push(self, request: Request) -> None:
        """Add a request."""
        self._live[request.request_id] = request
        key = self._policy.key(request, self._arrivals)
        heapq.heappush(self._heap, (key, self._arrivals, request))
        self._arrivals += 1

    def peek(self) -> Request | None:
        """The request that goes next, or None."""
        while self._heap and self._live.get(self._heap[0][2].request_id) is not self._heap[0][2]:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Request:
        """Take the request that :meth:`peek` shows."""
        request = self.peek()
        assert request is not None, "pop from an empty queue"
        heapq.heappop(self._heap)
        del self._live[request.request_id]
        return request

    def remove(self, request_id: str) -> Request | None:
        """Take a request out wherever it stands; None if it is not here."""
        return self._live.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._live)
