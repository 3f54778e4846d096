"""Causal attention over a paged cache on the CPU. Semantics: :mod:`kernels.attention`.

A task is a tile of consecutive queries of one request with one KV head: its rows are (query, head
of the group), so each key and value is read once for the whole group. A task walks its keys in
blocks of ``_BLOCK``, with the online softmax of FlashAttention; all sums are fp32. Threads draw
tasks from one counter. Where there are fewer tasks than the threads can share, long key ranges are
split and the partial results merged (flash-decoding).
"""

from __future__ import annotations

import struct
import threading

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.launch import float_argument, int_arguments, kernel, report_fault
from kernels.cpu.pointers import (
    advance,
    exp,
    fetch_add,
    float_pointer,
    helper,
    int32_pointer,
    int64_pointer,
    load,
    load_int,
    pointer,
    store,
    store_int,
)
from kernels.cpu.threads import num_threads
from kernels.cpu.vector import (
    LANES,
    greatest,
    transpose_16x16,
    vadd,
    vfill,
    vfma,
    vload,
    vmax,
    vscale,
    vstore,
)

_BLOCK = 64  # keys a step: four vectors of scores
_TILE_ROWS = 64  # rows of a task, about
_ROWS = 4  # rows that share a load of keys or values
_MIN_SPLIT = 512  # keys: a shorter split costs more than it saves
_PARALLEL_WORK = 1 << 14  # (row, key) pairs, below which one thread is faster

# Fields of a task, all int64.
_REQUEST, _KV_HEAD, _QUERY, _NUM_QUERIES, _POSITION, _KEY, _KEY_STOP, _PART, _NUM_PARTS = range(9)
_TASK_FIELDS = 9

_SUMMARY = struct.Struct("3q")  # numbers of tasks, of partial results, of (row, key) pairs
_local = threading.local()


def paged_attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    *,
    is_invariant: bool = False,
    tree: Tensor | None = None,
) -> Tensor:
    """See :func:`kernels.attention.paged_attend`; ``D`` is a multiple of 16.

    ``is_invariant``: a query's output has the same bits whatever else is in the batch, and however
    many queries of its request are. Keys are never split, and their blocks are counted from key 0.
    """
    num_tokens, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    num_requests, num_pages = block_table.shape
    window = sliding_window or 0
    q0, q1, q_dense = q.stride()
    k0, k1, k2, k_dense = k_cache.stride()
    v0, v1, v2, v_dense = v_cache.stride()
    assert q_dense == k_dense == v_dense == 1 and v_cache.shape == k_cache.shape
    assert head_dim % LANES == 0 and num_heads % num_kv_heads == 0
    assert q.dtype == k_cache.dtype == v_cache.dtype
    _check_integers(block_table, query_start_loc, seq_lens)
    group = num_heads // num_kv_heads
    tile_queries = max(1, min(_TILE_ROWS // group, num_tokens))
    rows = -(-tile_queries * group // _ROWS) * _ROWS
    threads = num_threads()
    min_tasks = 4 * threads if threads > 1 and not is_invariant else 0
    trees = (0, 0)
    if tree is not None:
        assert tree.dtype == torch.int64 and len(tree) == num_tokens and tree.is_contiguous()
        assert not is_invariant
        trees = (tree.data_ptr(), tree.shape[1])
    max_tasks = (num_requests + num_tokens // tile_queries) * num_kv_heads + 2 * min_tasks
    per_thread = -(-(rows * (2 * head_dim + _BLOCK + 3) + LANES * head_dim) // LANES) * LANES
    part_size = rows * (head_dim + 2)
    summary, table, offsets, scratch, parts = _workspace(
        _SUMMARY.size // 8,
        1 + max_tasks * _TASK_FIELDS,
        threads * 2 * _BLOCK,
        threads * per_thread,
        2 * min_tasks * part_size,
    )
    lengths = (query_start_loc.data_ptr(), seq_lens.data_ptr())
    counts = (num_requests, num_kv_heads, group, tile_queries, window, min_tasks)
    pages = (block_table.data_ptr(), block_table.stride(0), block_size)
    limits = (num_tokens, num_pages, k_cache.shape[0])
    alignment = _BLOCK if is_invariant else 1
    plan = (summary, table, *lengths, *counts, alignment, *pages, *limits, *trees)
    _plan(torch.float32, 1, False, *plan)
    num_tasks, num_parts, work = _SUMMARY.unpack_from(_local.summary)

    out = q.new_empty(num_tokens, num_heads, head_dim)
    is_parallel = threads > 1 and num_tasks > 1 and work >= _PARALLEL_WORK
    output = (out.data_ptr(), num_heads * head_dim, head_dim)
    sizes = (head_dim, group, rows, num_tasks, table, parts, part_size)
    queries = (q.data_ptr(), q0, q1)
    caches = (k_cache.data_ptr(), k0, k1, k2, v_cache.data_ptr(), v0, v1, v2)
    rest = (window, offsets, scratch, per_thread, is_invariant, *trees, scale, soft_cap or 0.0)
    count = threads if is_parallel else 1
    _attend(q.dtype, count, is_parallel, *sizes, *output, *queries, *caches, *pages, *rest)
    if num_parts:
        _merge(q.dtype, num_tasks, False, *sizes, *output)
    return out


def _check_integers(block_table: Tensor, query_start_loc: Tensor, seq_lens: Tensor) -> None:
    num_requests, num_pages = block_table.shape
    assert block_table.dtype == query_start_loc.dtype == seq_lens.dtype == torch.int32
    assert query_start_loc.numel() == num_requests + 1 and seq_lens.numel() == num_requests
    assert query_start_loc.is_contiguous() and seq_lens.is_contiguous()
    assert num_pages <= 1 or block_table.stride(1) == 1


def _workspace(*sizes: int) -> list[int]:
    """Addresses of this thread's buffers (three of int64, two of fp32), at least so large."""
    try:
        buffers, addresses = _local.buffers, _local.addresses
    except AttributeError:
        dtypes = (torch.int64, torch.int64, torch.int64, torch.float32, torch.float32)
        buffers = _local.buffers = [torch.empty(0, dtype=dtype) for dtype in dtypes]
        addresses = _local.addresses = [0] * len(buffers)
        _local.sizes = (-1,) * len(buffers)
    if _local.sizes != sizes:
        _local.sizes = sizes
        for index, size in enumerate(sizes):
            if buffers[index].numel() < size:
                buffers[index] = torch.empty(size, dtype=buffers[index].dtype)
                addresses[index] = buffers[index].data_ptr()
        _local.summary = buffers[0].numpy()
    return addresses


@kernel(
    ints=19,
    fault="a request has more queries than there are, more tokens than its row of the block table"
    " has room for, or a block that the cache does not have",
)
def _plan(marker, arguments, begin, end):
    """Fill the table of tasks behind its first entry, the counter from which threads draw.

    Writes the number of tasks, of partial results and of (row, key) pairs to ``summary``.
    """
    values = int_arguments(arguments, 19)
    summary, table, starts, lengths = values[:4]
    num_requests, num_kv_heads, group, tile_queries, window, min_tasks = values[4:10]
    alignment = values[10]
    summary, table = int64_pointer(summary), int64_pointer(table)
    starts, lengths = int32_pointer(starts), int32_pointer(lengths)
    store_int(table, 0, 0)
    num_tiles = _count_tiles(starts, lengths, num_requests, tile_queries, window, values[11:17])
    if num_tiles < 0:
        report_fault(arguments)
        return
    num_unsplit = num_tiles * num_kv_heads
    max_parts = 1
    if 0 < num_unsplit < min_tasks:
        max_parts = (min_tasks + num_unsplit - 1) // num_unsplit
    num_tasks = num_parts = work = 0
    for request in range(num_requests):
        start, stop = load_int(starts, request), load_int(starts, request + 1)
        first_position = load_int(lengths, request) - (stop - start)
        num_tiles = (stop - start + tile_queries - 1) // tile_queries
        for tile in range(num_tiles - 1, -1, -1):  # the longest first, for an even finish
            query = start + tile * tile_queries
            num_queries = min(tile_queries, stop - query)
            position = first_position + tile * tile_queries
            key, key_stop = 0, position + num_queries
            if window:
                key = _first_key(values[17:19], query, position, window)
                key = key // alignment * alignment
            parts = max(1, min(max_parts, (key_stop - key) // _MIN_SPLIT))
            for kv_head in range(num_kv_heads):
                work += num_queries * group * (key_stop - key)
                for part in range(parts):
                    task = advance(table, 1 + num_tasks * _TASK_FIELDS)
                    store_int(task, _REQUEST, request)
                    store_int(task, _KV_HEAD, kv_head)
                    store_int(task, _QUERY, query)
                    store_int(task, _NUM_QUERIES, num_queries)
                    store_int(task, _POSITION, position)
                    store_int(task, _KEY, key + (key_stop - key) * part // parts)
                    store_int(task, _KEY_STOP, key + (key_stop - key) * (part + 1) // parts)
                    store_int(task, _PART, num_parts if parts > 1 else -1)
                    store_int(task, _NUM_PARTS, parts if part == 0 else 0)
                    num_tasks += 1
                    num_parts += parts > 1
    store_int(summary, 0, num_tasks)
    store_int(summary, 1, num_parts)
    store_int(summary, 2, work)


@helper
def _first_key(tree, query, position, window):
    """The first key that queries from ``query`` on may see, which stands at ``position``. Nodes of
    a tree are near its root, wherever they stand."""
    if tree[0]:
        position = min(position, load_int(int64_pointer(tree[0]), query * tree[1]))
    return max(0, position + 1 - window)


@helper
def _count_tiles(starts, lengths, num_requests, tile_queries, window, pages):
    """Number of tiles of all requests; -1 if one of them refers to what does not exist."""
    blocks, block_stride, block_size, num_tokens, num_pages, num_blocks = pages
    num_tiles = 0
    for request in range(num_requests):
        start, stop = load_int(starts, request), load_int(starts, request + 1)
        length = load_int(lengths, request)
        first_position = length - (stop - start)
        if start > stop or stop > num_tokens or (request == 0 and start != 0):
            return -1
        if start == stop:
            continue
        if first_position < 0 or length > num_pages * block_size:
            return -1
        row = advance(int32_pointer(blocks), request * block_stride)
        # Blocks that lie before the first query's window may have been given away.
        first_page = max(0, first_position + 1 - window) // block_size if window else 0
        num_bad = 0
        for page in range(first_page, (length - 1) // block_size + 1):
            block = load_int(row, page)
            num_bad += block < 0 or block >= num_blocks
        if num_bad:
            return -1
        num_tiles += (stop - start + tile_queries - 1) // tile_queries
    return num_tiles


@kernel(ints=31, floats=2)
def _attend(marker, arguments, begin, end):
    """Draw tasks until there are none; the range is that of the threads."""
    values = int_arguments(arguments, 31)
    head_dim, group, max_rows, num_tasks, table, parts, part_size = values[:7]
    output, queries = values[7:10], values[10:13]
    k_cache, v_cache, pages = values[13:17], values[17:21], values[21:24]
    window, offsets, scratch, per_thread, is_invariant = values[24:29]
    tree = values[29:31]
    scale, soft_cap = float_argument(arguments, 31), float_argument(arguments, 32)
    k, v = pointer(k_cache[0], marker), pointer(v_cache[0], marker)
    for thread in range(begin, end):
        k_offsets = advance(int64_pointer(offsets), thread * 2 * _BLOCK)
        v_offsets = advance(k_offsets, _BLOCK)
        acc = advance(float_pointer(scratch), thread * per_thread)
        stats = advance(acc, max_rows * head_dim)
        q = advance(stats, 3 * max_rows)
        scores = advance(q, max_rows * head_dim)
        keys = advance(scores, max_rows * _BLOCK)
        index = fetch_add(int64_pointer(table), 1)
        while index < num_tasks:
            task = advance(int64_pointer(table), 1 + index * _TASK_FIELDS)
            rows = _load_queries(marker, task, queries, group, head_dim, scale, q)
            _reset(acc, stats, max_rows, rows, head_dim)
            stop = load_int(task, _KEY_STOP)
            # Blocks that lie before the first query's window may have been given away.
            least = 0
            if window:
                where = (load_int(task, _QUERY), load_int(task, _POSITION))
                least = _first_key(tree, *where, window)
            for first in range(load_int(task, _KEY), stop, _BLOCK):
                count = min(_BLOCK, stop - first)
                _locate(task, k_cache, v_cache, pages, first, count, least, k_offsets)
                _score(k, k_offsets, count, q, rows, head_dim, keys, scores)
                softmax = (window, soft_cap, is_invariant)
                _weigh(task, group, first, count, softmax, tree, scores, stats, max_rows)
                _add_values(v, v_offsets, count, scores, rows, head_dim, stats, max_rows, acc)
            if load_int(task, _PART) < 0:
                sums = advance(stats, max_rows)
                _write(marker, task, output, group, head_dim, acc, sums)
            else:
                part = advance(float_pointer(parts), load_int(task, _PART) * part_size)
                for j in range(part_size):
                    store(part, j, load(acc, j))
            index = fetch_add(int64_pointer(table), 1)


@helper
def _load_queries(marker, task, queries, group, head_dim, scale, q):
    """Copy a task's rows, scaled, then zeros up to a multiple of ``_ROWS``, which it returns."""
    num_rows = load_int(task, _NUM_QUERIES) * group
    first, kv_head = load_int(task, _QUERY), load_int(task, _KV_HEAD)
    for row in range(num_rows):
        token, head = first + row // group, kv_head * group + row % group
        source = pointer(queries[0], marker)
        source = advance(source, token * queries[1] + head * queries[2])
        for d in range(head_dim):
            store(q, row * head_dim + d, load(source, d) * scale)
    padded = (num_rows + _ROWS - 1) // _ROWS * _ROWS
    for j in range(num_rows * head_dim, padded * head_dim):
        store(q, j, np.float32(0))
    return padded


@helper
def _reset(acc, stats, max_rows, rows, head_dim):
    """No output yet; for each row a greatest score, a sum of weights, and the next factor."""
    for j in range(rows * head_dim):
        store(acc, j, np.float32(0))
    for row in range(rows):
        store(stats, row, np.float32(-np.inf))
        store(stats, max_rows + row, np.float32(0))
        store(stats, 2 * max_rows + row, np.float32(1))


@helper
def _locate(task, k_cache, v_cache, pages, first, count, least, offsets):
    """Offsets of ``count`` keys in their cache and, from ``_BLOCK`` on, of the values.

    Behind them the last one stands again, up to a whole vector, so that those reads are valid, and
    in front of key ``least``, that one.
    """
    table, table_stride, block_size = pages
    blocks = advance(int32_pointer(table), load_int(task, _REQUEST) * table_stride)
    head = load_int(task, _KV_HEAD)
    page, within = max(first, least) // block_size, max(first, least) % block_size
    block = load_int(blocks, page)
    for j in range((count + LANES - 1) // LANES * LANES):
        store_int(offsets, j, block * k_cache[1] + within * k_cache[2] + head * k_cache[3])
        value = block * v_cache[1] + within * v_cache[2] + head * v_cache[3]
        store_int(offsets, _BLOCK + j, value)
        if least <= first + j and j + 1 < count:
            within += 1
            if within == block_size:
                page, within = page + 1, 0
                block = load_int(blocks, page)


@helper
def _score(k, offsets, count, q, rows, head_dim, keys, scores):
    """``scores [rows, _BLOCK] = q [rows, head_dim] @ keys.T``, 16 keys and 4 rows at a time."""
    for j in range(0, count, LANES):
        for d in range(0, head_dim, LANES):
            transpose_16x16(advance(k, d), advance(offsets, j), advance(keys, d * LANES))
        for row in range(0, rows, _ROWS):
            q0 = advance(q, row * head_dim)
            q1, q2, q3 = advance(q0, head_dim), advance(q0, 2 * head_dim), advance(q0, 3 * head_dim)
            # Two sums a row, so that no FMA waits for the one before it
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = vfill(np.float32(0))
            for d in range(0, head_dim, 2):
                x, y = vload(keys, d * LANES), vload(keys, (d + 1) * LANES)
                a0, b0 = vfma(load(q0, d), x, a0), vfma(load(q0, d + 1), y, b0)
                a1, b1 = vfma(load(q1, d), x, a1), vfma(load(q1, d + 1), y, b1)
                a2, b2 = vfma(load(q2, d), x, a2), vfma(load(q2, d + 1), y, b2)
                a3, b3 = vfma(load(q3, d), x, a3), vfma(load(q3, d + 1), y, b3)
            out = advance(scores, row * _BLOCK + j)
            vstore(out, 0, vadd(a0, b0))
            vstore(out, _BLOCK, vadd(a1, b1))
            vstore(out, 2 * _BLOCK, vadd(a2, b2))
            vstore(out, 3 * _BLOCK, vadd(a3, b3))


@helper
def _weigh(task, group, first, count, softmax, tree, scores, stats, max_rows):
    """Turn scores into weights relative to each row's greatest score so far; 0 where masked."""
    window, soft_cap, is_invariant = softmax
    # How a sum is cut into vectors follows from its length.
    width = _BLOCK if is_invariant else (count + LANES - 1) // LANES * LANES
    for row in range(load_int(task, _NUM_QUERIES) * group):
        position = load_int(task, _POSITION) + row // group - first
        low = max(0, position + 1 - window) if window else 0
        high = min(count, position + 1)
        s = advance(scores, row * _BLOCK)
        token = load_int(task, _QUERY) + row // group
        if tree[0]:
            low, high = _range_of_node(tree, token, first, low, high, window)
        old = load(stats, row)
        new = old
        if low < high:
            if soft_cap != 0:
                for j in range(width):  # cap * tanh(s / cap)
                    e = exp(load(s, j) * (np.float32(2) / soft_cap))
                    store(s, j, soft_cap - np.float32(2) * soft_cap / (e + np.float32(1)))
            for j in range(low):
                store(s, j, np.float32(-np.inf))
            for j in range(high, width):
                store(s, j, np.float32(-np.inf))
            if tree[0]:
                nodes = advance(int64_pointer(tree[0]), token * tree[1])
                start = load_int(nodes, 0) - first
                for j in range(max(low, start), high):
                    if not _sees(nodes, j - start):
                        store(s, j, np.float32(-np.inf))
            best = vload(s, 0)
            for j in range(LANES, width, LANES):
                best = vmax(best, vload(s, j))
            new = max(old, greatest(best))
            total = np.float32(0)
            for j in range(width):
                weight = exp(load(s, j) - new)
                total += weight
                store(s, j, weight)
            if is_invariant:  # what is masked weighs 1e-38 until here
                for j in range(low):
                    store(s, j, np.float32(0))
                for j in range(high, width):
                    store(s, j, np.float32(0))
        else:
            total = np.float32(0)
            for j in range(width):
                store(s, j, np.float32(0))
        factor = exp(old - new) if low < high else np.float32(1)
        store(stats, row, new)
        store(stats, max_rows + row, load(stats, max_rows + row) * factor + total)
        store(stats, 2 * max_rows + row, factor)


@helper
def _range_of_node(tree, token, first, low, high, window):
    """From which to which of the keys from ``first`` on a query sees any; none where it does not
    see one."""
    row = advance(int64_pointer(tree[0]), token * tree[1])
    start = load_int(row, 0)
    if window and load_int(row, 1):
        low = max(0, min(start + load_int(row, 1) - window, start) - first)
    sees = low < min(high, start - first)
    for j in range(max(low, start - first), high):
        sees |= _sees(row, first + j - start)
    return low, high if sees else low


@helper
def _sees(row, node):
    return (load_int(row, 2 + node // 64) >> (node % 64)) & 1 != 0


@helper
def _add_values(v, offsets, count, weights, rows, head_dim, stats, max_rows, acc):
    """``acc = factor * acc + weights [rows, count] @ values``, 4 rows and 16 columns at a time."""
    even = count // 2 * 2
    for row in range(0, rows, _ROWS):
        w0 = advance(weights, row * _BLOCK)
        w1, w2, w3 = advance(w0, _BLOCK), advance(w0, 2 * _BLOCK), advance(w0, 3 * _BLOCK)
        factors = advance(stats, 2 * max_rows + row)
        for d in range(0, head_dim, LANES):
            column, out = advance(v, d), advance(acc, row * head_dim + d)
            a0 = vscale(load(factors, 0), vload(out, 0))
            a1 = vscale(load(factors, 1), vload(out, head_dim))
            a2 = vscale(load(factors, 2), vload(out, 2 * head_dim))
            a3 = vscale(load(factors, 3), vload(out, 3 * head_dim))
            b0 = b1 = b2 = b3 = vfill(np.float32(0))
            for j in range(0, even, 2):
                x = vload(column, load_int(offsets, j))
                y = vload(column, load_int(offsets, j + 1))
                a0, b0 = vfma(load(w0, j), x, a0), vfma(load(w0, j + 1), y, b0)
                a1, b1 = vfma(load(w1, j), x, a1), vfma(load(w1, j + 1), y, b1)
                a2, b2 = vfma(load(w2, j), x, a2), vfma(load(w2, j + 1), y, b2)
                a3, b3 = vfma(load(w3, j), x, a3), vfma(load(w3, j + 1), y, b3)
            if even < count:
                x = vload(column, load_int(offsets, even))
                a0, a1 = vfma(load(w0, even), x, a0), vfma(load(w1, even), x, a1)
                a2, a3 = vfma(load(w2, even), x, a2), vfma(load(w3, even), x, a3)
            vstore(out, 0, vadd(a0, b0))
            vstore(out, head_dim, vadd(a1, b1))
            vstore(out, 2 * head_dim, vadd(a2, b2))
            vstore(out, 3 * head_dim, vadd(a3, b3))


@helper
def _write(marker, task, output, group, head_dim, acc, sums):
    """Write a task's rows to the output, each divided by its sum."""
    for row in range(load_int(task, _NUM_QUERIES) * group):
        token = load_int(task, _QUERY) + row // group
        head = load_int(task, _KV_HEAD) * group + row % group
        target = advance(pointer(output[0], marker), token * output[1] + head * output[2])
        scale = np.float32(1) / load(sums, row)
        for d in range(head_dim):
            store(target, d, load(acc, row * head_dim + d) * scale)


@kernel(ints=10)
def _merge(marker, arguments, begin, end):
    """Combine the partial results of each split task, by the rule of the online softmax."""
    values = int_arguments(arguments, 10)
    head_dim, group, max_rows, _, table, parts, part_size = values[:7]
    for index in range(begin, end):
        task = advance(int64_pointer(table), 1 + index * _TASK_FIELDS)
        num_parts = load_int(task, _NUM_PARTS)
        if num_parts <= 1:
            continue
        acc = advance(float_pointer(parts), load_int(task, _PART) * part_size)
        stats = advance(acc, max_rows * head_dim)
        for p in range(1, num_parts):
            other = advance(acc, p * part_size)
            other_stats = advance(other, max_rows * head_dim)
            for row in range(load_int(task, _NUM_QUERIES) * group):
                best = max(load(stats, row), load(other_stats, row))
                a, b = exp(load(stats, row) - best), exp(load(other_stats, row) - best)
                store(stats, row, best)
                total = load(stats, max_rows + row) * a + load(other_stats, max_rows + row) * b
                store(stats, max_rows + row, total)
                for d in range(row * head_dim, (row + 1) * head_dim):
                    store(acc, d, load(acc, d) * a + load(other, d) * b)
        _write(marker, task, values[7:10], group, head_dim, acc, advance(stats, max_rows))
