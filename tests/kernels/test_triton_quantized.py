"""Products with weights of 4 and 8 bits in ``kernels.triton``, against double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.norm import RowNorm, rms_norm_reference
from kernels.triton import is_interpreted
from tests.helpers.interpreted import (
    DEVICE,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")
EPS = 1e-5
#: Bits, inputs of a group (0: all), zero points.
GRIDS = [
    (4, 32, False), (4, 32, True), (4, 64, False), (4, 64, True), (4, 128, False), (4, 128, True),
    (4, 256, True), (4, 0, False), (4, 0, True), (8, 0, False), (8, 0, True), (8, 32, False),
    (8, 64, True), (8, 128, False), (8, 256, True),
]  # fmt: skip


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN until it is written; scratch memory is new in every test."""
    empty = torch.empty

    def poison(*args: Any, **options: Any) -> Tensor:
        new = empty(*args, **options)
        return new.fill_(NAN) if new.is_floating_point() else new.fill_(-1)

    monkeypatch.setattr(torch, "empty", poison)
    if DEVICE.type == "cpu":
        from kernels.triton import quantized_gemm, skinny_gemm

        monkeypatch.setattr(skinny_gemm, "_PARTS", {})
        monkeypatch.setattr(skinny_gemm, "_COUNTERS", {})
        quantized_gemm._gemm.forget()


def values(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Random ones; those of fp32 are bf16 numbers, to which the kernels round (and the interpreter
    cuts off)."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).bfloat16().to(dtype).to(DEVICE)


def strided(x: Tensor) -> Tensor:
    """``x`` inside a wider tensor of NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + 24), NAN, dtype=x.dtype, device=x.device)
    view = wide[:, 8 : 8 + x.shape[1]]
    return view.copy_(x)


class Weight:
    """Random codes over their whole range, laid out, and the values that they stand for."""

    def __init__(
        self,
        rows: int,
        in_features: int,
        bits: int,
        group: int,
        has_zeros: bool,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        from kernels.triton.quantized_layout import pack_tiles

        generator = torch.Generator().manual_seed(rows + in_features + bits + group)
        low = 0 if bits == 4 else -128
        codes = torch.randint(low, low + (1 << bits), (rows, in_features), generator=generator)
        shape = (rows, in_features // group if group else 1)
        scales = ((torch.rand(shape, generator=generator) + 0.5) * in_features**-0.5).to(dtype)
        zeros = None
        wide = codes.double().view(*shape, -1)
        if has_zeros:
            zeros = torch.randint(low, low + (1 << bits), shape, generator=generator)
            wide = wide - zeros.double().unsqueeze(2)
        elif bits == 4:
            wide = wide - 8
        self.values = (wide * scales.double().unsqueeze(2)).view(rows, in_features).to(DEVICE)
        words = pack_tiles(codes, bits).to(DEVICE)
        grid = None if zeros is None else zeros.T.to(torch.int8).contiguous().to(DEVICE)
        self.parts = (words, scales.T.contiguous().to(DEVICE), grid)
        self.facts = {"bits": bits, "rows": rows}


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh")


def compare(out: Tensor, truth: Tensor, x: Tensor, activation: str | None = None) -> None:
    """Sums in fp32, then one rounding (Triton's interpreter cuts off where a GPU rounds)."""
    assert out.dtype == x.dtype
    size = truth.abs().max().item() if truth.numel() else 1.0
    if activation is not None:
        gates, rest = truth.chunk(2, dim=1)
        truth = activate(gates, activation) * rest
    eps = torch.finfo(torch.float32 if x.dtype == torch.float32 else x.dtype).eps
    bound = 4 * eps if activation else eps
    slack = 2 * eps * size * size if activation else 0.0
    assert out.shape == truth.shape
    torch.testing.assert_close(out.double(), truth, rtol=bound, atol=1e-4 * size + slack)


def truth_of(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    found = x.double() @ weight.values.T
    return found if bias is None else found + bias.double()


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "in_features"), [(16, 128), (20, 200), (1, 1), (33, 300)])
def test_the_layout_keeps_every_code(rows: int, in_features: int, bits: int) -> None:
    from kernels.triton.quantized_layout import pack_tiles, packed_shape, unpack_tiles

    low = 0 if bits == 4 else -128
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(low, low + (1 << bits), (rows, in_features), generator=generator)
    packed = pack_tiles(codes, bits)
    assert packed.shape == packed_shape(rows, in_features, bits) and packed.dtype == torch.int32
    assert torch.equal(unpack_tiles(packed, bits, rows, in_features), codes.to(torch.int8))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group", "has_zeros"), GRIDS)
def test_few_rows(bits: int, group: int, has_zeros: bool, dtype: torch.dtype) -> None:
    from kernels.triton.quantized_gemv import quantized_gemv

    rows, in_features = 36, 768 if group else 328
    weight = Weight(rows, in_features, bits, group, has_zeros, dtype)
    bias = values(rows, dtype=dtype, seed=3) if has_zeros else None
    for count in (1, 3):
        x = strided(values(count, in_features, dtype=dtype))
        out = quantized_gemv(x, *weight.parts, bias, **weight.facts)
        compare(out, truth_of(x, weight, bias), x)


@needs_kernels
@pytest.mark.parametrize(("block_n", "block_q"), [(4, 8), (16, 32), (8, 128)])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 0)])
def test_few_rows_in_every_cut(bits: int, group: int, block_n: int, block_q: int) -> None:
    from kernels.triton.quantized_gemv import QuantizedGemvTiling, quantized_gemv

    weight = Weight(44, 1280, bits, group, True)
    tiling = QuantizedGemvTiling(block_n, block_q, 2)
    for count in (1, 2, 4):
        x = values(count, 1280)
        first = quantized_gemv(x, *weight.parts, tiling=tiling, **weight.facts)
        compare(first, truth_of(x, weight, None), x)
        again = quantized_gemv(x, *weight.parts, tiling=tiling, **weight.facts)
        assert torch.equal(first, again)


@needs_kernels
@pytest.mark.parametrize("form", ["norm", "offset", "residual", "silu", "gelu_tanh"])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (8, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_row_with_its_neighbours(bits: int, group: int, form: str, dtype: torch.dtype) -> None:
    from kernels.triton.quantized_gemv import quantized_gemv

    weight = Weight(36, 384, bits, group, False, dtype)
    x, seen = values(1, 384, dtype=dtype), values(1, 384, dtype=dtype)
    options: dict[str, Any] = {}
    if form != "residual":
        scale, offset = 1 + values(384, dtype=dtype, seed=5) / 4, 1.0 if form == "offset" else 0.0
        options["norm"] = RowNorm(scale, EPS, offset)
        seen = rms_norm_reference(x, scale, EPS, offset=offset)
    truth = truth_of(seen, weight, None)
    activation = form if form in ("silu", "gelu_tanh") else None
    if form == "residual":
        residual = values(1, 36, dtype=dtype, seed=7)
        truth += residual.double()
        given = residual.clone()
        out = quantized_gemv(x, *weight.parts, residual=given, **weight.facts)
        assert out is given
    else:
        out = quantized_gemv(x, *weight.parts, activation=activation, **options, **weight.facts)
    eps = torch.finfo(dtype).eps
    size = truth.abs().max().item()
    if activation:
        gates, rest = truth.chunk(2, dim=1)
        truth, size = activate(gates, activation) * rest, size * size
    torch.testing.assert_close(out.double(), truth, rtol=4 * eps, atol=2 * eps * size)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group", "has_zeros"), GRIDS)
def test_more_rows(bits: int, group: int, has_zeros: bool, dtype: torch.dtype) -> None:
    from kernels.triton.quantized_gemm import QuantizedGemmTiling, quantized_gemm

    rows, in_features = 36, 768 if group else 328
    weight = Weight(rows, in_features, bits, group, has_zeros, dtype)
    bias = values(rows, dtype=dtype, seed=3) if has_zeros else None
    for count, tiling in (
        (1, QuantizedGemmTiling(16, 16, 256, 2, 2, programs=2)),
        (16, QuantizedGemmTiling(16, 32, 128, 2, 2, programs=1)),
        (70, QuantizedGemmTiling(32, 16, 128, 2, 2)),
    ):
        x = strided(values(count, in_features, dtype=dtype))
        out = quantized_gemm(x, *weight.parts, bias, tiling=tiling, **weight.facts)
        compare(out, truth_of(x, weight, bias), x)


@needs_kernels
@pytest.mark.parametrize(("bits", "group", "has_zeros"), GRIDS)
def test_more_rows_by_scaled_weights(bits: int, group: int, has_zeros: bool) -> None:
    """Weights are rounded to bf16 before they are multiplied (and cut off by the interpreter)."""
    from kernels.triton.quantized_gemm import QuantizedGemmTiling, quantized_gemm

    weight = Weight(36, 768, bits, group, has_zeros)
    tiling = QuantizedGemmTiling(32, 32, 128, 2, 2, scales_weights=True)
    x = values(70, 768)
    out = quantized_gemm(x, *weight.parts, tiling=tiling, **weight.facts)
    truth = truth_of(x, weight, None)
    error = (out.double() - truth).norm() / truth.norm()
    assert float(error) < (1e-2 if is_interpreted() else 4.5e-3), float(error)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group", "has_zeros"), GRIDS)
def test_warps_that_share_out_columns(
    bits: int, group: int, has_zeros: bool, dtype: torch.dtype
) -> None:
    from kernels.triton.quantized_split import QuantizedSplitTiling, quantized_split

    # Small groups may end within a chunk.
    rows, in_features = 36, {0: 328, 32: 736, 64: 704}.get(group, 768)
    weight = Weight(rows, in_features, bits, group, has_zeros, dtype)
    bias = values(rows, dtype=dtype, seed=3) if has_zeros else None
    for count, tiling in (
        (1, QuantizedSplitTiling(16, 4, 2)),
        (16, QuantizedSplitTiling(32, 2, 2)),
        (19, None),
    ):
        x = strided(values(count, in_features, dtype=dtype))
        out = quantized_split(x, *weight.parts, bias, tiling=tiling, **weight.facts)
        compare(out, truth_of(x, weight, bias), x)
        if count == 1:
            again = quantized_split(x, *weight.parts, bias, tiling=tiling, **weight.facts)
            assert torch.equal(out, again)


@needs_kernels
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_warps_that_share_out_columns_gated(activation: str) -> None:
    from kernels.triton.quantized_split import quantized_split

    weight = Weight(128, 512, 4, 128, True)
    x = values(5, 512)
    out = quantized_split(x, *weight.parts, activation=activation, **weight.facts)
    assert out.shape == (5, 64)
    compare(out, truth_of(x, weight, None), x, activation)


@needs_kernels
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("programs", [0, 3])
def test_more_rows_gated(activation: str, programs: int) -> None:
    from kernels.triton.quantized_gemm import QuantizedGemmTiling, quantized_gemm

    weight = Weight(100, 512, 4, 128, True)
    tiling = QuantizedGemmTiling(16, 32, 128, 2, 2, programs=programs)
    x = values(5, 512)
    out = quantized_gemm(x, *weight.parts, activation=activation, tiling=tiling, **weight.facts)
    assert out.shape == (5, 50)
    compare(out, truth_of(x, weight, None), x, activation)


@needs_kernels
@pytest.mark.parametrize(("bits", "group", "has_zeros"), GRIDS)
def test_rows_written_out(bits: int, group: int, has_zeros: bool) -> None:
    from kernels.triton.dequantize import dequantize_rows_

    in_features = 768 if group else 328
    weight = Weight(36, in_features, bits, group, has_zeros)
    out = torch.empty(20, in_features, dtype=torch.bfloat16, device=DEVICE)
    dequantize_rows_(out, *weight.parts, first_row=16, **weight.facts)
    truth = weight.values[16:]
    torch.testing.assert_close(out.double(), truth, rtol=2**-7, atol=0.0)


@needs_kernels
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_weight_written_out_in_pieces(has_bias: bool) -> None:
    from kernels.triton.quantized_product import multiply_written_out

    weight = Weight(600, 256, 4, 128, True)
    bias = values(600, seed=3) if has_bias else None
    x = strided(values(9, 256))
    for piece_bytes in (1, 1 << 24):  # three pieces of 256 rows at most, and one
        out = multiply_written_out(x, *weight.parts, bias, piece_bytes=piece_bytes, **weight.facts)
        truth = truth_of(x, weight, bias)
        error = (out.double() - truth).norm() / truth.norm()
        assert float(error) < 1e-2, float(error)


@needs_kernels
def test_no_rows() -> None:
    from kernels.triton.quantized_gemm import quantized_gemm
    from kernels.triton.quantized_gemv import quantized_gemv
    from kernels.triton.quantized_split import quantized_split

    weight = Weight(36, 256, 4, 128, False)
    for product in (quantized_gemv, quantized_split, quantized_gemm):
        assert product(values(0, 256), *weight.parts, **weight.facts).shape == (0, 36)


@needs_kernels
def test_what_they_cannot_take_is_told() -> None:
    from kernels.triton.quantized_gemm import quantized_gemm
    from kernels.triton.quantized_gemv import quantized_gemv

    weight = Weight(36, 256, 4, 128, False)
    with pytest.raises(ValueError, match="5 rows: this kernel takes up to 4"):
        quantized_gemv(values(5, 256), *weight.parts, **weight.facts)
    with pytest.raises(ValueError, match="norms and residuals are of one"):
        norm = RowNorm(values(256), EPS)
        quantized_gemv(values(2, 256), *weight.parts, norm=norm, **weight.facts)
    for product in (quantized_gemv, quantized_gemm):
        with pytest.raises(ValueError, match="must be one of silu, gelu_tanh"):
            product(values(1, 256), *weight.parts, activation="relu", **weight.facts)
        words, scales, _ = weight.parts
        with pytest.raises(ValueError, match="groups must be of 32, 64, a multiple of 128"):
            product(values(1, 256), words, scales.repeat(8, 1), **weight.facts)
