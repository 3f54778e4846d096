"""Attention in which a query's sums are cut at the same keys whatever else is in the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels import triton
from kernels.attention import as_int32
from techniques.attention import (
    CountingAttention,
    Phase,
    capability_reasons,
    dtype_reasons,
    head_dim_reasons,
    phase_of,
    quantized_reasons,
)
from techniques.batch_invariant import device as where
from workbench.core.step import ForwardBatch
from workbench.slots.attention import AttentionLayer, CudaGraphSupport
from workbench.slots.kv_pool import KVPool

_CPU_HEAD_DIM = 16  # the compiled kernel serves the multiples of it


@dataclass(frozen=True, slots=True)
class InvariantMetadata:
    """A batch, and what is found out of it once a step."""

    batch: ForwardBatch
    max_query_len: int
    phase: Phase


class InvariantAttention(CountingAttention):
    """One kernel for all lengths of queries: a query walks its keys from key 0, in tiles of one
    size, one after another. Single tokens too, whose keys nobody shares out.
    """

    #: Launches depend on shapes and on the longest query alone.
    cudagraph_support = CudaGraphSupport.ALWAYS

    def build_metadata(self, batch: ForwardBatch) -> InvariantMetadata:
        return InvariantMetadata(batch, batch.max_query_len, phase_of(batch))

    def forward(
        self, q: torch.Tensor, layer: AttentionLayer, metadata: InvariantMetadata, pool: KVPool
    ) -> torch.Tensor:
        self.count(metadata.phase)
        batch = metadata.batch
        caches = pool.layer(layer.index)
        pages = as_int32(batch.block_table, batch.query_start_loc, batch.seq_lens)
        if not where.has_triton(q.device):
            from kernels.cpu import attention

            return attention.paged_attend(
                q,
                *caches,
                *pages,
                layer.scale,
                layer.sliding_window,
                layer.soft_cap,
                is_invariant=True,
            )
        from kernels.triton import paged_prefill

        out = paged_prefill.paged_prefill(
            q,
            *caches,
            *pages,
            layer.scale,
            sliding_window=layer.sliding_window,
            soft_cap=layer.soft_cap,
            max_query_len=metadata.max_query_len,
            tiles=paged_prefill.invariant_tiles(q, caches[0]),
        )
        assert isinstance(out, torch.Tensor)
        return out

    def unsupported_reasons(self, layers: list[AttentionLayer], pool: KVPool) -> list[str]:
        cache = pool.layer(0)[0]
        reasons = quantized_reasons(pool)
        if where.has_triton(cache.device):
            reasons += capability_reasons(pool, (8, 0))
            reasons += dtype_reasons(pool, triton.DTYPES)
            return reasons + head_dim_reasons(layers, most=triton.MAX_HEAD_DIM)
        if not reasons:
            reasons = where.unsupported_reasons(cache.device, cache.dtype)
        most = max(layer.head_dim for layer in layers)
        return reasons + head_dim_reasons(layers, multiple=_CPU_HEAD_DIM, most=most)
