"""Products with weights of 4 and 8 bits, against those with the values that the codes stand for."""

from __future__ import annotations

import pytest
import torch

from kernels.quantized_linear import (
    apply_quantized_linear,
    dequantized_weight,
    native_limit,
    pack_quantized_linear,
)

CPU = torch.device("cpu")
#: Bits, inputs of a group (0: all), zero points.
NATIVE = [(8, 0, False), (4, 32, False), (4, 64, True)]
REFERENCE = [(8, 32, False), (8, 0, True), (4, 16, True), (4, 0, False)]


def parts(
    bits: int, group: int, has_zeros: bool, shape: tuple[int, int] = (48, 128)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Codes over their whole range, scales, zero points, and the values in fp64."""
    generator = torch.Generator().manual_seed(bits + group)
    low = 0 if has_zeros else -(1 << (bits - 1))
    codes = torch.randint(low, low + (1 << bits), shape, generator=generator).to(torch.int16)
    num_groups = shape[1] // group if group else 1
    scales = torch.rand(shape[0], num_groups, generator=generator) + 0.5
    # What the kernels multiply with is bf16; these are exact in it.
    scales = scales.bfloat16().float()
    zeros = None
    if has_zeros:
        zeros = torch.randint(0, 1 << bits, (shape[0], num_groups), generator=generator)
        zeros = zeros.to(torch.int16)
    wide = codes.double().view(shape[0], num_groups, -1)
    if zeros is not None:
        wide = wide - zeros.double().unsqueeze(2)
    return codes, scales, zeros, (wide * scales.double().unsqueeze(2)).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("bits", "group", "has_zeros"), NATIVE + REFERENCE)
def test_products(
    bits: int, group: int, has_zeros: bool, has_bias: bool, dtype: torch.dtype
) -> None:
    codes, scales, zeros, values = parts(bits, group, has_zeros)
    bias = torch.randn(48, generator=torch.Generator().manual_seed(9)).to(dtype)
    layer = pack_quantized_linear(
        codes, scales, zeros, bias if has_bias else None, bits=bits, dtype=dtype
    )
    assert layer.implementation == ("native" if (bits, group, has_zeros) in NATIVE else "reference")
    for rows in (1, 3, 12, 13, 64):
        x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)).bfloat16()
        wanted = x.double() @ values.T + (bias.double() if has_bias else 0)
        found = apply_quantized_linear(layer, x.to(dtype))
        assert found.dtype == dtype and found.shape == (rows, 48)
        # Zero points become shifts, rounded to bf16 as the outputs are.
        error = (found.double() - wanted).norm() / wanted.norm()
        assert float(error) < 0.008, (rows, float(error))
    weight = dequantized_weight(layer, torch.float32).double()
    torch.testing.assert_close(weight, values, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(("bits", "group", "has_zeros"), NATIVE + REFERENCE)
def test_bytes_are_those_of_the_arithmetic(bits: int, group: int, has_zeros: bool) -> None:
    codes, scales, zeros, _ = parts(bits, group, has_zeros)
    layer = pack_quantized_linear(codes, scales, zeros, None, bits=bits, dtype=torch.bfloat16)
    is_native = layer.implementation == "native"
    grid = scales.numel() * ((2 if bits == 8 else 4) if is_native else 4)
    if zeros is not None and not is_native:
        grid += zeros.numel()
    assert layer.num_bytes == codes.numel() * bits // 8 + grid


def test_what_native_kernels_leave_out_is_said() -> None:
    assert native_limit(8, 0, False, 48, CPU) is None
    for arguments, words in (
        ((8, 64, False, 48, CPU), "one scale an output"),
        ((8, 0, True, 48, CPU), "zero points"),
        ((4, 16, False, 48, CPU), "groups of 32, 64, 128, 256"),
        ((4, 32, False, 40, CPU), "16 divides, not 40"),
        ((8, 0, False, 48, torch.device("cuda:0")), "for CPUs"),
    ):
        assert words in str(native_limit(*arguments))
    with pytest.raises(ValueError, match="4 or 8 bits, not 5"):
        pack_quantized_linear(torch.zeros(2, 4), torch.ones(2, 1), bits=5, dtype=torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        pack_quantized_linear(torch.zeros(2, 4), torch.ones(2, 3), bits=8, dtype=torch.float32)
