# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Inputs of a step of any numbers of tokens, one program a request and one for the tokens that pad;
see :mod:`kernels.mixed_step`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import Launcher, planned

_COLUMNS = 256  # of a block table, copied at a time
_TOKENS = 128  # of a request, at a time


@triton.jit(
    do_not_specialize=["token_stride", "table_stride", "out_stride", "num_requests", "num_tokens"]
)
def gather_mixed_inputs_kernel(
    places_ptr,
    token_ids_ptr,
    num_computed_ptr,
    table_ptr,
    input_ids_ptr,
    positions_ptr,
    query_start_ptr,
    seq_lens_ptr,
    slots_ptr,
    out_ptr,
    place_stride,
    token_stride,
    table_stride,
    out_stride,
    num_requests,
    num_tokens,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (requests + 1,)."""
    i = tl.program_id(0).to(tl.int64)
    place = places_ptr + i * place_stride
    row = tl.load(place)
    start = tl.load(place + 1)
    is_request = i < num_requests
    # Behind the last place there is none: tokens that pad end where the step does.
    end = tl.load(place + place_stride + 1, mask=is_request, other=num_tokens)
    computed = tl.load(num_computed_ptr + row)
    seq_len = computed + end - start
    table = table_ptr + row * table_stride
    tl.store(query_start_ptr + i, start.to(tl.int32))
    tl.store(seq_lens_ptr + i, seq_len.to(tl.int32), mask=is_request)
    steps = tl.arange(0, TOKENS)
    for first in range(0, end - start, TOKENS):
        is_token = first + steps < end - start
        at = tl.where(is_request, computed + first + steps, 0)
        tokens = tl.load(token_ids_ptr + row * token_stride + at, mask=is_token, other=0)
        blocks = tl.load(table + at // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
        out_at = start + first + steps
        tl.store(input_ids_ptr + out_at, tokens.to(tl.int64), mask=is_token)
        tl.store(positions_ptr + out_at, at, mask=is_token)
        tl.store(slots_ptr + out_at, blocks * BLOCK_SIZE + at % BLOCK_SIZE, mask=is_token)
    if is_request:
        num_columns = tl.cdiv(seq_len, BLOCK_SIZE)
        out = out_ptr + i * out_stride
        columns = tl.arange(0, COLUMNS)
        for first in range(0, num_columns, COLUMNS):
            mask = first + columns < num_columns
            copied = tl.load(table + first + columns, mask=mask)
            tl.store(out + first + columns, copied, mask=mask)


def gather_mixed_inputs(
    places: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
    block_table: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    batch_block_table: Tensor,
    block_size: int,
) -> None:
    """:func:`kernels.mixed_step.gather_mixed_inputs`."""
    tables = (token_ids, num_computed_tokens, block_table)
    out = (input_ids, positions, query_start_loc, seq_lens, slot_mapping, batch_block_table)
    _gather((places, *tables, *out), block_size)


@planned
def _gather(
    places: Tensor,
    token_ids: Tensor,
    _num_computed_tokens: Tensor,
    block_table: Tensor,
    input_ids: Tensor,
    _positions: Tensor,
    _query_start_loc: Tensor,
    seq_lens: Tensor,
    _slot_mapping: Tensor,
    batch_block_table: Tensor,
    block_size: int,
) -> Launcher:
    return Launcher(
        gather_mixed_inputs_kernel,
        (len(places),),
        places.stride(0),
        token_ids.stride(0),
        block_table.stride(0),
        batch_block_table.stride(0),
        len(seq_lens),
        len(input_ids),
        BLOCK_SIZE=block_size,
        TOKENS=_TOKENS,
        COLUMNS=min(_COLUMNS, triton.next_power_of_2(block_table.shape[1])),
        num_warps=1,
    )


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""
    long = partial(torch.zeros, dtype=torch.int64)
    short = partial(torch.zeros, dtype=torch.int32)

    def gather() -> None:
        gather_mixed_inputs(
            long(5, 4), short(9, 65), long(9), short(9, 5),
            long(32), long(32), short(5), short(4), long(32), short(4, 5), 16,
        )  # fmt: skip

    return {"inputs of a mixed step": gather}
