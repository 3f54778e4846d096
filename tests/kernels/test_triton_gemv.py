"""One row times a weight, with its norm, activation and residual, against double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.norm import RowNorm, rms_norm_reference
from tests.helpers.interpreted import (
    DEVICE,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")
EPS = 1e-5


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN until it is written."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN))


def values(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def strided(x: Tensor) -> Tensor:
    """``x`` inside a wider tensor of NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + 24), NAN, dtype=x.dtype, device=x.device)
    view = wide[:, 8 : 8 + x.shape[1]]
    return view.copy_(x)


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh")


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    offset: float | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    tiling: Any = None,
) -> Tensor:
    """Compare with the ops one by one in double precision; ``offset`` asks for a norm."""
    from kernels.triton.gemv import gemv

    norm, expected = None, x
    if offset is not None:
        norm_weight = 1 + values(x.shape[1], dtype=x.dtype, seed=5) / 4
        norm = RowNorm(norm_weight, EPS, offset)
        expected = rms_norm_reference(x, norm_weight, EPS, offset=offset)
    given = None if residual is None else residual.clone()
    kept = x.clone()
    out = gemv(x, weight, bias, norm=norm, residual=given, activation=activation, tiling=tiling)
    assert torch.equal(x, kept)
    assert out.dtype == x.dtype
    truth = expected.double() @ weight.double().T
    if bias is not None:
        truth += bias.double()
    size = truth.abs().max().item()
    if activation is not None:
        gates, rest = truth.chunk(2, dim=1)
        truth = activate(gates, activation) * rest
        size = size * rest.abs().max().item()
    if residual is not None:
        assert out is given
        truth += residual.double()
    assert out.shape == truth.shape
    # A rounding of each value that a launch alone would have written (the norm's are many, so they
    # average out), which Triton's interpreter cuts off where a GPU rounds to the nearest.
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(out.double(), truth, rtol=4 * eps, atol=2 * eps * size + 4e-6 * size)
    return out


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "in_features"), [(100, 96), (64, 512), (34, 1040), (2, 16), (12, 2048), (8, 1)]
)
@pytest.mark.parametrize("form", ["plain", "bias", "norm", "offset", "residual", "silu", "gelu"])
def test_equals_the_ops_one_by_one(
    form: str, rows: int, in_features: int, dtype: torch.dtype
) -> None:
    weight = values(rows, in_features, dtype=dtype, seed=1) / in_features**0.5
    options: dict[str, Any] = {}
    if form == "residual":
        options["residual"] = values(1, rows, dtype=dtype, seed=2)
    if form in ("norm", "offset"):
        options["offset"] = 1.0 if form == "offset" else 0.0
    if form in ("silu", "gelu"):
        options |= {"activation": "silu" if form == "silu" else "gelu_tanh", "offset": 0.0}
    bias = values(rows, dtype=dtype, seed=3) if form in ("bias", "gelu") else None
    check(values(1, in_features, dtype=dtype), weight, bias, **options)


@needs_kernels
@pytest.mark.parametrize("prefetched", [0, 2])
@pytest.mark.parametrize(("block_n", "block_k"), [(4, 128), (16, 256), (2, 1024)])
def test_every_cut_gives_the_same(block_n: int, block_k: int, prefetched: int) -> None:
    from kernels.triton.gemv import GemvTiling

    tiling = GemvTiling(block_n, block_k, num_warps=2, num_stages=2, prefetched=prefetched)
    x, weight = values(1, 768), values(44, 768, seed=1) / 28
    first = check(x, weight, offset=0.0, activation="silu", tiling=tiling)
    assert torch.equal(check(x, weight, offset=0.0, activation="silu", tiling=tiling), first)
    residual = strided(values(1, 44, seed=2))
    check(x, weight, residual=residual, tiling=tiling)
    check(strided(x), strided(weight), offset=0.0, tiling=tiling)


@needs_kernels
def test_rows_beyond_the_end_are_not_written() -> None:
    from kernels.triton.gemv import GemvTiling, gemv

    wide = torch.full((1, 64), 7.0, dtype=torch.bfloat16, device=DEVICE)
    weight = values(20, 256, seed=1)
    gemv(values(1, 256), weight, residual=wide[:, :20], tiling=GemvTiling(16, 128))
    assert bool((wide[:, 20:] == 7).all())


@needs_kernels
def test_what_it_cannot_take_is_told() -> None:
    from kernels.triton.gemv import gemv

    x, weight = values(1, 64), values(32, 64)
    with pytest.raises(ValueError, match="2 rows: this kernel takes one"):
        gemv(values(2, 64), weight)
    with pytest.raises(ValueError, match="must be one of silu, gelu_tanh, without a residual"):
        gemv(x, weight, activation="relu")
    with pytest.raises(ValueError, match="without a residual"):
        gemv(x, weight, activation="silu", residual=values(1, 32))
    with pytest.raises(ValueError, match="takes up to 16384"):
        gemv(values(1, 20000), values(4, 20000), norm=RowNorm(values(20000), EPS))
    assert gemv(x, weight[:0]).shape == (1, 0)
