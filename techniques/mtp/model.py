"""A multi-token-prediction module at run time: joins the next token's embedding with a hidden
state, runs one decoder layer of the target's kind, and ends in the target's LM head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch

import kernels
from techniques.mtp.layouts import Layout
from workbench.core.step import ForwardBatch
from workbench.models.checkpoint import WeightSource
from workbench.models.decoder import Decoder, DecoderLayer
from workbench.models.families import WeightNames
from workbench.models.parameters import Parameter, layer_norms, norm_parts
from workbench.models.spec import ModelSpec
from workbench.slots.attention import AttentionLayer, ForwardContext
from workbench.slots.kv_pool import KVPool
from workbench.slots.linear import LinearLayer


def layer_spec(target: ModelSpec) -> ModelSpec:
    """The module's decoder layer: one like the target's last."""
    last = target.layers[-1]
    own = dataclasses.replace(last, attention=dataclasses.replace(last.attention, index=0))
    return dataclasses.replace(target, layers=(own,), num_prediction_layers=0)


class MtpModel:
    """A module in one of the published layouts, as :class:`techniques.eagle.model.HeadModel`.

    Parameters
    ----------
    target
        Whose embedding, LM head and rotary table it uses.
    index
        Of the module in its stack.
    source
        Its weights.

    Raises
    ------
    KeyError
        The source lacks a tensor; :func:`parameters` says which there must be.
    """

    features: torch.Tensor

    def __init__(
        self,
        target: Decoder,
        names: WeightNames,
        layout: Layout,
        index: int,
        source: WeightSource,
        expected_tokens: int,
    ) -> None:
        self._target, self._layout = target, layout
        self._ops, self._linear = target.ops, target.linear
        self._spec = spec = layer_spec(target.spec)
        self._eps, self._offset = spec.norm_eps, spec.norm_offset
        self.num_bytes = 0

        def read(parameter: Parameter) -> torch.Tensor:
            found = source.read(parameter).to(target.device, target.dtype).contiguous()
            self.num_bytes += found.nbytes
            return found

        def fill(linear: LinearLayer) -> None:
            self._linear.create_weights(linear, target.dtype, target.device)
            for parameter, place in _linear_parameters(linear):
                place.copy_(read(parameter))
            self._linear.process_weights_after_loading(linear, expected_tokens)

        self._token_norm, self._hidden_norm, self._final_norm = (
            read(parameter) for parameter in _own_norms(spec, layout, index)
        )
        self._project = _projection(spec, layout, index)
        fill(self._project)
        self._layer = _decoder_layer(target, names, layout, index)
        own_names = _names(names, layout, index)
        norms = zip(norm_parts(spec), layer_norms(spec, own_names, 0), strict=True)
        for part, parameter in norms:
            setattr(self._layer, part, read(parameter))
        for linear in self._layer.linears:
            fill(linear)
        self._layer.bind_rope(target.layers[-1].rope.cos_sin)

    @property
    def layer(self) -> ModelSpec:
        """Its one layer, as a decoder."""
        return self._spec

    @property
    def features_dtype(self) -> torch.dtype:
        """Of its hidden states, keys and values."""
        return self._target.dtype

    @property
    def max_positions(self) -> int:
        """Positions that it can rotate."""
        return self._spec.max_position_embeddings

    @property
    def attention_layers(self) -> list[AttentionLayer]:
        """Its one layer."""
        return self._spec.attention_layers

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Hidden states of the target that it reads: what leaves the last layer."""
        return (self._target.spec.num_layers,)

    def start(self, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """Features ``[T, H]`` of pairs by the target's hidden states, by layer ``[T, H]``."""
        (last,) = (kept[i] for i in self.kept_layers)
        return self._target.normalize(last) if self._layout.features_are_normed else last

    def fill(self, batch: ForwardBatch, features: torch.Tensor, pool: KVPool) -> None:
        """Write keys and values of a batch of pairs, and nothing else: what comes out of its layer
        is wanted of the pair that is drafted from alone."""
        layer = self._layer
        x = self._rms(self._join(batch.input_ids, features), layer.attention_norm)
        qkv = self._linear.apply(layer.qkv_proj, x)
        heads = layer.attention.num_heads
        pool.rotate_and_write(0, qkv, batch.positions, batch.slot_mapping, heads, layer.rope)

    def forward(self, batch: ForwardBatch, context: ForwardContext) -> torch.Tensor:
        """Hidden states ``[T, H]``; ``batch.input_ids`` are the tokens one position on."""
        layer, linear = self._layer, self._linear
        residual = self._join(batch.input_ids, self.features)
        if self._spec.norm_style == "pre" and linear.fuses(len(residual)):
            layer.forward_fused(residual, context, linear)
        else:
            gated = linear.apply_gated if linear.gates(len(residual)) else None
            x = self._rms(residual, layer.attention_norm)
            residual.add_(layer.forward(x, residual, context, linear.apply, gated))
        if self._layout.features_are_normed:
            residual = self._rms(residual, self._final_norm)
        self.features = residual
        return residual

    def _join(self, token_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What enters the layer, ``[T, H]``, a new tensor."""
        tokens = self._rms(self._target.embed(token_ids), self._token_norm)
        hidden = self._rms(hidden, self._hidden_norm)
        halves = [tokens, hidden] if self._layout.embedding_first else [hidden, tokens]
        return self._linear.apply(self._project, torch.cat(halves, dim=1))

    def _rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._ops.rms_norm(x, weight, self._eps, offset=self._offset)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[L, V]`` behind hidden states ``[L, H]``."""
        linear, head = self._linear, self._target.lm_head
        if self._layout.features_are_normed:
            logits = linear.apply(head, hidden)
        elif linear.fuses(len(hidden)):
            norm = kernels.RowNorm(self._final_norm, self._eps, self._offset)
            logits = linear.apply_normed(head, hidden, norm)
        else:
            logits = linear.apply(head, self._rms(hidden, self._final_norm))
        cap = self._spec.logit_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        """Likeliest token ``[L]`` int64 behind each of these hidden states ``[L, H]``."""
        return kernels.argmax(self.compute_logits(hidden)[:, : self._spec.vocab_size])

    def top(self, hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Likeliest tokens behind hidden states ``[L, H]``, best first, int64 ``[L, count]``, and
        their log-probabilities, float32."""
        logits = self.compute_logits(hidden)[:, : self._spec.vocab_size].float()
        best, found = logits.topk(count, dim=1)
        return found, best - logits.logsumexp(1, keepdim=True)


def parameters(
    target: Decoder, names: WeightNames, layout: Layout, index: int
) -> Iterator[Parameter]:
    """Every tensor of a module, but for the copies of the target's."""
    spec = layer_spec(target.spec)
    yield from _own_norms(spec, layout, index)
    yield from layer_norms(spec, _names(names, layout, index), 0)
    layer = _decoder_layer(target, names, layout, index)
    for linear in (_projection(spec, layout, index), *layer.linears):
        # On "meta" asking the method what its checkpoints hold costs no memory.
        target.linear.create_weights(linear, target.dtype, torch.device("meta"))
        for parameter, _ in _linear_parameters(linear):
            yield parameter


def _names(names: WeightNames, layout: Layout, index: int) -> WeightNames:
    """The target's names of a layer's parts, behind the module's prefix."""
    return dataclasses.replace(names, layer_prefix=layout.stack.format(index=index))


def _decoder_layer(target: Decoder, names: WeightNames, layout: Layout, index: int) -> DecoderLayer:
    layer_class, own_names = type(target.layers[-1]), _names(names, layout, index)
    return layer_class(
        layer_spec(target.spec), 0, own_names, target.ops, target.parallel.all_reduce
    )


def _own_norms(spec: ModelSpec, layout: Layout, index: int) -> Iterator[Parameter]:
    """Norms of the token, of the hidden state, and the final one."""
    prefix = layout.stack.format(index=index)
    for part in (layout.token_norm, layout.hidden_norm, layout.final_norm):
        yield Parameter(f"{prefix}{part}.weight", (spec.hidden_size,), is_norm=True)


def _projection(spec: ModelSpec, layout: Layout, index: int) -> LinearLayer:
    name, width = f"{layout.stack.format(index=index)}{layout.projection}", spec.hidden_size
    return LinearLayer(f"draft_head.{layout.projection}", 2 * width, width, ((name, width),))


def _linear_parameters(linear: LinearLayer) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Checkpoint tensors of a linear layer, and where in its parameters they go."""
    for suffix, whole in linear.params.items():
        start = 0
        for name, width in linear.shards:
            place = whole.narrow(0, start, width)
            yield Parameter(f"{name}.{suffix}", tuple(place.shape)), place
            start += width
