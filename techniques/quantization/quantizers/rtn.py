"""Round to nearest: every weight by itself, without data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from techniques.quantization.quantizers.base import (
    InputStatistics,
    Quantizer,
    search_grid,
    shrink_steps,
)
from techniques.quantization.weights import QuantizedWeight, WeightScheme, encode


@dataclass(frozen=True, slots=True)
class RTNOptions:
    """Options of :class:`RTN`.

    Attributes
    ----------
    clip_steps
        Ranges tried for each group; the one with the least squared error of the weights is taken.
        1: the whole range, nothing is clipped.
    clip_least
        Smallest share of the range that is tried.
    """

    clip_steps: int = 1
    clip_least: float = 0.5


class RTN(Quantizer):
    """Round to nearest, the floor that every other quantiser is measured against."""

    Options = RTNOptions

    def quantize(
        self, weight: Tensor, scheme: WeightScheme, inputs: InputStatistics | None, name: str = ""
    ) -> QuantizedWeight:
        options: RTNOptions = self.options
        shrinks = shrink_steps(options.clip_steps, options.clip_least)
        return encode(weight, scheme, *search_grid(weight, scheme, shrinks))
