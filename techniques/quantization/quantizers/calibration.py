"""A decoder whose layers can be run one by one on calibration texts, watched, and rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.core.errors import ConfigError, WorkbenchError
from workbench.models.decoder import Decoder, DecoderLayer
from workbench.models.whole_texts import WholeTextAttention, whole_text_batch
from workbench.slots.attention import ForwardContext
from workbench.slots.kv_pool import KVShape, ModelDtypePool, RopeInputs
from workbench.slots.linear import LinearLayer, LinearMethod

Observer = Callable[[LinearLayer, Tensor], None]


@dataclass(slots=True)
class PlainWeight:
    """State of a layer: ``weight[N, K]`` and ``bias[N]`` in the model's dtype, as they are in the
    checkpoint."""

    weight: Tensor
    bias: Tensor | None


class PlainLinear(LinearMethod):
    """Weights that can be read and rewritten, and inputs that can be watched."""

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self.observer: Observer | None = None

    def create_weights(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> None:
        shape = (layer.out_features, layer.in_features)
        layer.params["weight"] = torch.empty(shape, dtype=dtype, device=device)
        if layer.has_bias:
            layer.params["bias"] = torch.empty(layer.out_features, dtype=dtype, device=device)

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        layer.state = PlainWeight(layer.params.pop("weight"), layer.params.pop("bias", None))

    def apply(self, layer: LinearLayer, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(layer, x)
        return F.linear(x, layer.state.weight, layer.state.bias)


@dataclass(frozen=True, slots=True)
class Shard:
    """One checkpoint layer within a stacked one: rows ``start`` to ``end``."""

    name: str
    layer: LinearLayer
    start: int
    end: int

    @property
    def weight(self) -> Tensor:
        """``[N, K]``, a view."""
        weight: Tensor = self.layer.state.weight[self.start : self.end]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """``[N]``, a view."""
        bias: Tensor | None = self.layer.state.bias
        return None if bias is None else bias[self.start : self.end]


def shards_of(layer: LinearLayer) -> Iterator[Shard]:
    """The checkpoint layers that a linear layer is stacked of, in order."""
    start = 0
    for name, width in layer.shards:
        yield Shard(name, layer, start, start + width)
        start += width


class CalibrationRun:
    """Residual streams of all texts, moved through a decoder layer by layer.

    Beside the streams ``[T, H]`` of all texts, only one batch's activations and one layer's KV are
    in memory.

    Parameters
    ----------
    decoder
        Loaded with :class:`PlainLinear`.
    texts
        Tokens of each.
    batch_tokens
        About how many tokens run at once; a longer text runs alone.
    keep_originals
        Whether a second copy of the streams goes through the layers as they were.

    Attributes
    ----------
    streams, originals : list[Tensor [T, H]]
        Of each batch; ``originals`` is empty unless they are kept.

    Raises
    ------
    WorkbenchError
        A text is empty, longer than the model's context, or has tokens that the model does not.
    """

    def __init__(
        self,
        decoder: Decoder,
        texts: Sequence[Sequence[int]],
        batch_tokens: int,
        *,
        keep_originals: bool = False,
    ) -> None:
        if not isinstance(decoder.linear, PlainLinear):
            raise ConfigError(
                "the weights of this decoder cannot be read or rewritten. Load it with "
                "linear=PlainLinear()."
            )
        _check_texts(decoder, texts)
        self.decoder, self.linear = decoder, decoder.linear
        self.batches = list(_in_batches(texts, batch_tokens))
        self.streams = [
            decoder.embed(torch.tensor([i for text in batch for i in text], device=decoder.device))
            for batch in self.batches
        ]
        self.originals = [stream.clone() for stream in self.streams] if keep_originals else []

    def watch(self, layer: DecoderLayer, observer: Observer) -> None:
        """Show ``observer`` the inputs of each linear layer; the streams stay in front."""
        self.linear.observer = observer
        try:
            for batch, stream in zip(self.batches, self.streams, strict=True):
                self._run(layer, batch, stream.clone())
        finally:
            self.linear.observer = None

    def advance(self, layer: DecoderLayer) -> None:
        """Move the streams behind ``layer``, as its weights are now."""
        for batch, stream in zip(self.batches, self.streams, strict=True):
            stream.add_(self._run(layer, batch, stream))

    def advance_originals(self, layer: DecoderLayer) -> None:
        """Move the original streams behind ``layer``, whose weights are as they were."""
        for batch, stream in zip(self.batches, self.originals, strict=True):
            stream.add_(self._run(layer, batch, stream))

    def by_text(self, streams: Sequence[Tensor]) -> list[Tensor]:
        """Streams ``[T, H]`` of single texts, views of those of batches."""
        return [
            part
            for batch, stream in zip(self.batches, streams, strict=True)
            for part in torch.split(stream, [len(text) for text in batch])
        ]

    def watch_head(self, observer: Observer) -> None:
        """Show ``observer`` the inputs of the head; the streams are behind the last layer."""
        for stream in self.streams:
            observer(self.decoder.lm_head, self.decoder.normalize(stream))

    def _run(self, layer: DecoderLayer, texts: Sequence[Sequence[int]], stream: Tensor) -> Tensor:
        """What is still to be added to ``stream``, to which attention's output has been added."""
        decoder, longest = self.decoder, max(map(len, texts))
        batch = whole_text_batch(texts, longest, decoder.device)
        attention = layer.attention
        shape = KVShape((attention.num_kv_heads,), (attention.head_dim,), decoder.dtype)
        pool = _OneLayerPool(
            shape=shape, num_blocks=len(texts), block_size=longest, device=decoder.device
        )
        backend = WholeTextAttention()
        context = ForwardContext(batch, backend, backend.build_metadata(batch), pool)
        eps, offset = decoder.spec.norm_eps, decoder.spec.norm_offset
        x = decoder.ops.rms_norm(stream, layer.attention_norm, eps, offset=offset)
        return layer.forward(x, stream, context, self.linear.apply)


class _OneLayerPool(ModelDtypePool):
    """KV of the layer that runs, whichever it is."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return super().layer(0)

    def rotate_and_write(
        self,
        index: int,
        qkv: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        num_heads: int,
        rope: RopeInputs,
    ) -> Tensor:
        return super().rotate_and_write(0, qkv, positions, slot_mapping, num_heads, rope)


def _check_texts(decoder: Decoder, texts: Sequence[Sequence[int]]) -> None:
    longest, vocabulary = len(decoder.layers[0].rope.cos_sin), decoder.spec.vocab_size
    for index, text in enumerate(texts):
        if not 1 <= len(text) <= longest:
            raise WorkbenchError(
                f"calibration text {index} has {len(text)} tokens. Texts of 1 to {longest} tokens "
                "fit this model; cut longer ones into pieces."
            )
        if not 0 <= min(text) <= max(text) < vocabulary:
            raise WorkbenchError(
                f"calibration text {index} has tokens from {min(text)} to {max(text)}; the model "
                f"has 0 to {vocabulary - 1}. Encode it with the model's own tokenizer."
            )


def _in_batches(texts: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    for text in texts:
        if batch and sum(map(len, batch)) + len(text) > batch_tokens:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
