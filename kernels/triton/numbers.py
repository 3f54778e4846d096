# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""8-bit numbers inside Triton kernels: what a cache holds, to and from floating point.

fp8 (e4m3) is taken apart with integer arithmetic, so that the kernels run on devices without fp8
conversions (compute capability below 8.9) and in Triton's interpreter, with the same result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import is_interpreted

_TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}
# 1.5 * 2 ** 23: added and taken away again, it rounds to an integer, ties to even.
_ROUND_FP32 = tl.constexpr(12582912.0)


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """In what matrix products of ``dtype`` run: in itself, but the interpreter has none in bf16."""
    if dtype == torch.bfloat16 and is_interpreted():
        return tl.float32
    return _TRITON_DTYPES[dtype]


def as_bits(cache: Tensor) -> Tensor:
    """An fp8 cache as bytes: kernels decode them themselves, on devices without fp8 as well."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def kind_of(cache: Tensor) -> str:
    """What a cache holds, the ``KIND`` of the kernels: ``int8``, ``fp8`` or ``plain``."""
    return {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(cache.dtype, "plain")


def scale_strides(scale: Tensor | None) -> tuple[int, ...]:
    """Strides by block, token and head; of fixed scales only the last is one."""
    if scale is None:
        return 0, 0, 0
    return scale.stride() if scale.dim() == 3 else (0, 0, scale.stride(0))


@triton.jit
def decode_kv(x, KIND: tl.constexpr, dtype: tl.constexpr):
    """Cache elements in ``dtype``, without their scale. Every 8-bit value is exact in fp16 or bf16.

    ``KIND``: ``plain`` (nothing to do), ``int8``, or ``fp8`` (bytes of e4m3).
    """
    if KIND == "int8":
        return x.to(dtype)
    if KIND == "fp8":
        # The bits are those of an fp16 number 2 ** 8 times too small, subnormals included.
        bits = x.to(tl.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return (bits.to(tl.float16, bitcast=True) * 256.0).to(dtype)
    return x.to(dtype)


@triton.jit
def encode_fp8(x):
    """fp32 within +-448 to the bytes of the nearest e4m3 value, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    # Normal numbers: round the mantissa to 3 bits, a carry moves into the exponent; then re-bias.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2 ** -6 steps are 2 ** -9 wide: adding 2 ** 14, whose last bit is that, rounds to them.
    steps = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) & 0xFF
    magnitude = tl.where(size < ((127 - 6) << 23), steps, normal)
    return (sign | magnitude).to(tl.uint8)


@triton.jit
def encode_int8(x):
    """fp32 within +-127 to the nearest integer, ties to even."""
    return ((x + _ROUND_FP32) - _ROUND_FP32).to(tl.int8)
