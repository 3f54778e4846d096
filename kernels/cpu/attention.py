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
_TASK_FIELDS = 8
_PARALLEL_WORK = 1 << 14  # (row, key) pairs, below which one thread is faster

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
    num_requests, _ = block_table.shape
    q0, q1, q2 = q.stride()
    k0, k1, k2, k3 = k_cache.stride()
    v0, v1, v2, v3 = v_cache.stride()
    assert q2 == k3 == v3 == 1 and head_dim % LANES == 0 and num_heads % num_kv_heads == 0
    assert q.dtype == k_cache.dtype == v_cache.dtype
    out = q.new_empty(num_tokens, num_heads, head_dim)
    group = num_heads // num_kv_heads
    tile_queries = max(1, _TILE_ROWS // group)
    threads = num_threads()
    max_tiles = num_requests + num_tokens // tile_queries
    min_tasks = 4 * threads if threads > 1 else 0
    max_tasks = max_tiles * num_kv_heads + 2 * min_tasks
    rows = -(-tile_queries * group // _ROWS) * _ROWS
    floats_per_thread = rows * (2 * head_dim + _BLOCK + 3) + _BLOCK * head_dim
    table, scratch, partials = _workspace(
        max_tasks * _TASK_FIELDS + 1 + threads * 2 * _BLOCK,
        threads * floats_per_thread,
        2 * min_tasks * rows * (head_dim + 2),
    )
    num_tasks, num_partials, work = _plan(
        table,
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        num_requests,
        num_kv_heads,
        group,
        tile_queries,
        sliding_window or 0,
        min_tasks,
    )
    if work < _PARALLEL_WORK or num_tasks == 1:
        threads = 1
    (_run_parallel if threads > 1 else _run_serial)(
        MARKERS[q.dtype],
        threads,
        (num_tasks, head_dim, group, block_size, sliding_window or 0),
        (table, scratch, floats_per_thread, partials, rows),
        (q.data_ptr(), q0, q1, out.data_ptr(), num_heads * head_dim),
        (block_table.data_ptr(), block_table.stride(0)),
        (k_cache.data_ptr(), k0, k1, k2, v_cache.data_ptr(), v0, v1, v2),
        scale,
        soft_cap or 0.0,
    )
    if num_partials:
        ...
    return out
