"""Pulling requests from a load generator, and telling their tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workbench.core.backend import RequestSource, TokenEvent
from workbench.core.workload import WorkloadRequest

_MAX_STALL_S = 2.0


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a model can serve.

    Attributes
    ----------
    vocab_size
        Rows of the embedding table: valid ids are 0 to ``vocab_size - 1``.
    max_model_len
        Most tokens of prompt and output together.
    """

    vocab_size: int
    max_model_len: int

    def problem(self, request: WorkloadRequest) -> str | None:
        """Say why ``request`` cannot be served, or None when it can."""
        prompt = request.prompt_token_ids
        if not prompt:
            return "the prompt is empty: at least one token id is needed."
        if request.max_tokens < 1:
            return f"max_tokens={request.max_tokens} is not valid: it must be at least 1."
        total = len(prompt) + request.max_tokens
        if total > self.max_model_len:
            return (
                f"a prompt of {len(prompt)} tokens and max_tokens={request.max_tokens} need "
                f"{total} positions; the context holds {self.max_model_len}. "
                "Shorten the prompt or lower max_tokens."
            )
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            wrong = next(i for i in prompt if not 0 <= i < self.vocab_size)
            return (
                f"token id {wrong} is outside the vocabulary: valid ids are 0 to "
                f"{self.vocab_size - 1}. Was the prompt tokenised for another model?"
            )
        return None


class Intake:
    """Stands between a request source and an engine, and keeps the count of what is in flight.

    Parameters
    ----------
    source
        The load generator.
    on_event
        Called with every event, in the thread that calls :meth:`tell` or :meth:`fail`.
    limits
        Requests beyond these are told as errors and never reach the engine.
    """

    def __init__(
        self,
        source: RequestSource,
        on_event: Callable[[TokenEvent], None],
        limits: RequestLimits,
    ) -> None:
        self._source = source
        self._on_event = on_event
        self._limits = limits
        self._in_flight: dict[str, WorkloadRequest] = {}
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.num_errors = 0

    @property
    def num_in_flight(self) -> int:
        """Requests handed out and neither finished nor failed."""
        return len(self._in_flight)

    @property
    def in_flight_ids(self) -> tuple[str, ...]:
        """Their ids, in the order of arrival."""
        return tuple(self._in_flight)

    @property
    def is_done(self) -> bool:
        """Whether every request was handed out and has ended."""
        return self._source.exhausted and not self._in_flight

    def pull(self) -> list[WorkloadRequest]:
        """Take the requests that are due now; those that cannot be served are told as errors."""
        accepted: list[WorkloadRequest] = []
        while True:
            due: Sequence[WorkloadRequest] = self._source.poll(
                time.perf_counter(), self.num_in_flight
            )
            errors_before = self.num_errors
            for request in due:
                self._accept(request, accepted)
            # A failed request leaves room in a closed load: ask again, or that load would stall.
            if self.num_errors == errors_before:
                return accepted

    def _accept(self, request: WorkloadRequest, accepted: list[WorkloadRequest]) -> None:
        assert request.request_id not in self._in_flight, "request ids are unique in a workload"
        self._in_flight[request.request_id] = request
        problem = self._limits.problem(request)
        if problem is not None:
            self.fail(request.request_id, problem)
            return
        self.num_prompt_tokens += len(request.prompt_token_ids)
        accepted.append(request)

    def seconds_until_due(self) -> float | None:
        """Seconds until the next request is due (0 when it is due now), or None if unknown."""
        due = self._source.next_due_s()
        return None if due is None else max(0.0, due - time.perf_counter())

    def wait(self) -> list[WorkloadRequest]:
        """With nothing in flight, sleep until requests are due and take them.

        Returns
        -------
        list
            Empty only when the source is exhausted.

        Raises
        ------
        RuntimeError
            The source neither hands out a request nor says when the next one will be due.
        """
        assert not self._in_flight, "waiting for arrivals while requests are in flight"
        stalled_since: float | None = None
        while True:
            accepted = self.pull()
            if accepted or self._source.exhausted:
                return accepted
            pause = self.seconds_until_due()
            if pause:
                stalled_since = None
                time.sleep(pause)
                continue
            now = time.perf_counter()
            stalled_since = now if stalled_since is None else stalled_since
            if now - stalled_since > _MAX_STALL_S:
                raise RuntimeError(
                    "the request source is not exhausted, has nothing due with no request in "
                    "flight, and names no next arrival: it would never go on."
                )
            time.sleep(0.001)

    def tell(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        time_s: float,
        finished: bool = False,
    ) -> None:
        """Tell tokens of one request; ``time_s`` is when they were on the host."""
        self.num_output_tokens += len(token_ids)
        if finished:
            del self._in_flight[request_id]
        self._on_event(TokenEvent(request_id, time_s, tuple(token_ids), finished))

    def fail(self, request_id: str, message: str) -> None:
        """Tell that a request cannot be served."""
        del self._in_flight[request_id]
        self.num_errors += 1
        event = TokenEvent(request_id, time.perf_counter(), (), finished=True, error=message)
        self._on_event(event)
