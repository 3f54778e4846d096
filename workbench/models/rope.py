"""Rotary position embeddings: which frequencies a layer rotates by, and their table.

Paper: Su et al. 2021, "RoFormer" (arXiv:2104.09864). Each way of stretching the context is one
small class; ``ROPE_TYPES`` maps the name in a Hugging Face config onto it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from workbench.core.errors import UnsupportedError


class RopeScaling(Protocol):
    """Changes the frequencies of plain rotary embeddings."""

    def scale(self, inv_freq: torch.Tensor, rope: RopeSpec) -> tuple[torch.Tensor, float]:
        """Return new frequencies ``[rotary_dim / 2]`` and the factor on cosines and sines."""
        ...


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of one layer.

    Attributes
    ----------
    theta
        Base of the wavelengths.
    rotary_dim
        Leading elements of a head that are rotated; the rest pass through.
    scaling
        How the context is stretched; None leaves the frequencies.
    """

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None

    def frequencies(self) -> tuple[torch.Tensor, float]:
        """Radians a position ``[rotary_dim / 2]`` float32, and the factor on cosines and sines."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32) / self.rotary_dim
        inv_freq = 1.0 / (self.theta**exponents)
        return (inv_freq, 1.0) if self.scaling is None else self.scaling.scale(inv_freq, self)

    def table_bytes(self, num_positions: int) -> int:
        """Bytes of :meth:`table`."""
        return num_positions * self.rotary_dim * torch.float32.itemsize

    def table(self, num_positions: int, device: torch.device) -> torch.Tensor:
        """Cosines then sines, ``[num_positions, rotary_dim]`` float32.

        Computed on the host whatever the device, so that every device rotates by the same angles.
        """
        inv_freq, factor = self.frequencies()
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq
        table = torch.empty(num_positions, self.rotary_dim, dtype=torch.float32)
        cos, sin = table.chunk(2, dim=-1)
        torch.cos(angles, out=cos).mul_(factor)
        torch.sin(angles, out=sin).mul_(factor)
        return table.to(device)


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by a factor (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float

    def scale(self, inv_freq: torch.Tensor, rope: RopeSpec) -> tuple[torch.Tensor, float]:
        return inv_freq / self.factor, 1.0


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long wavelengths divided, short ones kept, a smooth change between (Llama 3.1,
    arXiv:2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scale(self, inv_freq: torch.Tensor, rope: RopeSpec) -> tuple[torch.Tensor, float]:
        # How many turns a frequency makes over the original context decides what happens to it.
        turns = self.original_max_position_embeddings * inv_freq / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / span).clamp(0.0, 1.0)
        return (1 - kept) * inv_freq / self.factor + kept * inv_freq, 1.0


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Interpolation by part, and a temperature on attention (YaRN, Peng et al. 2023,
    arXiv:2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def scale(self, inv_freq: torch.Tensor, rope: RopeSpec) -> tuple[torch.Tensor, float]:
        low, high = (self._index_of(turns, rope) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.rotary_dim - 1)
        # A width of zero would divide by it; the paper's code steps aside in the same way.
        width = (high - low) or 0.001
        index = torch.arange(rope.rotary_dim // 2, dtype=torch.float32)
        interpolated = ((index - low) / width).clamp(0.0, 1.0)
        scaled = interpolated * inv_freq / self.factor + (1 - interpolated) * inv_freq
        return scaled, self._temperature()

    def _index_of(self, turns: float, rope: RopeSpec) -> float:
        """Which frequency makes this many turns over the original context."""
        wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    def _temperature(self) -> float:
        def mscale(weight: float) -> float:
            return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return mscale(self.mscale) / mscale(self.mscale_all_dim)
        return mscale(1.0)


def _dynamic(parameters: Mapping[str, Any]) -> None:
    """Dynamic NTK scaling stretches only beyond ``max_position_embeddings``, where a spec's context
    ends; within it the frequencies are the plain ones."""


def _yarn(parameters: Mapping[str, Any]) -> YarnScaling:
    fields = YarnScaling.__dataclass_fields__
    return YarnScaling(**{k: v for k, v in parameters.items() if k in fields and v is not None})


def _llama3(parameters: Mapping[str, Any]) -> Llama3Scaling:
    return Llama3Scaling(**{k: parameters[k] for k in Llama3Scaling.__dataclass_fields__})


#: Scaling by the ``rope_type`` of a Hugging Face config.
ROPE_TYPES: dict[str, Callable[[Mapping[str, Any]], RopeScaling | None]] = {
    "default": lambda parameters: None,
    "linear": lambda parameters: LinearScaling(float(parameters["factor"])),
    "llama3": _llama3,
    "yarn": _yarn,
    "dynamic": _dynamic,
}


def rope_from_hf(parameters: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """Build a :class:`RopeSpec` from the ``rope_parameters`` of a Hugging Face config.

    Parameters
    ----------
    parameters
        ``rope_type``, ``rope_theta`` and what the type needs, as Transformers 5 keeps them.
    head_dim
        Elements of a head.

    Raises
    ------
    UnsupportedError
        The type is not one of ``ROPE_TYPES``, or a parameter that it needs is missing.
    """
    rope_type = parameters.get("rope_type") or "default"
    if rope_type not in ROPE_TYPES:
        raise UnsupportedError(
            f"rope_type {rope_type!r} is not supported. Supported: {', '.join(sorted(ROPE_TYPES))}."
        )
    try:
        scaling = ROPE_TYPES[rope_type](parameters)
        theta = float(parameters["rope_theta"])
    except (KeyError, TypeError) as error:
        raise UnsupportedError(
            f"rope_parameters of type {rope_type!r} are incomplete ({error}); given: "
            f"{', '.join(sorted(parameters))}."
        ) from error
    factor = parameters.get("partial_rotary_factor")
    rotary_dim = int(head_dim * (1.0 if factor is None else factor))
    return RopeSpec(theta=theta, rotary_dim=rotary_dim, scaling=scaling)
