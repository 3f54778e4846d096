"""Whole texts through a decoder in one pass, without an engine: to collect what its layers see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from workbench.core.step import ForwardBatch
from workbench.slots.attention import AttentionLayer, SdpaAttention
from workbench.slots.kv_pool import KVPool


class WholeTextAttention(SdpaAttention):
    """Attention of whole texts, each of which has one block of the pool: all of them at once."""

    def forward(
        self, q: torch.Tensor, layer: AttentionLayer, metadata: ForwardBatch, pool: KVPool
    ) -> torch.Tensor:
        if layer.sliding_window is not None or layer.soft_cap is not None:
            return super().forward(q, layer, metadata, pool)
        count = metadata.num_requests
        k, v = (cache[:count].transpose(1, 2) for cache in pool.layer(layer.index))
        padded = q.new_zeros(count * metadata.block_size, *q.shape[1:])
        padded[metadata.slot_mapping] = q
        # What stands behind a text's end is zero, and only padding sees it.
        out = F.scaled_dot_product_attention(
            padded.view(count, metadata.block_size, *q.shape[1:]).transpose(1, 2),
            k,
            v,
            is_causal=True,
            scale=layer.scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2).reshape(padded.shape)[metadata.slot_mapping]


def whole_text_batch(
    texts: Sequence[Sequence[int]], longest: int, device: torch.device
) -> ForwardBatch:
    """A step of whole texts, each in a block of the pool of its own.

    Parameters
    ----------
    texts
        Tokens of each; none is empty.
    longest
        Size of a block, at least the longest text.
    """
    lengths = [len(text) for text in texts]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    positions = torch.cat([torch.arange(n) for n in lengths])
    slots = torch.cat([b * longest + torch.arange(n) for b, n in enumerate(lengths)])
    return ForwardBatch(
        input_ids=torch.tensor([i for text in texts for i in text], device=device),
        positions=positions.to(device),
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=torch.arange(len(texts), dtype=torch.int32, device=device).unsqueeze(1),
        slot_mapping=slots.to(device),
        logits_indices=torch.arange(starts[-1], device=device),
        rows=torch.arange(len(texts), device=device),
        query_lens_host=lengths,
        seq_lens_host=lengths,
        block_size=longest,
    )
