"""Slot ``policy``: who among the waiting goes first."""

from __future__ import annotations

import heapq
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from typing import Any

from workbench.core.request import Request
from workbench.slots.component import Component


class Policy(Component):
    """Order of the waiting queue, apart from the mechanism that keeps it.

    The same order says who is pre-empted: the last.
    """

    #: Requests that may start before one that arrived earlier than they did and could start as
    #: well; then that one goes first. So nothing starves, whatever the order.
    max_overtakes: int = 256
    #: Over 0, keys change while requests wait: at each admission the first so many by arrival are
    #: asked for their keys again, with ``num_matched_tokens`` brought up to date.
    window: int = 0

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
    """Requests ordered by a policy's key; O(log n) in and out, O(1) removal (lazy).

    Requests that were pre-empted go before all that never started.

    Parameters
    ----------
    match_length
        Tokens of a request that a prefix cache holds now, for policies that order by it.
    """

    def __init__(
        self, policy: Policy, match_length: Callable[[Request], int] | None = None
    ) -> None:
        self._policy = policy
        self._match_length = match_length
        self._heap: list[tuple[Any, int, Request]] = []
        self._new: OrderedDict[str, Request] = OrderedDict()  # by arrival
        self._again: dict[str, Request] = {}  # pre-empted: a few
        self._chosen: Request | None = None
        self._num_arrivals = 0
        self._num_overtakes = 0  # starts ahead of the oldest since it became the oldest

    def key(self, request: Request) -> tuple[bool, Any, int]:
        """Where a request stands: the smallest goes first, the largest is pre-empted first."""
        index = request.arrival_index
        return request.num_preemptions == 0, self._policy.key(request, index), index

    def push(self, request: Request) -> None:
        """Add a request, new or pre-empted."""
        self._chosen = None
        if request.num_preemptions:
            self._again[request.request_id] = request
            return
        request.arrival_index = index = self._num_arrivals
        self._num_arrivals += 1
        self._new[request.request_id] = request
        if not self._policy.window:
            heapq.heappush(self._heap, (self._policy.key(request, index), index, request))

    def peek(self) -> Request | None:
        """The request that goes next, or None."""
        if self._chosen is None:
            self._chosen = self._choose()
        return self._chosen

    def _choose(self) -> Request | None:
        if self._again:
            return min(self._again.values(), key=self.key)
        if not self._new:
            return None
        if self._num_overtakes >= self._policy.max_overtakes:
            return next(iter(self._new.values()))
        if self._policy.window:
            return self._choose_in_window()
        heap = self._heap
        while self._new.get(heap[0][2].request_id) is not heap[0][2]:
            heapq.heappop(heap)
        return heap[0][2]

    def _choose_in_window(self) -> Request:
        first = list(islice(self._new.values(), self._policy.window))
        if self._match_length is not None:
            for request in first:
                request.num_matched_tokens = self._match_length(request)
        return min(first, key=self.key)

    def pop(self) -> Request:
        """Take the request that :meth:`peek` shows."""
        request = self.peek()
        assert request is not None, "pop from an empty queue"
        self.remove(request.request_id)
        return request

    def remove(self, request_id: str) -> Request | None:
        """Take a request out wherever it stands; None if it is not here."""
        self._chosen = None
        request = self._again.pop(request_id, None)
        if request is not None:
            return request
        if request_id not in self._new:
            return None
        if next(iter(self._new)) == request_id:
            self._num_overtakes = 0
        else:
            self._num_overtakes += 1
        request = self._new.pop(request_id)
        if len(self._heap) > 2 * len(self._new) + 64:  # most are gone: keep what is live
            self._heap = [e for e in self._heap if self._new.get(e[2].request_id) is e[2]]
            heapq.heapify(self._heap)
        return request

    def __len__(self) -> int:
        return len(self._new) + len(self._again)
