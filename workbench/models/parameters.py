"""The tensors of a dense checkpoint: what a model of a given shape is made of, by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from workbench.models.families import WeightNames
from workbench.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    is_norm: bool = False


def checkpoint_parameters(spec: ModelSpec, names: WeightNames) -> Iterator[Parameter]:
    """Every tensor of a dense checkpoint, in the order of the forward pass; a tied head is left
    out."""
    yield Parameter(f"{names.embedding}.weight", (spec.vocab_size, spec.hidden_size))
    for index in range(spec.num_layers):
        yield from layer_norms(spec, names, index)
        yield from _layer_linears(spec, names, index)
    yield Parameter(f"{names.final_norm}.weight", (spec.hidden_size,), is_norm=True)
    if not spec.tie_word_embeddings:
        yield Parameter(f"{names.head}.weight", (spec.vocab_size, spec.hidden_size))


def norm_parts(spec: ModelSpec) -> tuple[str, ...]:
    """Which norms a layer has, by their field in :class:`WeightNames`."""
    parts: tuple[str, ...] = ("attention_norm", "mlp_norm")
    if spec.norm_style == "sandwich":
        parts += ("attention_out_norm", "mlp_out_norm")
    return parts + (("q_norm", "k_norm") if spec.qk_norm else ())


def layer_norms(spec: ModelSpec, names: WeightNames, index: int) -> Iterator[Parameter]:
    """Norm weights of a layer, in the order of :func:`norm_parts`."""
    head_dim = spec.layers[index].attention.head_dim
    for part in norm_parts(spec):
        size = head_dim if part in ("q_norm", "k_norm") else spec.hidden_size
        yield Parameter(f"{names.of_layer(index, part)}.weight", (size,), is_norm=True)


def _layer_linears(spec: ModelSpec, names: WeightNames, index: int) -> Iterator[Parameter]:
    layer = spec.layers[index]
    hidden, inner = spec.hidden_size, spec.intermediate_size
    for part, rows, columns, has_bias in (
        ("q_proj", layer.q_size, hidden, spec.qkv_bias),
        ("k_proj", layer.kv_size, hidden, spec.qkv_bias),
        ("v_proj", layer.kv_size, hidden, spec.qkv_bias),
        ("o_proj", hidden, layer.q_size, spec.o_bias),
        ("gate_proj", inner, hidden, spec.mlp_bias),
        ("up_proj", inner, hidden, spec.mlp_bias),
        ("down_proj", hidden, inner, spec.mlp_bias),
    ):
        name = names.of_layer(index, part)
        yield Parameter(f"{name}.weight", (rows, columns))
        if has_bias:
            yield Parameter(f"{name}.bias", (rows,))
