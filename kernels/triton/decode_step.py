# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Inputs and write-back of a step of single tokens, one program a request; see
:mod:`kernels.decode_step`."""

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
def gather_decode_inputs_kernel(
    rows_ptr,
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
    BLOCK_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (requests,)."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + i)
    position = tl.load(num_computed_ptr + row)
    table = table_ptr + row * table_stride
    token = tl.load(token_ids_ptr + row * token_stride + position)
    block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
    tl.store(input_ids_ptr + i, token.to(tl.int64))
    tl.store(positions_ptr + i, position)
    tl.store(seq_lens_ptr + i, (position + 1).to(tl.int32))
    tl.store(slots_ptr + i, block * BLOCK_SIZE + position % BLOCK_SIZE)
    num_columns = position // BLOCK_SIZE + 1
    out = out_ptr + i * out_stride
    columns = tl.arange(0, COLUMNS)
    for first in range(0, num_columns, COLUMNS):
        mask = first + columns < num_columns
        blocks = tl.load(table + first + columns, mask=mask)
        tl.store(out + first + columns, blocks, mask=mask)


@triton.jit(do_not_specialize=["token_stride", "padding"])
def store_decoded_kernel(
    rows_ptr, positions_ptr, new_ids_ptr, token_ids_ptr, num_computed_ptr, token_stride, padding
):
    """Grid: (requests,)."""
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i)
    if row != padding:
        after = tl.load(positions_ptr + i) + 1
        new = tl.load(new_ids_ptr + i).to(tl.int32)
        tl.store(token_ids_ptr + row * token_stride + after, new)
        tl.store(num_computed_ptr + row, after)


def gather_decode_inputs(
    rows: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
    block_table: Tensor,
    block_size: int,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    batch_block_table: Tensor,
) -> None:
    """:func:`kernels.decode_step.gather_decode_inputs`."""
    if len(rows):
        requests = (rows, token_ids, num_computed_tokens, block_table)
        _gather(
            (*requests, input_ids, positions, seq_lens, slot_mapping, batch_block_table), block_size
        )


@planned
def _gather(
    rows: Tensor,
    token_ids: Tensor,
    _num_computed_tokens: Tensor,
    block_table: Tensor,
    _input_ids: Tensor,
    _positions: Tensor,
    _seq_lens: Tensor,
    _slot_mapping: Tensor,
    batch_block_table: Tensor,
    block_size: int,
) -> Launcher:
    return Launcher(
        gather_decode_inputs_kernel,
        (len(rows),),
        token_ids.stride(0),
        block_table.stride(0),
        batch_block_table.stride(0),
        BLOCK_SIZE=block_size,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(block_table.shape[1])),
        num_warps=1,
    )


def store_decoded(
    rows: Tensor,
    positions: Tensor,
    new_ids: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
) -> None:
    """:func:`kernels.decode_step.store_decoded`."""
    if len(rows):
        _store((rows, positions, new_ids, token_ids, num_computed_tokens))


@planned
def _store(
    rows: Tensor,
    _positions: Tensor,
    _new_ids: Tensor,
    token_ids: Tensor,
    _num_computed_tokens: Tensor,
) -> Launcher:
    return Launcher(
        store_decoded_kernel,
        (len(rows),),
        token_ids.stride(0),
        token_ids.shape[0] - 1,
        num_warps=1,
    )


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def gather() -> None:
        long = partial(torch.zeros, dtype=torch.int64)
        short = partial(torch.zeros, dtype=torch.int32)
        gather_decode_inputs(
            long(4), short(9, 65), long(9), short(9, 5), 16,
            long(4), long(4), short(4), long(4), short(4, 5),
        )  # fmt: skip

    def store() -> None:
        rows = torch.zeros(4, dtype=torch.int64)
        table = torch.zeros(9, 65, dtype=torch.int32)
        store_decoded(rows, rows, rows, table, torch.zeros(9, dtype=torch.int64))

    return {"inputs of single tokens": gather, "tokens written back": store}
