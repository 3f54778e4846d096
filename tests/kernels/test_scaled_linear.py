"""Products of 8-bit weights and activations: the formats, on any device."""

from __future__ import annotations

import pytest
import torch

from kernels.norm import RowNorm, add_rms_norm_reference_, rms_norm_reference
from kernels.scaled_linear import (
    FORMATS,
    LIMITS,
    QuantizedRows,
    apply_scaled_linear,
    choose_implementation,
    code_dtype_of,
    cublas_limit,
    pack_scaled_linear,
    quantize_input,
    quantize_rows_reference,
    quantize_weight,
    unsupported_reason,
)

CPU = torch.device("cpu")
#: Relative error of a product of normal numbers, of both roundings.
ERRORS = {"fp8": 0.045, "fp8_tensor": 0.045, "fp8_block": 0.045, "int8": 0.015}


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("out_features", "in_features"), [(300, 576), (64, 128), (5, 40)])
def test_a_product_is_near_and_is_that_of_its_codes(
    format: str, out_features: int, in_features: int
) -> None:
    weight, bias = values(out_features, in_features), values(out_features)
    codes, scales = quantize_weight(weight, format)
    assert codes.dtype == code_dtype_of(format) and codes.shape == weight.shape
    layer = pack_scaled_linear(codes, scales, bias, format=format)
    x = values(7, in_features, seed=1)
    rows = quantize_input(layer, x)
    assert len(rows) == 7
    exact = rows.dequantize().double() @ layer.dequantize().double().T + bias.double()
    truth = x.double() @ weight.double().T + bias.double()
    for given in (x, rows):
        out = apply_scaled_linear(layer, given)
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
        assert float((out - truth).norm() / truth.norm()) < ERRORS[format]
    reference = apply_scaled_linear(layer, x, "reference")
    torch.testing.assert_close(reference.double(), exact, rtol=1e-4, atol=1e-4)
    assert layer.num_bytes >= weight.numel() + 4 * out_features


def test_scales_are_what_the_format_says() -> None:
    weight = values(260, 300)
    weight[0] = 0.0
    for format, shape in (("fp8", (260,)), ("fp8_tensor", (1,)), ("int8", (260,))):
        codes, scales = quantize_weight(weight, format)
        limit = LIMITS[code_dtype_of(format)]
        assert scales.shape == shape and bool((scales > 0).all())
        assert float(codes.float().abs().max()) == limit
        by_row = weight.abs().amax(1) if len(shape) and shape[0] > 1 else weight.abs().max()
        torch.testing.assert_close(scales[1:], (by_row / limit).reshape(-1)[1:])
        assert bool((codes[0].float() == 0).all())
    codes, scales = quantize_weight(weight, "fp8_block")
    assert scales.shape == (3, 3)
    torch.testing.assert_close(scales[1, 2], weight[128:256, 256:].abs().max() / 448)
    torch.testing.assert_close(scales[2, 0], weight[256:, :128].abs().max() / 448)
    groups = quantize_rows_reference(weight, torch.float8_e4m3fn, 128)[1]
    assert groups.shape == (260, 3)
    torch.testing.assert_close(groups[5, 2], weight[5, 256:].abs().max() / 448)


def test_a_static_scale_is_for_all_rows() -> None:
    layer = pack_scaled_linear(
        *quantize_weight(values(32, 64), "fp8_tensor"),
        format="fp8_tensor",
        input_scale=torch.tensor(0.01),
    )
    assert layer.input_scale is not None and layer.whole_scale is not None
    rows = quantize_input(layer, 100 * values(3, 64))
    assert rows.scales.shape == (3, 1) and bool((rows.scales == 0.01).all())
    assert float(rows.codes.float().abs().max()) == 448, "what is too large is cut off"


@pytest.mark.parametrize("format", FORMATS)
def test_norms_and_gates_before_it_are_those_of_the_ops(format: str) -> None:
    layer = pack_scaled_linear(*quantize_weight(values(16, 256), format), format=format)
    x, residual = values(4, 256), values(4, 256, seed=3)
    norm = RowNorm(1 + values(256, seed=4) / 4, 1e-5, 1.0)
    parts = (layer.codes.dtype, layer.group_size)

    def check(found: QuantizedRows, plain: torch.Tensor) -> None:
        codes, scales = quantize_rows_reference(plain, *parts)
        torch.testing.assert_close(found.scales, scales)
        assert (found.codes.float() != codes.float()).float().mean() < 0.01

    check(
        quantize_input(layer, x, norm=norm),
        rms_norm_reference(x, norm.weight, norm.eps, offset=1.0),
    )
    expected = residual.clone()
    plain = add_rms_norm_reference_(x, expected, norm.weight, norm.eps, offset=1.0)
    check(quantize_input(layer, x, norm=norm, residual=residual), plain)
    torch.testing.assert_close(residual, expected)
    gate_up = values(4, 512)
    gated = torch.nn.functional.silu(gate_up[:, :256]) * gate_up[:, 256:]
    check(quantize_input(layer, gate_up, activation="silu"), gated)


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_with_nan_gives_nan_and_no_rows_give_none(format: str) -> None:
    layer = pack_scaled_linear(*quantize_weight(values(16, 256), format), format=format)
    x = values(3, 256)
    x[1, 200] = float("nan")
    out = apply_scaled_linear(layer, x)
    assert bool(out[1].isnan().all()) and bool(out[::2].isfinite().all())
    assert apply_scaled_linear(layer, x[:0]).shape == (0, 16)
    assert apply_scaled_linear(layer, x[:, :].bfloat16()).dtype == torch.bfloat16


def test_which_product_serves() -> None:
    layers = {
        f: pack_scaled_linear(*quantize_weight(values(32, 256), f), format=f) for f in FORMATS
    }
    assert choose_implementation(layers["int8"], 5, torch.float32) == "int_mm"
    assert choose_implementation(layers["fp8"], 5, torch.float32) == "reference"
    assert cublas_limit(layers["fp8"], 5, torch.bfloat16) is None
    assert "int8" in str(cublas_limit(layers["int8"], 5, torch.bfloat16))
    assert "bf16" in str(cublas_limit(layers["fp8"], 5, torch.float16))
    assert "rows that 4 divides" in str(cublas_limit(layers["fp8_block"], 5, torch.bfloat16))
    odd = pack_scaled_linear(*quantize_weight(values(30, 256), "fp8"), format="fp8")
    assert "16 divides" in str(cublas_limit(odd, 5, torch.bfloat16))
    with pytest.raises(ValueError, match=r"unknown implementation 'cutlass'. Valid: skinny"):
        apply_scaled_linear(layers["fp8"], values(1, 256), "cutlass")


def test_what_does_not_fit_is_told() -> None:
    codes, scales = quantize_weight(values(130, 200), "fp8")
    with pytest.raises(ValueError, match=r"unknown format 'fp4'. Valid: fp8, fp8_tensor"):
        quantize_weight(codes.float(), "fp4")
    with pytest.raises(ValueError, match=r"codes of int8 have dtype torch.int8, not"):
        pack_scaled_linear(codes, scales, format="int8")
    with pytest.raises(ValueError, match="7 scales for 130 outputs"):
        pack_scaled_linear(codes, scales[:7], format="fp8")
    with pytest.raises(ValueError, match=r"scales of blocks have shape \(2, 2\), not \(130,\)"):
        pack_scaled_linear(codes, scales, format="fp8_block")
    with pytest.raises(ValueError, match="activations of fp8 have their own scales"):
        pack_scaled_linear(codes, scales, format="fp8", input_scale=torch.ones(1))


def test_cards_without_fp8_are_told_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    card = torch.device("cuda")
    reason = unsupported_reason("fp8", card)
    assert reason is not None
    assert "needs compute capability 8.9" in reason and "has 8.0: format int8 works" in reason
    assert unsupported_reason("fp8", CPU) is None
    assert "not mps" in str(unsupported_reason("int8", torch.device("mps")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    reason = unsupported_reason("int8", card)
    assert reason is not None and "needs compute capability 8.0" in reason
    assert "works" not in reason
