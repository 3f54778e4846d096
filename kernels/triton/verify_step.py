# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Inputs and write-back of a step that verifies drafts, one program a request; see
:mod:`kernels.verify_step`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import Launcher, planned

_COLUMNS = 256  # of a block table, copied at a time


@triton.jit(do_not_specialize=["token_stride", "table_stride", "out_stride", "padding"])
def gather_verify_inputs_kernel(
    places_ptr,
    token_ids_ptr,
    num_computed_ptr,
    table_ptr,
    input_ids_ptr,
    positions_ptr,
    seq_lens_ptr,
    slots_ptr,
    out_ptr,
    token_stride,
    table_stride,
    out_stride,
    padding,
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (requests,). ``SIZE`` tokens a request, ``STEPS`` the power of two above."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(places_ptr + 2 * i)
    computed = tl.load(num_computed_ptr + row)
    last = computed + tl.load(places_ptr + 2 * i + 1)
    if row == padding:
        last = tl.zeros_like(last) + (SIZE - 1)
    steps = tl.arange(0, STEPS)
    is_step = steps < SIZE
    at = last - (SIZE - 1) + steps
    table = table_ptr + row * table_stride
    tokens = tl.load(token_ids_ptr + row * token_stride + at, mask=is_step, other=0)
    is_own = is_step & (at >= computed)
    trash = tl.load(table_ptr + padding * table_stride)
    blocks = tl.load(table + at // BLOCK_SIZE, mask=is_own, other=0)
    blocks = tl.where(is_own, blocks, trash).to(tl.int64)
    out_at = i * SIZE + steps
    tl.store(input_ids_ptr + out_at, tokens.to(tl.int64), mask=is_step)
    tl.store(positions_ptr + out_at, at, mask=is_step)
    tl.store(slots_ptr + out_at, blocks * BLOCK_SIZE + at % BLOCK_SIZE, mask=is_step)
    tl.store(seq_lens_ptr + i, (last + 1).to(tl.int32))
    num_columns = last // BLOCK_SIZE + 1
    out = out_ptr + i * out_stride
    columns = tl.arange(0, COLUMNS)
    for first in range(0, num_columns, COLUMNS):
        mask = first + columns < num_columns
        copied = tl.load(table + first + columns, mask=mask)
        tl.store(out + first + columns, copied, mask=mask)


@triton.jit(do_not_specialize=["token_stride", "padding"])
def store_verified_kernel(
    places_ptr,
    seq_lens_ptr,
    input_ids_ptr,
    drawn_ptr,
    token_ids_ptr,
    num_computed_ptr,
    new_ids_ptr,
    token_stride,
    padding,
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Grid: (requests,)."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(places_ptr + 2 * i)
    num_drafts = tl.load(places_ptr + 2 * i + 1)
    first = SIZE - 1 - num_drafts  # place of the last known token
    steps = tl.arange(0, STEPS)
    is_followed = steps < SIZE - 1
    drawn = tl.load(drawn_ptr + i * SIZE + steps, mask=is_followed, other=-1)
    following = tl.load(input_ids_ptr + i * SIZE + steps + 1, mask=is_followed, other=-1)
    fails = is_followed & (steps >= first) & (drawn != following)
    last = tl.min(tl.where(fails, steps, SIZE - 1), 0)  # place of the last draft that holds
    is_new = first + steps <= last
    new = tl.load(drawn_ptr + i * SIZE + first + steps, mask=is_new, other=-1)
    tl.store(new_ids_ptr + i * SIZE + steps, new, mask=steps < SIZE)
    if row != padding:
        behind = tl.load(seq_lens_ptr + i).to(tl.int64) - num_drafts
        tokens = token_ids_ptr + row * token_stride + behind
        tl.store(tokens + steps, new.to(tl.int32), mask=is_new)
        tl.store(num_computed_ptr + row, behind + last - first)


def gather_verify_inputs(
    places: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
    block_table: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    batch_block_table: Tensor,
    block_size: int,
) -> None:
    """:func:`kernels.verify_step.gather_verify_inputs`."""
    if len(places):
        tables = (token_ids, num_computed_tokens, block_table)
        out = (input_ids, positions, seq_lens, slot_mapping, batch_block_table)
        _gather((places, *tables, *out), block_size)


@planned
def _gather(
    places: Tensor,
    token_ids: Tensor,
    _num_computed_tokens: Tensor,
    block_table: Tensor,
    input_ids: Tensor,
    _positions: Tensor,
    _seq_lens: Tensor,
    _slot_mapping: Tensor,
    batch_block_table: Tensor,
    block_size: int,
) -> Launcher:
    size = len(input_ids) // len(places)
    return Launcher(
        gather_verify_inputs_kernel,
        (len(places),),
        token_ids.stride(0),
        block_table.stride(0),
        batch_block_table.stride(0),
        token_ids.shape[0] - 1,
        SIZE=size,
        STEPS=triton.next_power_of_2(size),
        BLOCK_SIZE=block_size,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(block_table.shape[1])),
        num_warps=1,
    )


def store_verified(
    places: Tensor,
    seq_lens: Tensor,
    input_ids: Tensor,
    drawn: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
    new_ids: Tensor,
) -> None:
    """:func:`kernels.verify_step.store_verified`."""
    if len(places):
        _store((places, seq_lens, input_ids, drawn, token_ids, num_computed_tokens, new_ids))


@planned
def _store(
    places: Tensor,
    _seq_lens: Tensor,
    _input_ids: Tensor,
    _drawn: Tensor,
    token_ids: Tensor,
    _num_computed_tokens: Tensor,
    new_ids: Tensor,
) -> Launcher:
    size = new_ids.shape[1]
    return Launcher(
        store_verified_kernel,
        (len(places),),
        token_ids.stride(0),
        token_ids.shape[0] - 1,
        SIZE=size,
        STEPS=triton.next_power_of_2(size),
        num_warps=1,
    )


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""
    long = partial(torch.zeros, dtype=torch.int64)
    short = partial(torch.zeros, dtype=torch.int32)

    def gather() -> None:
        gather_verify_inputs(
            long(4, 2), short(9, 65), long(9), short(9, 5),
            long(36), long(36), short(4), long(36), short(4, 5), 16,
        )  # fmt: skip

    def store() -> None:
        store_verified(
            long(4, 2), short(4), long(36), long(36), short(9, 65), long(9), long(4, 9)
        )  # fmt: skip

    return {"inputs of drafts": gather, "verified tokens written back": store}
