"""AWQ, activation-aware weight quantisation (Lin et al. 2023, arXiv:2306.00978): weights of inputs
that are large are scaled up before they are rounded, so that less of them is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor

from techniques.quantization.quantizers.base import (
    InputStatistics,
    Needs,
    Quantizer,
    search_grid,
    shrink_steps,
)
from techniques.quantization.weights import QuantizedWeight, WeightScheme, encode, find_grid
from workbench.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AWQOptions:
    """Options of :class:`AWQ`.

    Attributes
    ----------
    alpha_steps
        Exponents tried, ``0, 1 / n, .., (n - 1) / n``; 0 scales nothing.
    clip_steps
        Ranges tried for each group, as of round to nearest, but by the error of the group's output;
        1: nothing is clipped.
    clip_least
        Smallest share of the range that is tried.
    no_clip
        Patterns of names of layers that are not clipped: small errors of queries and keys add up in
        the scores, as the paper's authors have it.
    """

    alpha_steps: int = 20
    clip_steps: int = 10
    clip_least: float = 0.55
    no_clip: tuple[str, ...] = ("*q_proj", "*k_proj")

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.alpha_steps < 1:
            raise ConfigError(f"alpha_steps={self.alpha_steps} must be 1 or more; 20 is usual.")


class AWQ(Quantizer):
    """Scales by ``mean |x| ** alpha``, then round to nearest with a clip search.

    The exponent is that of the least squared error of the outputs on a sample of inputs, summed
    over the layers that share the inputs. The paper's code looks at the output of the whole block
    (attention, feed-forward) instead, which needs a pass a candidate.
    """

    Options = AWQOptions
    needs = Needs(rows=True)

    def find_scales(
        self, weights: Sequence[Tensor], scheme: WeightScheme, inputs: InputStatistics
    ) -> Tensor | None:
        options: AWQOptions = self.options
        rows = _rows(inputs)
        size = inputs.mean_abs.clamp(min=1e-4)
        best, least = torch.ones_like(size), float("inf")
        for step in range(options.alpha_steps):
            scales = size ** (step / options.alpha_steps)
            scales = scales / (scales.max() * scales.min()).sqrt()
            error = 0.0
            for weight in weights:
                scaled = weight * scales
                found = encode(scaled, scheme, *find_grid(scaled, scheme)).dequantize() / scales
                error += float((rows @ (weight - found).T).square().sum(dtype=torch.float64))
            if error < least:
                best, least = scales, error
        return best

    def quantize(
        self, weight: Tensor, scheme: WeightScheme, inputs: InputStatistics | None, name: str = ""
    ) -> QuantizedWeight:
        options: AWQOptions = self.options
        if inputs is None:
            raise ConfigError(f"{name}: AWQ needs calibration texts.")
        shrinks = shrink_steps(options.clip_steps, options.clip_least)
        if any(fnmatch(name, pattern) for pattern in options.no_clip):
            shrinks = [1.0]
        rows = _rows(inputs)
        groups = rows.reshape(len(rows), scheme.num_groups(weight.shape[1]), -1)
        gram = torch.einsum("sgi,sgj->gij", groups, groups) if len(shrinks) > 1 else None
        return encode(weight, scheme, *search_grid(weight, scheme, shrinks, gram))


def _rows(inputs: InputStatistics) -> Tensor:
    if not len(inputs.rows):
        raise ConfigError(f"{inputs.name}: AWQ needs a sample of inputs. Give calibration texts.")
    return inputs.rows
