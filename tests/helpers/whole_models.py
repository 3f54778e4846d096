"""A decoder's logits of whole texts, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.models.decoder import Decoder
from workbench.models.whole_texts import WholeTextAttention, whole_text_batch
from workbench.slots.attention import ForwardContext
from workbench.slots.kv_pool import ModelDtypePool


@torch.no_grad()
def whole_logits(decoder: Decoder, texts: Sequence[Sequence[int]]) -> Tensor:
    """``[T, V]`` of whole texts, by the decoder's own forward pass."""
    longest = max(map(len, texts))
    batch = whole_text_batch(texts, longest, decoder.device)
    pool = ModelDtypePool(
        shape=decoder.spec.kv_shape(decoder.dtype),
        num_blocks=len(texts),
        block_size=longest,
        device=decoder.device,
    )
    attention = WholeTextAttention()
    context = ForwardContext(batch, attention, attention.build_metadata(batch), pool)
    return decoder.compute_logits(decoder.forward(batch, context)).float()
