"""Both ends of a step in which every request runs its last token and its drafts, as many tokens
for one request as for any other.

As for single tokens (:mod:`kernels.decode_step`), all is read from and written to tables that stay
on the device, so that such a step can be captured in a CUDA graph. A request with fewer drafts than
there is room for runs tokens before its last one over again, in the first of its places: they see
keys that are there, their own keys and values go to the trash block, and nobody reads their logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import triton


def gather_verify_inputs(
    places: Tensor,
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
    """Fill the inputs of a step that runs ``Q`` tokens of each row, the last ones its drafts.

    Parameters
    ----------
    places : Tensor [B, 2] int64
        Row of the tables, and how many of the tokens behind its last known one are drafts that run,
        at most ``Q - 1``. With them a row must have ``Q`` tokens. The last row of the tables is
        padding's: it runs its first ``Q`` tokens, and may stand in several places.
    token_ids : Tensor [R, W] int32
        Known tokens, and drafts behind them.
    num_computed_tokens : Tensor [R] int64
        Which is the position of the last known token.
    block_table : Tensor [R, P] int32
        Padding's row is of the trash block.
    block_size : int
        Tokens a block.
    input_ids, positions, slot_mapping : Tensor [B * Q] int64
        Written: tokens, their positions, and where their keys and values go: the trash block for
        those before a row's last known one.
    seq_lens : Tensor [B] int32
        Written: tokens of context, the drafts included.
    batch_block_table : Tensor [B, P] int32
        Written as far as the context reaches; what lies behind is left as it was.
    """
    tables = (token_ids, num_computed_tokens, block_table)
    out = (input_ids, positions, seq_lens, slot_mapping, batch_block_table)
    if triton.unsupported_reason(places) is None:
        from kernels.triton import verify_step

        return verify_step.gather_verify_inputs(places, *tables, *out, block_size)
    return gather_verify_inputs_reference(places, *tables, *out, block_size)


def gather_verify_inputs_reference(
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
    """Plain torch form of :func:`gather_verify_inputs`; copies whole rows of the block table."""
    rows, num_drafts = places.unbind(1)
    padding = token_ids.shape[0] - 1
    size = len(input_ids) // max(1, len(rows))
    computed = num_computed_tokens[rows]
    last = torch.where(rows == padding, size - 1, computed + num_drafts)
    at = last.unsqueeze(1) - torch.arange(size - 1, -1, -1, device=rows.device)  # [B, Q]
    blocks = block_table[rows]
    block = blocks.gather(1, torch.div(at, block_size, rounding_mode="floor")).long()
    is_again = at < computed.unsqueeze(1)
    block = torch.where(is_again, block_table[padding, 0].long(), block)
    input_ids.copy_(token_ids[rows.unsqueeze(1), at].flatten())
    positions.copy_(at.flatten())
    slot_mapping.copy_((block * block_size + at % block_size).flatten())
    seq_lens.copy_(last + 1)
    batch_block_table.copy_(blocks)


def store_verified(
    places: Tensor,
    seq_lens: Tensor,
    input_ids: Tensor,
    drawn: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
    new_ids: Tensor,
) -> None:
    """Keep drafts as far as they are what was drawn, and the token drawn after them.

    Parameters
    ----------
    places, seq_lens, input_ids
        As :func:`gather_verify_inputs` had them.
    drawn : Tensor [B * Q] int64
        Token drawn behind each token of the step.
    token_ids : Tensor [R, W] int32
        The new tokens are written behind each row's last known one; padding's row stays as it is.
    num_computed_tokens : Tensor [R] int64
        Becomes the position of the last new token; padding's stays as it is.
    new_ids : Tensor [B, Q] int64
        Written: the new tokens, then -1.
    """
    tensors = (places, seq_lens, input_ids, drawn, token_ids, num_computed_tokens, new_ids)
    if triton.unsupported_reason(places) is None:
        from kernels.triton import verify_step

        return verify_step.store_verified(*tensors)
    return store_verified_reference(*tensors)


def store_verified_reference(
    places: Tensor,
    seq_lens: Tensor,
    input_ids: Tensor,
    drawn: Tensor,
    token_ids: Tensor,
    num_computed_tokens: Tensor,
    new_ids: Tensor,
) -> None:
    """Plain torch form of :func:`store_verified`."""
    padding = token_ids.shape[0] - 1
    size = new_ids.shape[1]
    rows, num_drafts = places.unbind(1)
    steps = torch.arange(size, device=rows.device)
    first = size - 1 - num_drafts.unsqueeze(1)  # place of the last known token
    ids, drawn = input_ids.view(-1, size), drawn.view(-1, size)
    holds = (drawn[:, :-1] == ids[:, 1:]) | (steps[:-1] < first)
    last = holds.long().cumprod(1).sum(1, keepdim=True)  # place of the last draft that holds
    found = drawn.gather(1, (first + steps).clamp(max=size - 1))
    new_ids.copy_(found.masked_fill(first + steps > last, -1))
    behind = seq_lens.long() - num_drafts
    for place, row in enumerate(rows.tolist()):
        if row != padding:
            tokens = new_ids[place][new_ids[place] >= 0]
            start = int(behind[place])
            token_ids[row, start : start + len(tokens)] = tokens.to(torch.int32)
            num_computed_tokens[row] = start + len(tokens) - 1
