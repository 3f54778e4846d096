# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Inputs of a step in which a model drafts, one program a request; see
:mod:`kernels.draft_step`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import Launcher, planned

_COLUMNS = 256  # of a block table, copied at a time


@triton.jit(do_not_specialize=["token_stride", "table_stride", "out_stride"])
def gather_draft_inputs_kernel(
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
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    IDS_AHEAD: tl.constexpr,
    NUM_DRAFTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (requests,). ``SIZE`` tokens a request, ``STEPS`` the power of two above."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(places_ptr + 2 * i)
    last = tl.maximum(tl.load(num_computed_ptr + row) - IDS_AHEAD, SIZE - 1)
    steps = tl.arange(0, STEPS)
    is_step = steps < SIZE
    at = last - (SIZE - 1) + steps
    table = table_ptr + row * table_stride
    tokens = tl.load(token_ids_ptr + row * token_stride + at + IDS_AHEAD, mask=is_step, other=0)
    blocks = tl.load(table + at // BLOCK_SIZE, mask=is_step, other=0).to(tl.int64)
    out_at = i * SIZE + steps
    tl.store(input_ids_ptr + out_at, tokens.to(tl.int64), mask=is_step)
    tl.store(positions_ptr + out_at, at, mask=is_step)
    tl.store(slots_ptr + out_at, blocks * BLOCK_SIZE + at % BLOCK_SIZE, mask=is_step)
    tl.store(seq_lens_ptr + i, (last + 1).to(tl.int32))
    num_columns = tl.minimum((last + NUM_DRAFTS) // BLOCK_SIZE + 1, NUM_COLUMNS)
    out = out_ptr + i * out_stride
    columns = tl.arange(0, COLUMNS)
    for first in range(0, num_columns, COLUMNS):
        mask = first + columns < num_columns
        tl.store(out + first + columns, tl.load(table + first + columns, mask=mask), mask=mask)


@triton.jit(
    do_not_specialize=[
        "table_stride", "token_stride", "draft_stride", "num_columns", "index", "trash_slot"
    ]
)  # fmt: skip
def advance_drafts_kernel(
    drawn_ptr,
    places_ptr,
    table_ptr,
    token_ids_ptr,
    num_computed_ptr,
    input_ids_ptr,
    positions_ptr,
    seq_lens_ptr,
    slots_ptr,
    drafts_ptr,
    table_stride,
    token_stride,
    draft_stride,
    num_columns,
    trash_slot,
    index,
    BLOCK_SIZE: tl.constexpr,
):
    """Grid: (requests,)."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(places_ptr + 2 * i)
    limit = tl.load(places_ptr + 2 * i + 1)
    token = tl.load(drawn_ptr + i)
    column = tl.minimum(tl.load(num_computed_ptr + row) + 1 + index, num_columns - 1)
    tl.store(token_ids_ptr + row * token_stride + column, token.to(tl.int32))
    wanted = tl.load(positions_ptr + i) + 1
    position = tl.minimum(wanted, limit - 1)
    block = tl.load(table_ptr + i * table_stride + position // BLOCK_SIZE).to(tl.int64)
    slot = tl.where(wanted < limit, block * BLOCK_SIZE + position % BLOCK_SIZE, trash_slot)
    tl.store(positions_ptr + i, position)
    tl.store(input_ids_ptr + i, token)
    tl.store(seq_lens_ptr + i, (position + 1).to(tl.int32))
    tl.store(slots_ptr + i, slot)
    tl.store(drafts_ptr + i * draft_stride + index, token)


def gather_draft_inputs(
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
    ids_ahead: int,
    num_drafts: int,
) -> None:
    """:func:`kernels.draft_step.gather_draft_inputs`."""
    if len(places):
        requests = (places, token_ids, num_computed_tokens, block_table)
        out = (input_ids, positions, seq_lens, slot_mapping, batch_block_table)
        _gather((*requests, *out), block_size, ids_ahead, num_drafts)


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
    ids_ahead: int,
    num_drafts: int,
) -> Launcher:
    size, num_columns = len(input_ids) // len(places), batch_block_table.shape[1]
    return Launcher(
        gather_draft_inputs_kernel,
        (len(places),),
        token_ids.stride(0),
        block_table.stride(0),
        batch_block_table.stride(0),
        SIZE=size,
        STEPS=triton.next_power_of_2(size),
        IDS_AHEAD=ids_ahead,
        NUM_DRAFTS=num_drafts,
        BLOCK_SIZE=block_size,
        NUM_COLUMNS=num_columns,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(num_columns)),
        num_warps=1,
    )


def advance_drafts(
    drawn: Tensor,
    places: Tensor,
    block_table: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    drafts: Tensor,
    block_size: int,
    trash_block: int,
    index: int,
) -> None:
    """:func:`kernels.draft_step.advance_drafts`."""
    if len(drawn):
        tables = (block_table, token_ids, num_computed_tokens)
        buffers = (input_ids, positions, seq_lens, slot_mapping, drafts)
        tensors = (drawn, places, *tables, *buffers)
        _advance(tensors, block_size, trash_block * block_size, index)


@planned
def _advance(
    drawn: Tensor,
    _places: Tensor,
    block_table: Tensor,
    token_ids: Tensor,
    _num_computed_tokens: Tensor,
    _input_ids: Tensor,
    _positions: Tensor,
    _seq_lens: Tensor,
    _slot_mapping: Tensor,
    drafts: Tensor,
    block_size: int,
    trash_slot: int,
    index: int,
) -> Launcher:
    return Launcher(
        advance_drafts_kernel,
        (len(drawn),),
        block_table.stride(0),
        token_ids.stride(0),
        drafts.stride(0),
        token_ids.shape[1],
        trash_slot,
        index,
        BLOCK_SIZE=block_size,
        num_warps=1,
    )


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""
    long = partial(torch.zeros, dtype=torch.int64)
    short = partial(torch.zeros, dtype=torch.int32)

    def gather() -> None:
        gather_draft_inputs(
            long(4, 2), short(9, 65), long(9), short(9, 5),
            long(12), long(12), short(4), long(12), short(4, 5), 16, 1, 5,
        )  # fmt: skip

    def advance() -> None:
        advance_drafts(
            long(4), long(4, 2), short(4, 5), short(9, 65), long(9),
            long(4), long(4), short(4), long(4), long(4, 5), 16, 99, 1,
        )  # fmt: skip

    return {"inputs of a drafting model": gather, "on to the next draft": advance}
