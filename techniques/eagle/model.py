"""An EAGLE head at run time: the trained module's weights on the engine's kernels and KV pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

import kernels
from techniques.draft_heads import HeadSpec
from workbench.core.step import ForwardBatch
from workbench.models.decoder import Decoder
from workbench.models.spec import ModelSpec
from workbench.slots.attention import AttentionLayer, ForwardContext
from workbench.slots.kv_pool import KVPool, RopeInputs
from workbench.slots.linear import LinearLayer


class HeadModel(Protocol):
    """Runs a head over a flat batch of tokens.

    The token at position ``p`` of a batch stands for the pair of the hidden state behind token
    ``p`` and the token at ``p + 1``; what comes out guesses token ``p + 2``, and is the hidden
    state of the next pair.

    Attributes
    ----------
    features : Tensor[T, H]
        Hidden states of the next batch's pairs; set by every pass to what came out of it.
    num_bytes
        Of weights and tables of its own.
    """

    features: torch.Tensor
    num_bytes: int

    @property
    def layer(self) -> ModelSpec:
        """Its one layer, as a decoder."""

    @property
    def features_dtype(self) -> torch.dtype:
        """Of its hidden states, keys and values."""

    @property
    def max_positions(self) -> int:
        """Positions that it can rotate."""

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """Its one layer."""

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Hidden states of the target that it reads."""

    def start(self, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Features ``[T, H]`` of pairs by the target's hidden states, by layer ``[T, H]``."""

    def fill(self, batch: ForwardBatch, features: torch.Tensor, pool: KVPool) -> None:
        """Write keys and values of a batch of pairs, and nothing else: what comes out of its layer
        is wanted of the pair that is drafted from alone."""

    def forward(self, batch: ForwardBatch, context: ForwardContext) -> torch.Tensor:
        """Hidden states ``[T, H]``; ``batch.input_ids`` are the tokens one position on."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[L, V]`` over the target's ids; those that it cannot propose have none."""

    def likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        """Likeliest token ``[L]`` int64 behind each of these hidden states ``[L, H]``."""

    def top(self, hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Likeliest tokens behind hidden states ``[L, H]``, best first, int64 ``[L, count]``, and
        their log-probabilities, float32."""


class EagleModel:
    """An EAGLE or EAGLE-3 head, as :class:`HeadModel`.

    Parameters
    ----------
    state
        Weights under their published names.
    target
        Whose embeddings, and for EAGLE whose output layer, it uses.
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

        self._ops, self._linear = target.ops, target.linear

        def linear(*names: str) -> LinearLayer:
            weights = [tensor(f"{name}.weight") for name in names]
            shards = tuple((name, len(w)) for name, w in zip(names, weights, strict=True))
            params = {"weight": torch.cat(weights)}
            if f"{names[0]}.bias" in state:
                params["bias"] = torch.cat([tensor(f"{name}.bias") for name in names])
            out_features, in_features = params["weight"].shape
            made = LinearLayer(
                f"draft_head.{names[0]}", in_features, out_features, shards, len(params) > 1, params
            )
            self._linear.process_weights_after_loading(made, expected_tokens)
            return made

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
                places = torch.arange(spec.draft_vocab_size, device=target.device)
                self._ids = state["d2t"].to(target.device).long() + places
        (rope,) = {own.rope for own in layer.layers}
        table = rope.table(layer.max_position_embeddings, target.device)
        self.num_bytes += table.nbytes
        self._rope = RopeInputs(table, eps=layer.norm_eps)

    @property
    def layer(self) -> ModelSpec:
        """Its one layer, as a decoder."""
        return self.spec.layer

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

    def start(self, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Features ``[T, H]`` of pairs by the target's hidden states, by layer ``[T, H]``."""
        states = [kept[i] for i in self.kept_layers]
        if self._is_third:
            return self._linear.apply(self._fc, torch.cat(states, dim=1))
        return self._target.normalize(states[0])

    def fill(self, batch: ForwardBatch, features: torch.Tensor, pool: KVPool) -> None:
        """Write keys and values of a batch of pairs, and nothing else: what comes out of its layer
        is wanted of the pair that is drafted from alone."""
        self._project(batch, self._join(batch.input_ids, features)[0], pool)

    def _join(
        self, token_ids: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the layer ``[T, n * H]``, and the residual stream beside it ``[T, H]``."""
        tokens = self._target.embed(token_ids)
        if self._is_third:
            x = torch.cat(
                [
                    self._ops.rms_norm(tokens, self._token_norm, self._eps),
                    self._ops.rms_norm(hidden, self._hidden_norm, self._eps),
                ],
                dim=1,
            )
            return x, hidden.clone()
        x = self._linear.apply(self._fc, torch.cat([tokens, hidden], dim=1))
        return x, x.clone()

    def _project(self, batch: ForwardBatch, x: torch.Tensor, pool: KVPool) -> torch.Tensor:
        """Queries ``[T, heads, D]``; keys and values go to the pool."""
        (layer,) = self.attention_layers
        return pool.rotate_and_write(
            0,
            self._linear.apply(self._qkv, x),
            batch.positions,
            batch.slot_mapping,
            layer.num_heads,
            self._rope,
        )

    def forward(self, batch: ForwardBatch, context: ForwardContext) -> torch.Tensor:
        """Hidden states ``[T, H]``; ``batch.input_ids`` are the tokens one position on."""
        x, residual = self._join(batch.input_ids, self.features)
        (layer,) = self.attention_layers
        q = self._project(batch, x, context.pool)
        x = context.attention.forward(q, layer, context.metadata, context.pool).flatten(1)
        linear = self._linear
        if linear.fuses(len(x)):  # what stands between the products is theirs
            linear.apply_add_(self._o, x, residual)
            norm = kernels.RowNorm(self._mlp_norm, self._eps, 0.0)
            x = linear.apply_normed(self._gate_up, residual, norm, "silu")
            linear.apply_add_(self._down, x, residual)
            self.features = residual
            return residual
        x = linear.apply(self._o, x)
        x = self._ops.add_rms_norm_(x, residual, self._mlp_norm, self._eps)
        if linear.gates(len(x)):
            x = linear.apply_gated(self._gate_up, x, "silu")
        else:
            x = self._ops.silu_and_mul(linear.apply(self._gate_up, x))
        self.features = residual.add_(linear.apply(self._down, x))
        return self.features

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[L, V]`` over the target's ids; those that it cannot propose have none."""
        logits = self._own_logits(hidden)
        if self._ids is None:
            return logits
        whole = logits.new_full((len(logits), self.spec.vocab_size), -torch.inf)
        whole[:, self._ids] = logits
        return whole

    def likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        """Likeliest token ``[L]`` int64 behind each of these hidden states ``[L, H]``."""
        drawn = kernels.argmax(self._own_logits(hidden)[:, : self.spec.vocab_size])
        return drawn if self._ids is None else self._ids[drawn]

    def top(self, hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Likeliest tokens behind hidden states ``[L, H]``, best first, int64 ``[L, count]``, and
        their log-probabilities, float32."""
        logits = self._own_logits(hidden)[:, : self.spec.vocab_size].float()
        best, found = logits.topk(count, dim=1)
        logprobs = best - logits.logsumexp(1, keepdim=True)
        return (found if self._ids is None else self._ids[found]), logprobs

    def _own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Over the ids that it can propose."""
        if not self._is_third:
            return self._linear.apply(self._target.lm_head, hidden)
        linear = self._linear
        if linear.fuses(len(hidden)):
            norm = kernels.RowNorm(self._norm, self._eps, 0.0)
            return linear.apply_normed(self._head, hidden, norm)
        return linear.apply(self._head, self._ops.rms_norm(hidden, self._norm, self._eps))
