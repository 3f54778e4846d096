# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Greedy choice of a token, in Triton: rows are cut into pieces where they are few.

A piece ends as one integer, the order of its greatest value above the index counted down, so that
the greatest integer is the answer, ties and NaN included. A second small launch joins the pieces of
a row. Launches depend on shapes alone: they can be captured. Semantics: :mod:`kernels.sampling`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from kernels.triton import has_dependent_launch, num_multiprocessors
from kernels.triton.launch import Launcher, dependent_options, planned

_BLOCK = 2048  # values a program looks at together
_MAX_PIECES = 128
_PROGRAMS = 8  # a multiprocessor: as many as run on it at a time
_LAST = tl.constexpr(0x7FFFFFFF)


def argmax(logits: Tensor) -> Tensor:
    """See :func:`kernels.sampling.argmax`."""
    num_rows, vocab = logits.shape
    if vocab == 0:
        raise ValueError("argmax of rows without a value")
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        share, num_pieces = _cut(num_rows, vocab, logits.device)
        keys = out if num_pieces == 1 else out.new_empty(num_rows, num_pieces)
        _argmax((keys, logits), share, num_pieces)
        if num_pieces > 1:
            _join((out, keys), num_pieces)
    return out


@functools.lru_cache
def _cut(num_rows: int, vocab: int, device: torch.device) -> tuple[int, int]:
    """Blocks that a program takes of a row, and programs that a row takes."""
    wanted = triton.cdiv(_PROGRAMS * num_multiprocessors(device), num_rows)
    num_blocks = triton.cdiv(vocab, _BLOCK)
    share = triton.cdiv(num_blocks, min(wanted, _MAX_PIECES, num_blocks))
    return share, triton.cdiv(num_blocks, share)  # no piece is without a value


@planned
def _argmax(_keys: Tensor, logits: Tensor, share: int, num_pieces: int) -> Launcher:
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1 or vocab == 1
    is_dependent = has_dependent_launch(logits.device)
    return Launcher(
        argmax_kernel,
        (num_rows, num_pieces),
        logits.stride(0),
        vocab,
        share,
        num_pieces,
        IS_WHOLE=num_pieces == 1,
        BLOCK=_BLOCK,
        IS_DEPENDENT=is_dependent,
        num_warps=8,
        **dependent_options(is_dependent),
    )


@planned
def _join(out: Tensor, _keys: Tensor, num_pieces: int) -> Launcher:
    is_dependent = has_dependent_launch(out.device)
    return Launcher(
        join_argmax_kernel,
        (len(out),),
        num_pieces,
        BLOCK=_MAX_PIECES,
        IS_DEPENDENT=is_dependent,
        num_warps=1,
        **dependent_options(is_dependent),
    )


@triton.jit
def order_key(value):
    """fp32 as int32 of the same order; all NaN alike and above everything, -0 equal to 0."""
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & _LAST)
    return tl.where(value == value, key, 0x7FFFFFFF)


@triton.jit(do_not_specialize=["share", "num_pieces"])
def argmax_kernel(
    keys,
    logits,
    stride,
    vocab,
    share,
    num_pieces,
    IS_WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (rows, pieces). ``IS_WHOLE``: rows are of one piece and ``keys`` takes the index."""
    if IS_DEPENDENT:
        gdc_wait()  # of the launch before, only its end is overlapped
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    first = piece * share
    lane = tl.arange(0, BLOCK)
    source = logits + row * stride
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    at = first * BLOCK + lane  # of a row of -inf, the first
    for block in range(first, tl.minimum(first + share, tl.cdiv(vocab, BLOCK))):
        index = block * BLOCK + lane
        value = tl.load(source + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
        # Greater, or the first NaN: nothing is greater than it.
        is_better = ~(value <= best) & (best == best)
        best = tl.where(is_better, value, best)
        at = tl.where(is_better, index, at)
    key = tl.max((order_key(best).to(tl.int64) << 32) | (at ^ _LAST).to(tl.int64), 0)
    if IS_WHOLE:
        tl.store(keys + row, (key & _LAST) ^ _LAST)
    else:
        tl.store(keys + row * num_pieces + piece, key)


@triton.jit(do_not_specialize=["num_pieces"])
def join_argmax_kernel(out, keys, num_pieces, BLOCK: tl.constexpr, IS_DEPENDENT: tl.constexpr):
    """Grid: (rows). The greatest key of a row's pieces has its index."""
    if IS_DEPENDENT:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, BLOCK)
    least = -0x7FFFFFFFFFFFFFFF
    key = tl.load(keys + row * num_pieces + piece, mask=piece < num_pieces, other=least)
    tl.store(out + row, (tl.max(key, 0) & _LAST) ^ _LAST)


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(num_rows: int, vocab: int, dtype: torch.dtype) -> Callable[[], object]:
        logits = torch.empty(num_rows, vocab, dtype=dtype, device="meta")
        return lambda: argmax(logits)

    return {
        "bf16, 1 x 128256": call(1, 128256, torch.bfloat16),
        "bf16, 256 x 151936": call(256, 151936, torch.bfloat16),
        "fp16, 32 x 49152": call(32, 49152, torch.float16),
        "fp32, 1 x 262144": call(1, 262144, torch.float32),
    }
