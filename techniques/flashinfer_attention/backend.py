"""Paged attention through FlashInfer's wrappers: planned once a step, run once a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from techniques.attention import (
    CountingAttention,
    Phase,
    capability_reasons,
    cuda_reasons,
    dtype_reasons,
    head_dim_reasons,
    library_reasons,
    phase_of,
    quantized_reasons,
)
from workbench.core.errors import ConfigError
from workbench.core.step import ForwardBatch
from workbench.slots.attention import AttentionLayer
from workbench.slots.kv_pool import KVPool

_HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True, slots=True)
class FlashInferConfig:
    """Options of :class:`FlashInferAttention`.

    Attributes
    ----------
    workspace_mb
        Scratch memory for what pieces of long requests put out, MiB.
    """

    workspace_mb: int = 256


@dataclass(frozen=True, slots=True)
class _Kind:
    """Layers that one plan serves."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None

    @classmethod
    def of(cls, layer: AttentionLayer) -> _Kind:
        return cls(
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_dim,
            layer.scale,
            layer.sliding_window,
            layer.soft_cap,
        )


@dataclass(slots=True)
class FlashInferMetadata:
    """The wrapper that was planned for each kind of layer."""

    phase: Phase
    wrappers: dict[_Kind, Any]


@dataclass(slots=True)
class _Pages:
    """Blocks of all requests one after another, as the wrappers want them."""

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor


class FlashInferAttention(CountingAttention):
    """FlashInfer's decode wrapper for steps of single tokens, its prefill wrapper for the others.

    Plans are made on the host, so they are made when metadata are built, for every kind of layer
    that :meth:`unsupported_reasons` was shown.
    """

    Config = FlashInferConfig

    def __init__(self, config: FlashInferConfig | None = None) -> None:
        super().__init__(config)
        if self.config.workspace_mb < 1:
            raise ConfigError(
                f"attention.workspace_mb={self.config.workspace_mb} must be positive."
            )
        self._kinds: list[_Kind] = []
        self._dtype = torch.float32
        self._device = torch.device("cpu")
        self._workspace: torch.Tensor | None = None
        self._wrappers: dict[tuple[Phase, _Kind], Any] = {}
        self._pages_known: list[int] = []
        self._flat_index: torch.Tensor | None = None
        self._planned: torch.cuda.Event | None = None

    def build_metadata(self, batch: ForwardBatch) -> FlashInferMetadata:
        if self._planned is not None:
            # A wrapper plans into one pinned buffer and queues its copy: a step that samples
            # nothing returns before the copy of its plan has run.
            self._planned.synchronize()
        phase = phase_of(batch)
        pages = self._pages(batch)
        starts = torch.tensor([0, *batch.query_lens_host]).cumsum(0).to(torch.int32)
        wrappers = {}
        for kind in self._kinds:
            wrapper = self._wrapper(phase, kind)
            shared = {
                "page_size": batch.block_size,
                "sm_scale": kind.scale,
                "window_left": -1 if kind.sliding_window is None else kind.sliding_window - 1,
                "logits_soft_cap": kind.soft_cap,
                "q_data_type": self._dtype,
                "kv_data_type": self._dtype,
            }
            heads = (kind.num_heads, kind.num_kv_heads, kind.head_dim)
            table = (pages.indptr, pages.indices, pages.last_page_len)
            if phase == "decode":
                wrapper.plan(*table, *heads, **shared)
            else:
                wrapper.plan(starts, *table, *heads, causal=True, **shared)
            wrappers[kind] = wrapper
            self._calls["plans"] += 1
        if self._device.type == "cuda":
            self._planned = torch.cuda.current_stream(self._device).record_event()
        return FlashInferMetadata(phase, wrappers)

    def _wrapper(self, phase: Phase, kind: _Kind) -> Any:
        key = (phase, kind)
        if key not in self._wrappers:
            import flashinfer  # type: ignore[import-not-found,unused-ignore]

            if self._workspace is None:
                size = self.config.workspace_mb << 20
                self._workspace = torch.empty(size, dtype=torch.uint8, device=self._device)
            if phase == "decode":
                # Tensor cores pay as soon as several query heads share a key.
                self._wrappers[key] = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace, "NHD", use_tensor_cores=kind.num_heads > kind.num_kv_heads
                )
            else:
                self._wrappers[key] = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                    self._workspace, "NHD"
                )
        return self._wrappers[key]

    def _pages(self, batch: ForwardBatch) -> _Pages:
        """Gather the blocks in use on the device; which entries they are is known on the host."""
        size, columns = batch.block_size, batch.block_table.shape[1]
        counts = [-(-length // size) for length in batch.seq_lens_host]
        lengths = torch.tensor(batch.seq_lens_host, dtype=torch.int32)
        pages = torch.tensor(counts, dtype=torch.int32)
        known = [columns, *counts]
        if self._flat_index is None or known != self._pages_known:
            first = torch.arange(len(counts)) * columns
            owner = torch.repeat_interleave(first, pages)
            offset = torch.arange(len(owner)) - torch.repeat_interleave(
                pages.cumsum(0) - pages, pages
            )
            self._flat_index = (owner + offset).to(batch.block_table.device, non_blocking=True)
            self._pages_known = known
        table = batch.block_table.reshape(-1)
        indptr = torch.cat([pages.new_zeros(1), pages.cumsum(0).to(torch.int32)])
        return _Pages(indptr, table[self._flat_index], lengths - (pages - 1) * size)

    def forward(
        self, q: torch.Tensor, layer: AttentionLayer, metadata: FlashInferMetadata, pool: KVPool
    ) -> torch.Tensor:
        self.count(metadata.phase)
        out: torch.Tensor = metadata.wrappers[_Kind.of(layer)].run(
            q.contiguous(), pool.layer(layer.index)
        )
        return out

    def reset_counters(self) -> None:
        super().reset_counters()
        self._calls["plans"] = 0

    def unsupported_reasons(self, layers: list[AttentionLayer], pool: KVPool) -> list[str]:
        cache = pool.layer(0)[0]
        self._kinds = list(dict.fromkeys(_Kind.of(layer) for layer in layers))
        self._dtype, self._device = cache.dtype, cache.device
        return [
            *library_reasons("flashinfer", "flashinfer-python", "flashinfer"),
            *cuda_reasons(pool),
            *capability_reasons(pool, (8, 0)),
            *dtype_reasons(pool, (torch.float16, torch.bfloat16)),
            *head_dim_reasons(layers, most=max(_HEAD_DIMS), among=_HEAD_DIMS),
            *quantized_reasons(pool),
        ]
