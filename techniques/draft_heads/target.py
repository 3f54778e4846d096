"""What heads ask of their target: embeddings, the output layer, hidden states of whole texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workbench.core.errors import UnsupportedError
from workbench.models.decoder import Decoder
from workbench.models.whole_texts import WholeTextAttention, whole_text_batch
from workbench.slots.attention import ForwardContext, KeptHidden
from workbench.slots.kv_pool import ModelDtypePool


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
        batch = whole_text_batch(texts, longest, device)
        pool = ModelDtypePool(
            shape=self.spec.kv_shape(decoder.dtype),
            num_blocks=len(texts),
            block_size=longest,
            device=device,
        )
        kept, attention = KeptHidden(frozenset(layers)), WholeTextAttention()
        context = ForwardContext(batch, attention, attention.build_metadata(batch), pool, kept)
        final = decoder.normalize(decoder.forward(batch, context))
        place = torch.cat([b * longest + torch.arange(n) for b, n in enumerate(lengths)]).to(device)

        def padded(flat: torch.Tensor) -> torch.Tensor:
            out = flat.new_zeros(len(texts) * longest, flat.shape[1])
            return out.index_copy_(0, place, flat).view(len(texts), longest, -1)

        states = [padded(kept.states[i]) for i in layers]
        final = padded(final)
        return HiddenStates(final, torch.cat(states, -1) if states else final[..., :0])
