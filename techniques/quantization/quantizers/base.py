"""The interface of quantisers: a weight, a scheme and what the layer's inputs were go in, codes on
a grid come out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from techniques.quantization.weights import (
    QuantizedWeight,
    Scheme,
    WeightScheme,
    encode,
    find_grid,
)
from workbench.core.errors import ConfigError, WorkbenchError


@dataclass(frozen=True, slots=True)
class NoOptions:
    """A quantiser without options."""


class InputStatistics:
    """What is known of one layer's inputs, summed up batch by batch.

    Parameters
    ----------
    name
        Of the layer, for messages.
    in_features
        Width ``K`` of an input.
    keep_hessian
        Whether ``sum x x^T`` is kept, which takes ``K * K`` float32.
    num_rows
        Inputs to keep as they are, drawn evenly from all.
    seed
        Of the draw. Layers with one seed that see the same batches keep the same tokens.

    Attributes
    ----------
    num_tokens : int
        Inputs seen.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        *,
        keep_hessian: bool = True,
        num_rows: int = 0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.in_features = name, in_features
        self.num_tokens = 0
        self._abs_sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._abs_max = torch.zeros(in_features, device=device)
        self._outer: Tensor | None = None
        if keep_hessian:
            self._outer = torch.zeros(in_features, in_features, device=device)
        self._num_rows = num_rows
        self._rows = torch.zeros(0, in_features, device=device)
        self._keys = torch.zeros(0)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, x: Tensor) -> None:
        """Take inputs ``[T, K]``.

        Raises
        ------
        WorkbenchError
            Some are infinite or no number.
        """
        x = x.float()
        finite = torch.isfinite(x).all(1)
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise WorkbenchError(
                f"calibration: an input of {self.name} is not finite (token "
                f"{self.num_tokens + first} of the calibration text). Load the model in float32, "
                "or look for broken weights before this layer."
            )
        self.num_tokens += len(x)
        self._abs_sum += x.abs().sum(0, dtype=torch.float64)
        if len(x):
            self._abs_max = torch.maximum(self._abs_max, x.abs().amax(0))
        if self._outer is not None:
            self._outer.addmm_(x.T, x)
        if self._num_rows:
            self._draw(x)

    def _draw(self, x: Tensor) -> None:
        """Keep the rows with the least random keys: an even draw without replacement, whatever the
        batches."""
        keys = torch.cat([self._keys, torch.rand(len(x), generator=self._generator)])
        kept = keys.argsort()[: self._num_rows].sort().values
        self._rows = torch.cat([self._rows, x])[kept.to(x.device)]
        self._keys = keys[kept]

    @property
    def mean_abs(self) -> Tensor:
        """Mean size of each input, ``[K]`` float32."""
        return (self._abs_sum / max(self.num_tokens, 1)).float()

    @property
    def max_abs(self) -> Tensor:
        """Greatest size of each input, ``[K]`` float32."""
        return self._abs_max

    @property
    def hessian(self) -> Tensor:
        """Mean of ``x x^T``, ``[K, K]`` float64: half the Hessian of an output's squared error.

        Raises
        ------
        ConfigError
            It was not kept, or nothing was seen.
        """
        if self._outer is None or not self.num_tokens:
            raise ConfigError(
                f"{self.name}: this quantiser needs calibration inputs with their outer products. "
                "Give calibration texts."
            )
        return self._outer.double() / self.num_tokens

    @property
    def rows(self) -> Tensor:
        """The kept inputs ``[S, K]`` float32, in the order of the text."""
        return self._rows

    def scaled(self, factors: Tensor) -> InputStatistics:
        """Statistics of the inputs divided by ``factors[K]``, as they are once the operation before
        is."""
        out = InputStatistics(self.name, self.in_features, keep_hessian=False)
        out.num_tokens, out._num_rows = self.num_tokens, self._num_rows
        out._abs_sum, out._abs_max = self._abs_sum / factors, self._abs_max / factors
        out._outer = None if self._outer is None else self._outer / torch.outer(factors, factors)
        out._rows = self._rows / factors
        return out


@dataclass(frozen=True, slots=True)
class Needs:
    """What a quantiser wants to know of a layer's inputs.

    Attributes
    ----------
    hessian
        ``sum x x^T``.
    rows
        Inputs as they are.
    sizes
        The greatest size of each.
    layers
        Decoder layers as a whole: then :meth:`Quantizer.quantize_layer` is called for each.
    """

    hessian: bool = False
    rows: bool = False
    sizes: bool = False
    layers: bool = False

    @property
    def any(self) -> bool:
        """Whether there is anything to be known."""
        return self.hessian or self.rows or self.sizes or self.layers


class LayerProblem(Protocol):
    """A decoder layer as a function of the weights of its linear layers."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """What is to be quantised, ``[N, K]`` float32 by name; not to be changed."""
        ...

    @property
    def num_texts(self) -> int:
        """Calibration texts."""
        ...

    @property
    def seed(self) -> int:
        """Of draws of texts."""
        ...

    def outputs(self, weights: Mapping[str, Tensor], texts: list[int]) -> list[Tensor]:
        """``[T, H]`` of each text, with ``weights`` in place of its own; gradients pass."""
        ...

    def wanted(self, text: int) -> Tensor:
        """``[T, H]`` that the original model has there."""
        ...


class Quantizer(ABC):
    """A way to find codes and grids. Built from its ``Options``, which are never mutated."""

    Options: ClassVar[type[Any]] = NoOptions
    needs: ClassVar[Needs] = Needs()

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    def needs_for(self, scheme: Scheme) -> Needs:
        """What it wants to know, of this scheme.

        Raises
        ------
        ConfigError
            It does not find codes of this scheme.
        """
        if not isinstance(scheme, WeightScheme):
            raise ConfigError(
                f"{type(self).__name__} rounds to integers, and scheme {scheme.name} is of fp8: "
                "take quantizer=fp8, or a scheme such as w4g64z or w8a8."
            )
        return self.needs

    @abstractmethod
    def quantize(
        self, weight: Tensor, scheme: Any, inputs: InputStatistics | None, name: str = ""
    ) -> QuantizedWeight:
        """Quantise one weight.

        Parameters
        ----------
        weight : Tensor [N, K] float32
            Not changed.
        inputs
            Of this layer; None only where :attr:`needs` names nothing.
        name
            Of the layer in the checkpoint, for options that select layers, and messages.

        Raises
        ------
        ConfigError
            The groups do not divide the inputs, or statistics are missing.
        """

    def quantize_layer(self, problem: LayerProblem, scheme: Any) -> dict[str, QuantizedWeight]:
        """Quantise the linear layers of a decoder layer together, by name; only called where
        :attr:`needs` has ``layers``."""
        raise NotImplementedError

    def find_scales(
        self, weights: Sequence[Tensor], scheme: Any, inputs: InputStatistics
    ) -> Tensor | None:
        """Factors ``[K]`` to multiply the columns of ``weights`` with and to divide their common
        inputs by, before anything is rounded; None: the quantiser does not scale.

        Only asked for weights ``[N_i, K]`` before whose inputs stands something that can be divided
        instead; whoever asks does both.
        """
        return None


def shrink_steps(count: int, least: float) -> list[float]:
    """``count`` factors on a range, from 1 down to ``least``."""
    if count < 1 or not 0 < least <= 1:
        raise ConfigError(
            f"a clip search of {count} steps down to {least} is empty. Steps must be 1 or more, "
            "the least factor over 0 and at most 1."
        )
    return torch.linspace(1.0, least, count).tolist() if count > 1 else [1.0]


def search_grid(
    weight: Tensor, scheme: WeightScheme, shrinks: Sequence[float], gram: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The grid that keeps each group nearest, among those that clip its range by one of
    ``shrinks``.

    Parameters
    ----------
    weight : Tensor [N, K]
    gram : Tensor [G, K / G, K / G], optional
        ``x x^T`` of each group's inputs: distance is then the squared error of the output that the
        group alone makes. Without, of the weights.

    Returns
    -------
    scales, zeros
        As of :func:`find_grid`.
    """
    best, zeros = find_grid(weight, scheme, shrinks[0])
    if len(shrinks) == 1:
        return best, zeros
    best_error = torch.full_like(best, float("inf"))
    for shrink in shrinks:
        found = encode(weight, scheme, *find_grid(weight, scheme, shrink))
        delta = (weight - found.dequantize()).reshape(*best.shape, -1)
        if gram is None:
            error = delta.square().sum(2)
        else:
            error = (torch.einsum("ngi,gij->ngj", delta, gram) * delta).sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, found.scales, best)
        if zeros is not None and found.zeros is not None:
            zeros = torch.where(better, found.zeros, zeros)
    return best, zeros


def output_error(
    weight: Tensor, found: Tensor, rows: Tensor, rounded: Tensor | None = None
) -> float:
    """``|X W^T - Y Q^T| / |X W^T|`` in Frobenius norms, of ``weight`` and ``found`` ``[N, K]`` on
    inputs ``[S, K]`` and what they are rounded to; None: they are not."""
    wanted = rows @ weight.T
    if rounded is None:
        error = rows @ (weight - found).T
    else:
        error = wanted - rounded @ found.T
    return float(error.norm() / wanted.norm().clamp(min=1e-30))
