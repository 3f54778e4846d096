"""Captures steps of single tokens in CUDA graphs, one a padded size and form, and replays them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from kernels.triton import compiled_together
from workbench.core.errors import ConfigError
from workbench.slots.attention import PLAIN_FORM, AttentionBackend, CudaGraphSupport
from workbench.slots.graph_runner import DecodeStep, GraphRunner
from workbench.slots.platform import Platform


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

    def capture(self, step: DecodeStep) -> None:
        largest = min(self.config.max_size or step.max_size, step.max_size)
        sizes = {PLAIN_FORM: capture_sizes(largest, self.config.granularity)}
        for extra in step.forms:
            few = range(extra.granularity, largest, extra.granularity)
            sizes[extra.name] = [*few, largest]
        keys = [(size, form) for form, all_sizes in sizes.items() for size in all_sizes]
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        pool = torch.cuda.graph_pool_handle()
        make_stream: Callable[[], torch.cuda.Stream] = torch.cuda.Stream
        stream = make_stream()
        stream.wait_stream(torch.cuda.current_stream())
        collects = gc.isenabled()
        gc.disable()  # a tensor that is freed while a graph is captured would break it
        try:
            with torch.cuda.stream(stream):
                with compiled_together():  # what these runs compute is never read
                    for key in sorted(keys):
                        step.run(*key)
                for key in sorted(keys, reverse=True):
                    self._capture(step, key, pool)
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._num_bytes = torch.cuda.memory_reserved() - before
        for form, all_sizes in sizes.items():
            size_of = self._size_of[form] = [all_sizes[0]]
            for smaller, size in pairwise([0, *all_sizes]):
                size_of += [size] * (size - smaller)

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


def capture_sizes(largest: int, granularity: int) -> list[int]:
    """Sizes to capture, ascending: powers of two up to ``granularity``, then its multiples, and
    ``largest`` itself."""
    small = [1 << i for i in range(granularity.bit_length()) if 1 << i <= granularity]
    sizes = {s for s in (*small, *range(granularity, largest, granularity)) if s < largest}
    return sorted(sizes | {largest})
