"""What a decoder is: one frozen description from which everything about it can be counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from workbench.models.rope import RopeSpec
from workbench.slots.attention import AttentionLayer
from workbench.slots.kv_pool import KVShape

NormStyle = Literal["pre", "sandwich"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer: attention and its rotary embedding."""

    attention: AttentionLayer
    rope: RopeSpec

    @property
    def q_size(self) -> int:
        """Width of the queries, and of what attention puts out."""
        return self.attention.num_heads * self.attention.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys, and of the values."""
        return self.attention.num_kv_heads * self.attention.head_dim


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer, whatever family it came from.

    Attributes
    ----------
    architecture
        Name in the Hugging Face config, such as ``LlamaForCausalLM``.
    activation
        Of the gated feed-forward block: ``silu`` or ``gelu_pytorch_tanh``.
    norm_style
        ``pre``: a norm before attention and one before the feed-forward block. ``sandwich``: one
        after each as well (Gemma 3, arXiv:2503.19786).
    norm_offset
        Added to the norm weights (1.0 for Gemma).
    qk_norm
        RMSNorm on each head of q and k before the rotation.
    embedding_scale
        Factor on embeddings, rounded to the model's dtype before use; None leaves them.
    logit_soft_cap
        ``cap * tanh(logits / cap)`` on the final logits; None leaves them.
    initializer_range
        Standard deviation of random weights.
    dtype
        What the checkpoint was saved in, where the config says so.
    num_prediction_layers
        Modules behind the decoder that predict tokens further ahead (``num_nextn_predict_layers``;
        DeepSeek-V3, arXiv:2412.19437, section 2.2). The checkpoint holds them, the decoder does
        not run them.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerSpec, ...]
    max_position_embeddings: int
    activation: str = "silu"
    norm_eps: float = 1e-6
    norm_style: NormStyle = "pre"
    norm_offset: float = 0.0
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    embedding_scale: float | None = None
    logit_soft_cap: float | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    num_prediction_layers: int = 0

    # -- shape --------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """What an attention backend must know, one entry a layer."""
        return [layer.attention for layer in self.layers]

    def kv_shape(self, dtype: torch.dtype) -> KVShape:
        """Shape of the model's keys and values."""
        return KVShape(
            num_kv_heads=tuple(layer.attention.num_kv_heads for layer in self.layers),
            head_dim=tuple(layer.attention.head_dim for layer in self.layers),
            dtype=dtype,
        )

    # -- parameters ---------------------------------------------------------------------------

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the embedding table, or of the head: they have one shape."""
        return self.vocab_size * self.hidden_size

    @property
    def num_linear_parameters(self) -> int:
        """Weights that every token is multiplied by, head and biases apart."""
        mlp = 3 * self.hidden_size * self.intermediate_size
        return sum(2 * self.hidden_size * (la.q_size + la.kv_size) + mlp for la in self.layers)

    @property
    def num_small_parameters(self) -> int:
        """Norm weights and biases."""
        norms_per_layer = 4 if self.norm_style == "sandwich" else 2
        count = self.hidden_size  # final norm
        for layer in self.layers:
            count += norms_per_layer * self.hidden_size
            count += 2 * layer.attention.head_dim * self.qk_norm
            count += (layer.q_size + 2 * layer.kv_size) * self.qkv_bias
            count += self.hidden_size * self.o_bias
            count += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        return count

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied head counts once."""
        tables = 1 if self.tie_word_embeddings else 2
        return (
            tables * self.num_embedding_parameters
            + self.num_linear_parameters
            + self.num_small_parameters
        )

    # -- bytes and operations -----------------------------------------------------------------

    def weight_bytes(self, dtype: torch.dtype, *, tied_head_is_copied: bool = False) -> int:
        """Bytes of the weights when every one is stored in ``dtype``.

        Parameters
        ----------
        tied_head_is_copied
            The tied head lies in memory a second time, in the layout that the matrix library
            computes in; without effect on an untied head.
        """
        copied = self.num_embedding_parameters * (self.tie_word_embeddings and tied_head_is_copied)
        return (self.num_parameters + copied) * dtype.itemsize

    def rope_bytes(self, num_positions: int | None = None) -> int:
        """Bytes of the rotary tables for so many positions (default: all that the model has)."""
        positions = self.max_position_embeddings if num_positions is None else num_positions
        return sum(rope.table_bytes(positions) for rope in {layer.rope for layer in self.layers})

    def flops_per_token(self, context: int, *, with_logits: bool = True) -> int:
        """Operations (a multiply-add is two) in the matrix products of one token.

        Parameters
        ----------
        context
            Tokens that it attends to, itself included; a sliding window cuts it per layer.
        with_logits
            Whether the head runs for this token.
        """
        flops = 2 * self.num_linear_parameters
        flops += 2 * self.num_embedding_parameters * with_logits
        for layer in self.layers:
            window = layer.attention.sliding_window
            seen = context if window is None else min(context, window)
            flops += 4 * layer.q_size * seen  # scores, then their product with the values
        return flops
