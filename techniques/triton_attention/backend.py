"""Split-KV decoding and mixed prefill over block tables, in Triton (``kernels.triton``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import kernels
from kernels import triton
from techniques.attention import (
    CountingAttention,
    Phase,
    capability_reasons,
    dtype_reasons,
    head_dim_reasons,
    phase_of,
    quantized_reasons,
)
from workbench.core.step import ForwardBatch
from workbench.slots.attention import AttentionLayer, CudaGraphSupport, tree_of
from workbench.slots.kv_pool import KVPool


@dataclass(frozen=True, slots=True)
class TritonMetadata:
    """A batch, and what is found out of it once a step."""

    batch: ForwardBatch
    max_query_len: int
    phase: Phase


class TritonAttention(CountingAttention):
    """Our own kernels: one for few queries a request, one for any mixture of lengths."""

    #: Launches depend on shapes and on the longest query alone.
    cudagraph_support = CudaGraphSupport.ALWAYS
    supports_trees = True

    def build_metadata(self, batch: ForwardBatch) -> TritonMetadata:
        return TritonMetadata(batch, batch.max_query_len, phase_of(batch))

    def forward(
        self, q: torch.Tensor, layer: AttentionLayer, metadata: TritonMetadata, pool: KVPool
    ) -> torch.Tensor:
        self.count(metadata.phase)
        batch = metadata.batch
        k_cache, v_cache = pool.layer(layer.index)
        return kernels.paged_attend(
            q,
            k_cache,
            v_cache,
            batch.block_table,
            batch.query_start_loc,
            batch.seq_lens,
            layer.scale,
            sliding_window=layer.sliding_window,
            soft_cap=layer.soft_cap,
            max_query_len=metadata.max_query_len,
            tree=tree_of(batch, layer.sliding_window),
            implementation="triton",
        )

    def unsupported_reasons(self, layers: list[AttentionLayer], pool: KVPool) -> list[str]:
        cache = pool.layer(0)[0]
        device = triton.unsupported_reason(cache)
        reasons = [device] if device else []
        reasons += capability_reasons(pool, (8, 0))
        reasons += dtype_reasons(pool, triton.DTYPES)
        reasons += head_dim_reasons(layers, most=triton.MAX_HEAD_DIM)
        return [*reasons, *quantized_reasons(pool)]
