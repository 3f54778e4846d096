"""Captures steps in CUDA graphs, one a kind, padded size and form, and replays them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from kernels.triton import compiled_together
from workbench.core.errors import ConfigError
from workbench.slots.attention import PLAIN_FORM, AttentionBackend, CudaGraphSupport
from workbench.slots.graph_runner import DECODE, DRAFT, MIXED, VERIFY, GraphRunner, PreparedStep
from workbench.slots.platform import Platform

#: Sizes beside the largest of each kind by which the memory of all is estimated.
_TRIALS = 3
#: Tokens of the smallest mixed step. Fewer would hardly be faster, and a backend may have another
#: kernel for them, that of a few tokens a request.
_LEAST_MIXED = 32


@dataclass(frozen=True, slots=True)
class CudaGraphConfig:
    """Options of :class:`CudaGraphRunner`.

    Attributes
    ----------
    max_size
        Most requests of a captured step of single tokens; larger ones are launched op by op. 0: as
        many as may run.
    granularity
        Sizes above it are its multiples; below it, they are powers of two.
    max_verify_tokens
        Most tokens, padding included, of a captured step that verifies drafts; 0 captures none.
        Padding costs little while a step's time is that of reading the weights.
    verify_granularity
        As ``granularity``, of steps that verify drafts.
    max_mixed_tokens
        Most tokens, padding included, of a captured step with a piece of a prompt in it, 32 or
        more; 0 captures none. Sizes are powers of two, and this.
    """

    max_size: int = 0
    granularity: int = 8
    max_verify_tokens: int = 256
    verify_granularity: int = 16
    max_mixed_tokens: int = 256


class _Key(NamedTuple):
    """Of a prepared step."""

    kind: str
    size: int
    form: str


class CudaGraphRunner(GraphRunner):
    """One CUDA graph a kind of step, size and form, all in one memory pool; those of more tokens
    are captured first, so that the smaller ones find their memory there.

    A replay launches a whole step by one call. Everything that it reads lies in buffers and tables
    on the device, so nothing has to be set up for it but the rows that run.
    """

    Config = CudaGraphConfig
    config: CudaGraphConfig

    def __init__(self, config: CudaGraphConfig | None = None) -> None:
        super().__init__(config)
        if self.config.max_size < 0 or self.config.granularity < 1:
            raise ConfigError(
                f"engine.graph_runner.max_size={self.config.max_size} must not be negative, and "
                f"engine.graph_runner.granularity={self.config.granularity} must be positive."
            )
        if self.config.max_verify_tokens < 0 or self.config.verify_granularity < 1:
            raise ConfigError(
                f"engine.graph_runner.max_verify_tokens={self.config.max_verify_tokens} must not "
                "be negative (0 captures no step that verifies drafts), and "
                f"verify_granularity={self.config.verify_granularity} must be positive."
            )
        if self.config.max_mixed_tokens and self.config.max_mixed_tokens < _LEAST_MIXED:
            raise ConfigError(
                f"engine.graph_runner.max_mixed_tokens={self.config.max_mixed_tokens} must be "
                f"{_LEAST_MIXED} or more, or 0, which captures no step with a piece of a prompt."
            )
        self._graphs: dict[_Key, torch.cuda.CUDAGraph] = {}
        #: What components count in one step.
        self._counts: dict[_Key, dict[str, float]] = {}
        self._replays: dict[_Key, int] = {}
        #: By kind and form, then by number of requests, or of tokens in a mixed step.
        self._size_of: dict[tuple[str, str], list[int]] = {}
        self._num_bytes = 0
        #: One for all captures: libraries keep workspaces by stream.
        self._stream: torch.cuda.Stream | None = None

    def unsupported_reasons(self, platform: Platform, attention: AttentionBackend) -> list[str]:
        reasons = []
        if platform.device.type != "cuda":
            reasons.append(f"CUDA graphs need a CUDA device, not {platform.device}")
        if attention.cudagraph_support < CudaGraphSupport.UNIFORM_SINGLE_TOKEN:
            reasons.append(
                f"attention {attention.describe()} cannot be captured: choose another "
                "engine/attention, such as triton"
            )
        return reasons

    def largest_verify(self, attention: AttentionBackend, tokens_each: int) -> int:
        if attention.cudagraph_support < CudaGraphSupport.UNIFORM_BATCH:
            return 0
        return self.config.max_verify_tokens // tokens_each

    def largest_mixed(self, attention: AttentionBackend, step_tokens: int) -> int:
        if attention.cudagraph_support < CudaGraphSupport.ALWAYS:
            return 0
        return min(self.config.max_mixed_tokens, max(step_tokens, _LEAST_MIXED))

    def _keys(self, steps: Sequence[PreparedStep]) -> list[tuple[PreparedStep, _Key]]:
        """All kinds, sizes and forms with their steps, those of fewest tokens first."""
        keys = [
            (step, _Key(step.kind, size, form))
            for step in steps
            for form, sizes in self._sizes(step).items()
            for size in sizes
        ]
        return sorted(keys, key=lambda k: (k[1].size * k[0].tokens_each, k[1].size, k[1].form))

    def _sizes(self, step: PreparedStep) -> dict[str, list[int]]:
        """Sizes of each form, ascending."""
        config = self.config
        if step.kind == MIXED:
            few = (1 << i for i in range(step.max_size.bit_length()))
            sizes_between = [s for s in few if _LEAST_MIXED <= s < step.max_size]
            return {PLAIN_FORM: [*sizes_between, step.max_size]}
        if step.kind in (VERIFY, DRAFT):
            return {PLAIN_FORM: capture_sizes(step.max_size, config.verify_granularity)}
        largest = min(config.max_size or step.max_size, step.max_size)
        sizes = {PLAIN_FORM: capture_sizes(largest, config.granularity)}
        for extra in step.forms:
            multiples = range(extra.granularity, largest, extra.granularity)
            sizes[extra.name] = [*multiples, largest]
        return sizes

    def trial_bytes(self, steps: Sequence[PreparedStep]) -> int:
        """By the largest step of each kind, which bring their activations and logits, and some of
        the others, which find theirs there and bring what the driver keeps of a graph."""
        keys = self._keys(steps)[::-1]
        of_kind = {key.kind: (step, key) for step, key in reversed(keys)}
        largest = [pair for pair in keys if pair in of_kind.values()]
        others = [pair for pair in keys if pair not in largest]
        some = others[:: -(-len(others) // _TRIALS)] if others else []
        with self._capturing():  # so that what is taken once, such as workspaces, is there
            self._compile(steps)
            for step, key in (*largest, *some):
                step.run(key.size, key.form)
        before = _used_bytes()
        pool = torch.cuda.graph_pool_handle()
        with self._capturing():
            for step, key in largest:
                self._capture(step, key, pool)
        first = _used_bytes()
        with self._capturing():
            for step, key in some:
                self._capture(step, key, pool)
        rest = _used_bytes() - first
        self._graphs, self._counts, self._replays = {}, {}, {}
        with self._capturing():
            step, key = self._keys(steps)[0]
            step.run(key.size, key.form)  # lets go of the logits of the last capture
        return max(0, first - before) + max(0, rest) * len(others) // max(1, len(some))

    def capture(self, steps: Sequence[PreparedStep]) -> None:
        before = _used_bytes()
        pool = torch.cuda.graph_pool_handle()
        with self._capturing():
            self._compile(steps)
            for step, key in reversed(self._keys(steps)):
                self._capture(step, key, pool)
        self._num_bytes = max(0, _used_bytes() - before)
        for step in steps:
            for form, sizes in self._sizes(step).items():
                size_of = self._size_of[step.kind, form] = [sizes[0]]
                for smaller, size in pairwise([0, *sizes]):
                    size_of += [size] * (size - smaller)

    def compile(self, steps: Sequence[PreparedStep]) -> None:
        with self._capturing():
            self._compile(steps)

    def _compile(self, steps: Sequence[PreparedStep]) -> None:
        """Compile the Triton kernels of all sizes; what these runs compute is never read."""
        with compiled_together():
            for step, key in self._keys(steps):
                step.run(key.size, key.form)

    @contextlib.contextmanager
    def _capturing(self) -> Iterator[None]:
        """On the capture stream, behind what is queued and before what comes after."""
        make_stream: Callable[[], torch.cuda.Stream] = torch.cuda.Stream
        stream = self._stream = self._stream or make_stream()
        stream.wait_stream(torch.cuda.current_stream())
        collects = gc.isenabled()
        gc.disable()  # a tensor that is freed while a graph is captured would break it
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream().wait_stream(stream)

    def _capture(self, step: PreparedStep, key: _Key, pool: Any) -> None:
        # Compiles what is left, and makes libraries allocate what they keep.
        step.run(key.size, key.form)
        before = step.counters()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool)
        try:
            step.run(key.size, key.form)
        finally:
            graph.capture_end()
        counted = step.counters()
        self._counts[key] = {k: v - before.get(k, 0) for k, v in counted.items()}
        self._graphs[key] = graph
        self._replays[key] = 0

    def dispatch(self, kind: str, count: int, form: str = PLAIN_FORM) -> int | None:
        size_of = self._size_of.get((kind, form), [])
        return size_of[count] if count < len(size_of) else None

    def run(self, kind: str, size: int, form: str = PLAIN_FORM) -> None:
        key = _Key(kind, size, form)
        self._graphs[key].replay()
        self._replays[key] += 1

    def counters(self) -> dict[str, float]:
        by_kind = dict.fromkeys((DECODE, VERIFY, MIXED, DRAFT), 0)
        for key, replays in self._replays.items():
            by_kind[key.kind] += replays
        return {
            "graphs": len(self._graphs),
            "replays": sum(by_kind.values()),
            "decode_replays": by_kind[DECODE],
            "verify_replays": by_kind[VERIFY],
            "mixed_replays": by_kind[MIXED],
            "draft_replays": by_kind[DRAFT],
        }

    def reset_counters(self) -> None:
        self._replays = dict.fromkeys(self._replays, 0)

    def replayed_counters(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for key, replays in self._replays.items():
            for name, count in self._counts[key].items():
                total[name] = total.get(name, 0) + count * replays
        return total

    @property
    def num_bytes(self) -> int:
        return self._num_bytes


def _used_bytes() -> int:
    """In use on the whole device, once nothing runs and nothing is kept for later: what the driver
    holds of a graph is in no count of torch's."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def capture_sizes(largest: int, granularity: int) -> list[int]:
    """Sizes to capture, ascending: powers of two up to ``granularity``, then its multiples, and
    ``largest`` itself."""
    small = [1 << i for i in range(granularity.bit_length()) if 1 << i <= granularity]
    sizes = {s for s in (*small, *range(granularity, largest, granularity)) if s < largest}
    return sorted(sizes | {largest})
