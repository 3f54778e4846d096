# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The kernel behind :mod:`kernels.triton.paged_prefill`.

A program takes a tile of one request's queries, with all query heads of one KV head packed into
its rows (so that a short query still fills a matrix instruction), and walks the keys that the tile
may see. Three stretches of keys are told apart: at the left edge (a sliding window or ``key_start``
cuts in), in the middle, where every row sees every key and nothing is masked, and along the
diagonal. Beside the products and exponentials, addresses cost a turn of the walk most: blocks are
looked up a turn ahead, and what does not change from tile to tile stays outside.

Papers: Dao, "FlashAttention-2", 2023, and Shah et al., "FlashAttention-3", 2024 (tiling, online
softmax with a deferred division); Kwon et al., "PagedAttention", 2023 (block tables); Ainslie et
al., "GQA", 2023.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.numbers import decode_kv
from kernels.triton.tiles import LN_2, LOG2_E, load_roots, sees_nodes

# What a running maximum starts from: finite, so that a row that sees nothing yet makes no NaN.
_LEAST = tl.constexpr(-1e30)


@triton.jit
def _load_pages(
    table_row,
    first,
    first_page,
    last_page,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """Blocks that hold the keys from ``first`` on, a tile's beginning: one for each key, or one
    where a block holds them all. Beyond the first and last block to read it is that one."""
    if PAGE % BLOCK_N == 0:
        page = _quotient(first, PAGE)
    elif BLOCK_N % PAGE == 0:
        page = _quotient(first, PAGE) + _quotient(tl.arange(0, BLOCK_N), PAGE)
    else:
        page = _quotient(first + tl.arange(0, BLOCK_N), PAGE)
    page = tl.minimum(page, last_page)
    if HAS_FIRST:
        page = tl.maximum(page, first_page)
    return tl.load(table_row + page)


@triton.jit
def _offsets_in_pages(first, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where in their blocks a tile's keys lie; the same for all tiles that are whole blocks."""
    if BLOCK_N % PAGE == 0:
        offset = _remainder(tl.arange(0, BLOCK_N), PAGE)
    else:
        offset = _remainder(first + tl.arange(0, BLOCK_N), PAGE)
    return offset


@triton.jit
def _quotient(x, DIVISOR: tl.constexpr):
    """``x // DIVISOR`` of ``x >= 0``, without what signed division needs beyond that."""
    SHIFT: tl.constexpr = DIVISOR.bit_length() - 1
    if DIVISOR == 1 << SHIFT:
        return x >> SHIFT
    return x // DIVISOR


@triton.jit
def _remainder(x, DIVISOR: tl.constexpr):
    """``x % DIVISOR`` of ``x >= 0``."""
    if (DIVISOR & (DIVISOR - 1)) == 0:
        return x & (DIVISOR - 1)
    return x % DIVISOR


@triton.jit
def _pointers(base, pages, offset, dims, stride_block, stride_token):
    """Addresses ``[BLOCK_N, BLOCK_D]`` of rows of a cache."""
    rows = base + offset[:, None] * stride_token + dims[None, :]  # the same in every turn
    starts = pages.to(tl.int64) * stride_block
    if len(starts.shape) == 1:
        starts = starts[:, None]
    return rows + starts


@triton.jit
def _hide(
    scores,
    position,
    key,
    key_start,
    tree_rows,
    window,
    HAS_WINDOW: tl.constexpr,
    HAS_KEY_START: tl.constexpr,
    TREE_WORDS: tl.constexpr,
):
    """``-inf`` where a row does not see a key."""
    seen = key[None, :] <= position[:, None]
    if TREE_WORDS > 0:
        root, position_in_text = load_roots(tree_rows, position)
        seen &= sees_nodes(tree_rows, root, key, TREE_WORDS)
        if HAS_WINDOW:
            near = key[None, :] > position_in_text[:, None] - window
            seen &= near | (key[None, :] >= root[:, None])
    elif HAS_WINDOW:
        seen &= key[None, :] > position[:, None] - window
    if HAS_KEY_START:
        seen &= key[None, :] >= key_start
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _cap(scores, cap_scale, HAS_SOFT_CAP: tl.constexpr):
    """``tanh(cap_scale * scores)`` by the one exponential that there is an instruction for."""
    if HAS_SOFT_CAP:
        scores = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E * cap_scale)) + 1.0)
    return scores


@triton.jit
def _attend_stretch(
    acc,
    row_sum,
    row_max,
    q,
    position,
    start,
    stop,
    end,
    first_key,
    key_start,
    k_base,
    v_base,
    k_scale_base,
    v_scale_base,
    table_row,
    tree_rows,
    scale,
    cap_scale,
    window,
    k_stride_block,
    k_stride_token,
    v_stride_block,
    v_stride_token,
    ks_stride_block,
    ks_stride_token,
    vs_stride_block,
    vs_stride_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KV_KIND: tl.constexpr,
    SCALE_DIMS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_KEY_START: tl.constexpr,
    TREE_WORDS: tl.constexpr,
    IS_MASKED: tl.constexpr,
    COMPUTE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Take keys ``start .. stop - 1`` (whole tiles) into the running softmax of all rows.

    ``first_key .. end - 1`` are the keys that some row of the tile sees.
    """
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims[None, :] < HEAD_DIM
    # Loaded a turn ahead: rows of a cache can only be fetched early if their addresses are known.
    HAS_FIRST: tl.constexpr = IS_MASKED and (HAS_WINDOW or HAS_KEY_START)
    first_page = _quotient(first_key, PAGE)  # blocks before it need not exist any more
    last_page = _quotient(end - 1, PAGE)
    pages = _load_pages(table_row, start, first_page, last_page, PAGE, BLOCK_N, HAS_FIRST)
    for first in tl.range(start, stop, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        offset = _offsets_in_pages(first, PAGE, BLOCK_N)
        k_pointers = _pointers(k_base, pages, offset, dims, k_stride_block, k_stride_token)
        v_pointers = _pointers(v_base, pages, offset, dims, v_stride_block, v_stride_token)
        if BLOCK_D == HEAD_DIM:
            k = tl.load(k_pointers)
        else:
            k = tl.load(k_pointers, mask=is_dim, other=0)
        if IS_MASKED:
            # What lies outside may be NaN, and 0 * NaN is no 0.
            is_key = (key >= first_key) & (key < end)
            v = tl.load(v_pointers, mask=is_key[:, None] & is_dim, other=0)
        elif BLOCK_D == HEAD_DIM:
            v = tl.load(v_pointers)
        else:
            v = tl.load(v_pointers, mask=is_dim, other=0)
        if SCALE_DIMS == 3:
            page = pages.to(tl.int64)
            key_scale = tl.load(k_scale_base + page * ks_stride_block + offset * ks_stride_token)
            value_scale = tl.load(v_scale_base + page * vs_stride_block + offset * vs_stride_token)
            if IS_MASKED:
                value_scale = tl.where(is_key, value_scale, 0.0)
        following = first + BLOCK_N
        pages = _load_pages(table_row, following, first_page, last_page, PAGE, BLOCK_N, HAS_FIRST)

        scores = tl.dot(q, tl.trans(decode_kv(k, KV_KIND, COMPUTE)), input_precision="ieee")
        if SCALE_DIMS == 3:
            scores *= key_scale[None, :]
        scores = _cap(scores, cap_scale, HAS_SOFT_CAP)
        if IS_MASKED:
            scores = _hide(
                scores, position, key, key_start, tree_rows, window,
                HAS_WINDOW, HAS_KEY_START, TREE_WORDS,
            )  # fmt: skip
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        row_max = new_max
        v = decode_kv(v, KV_KIND, COMPUTE)
        if SCALE_DIMS == 3 and DTYPE == tl.float16:  # noqa: SIM300
            # Small scales would push the weights below what fp16 holds.
            greatest = tl.maximum(tl.max(value_scale, 0), 1e-30)
            weights *= (value_scale / greatest)[None, :]
            acc += greatest * tl.dot(weights.to(DTYPE), v)
        else:
            if SCALE_DIMS == 3:
                weights *= value_scale[None, :]
            acc = tl.dot(weights.to(DTYPE).to(COMPUTE), v, acc, input_precision="ieee")
    return acc, row_sum, row_max


@triton.jit
def _find_tile(query_start_ptr, tile, num_requests, BLOCK_Q: tl.constexpr):
    """Whose tile number ``tile`` is, and which of its tiles.

    Request ``r`` has the numbers from ``query_start[r] // BLOCK_Q + r`` on: enough for all its
    queries, and each request at least one.
    """
    low = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    request = low - 1
    return request, tile - (tl.load(query_start_ptr + request) // BLOCK_Q + request)


@triton.jit(do_not_specialize=["num_requests", "num_tiles", "num_pairs", "pairs_at_once"])
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    query_start_ptr,
    seq_lens_ptr,
    key_start_ptr,
    out_ptr,
    lse_ptr,
    tree_ptr,
    scale,
    cap_scale,
    window,
    num_requests,
    num_tiles,
    num_pairs,
    pairs_at_once,
    table_stride,
    q_stride_token,
    q_stride_head,
    k_stride_block,
    k_stride_token,
    k_stride_head,
    v_stride_block,
    v_stride_token,
    v_stride_head,
    ks_stride_block,
    ks_stride_token,
    ks_stride_head,
    vs_stride_block,
    vs_stride_token,
    vs_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KV_KIND: tl.constexpr,
    SCALE_DIMS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_KEY_START: tl.constexpr,
    TREE_WORDS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    MUST_SEARCH: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    # Pairs of (request, KV head) come in sections whose KV stays in L2; in a section the last tiles
    # of all pairs, which see most keys, go first, and the short ones fill up the end.
    program = tl.program_id(0)
    section = program // (pairs_at_once * num_tiles)
    section_pairs = min(pairs_at_once, num_pairs - section * pairs_at_once)
    rest = program - section * pairs_at_once * num_tiles
    tile = num_tiles - 1 - rest // section_pairs
    pair = section * pairs_at_once + rest % section_pairs
    kv_head = pair % NUM_KV_HEADS
    if MUST_SEARCH:
        request, tile = _find_tile(query_start_ptr, tile, num_requests, BLOCK_Q)
    else:
        request = pair // NUM_KV_HEADS
    query_start = tl.load(query_start_ptr + request)
    num_queries = tl.load(query_start_ptr + request + 1) - query_start
    first_query = tile * BLOCK_Q
    if first_query >= num_queries:
        return
    seq_len = tl.load(seq_lens_ptr + request)

    row = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    query = first_query + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (query < num_queries) & (row < BLOCK_Q * GROUP)
    token = (query_start + query).to(tl.int64)
    q = tl.load(
        q_ptr + (token * q_stride_token + head * q_stride_head)[:, None] + dims[None, :],
        mask=is_row[:, None] & (dims[None, :] < HEAD_DIM),
        other=0.0,
    ).to(COMPUTE)
    context = seq_len - num_queries
    position = context + query
    low_position = context + first_query
    high_position = context + tl.minimum(first_query + BLOCK_Q, num_queries) - 1
    end = high_position + 1

    # Which keys every row sees ends with the first row's own, or before a tree. Windows of nodes
    # begin where they stand in the text of their path, behind the root.
    all_stop = low_position + 1
    tree_rows = None
    if TREE_WORDS > 0:
        node = tl.minimum(token, query_start + num_queries - 1).to(tl.int64)
        tree_rows = tree_ptr + node * (2 + TREE_WORDS)
        root = tl.load(tree_ptr + (query_start + first_query).to(tl.int64) * (2 + TREE_WORDS))
        all_stop = tl.minimum(all_stop, root.to(tl.int32))
        low_position = tl.minimum(low_position, root.to(tl.int32))
    # first_key: what the tile's first row sees first; edge: what its last row sees first.
    first_key = 0
    edge = 0
    key_start = 0
    if HAS_KEY_START:
        key_start = tl.load(key_start_ptr + request)
        first_key = key_start
        edge = key_start
    if HAS_WINDOW:
        first_key = tl.maximum(first_key, low_position - window + 1)
        edge = tl.maximum(edge, high_position - window + 1)
    start = first_key // BLOCK_N * BLOCK_N
    left_stop = tl.minimum(tl.cdiv(edge, BLOCK_N) * BLOCK_N, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    middle_stop = tl.maximum(all_stop // BLOCK_N * BLOCK_N, left_stop)

    k_base = k_ptr + kv_head * k_stride_head
    v_base = v_ptr + kv_head * v_stride_head
    table_row = table_ptr + request.to(tl.int64) * table_stride
    k_scale_base = k_scale_ptr
    v_scale_base = v_scale_ptr
    value_scale = 1.0
    if SCALE_DIMS == 3:
        k_scale_base += kv_head * ks_stride_head
        v_scale_base += kv_head * vs_stride_head
    if SCALE_DIMS == 1:
        key_scale = tl.load(k_scale_ptr + kv_head * ks_stride_head)
        value_scale = tl.load(v_scale_ptr + kv_head * vs_stride_head)
        if HAS_SOFT_CAP:
            cap_scale *= key_scale
        else:
            scale *= key_scale

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], _LEAST, dtype=tl.float32)
    for stretch in tl.static_range(3):
        if stretch == 0:
            begin = start
            stop = left_stop
        elif stretch == 1:
            begin = left_stop
            stop = middle_stop
        else:
            begin = middle_stop
            stop = end
        if stretch > 0 or HAS_WINDOW or HAS_KEY_START:
            acc, row_sum, row_max = _attend_stretch(
                acc,
                row_sum,
                row_max,
                q,
                position,
                begin,
                stop,
                end,
                first_key,
                key_start,
                k_base,
                v_base,
                k_scale_base,
                v_scale_base,
                table_row,
                tree_rows,
                scale,
                cap_scale,
                window,
                k_stride_block,
                k_stride_token,
                v_stride_block,
                v_stride_token,
                ks_stride_block,
                ks_stride_token,
                vs_stride_block,
                vs_stride_token,
                HEAD_DIM,
                BLOCK_D,
                PAGE,
                BLOCK_N,
                KV_KIND,
                SCALE_DIMS,
                HAS_WINDOW,
                HAS_SOFT_CAP,
                HAS_KEY_START,
                TREE_WORDS,
                stretch != 1,
                COMPUTE,
                q_ptr.dtype.element_ty,
            )

    is_empty = row_sum == 0.0
    acc = acc * (value_scale / tl.where(is_empty, 1.0, row_sum))[:, None]
    out_rows = token * (NUM_KV_HEADS * GROUP) + head
    tl.store(
        out_ptr + (out_rows * HEAD_DIM)[:, None] + dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & (dims[None, :] < HEAD_DIM),
    )
    if HAS_LSE:
        log_sum = (row_max + tl.log2(tl.where(is_empty, 1.0, row_sum))) * LN_2
        tl.store(lse_ptr + out_rows, tl.where(is_empty, float("-inf"), log_sum), mask=is_row)
