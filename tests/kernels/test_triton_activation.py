"""Gated activations of ``kernels.triton`` against the torch reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.activation import gelu_tanh_and_mul_reference, silu_and_mul_reference
from tests.helpers.interpreted import (
    DEVICE,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)

REFERENCES = {
    "silu_and_mul": silu_and_mul_reference,
    "gelu_tanh_and_mul": gelu_tanh_and_mul_reference,
}
every_op = pytest.mark.parametrize("op", REFERENCES)


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN until it is written."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


def fused(op: str, x: Tensor) -> Tensor:
    from kernels.triton import activation

    function: Any = getattr(activation, op)
    result: Tensor = function(x)
    return result


def check(op: str, x: Tensor) -> None:
    actual, expected = fused(op, x), REFERENCES[op](x)
    assert actual.is_contiguous() and actual.dtype == expected.dtype
    # A step for each of two roundings: Triton's interpreter cuts off where a GPU rounds.
    eps = 2 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=max(eps, 2e-6), atol=3e-6, equal_nan=True)


def values(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * 4).to(dtype).to(DEVICE)


@needs_kernels
@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_rows", "inner"), [(1, 1), (1, 3072), (3, 17), (40, 1536), (7, 1000), (2, 256)]
)
def test_equals_reference(op: str, dtype: torch.dtype, num_rows: int, inner: int) -> None:
    check(op, values(num_rows, 2 * inner, dtype=dtype))


@needs_kernels
@every_op
def test_strided_rows(op: str) -> None:
    wide = values(9, 700, dtype=torch.bfloat16)
    for view in (wide[:, 5:605], wide[::2, :200], wide[3:4, 1:7]):
        check(op, view)


@needs_kernels
@every_op
@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_nothing(op: str, shape: tuple[int, int]) -> None:
    out = fused(op, torch.zeros(shape, device=DEVICE))
    assert out.shape == (shape[0], shape[1] // 2)


@needs_kernels
@every_op
def test_values_at_the_ends(op: str) -> None:
    """Where exp overflows, at 0 and between; infinities and NaN as the reference has them."""
    gate = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, -1e4, 1e4, -1e30, 1e30])
    gate = torch.cat([gate, torch.tensor([float("inf"), float("nan")])])
    check(op, torch.stack([torch.cat([gate, torch.ones(12)])]).to(DEVICE))


@needs_kernels
def test_the_activation_is_rounded_before_the_product() -> None:
    x = values(16, 2 * 512, dtype=torch.float16)
    gate, up = x.chunk(2, dim=-1)
    unrounded = (torch.nn.functional.silu(gate.float()) * up.float()).to(x.dtype)
    actual, expected = fused("silu_and_mul", x), silu_and_mul_reference(x)
    assert int((actual != expected).sum()) < int((actual != unrounded).sum()) / 4
