"""Inputs of a step in which a model drafts, and the way from one draft to the next.

As for single tokens (:mod:`kernels.decode_step`), all is read from and written to tensors that stay
on the device, so that such a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import triton


def gather_draft_inputs(
    places: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
    block_table: Tensor,
    block_size: int,
    ids_ahead: int,
    num_drafts: int,
    *,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    batch_block_table: Tensor,
) -> None:
    """Fill the inputs of a step that runs the last ``Q`` known tokens of each row.

    Parameters
    ----------
    places : Tensor [B, 2] int64
        Row of the tables, and how many tokens its blocks may hold; the same row may stand in
        several places, as padding does.
    token_ids : Tensor [R, W] int32
    num_computed_tokens : Tensor [R] int64
        Which is the position of the last known token.
    block_table : Tensor [R, P] int32
    block_size : int
        Tokens a block.
    ids_ahead : int
        By how many positions the token that stands at one runs ahead of it: 1 for a head that reads
        each hidden state with the token after it.
    num_drafts : int
        Tokens that will be run behind these.
    input_ids, positions, slot_mapping : Tensor [B * Q] int64
        Written: the tokens, their positions, and where their keys and values go.
    seq_lens : Tensor [B] int32
        Written: tokens of context.
    batch_block_table : Tensor [B, P] int32
        Written as far as the context with all drafts reaches; what lies behind is left as it was.
    """
    tables = (token_ids, num_computed_tokens, block_table)
    out = (input_ids, positions, seq_lens, slot_mapping, batch_block_table)
    if triton.unsupported_reason(places) is None:
        from kernels.triton import draft_step

        return draft_step.gather_draft_inputs(
            places, *tables, *out, block_size, ids_ahead, num_drafts
        )
    return gather_draft_inputs_reference(places, *tables, *out, block_size, ids_ahead)


def gather_draft_inputs_reference(
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
) -> None:
    """Plain torch form of :func:`gather_draft_inputs`; copies whole rows of the block table."""
    rows = places[:, 0]
    size = len(input_ids) // max(1, len(rows))
    last = (num_computed_tokens[rows] - ids_ahead).clamp(min=size - 1)
    at = last.unsqueeze(1) - torch.arange(size - 1, -1, -1, device=rows.device)  # [B, Q]
    blocks = block_table[rows]
    block = blocks.gather(1, torch.div(at, block_size, rounding_mode="floor")).long()
    input_ids.copy_(token_ids[rows.unsqueeze(1), at + ids_ahead].flatten())
    positions.copy_(at.flatten())
    slot_mapping.copy_((block * block_size + at % block_size).flatten())
    seq_lens.copy_(last + 1)
    batch_block_table.copy_(blocks)


def advance_drafts(
    drawn: Tensor,
    places: Tensor,
    block_table: Tensor,
    block_size: int,
    trash_block: int,
    *,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    drafts: Tensor,
    index: int,
) -> None:
    """Move a step of single tokens on to the token that was drawn in each place, and keep it, also
    in the table: behind the known tokens of its row, where the step that verifies it will look.

    Where a request's blocks end, the token stays at their end and its keys and values go to the
    trash block, since nobody will look at its drafts.

    Parameters
    ----------
    drawn : Tensor [B] int64
    places : Tensor [B, 2] int64
        As of :func:`gather_draft_inputs`.
    block_table : Tensor [B, P] int32
        By place.
    trash_block : int
    token_ids : Tensor [R, W] int32
        Written at column ``num_computed_tokens + 1 + index`` of each row, the last one at most,
        which holds no tokens.
    num_computed_tokens : Tensor [R] int64
    input_ids, slot_mapping : Tensor [B] int64
        Written.
    positions : Tensor [B] int64
        Moved on by one.
    seq_lens : Tensor [B] int32
        Written: tokens of context.
    drafts : Tensor [B, K] int64
        Column ``index`` is written.
    """
    tables = (token_ids, num_computed_tokens)
    buffers = (input_ids, positions, seq_lens, slot_mapping, drafts)
    if triton.unsupported_reason(drawn) is None:
        from kernels.triton import draft_step

        return draft_step.advance_drafts(
            drawn, places, block_table, *tables, *buffers, block_size, trash_block, index
        )
    return advance_drafts_reference(
        drawn, places, block_table, *tables, *buffers, block_size, trash_block, index
    )


def advance_drafts_reference(
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
    """Plain torch form of :func:`advance_drafts`."""
    rows, limits = places.unbind(1)
    columns = (num_computed_tokens[rows] + 1 + index).clamp(max=token_ids.shape[1] - 1)
    token_ids[rows, columns] = drawn.to(token_ids.dtype)
    inside = positions + 1 < limits
    positions.copy_(torch.minimum(positions + 1, limits - 1))
    input_ids.copy_(drawn)
    column = torch.div(positions, block_size, rounding_mode="floor").unsqueeze(1)
    block = block_table.gather(1, column).squeeze(1).long()
    slots = block * block_size + positions % block_size
    slot_mapping.copy_(torch.where(inside, slots, trash_block * block_size))
    seq_lens.copy_(positions + 1)
    drafts[:, index] = drawn
