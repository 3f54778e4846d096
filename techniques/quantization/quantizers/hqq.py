"""HQQ, half-quadratic quantisation (Badri and Shaji 2023, "Half-Quadratic Quantization of Large
Machine Learning Models"): grids that suit most weights of a group, without data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from techniques.quantization.quantizers.base import InputStatistics, Quantizer
from techniques.quantization.weights import QuantizedWeight, WeightScheme, encode, find_grid
from workbench.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HQQOptions:
    """Options of :class:`HQQ`; the defaults are the authors'.

    Attributes
    ----------
    norm
        Exponent ``p`` of the error, over 0 and under 1: the smaller, the more is one large error
        preferred to many small ones.
    beta
        Weight of the quadratic term at first.
    kappa
        Factor on it from one iteration to the next.
    iterations
        Steps at most; the best grid of each group among them is taken.
    """

    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if not 0 < self.norm < 1:
            raise ConfigError(f"norm={self.norm} must be over 0 and under 1; 0.7 is usual.")
        if not (self.beta > 0 and self.kappa >= 1 and self.iterations >= 1):
            raise ConfigError(
                f"beta={self.beta}, kappa={self.kappa}, iterations={self.iterations}: beta must be "
                "over 0, kappa and iterations 1 or more."
            )


class HQQ(Quantizer):
    """Least ``sum |W - Q| ** p`` of each group, by half-quadratic splitting.

    In turn, the error ``E`` that is to be borne is split off by shrinking the present one
    (``sign(x) max(0, |x| - |x| ** (p - 1) / beta)``), and the grid is solved for ``W - E``
    in least squares.

    Two things are not as the authors have them. They keep the scale and solve for the zero point,
    by fractions of a code; zero points are whole codes here, which such steps do not move, so that
    the scale is solved for and the zero point kept. And errors are measured in steps of the grid,
    which makes ``beta`` mean the same whatever the size of the weights.
    """

    Options = HQQOptions

    def quantize(
        self, weight: Tensor, scheme: WeightScheme, inputs: InputStatistics | None, name: str = ""
    ) -> QuantizedWeight:
        options: HQQOptions = self.options
        scales, zeros = find_grid(weight, scheme)
        groups = weight.float().reshape(*scales.shape, -1)
        best, least = scales, torch.full_like(scales, float("inf"))
        beta = options.beta
        for iteration in range(options.iterations + 1):
            found = encode(weight, scheme, scales, zeros)
            error = groups - found.dequantize().view_as(groups)
            size = error.abs().pow(options.norm).sum(2)
            better = size < least
            least, best = torch.where(better, size, least), torch.where(better, scales, best)
            if iteration < options.iterations:
                step = scales[:, :, None]
                borne = _shrink(error / step, options.norm, beta) * step
                steps = ((groups - error) / step).round_()
                scales = _solve(groups - borne, steps, scales)
                beta *= options.kappa
        return encode(weight, scheme, best, zeros)


def _shrink(error: Tensor, norm: float, beta: float) -> Tensor:
    """The proximal step of ``|x| ** norm``, after the authors' approximation."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8).pow(norm - 1) / beta).clamp(min=0)


def _solve(wanted: Tensor, steps: Tensor, scales: Tensor) -> Tensor:
    """The scales ``[N, G]`` under which ``steps[N, G, K / G]`` from 0 come nearest to ``wanted``;
    the present ones of groups that say nothing of it, such as those of zeros."""
    solved = (steps * wanted).sum(2) / steps.square().sum(2).clamp(min=1.0)
    return torch.where(solved > 0, solved, scales)
