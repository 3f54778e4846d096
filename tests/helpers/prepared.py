"""Prepared steps without CUDA graphs: padded as those are, run by a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import kernels
from kernels.attention import MAX_DECODE_QUERIES
from workbench.core.step import ForwardBatch
from workbench.slots.attention import (
    PLAIN_FORM,
    AttentionBackend,
    AttentionLayer,
    CudaGraphSupport,
)
from workbench.slots.graph_runner import MIXED, GraphRunner, PreparedStep
from workbench.slots.kv_pool import KVPool

#: Overrides that make an engine run prepared steps on any device, with attention that can.
CALLED = ("engine.graph_runner._target_=tests.helpers.prepared.CallingRunner",)
#: The same, attention included.
PREPARED = (
    *CALLED,
    "engine.attention._target_=tests.helpers.prepared.DeviceAttention",
)
#: The same, mixed steps included.
MIXED_CALLED = ("engine.graph_runner._target_=tests.helpers.prepared.MixedRunner",)
MIXED_PREPARED = (*PREPARED, *MIXED_CALLED)


class CallingRunner(GraphRunner):
    """Runs a step where a graph would be replayed, in sizes of three and its multiples."""

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self._steps: dict[str, PreparedStep] = {}
        self.sizes: list[int] = []
        self.forms: list[str] = []
        self.kinds: list[str] = []

    def largest_verify(self, attention: AttentionBackend, tokens_each: int) -> int:
        return 1000 if attention.cudagraph_support >= CudaGraphSupport.UNIFORM_BATCH else 0

    def capture(self, steps: Sequence[PreparedStep]) -> None:
        self._steps = {step.kind: step for step in steps}
        for step in steps:
            for form in (PLAIN_FORM, *(form.name for form in step.forms)):
                step.run(step.max_size, form)  # as a capture does, on padding alone

    def dispatch(self, kind: str, count: int, form: str = PLAIN_FORM) -> int | None:
        if kind not in self._steps or count > self._steps[kind].max_size:
            return None
        return min(-(-count // 3) * 3, self._steps[kind].max_size)

    def run(self, kind: str, size: int, form: str = PLAIN_FORM) -> None:
        self.kinds.append(kind)
        self.sizes.append(size)
        self.forms.append(form)
        self._steps[kind].run(size, form)

    def counters(self) -> dict[str, float]:
        return {"replays": len(self.sizes)}

    def reset_counters(self) -> None:
        self.sizes, self.forms, self.kinds = [], [], []


class MixedRunner(CallingRunner):
    """The same, with mixed steps of up to forty tokens, and as many as the kernels for pieces of
    prompts begin at."""

    def largest_mixed(self, attention: AttentionBackend, step_tokens: int) -> int:
        return 40 if attention.cudagraph_support >= CudaGraphSupport.ALWAYS else 0

    def dispatch(self, kind: str, count: int, form: str = PLAIN_FORM) -> int | None:
        least = MAX_DECODE_QUERIES + 1 if kind == MIXED else 1
        return super().dispatch(kind, max(count, least), form)


class DeviceAttention(AttentionBackend):
    """Knows lengths from the device alone, as a kernel in a captured graph does."""

    cudagraph_support = CudaGraphSupport.ALWAYS

    def build_metadata(self, batch: ForwardBatch) -> ForwardBatch:
        return batch

    def forward(
        self, q: torch.Tensor, layer: AttentionLayer, metadata: Any, pool: KVPool
    ) -> torch.Tensor:
        return kernels.paged_attend(
            q,
            *pool.layer(layer.index),
            metadata.block_table,
            metadata.query_start_loc,
            metadata.seq_lens,
            layer.scale,
            sliding_window=layer.sliding_window,
            soft_cap=layer.soft_cap,
        )

    def unsupported_reasons(self, layers: list[AttentionLayer], pool: KVPool) -> list[str]:
        return []
