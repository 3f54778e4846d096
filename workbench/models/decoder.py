"""One decoder for every family: what differs between them stands in the :class:`ModelSpec`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

import kernels
from workbench.core.step import ForwardBatch
from workbench.models.families import WeightNames
from workbench.models.spec import ModelSpec
from workbench.slots.adapters import Adapters, NoAdapters
from workbench.slots.attention import ForwardContext
from workbench.slots.kv_pool import RopeInputs
from workbench.slots.linear import LinearLayer, LinearMethod
from workbench.slots.ops import DispatchedOps, Ops
from workbench.slots.parallel import Parallel, SingleDevice

ApplyLinear = Callable[[LinearLayer, torch.Tensor], torch.Tensor]
ApplyGated = Callable[[LinearLayer, torch.Tensor, str], torch.Tensor]

#: By the name that configs have for it.
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class DecoderLayer:
    """Attention and a gated feed-forward block, each behind a norm.

    The norm in front of attention is applied by whoever calls :meth:`forward`, because it is fused
    with the residual addition of the layer before. The loader fills the norm weights and the
    linear layers.

    Attributes
    ----------
    attention_norm, mlp_norm : Tensor [H]
        Weights of the norms before attention and before the feed-forward block.
    q_norm, k_norm : Tensor [D] or None
        Weights of the per-head norms.
    """

    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    rope: RopeInputs

    def __init__(
        self,
        spec: ModelSpec,
        index: int,
        names: WeightNames,
        ops: Ops,
        all_reduce: Callable[..., Any],
    ) -> None:
        layer = spec.layers[index]
        self.index = index
        self.attention = layer.attention
        self.eps, self.offset = spec.norm_eps, spec.norm_offset
        self.q_norm: torch.Tensor | None = None
        self.k_norm: torch.Tensor | None = None
        self.ops = ops
        self.activation_name = _ACTIVATIONS[spec.activation]
        self.all_reduce = all_reduce

        def linear(name: str, width: int, bias: bool, **shards: int) -> LinearLayer:
            stacked = tuple((names.of_layer(index, part), rows) for part, rows in shards.items())
            return LinearLayer(
                f"layers.{index}.{name}", width, sum(shards.values()), stacked, has_bias=bias
            )

        hidden, inner, q, kv = spec.hidden_size, spec.intermediate_size, layer.q_size, layer.kv_size
        self.qkv_proj = linear("qkv_proj", hidden, spec.qkv_bias, q_proj=q, k_proj=kv, v_proj=kv)
        self.o_proj = linear("o_proj", q, spec.o_bias, o_proj=hidden)
        self.gate_up_proj = linear(
            "gate_up_proj", hidden, spec.mlp_bias, gate_proj=inner, up_proj=inner
        )
        self.down_proj = linear("down_proj", inner, spec.mlp_bias, down_proj=hidden)

    @property
    def linears(self) -> tuple[LinearLayer, ...]:
        """The layer's linear layers."""
        return self.qkv_proj, self.o_proj, self.gate_up_proj, self.down_proj

    def bind_rope(self, cos_sin: torch.Tensor) -> None:
        """Take the rotary table and, the norm weights being loaded, make the pool's inputs."""
        self.rope = RopeInputs(cos_sin, self.q_norm, self.k_norm, self.eps, self.offset)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        context: ForwardContext,
        apply: ApplyLinear,
        apply_gated: ApplyGated | None = None,
        method: LinearMethod | None = None,
    ) -> torch.Tensor:
        """Run the layer on normed ``x[T, H]``; what comes back is still to be added to
        ``residual[T, H]``, to which attention's output has been added in place.

        With ``apply_gated``, the gated activation is taken where gate and up come out. With
        ``method``, whose products ``apply`` gives, ops may leave norms and gates to it; ``x`` may
        then be its own."""
        x = self._attend(apply(self.qkv_proj, x), context)
        x = self.all_reduce(apply(self.o_proj, x), "tp")
        x = self.add_attention(x, residual, method)
        if apply_gated is None:
            x = apply(self.gate_up_proj, x)
            x = self.ops.gate_input(method, self.down_proj, x, self.activation_name)
        else:
            x = apply_gated(self.gate_up_proj, x, self.activation_name)
        return self.finish(self.all_reduce(apply(self.down_proj, x), "tp"))

    def forward_fused(
        self, residual: torch.Tensor, context: ForwardContext, linear: LinearMethod
    ) -> None:
        """The whole layer, norms included, on ``residual[T, H]`` in place; what stands between the
        products is theirs."""
        qkv = linear.apply_normed(self.qkv_proj, residual, self._norm(self.attention_norm))
        linear.apply_add_(self.o_proj, self._attend(qkv, context), residual)
        norm = self._norm(self.mlp_norm)
        x = linear.apply_normed(self.gate_up_proj, residual, norm, self.activation_name)
        linear.apply_add_(self.down_proj, x, residual)

    def _norm(self, weight: torch.Tensor) -> kernels.RowNorm:
        return kernels.RowNorm(weight, self.eps, self.offset)

    def _attend(self, qkv: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Attention's output ``[T, Hq * D]``; keys and values go to the pool."""
        batch = context.batch
        q = context.pool.rotate_and_write(
            self.index,
            qkv,
            batch.positions,
            batch.slot_mapping,
            self.attention.num_heads,
            self.rope,
        )
        x = context.attention.forward(q, self.attention, context.metadata, context.pool)
        return x.flatten(1)

    def norm_input(
        self, x: torch.Tensor, residual: torch.Tensor | None, method: LinearMethod | None
    ) -> Any:
        """The layer's input, of what stands before it: the residual, or what is to be added."""
        norm = self._norm(self.attention_norm)
        return self.ops.norm_input(method, self.qkv_proj, x, norm, residual)

    def add_attention(
        self, x: torch.Tensor, residual: torch.Tensor, method: LinearMethod | None
    ) -> Any:
        """Add attention's output to the residual in place; the feed-forward block's input."""
        norm = self._norm(self.mlp_norm)
        return self.ops.norm_input(method, self.gate_up_proj, x, norm, residual)

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """What happens to the feed-forward block's output before it joins the residual."""
        return x


class SandwichLayer(DecoderLayer):
    """A layer with a norm after attention and after the feed-forward block as well (Gemma 3).

    Attributes
    ----------
    attention_out_norm, mlp_out_norm : Tensor [H]
    """

    attention_out_norm: torch.Tensor
    mlp_out_norm: torch.Tensor

    def add_attention(
        self, x: torch.Tensor, residual: torch.Tensor, method: LinearMethod | None
    ) -> Any:
        x = self.ops.rms_norm(x, self.attention_out_norm, self.eps, offset=self.offset)
        return super().add_attention(x, residual, method)

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x, self.mlp_out_norm, self.eps, offset=self.offset)


_LAYER_CLASSES: dict[str, type[DecoderLayer]] = {"pre": DecoderLayer, "sandwich": SandwichLayer}


class Decoder:
    """A model that can run; made by :func:`workbench.models.loader.load_model`.

    Attributes
    ----------
    names : WeightNames
        How the family's checkpoints call what it is made of.
    embedding : Tensor [V, H]
    final_norm : Tensor [H]
    lm_head : LinearLayer
        With a tied head its ``weight`` is ``embedding`` itself until the linear method packs it.
    """

    embedding: torch.Tensor
    final_norm: torch.Tensor

    def __init__(
        self,
        spec: ModelSpec,
        names: WeightNames,
        *,
        linear: LinearMethod,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops | None = None,
        adapters: Adapters | None = None,
        parallel: Parallel | None = None,
    ) -> None:
        self.spec = spec
        self.names = names
        self.dtype = dtype
        self.device = device
        self.linear = linear
        self.ops = DispatchedOps() if ops is None else ops
        self.adapters = NoAdapters() if adapters is None else adapters
        self.parallel = SingleDevice() if parallel is None else parallel
        layer_class = _LAYER_CLASSES[spec.norm_style]
        self.layers = [
            layer_class(spec, index, names, self.ops, self.parallel.all_reduce)
            for index in range(spec.num_layers)
        ]
        # A layer that norms what its products give, or whose sums lie on several devices, cannot
        # add them to the residual as they come.
        self._can_fuse = spec.norm_style == "pre" and isinstance(self.parallel, SingleDevice)
        head = names.embedding if spec.tie_word_embeddings else names.head
        self.lm_head = LinearLayer(
            "lm_head", spec.hidden_size, spec.vocab_size, ((head, spec.vocab_size),)
        )
        # Transformers rounds the scale to the model's dtype before it multiplies, so sqrt(3072)
        # is 55.5 in bfloat16.
        scale = spec.embedding_scale
        self._embedding_scale = None if scale is None else torch.tensor(scale, dtype=dtype).item()

    # -- forward ------------------------------------------------------------------------------

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of ``input_ids[T]``, scaled; a new tensor ``[T, H]``."""
        x = kernels.embedding(self.embedding, input_ids)
        return x if self._embedding_scale is None else x.mul_(self._embedding_scale)

    def forward(self, batch: ForwardBatch, context: ForwardContext) -> torch.Tensor:
        """Run every layer on a batch and write its KV to the pool.

        Parameters
        ----------
        batch
            Tokens of the step; ``context.batch`` is the same object.
        context
            Attention backend with its metadata for this step, and the KV pool; hidden states to
            keep on the way, where some are wanted.

        Returns
        -------
        Tensor [T, H]
            The residual stream **before** the final norm. Norm and head run in
            :meth:`compute_logits`, so that they only see the rows whose logits are wanted.
        """
        residual, kept = self.embed(batch.input_ids), context.kept
        if self._can_fuse and self.linear.fuses(len(residual)) and not self.adapters.active:
            for layer in self.layers:
                if kept is not None:
                    kept.offer(layer.index, residual)
                layer.forward_fused(residual, context, self.linear)
            if kept is not None:
                kept.offer(len(self.layers), residual)
            return residual
        apply: ApplyLinear = self.linear.apply
        apply_gated = self.linear.apply_gated if self.linear.gates(len(residual)) else None
        method: LinearMethod | None = self.linear
        if self.adapters.active:  # they take a product's own input, and add to what it gives
            apply, apply_gated, method = self._apply_adapted, None, None
        x = self.layers[0].norm_input(residual, None, method)
        for layer, following in zip(self.layers, self.layers[1:], strict=False):
            if kept is not None:
                kept.offer(layer.index, residual)
            x = layer.forward(x, residual, context, apply, apply_gated, method)
            x = following.norm_input(x, residual, method)
        if kept is not None:
            kept.offer(self.layers[-1].index, residual)
        residual.add_(self.layers[-1].forward(x, residual, context, apply, apply_gated, method))
        if kept is not None:
            kept.offer(len(self.layers), residual)
        return residual

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm of ``hidden[L, H]``, as :meth:`forward` returns it; ``[L, H]``."""
        return self.ops.rms_norm(
            hidden, self.final_norm, self.spec.norm_eps, offset=self.spec.norm_offset
        )

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[L, V]`` in the model's dtype, from rows ``[L, H]`` of :meth:`forward`."""
        if self.linear.fuses(len(hidden)):
            spec = self.spec
            norm = kernels.RowNorm(self.final_norm, spec.norm_eps, spec.norm_offset)
            logits = self.linear.apply_normed(self.lm_head, hidden, norm)
        else:
            logits = self.linear.apply(self.lm_head, self.normalize(hidden))
        cap = self.spec.logit_soft_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _apply_adapted(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor:
        return self.adapters.apply(layer, x, self.linear.apply(layer, x))

    # -- what it is made of -------------------------------------------------------------------

    def linear_layers(self) -> Iterator[LinearLayer]:
        """Every linear layer, in the order of the forward pass, the head last."""
        for layer in self.layers:
            yield from layer.linears
        yield self.lm_head

    @property
    def weight_bytes_actual(self) -> int:
        """Bytes that the weights take in memory, each stretch of memory counted once.

        More than ``spec.weight_bytes(dtype)`` where a tied head is packed beside the embedding.
        """
        seen: dict[int, int] = {}
        for layer in self.layers:
            for value in vars(layer).values():
                _collect_bytes(value, seen)
        for value in (self.embedding, self.final_norm, self.lm_head):
            _collect_bytes(value, seen)
        return sum(seen.values())

    @property
    def streamed_bytes(self) -> int:
        """Bytes of weights that one forward pass reads, however many tokens it runs, as they lie in
        memory; of the embedding a pass reads as many rows as it has tokens, which are left out."""
        seen: dict[int, int] = {}
        for layer in self.layers:
            for value in vars(layer).values():
                _collect_bytes(value, seen)
        for value in (self.final_norm, self.lm_head):
            _collect_bytes(value, seen)
        return sum(seen.values())

    @property
    def rope_bytes(self) -> int:
        """Bytes of the rotary tables."""
        tables = {id(layer.rope.cos_sin): layer.rope.cos_sin for layer in self.layers}
        return sum(table.numel() * table.element_size() for table in tables.values())


def _collect_bytes(value: Any, seen: dict[int, int]) -> None:
    """Add the memory behind every tensor of ``value`` to ``seen``, keyed by where it lies."""
    if isinstance(value, torch.Tensor):
        if value.is_mkldnn:  # opaque: it has no storage to ask
            seen[id(value)] = value.numel() * value.element_size()
        else:
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, RopeInputs):
        return  # a table of angles, and norm weights that the layer holds itself
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _collect_bytes(getattr(value, field.name), seen)
    elif isinstance(value, dict):
        for item in value.values():
            _collect_bytes(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect_bytes(item, seen)
