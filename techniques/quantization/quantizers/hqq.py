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

    The authors keep the scale and solve for a zero point that is not an integer. Zero points are
    codes here, so that the scale is solved for as well, and the zero point rounded; without zero
    points the scale alone. Errors are measured in steps of the grid, which makes ``beta`` mean the
    same whatever the size of the weights.
    """

    Options = HQQOptions

    def quantize(
        self, weight: Tensor, scheme: WeightScheme, inputs: InputStatistics | None, name: str = ""
    ) -> QuantizedWeight:
        options: HQQOptions = self.options
        scales, zeros = find_grid(weight, scheme)
        groups = weight.float().reshape(*scales.shape, -1)
        best, best_zeros = scales, zeros
        least = torch.full_like(scales, float("inf"))
        beta = options.beta
        for iteration in range(options.iterations + 1):
            found = encode(weight, scheme, scales, zeros)
            error = groups - found.dequantize().view_as(groups)
            size = error.abs().pow(options.norm).sum(2)
            better = size < least
            least, best = torch.where(better, size, least), torch.where(better, scales, best)
            if zeros is not None and best_zeros is not None:
                best_zeros = torch.where(better, zeros, best_zeros)
            if iteration < options.iterations:
                step = scales[:, :, None]
                borne = _shrink(error / step, options.norm, beta) * step
                codes = found.codes.float().view_as(groups)
                scales, zeros = _solve(groups - borne, codes, scales, zeros, scheme)
                beta *= options.kappa
        return encode(weight, scheme, best, best_zeros)


def _shrink(error: Tensor, norm: float, beta: float) -> Tensor:
    """The proximal step of ``|x| ** norm``, after the authors' approximation."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8).pow(norm - 1) / beta).clamp(min=0)


def _solve(
    wanted: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: WeightScheme
) -> tuple[Tensor, Tensor | None]:
    """The grid under which ``codes[N, G, K / G]`` come nearest to ``wanted``, first in its zero
    points, then in its scales."""
    if zeros is not None:
        place = (codes - wanted / scales[:, :, None]).mean(2)
        zeros = place.round().clamp(scheme.least, scheme.greatest).to(torch.int16)
        codes = codes - zeros.float()[:, :, None]
    solved = (codes * wanted).sum(2) / codes.square().sum(2).clamp(min=1.0)
    # A group of zeros, or one that is all borne, says nothing of its scale.
    return torch.where(solved > 0, solved, scales), zeros
