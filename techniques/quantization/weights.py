"""What a quantised weight is: integer codes on a grid that groups of inputs share.

Formats of files and layouts of kernels are made of these; quantisers differ in how they choose the
codes and the grid, never in what these mean.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from workbench.core.errors import ConfigError

_NAME = re.compile(r"w(?P<bits>\d)(?:g(?P<group>\d+))?(?P<zeros>z)?")
BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How a weight is written down.

    Attributes
    ----------
    bits
        Of a code: 4 or 8.
    group_size
        Inputs that share a scale; 0: all of an output (per channel).
    has_zeros
        Whether a group has a zero point: codes then run from 0 to ``2 ** bits - 1``. Without, they
        are symmetric about 0, from ``-2 ** (bits - 1)`` on.
    rounds_inputs
        Whether activations are put into 8 bits as well, as they come (W8A8).
    """

    bits: int = 4
    group_size: int = 128
    has_zeros: bool = False
    rounds_inputs: bool = False

    def __post_init__(self) -> None:
        """Refuse what no kernel knows."""
        if self.bits not in BITS:
            raise ConfigError(f"weights of {self.bits} bits are not known. Valid: 4, 8.")
        if self.group_size < 0:
            raise ConfigError(
                f"group_size={self.group_size} must be 0 (one scale an output) or more."
            )
        if self.rounds_inputs and (self.bits, self.group_size, self.has_zeros) != (8, 0, False):
            raise ConfigError(
                f"scheme {self.name}: activations of 8 bits are multiplied with weights of 8 bits "
                "with one scale an output and without zero points. Valid: w8a8."
            )

    @classmethod
    def parse(cls, name: str) -> WeightScheme:
        """From its name: ``w4g64`` has 4 bits in groups of 64, ``w8`` one scale an output, a ``z``
        at the end says that groups have zero points.

        Raises
        ------
        ConfigError
            No such name.
        """
        found = _NAME.fullmatch(name)
        if found is None or int(found["bits"]) not in BITS or found["group"] == "0":
            raise ConfigError(
                f"unknown scheme of weights {name!r}. Valid: w4 or w8, then g and the size of "
                "groups (none: one scale an output), then z for zero points, as in w4g128, w4g64z "
                "or w8."
            )
        return cls(int(found["bits"]), int(found["group"] or 0), found["zeros"] is not None)

    @property
    def name(self) -> str:
        """As :func:`parse_scheme` reads it."""
        group = f"g{self.group_size}" if self.group_size else ""
        inputs = "a8" if self.rounds_inputs else ""
        return f"w{self.bits}{group}{'z' if self.has_zeros else ''}{inputs}"

    @property
    def least(self) -> int:
        """Least code."""
        return 0 if self.has_zeros else -(1 << (self.bits - 1))

    @property
    def greatest(self) -> int:
        """Greatest code."""
        return self.least + (1 << self.bits) - 1

    def input_codes(self) -> torch.dtype | None:
        """Dtype of the codes of activations; None: they stay as they are."""
        return torch.int8 if self.rounds_inputs else None

    def num_groups(self, in_features: int) -> int:
        """Groups of an output.

        Raises
        ------
        ConfigError
            The group size does not divide the inputs.
        """
        size = self.group_size or in_features
        if in_features % size:
            fitting = [g for g in (32, 64, 128, 256) if in_features % g == 0]
            valid = ", ".join(map(str, fitting)) or "none of 32, 64, 128 and 256"
            raise ConfigError(
                f"groups of {size} do not divide {in_features} inputs. Sizes that do: {valid}; or "
                "0, one scale an output."
            )
        return in_features // size


@dataclass(frozen=True, slots=True)
class FP8Scheme:
    """Weights and activations in fp8 (e4m3).

    Attributes
    ----------
    is_static
        Whether all activations of a layer share a scale that was measured ahead, and all of its
        weights one as well. Otherwise each row of activations and each output has its own.
    """

    is_static: bool = False
    group_size: ClassVar[int] = 0

    @property
    def name(self) -> str:
        """As :func:`parse_scheme` reads it."""
        return "fp8_static" if self.is_static else "fp8"

    def input_codes(self) -> torch.dtype:
        """Dtype of the codes of activations."""
        return torch.float8_e4m3fn


Scheme = WeightScheme | FP8Scheme


def parse_scheme(name: str) -> Scheme:
    """From its name: ``w8a8``, ``fp8`` and ``fp8_static``, whose activations are in 8 bits too, or
    what :meth:`WeightScheme.parse` reads.

    Raises
    ------
    ConfigError
        No such name.
    """
    rounding = (WeightScheme(8, 0, rounds_inputs=True), FP8Scheme(), FP8Scheme(is_static=True))
    for scheme in rounding:
        if name == scheme.name:
            return scheme
    try:
        return WeightScheme.parse(name)
    except ConfigError as error:
        names = ", ".join(scheme.name for scheme in rounding)
        raise ConfigError(f"{error} With activations in 8 bits: {names}.") from error


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """A weight ``[N, K]`` in codes. ``value = (code - zero) * scale``, of its output and group.

    Attributes
    ----------
    codes : Tensor [N, K] int16
        From ``scheme.least`` to ``scheme.greatest``; of an :class:`FP8Scheme` float8_e4m3fn.
    scales : Tensor [N, G] float32
    zeros : Tensor [N, G] int16, or None
        Codes of 0; None without zero points.
    group_index : Tensor [K] int32, or None
        Group of each input; None: consecutive inputs, the usual. Others come of quantising in
        another order (act-order).
    input_scale : Tensor [1] float32, or None
        Of all activations, where it was measured ahead.
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    group_index: Tensor | None = None
    input_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The values, ``[N, K]`` float32."""
        index = self.group_of_inputs()
        values = self.codes.float()
        if self.zeros is not None:
            values -= self.zeros.float()[:, index]
        return values * self.scales[:, index]

    def group_of_inputs(self) -> Tensor:
        """Group of each input, ``[K]`` int64."""
        in_features, num_groups = self.codes.shape[1], self.scales.shape[1]
        return group_of_inputs(in_features, num_groups, self.group_index, self.codes.device)


def group_of_inputs(
    in_features: int,
    num_groups: int,
    group_index: Tensor | None,
    device: torch.device | None = None,
) -> Tensor:
    """Group of each input, ``[K]`` int64 on a device (None: the CPU); consecutive ones without an
    index."""
    if group_index is not None:
        return group_index.to(device, torch.int64)
    return torch.arange(in_features, device=device) // (in_features // num_groups)


def find_grid(
    weight: Tensor, scheme: WeightScheme, shrink: float | Tensor = 1.0
) -> tuple[Tensor, Tensor | None]:
    """The grid that just holds every value of each group.

    Parameters
    ----------
    weight : Tensor [N, K]
    shrink : float or Tensor [N, G]
        Factor on the range, to clip outliers.

    Returns
    -------
    scales : Tensor [N, G] float32
        Over 0, also of a group of zeros.
    zeros : Tensor [N, G] int16, or None
    """
    groups = weight.float().reshape(len(weight), scheme.num_groups(weight.shape[1]), -1)
    if not scheme.has_zeros:
        scales = groups.abs().amax(2) * shrink / scheme.greatest
        return scales.masked_fill(scales == 0, 1.0), None
    low = groups.amin(2).clamp(max=0) * shrink
    high = groups.amax(2).clamp(min=0) * shrink
    scales = (high - low) / scheme.greatest
    scales = scales.masked_fill(scales == 0, 1.0)
    zeros = torch.round(-low / scales).clamp(scheme.least, scheme.greatest)
    return scales, zeros.to(torch.int16)


def encode(
    weight: Tensor,
    scheme: WeightScheme,
    scales: Tensor,
    zeros: Tensor | None = None,
    group_index: Tensor | None = None,
) -> QuantizedWeight:
    """Round every value ``[N, K]`` to its nearest code on a grid (round to nearest, RTN)."""
    index = group_of_inputs(weight.shape[1], scales.shape[1], group_index, weight.device)
    codes = weight.float() / scales[:, index]
    if zeros is not None:
        codes += zeros.float()[:, index]
    codes = codes.round_().clamp_(scheme.least, scheme.greatest).to(torch.int16)
    return QuantizedWeight(scheme, codes, scales, zeros, group_index)
