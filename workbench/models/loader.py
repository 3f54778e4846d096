"""Loading a model: from a folder's weights, or with random ones, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.core.errors import UnsupportedError, WorkbenchError, unknown_name
from workbench.models.checkpoint import Checkpoint, WeightSource
from workbench.models.decoder import Decoder, DecoderLayer
from workbench.models.families import (
    Family,
    WeightNames,
    family_of,
    read_config,
    spec_from_hf,
)
from workbench.models.parameters import Parameter, layer_norms, norm_parts
from workbench.models.random_weights import RandomWeights
from workbench.models.rope import RopeSpec
from workbench.models.spec import ModelSpec
from workbench.slots.adapters import Adapters
from workbench.slots.linear import LinearLayer, LinearMethod
from workbench.slots.ops import Ops
from workbench.slots.parallel import Parallel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_WEIGHTS = ("checkpoint", "random")


def load_model(
    source: Path | str | PreTrainedConfig | Mapping[str, Any],
    *,
    linear: LinearMethod,
    dtype: torch.dtype,
    device: torch.device | str,
    weights: str = "checkpoint",
    seed: int = 0,
    expected_tokens: int = 1,
    adapters: Adapters | None = None,
    parallel: Parallel | None = None,
    ops: Ops | None = None,
    max_model_len: int | None = None,
) -> Decoder:
    """Build a decoder and fill it.

    Tensors are read one at a time, cast, and handed to the linear method layer by layer: at its
    peak the memory holds the model and about one layer more.

    Parameters
    ----------
    source
        Model folder, or with ``weights="random"`` also a Transformers config or the content of a
        ``config.json``.
    linear
        How linear layers are stored and multiplied.
    weights
        ``checkpoint`` reads the folder's safetensors; ``random`` reads its config alone.
    seed
        Of random weights.
    expected_tokens
        Rows of a typical step, a hint for packing.
    ops
        Norms and activations; by default what ``kernels`` has for the device.
    max_model_len
        Positions for which rotary tables are made; by default all that the model has.

    Raises
    ------
    WorkbenchError
        A file is missing or broken, or weights and config do not fit: every missing, unexpected
        or wrongly shaped tensor is named.
    UnsupportedError
        The model needs what is not there; the message says what is.
    """
    if weights not in _WEIGHTS:
        raise unknown_name("weights", weights, _WEIGHTS)
    config = read_config(source)
    family, spec = family_of(config), spec_from_hf(config)
    device = torch.device(device)
    positions = _num_positions(spec, max_model_len)
    _check_parallel(parallel)
    quantization = getattr(config, "quantization_config", None)
    linear.read_checkpoint(None if weights == "random" else quantization)
    parts: dict[str, Any] = {
        "linear": linear,
        "ops": ops,
        "adapters": adapters,
        "parallel": parallel,
    }
    decoder = Decoder(spec, family.names, dtype=dtype, device=device, **parts)
    reader = _weight_source(source, weights, family, spec, seed, dtype, device)
    with torch.no_grad():
        _Loader(decoder, family.names, reader, expected_tokens).load()
        _bind_rope(decoder, positions)
    return decoder


def _bind_rope(decoder: Decoder, num_positions: int) -> None:
    """Give every layer its rotary table; layers that rotate alike share one."""
    tables: dict[RopeSpec, torch.Tensor] = {}
    for layer, layer_spec in zip(decoder.layers, decoder.spec.layers, strict=True):
        if layer_spec.rope not in tables:
            tables[layer_spec.rope] = layer_spec.rope.table(num_positions, decoder.device)
        layer.bind_rope(tables[layer_spec.rope])


def _num_positions(spec: ModelSpec, max_model_len: int | None) -> int:
    if max_model_len is None:
        return spec.max_position_embeddings
    if not 1 <= max_model_len <= spec.max_position_embeddings:
        raise WorkbenchError(
            f"max_model_len={max_model_len} is not between 1 and the model's own context of "
            f"{spec.max_position_embeddings} tokens."
        )
    return max_model_len


def _check_parallel(parallel: Parallel | None) -> None:
    split = {k: n for k, n in (parallel.axes if parallel else {}).items() if k != "dp" and n > 1}
    if split:
        raise UnsupportedError(
            f"weights cannot be split over {split}: the loader reads whole tensors. Use axes of "
            "size 1, or dp."
        )


def _weight_source(
    source: Path | str | PreTrainedConfig | Mapping[str, Any],
    weights: str,
    family: Family,
    spec: ModelSpec,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> WeightSource:
    if weights == "random":
        return RandomWeights(spec, seed, dtype, device)
    if not isinstance(source, (str, Path)):
        raise WorkbenchError(
            "weights=checkpoint needs a model folder, but a config was given. Use weights=random."
        )
    return Checkpoint(Path(source), family, _prediction_layers(spec, family.names))


def _prediction_layers(spec: ModelSpec, names: WeightNames) -> re.Pattern[str] | None:
    """Beginnings of the names of modules that predict further tokens: layers behind the decoder's
    own (DeepSeek-V3), or a stack of layers of another name (MiMo). None where there are none."""
    if not spec.num_prediction_layers:
        return None
    behind = range(spec.num_layers, spec.num_layers + spec.num_prediction_layers)
    own = [re.escape(names.layer_prefix.format(index=index)) for index in behind]
    return re.compile("|".join([*own, r"model\.\w+_layers\.\d+\."]))


@dataclass(frozen=True, slots=True)
class _Piece:
    """One checkpoint tensor and where it goes in a stacked parameter of a linear layer."""

    parameter: Parameter
    suffix: str
    dim: int
    start: int
    length: int


class _Loader:
    """Fills one decoder from one source; used once."""

    def __init__(
        self, decoder: Decoder, names: WeightNames, source: WeightSource, expected_tokens: int
    ) -> None:
        self.decoder = decoder
        self.spec = decoder.spec
        self.names = names
        self.source = source
        self.expected_tokens = expected_tokens

    def load(self) -> None:
        decoder, names, source = self.decoder, self.names, self.source
        self.embedding = Parameter(
            f"{names.embedding}.weight", (self.spec.vocab_size, self.spec.hidden_size)
        )
        self.final_norm = Parameter(
            f"{names.final_norm}.weight", (self.spec.hidden_size,), is_norm=True
        )
        self._check()
        decoder.embedding = self._vector(self.embedding)
        source.release()
        self._head()
        for layer in decoder.layers:
            self._layer(layer)
            source.release()
        decoder.final_norm = self._vector(self.final_norm)
        source.release()
        decoder.linear.finish_loading()

    # -- before anything is read --------------------------------------------------------------

    def _check(self) -> None:
        """Compare names and shapes, so that an error comes before the long part."""
        plain = [self.embedding, self.final_norm]
        for layer in self.decoder.layers:
            plain += layer_norms(self.spec, self.names, layer.index)
        linears = list(self.decoder.linear_layers())
        optional = []
        if self.spec.tie_word_embeddings:
            linears.remove(self.decoder.lm_head)
            optional.append(f"{self.names.head}.weight")  # some files hold the tied head again
        expected = [parameter.name for parameter in plain]
        for linear in linears:
            # Only the method knows what its checkpoints hold; on "meta" asking costs no memory.
            self._create(linear, torch.device("meta"))
            for shard, _ in linear.shards:
                for part in linear.params:
                    names = optional if part in linear.optional else expected
                    names.append(f"{shard}.{part}")
            unread = self.decoder.linear.unread_suffixes
            optional += [f"{shard}.{part}" for shard, _ in linear.shards for part in unread]
        self.source.check_names(expected, optional)
        wrong = [self._wrong_shape(p) for p in plain if self.source.shape(p) != p.shape]
        for linear in linears:
            wrong += [piece for piece in self._pieces(linear) if isinstance(piece, str)]
            linear.params.clear()
        if wrong:
            raise WorkbenchError(f"weights do not have the shape of the config: {'; '.join(wrong)}")
        self.source.release()

    def _create(self, layer: LinearLayer, device: torch.device) -> None:
        self.decoder.linear.create_weights(layer, self.decoder.dtype, device)

    def _wrong_shape(self, parameter: Parameter) -> str:
        found = list(self.source.shape(parameter))
        return f"{parameter.name} has {found}, expected {list(parameter.shape)}"

    # -- filling ------------------------------------------------------------------------------

    def _vector(self, parameter: Parameter) -> torch.Tensor:
        """A tensor that no linear method owns, in the model's dtype and its own memory."""
        decoder = self.decoder
        out = torch.empty(parameter.shape, dtype=decoder.dtype, device=decoder.device)
        return out.copy_(self.source.read(parameter))

    def _head(self) -> None:
        head = self.decoder.lm_head
        if self.spec.tie_word_embeddings:
            head.params["weight"] = self.decoder.embedding
            self.decoder.linear.process_weights_after_loading(head, self.expected_tokens)
        else:
            self._linear(head)

    def _layer(self, layer: DecoderLayer) -> None:
        norms = layer_norms(self.spec, self.names, layer.index)
        for part, parameter in zip(norm_parts(self.spec), norms, strict=True):
            setattr(layer, part, self._vector(parameter))
        for linear in layer.linears:
            self._linear(linear)

    def _linear(self, layer: LinearLayer) -> None:
        self._create(layer, self.decoder.device)
        for piece in self._pieces(layer):
            assert isinstance(piece, _Piece), piece
            target = layer.params[piece.suffix].narrow(piece.dim, piece.start, piece.length)
            target.copy_(self.source.read(piece.parameter))
        self.decoder.linear.process_weights_after_loading(layer, self.expected_tokens)

    def _pieces(self, layer: LinearLayer) -> Iterator[_Piece | str]:
        """Where each checkpoint tensor of a layer goes, or what is wrong with its shape."""
        for suffix, whole in layer.params.items():
            start = 0
            for index, (shard, width) in enumerate(layer.shards):
                dense = Parameter(f"{shard}.{suffix}", (width, *whole.shape[1:]))
                if suffix in layer.optional and not self.source.has(dense):
                    start += width
                    continue
                found = self.source.shape(dense)
                is_number = whole.shape == (len(layer.shards),) and found in ((), (1,))
                if is_number or whole.shape == (len(layer.shards), *found):
                    yield _Piece(dense, suffix, 0, index, 1)  # without outputs: one a shard
                    continue
                dim = _stacked_dim(tuple(whole.shape), found, width, layer.out_features)
                if dim is None and suffix in ("weight", "bias"):
                    yield self._wrong_shape(dense)
                elif dim is None:
                    yield (
                        f"{dense.name} has {list(found)}, expected what {width} of "
                        f"{layer.out_features} outputs have of {list(whole.shape)}"
                    )
                else:
                    # A packed format holds several outputs in one element, so count in its own.
                    first = whole.shape[dim] * start // layer.out_features
                    yield _Piece(dense, suffix, dim, first, found[dim])
                start += width


def _stacked_dim(
    whole: tuple[int, ...], part: tuple[int, ...], width: int, total: int
) -> int | None:
    """Along which dimension ``part`` is ``width`` of ``total`` outputs of ``whole``; None if along
    none. Dense weights stack along the first, some quantised formats along the last."""
    if len(whole) != len(part):
        return None
    for dim in range(len(whole)):
        others_agree = whole[:dim] + whole[dim + 1 :] == part[:dim] + part[dim + 1 :]
        if others_agree and whole[dim] * width == part[dim] * total:
            return dim
    return None
