"""An EAGLE head at run time: the trained module's weights on the engine's kernels and KV pool."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import kernels
from techniques.draft_heads import HeadSpec
from workbench.core.step import ForwardBatch
from workbench.models.decoder import Decoder
from workbench.slots.attention import AttentionLayer, ForwardContext
from workbench.slots.kv_pool import RopeInputs


class EagleModel:
    """Runs a head over a flat batch of tokens.

    The token at position ``p`` of a batch stands for the pair of the hidden state behind token
    ``p`` and the token at ``p + 1``; what comes out guesses token ``p + 2``, and is the hidden
    state of the next pair.

    Parameters
    ----------
    state
        Weights under their published names.
    target
        Whose embeddings, and for EAGLE whose output layer, it uses.

    Attributes
    ----------
    features : Tensor[T, H]
        Hidden states of the next batch's pairs; set by every pass to what came out of it.
    """

    features: torch.Tensor

    def __init__(
        self,
        spec: HeadSpec,
        state: Mapping[str, torch.Tensor],
        target: Decoder,
        expected_tokens: int,
    ) -> None:
        self.spec, self._target = spec, target
        self._is_third = spec.kind == "eagle3"
        layer, prefix = spec.layer, "midlayer." if self._is_third else "layers.0."
        self.num_bytes = 0

        def tensor(name: str) -> torch.Tensor:
            found = state[name].to(target.device, target.dtype).contiguous()
            self.num_bytes += found.nbytes
            return found

        def linear(*names: str) -> kernels.PackedLinear:
            weight = torch.cat([tensor(f"{name}.weight") for name in names])
            has_bias = f"{names[0]}.bias" in state
            bias = torch.cat([tensor(f"{name}.bias") for name in names]) if has_bias else None
            return kernels.pack_linear(weight, bias, expected_tokens)

        self._fc = linear("fc")
        self._qkv = linear(*(f"{prefix}self_attn.{part}_proj" for part in "qkv"))
        self._o = linear(f"{prefix}self_attn.o_proj")
        self._gate_up = linear(*(f"{prefix}mlp.{part}_proj" for part in ("gate", "up")))
        self._down = linear(f"{prefix}mlp.down_proj")
        self._mlp_norm = tensor(f"{prefix}post_attention_layernorm.weight")
        self._eps = layer.norm_eps
        self._ids: torch.Tensor | None = None
        if self._is_third:
            self._token_norm = tensor(f"{prefix}input_layernorm.weight")
            self._hidden_norm = tensor(f"{prefix}hidden_norm.weight")
            self._norm, self._head = tensor("norm.weight"), linear("lm_head")
            if spec.has_reduced_vocab:
                ids = state["d2t"].long() + torch.arange(spec.draft_vocab_size)
                self._ids = ids.to(target.device)
        (rope,) = {own.rope for own in layer.layers}
        table = rope.table(layer.max_position_embeddings, target.device)
        self.num_bytes += table.nbytes
        self._rope = RopeInputs(table, eps=layer.norm_eps)

    @property
    def features_dtype(self) -> torch.dtype:
        """Of its hidden states, keys and values."""
        return self._target.dtype

    @property
    def max_positions(self) -> int:
        """Positions that it can rotate."""
        return min(
            self.spec.layer.max_position_embeddings, self._target.spec.max_position_embeddings
        )

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """Its one layer."""
        return self.spec.layer.attention_layers

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Hidden states of the target that it reads."""
        return self.spec.aux_layers if self._is_third else (self._target.spec.num_layers,)

    def start(self, kept: Mapping[int, torch.Tensor]) -> None:
        """Take the target's hidden states, by layer ``[T, H]``, for the next pass."""
        states = [kept[i] for i in self.kept_layers]
        if self._is_third:
            self.features = kernels.apply_linear(self._fc, torch.cat(states, dim=1))
        else:
            self.features = self._target.normalize(states[0])

    def forward(self, batch: ForwardBatch, context: ForwardContext) -> torch.Tensor:
        """Hidden states ``[T, H]``; ``batch.input_ids`` are the tokens one position on."""
        tokens, hidden = self._target.embed(batch.input_ids), self.features
        if self._is_third:
            x = torch.cat(
                [
                    kernels.rms_norm(tokens, self._token_norm, self._eps),
                    kernels.rms_norm(hidden, self._hidden_norm, self._eps),
                ],
                dim=1,
            )
            residual = hidden.clone()
        else:
            x = kernels.apply_linear(self._fc, torch.cat([tokens, hidden], dim=1))
            residual = x.clone()
        (layer,) = self.attention_layers
        q = context.pool.rotate_and_write(
            0,
            kernels.apply_linear(self._qkv, x),
            batch.positions,
            batch.slot_mapping,
            layer.num_heads,
            self._rope,
        )
        x = context.attention.forward(q, layer, context.metadata, context.pool).flatten(1)
        x = kernels.apply_linear(self._o, x)
        x = kernels.add_rms_norm_(x, residual, self._mlp_norm, self._eps)
        x = kernels.silu_and_mul(kernels.apply_linear(self._gate_up, x))
        self.features = residual.add_(kernels.apply_linear(self._down, x))
        return self.features

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[L, V]`` over the target's ids; those that it cannot propose have none."""
        if not self._is_third:
            return self._target.linear.apply(self._target.lm_head, hidden)
        logits = kernels.apply_linear(self._head, kernels.rms_norm(hidden, self._norm, self._eps))
        if self._ids is None:
            return logits
        whole = logits.new_full((len(logits), self.spec.vocab_size), -torch.inf)
        whole[:, self._ids] = logits
        return whole
