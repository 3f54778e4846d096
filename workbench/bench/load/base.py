"""What every load shares: the requests that may go, the order among them, the book of times."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

from workbench.core.backend import TokenEvent
from workbench.core.errors import ConfigError
from workbench.core.workload import WorkloadRequest

OnEvent = Callable[[TokenEvent], None]


class LoadGenerator:
    """The queue of requests and the book of their times.

    A subclass says when a request may be sent by its own schedule (:meth:`_scheduled_s`) and
    whether the client has room for one more (:meth:`_room_s`). A request that names another one in
    ``after`` waits for that one's end in every load, as the next turn of a conversation does; a
    load that nobody watches (:meth:`watch`) sees no end, and lets it go by its schedule alone.

    Parameters
    ----------
    requests
        The workload, in the order in which it is sent.

    Attributes
    ----------
    release_s
        ``perf_counter`` at which each request was to be sent, by id.
    taken_s
        ``perf_counter`` at which the backend took it, by id.
    """

    name = "load"

    def __init__(self, requests: Sequence[WorkloadRequest]) -> None:
        if not requests:
            raise ConfigError("the workload has no requests; a load needs at least one.")
        if len({request.request_id for request in requests}) != len(requests):
            raise ConfigError("request ids repeat within the workload; each must be unique.")
        self.requests = list(requests)
        self.release_s: dict[str, float] = {}
        self.taken_s: dict[str, float] = {}
        self.start_s: float | None = None
        self._followers = _followers(self.requests)
        # (rank, index, earliest_s): the requests that wait for no other, the next one on top.
        self._ready: list[tuple[float, int, float]] = []
        self._ended: set[str] = set()
        self._is_watching = False

    # -- what a load is ---------------------------------------------------------------------

    @classmethod
    def check_settings(cls, **settings: Any) -> None:
        """Refuse settings that no workload could be sent with.

        Raises
        ------
        ConfigError
            Names the setting, its value and what is valid.
        """

    @property
    def concurrency(self) -> int:
        """Most requests that can be in flight together.

        Of requests that follow one another only one is, so those that nothing follows count.
        """
        return len(self.requests) - len(self._followers)

    @property
    def target_request_s(self) -> float | None:
        """Requests a second that the load means to send; None where the backend sets the pace."""
        return None

    def describe(self) -> dict[str, Any]:
        """Return the settings of the load, for the record."""
        return {"name": self.name, "num_requests": len(self.requests)}

    def for_warmup(self, requests: Sequence[WorkloadRequest]) -> LoadGenerator:
        """Return a load that sends ``requests`` without waiting for the clock."""
        raise NotImplementedError

    def _scheduled_s(self, index: int) -> float:
        """When request ``index`` may be sent, whatever the others do."""
        assert self.start_s is not None
        return self.start_s

    def _room_s(self, now_s: float, num_in_flight: int) -> float | None:
        """Since when the client has room for one more request, or None while it has not."""
        return self.start_s

    def _rank(self, earliest_s: float) -> float:
        """Order among requests that may go; equal ranks go in the order of the workload."""
        return earliest_s

    def _on_release(self) -> None:
        """One request was handed out."""

    def _on_end(self, time_s: float) -> None:
        """One request finished, or failed, at ``time_s``."""

    # -- the client's side ------------------------------------------------------------------

    def start(self, now_s: float) -> None:
        """Start the clock of the load; the first poll does it otherwise."""
        self.start_s = now_s
        for index, request in enumerate(self.requests):
            if request.after is None or not self._is_watching:
                self._let_go(index, now_s)

    def _let_go(self, index: int, since_s: float) -> None:
        """Request ``index`` waits for no other any more, since ``since_s``."""
        earliest_s = max(self._scheduled_s(index), since_s)
        heapq.heappush(self._ready, (self._rank(earliest_s), index, earliest_s))

    def watch(self, on_event: OnEvent) -> OnEvent:
        """Wrap a callback so that the load sees which requests end, and when."""
        assert self.start_s is None, "a load is watched from its start"
        self._is_watching = True

        def observed(event: TokenEvent) -> None:
            if (event.finished or event.error is not None) and event.request_id not in self._ended:
                self._ended.add(event.request_id)
                self._on_end(event.time_s)
                for index in self._followers.get(event.request_id, ()):
                    self._let_go(index, event.time_s)
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
        while self._ready:
            due_s = self._next_due_s(now_s, num_in_flight + len(due))
            if due_s is None or due_s > now_s:
                break
            _, index, _ = heapq.heappop(self._ready)
            request = self.requests[index]
            self.release_s[request.request_id] = due_s
            self.taken_s[request.request_id] = now_s
            self._on_release()
            due.append(request)
        return due

    def _next_due_s(self, now_s: float, num_in_flight: int) -> float | None:
        """When the request on top is due, or None while that depends on others finishing."""
        room_s = self._room_s(now_s, num_in_flight)
        return None if room_s is None else max(room_s, self._ready[0][2])

    def next_due_s(self) -> float | None:
        """When the next request is due, or None if that depends on others or none is left."""
        if not self._ready or self.start_s is None:
            return None
        return self._next_due_s(self.start_s, len(self.taken_s) - len(self._ended))

    @property
    def exhausted(self) -> bool:
        """Whether every request has been handed out."""
        return len(self.taken_s) == len(self.requests)


def _followers(requests: Sequence[WorkloadRequest]) -> dict[str, list[int]]:
    """Indices of the requests that wait for each request, by its id."""
    followers: dict[str, list[int]] = {}
    seen: set[str] = set()
    for index, request in enumerate(requests):
        if request.after is not None:
            if request.after not in seen:
                raise ConfigError(
                    f"request {request.request_id!r} is sent after {request.after!r}, which is no "
                    "request that stands before it in the workload."
                )
            followers.setdefault(request.after, []).append(index)
        seen.add(request.request_id)
    return followers
