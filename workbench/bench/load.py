"""Load generators: when each request of a workload becomes due.

A generator is the :class:`~workbench.core.backend.RequestSource` that a backend pulls from. It
keeps two times a request: its **release** (when the client sent it, by the rule of the load) and
when the backend took it. Latency counts from the release, so a backend that looks for new
requests late pays for it in its TTFT; the client never waits for the server to be ready.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from workbench.core.backend import TokenEvent
from workbench.core.workload import WorkloadRequest

OnEvent = Callable[[TokenEvent], None]


class LoadGenerator:
    """What every load shares: the queue of requests and the book of their times.

    A subclass answers :meth:`_next_due_s`: when the request at the head of the queue is due.

    Parameters
    ----------
    requests
        The workload, in the order in which it is sent.

    Attributes
    ----------
    release_s
        ``perf_counter`` at which each request was sent, by id.
    taken_s
        ``perf_counter`` at which the backend took it, by id.
    """

    name = "load"

    def __init__(self, requests: Sequence[WorkloadRequest]) -> None:
        if not requests:
            raise ValueError("the workload has no requests; a load needs at least one.")
        if len({request.request_id for request in requests}) != len(requests):
            raise ValueError("request ids repeat within the workload; each must be unique.")
        self.requests = list(requests)
        self.release_s: dict[str, float] = {}
        self.taken_s: dict[str, float] = {}
        self.start_s: float | None = None
        self._queue: deque[WorkloadRequest] = deque(self.requests)
        self._ended: set[str] = set()
        self._is_watching = False

    # -- what a load is ---------------------------------------------------------------------

    @property
    def concurrency(self) -> int:
        """Most requests that the load keeps in flight."""
        return len(self.requests)

    def describe(self) -> dict[str, Any]:
        """Return the settings of the load, for the record."""
        return {"name": self.name, "num_requests": len(self.requests)}

    def _next_due_s(self, now_s: float, num_in_flight: int) -> float | None:
        """When the head of the queue is due, or None while that depends on others finishing."""
        raise NotImplementedError

    def _on_end(self, time_s: float) -> None:
        """One request finished, or failed, at ``time_s``."""

    # -- the client's side ------------------------------------------------------------------

    def start(self, now_s: float) -> None:
        """Start the clock of the load; the first poll does it otherwise."""
        self.start_s = now_s

    def watch(self, on_event: OnEvent) -> OnEvent:
        """Wrap a callback so that the load sees which requests end, and when."""
        self._is_watching = True

        def observed(event: TokenEvent) -> None:
            if (event.finished or event.error is not None) and event.request_id not in self._ended:
                self._ended.add(event.request_id)
                self._on_end(event.time_s)
            on_event(event)

        return observed

    # -- RequestSource ----------------------------------------------------------------------

    def poll(self, now_s: float, num_in_flight: int) -> Sequence[WorkloadRequest]:
        """Return the requests due at ``now_s``, given how many are in flight.

        Once :meth:`watch` was called the load counts what is in flight from the events; before
        that it trusts ``num_in_flight``.
        """
        if self.start_s is None:
            self.start(now_s)
        if self._is_watching:
            num_in_flight = len(self.taken_s) - len(self._ended)
        due: list[WorkloadRequest] = []
        while self._queue:
            due_s = self._next_due_s(now_s, num_in_flight + len(due))
            if due_s is None or due_s > now_s:
                break
            request = self._queue.popleft()
            self.release_s[request.request_id] = due_s
            self.taken_s[request.request_id] = now_s
            self._on_release()
            due.append(request)
        return due

    def _on_release(self) -> None:
        """The head of the queue was handed out."""

    def next_due_s(self) -> float | None:
        """When the next request is due, or None if that depends on others or none is left."""
        if not self._queue or self.start_s is None:
            return self.start_s if self._queue else None
        num_in_flight = len(self.taken_s) - len(self._ended)
        return self._next_due_s(self.start_s, num_in_flight)

    @property
    def exhausted(self) -> bool:
        """Whether every request has been handed out."""
        return not self._queue


class Offline(LoadGenerator):
    """Every request is sent at the start: the load of a batch job."""

    name = "offline"

    def _next_due_s(self, now_s: float, num_in_flight: int) -> float | None:
        return self.start_s


class Closed(LoadGenerator):
    """``concurrency`` clients, each sending its next request when its last one finished.

    The next request is released at the moment the finished one freed its place, not when the
    backend next looks.

    Parameters
    ----------
    requests
        The workload, in the order in which it is sent.
    concurrency
        Clients; at least 1.
    """

    name = "closed"

    def __init__(self, requests: Sequence[WorkloadRequest], concurrency: int = 1) -> None:
        super().__init__(requests)
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; it must be at least 1.")
        self._concurrency = concurrency
        self._places: deque[float] = deque()

    @property
    def concurrency(self) -> int:
        """Most requests that the load keeps in flight."""
        return min(self._concurrency, len(self.requests))

    def describe(self) -> dict[str, Any]:
        """Return the settings of the load, for the record."""
        return {**super().describe(), "concurrency": self._concurrency}

    def start(self, now_s: float) -> None:
        """Start the clock: every client sends its first request at once."""
        super().start(now_s)
        self._places = deque([now_s] * self._concurrency)

    def _next_due_s(self, now_s: float, num_in_flight: int) -> float | None:
        if self._is_watching:
            return self._places[0] if self._places else None
        return now_s if num_in_flight < self._concurrency else None

    def _on_release(self) -> None:
        if self._is_watching:
            self._places.popleft()

    def _on_end(self, time_s: float) -> None:
        self._places.append(time_s)
