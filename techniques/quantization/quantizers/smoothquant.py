"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): a part of the range of activations, which have
outliers in a few channels, is moved into the weights, which have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from techniques.quantization.quantizers.base import InputStatistics, Needs, Quantizer
from techniques.quantization.weights import (
    QuantizedWeight,
    Scheme,
    WeightScheme,
    encode,
    find_grid,
)
from workbench.core.errors import ConfigError

_LEAST = 1e-5


@dataclass(frozen=True, slots=True)
class SmoothQuantOptions:
    """Options of :class:`SmoothQuant`.

    Attributes
    ----------
    alpha
        How much of the range moves, 0 to 1: inputs are divided by ``max |x| ** alpha`` over
        ``max |w| ** (1 - alpha)``. The paper has 0.5, and up to 0.9 for models with more outliers.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha} must be from 0 to 1; 0.5 is usual.")


class SmoothQuant(Quantizer):
    """Channels of inputs are evened out, then weights are rounded to nearest.

    Factors go wherever something before the layer can take them up: norms, as in the paper, and
    also the rows of ``up_proj`` and ``v_proj``, where scales of outputs absorb them.
    """

    Options = SmoothQuantOptions
    needs = Needs(sizes=True)

    def needs_for(self, scheme: Scheme) -> Needs:
        if not isinstance(scheme, WeightScheme) or not scheme.rounds_inputs:
            raise ConfigError(
                f"SmoothQuant is for activations in int8, and scheme {scheme.name} is another: "
                "give scheme=w8a8, or take another quantizer."
            )
        return self.needs

    def find_scales(
        self, weights: Sequence[Tensor], scheme: WeightScheme, inputs: InputStatistics
    ) -> Tensor | None:
        options: SmoothQuantOptions = self.options
        of_inputs = inputs.max_abs.clamp(min=_LEAST)
        of_weights = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp(min=_LEAST)
        scales = of_inputs**options.alpha / of_weights ** (1 - options.alpha)
        # The common factor is of no use, and norms in 16 bits take moderate ones better.
        return scales / (scales.max() * scales.min()).sqrt()

    def quantize(
        self, weight: Tensor, scheme: WeightScheme, inputs: InputStatistics | None, name: str = ""
    ) -> QuantizedWeight:
        return encode(weight, scheme, *find_grid(weight, scheme))
