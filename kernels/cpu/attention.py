"""Causal attention over a paged cache on the CPU. Semantics: :mod:`kernels.attention`.

A task is a tile of consecutive queries of one request with one KV head: its rows are (query, head of the group), so each
key and value is read once for the whole group. A task walks its keys in blocks of ``_BLOCK``, with the online
softmax of FlashAttention; all sums are fp32. Threads draw tasks from one counter. Where there are fewer tasks than the threads can
share, long key ranges are split and the partial results merged (flash-decoding).
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from numba import prange
from torch import Tensor

from kernels.cpu.pointers import (
    MARKERS,
    advance,
    entry,
    exp,
    fetch_add,
    helper,
    load,
    load_int,
    parallel_entry,
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

_local = threading.local()


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """See :func:`kernels.attention.paged_attention`; ``D`` is a multiple of 16."""
    num_tokens, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = k_cache.shape
    num_requests = block_table.shape[0]
    q0, q1, q2 = q.stride()
    k0, k1, k2, k3 = k_cache.stride()
    v0, v1, v2, v3 = v_cache.stride()
    assert q2 == k3 == v3 == 1 and head_dim % LANES == 0 and num_heads % num_kv_heads == 0
    assert q.dtype == k_cache.dtype == v_cache.dtype
    out = q.new_empty(num_tokens, num_heads, head_dim)
    group = num_heads // num_kv_heads
    tile_queries = max(1, min(_TILE_ROWS // group, num_tokens))
    rows = -(-tile_queries * group // _ROWS) * _ROWS
    threads = num_threads()
    min_tasks = 4 * threads if threads > 1 else 0
    num_tiles = num_requests + num_tokens // tile_queries
    per_thread = -(-(rows * (2 * head_dim + _BLOCK + 3) + _BLOCK * head_dim) // LANES) * LANES
    part_size = rows * (head_dim + 2)
    table, offsets, scratch, parts = _workspace(
        (num_tiles * num_kv_heads + 2 * min_tasks) * _TASK_FIELDS + 1,
        threads * 2 * _BLOCK,
        threads * per_thread,
        2 * min_tasks * part_size,
    )
    num_tasks, num_parts, work = _plan(
        table,
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        (num_requests, num_kv_heads, group, tile_queries, sliding_window or 0, min_tasks),
    )
    is_parallel = threads > 1 and num_tasks > 1 and work >= _PARALLEL_WORK
    tensors = (
        (q.data_ptr(), q0, q1, out.data_ptr(), num_heads * head_dim, head_dim)
        + (k_cache.data_ptr(), k0, k1, k2, v_cache.data_ptr(), v0, v1, v2)
        + (block_table.data_ptr(), block_table.stride(0), block_size)
    )
    (_run_parallel if is_parallel else _run_serial)(
        MARKERS[q.dtype],
        threads,
        num_tasks,
        (head_dim, group, sliding_window or 0, rows),
        tensors,
        (table, offsets, scratch, per_thread, parts, part_size),
        scale,
        soft_cap or 0.0,
    )
    if num_parts:
        _merge(
            MARKERS[q.dtype], num_tasks, (head_dim, group, rows), tensors, table, parts, part_size
        )
    return out


def _workspace(*sizes: int) -> tuple[int, int, int, int]:
    """Addresses of this thread's buffers of int64, int64, fp32 and fp32, of at least the sizes asked for."""
    buffers = getattr(_local, "buffers", None)
    if buffers is None or any(b.numel() < size for b, size in zip(buffers, sizes, strict=True)):
        dtypes = (torch.int64, torch.int64, torch.float32, torch.float32)
        buffers = [torch.empty(n, dtype=d) for n, d in zip(sizes, dtypes, strict=True)]
        _local.buffers = buffers
        _local.addresses = tuple(b.data_ptr() for b in buffers)
    return _local.addresses


@entry
def _plan(table, query_start_loc, seq_lens, sizes):
    """Fill the table of tasks behind its first entry, the counter from which threads draw.

    Returns the number of tasks, of partial results, and of (row, key) pairs.
    """
    num_requests, num_kv_heads, group, tile_queries, window, min_tasks = sizes
    table = pointer(table, np.int64(0))
    starts, lengths = pointer(query_start_loc, np.int32(0)), pointer(seq_lens, np.int32(0))
    store_int(table, 0, 0)
    num_unsplit = 0
    for request in range(num_requests):
        num_queries = load_int(starts, request + 1) - load_int(starts, request)
        num_unsplit += (num_queries + tile_queries - 1) // tile_queries * num_kv_heads
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
                key = max(0, position + 1 - window)
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
    return num_tasks, num_parts, work


@entry
def _run_serial(marker, threads, num_tasks, sizes, tensors, workspace, scale, soft_cap):
    _draw_tasks(marker, 0, num_tasks, sizes, tensors, workspace, scale, soft_cap)


@parallel_entry
def _run_parallel(marker, threads, num_tasks, sizes, tensors, workspace, scale, soft_cap):
    for thread in prange(threads):
        _draw_tasks(marker, thread, num_tasks, sizes, tensors, workspace, scale, soft_cap)


@helper
def _draw_tasks(marker, thread, num_tasks, sizes, tensors, workspace, scale, soft_cap):
    table, offsets, scratch, per_thread, parts, part_size = workspace
    table = pointer(table, np.int64(0))
    offsets = advance(pointer(offsets, np.int64(0)), thread * 2 * _BLOCK)
    scratch = advance(pointer(scratch, np.float32(0)), thread * per_thread)
    parts = pointer(parts, np.float32(0))
    index = fetch_add(table, 1)
    while index < num_tasks:
        task = advance(table, 1 + index * _TASK_FIELDS)
        _attend(marker, task, sizes, tensors, offsets, scratch, np.float32(scale), np.float32(soft_cap))
        _finish(marker, task, sizes, tensors, scratch, parts, part_size)
        index = fetch_add(table, 1)


@helper
def _attend(marker, task, sizes, tensors, offsets, scratch, scale, soft_cap):
    """Leave the unnormalised output, the greatest score and the sum of each row of a task in ``scratch``."""
    head_dim, group, window, max_rows = sizes
    acc, maxima, sums, factors, q, scores, keys = _layout(scratch, max_rows, head_dim)
    num_rows = load_int(task, _NUM_QUERIES) * group
    padded = (num_rows + _ROWS - 1) // _ROWS * _ROWS
    _load_queries(marker, task, tensors, group, head_dim, padded, scale, q)
    for j in range(padded * head_dim):
        store(acc, j, np.float32(0))
    for row in range(padded):
        store(maxima, row, np.float32(-np.inf))
        store(sums, row, np.float32(0))
        store(factors, row, np.float32(1))
    value_offsets = advance(offsets, _BLOCK)
    k, v = pointer(tensors[6], marker), pointer(tensors[10], marker)
    stop = load_int(task, _KEY_STOP)
    for first in range(load_int(task, _KEY), stop, _BLOCK):
        count = min(_BLOCK, stop - first)
        width = (count + LANES - 1) // LANES * LANES
        _locate(task, tensors, first, width, stop, offsets)
        for j in range(0, width, LANES):
            for d in range(0, head_dim, LANES):
                target = advance(keys, j * head_dim + d * LANES)
                transpose_16x16(advance(k, d), advance(offsets, j), target)
        for row in range(0, padded, _ROWS):
            for j in range(0, width, LANES):
                target = advance(scores, row * _BLOCK + j)
                _dot_keys(advance(q, row * head_dim), advance(keys, j * head_dim), target, head_dim)
        for row in range(num_rows):
            position = load_int(task, _POSITION) + row // group - first
            low = max(0, position + 1 - window) if window else 0
            high = min(count, position + 1)
            row_scores = advance(scores, row * _BLOCK)
            _softmax(row_scores, width, low, high, soft_cap, row, maxima, sums, factors)
        for row in range(0, padded, _ROWS):
            for d in range(0, head_dim, LANES):
                target = advance(acc, row * head_dim + d)
                _add_values(
                    advance(scores, row * _BLOCK), advance(v, d), value_offsets, count,
                    advance(factors, row), target, head_dim,
                )  # fmt: skip


@helper
def _layout(scratch, max_rows, head_dim):
    """The parts of a thread's scratch memory."""
    acc = scratch
    maxima = advance(acc, max_rows * head_dim)
    sums = advance(maxima, max_rows)
    factors = advance(sums, max_rows)
    q = advance(factors, max_rows)
    scores = advance(q, max_rows * head_dim)
    keys = advance(scores, max_rows * _BLOCK)
    return acc, maxima, sums, factors, q, scores, keys


@helper
def _load_queries(marker, task, tensors, group, head_dim, padded, scale, q):
    """Copy the scaled rows of a task, and zeros after them."""
    address, token_stride, head_stride = tensors[0], tensors[1], tensors[2]
    num_rows = load_int(task, _NUM_QUERIES) * group
    for row in range(padded):
        target = advance(q, row * head_dim)
        if row < num_rows:
            token = load_int(task, _QUERY) + row // group
            head = load_int(task, _KV_HEAD) * group + row % group
            source = advance(pointer(address, marker), token * token_stride + head * head_stride)
            for d in range(head_dim):
                store(target, d, load(source, d) * scale)
        else:
            for d in range(head_dim):
                store(target, d, np.float32(0))


@helper
def _locate(task, tensors, first, width, stop, offsets):
    """Offsets of ``width`` keys in their cache, then those of the values; past the end the last one again."""
    k0, k1, k2 = tensors[7], tensors[8], tensors[9]
    v0, v1, v2 = tensors[11], tensors[12], tensors[13]
    table_address, table_stride, block_size = tensors[14], tensors[15], tensors[16]
    blocks = advance(pointer(table_address, np.int32(0)), load_int(task, _REQUEST) * table_stride)
    head = load_int(task, _KV_HEAD)
    page, within = first // block_size, first % block_size
    block = load_int(blocks, page)
    for j in range(width):
        store_int(offsets, j, block * k0 + within * k1 + head * k2)
        store_int(offsets, _BLOCK + j, block * v0 + within * v1 + head * v2)
        if first + j + 1 < stop:
            within += 1
            if within == block_size:
                page, within = page + 1, 0
                block = load_int(blocks, page)


@helper
def _dot_keys(q, keys, out, depth):
    """Scores of 4 rows with 16 keys: ``q [4, depth]``, ``keys [depth, 16]`` -> ``out`` (rows ``_BLOCK`` apart)."""
    q1, q2, q3 = advance(q, depth), advance(q, 2 * depth), advance(q, 3 * depth)
    zero = vfill(np.float32(0))
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zero  # two sums a row, so that no FMA waits for the last
    for d in range(0, depth, 2):
        x = vload(keys, d * LANES)
        a0, a1 = vfma(load(q, d), x, a0), vfma(load(q1, d), x, a1)
        a2, a3 = vfma(load(q2, d), x, a2), vfma(load(q3, d), x, a3)
        y = vload(keys, d * LANES + LANES)
        b0, b1 = vfma(load(q, d + 1), y, b0), vfma(load(q1, d + 1), y, b1)
        b2, b3 = vfma(load(q2, d + 1), y, b2), vfma(load(q3, d + 1), y, b3)
    vstore(out, 0, vadd(a0, b0))
    vstore(out, _BLOCK, vadd(a1, b1))
    vstore(out, 2 * _BLOCK, vadd(a2, b2))
    vstore(out, 3 * _BLOCK, vadd(a3, b3))


@helper
def _softmax(scores, width, low, high, soft_cap, row, maxima, sums, factors):
    """Turn one row's scores into weights relative to the new maximum, those outside ``low .. high - 1`` into 0."""
    if high <= low:
        for j in range(width):
            store(scores, j, np.float32(0))
        store(factors, row, np.float32(1))
        return
    if soft_cap != 0:
        for j in range(width):  # cap * tanh(s / cap)
            e = exp(load(scores, j) * (np.float32(2) / soft_cap))
            store(scores, j, soft_cap - np.float32(2) * soft_cap / (e + np.float32(1)))
    for j in range(low):
        store(scores, j, np.float32(-np.inf))
    for j in range(high, width):
        store(scores, j, np.float32(-np.inf))
    best = vload(scores, 0)
    for j in range(LANES, width, LANES):
        best = vmax(best, vload(scores, j))
    old = load(maxima, row)
    new = max(old, greatest(best))
    total = np.float32(0)
    for j in range(width):
        weight = exp(load(scores, j) - new)
        total += weight
        store(scores, j, weight)
    factor = exp(old - new)
    store(maxima, row, new)
    store(sums, row, load(sums, row) * factor + total)
    store(factors, row, factor)


@helper
def _add_values(weights, values, offsets, count, factors, acc, stride):
    """``acc = factor * acc + weights @ values`` for 4 rows and 16 columns."""
    w1, w2, w3 = (
        advance(weights, _BLOCK),
        advance(weights, 2 * _BLOCK),
        advance(weights, 3 * _BLOCK),
    )
    a0 = vscale(load(factors, 0), vload(acc, 0))
    a1 = vscale(load(factors, 1), vload(acc, stride))
    a2 = vscale(load(factors, 2), vload(acc, 2 * stride))
    a3 = vscale(load(factors, 3), vload(acc, 3 * stride))
    b0 = b1 = b2 = b3 = vfill(np.float32(0))
    even = count // 2 * 2
    for j in range(0, even, 2):
        x = vload(values, load_int(offsets, j))
        a0, a1 = vfma(load(weights, j), x, a0), vfma(load(w1, j), x, a1)
        a2, a3 = vfma(load(w2, j), x, a2), vfma(load(w3, j), x, a3)
        y = vload(values, load_int(offsets, j + 1))
        b0, b1 = vfma(load(weights, j + 1), y, b0), vfma(load(w1, j + 1), y, b1)
        b2, b3 = vfma(load(w2, j + 1), y, b2), vfma(load(w3, j + 1), y, b3)
    if even < count:
        x = vload(values, load_int(offsets, even))
        a0, a1 = vfma(load(weights, even), x, a0), vfma(load(w1, even), x, a1)
        a2, a3 = vfma(load(w2, even), x, a2), vfma(load(w3, even), x, a3)
    vstore(acc, 0, vadd(a0, b0))
    vstore(acc, stride, vadd(a1, b1))
    vstore(acc, 2 * stride, vadd(a2, b2))
    vstore(acc, 3 * stride, vadd(a3, b3))


@helper
def _finish(marker, task, sizes, tensors, scratch, parts, part_size):
    """Write a task's rows: normalised to the output, or as they are to its partial result."""
    head_dim, group, _, max_rows = sizes
    acc, maxima, sums, _, _, _, _ = _layout(scratch, max_rows, head_dim)
    num_rows = load_int(task, _NUM_QUERIES) * group
    part = load_int(task, _PART)
    if part < 0:
        for row in range(num_rows):
            target = _output_row(marker, task, tensors, group, row)
            scale = np.float32(1) / load(sums, row)
            for d in range(head_dim):
                store(target, d, load(acc, row * head_dim + d) * scale)
    else:
        target = advance(parts, part * part_size)
        for j in range(max_rows * head_dim + 2 * max_rows):  # the three are adjacent in both
            store(target, j, load(acc, j))


@helper
def _output_row(marker, task, tensors, group, row):
    token = load_int(task, _QUERY) + row // group
    head = load_int(task, _KV_HEAD) * group + row % group
    return advance(pointer(tensors[3], marker), token * tensors[4] + head * tensors[5])


@entry
def _merge(marker, num_tasks, sizes, tensors, table, parts, part_size):
    """Combine the partial results of each split task, weighted by the exponentials of their maxima."""
    head_dim, group, max_rows = sizes
    table, parts = pointer(table, np.int64(0)), pointer(parts, np.float32(0))
    for index in range(num_tasks):
        task = advance(table, 1 + index * _TASK_FIELDS)
        num_parts = load_int(task, _NUM_PARTS)
        if num_parts <= 1:
            continue
        first = advance(parts, load_int(task, _PART) * part_size)
        for row in range(load_int(task, _NUM_QUERIES) * group):
            best = np.float32(-np.inf)
            for p in range(num_parts):
                best = max(best, load(first, p * part_size + max_rows * head_dim + row))
            total = np.float32(0)
            merged = advance(first, row * head_dim)
            for p in range(num_parts):
                part = advance(first, p * part_size)
                factor = exp(load(part, max_rows * head_dim + row) - best)
                total += factor * load(part, max_rows * head_dim + max_rows + row)
                part = advance(part, row * head_dim)
                for d in range(head_dim):
                    kept = np.float32(0) if p == 0 else load(merged, d)
                    store(merged, d, kept + factor * load(part, d))
            target = _output_row(marker, task, tensors, group, row)
            for d in range(head_dim):
                store(target, d, load(merged, d) / total)
