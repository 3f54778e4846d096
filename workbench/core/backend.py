"""The one protocol behind which every engine is measured: ours, HF's, vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from workbench.core.workload import WorkloadRequest


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Tokens that became visible to the caller at one moment.

    Attributes
    ----------
    time_s
        ``time.perf_counter()`` when the tokens were on the host.
    token_ids
        New tokens; speculation may bring several at once. Empty when only ``finished`` or
        ``error`` is told.
    """

    request_id: str
    time_s: float
    token_ids: tuple[int, ...]
    finished: bool = False
    error: str | None = None


class RequestSource(Protocol):
    """Where a backend pulls requests from: the load generator decides when they are due."""

    def poll(self, now_s: float, num_in_flight: int) -> Sequence[WorkloadRequest]:
        """Return the requests due at ``now_s`` (perf_counter), given how many are in flight."""
        ...

    def next_due_s(self) -> float | None:
        """When the next request will be due (perf_counter), or None if that depends on
        finishing others, or none is left."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether every request has been handed out."""
        ...


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """Bytes by use, predicted before the run and measured in it.

    Attributes
    ----------
    predicted
        Bytes by use (``weights``, ``kv_pool``, ``activations``, ``graphs``, ``other``).
    activation_basis
        What ``predicted["activations"]`` stands on.
    device
        Where all bytes of a device with memory of its own were after the run, by use; ``free`` and
        ``unexplained`` are among them. Empty where the memory is the host's.
    measured_peak_bytes
        Peak of the process (CPU: peak resident set; CUDA: peak allocated) above ``base_bytes``.
    base_bytes
        What the process held before anything of the model existed (interpreter, libraries).
    kv_allocated_tokens, kv_used_tokens
        Token slots reserved and used, both at the moment of highest use; waste is the difference.
    """

    predicted: dict[str, int]
    measured_peak_bytes: int
    base_bytes: int = 0
    kv_allocated_tokens: int = 0
    kv_used_tokens: int = 0
    kv_mean_waste: float | None = None
    activation_basis: str = ""
    device: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What ran: enough to repeat it."""

    name: str
    version: str
    attention: str
    dtype: str
    device: str
    details: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """One engine under measurement.

    ``run`` may be called many times; each call starts with an empty prefix cache and leaves no
    request behind. Tokens are counted from engine ids, never by tokenising text again.

    A backend that must look at the workload before it runs (to find its best batch size, say) has
    ``prepare(requests, max_concurrency)``, which is called once and is not timed. One that knows
    the steps of its last ``run`` has ``step_records()``, a sequence of ``StepRecord``.
    """

    name: str

    def info(self) -> BackendInfo:
        """Version, attention implementation, precision and device."""
        ...

    def run(self, source: RequestSource, on_event: Callable[[TokenEvent], None]) -> None:
        """Serve every request of ``source``, telling each token as it becomes visible.

        A request that cannot be served is told as an event with ``error``; the others go on.
        Decoding is greedy; ``ignore_eos`` and ``max_tokens`` of each request are honoured.
        """
        ...

    def counters(self) -> dict[str, float]:
        """Counters since the last ``run`` began: deterministic ones and evidence."""
        ...

    def memory(self) -> MemoryLedger | None:
        """The byte ledger of the last ``run``, where the backend keeps one."""
        ...

    def close(self) -> None:
        """Free the model and its memory."""
        ...
