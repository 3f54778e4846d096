"""Inputs of a step in which requests run any numbers of tokens, padded to fixed shapes.

As for single tokens (:mod:`kernels.decode_step`), all is read from tables that stay on the device,
so that such a step can be captured in a CUDA graph: which rows run, and how many tokens of each, is
all that changes from outside. Tokens that pad belong to no request.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import triton


def gather_mixed_inputs(
    places: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
    block_table: Tensor,
    block_size: int,
    *,
    input_ids: Tensor,
    positions: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    batch_block_table: Tensor,
) -> None:
    """Fill the inputs of a step that runs the next tokens of each row.

    Parameters
    ----------
    places : Tensor [B + 1, >= 2] int64
        Row of the tables, and first token, of each request in order; then the last row of the
        tables, which is padding's, and the number of all tokens. Requests that pad are padding's
        row too, and begin there. Further columns are not read.
    token_ids : Tensor [R, W] int32
    num_computed_tokens : Tensor [R] int64
        Which is the position of a row's next token; 0 of padding's.
    block_table : Tensor [R, P] int32
        Padding's row is of the trash block.
    block_size : int
        Tokens a block.
    input_ids, positions, slot_mapping : Tensor [T] int64
        Written: tokens, their positions, and where their keys and values go. Tokens that pad are
        padding's first.
    query_start_loc : Tensor [B + 1] int32
        Written: where each request's tokens begin.
    seq_lens : Tensor [B] int32
        Written: tokens of context, those that run included.
    batch_block_table : Tensor [B, P] int32
        Written as far as the context reaches; what lies behind is left as it was.
    """
    tables = (token_ids, num_computed_tokens, block_table)
    out = (input_ids, positions, query_start_loc, seq_lens, slot_mapping, batch_block_table)
    if triton.unsupported_reason(places) is None:
        from kernels.triton import mixed_step

        return mixed_step.gather_mixed_inputs(places, *tables, *out, block_size)
    return gather_mixed_inputs_reference(places, *tables, *out, block_size)


def gather_mixed_inputs_reference(
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
    """Plain torch form of :func:`gather_mixed_inputs`; copies whole rows of the block table."""
    rows, starts = places[:, 0], places[:, 1].contiguous()
    computed = num_computed_tokens[rows]
    token = torch.arange(len(input_ids), device=places.device)
    owner = torch.searchsorted(starts, token, right=True) - 1  # the last place is padding's
    row = rows[owner]
    at = computed[owner] + token - starts[owner]
    at = at.masked_fill(owner == len(seq_lens), 0)
    block = block_table[row, torch.div(at, block_size, rounding_mode="floor")].long()
    input_ids.copy_(token_ids[row, at])
    positions.copy_(at)
    query_start_loc.copy_(starts)
    seq_lens.copy_(computed[:-1] + starts.diff())
    slot_mapping.copy_(block * block_size + at % block_size)
    batch_block_table.copy_(block_table[rows[:-1]])
