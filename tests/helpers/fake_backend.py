"""A backend without a model: tokens by a formula, time by a clock that only it moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from workbench.core.backend import BackendInfo, MemoryLedger, RequestSource, TokenEvent
from workbench.core.workload import WorkloadRequest


@dataclass
class FakeClock:
    """Seconds that pass only when told."""

    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def expected_tokens(request: WorkloadRequest) -> tuple[int, ...]:
    """What the fake model says: a formula of the prompt and the position."""
    start = sum(request.prompt_token_ids)
    return tuple((31 * start + 7 * i) % 1000 for i in range(request.max_tokens))


def reference(requests: Sequence[WorkloadRequest]) -> dict[str, tuple[int, ...]]:
    """Reference outputs of the fake model."""
    return {request.request_id: expected_tokens(request) for request in requests}


def make_requests(num_requests: int, max_tokens: int = 8) -> list[WorkloadRequest]:
    """Requests with prompts of different lengths."""
    return [
        WorkloadRequest(f"r{i}", tuple(range(i, i + 4 + i % 3)), max_tokens)
        for i in range(num_requests)
    ]


@dataclass
class FakeBackend:
    """Serves all it holds one step at a time.

    A step takes ``step_s`` (times noise) and brings ``tokens_per_step`` tokens to each request.
    """

    clock: FakeClock
    name: str = "fake"
    step_s: float = 0.01
    tokens_per_step: int = 1
    noise: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    tokens: Callable[[WorkloadRequest], Sequence[int]] = expected_tokens
    refuse: frozenset[str] = frozenset()
    counts: dict[str, float] = field(default_factory=lambda: {"steps": 0})
    max_num_seqs: int = 1_000_000
    on_step: Callable[[FakeBackend, int], None] | None = None
    peaks: list[int] = field(default_factory=lambda: [1000])
    is_closed: bool = False
    batches: list[int] = field(default_factory=list)
    runs: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)
        self._steps = 0

    def info(self) -> BackendInfo:
        details = {"max_num_seqs": self.max_num_seqs}
        return BackendInfo(self.name, "fake 1", "formula", self.dtype, self.device, details)

    def run(self, source: RequestSource, on_event: Callable[[TokenEvent], None]) -> None:
        assert not self.is_closed, "a closed backend was run"
        self.runs.append([])
        self._steps = 0
        waiting: list[WorkloadRequest] = []
        running: dict[str, tuple[WorkloadRequest, int]] = {}
        while True:
            for request in source.poll(self.clock(), len(running) + len(waiting)):
                self.runs[-1].append(request.request_id)
                if request.request_id in self.refuse:
                    message = "the prompt is longer than the context"
                    on_event(TokenEvent(request.request_id, self.clock(), (), True, message))
                else:
                    waiting.append(request)
            while waiting and len(running) < self.max_num_seqs:
                request = waiting.pop(0)
                running[request.request_id] = (request, 0)
            if not running:
                if source.exhausted:
                    return
                due = source.next_due_s()
                assert due is not None, "nothing runs, and the load names no next request"
                self.clock.now_s = max(self.clock.now_s, due)
                continue
            self._step(running, on_event)

    def _step(
        self,
        running: dict[str, tuple[WorkloadRequest, int]],
        on_event: Callable[[TokenEvent], None],
    ) -> None:
        self._steps += 1
        if self.on_step is not None:
            self.on_step(self, self._steps)
        self.batches.append(len(running))
        self.clock.now_s += self.step_s * float(np.exp(self._rng.normal(0, self.noise)))
        for request_id, (request, done) in list(running.items()):
            answer = self.tokens(request)
            new = tuple(answer[done : done + self.tokens_per_step])
            finished = done + len(new) >= len(answer)
            running[request_id] = (request, done + len(new))
            if finished:
                del running[request_id]
            on_event(TokenEvent(request_id, self.clock(), new, finished))

    def counters(self) -> dict[str, float]:
        counted = {"steps": float(self._steps), "model_seconds": self._steps * self.step_s}
        return {**self.counts, **counted}

    def memory(self) -> MemoryLedger | None:
        peak = self.peaks.pop(0) if len(self.peaks) > 1 else self.peaks[0]
        return MemoryLedger({"weights": 900}, peak, 10, 64, 48, 0.25)

    def close(self) -> None:
        self.is_closed = True
