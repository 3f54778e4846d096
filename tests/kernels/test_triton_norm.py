"""RMSNorm of ``kernels.triton`` against the torch reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.norm import add_rms_norm_reference_, rms_norm_reference
from tests.helpers.interpreted import (
    DEVICE,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN until it is written."""
    empty = torch.empty

    def poison(*args: Any, **options: Any) -> Tensor:
        out = empty(*args, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poison)


def fused() -> Any:
    from kernels.triton import norm

    return norm


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(*shape, generator=generator)
    if x.numel():
        x = x * 10.0 ** torch.linspace(-3, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return x.to(dtype).to(DEVICE)


def check(actual: Tensor, expected: Tensor, roundings: int = 2) -> None:
    """Equal up to a step for each rounding: fp32 sums are in another order, and Triton's
    interpreter cuts off where a GPU rounds."""
    assert actual.is_contiguous() and actual.dtype == expected.dtype
    eps = roundings * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=max(eps, 1e-6), atol=1e-7)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("hidden", [1, 17, 64, 576, 1000, 4096])
def test_norm_equals_reference(dtype: torch.dtype, offset: float, hidden: int) -> None:
    x, weight = rows(5, hidden, dtype=dtype), rows(1, hidden, dtype=dtype)[0] * 1000
    actual = fused().rms_norm(x, weight, EPS, offset=offset)
    check(actual, rms_norm_reference(x, weight, EPS, offset=offset))


@needs_kernels
@pytest.mark.parametrize("hidden", [16384, 14336])
def test_wide_rows(hidden: int) -> None:
    x, weight = rows(3, hidden, dtype=torch.bfloat16), rows(1, hidden, dtype=torch.bfloat16)[0]
    check(fused().rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS))
    with pytest.raises(ValueError, match="16384"):
        wide = rows(1, 16385)
        fused().rms_norm(wide, wide[0], EPS)


@needs_kernels
@pytest.mark.parametrize("num_rows", [1, 2, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_addition_is_rounded_and_kept(num_rows: int, dtype: torch.dtype) -> None:
    x, residual = rows(num_rows, 96, dtype=dtype), rows(num_rows, 96, dtype=dtype, seed=1)
    weight = rows(1, 96, dtype=dtype, seed=2)[0] * 1000
    expected_residual = residual.clone()
    expected = add_rms_norm_reference_(x, expected_residual, weight, EPS)
    before = x.clone()
    actual = fused().add_rms_norm_(x, residual, weight, EPS)
    check(residual, expected_residual, roundings=1)
    check(actual, expected, roundings=3)
    assert torch.equal(x, before)


@needs_kernels
def test_rounds_before_the_weight_only_without_an_offset() -> None:
    """In numbers that fp32 holds exactly, so that where it rounds decides alone."""
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.float16, device=DEVICE)
    weight = torch.tensor([1.0, 1.5, 3.0, 1000.0], dtype=torch.float16, device=DEVICE)
    eps = 2.0**-11  # 1 / sqrt(1 + eps) is just under 1 - 2 ** -12, halfway to the next fp16
    for offset in (0.0, 1.0):
        expected = rms_norm_reference(x, weight, eps, offset=offset)
        actual = fused().rms_norm(x, weight, eps, offset=offset)
        torch.testing.assert_close(actual, expected, rtol=2**-10, atol=0)


@needs_kernels
def test_strided_rows_and_heads() -> None:
    wide = rows(6, 7, 200, dtype=torch.bfloat16)
    weight = rows(1, 80, dtype=torch.bfloat16)[0] * 1000
    views = [
        wide[:, 0, 3:83],
        wide[::2, 2, 5:85],
        wide[:, 1:4, 3:83],
        wide[::3, ::2, 100:180],
        wide.transpose(0, 1)[..., :80],
        wide[:1, :1, :80],
    ]
    for view in views:
        check(fused().rms_norm(view, weight, EPS), rms_norm_reference(view, weight, EPS))


@needs_kernels
def test_addition_to_strided_rows_leaves_their_neighbours_alone() -> None:
    x, residual = rows(5, 300), rows(5, 400, seed=1)
    weight = rows(1, 100, seed=2)[0] * 1000
    expected_residual = residual.clone()
    expected = add_rms_norm_reference_(x[:, 7:107], expected_residual[:, 3:103], weight, EPS)
    actual = fused().add_rms_norm_(x[:, 7:107], residual[:, 3:103], weight, EPS)
    check(actual, expected)
    check(residual, expected_residual)


@needs_kernels
@pytest.mark.parametrize("shape", [(0, 64), (0, 4, 64), (3, 0, 64)])
def test_nothing(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=DEVICE)
    assert fused().rms_norm(x, torch.ones(64, device=DEVICE), EPS).shape == shape


@needs_kernels
def test_nothing_to_add() -> None:
    x = torch.zeros(0, 64, device=DEVICE)
    out = fused().add_rms_norm_(x, x.clone(), torch.ones(64, device=DEVICE), EPS)
    assert out.shape == (0, 64)


@needs_kernels
def test_zeros_infinities_and_nan_stay_in_their_row() -> None:
    x = rows(4, 64)
    x[0] = 0.0
    x[1, 5], x[2, 6] = float("inf"), float("nan")
    weight = torch.ones(64, device=DEVICE)
    actual, expected = fused().rms_norm(x, weight, EPS), rms_norm_reference(x, weight, EPS)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-6, atol=1e-7)
    assert bool(actual[3].isfinite().all()) and not bool(actual[0].any())


@needs_kernels
def test_the_poison_is_noticed() -> None:
    kept: Callable[..., Tensor] = torch.empty
    assert bool(kept(3).isnan().all())
