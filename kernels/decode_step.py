"""Both ends of a step in which every request runs one token: its inputs, and what it leaves behind.

Everything is read from and written to tables that stay on the device, by row, so that such a step
can be captured in a CUDA graph: which rows run is all that changes from outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import triton


def gather_decode_inputs(
    rows: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
    block_table: Tensor,
    block_size: int,
    *,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    batch_block_table: Tensor,
) -> None:
    """Fill the inputs of a step that runs the last token of each row.

    Parameters
    ----------
    rows : Tensor [B] int64
        Rows of the tables; the same one may stand in several places, as padding does.
    token_ids : Tensor [R, W] int32
    num_computed_tokens : Tensor [R] int64
        Which is the position of the token that runs.
    block_table : Tensor [R, P] int32
    block_size : int
        Tokens a block.
    input_ids, positions, slot_mapping : Tensor [B] int64
        Written: the token, its position, and where its keys and values go.
    seq_lens : Tensor [B] int32
        Written: tokens of context, the running one included.
    batch_block_table : Tensor [B, P] int32
        Written as far as the context reaches; what lies behind is left as it was.
    """
    if triton.unsupported_reason(rows) is None:
        from kernels.triton import decode_step

        decode_step.gather_decode_inputs(
            rows,
            token_ids,
            num_computed_tokens,
            block_table,
            block_size,
            input_ids,
            positions,
            seq_lens,
            slot_mapping,
            batch_block_table,
        )
        return
    gather_decode_inputs_reference(
        rows,
        token_ids,
        num_computed_tokens,
        block_table,
        block_size,
        input_ids=input_ids,
        positions=positions,
        seq_lens=seq_lens,
        slot_mapping=slot_mapping,
        batch_block_table=batch_block_table,
    )


def gather_decode_inputs_reference(
    rows: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
    block_table: Tensor,
    block_size: int,
    *,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    batch_block_table: Tensor,
) -> None:
    """Plain torch form of :func:`gather_decode_inputs`; copies whole rows of the block table."""
    computed = num_computed_tokens[rows]
    positions.copy_(computed)
    seq_lens.copy_(computed + 1)
    input_ids.copy_(token_ids[rows, computed])
    batch_block_table.copy_(block_table[rows])
    column = torch.div(computed, block_size, rounding_mode="floor")
    slot_mapping.copy_(block_table[rows, column].long() * block_size + computed % block_size)


def store_decoded(
    rows: Tensor,
    positions: Tensor,
    new_ids: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
) -> None:
    """Write each row's new token behind its last one, and count that one as computed.

    Parameters
    ----------
    rows, positions : Tensor [B] int64
        As :func:`gather_decode_inputs` had them. The last row of the tables is padding's: it stays
        as it is.
    new_ids : Tensor [B] int64
        What was drawn.
    token_ids : Tensor [R, W] int32
        Written at ``positions + 1``.
    num_computed_tokens : Tensor [R] int64
        Becomes ``positions + 1``.
    """
    if triton.unsupported_reason(rows) is None:
        from kernels.triton import decode_step

        decode_step.store_decoded(rows, positions, new_ids, token_ids, num_computed_tokens)
        return
    store_decoded_reference(rows, positions, new_ids, token_ids, num_computed_tokens)


def store_decoded_reference(
    rows: Tensor,
    positions: Tensor,
    new_ids: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
) -> None:
    """Plain torch form of :func:`store_decoded`."""
    padding = token_ids.shape[0] - 1
    kept = token_ids[padding, 1].clone()
    token_ids[rows, positions + 1] = new_ids.to(torch.int32)
    token_ids[padding, 1] = kept
    num_computed_tokens[rows] = (positions + 1).masked_fill(rows == padding, 0)
