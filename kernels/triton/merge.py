# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Merging attention over disjoint sets of keys. Semantics: :mod:`kernels.shared_prefix`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import Launcher, planned
from kernels.triton.tiles import LN_2, LOG2_E, merge_pair

_ROWS = 4  # a program


@triton.jit(do_not_specialize=["num_rows", "num_states"])
def merge_states_kernel(
    out,
    lse,
    out_a,
    lse_a,
    outs,
    lses,
    num_rows,
    num_states,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merge a first state ``[rows, D]`` and ``num_states`` more ``[S, rows, D]``, row by row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    dims = tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    at = row.to(tl.int64)
    offsets = at[:, None] * HEAD_DIM + dims[None, :]
    values = tl.load(out_a + offsets, mask=mask, other=0.0).to(tl.float32)
    values_lse = tl.load(lse_a + at, mask=is_row, other=float("-inf")) * LOG2_E
    for _state in range(0, num_states):
        other = tl.load(outs + offsets, mask=mask, other=0.0).to(tl.float32)
        other_lse = tl.load(lses + at, mask=is_row, other=float("-inf")) * LOG2_E
        values, values_lse = merge_pair(values, values_lse, other, other_lse)
        at += num_rows
        offsets += num_rows * HEAD_DIM
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets = row.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + row, values_lse * LN_2, mask=is_row)


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`kernels.merge_states`."""
    others = (out_b.contiguous().unsqueeze(0), lse_b.contiguous().unsqueeze(0))
    return _merge(out_a.contiguous(), lse_a.contiguous(), *others, out_a.dtype)


def merge_stacked(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Merge ``outs [S, T, Hq, D]`` and ``lses [S, T, Hq]``, contiguous, into one in ``dtype``."""
    return _merge(outs[0], lses[0], outs[1:], lses[1:], dtype)


def _merge(
    out_a: Tensor, lse_a: Tensor, outs: Tensor, lses: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(out_a, dtype=dtype), torch.empty_like(lse_a)
    if lse.numel():
        _states((out, lse, out_a, lse_a, outs, lses))
    return out, lse


@planned
def _states(
    out: Tensor, lse: Tensor, _out_a: Tensor, _lse_a: Tensor, outs: Tensor, _lses: Tensor
) -> Launcher:
    head_dim, num_rows = out.shape[-1], lse.numel()
    return Launcher(
        merge_states_kernel,
        (triton.cdiv(num_rows, _ROWS),),
        num_rows,
        len(outs),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        ROWS=_ROWS,
        num_warps=2,
    )


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that cover the forms of the kernel, for building it ahead of time."""

    def call(dtype: torch.dtype, head_dim: int) -> Callable[[], object]:
        out, lse = torch.empty(8, 4, head_dim, dtype=dtype), torch.empty(8, 4)
        return lambda: merge_states(out, lse, out, lse)

    return {"bf16": call(torch.bfloat16, 128), "fp32, head size 80": call(torch.float32, 80)}
