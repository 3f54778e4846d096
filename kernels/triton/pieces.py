# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""How a decoding batch is shared out on the device, and how results are written.

The keys of all requests are cut into blocks, numbered request by request. A program takes as many
consecutive blocks as any other, whichever requests they belong to, and works out which these are
from the sequence lengths, in about a microsecond.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.tiles import LN_2, LOG2_E, finish_softmax, merge_tiles


@triton.jit
def span(
    seq_lens,
    query_start_loc,
    key_start,
    tree,
    request,
    mask,
    WINDOW: tl.constexpr,
    TREE_WORDS: tl.constexpr,
):
    """Where requests' queries begin, how many they are, and which keys they see in all."""
    query_start = tl.load(query_start_loc + request, mask=mask, other=0)
    num_queries = tl.load(query_start_loc + request + 1, mask=mask, other=0) - query_start
    stop = tl.load(seq_lens + request, mask=mask, other=0)
    first = stop * 0
    if key_start is not None:
        first = tl.maximum(tl.load(key_start + request, mask=mask, other=0), first)
    if WINDOW > 0:
        position = stop - num_queries
        if TREE_WORDS > 0:  # of nodes it is near the root, wherever they stand
            row = tree + query_start.to(tl.int64) * (2 + TREE_WORDS)
            root = tl.load(row, mask=mask & (num_queries > 0), other=0)
            position = tl.minimum(position, root.to(tl.int32))
        first = tl.maximum(position - WINDOW + 1, first)
    stop = tl.where(num_queries > 0, tl.maximum(stop, first), first)
    return query_start, num_queries, first, stop


@triton.jit
def count_blocks(
    seq_lens,
    query_start_loc,
    key_start,
    tree,
    request,
    num_requests,
    WINDOW: tl.constexpr,
    TREE_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Blocks of keys of each request: at least one, to write its rows; none for padding."""
    mask = request < num_requests
    _, num_queries, first, stop = span(
        seq_lens, query_start_loc, key_start, tree, request, mask, WINDOW, TREE_WORDS
    )
    return tl.where(num_queries > 0, tl.maximum(tl.cdiv(stop - first, BLOCK_N), 1), 0)


@triton.jit
def count_all_blocks(
    counts,
    seq_lens,
    query_start_loc,
    key_start,
    tree,
    num_requests,
    WINDOW: tl.constexpr,
    TREE_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
):
    """Blocks of all requests together; ``counts`` are those of the first ``BLOCK_B``."""
    total = tl.sum(counts, 0)
    if not IS_ONE_BLOCK:
        for start in range(BLOCK_B, num_requests, BLOCK_B):
            request = start + tl.arange(0, BLOCK_B)
            more = count_blocks(
                seq_lens, query_start_loc, key_start, tree, request, num_requests,
                WINDOW, TREE_WORDS, BLOCK_N,
            )  # fmt: skip
            total += tl.sum(more, 0)
    return total


@triton.jit
def find_request(
    block,
    counts,
    ends,
    seq_lens,
    query_start_loc,
    key_start,
    tree,
    num_requests,
    WINDOW: tl.constexpr,
    TREE_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
):
    """Which request a block belongs to, and how many blocks lie before that request.

    ``ends`` are the running sums of ``counts``. A request is counted as being before the block when
    it ends there, so that padding is passed over.
    """
    if IS_ONE_BLOCK:
        is_before = ends <= block
        # Both sums in one: fewer than 2 ** 16 requests in ``BLOCK_B``.
        both = tl.sum(tl.where(is_before, counts.to(tl.int64) * 65536 + 1, 0), 0)
        request = (both % 65536).to(tl.int32)
        num_before = (both // 65536).to(tl.int32)
    else:
        request = 0
        num_before = 0
        seen = 0
        for start in range(0, num_requests, BLOCK_B):
            others = start + tl.arange(0, BLOCK_B)
            more = count_blocks(
                seq_lens, query_start_loc, key_start, tree, others, num_requests,
                WINDOW, TREE_WORDS, BLOCK_N,
            )  # fmt: skip
            is_before = (seen + tl.cumsum(more, 0) <= block) & (others < num_requests)
            request += tl.sum(is_before.to(tl.int32), 0)
            num_before += tl.sum(tl.where(is_before, more, 0), 0)
            seen += tl.sum(more, 0)
    return request, num_before


@triton.jit
def drop_padding(
    acc,
    maximum,
    total,
    is_row,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The first ``BLOCK_R`` rows of a state of ``BLOCK_M``; the others only pad a product."""
    if BLOCK_R < BLOCK_M:
        PARTS: tl.constexpr = BLOCK_M // BLOCK_R
        acc = tl.where(is_row[:, None], acc, 0.0)
        acc = tl.sum(tl.reshape(acc, [PARTS, BLOCK_R, BLOCK_D]), 0)
        maximum = tl.where(is_row, maximum, float("-inf"))
        maximum = tl.max(tl.reshape(maximum, [PARTS, BLOCK_R]), 0)
        total = tl.sum(tl.reshape(tl.where(is_row, total, 0.0), [PARTS, BLOCK_R]), 0)
    return acc, maximum, total


@triton.jit
def store_rows(
    out,
    lse,
    acc,
    maximum,
    total,
    prior_out,
    prior_lse,
    num_prior,
    num_tokens,
    row,
    is_row,
    dims,
    is_dim,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Write finished rows (``row`` is token * HEADS + head), after merging earlier states in."""
    if prior_out is not None:
        acc, maximum, total = merge_tiles(
            prior_out, prior_lse, row, num_tokens * HEADS, 0, num_prior, is_row, dims, is_dim,
            acc, maximum, total, LOG2_E, HEAD_DIM, BLOCK_P,
        )  # fmt: skip
    values, values_lse = finish_softmax(acc, maximum, total)
    at = row[:, None] * HEAD_DIM + dims[None, :]
    mask = is_row[:, None] & is_dim[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        tl.store(lse + row, values_lse * LN_2, mask=is_row)
