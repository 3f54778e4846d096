"""A quantiser over a whole decoder, layer by layer, each on the inputs that the layers before it,
already quantised, make of the calibration texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor

from kernels.scaled_linear import quantize_rows_reference
from techniques.quantization.quantizers.base import InputStatistics, Quantizer, output_error
from techniques.quantization.quantizers.calibration import CalibrationRun, Shard, shards_of
from techniques.quantization.quantizers.differentiable import DecoderLayerProblem
from techniques.quantization.quantizers.folding import can_fold, fold_scales, folds_of
from techniques.quantization.quantizers.partial import PartialModel
from techniques.quantization.quantizers.report import LayerReport, QuantizedModel
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
    partial: PartialModel | None = None,
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
    partial
        Keeps each decoder layer once it is done, and has those of an interrupted run.

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
    return _Pipeline(run, quantizer, scheme, options, chosen, kept, progress, partial).quantize()


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
        partial: PartialModel | None,
    ) -> None:
        self.run, self.decoder = run, run.decoder
        self.quantizer, self.scheme, self.options = quantizer, scheme, options
        self.chosen = [shard.name for shard in chosen]
        self.progress, self.partial = progress, partial
        self.found = QuantizedModel(kept=kept)
        self.part = QuantizedModel()  # of the decoder layer at hand

    def quantize(self) -> QuantizedModel:
        layers = self.decoder.layers
        for layer in layers:
            done = None if self.partial is None else self.partial.load(layer.index)
            if done is not None:
                self._restore(layer, done)
            else:
                self._layer(layer)
                if self.partial is not None:
                    self.partial.save(layer.index, self.part)
            self._finish_part()
            if layer is not layers[-1] or self.options.head:
                self.run.advance(layer)
        if self.options.head:
            inputs = self._statistics((self.decoder.lm_head,))
            self.run.watch_head(_adding_to(inputs))
            self._quantize(self.decoder.lm_head, inputs.get("lm_head"), False, {})
            self._finish_part()
        return self.found

    def _layer(self, layer: DecoderLayer) -> None:
        inputs = self._statistics(layer.linears)
        if inputs:
            self.run.watch(layer, _adding_to(inputs))
        scaled = self._scale(layer, inputs)
        ready = self._together(layer)
        for linear in layer.linears:
            self._quantize(linear, inputs.pop(linear.name, None), linear.name in scaled, ready)

    def _restore(self, layer: DecoderLayer, done: QuantizedModel) -> None:
        """Make a layer what an earlier run made of it."""
        if self.quantizer.needs.layers:
            self.run.advance_originals(layer)
        changed = dict(done.changed)
        for part in ("attention_norm", "mlp_norm"):
            name = f"{self.decoder.names.of_layer(layer.index, part)}.weight"
            if name in changed:
                getattr(layer, part).copy_(changed.pop(name))
        for linear in layer.linears:
            for shard in shards_of(linear):
                if shard.name in done.weights:
                    shard.weight.copy_(done.weights[shard.name].dequantize())
                if shard.bias is not None and f"{shard.name}.bias" in changed:
                    shard.bias.copy_(changed.pop(f"{shard.name}.bias"))
        assert not changed, f"nothing takes {sorted(changed)}"
        self.part = done

    def _finish_part(self) -> None:
        self.found.weights |= self.part.weights
        self.found.changed |= self.part.changed
        self.found.report += self.part.report
        self.part = QuantizedModel()

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
            self.part.changed |= changed
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
            self.part.weights[shard.name] = _on_cpu(found)
            entry = LayerReport(shard.name, error, scaled, seconds)
            self.part.report.append(entry)
            if self.progress is not None:
                count = len(self.found.report) + len(self.part.report)
                self.progress(entry, count, len(self.chosen))


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
