"""Shared by the tests of the ops: grids, tolerances, and memory that a kernel must not leave as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rows_of(
    generator: torch.Generator, *shape: int, dtype: torch.dtype, layout: str = "dense"
) -> Tensor:
    """Normal numbers; ``layout="strided"`` puts the rows into a wider tensor full of NaN."""
    x = torch.randn(*shape, generator=generator).to(dtype)
    if layout == "dense":
        return x
    wide = torch.full((*shape[:-1], shape[-1] + 5), float("nan"), dtype=dtype)
    view = wide[..., 2 : 2 + shape[-1]]
    view.copy_(x)
    return view


def roundings(dtype: torch.dtype, count: float) -> float:
    """Relative error of so many roundings to ``dtype``."""
    return count * torch.finfo(dtype).eps / 2
