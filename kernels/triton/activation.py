# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Gated activations on the fused gate-and-up projection, in Triton.

Semantics: :mod:`kernels.activation`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton import has_dependent_launch, num_multiprocessors
from kernels.triton.launch import Launcher, dependent_options, planned

#: Names of the gates.
ACTIVATIONS = ("silu", "gelu_tanh")
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)
#: Columns a program: 8 values a thread, in one warp where rows are few, else in four.
_FEW, _MANY = 256, 1024


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See :func:`kernels.activation.silu_and_mul`."""
    return _gated(gate_up, is_gelu=False)


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """See :func:`kernels.activation.gelu_tanh_and_mul`."""
    return _gated(gate_up, is_gelu=True)


def _gated(gate_up: Tensor, is_gelu: bool) -> Tensor:
    num_rows, width = gate_up.shape
    out = torch.empty(num_rows, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        _activation((out, gate_up), is_gelu)
    return out


@planned
def _activation(out: Tensor, gate_up: Tensor, is_gelu: bool) -> Launcher:
    assert gate_up.shape[1] % 2 == 0 and gate_up.stride(1) == 1
    num_rows, inner = out.shape
    is_few = num_rows * triton.cdiv(inner, _MANY) < 4 * num_multiprocessors(gate_up.device)
    block = _FEW if is_few else _MANY
    is_dependent = has_dependent_launch(gate_up.device)
    return Launcher(
        gated_kernel,
        (num_rows * triton.cdiv(inner, block),),
        gate_up.stride(0),
        inner,
        IS_GELU=is_gelu,
        BLOCK=block,
        IS_DEPENDENT=is_dependent,
        num_warps=block // 256,
        **dependent_options(is_dependent),
    )


@triton.jit
def gated_kernel(
    out,
    gate_up,
    stride,
    inner,
    IS_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (rows * inner / BLOCK), the columns of a row after one another."""
    if IS_DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    num_blocks = tl.cdiv(inner, BLOCK)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    column = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < inner
    dtype: tl.constexpr = out.dtype.element_ty
    source = gate_up + row * stride
    gates = tl.load(source + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + inner + column, mask=mask, other=0.0).to(tl.float32)
    value = gate(gates, IS_GELU).to(dtype).to(tl.float32)
    tl.store(out + row * inner + column, (value * up).to(dtype), mask=mask)


@triton.jit
def gate(x, IS_GELU: tl.constexpr):
    """SiLU, or GELU in its tanh form, of fp32 numbers."""
    if IS_GELU:
        # x (1 + tanh u) / 2 is x sigmoid(2 u), without the difference of nearly equal numbers.
        power = _TWO_SQRT_2_OVER_PI * (x + _CUBIC * x * x * x)
    else:
        power = x
    return x / (1.0 + tl.exp(-power))


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        op: Callable[[Tensor], Tensor], dtype: torch.dtype, *shape: int
    ) -> Callable[[], object]:
        x = torch.empty(shape, dtype=dtype, device="meta")
        return lambda: op(x)

    return {
        "silu, bf16, 8192 x 14336": call(silu_and_mul, torch.bfloat16, 8192, 2 * 14336),
        "silu, bf16, 1 x 3072": call(silu_and_mul, torch.bfloat16, 1, 2 * 3072),
        "gelu, fp16, 32 x 10240": call(gelu_tanh_and_mul, torch.float16, 32, 2 * 10240),
        "silu, fp32, 32 x 1536": call(silu_and_mul, torch.float32, 32, 2 * 1536),
    }
