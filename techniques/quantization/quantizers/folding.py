"""Where factors on a layer's inputs can go: what stands before it is divided by them, so that the
model's function stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from techniques.quantization.quantizers.calibration import Shard, shards_of
from workbench.models.decoder import Decoder, DecoderLayer
from workbench.slots.linear import LinearLayer


@dataclass(frozen=True, slots=True)
class Fold:
    """Layers that share their inputs, and what makes those inputs.

    Attributes
    ----------
    consumer
        The stacked layer whose shards all read the inputs.
    norm
        Field of the decoder layer with the norm in front; None: ``producer`` is.
    producer
        The checkpoint layer whose outputs are the inputs up to a factor a channel.
    """

    consumer: LinearLayer
    norm: str | None = None
    producer: Shard | None = None


def folds_of(layer: DecoderLayer) -> list[Fold]:
    """Where the factors of a decoder layer can go.

    Norms stand before queries, keys and values, and before gate and up. The inputs of ``down_proj``
    are linear in the outputs of ``up_proj``, those of ``o_proj`` in the outputs of ``v_proj``,
    which only has a row for each of them if no heads share keys and values.
    """
    *_, value = shards_of(layer.qkv_proj)
    _, up = shards_of(layer.gate_up_proj)
    folds = [Fold(layer.qkv_proj, norm="attention_norm")]
    if layer.attention.num_heads == layer.attention.num_kv_heads:
        folds.append(Fold(layer.o_proj, producer=value))
    folds += [Fold(layer.gate_up_proj, norm="mlp_norm"), Fold(layer.down_proj, producer=up)]
    return folds


def fold_scales(
    decoder: Decoder, layer: DecoderLayer, fold: Fold, scales: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Multiply the consumer's columns by ``scales[K]`` and divide what stands before it, in place.

    Returns
    -------
    scales : Tensor [K] float32
        As they came to be: a norm is kept in the model's dtype, and where it is 0 nothing is
        scaled.
    changed : dict[str, Tensor]
        Tensors of the checkpoint, by name, that are no weights of linear layers.
    """
    changed: dict[str, Tensor] = {}
    if fold.norm is not None:
        norm, offset = getattr(layer, fold.norm), decoder.spec.norm_offset
        before = norm.float() + offset
        norm.copy_(before / scales - offset)
        after = norm.float() + offset
        usable = (before != 0) & (after != 0)
        scales = (before / after.where(usable, before.new_ones(()))).where(
            usable, before.new_ones(())
        )
        norm.copy_(norm.where(usable, (before - offset).to(norm.dtype)))
        changed[f"{decoder.names.of_layer(layer.index, fold.norm)}.weight"] = norm.cpu().clone()
    if fold.producer is not None:
        _scale(fold.producer.weight, lambda w: w / scales[:, None])
        bias = fold.producer.bias
        if bias is not None:
            bias.copy_(bias.float() / scales)
            changed[f"{fold.producer.name}.bias"] = bias.cpu().clone()
    _scale(fold.consumer.state.weight, lambda w: w * scales)
    return scales, changed


def _scale(weight: Tensor, function: Callable[[Tensor], Tensor]) -> None:
    weight.copy_(function(weight.float()))


def can_fold(fold: Fold, quantized: Sequence[str]) -> bool:
    """Whether all that a fold changes is quantised; layers that are kept stay as they were."""
    names = [name for name, _ in fold.consumer.shards]
    if fold.producer is not None:
        names.append(fold.producer.name)
    return all(name in quantized for name in names)
