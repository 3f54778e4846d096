"""Captures steps of single tokens in CUDA graphs, one a padded size and form, and replays them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from kernels.triton import compiled_together
from workbench.core.errors import ConfigError
from workbench.slots.attention import PLAIN_FORM, AttentionBackend, CudaGraphSupport
from workbench.slots.graph_runner import DecodeStep, GraphRunner
from workbench.slots.platform import Platform

#: Sizes beside the largest by which the memory of all is estimated.
_TRIALS = 3


@dataclass(frozen=True, slots=True)
class CudaGraphConfig:
    """Options of :class:`CudaGraphRunner`.

    Attributes
    ----------
    max_size
        Most requests of a captured step; larger ones are launched op by op. 0: as many as may run.
    granularity
        Sizes above it are its multiples; below it, they are powers of two.
    """

    max_size: int = 0
    granularity: int = 8


#: Size and form of a prepared step.
_Key = tuple[int, str]


class CudaGraphRunner(GraphRunner):
    """One CUDA graph a size and form, all in one memory pool; larger ones are captured first, so
    that the smaller ones find their memory there.

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
        self._graphs: dict[_Key, torch.cuda.CUDAGraph] = {}
        #: What components count in one step.
        self._counts: dict[_Key, dict[str, float]] = {}
        self._replays: dict[_Key, int] = {}
        self._size_of: dict[str, list[int]] = {}  # by form, then by number of requests
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

    def _keys(self, step: DecodeStep) -> list[_Key]:
        """Sizes of all forms, ascending."""
        return sorted((size, form) for form, sizes in self._sizes(step).items() for size in sizes)

    def _sizes(self, step: DecodeStep) -> dict[str, list[int]]:
        """Sizes of each form, ascending."""
        largest = min(self.config.max_size or step.max_size, step.max_size)
        sizes = {PLAIN_FORM: capture_sizes(largest, self.config.granularity)}
        for extra in step.forms:
            few = range(extra.granularity, largest, extra.granularity)
            sizes[extra.name] = [*few, largest]
        return sizes

    def trial_bytes(self, step: DecodeStep) -> int:
        """By the largest size, which brings its activations, and some of the others, which find
        theirs there and bring what the driver keeps of a graph."""
        largest, *others = reversed(self._keys(step))
        some = others[:: -(-len(others) // _TRIALS)] if others else []
        with self._capturing():  # so that what is taken once, such as workspaces, is there
            self._compile(step)
            for key in (largest, *some):
                step.run(*key)
        before = _used_bytes()
        pool = torch.cuda.graph_pool_handle()
        with self._capturing():
            self._capture(step, largest, pool)
        first = _used_bytes()
        with self._capturing():
            for key in some:
                self._capture(step, key, pool)
        rest = _used_bytes() - first
        self._graphs, self._counts, self._replays = {}, {}, {}
        with self._capturing():
            step.run(*self._keys(step)[0])  # lets go of the logits of the last capture
        return max(0, first - before) + max(0, rest) * len(others) // max(1, len(some))

    def capture(self, step: DecodeStep) -> None:
        before = _used_bytes()
        pool = torch.cuda.graph_pool_handle()
        with self._capturing():
            self._compile(step)
            for key in reversed(self._keys(step)):
                self._capture(step, key, pool)
        self._num_bytes = max(0, _used_bytes() - before)
        for form, sizes in self._sizes(step).items():
            size_of = self._size_of[form] = [sizes[0]]
            for smaller, size in pairwise([0, *sizes]):
                size_of += [size] * (size - smaller)

    def compile(self, step: DecodeStep) -> None:
        with self._capturing():
            self._compile(step)

    def _compile(self, step: DecodeStep) -> None:
        """Compile the Triton kernels of all sizes; what these runs compute is never read."""
        with compiled_together():
            for key in self._keys(step):
                step.run(*key)

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

    def _capture(self, step: DecodeStep, key: _Key, pool: Any) -> None:
        step.run(*key)  # compiles what is left, and makes libraries allocate what they keep
        before = step.counters()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool)
        try:
            step.run(*key)
        finally:
            graph.capture_end()
        counted = step.counters()
        self._counts[key] = {k: v - before.get(k, 0) for k, v in counted.items()}
        self._graphs[key] = graph
        self._replays[key] = 0

    def dispatch(self, num_requests: int, form: str = PLAIN_FORM) -> int | None:
        size_of = self._size_of.get(form, [])
        return size_of[num_requests] if num_requests < len(size_of) else None

    def run(self, size: int, form: str = PLAIN_FORM) -> None:
        self._graphs[size, form].replay()
        self._replays[size, form] += 1

    def counters(self) -> dict[str, float]:
        return {"graphs": len(self._graphs), "replays": sum(self._replays.values())}

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
