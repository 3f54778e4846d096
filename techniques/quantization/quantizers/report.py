"""What a run over a model found."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from techniques.quantization.weights import QuantizedWeight


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
