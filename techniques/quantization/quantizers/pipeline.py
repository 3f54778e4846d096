"""A quantiser over a whole decoder, layer by layer, each on the inputs that the layers before it,
already quantised, make of the calibration texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor

from kernels.scaled_linear import quantize_rows_reference
from techniques.quantization.quantizers.base import InputStatistics, Quantizer, output_error
from techniques.quantization.quantizers.calibration import CalibrationRun, Shard, shards_of
from techniques.quantization.quantizers.differentiable import DecoderLayerProblem
from techniques.quantization.quantizers.folding import can_fold, fold_scales, folds_of
from techniques.quantization.weights import QuantizedWeight, Scheme
from workbench.core.errors import ConfigError, UnsupportedError
from workbench.models.decoder import Decoder, DecoderLayer
from workbench.slots.linear import LinearLayer


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """Options of :func:`quantize_decoder`.

    Attributes
    ----------
    skip
        Patterns of checkpoint names, as ``*.down_proj`` or ``model.layers.0.*``; what they fit
        stays as it is.
    head
        Whether the output layer is quantised too.
    batch_tokens
        Tokens of the calibration texts that run through a layer at once.
    num_rows
        Inputs of a layer that are kept as they are, for quantisers that search on them and for the
        report.
    seed
        Of the draw of these inputs.
    """

    skip: tuple[str, ...] = ()
    head: bool = False
    batch_tokens: int = 4096
    num_rows: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        for name in ("batch_tokens", "num_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more.")


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What became of one checkpoint layer.

    Attributes
    ----------
    output_error
        ``|X W^T - Y Q^T| / |X W^T|`` on a sample ``X`` of the calibration inputs, of which ``Y`` is
        what the scheme rounds them to; None without any.
    scaled
        Whether its inputs were divided by factors and its columns multiplied.
    seconds
        That rounding took; running the texts and the search for factors, which layers share, are
        not in it.
    """

    name: str
    output_error: float | None
    scaled: bool
    seconds: float


@dataclass(slots=True)
class QuantizedModel:
    """What the pipeline found.

    Attributes
    ----------
    weights
        By the checkpoint's layer name, on the CPU.
    changed
        Other tensors that had to change, by their name in the checkpoint: norms and biases that
        took up factors, in the model's dtype.
    kept
        Linear layers that stay as they are, the output layer among them.
    report
        One entry a quantised layer, in the order of the forward pass.
    """

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    report: list[LayerReport] = field(default_factory=list)


#: Called after each layer with its report, how many are done, and how many there are.
Progress = Callable[[LayerReport, int, int], None]


@torch.no_grad()
def quantize_decoder(
    decoder: Decoder,
    quantizer: Quantizer,
    scheme: Scheme,
    texts: Sequence[Sequence[int]],
    options: PipelineOptions | None = None,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantise the linear layers of a decoder, which then runs with the values that the codes stand
    for.

    For each decoder layer the texts run up to it, the inputs of its linear layers are summed up,
    its weights are quantised, and the texts run through it once more. Statistics of one decoder
    layer are in memory at a time.

    Parameters
    ----------
    decoder
        Loaded with ``linear=PlainLinear()``, best in float32. Changed in place.
    texts
        Tokens of the calibration texts. May be empty for a quantiser that needs none.

    Raises
    ------
    ConfigError
        The groups do not divide the inputs of some layers (all are named), a pattern fits no layer,
        or texts are missing.
    UnsupportedError
        The output layer is the embedding.
    WorkbenchError
        A text does not fit the model, or an input on the way is not finite.
    """
    options = PipelineOptions() if options is None else options
    if quantizer.needs_for(scheme).any and not texts:
        raise ConfigError(f"{type(quantizer).__name__} needs calibration texts; none were given.")
    run = CalibrationRun(
        decoder, texts, options.batch_tokens, keep_originals=quantizer.needs_for(scheme).layers
    )
    chosen, kept = _choose(decoder, options)
    _check_groups(chosen, scheme)
    return _Pipeline(run, quantizer, scheme, options, chosen, kept, progress).quantize()


class _Pipeline:
    """One pass over one decoder; used once."""

    def __init__(
        self,
        run: CalibrationRun,
        quantizer: Quantizer,
        scheme: Scheme,
        options: PipelineOptions,
        chosen: list[Shard],
        kept: tuple[str, ...],
        progress: Progress | None,
    ) -> None:
        self.run, self.decoder = run, run.decoder
        self.quantizer, self.scheme, self.options = quantizer, scheme, options
        self.chosen = [shard.name for shard in chosen]
        self.progress = progress
        self.found = QuantizedModel(kept=kept)

    def quantize(self) -> QuantizedModel:
        layers = self.decoder.layers
        for layer in layers:
            inputs = self._statistics(layer.linears)
            if inputs:
                self.run.watch(layer, _adding_to(inputs))
            scaled = self._scale(layer, inputs)
            ready = self._together(layer)
            for linear in layer.linears:
                self._quantize(linear, inputs.pop(linear.name, None), linear.name in scaled, ready)
            if layer is not layers[-1] or self.options.head:
                self.run.advance(layer)
        if self.options.head:
            inputs = self._statistics((self.decoder.lm_head,))
            self.run.watch_head(_adding_to(inputs))
            self._quantize(self.decoder.lm_head, inputs.get("lm_head"), False, {})
        return self.found

    def _statistics(self, linears: Sequence[LinearLayer]) -> dict[str, InputStatistics]:
        """Empty ones for the layers of which something is quantised."""
        if not self.run.batches:
            return {}
        return {
            linear.name: InputStatistics(
                linear.name,
                linear.in_features,
                keep_hessian=self.quantizer.needs.hessian,
                num_rows=self.options.num_rows,
                seed=self.options.seed,
                device=self.decoder.device,
            )
            for linear in linears
            if any(shard.name in self.chosen for shard in shards_of(linear))
        }

    def _scale(self, layer: DecoderLayer, inputs: dict[str, InputStatistics]) -> set[str]:
        """Fold the quantiser's factors into the layer; ``inputs`` become those of the new one.

        Returns
        -------
        set[str]
            Names of the linear layers that were scaled.
        """
        scaled = set()
        for fold in folds_of(layer):
            linear = fold.consumer
            if linear.name not in inputs or not can_fold(fold, self.chosen):
                continue
            weights = [shard.weight.float() for shard in shards_of(linear)]
            scales = self.quantizer.find_scales(weights, self.scheme, inputs[linear.name])
            if scales is None:
                continue
            scales, changed = fold_scales(self.decoder, layer, fold, scales)
            inputs[linear.name] = inputs[linear.name].scaled(scales)
            self.found.changed |= changed
            scaled.add(linear.name)
        return scaled

    def _together(self, layer: DecoderLayer) -> dict[str, tuple[QuantizedWeight, float]]:
        """Weights of a decoder layer that are found together, each with its share of the seconds;
        none where the quantiser takes them one by one."""
        if not self.quantizer.needs.layers:
            return {}
        self.run.advance_originals(layer)
        problem = DecoderLayerProblem(self.run, layer, self.chosen, self.options.seed + layer.index)
        if not problem.weights:
            return {}
        started = time.perf_counter()
        found = self.quantizer.quantize_layer(problem, self.scheme)
        seconds = (time.perf_counter() - started) / len(found)
        return {name: (weight, seconds) for name, weight in found.items()}

    def _quantize(
        self,
        linear: LinearLayer,
        inputs: InputStatistics | None,
        scaled: bool,
        ready: Mapping[str, tuple[QuantizedWeight, float]],
    ) -> None:
        for shard in shards_of(linear):
            if shard.name not in self.chosen:
                continue
            started = time.perf_counter()
            weight = shard.weight.float()
            if shard.name in ready:
                found, before = ready[shard.name]
            else:
                before = 0.0
                found = self.quantizer.quantize(weight, self.scheme, inputs, shard.name)
            values = found.dequantize()
            seconds = before + time.perf_counter() - started
            error = None
            if inputs is not None:
                error = output_error(weight, values, inputs.rows, _rounded(found, inputs.rows))
            shard.weight.copy_(values)
            self.found.weights[shard.name] = _on_cpu(found)
            entry = LayerReport(shard.name, error, scaled, seconds)
            self.found.report.append(entry)
            if self.progress is not None:
                self.progress(entry, len(self.found.report), len(self.chosen))


def _adding_to(inputs: dict[str, InputStatistics]) -> Callable[[LinearLayer, Tensor], None]:
    def add(layer: LinearLayer, x: Tensor) -> None:
        if layer.name in inputs:
            inputs[layer.name].add(x)

    return add


def _choose(decoder: Decoder, options: PipelineOptions) -> tuple[list[Shard], tuple[str, ...]]:
    """What is quantised, and the names of what is kept."""
    if options.head and decoder.spec.tie_word_embeddings:
        raise UnsupportedError(
            "the output layer of this model is its embedding, which is not quantised. Use "
            "head=false."
        )
    shards = [shard for layer in decoder.linear_layers() for shard in shards_of(layer)]
    for pattern in options.skip:
        if not any(fnmatch(shard.name, pattern) for shard in shards):
            raise ConfigError(
                f"skip={pattern!r} fits no linear layer. Names look like {shards[0].name} and "
                f"{shards[-1].name}."
            )
    head = decoder.lm_head.shards[0][0]
    kept = tuple(
        shard.name
        for shard in shards
        if (shard.name == head and not options.head)
        or any(fnmatch(shard.name, pattern) for pattern in options.skip)
    )
    return [shard for shard in shards if shard.name not in kept], kept


def _check_groups(chosen: Sequence[Shard], scheme: Scheme) -> None:
    size = scheme.group_size
    wrong = [shard for shard in chosen if size and shard.layer.in_features % size]
    if not wrong:
        return
    widths = {shard.layer.in_features for shard in chosen}
    fitting = [g for g in (16, 32, 64, 128, 256) if all(width % g == 0 for width in widths)]
    named = ", ".join(f"{shard.name} ({shard.layer.in_features} inputs)" for shard in wrong[:4])
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    raise ConfigError(
        f"groups of {size} do not divide the inputs of {named}{more}. Sizes that divide all: "
        f"{', '.join(map(str, fitting)) or 'none of 16 to 256'}; or 0, one scale an output; or "
        "skip these layers."
    )


def _rounded(found: QuantizedWeight, rows: Tensor) -> Tensor | None:
    """Inputs ``[S, K]`` as the scheme rounds them; None: it does not."""
    dtype = found.scheme.input_codes()
    if dtype is None:
        return None
    codes, scales = quantize_rows_reference(rows, dtype, static_scale=found.input_scale)
    return codes.float() * scales


def _on_cpu(found: QuantizedWeight) -> QuantizedWeight:
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cpu()

    return QuantizedWeight(
        found.scheme,
        found.codes.cpu(),
        found.scales.cpu(),
        moved(found.zeros),
        moved(found.group_index),
        moved(found.input_scale),
    )
