"""Packed queries over a block table through ``flash_attn.cute``."""

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

_LEAST_CAPABILITY = (9, 0)
_SPLIT_CAPABILITY = (10, 0)


@dataclass(frozen=True, slots=True)
class FlashAttentionConfig:
    """Options of :class:`FlashAttention`.

    Attributes
    ----------
    num_splits
        Pieces that the keys of a request are cut into; 0 lets the library choose. More than 1 needs
        compute capability 10.0.
    """

    num_splits: int = 1


@dataclass(frozen=True, slots=True)
class FlashAttentionMetadata:
    """A batch, and what is found out of it once a step."""

    batch: ForwardBatch
    max_query_len: int
    phase: Phase


class FlashAttention(CountingAttention):
    """The library's kernel, compiled on its first call in each shape of model."""

    Config = FlashAttentionConfig

    def __init__(self, config: FlashAttentionConfig | None = None) -> None:
        super().__init__(config)
        if self.config.num_splits < 0:
            raise ConfigError(
                f"attention.num_splits={self.config.num_splits} must be 1 or more, or 0 for the"
                " library's choice."
            )
        self._attend: Any = None

    def build_metadata(self, batch: ForwardBatch) -> FlashAttentionMetadata:
        return FlashAttentionMetadata(batch, batch.max_query_len, phase_of(batch))

    def forward(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        metadata: FlashAttentionMetadata,
        pool: KVPool,
    ) -> torch.Tensor:
        self.count(metadata.phase)
        if self._attend is None:
            from flash_attn.cute import (  # type: ignore[import-not-found,unused-ignore]
                flash_attn_varlen_func,
            )

            self._attend = flash_attn_varlen_func
        batch = metadata.batch
        k_cache, v_cache = pool.layer(layer.index)
        window = layer.sliding_window
        result = self._attend(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q=batch.query_start_loc,
            seqused_k=batch.seq_lens,
            max_seqlen_q=metadata.max_query_len,
            page_table=batch.block_table,
            softmax_scale=layer.scale,
            causal=True,
            window_size=(None, None) if window is None else (window - 1, 0),
            softcap=layer.soft_cap or 0.0,
            num_splits=self.config.num_splits,
        )
        out: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return out

    def unsupported_reasons(self, layers: list[AttentionLayer], pool: KVPool) -> list[str]:
        return [
            *library_reasons("flash_attn.cute", "flash-attn-4", "flash"),
            *cuda_reasons(pool),
            *capability_reasons(pool, _LEAST_CAPABILITY),
            *dtype_reasons(pool, (torch.float16, torch.bfloat16)),
            *head_dim_reasons(layers, multiple=8, most=256),
            *quantized_reasons(pool),
            *self._split_reasons(pool),
        ]

    def _split_reasons(self, pool: KVPool) -> list[str]:
        splits = self.config.num_splits
        if splits == 1 or not capability_reasons(pool, _SPLIT_CAPABILITY):
            return []
        return [f"attention.num_splits={splits} must be 1 under compute capability 10.0"]
