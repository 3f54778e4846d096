"""Loads whose pace the backend sets: a batch job, and clients that wait for their answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from workbench.bench.load.base import LoadGenerator
from workbench.core.errors import ConfigError
from workbench.core.workload import WorkloadRequest


class Offline(LoadGenerator):
    """Every request is sent at the start: the load of a batch job."""

    name = "offline"

    def for_warmup(self, requests: Sequence[WorkloadRequest]) -> LoadGenerator:
        """Return a load that sends ``requests`` at once."""
        return Offline(requests)


class Closed(LoadGenerator):
    """``concurrency`` clients, each sending its next request when its last one finished.

    The next request is released at the moment the finished one freed its place, not when the
    backend next looks. A free client takes the first request of the workload that waits for no
    other: where conversations stand one after the other, that is the next turn of its own.

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
        self.check_settings(concurrency=concurrency)
        self._concurrency = concurrency
        self._places: deque[float] = deque()

    @classmethod
    def check_settings(cls, *, concurrency: int = 1, **others: Any) -> None:
        """Refuse anything but at least one client."""
        if not isinstance(concurrency, int) or isinstance(concurrency, bool) or concurrency < 1:
            raise ConfigError(f"load.concurrency={concurrency!r} must be an integer of at least 1.")

    @property
    def concurrency(self) -> int:
        """Most requests that the load keeps in flight."""
        return min(self._concurrency, super().concurrency)

    def describe(self) -> dict[str, Any]:
        """Return the settings of the load, for the record."""
        return {**super().describe(), "concurrency": self._concurrency}

    def for_warmup(self, requests: Sequence[WorkloadRequest]) -> LoadGenerator:
        """Return a load of as many clients."""
        return Closed(requests, self._concurrency)

    def start(self, now_s: float) -> None:
        """Start the clock: every client sends its first request at once."""
        super().start(now_s)
        self._places = deque([now_s] * self._concurrency)

    def _rank(self, earliest_s: float) -> float:
        return 0.0

    def _room_s(self, now_s: float, num_in_flight: int) -> float | None:
        if self._is_watching:
            return self._places[0] if self._places else None
        return now_s if num_in_flight < self._concurrency else None

    def _on_release(self) -> None:
        if self._is_watching:
            self._places.popleft()

    def _on_end(self, time_s: float) -> None:
        self._places.append(time_s)
