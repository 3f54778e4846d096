"""What the tests of the ops share: poisoned memory, one or two threads, rows with odd strides."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

Rows = Callable[..., Tensor]
Close = Callable[[Tensor, Tensor, float], None]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN (or the greatest integer): what an op does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def rows() -> Rows:
    """Normal numbers of a shape; ``strided`` puts them inside a wider tensor of NaN."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype, strided: bool = False, scale: float = 1.0) -> Tensor:
        x = (scale * torch.randn(*shape, generator=generator)).to(dtype)
        if not strided:
            return x
        wide = torch.full((*shape[:-1], shape[-1] + 5), float("nan"), dtype=dtype)
        view = wide[..., 2 : 2 + shape[-1]]
        return view.copy_(x)

    return make


@pytest.fixture
def assert_close() -> Close:
    """Compare with an fp64 truth, within so many roundings to the dtype of the result."""

    def check(actual: Tensor, truth: Tensor, num_roundings: float) -> None:
        bound = num_roundings * torch.finfo(actual.dtype).eps / 2
        torch.testing.assert_close(actual.double(), truth.double(), rtol=bound, atol=bound)

    return check
