"""Slot ``policy``: who among the waiting goes first."""

from __future__ import annotations

import heapq
from abc import abstractmethod
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from operator import attrgetter
from typing import Any, TypeAlias

from workbench.core.request import Request
from workbench.slots.component import Component

#: Requests of a window that are asked anew at each start, beside those never asked.
_NUM_ASKED = 8
_by_arrival = attrgetter("arrival_index")


class Policy(Component):
    """Order of the waiting queue, apart from the mechanism that keeps it.

    The same order says who is pre-empted: the last of those that run. A pre-empted request waits
    where it stood, with its first place in the order of arrival.
    """

    #: Requests that may start before the oldest that waits, counted since it became the oldest;
    #: then that one goes next. So nothing starves: a request that finds ``a`` older ones waiting
    #: starts after ``(a + 1) * (max_overtakes + 1)`` others at the latest.
    max_overtakes: int = 256
    #: A request that was pre-empted so many times, or that started by right of age, goes before
    #: all others from then on and is pre-empted last. So nothing that started starves either.
    max_preemptions: int = 8
    #: Over 0, the order is one of ``num_matched_tokens``, which changes while requests wait: at
    #: each start the first so many by arrival are compared, of the pre-empted and of the new ones
    #: each. Some are asked anew in turn, and the one that comes out first is. Even who goes before
    #: all others must be among them.
    window: int = 0
    #: Whether the order is one of what a prefix cache holds, so that it means nothing without one.
    needs_prefix_cache: bool = False
    #: Starts ahead of an older request that waited; the queue counts them.
    num_overtakes: int = 0

    @abstractmethod
    def key(self, request: Request, arrival_index: int) -> Any:
        """Return a sortable key; the smallest goes first.

        Must not mutate the request, and must return keys comparable with each other.
        """

    def holds_back(self, num_steps_without_prompts: int) -> bool:
        """Whether nobody starts in this step, though there is a row for it.

        Asked only while others run, with how many steps in a row have run no prompt tokens. Must
        turn False as that number grows.
        """
        return False

    def counters(self) -> dict[str, float]:
        return {"overtakes": self.num_overtakes}

    def reset_counters(self) -> None:
        self.num_overtakes = 0


class Fcfs(Policy):
    """First come, first served: the null object."""

    def key(self, request: Request, arrival_index: int) -> Any:
        return arrival_index


#: What the order compares: by right of age or by key, then by arrival.
Rank: TypeAlias = tuple[bool, Any, int]


class WaitingQueue:
    """Requests ordered by a policy's key; O(log n) in, O(log n) out, O(1) removal (lazy).

    Parameters
    ----------
    match_length
        Tokens of a request that a prefix cache holds now, for policies that order by it.
    """

    def __init__(
        self, policy: Policy, match_length: Callable[[Request], int] = lambda request: 0
    ) -> None:
        self._policy = policy
        self._match_length = match_length
        #: By id; an entry of the heap that is not here any more is skipped.
        self._live: dict[str, tuple[Rank | None, Request]] = {}
        self._heap: list[tuple[Rank | None, Request]] = []
        self._new: OrderedDict[str, Request] = OrderedDict()  # never started, by arrival
        self._again: list[Request] = []  # pre-empted, by arrival
        self._chosen: Request | None = None
        self._turn = 0  # whom of the window to ask next
        self._num_arrivals = 0
        self._num_overtakes = 0  # starts ahead of the oldest since it became the oldest

    def place_of(self, request: Request) -> Rank:
        """Where a request stands, waiting or running: the smallest goes first, the largest is
        pre-empted first."""
        index = request.arrival_index
        if request.is_overdue:
            return False, index, index
        return True, self._policy.key(request, index), index

    def push(self, request: Request) -> None:
        """Add a request, new or pre-empted."""
        self._chosen = None
        if request.arrival_index < 0:
            request.arrival_index = self._num_arrivals
            self._num_arrivals += 1
            self._new[request.request_id] = request
        else:
            if request.num_preemptions >= self._policy.max_preemptions:
                request.is_overdue = True
            request.num_matched_tokens = -1
            insort(self._again, request, key=_by_arrival)
        if self._policy.window:
            self._live[request.request_id] = (None, request)
            return
        entry = (self.place_of(request), request)
        self._live[request.request_id] = entry
        heapq.heappush(self._heap, entry)

    def peek(self) -> Request | None:
        """The request that goes next, or None."""
        if self._chosen is None:
            self._chosen = self._choose()
        return self._chosen

    def _choose(self) -> Request | None:
        oldest = self._oldest()
        if oldest is None:
            return None
        if self._num_overtakes >= self._policy.max_overtakes:
            oldest.is_overdue = True
            return oldest
        if self._policy.window:
            return self._choose_in_window()
        heap = self._heap
        while self._live.get(heap[0][1].request_id) is not heap[0]:
            heapq.heappop(heap)
        return heap[0][1]

    def _choose_in_window(self) -> Request:
        window, ask = self._policy.window, self._match_length
        first = [*self._again[:window], *islice(self._new.values(), window)]
        turn = range(self._turn, self._turn + min(_NUM_ASKED, len(first)))
        self._turn = turn.stop
        for request in [first[index % len(first)] for index in turn]:
            request.num_matched_tokens = ask(request)
        for request in first:
            if request.num_matched_tokens < 0:
                request.num_matched_tokens = ask(request)
        while True:
            best = min(first, key=self.place_of)
            stale, best.num_matched_tokens = best.num_matched_tokens, ask(best)
            if best.num_matched_tokens >= stale:  # else somebody else may be before it now
                return best

    def _oldest(self) -> Request | None:
        oldest = next(iter(self._new.values()), None)
        if self._again and (oldest is None or _by_arrival(self._again[0]) < _by_arrival(oldest)):
            return self._again[0]
        return oldest

    def pop(self) -> Request:
        """Take the request that :meth:`peek` shows, because it starts."""
        request = self.peek()
        assert request is not None, "pop from an empty queue"
        if request is not self._oldest():
            self._num_overtakes += 1
            self._policy.num_overtakes += 1
        self.remove(request.request_id)
        return request

    def remove(self, request_id: str) -> Request | None:
        """Take a request out wherever it stands; None if it is not here."""
        entry = self._live.get(request_id)
        if entry is None:
            return None
        request = entry[1]
        self._chosen = None
        if request is self._oldest():
            self._num_overtakes = 0
        del self._live[request_id]
        if self._new.pop(request_id, None) is None:
            del self._again[bisect_left(self._again, request.arrival_index, key=_by_arrival)]
        if len(self._heap) > 2 * len(self._live) + 64:  # most are gone: keep what is live
            self._heap = [e for e in self._heap if self._live.get(e[1].request_id) is e]
            heapq.heapify(self._heap)
        return request

    def __len__(self) -> int:
        return len(self._live)
