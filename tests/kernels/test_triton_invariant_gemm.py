"""Products of ``kernels.triton.invariant_gemm``: right, and each row the same bits among others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.interpreted import (
    DEVICE,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN until it is written."""
    empty = torch.empty

    def poison(*args: Any, **options: Any) -> Tensor:
        return empty(*args, **options).fill_(NAN)

    monkeypatch.setattr(torch, "empty", poison)


def values(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def strided(x: Tensor) -> Tensor:
    """``x`` inside a wider tensor of NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + 24), NAN, dtype=x.dtype, device=x.device)
    view = wide[:, 8 : 8 + x.shape[1]]
    return view.copy_(x)


def small_tiling() -> Any:
    """Several tiles along each side of a small product, and more of rows than make a group."""
    from kernels.triton.invariant_gemm import InvariantTiling

    return InvariantTiling(16, 32, 32, num_warps=4, num_stages=2)


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None, tiling: Any = None) -> Tensor:
    from kernels.triton.invariant_gemm import invariant_linear

    out = invariant_linear(x, weight, bias, tiling=tiling)
    assert out.shape == (x.shape[0], weight.shape[0])
    assert out.dtype == x.dtype and out.is_contiguous()
    truth = x.double() @ weight.double().T
    if bias is not None:
        truth += bias.double()
    # Sums in fp32, then one rounding (Triton's interpreter cuts off where a GPU rounds).
    scale = truth.abs().max().item() if truth.numel() else 1.0
    bound = torch.finfo(x.dtype).eps
    torch.testing.assert_close(out.double(), truth, rtol=bound, atol=4e-6 * scale)
    return out


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 129])
@pytest.mark.parametrize(("out_features", "in_features"), [(100, 96), (33, 200)])
def test_equals_the_product(
    num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    x = values(num_tokens, in_features, dtype=dtype)
    weight = values(out_features, in_features, dtype=dtype, seed=1)
    check(x, weight)
    check(strided(x), strided(weight), values(out_features, dtype=dtype, seed=2))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_small", [True, False])
def test_a_row_is_the_same_whatever_the_others_are(dtype: torch.dtype, is_small: bool) -> None:
    """Alone, in batches of many sizes, at every kind of place, and beside other rows."""
    tiling = small_tiling() if is_small else None
    weight, bias = values(70, 300, dtype=dtype, seed=1), values(70, dtype=dtype, seed=2)
    x = values(300, 300, dtype=dtype)
    together = check(x, weight, bias, tiling)
    for count in (1, 2, 3, 8, 16, 17, 63, 64, 65, 128, 129, 299):
        assert torch.equal(check(x[:count], weight, bias, tiling), together[:count])
    for row in (0, 7, 130, 299):
        assert torch.equal(check(x[row : row + 1], weight, bias, tiling)[0], together[row])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(check(x[order], weight, bias, tiling), together[order])


@needs_kernels
def test_a_row_of_nan_leaves_the_others_as_they_are() -> None:
    from kernels.triton.invariant_gemm import invariant_linear

    weight, x = values(40, 96, seed=1), values(6, 96)
    expected = check(x, weight)
    x[2] = NAN
    found = invariant_linear(x, weight)
    assert found[2].isnan().all()
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(found[keep], expected[keep])


@needs_kernels
def test_no_columns_leave_the_bias() -> None:
    from kernels.triton.invariant_gemm import invariant_linear

    x, weight, bias = values(2, 0), values(5, 0), values(5)
    assert torch.equal(invariant_linear(x, weight, bias), bias.expand(2, 5))
    assert not invariant_linear(x, weight).any()


@needs_kernels
def test_the_cut_follows_from_the_weight_alone() -> None:
    from kernels.triton.invariant_gemm import choose_tiling

    tilings = {n: choose_tiling(n, torch.bfloat16, DEVICE) for n in (32, 2048, 1 << 20)}
    assert tilings[1 << 20].block_n == 128 and tilings[32].block_n == 32
    assert {t.block_m for t in tilings.values()} == {128}
