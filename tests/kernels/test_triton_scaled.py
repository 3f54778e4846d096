"""Products in 8 bits, and the quantisation of their activations, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.norm import RowNorm
from kernels.scaled_linear import (
    FORMATS,
    LIMITS,
    QuantizedRows,
    apply_scaled_linear,
    pack_scaled_linear,
    quantize_rows_reference,
    quantize_weight,
)
from tests.helpers.interpreted import (
    DEVICE,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODES = [torch.float8_e4m3fn, torch.int8]
NAN = float("nan")
EPS = 1e-5


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN, or the greatest byte, until it is written."""
    empty = torch.empty

    def fill(*shape: Any, **options: Any) -> Tensor:
        out = empty(*shape, **options)
        return out.fill_(NAN if out.is_floating_point() else 127)

    monkeypatch.setattr(torch, "empty", fill)


def values(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def strided(x: Tensor) -> Tensor:
    """``x`` inside a wider tensor of NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + 24), NAN, dtype=x.dtype, device=x.device)
    view = wide[:, 8 : 8 + x.shape[1]]
    return view.copy_(x)


def check_rows(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert found[0].dtype == expected[0].dtype
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[0].float().nan_to_num(7.5), expected[0].float().nan_to_num(7.5))


@needs_kernels
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 4096), (5, 576), (3, 100), (2, 17000), (4, 1)])
def test_rows_get_the_bits_of_the_reference(
    num_rows: int, width: int, dtype: torch.dtype, code: torch.dtype, group_size: int
) -> None:
    from kernels.triton.quantize_rows import quantize_rows

    x = values(num_rows, width, dtype=dtype)
    x[0] *= 1e-3
    x[-1, 0] = 0.0
    given = strided(x)
    expected = quantize_rows_reference(x, code, group_size)
    found = quantize_rows(given, code, group_size=group_size)
    check_rows(found, expected)
    assert torch.equal(given, x)
    back = QuantizedRows(*found, dtype).dequantize()
    step = x.float().abs().amax(1, keepdim=True) / (14 if code == CODES[0] else 127)
    assert bool(((back - x.float()).abs() <= step / 1.9).all())


@needs_kernels
@pytest.mark.parametrize("code", CODES)
def test_rows_of_zeros_and_of_no_finite_numbers(code: torch.dtype) -> None:
    from kernels.triton.quantize_rows import quantize_rows

    x = values(5, 256, dtype=torch.float32)
    x[0] = 0.0
    x[1, 3] = NAN
    x[2, 200] = float("inf")
    x[3] *= 1e-20
    for group_size in (0, 128):
        found = QuantizedRows(*quantize_rows(x, code, group_size=group_size), x.dtype).dequantize()
        assert bool((found[0] == 0).all())
        assert bool(found[1, :128].isnan().any())
        assert not bool(found[2, 128:].isfinite().all())
        assert bool((found[3].abs() < 1e-12).all())
        assert bool(found[4].isfinite().all())
        if group_size:
            assert bool(found[1, 128:].isfinite().all())


@needs_kernels
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("adds", [False, True])
def test_a_norm_before_gives_the_bits_of_the_two(
    adds: bool, offset: float, dtype: torch.dtype, group_size: int, code: torch.dtype
) -> None:
    from kernels.triton.norm import add_rms_norm_, rms_norm
    from kernels.triton.quantize_rows import quantize_rows

    x, residual = strided(values(3, 576, dtype=dtype)), strided(values(3, 576, dtype=dtype, seed=4))
    weight = 1 + values(576, dtype=dtype, seed=5) / 4
    norm = RowNorm(weight, EPS, offset)
    kept, given = residual.clone(), strided(residual.clone())
    if adds:
        normed = add_rms_norm_(x, kept, weight, EPS, offset=offset)
    else:
        normed = rms_norm(x, weight, EPS, offset=offset)
    found = quantize_rows(
        x, code, group_size=group_size, norm=norm, residual=given if adds else None
    )
    assert torch.equal(given, kept)
    # Sums of squares may be taken in another order: a step of a code, of few codes.
    codes, scales = quantize_rows(normed, code, group_size=group_size)
    torch.testing.assert_close(found[1], scales, rtol=1e-2 if dtype != torch.float32 else 1e-5,
                               atol=0)  # fmt: skip
    differ = (found[0].float() != codes.float()).float().mean()
    assert differ <= 0.02


@needs_kernels
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [96, 17000])
def test_a_gate_before_gives_the_bits_of_the_two(
    width: int, activation: str, code: torch.dtype
) -> None:
    from kernels.triton import activation as alone
    from kernels.triton.quantize_rows import quantize_rows

    x = strided(values(2, 2 * width))
    gated = getattr(alone, f"{activation}_and_mul")(x)
    for group_size in (0, 128):
        expected = quantize_rows(gated, code, group_size=group_size)
        found = quantize_rows(x, code, group_size=group_size, activation=activation)
        check_rows(found, expected)


@needs_kernels
def test_a_static_scale_cuts_off_what_it_does_not_hold() -> None:
    from kernels.triton.quantize_rows import quantize_rows

    scale = torch.tensor([0.004], device=DEVICE)
    for width in (200, 17000):
        x = values(4, width)
        codes, scales = quantize_rows(x, torch.float8_e4m3fn, static_scale=scale)
        check_rows(
            (codes, scales), quantize_rows_reference(x, torch.float8_e4m3fn, static_scale=scale)
        )
        assert float(codes.float().abs().max()) == LIMITS[torch.float8_e4m3fn]
        assert scales.shape == (4, 1) and scales.stride(0) == 0


@needs_kernels
def test_no_rows_and_what_cannot_be_taken() -> None:
    from kernels.triton.quantize_rows import quantize_rows

    x = values(2, 256)
    assert quantize_rows(x[:0], torch.int8)[0].shape == (0, 256)
    with pytest.raises(ValueError, match="must be one of silu, gelu_tanh, without a norm"):
        quantize_rows(x, torch.int8, activation="relu")
    with pytest.raises(ValueError, match="group_size=64 must be 0, or 128"):
        quantize_rows(x, torch.int8, group_size=64)
    wide = values(1, 20000)
    with pytest.raises(ValueError, match="takes up to 16384"):
        quantize_rows(wide, torch.int8, norm=RowNorm(wide[0], EPS))


# -- products ---------------------------------------------------------------------------------


def check_product(
    format: str,
    num_rows: int,
    out_features: int,
    in_features: int,
    implementation: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    has_bias: bool = False,
    tiling: Any = None,
    is_static: bool = False,
) -> Tensor:
    weight = values(out_features, in_features, dtype=dtype, seed=1) / in_features**0.5
    bias = values(out_features, dtype=dtype, seed=2) if has_bias else None
    x = strided(values(num_rows, in_features, dtype=dtype))
    layer = pack_scaled_linear(
        *quantize_weight(weight, format),
        bias,
        format=format,
        input_scale=torch.tensor([0.007], device=DEVICE) if is_static else None,
    )
    rows = quantize_rows_reference(x, layer.codes.dtype, layer.group_size, layer.input_scale)
    truth = apply_scaled_linear(layer, QuantizedRows(*rows, torch.float32), "reference")
    if tiling is None:
        out = apply_scaled_linear(layer, x, implementation)
    else:
        from kernels.triton.scaled_gemm import scaled_gemm
        from kernels.triton.scaled_skinny import scaled_skinny_linear

        op: Any = scaled_skinny_linear if implementation == "skinny" else scaled_gemm
        parts = (*rows, layer.codes, layer.scales, bias)
        out = op(*parts, out_dtype=dtype, tiling=tiling)
    assert out.dtype == dtype and out.shape == truth.shape
    eps = torch.finfo(dtype).eps
    size = float(truth.abs().max()) if truth.numel() else 0.0
    torch.testing.assert_close(out.float(), truth, rtol=eps, atol=1e-5 * size + 1e-7)
    return out


@needs_kernels
@pytest.mark.parametrize("implementation", ["skinny", "triton"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("num_rows", "out_features", "in_features"),
    [(1, 100, 96), (17, 200, 384), (5, 300, 576), (1, 64, 1024), (3, 1, 128), (64, 136, 40)],
)
def test_products_equal_the_reference(
    num_rows: int, out_features: int, in_features: int, format: str, implementation: str
) -> None:
    check_product(format, num_rows, out_features, in_features, implementation, has_bias=True)


@needs_kernels
@pytest.mark.parametrize("implementation", ["skinny", "triton"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_of_other_dtypes(dtype: torch.dtype, format: str, implementation: str) -> None:
    is_static = format == "fp8_tensor"
    check_product(format, 6, 80, 256, implementation, dtype, is_static=is_static)


@needs_kernels
@pytest.mark.parametrize("format", ["fp8", "int8", "fp8_block"])
@pytest.mark.parametrize("programs", [0, 1, 3])
@pytest.mark.parametrize("block_n", [16, 64])
def test_every_cut_of_few_rows_gives_the_same(block_n: int, programs: int, format: str) -> None:
    from kernels.triton.scaled_skinny import ScaledTiling

    tiling = ScaledTiling(block_n, 128, num_stages=2, programs=programs)
    outs = [
        check_product(format, 3, 200, 1100, "skinny", has_bias=True, tiling=tiling)
        for _ in range(2)  # counters are left at 0
    ]
    assert torch.equal(*outs)


@needs_kernels
@pytest.mark.parametrize("format", ["fp8", "int8", "fp8_block"])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 128), (128, 32)])
def test_every_cut_of_many_rows_gives_the_same(block_m: int, block_n: int, format: str) -> None:
    from kernels.triton.scaled_gemm import GemmTiling

    tiling = GemmTiling(block_m, block_n, 128, num_warps=4, num_stages=2)
    check_product(format, 70, 300, 200, "triton", has_bias=True, tiling=tiling)


@needs_kernels
def test_a_row_with_nan_is_nan_and_others_are_not() -> None:
    for format in FORMATS:
        x = values(3, 256)
        x[1, 7] = NAN
        layer = pack_scaled_linear(*quantize_weight(values(32, 256, seed=1), format), format=format)
        for implementation in ("skinny", "triton", "reference"):
            out = apply_scaled_linear(layer, x, implementation)
            assert bool(out[1].isnan().all()), (format, implementation)
            assert bool(out[::2].isfinite().all())


@needs_kernels
def test_no_rows_no_outputs_and_too_many_rows() -> None:
    from kernels.triton.scaled_gemm import GemmTiling, scaled_gemm
    from kernels.triton.scaled_skinny import ScaledTiling, scaled_skinny_linear

    layer = pack_scaled_linear(*quantize_weight(values(32, 256), "fp8_block"), format="fp8_block")
    for implementation in ("skinny", "triton", "reference"):
        assert apply_scaled_linear(layer, values(0, 256), implementation).shape == (0, 32)
    with pytest.raises(ValueError, match="129 rows: this kernel takes up to 128"):
        apply_scaled_linear(layer, values(129, 256), "skinny")
    rows = quantize_rows_reference(values(2, 256), torch.float8_e4m3fn, 128)
    parts = (*rows, layer.codes, layer.scales)
    with pytest.raises(ValueError, match="need block_k=128"):
        scaled_skinny_linear(*parts, out_dtype=torch.float32, tiling=ScaledTiling(64, 256))
    with pytest.raises(ValueError, match="do not fit tiles"):
        scaled_gemm(*parts, out_dtype=torch.float32, tiling=GemmTiling(64, 256))
