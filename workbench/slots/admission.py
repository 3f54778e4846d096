"""Slot ``admission``: how much KV a request must find before it may start."""

from __future__ import annotations

from abc import abstractmethod

from workbench.core.request import Request
from workbench.slots.component import Component


class Admission(Component):
    """How many token slots to promise a request when it is admitted.

    What a request needs beyond its promise is given while the pool has it; then another request
    is pre-empted: the last by the policy's order.
    """

    #: Whether a pre-empted request's KV is copied to the host, or computed again.
    preempts_to_host: bool = False

    @abstractmethod
    def reserve_tokens(self, request: Request) -> int:
        """Tokens to reserve. The KV manager keeps the promise: later growth within it succeeds."""


class ReserveFull(Admission):
    """Reserve the prompt and all of ``max_tokens``: nothing is ever pre-empted. The null object."""

    def reserve_tokens(self, request: Request) -> int:
        return request.max_total_tokens
