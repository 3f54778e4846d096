# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Asking the L2 cache for rows of a weight ahead of their use."""

from __future__ import annotations

import triton
import triton.language as tl

PIECE = tl.constexpr(128)  # columns that one prefetch asks for


@triton.jit
def prefetch(place, COUNT: tl.constexpr = PIECE):
    """Ask the L2 cache for ``COUNT`` values at each place, 16-byte aligned.

    It is a hint that waits for nothing, and takes nothing from what the L2 cache knows to be new.
    """
    SIZE: tl.constexpr = COUNT * place.dtype.element_ty.primitive_bitwidth // 8
    tl.inline_asm_elementwise(
        "mov.u32 $0, 0; cp.async.bulk.prefetch.L2.global [$1], $2;",
        "=r,l,r",
        [place.to(tl.int64), tl.full(place.shape, SIZE, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
