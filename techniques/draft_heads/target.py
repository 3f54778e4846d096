"""What heads ask of their target: embeddings, the output layer, hidden states of whole texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from workbench.core.errors import UnsupportedError
from workbench.core.step import ForwardBatch
from workbench.models.decoder import Decoder
from workbench.slots.attention import AttentionLayer, ForwardContext, KeptHidden, SdpaAttention
from workbench.slots.kv_pool import KVPool, ModelDtypePool


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Of a batch of texts, padded at the end.

    Attributes
    ----------
    final : Tensor[B, S, H]
        After the last layer and the final norm.
    kept : Tensor[B, S, n * H]
        Of the layers that were asked for, side by side.
    """

    final: torch.Tensor
    kept: torch.Tensor


class Target:
    """A loaded decoder as heads see it. Nothing of it is changed."""

    def __init__(self, decoder: Decoder) -> None:
        if decoder.spec.logit_soft_cap is not None:
            raise UnsupportedError("draft heads for targets that cap their logits are not made.")
        self.decoder = decoder
        self.spec = decoder.spec

    def embedding(self) -> torch.Tensor:
        """``[V, H]``, with the factor that the target puts on embeddings."""
        scale = self.decoder._embedding_scale
        return self.decoder.embedding if scale is None else self.decoder.embedding * scale

    def lm_head(self) -> torch.Tensor:
        """The output layer as a matrix ``[V, H]``, however it is stored.

        Where it is not tied it is multiplied out of the identity, which rounds nothing.
        """
        if self.spec.tie_word_embeddings:
            return self.decoder.embedding
        decoder = self.decoder
        one = torch.eye(self.spec.hidden_size, dtype=decoder.dtype, device=decoder.device)
        return decoder.linear.apply(decoder.lm_head, one).T.contiguous()

    def fingerprint(self) -> str:
        """Tells targets of one shape apart; the same in every dtype that holds a bfloat16."""
        digest = hashlib.blake2b(digest_size=8)
        for tensor in (self.decoder.final_norm, self.decoder.embedding[:64]):
            digest.update(tensor.to(torch.bfloat16).float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def hidden_states(
        self, texts: Sequence[Sequence[int]], layers: Sequence[int] = ()
    ) -> HiddenStates:
        """Run whole texts once. Holds KV for them alone, and only meanwhile.

        Parameters
        ----------
        layers
            Which to keep (see :class:`KeptHidden`); one may come twice.
        """
        decoder, device = self.decoder, self.decoder.device
        longest, lengths = max(map(len, texts)), [len(text) for text in texts]
        batch = _whole_texts(texts, longest, device)
        pool = ModelDtypePool(
            shape=self.spec.kv_shape(decoder.dtype),
            num_blocks=len(texts),
            block_size=longest,
            device=device,
        )
        kept, attention = KeptHidden(frozenset(layers)), _WholeTexts()
        context = ForwardContext(batch, attention, attention.build_metadata(batch), pool, kept)
        final = decoder.normalize(decoder.forward(batch, context))
        place = torch.cat([b * longest + torch.arange(n) for b, n in enumerate(lengths)]).to(device)

        def padded(flat: torch.Tensor) -> torch.Tensor:
            out = flat.new_zeros(len(texts) * longest, flat.shape[1])
            return out.index_copy_(0, place, flat).view(len(texts), longest, -1)

        states = [padded(kept.states[i]) for i in layers]
        final = padded(final)
        return HiddenStates(final, torch.cat(states, -1) if states else final[..., :0])


class _WholeTexts(SdpaAttention):
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


def _whole_texts(
    texts: Sequence[Sequence[int]], longest: int, device: torch.device
) -> ForwardBatch:
    """Each text in a block of its own."""
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
