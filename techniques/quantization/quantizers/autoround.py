"""AutoRound, SignRound (Cheng et al. 2023, arXiv:2309.05516): which way each weight is rounded, and
how far each group is clipped, by signed gradient descent on the output of a decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from techniques.quantization.quantizers.base import (
    InputStatistics,
    LayerProblem,
    Needs,
    Quantizer,
)
from techniques.quantization.weights import QuantizedWeight, WeightScheme
from workbench.core.errors import ConfigError, WorkbenchError

#: Least share of a group's range, far below what the default step ever comes to.
_LEAST_RANGE = 0.05
#: Inputs in a mini-batch's part where a single linear layer is fitted.
_ROWS = 32


@dataclass(frozen=True, slots=True)
class AutoRoundOptions:
    """Options of :class:`AutoRound`; the defaults are the authors'.

    Attributes
    ----------
    iterations
        Steps a decoder layer.
    batch_texts
        Calibration texts a step, drawn anew for each.
    step
        Of the first step, falling linearly to 0; 0: one over ``iterations``, with which an offset
        can just come to a half.
    tune_range
        Whether ranges of groups are tuned as well.
    """

    iterations: int = 200
    batch_texts: int = 8
    step: float = 0.0
    tune_range: bool = True

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        for name in ("iterations", "batch_texts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be 1 or more.")
        if self.step < 0:
            raise ConfigError(f"step={self.step} must be over 0, or 0 for one over iterations.")


class AutoRound(Quantizer):
    """Offsets ``V`` in -0.5 to 0.5 before rounding, ``alpha`` and ``beta`` on the greatest and the
    least value of each group, by the signs of the gradients of ``|output - wanted| ** 2``.

    Outputs are those of a decoder layer on what the quantised layers before it make of the texts;
    wanted are those of the original model. The step of the least error is kept. A step's error is
    measured against that of rounding to nearest on the same texts, which the authors do not: a
    mini-batch of easy texts is then not taken for a good step.
    """

    Options = AutoRoundOptions
    needs = Needs(rows=True, layers=True)

    @torch.no_grad()
    def quantize_layer(
        self, problem: LayerProblem, scheme: WeightScheme
    ) -> dict[str, QuantizedWeight]:
        options: AutoRoundOptions = self.options
        tuned = {name: _Tuned(w, scheme) for name, w in problem.weights.items()}
        leaves = [leaf for each in tuned.values() for leaf in each.leaves(options.tune_range)]
        step = options.step or 1 / options.iterations
        generator = torch.Generator().manual_seed(problem.seed)
        nearest = self._nearest_errors(problem, tuned)
        best, least = {name: each.result() for name, each in tuned.items()}, 1.0
        for iteration in range(options.iterations):
            texts = torch.randperm(problem.num_texts, generator=generator)
            chosen = texts[: options.batch_texts].tolist()
            with torch.enable_grad():
                values = {name: each.values() for name, each in tuned.items()}
                error = _errors(problem, values, chosen).sum()
                gradients = torch.autograd.grad(error, leaves)
            ratio = float(error.detach() / nearest[chosen].sum().clamp(min=1e-30))
            if not ratio < float("inf"):
                raise WorkbenchError(
                    f"AutoRound: the error of {next(iter(tuned))} and the layers beside it is no "
                    f"finite number at step {iteration}. Give a smaller step, or look for broken "
                    "weights."
                )
            if ratio < least:
                best, least = {name: each.result() for name, each in tuned.items()}, ratio
            rate = step * (1 - iteration / options.iterations)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.sub_(rate * gradient.sign())
            for each in tuned.values():
                each.clamp_()
        return best

    def quantize(
        self, weight: Tensor, scheme: WeightScheme, inputs: InputStatistics | None, name: str = ""
    ) -> QuantizedWeight:
        """Of a linear layer that stands alone, such as the output layer: on its own output."""
        if inputs is None or not len(inputs.rows):
            raise ConfigError(
                f"{name}: AutoRound needs a sample of inputs. Give calibration texts."
            )
        return self.quantize_layer(_OneLinear(name, weight, inputs.rows), scheme)[name]

    def _nearest_errors(self, problem: LayerProblem, tuned: Mapping[str, _Tuned]) -> Tensor:
        """Squared error of each text where nothing is tuned, ``[texts]``."""
        values = {name: each.values() for name, each in tuned.items()}
        size = self.options.batch_texts
        parts = [list(range(problem.num_texts))[i : i + size]
                 for i in range(0, problem.num_texts, size)]  # fmt: skip
        return torch.cat([_errors(problem, values, part) for part in parts])


class _Tuned:
    """A weight ``[N, K]`` and what is tuned of it."""

    def __init__(self, weight: Tensor, scheme: WeightScheme) -> None:
        self.scheme = scheme
        groups = scheme.num_groups(weight.shape[1])
        self.weight = weight.float().reshape(len(weight), groups, -1)
        self.low = self.weight.amin(2).clamp(max=0)
        self.high = self.weight.amax(2).clamp(min=0)
        self.offset = torch.zeros_like(self.weight, requires_grad=True)
        self.alpha = torch.ones_like(self.low, requires_grad=True)
        self.beta = torch.ones_like(self.low, requires_grad=True)

    def leaves(self, with_range: bool) -> list[Tensor]:
        """What gradients are taken of."""
        return [self.offset, self.alpha, self.beta] if with_range else [self.offset]

    def clamp_(self) -> None:
        """Back into the bounds, after a step."""
        self.offset.clamp_(-0.5, 0.5)
        self.alpha.clamp_(_LEAST_RANGE, 1.0)
        self.beta.clamp_(_LEAST_RANGE, 1.0)

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        low, high = self.low * self.beta, self.high * self.alpha
        if not self.scheme.has_zeros:
            scales = torch.maximum(-low, high) / self.scheme.greatest
            return scales.masked_fill(scales == 0, 1.0), None
        scales = (high - low) / self.scheme.greatest
        scales = scales.masked_fill(scales == 0, 1.0)
        return scales, _round(-low / scales).clamp(self.scheme.least, self.scheme.greatest)

    def _codes(self, scales: Tensor, zeros: Tensor | None) -> Tensor:
        codes = _round(self.weight / scales.unsqueeze(2) + self.offset)
        if zeros is not None:
            codes = codes + zeros.unsqueeze(2)
        return codes.clamp(self.scheme.least, self.scheme.greatest)

    def values(self) -> Tensor:
        """What the codes stand for, ``[N, K]``; gradients pass rounding as if it were not there."""
        scales, zeros = self._grid()
        codes = self._codes(scales, zeros)
        if zeros is not None:
            codes = codes - zeros.unsqueeze(2)
        return (codes * scales.unsqueeze(2)).flatten(1)

    def result(self) -> QuantizedWeight:
        """As it is now."""
        scales, zeros = self._grid()
        codes = self._codes(scales, zeros).flatten(1).to(torch.int16)
        kept = None if zeros is None else zeros.to(torch.int16)
        return QuantizedWeight(self.scheme, codes, scales, kept)


class _OneLinear:
    """A linear layer as a problem; a text is some of its inputs."""

    seed = 0

    def __init__(self, name: str, weight: Tensor, rows: Tensor) -> None:
        self.weights = {name: weight}
        self._parts = torch.split(rows, _ROWS)
        self._wanted = [part @ weight.float().T for part in self._parts]

    @property
    def num_texts(self) -> int:
        return len(self._parts)

    def outputs(self, weights: Mapping[str, Tensor], texts: list[int]) -> list[Tensor]:
        (weight,) = weights.values()
        return [self._parts[i] @ weight.T for i in texts]

    def wanted(self, text: int) -> Tensor:
        return self._wanted[text]


def _errors(problem: LayerProblem, values: Mapping[str, Tensor], texts: list[int]) -> Tensor:
    """Squared error of each text, ``[texts]``."""
    found = problem.outputs(values, texts)
    return torch.stack([
        (output - problem.wanted(text)).square().sum()
        for output, text in zip(found, texts, strict=True)
    ])  # fmt: skip


def _round(x: Tensor) -> Tensor:
    """To nearest; the gradient passes straight through."""
    rounded: Tensor = x + (x.round() - x).detach()
    return rounded
