"""Causal attention of packed queries of any lengths over a paged KV cache, in Triton.

One kernel serves whole prompts, pieces of prompts, drafts and single tokens, mixed in any way. This
module checks what it is given and shapes the launch; :mod:`kernels.triton.prefill_kernel` has the
device's side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.attention import check_caches
from kernels.quantized_kv import is_quantized
from kernels.triton import DTYPES, MAX_HEAD_DIM, num_multiprocessors
from kernels.triton.launch import Launcher, planned
from kernels.triton.numbers import as_bits, compute_dtype, kind_of, scale_strides
from kernels.triton.prefill_kernel import prefill_kernel

# KV that the pairs of requests and KV heads running at a time may read over and over from L2.
_L2_BYTES = 8 << 20
# Rows of a request from which tiles of 256 pay: the first and the last turns of a long walk, in
# which nothing else runs on a multiprocessor, weigh little. Two programs that share one look up
# their blocks twice, which large blocks make cheap.
_MANY_ROWS = 16384


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """Shape of a program.

    Attributes
    ----------
    num_rows
        Rows of queries: tokens times the query heads of a KV head.
    num_keys
        Keys at a time.
    max_registers
        Registers a thread, where two programs are to share a multiprocessor.
    """

    num_rows: int
    num_keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    max_query_len: int,
    key_start: Tensor | None = None,
    return_lse: bool = False,
    tree: Tensor | None = None,
    tiles: PrefillTiles | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every query to its request's cached keys up to and including its own position.

    Nothing here waits for the device: the grid follows from shapes and ``max_query_len``.

    Parameters
    ----------
    q : Tensor [T, Hq, D]
        Queries of all requests one after another; fp16, bf16 or fp32, the last dimension dense.
    k_cache, v_cache : Tensor [num_blocks, block_size, Hkv, D]
        In the dtype of ``q``, or int8 or fp8 (e4m3) with scales. The last dimension dense.
    block_table : Tensor [B, P] int32
        Blocks of each request in order; entries past its length are not read.
    query_start_loc : Tensor [B + 1] int32
        Where each request's queries begin in ``q``.
    seq_lens : Tensor [B] int32
        Length of each request's sequence including its queries, which are its last tokens.
    scale : float
        Factor on the scores.
    sliding_window : int or None
        A query sees itself and at most ``sliding_window - 1`` tokens before it.
    soft_cap : float or None
        Scores become ``soft_cap * tanh(score / soft_cap)``.
    k_scale, v_scale : Tensor [num_blocks, block_size, Hkv] or [Hkv] fp32, or None
        Scales of a quantised cache (:mod:`kernels.quantized_kv`).
    max_query_len : int
        At least the longest query of the batch.
    key_start : Tensor [B] int32, or None
        Keys before it are skipped (the suffix pass of cascade attention).
    return_lse : bool
        Return the log-sum-exp of the scores as well.
    tree : Tensor [T, 2 + W] int64, or None
        Which of the last tokens of its sequence a query sees (:mod:`kernels.tree_attention`).
    tiles : PrefillTiles or None
        Shape of a program; None takes what was found to be fast.

    Returns
    -------
    Tensor [T, Hq, D], or (Tensor [T, Hq, D], Tensor [T, Hq] fp32)
        Output in the dtype of ``q``, contiguous; the natural log-sum-exp. A row that sees no key is
        0 and ``-inf``.

    Raises
    ------
    ValueError
        A dtype, head size or scale that the kernel does not take.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    if len(q) and len(seq_lens):
        caches = (k_cache, v_cache, k_scale, v_scale)
        lengths = (block_table, query_start_loc, seq_lens, key_start)
        masks = (sliding_window, soft_cap)
        _prefill((q, *caches, *lengths, out, lse, tree), scale, *masks, max_query_len, tiles)
    return out if lse is None else (out, lse)


@planned
def _prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    _query_start_loc: Tensor,
    _seq_lens: Tensor,
    key_start: Tensor | None,
    _out: Tensor,
    lse: Tensor | None,
    tree: Tensor | None,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    max_query_len: int,
    tiles: PrefillTiles | None,
) -> Launcher:
    _check(q, k_cache, v_cache, k_scale, v_scale)
    assert tree is None or (tree.is_contiguous() and len(tree) == len(q))
    num_tokens, num_heads, head_dim = q.shape
    num_requests = block_table.shape[0]
    num_kv_heads, block_size = k_cache.shape[2], k_cache.shape[1]
    group = num_heads // num_kv_heads
    if tiles is None:
        tiles = choose_tiles(q, k_cache, num_requests, max_query_len)
    queries_per_tile = max(1, tiles.num_rows // group)
    # One tile a program where all queries are about as long; else tiles are numbered over the
    # packed tokens, and a program looks up whose tile it has.
    regular = num_requests * triton.cdiv(max_query_len, queries_per_tile)
    packed = num_tokens // queries_per_tile + num_requests
    must_search = regular > packed + packed // 4
    num_tiles = packed if must_search else triton.cdiv(max_query_len, queries_per_tile)
    num_pairs = num_kv_heads * (1 if must_search else num_requests)
    kv_bytes = 2 * block_table.shape[1] * block_size * head_dim * k_cache.element_size()
    return Launcher(
        prefill_kernel,
        (num_pairs * num_tiles,),
        (scale if soft_cap is None else soft_cap) / math.log(2.0),
        0.0 if soft_cap is None else scale / soft_cap,
        0 if sliding_window is None else sliding_window,
        num_requests,
        num_tiles,
        num_pairs,
        max(1, min(num_pairs, _L2_BYTES // max(1, kv_bytes))),
        block_table.stride(0),
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *scale_strides(k_scale),
        *scale_strides(v_scale),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        PAGE=block_size,
        BLOCK_M=tiles.num_rows,
        BLOCK_Q=queries_per_tile,
        BLOCK_N=tiles.num_keys,
        KV_KIND=kind_of(k_cache),
        SCALE_DIMS=0 if k_scale is None else k_scale.dim(),
        HAS_WINDOW=sliding_window is not None,
        HAS_SOFT_CAP=soft_cap is not None,
        HAS_KEY_START=key_start is not None,
        TREE_WORDS=0 if tree is None else tree.shape[1] - 2,
        HAS_LSE=lse is not None,
        MUST_SEARCH=must_search,
        COMPUTE=compute_dtype(q.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
        seen_as=as_bits,
    )


def choose_tiles(q: Tensor, k_cache: Tensor, num_requests: int, max_query_len: int) -> PrefillTiles:
    """The program's shape for these tensors: as many rows as the queries fill.

    Found by timing on an H100 (``experiments/gpu_prefill.py``, ``--tiles``).
    """
    group, dim = q.shape[1] // k_cache.shape[2], q.shape[2]
    rows = max(16, triton.next_power_of_2(max_query_len * group))
    is_long = rows >= _MANY_ROWS and k_cache.shape[1] < 64
    if q.dtype == torch.float32:
        wide = PrefillTiles(32, 32, 4, 2) if dim > 64 else PrefillTiles(64, 32, 4, 2)
    elif dim > 128:
        wide = PrefillTiles(64, 32, 4, 2)
    elif is_quantized(k_cache):  # rows of 8 bits are widened on their way: no use in more of them
        wide = PrefillTiles(128, 32, 8, 2)
    elif dim <= 64:
        wide = PrefillTiles(128, 64, 8, 3)
    elif is_long and _fills_wide_programs(q, group, num_requests):
        wide = PrefillTiles(256, 64, 16, 2)
    else:
        wide = PrefillTiles(128, 64, 8, 2, max_registers=128)
    # A group of more heads than rows does not fit; a short query leaves most of a large tile empty.
    num_rows = max(16, triton.next_power_of_2(group), min(rows, wide.num_rows))
    if num_rows >= wide.num_rows:
        return replace(wide, num_rows=num_rows)
    return PrefillTiles(num_rows, wide.num_keys, 4, wide.num_stages)


def invariant_tiles(q: Tensor, k_cache: Tensor) -> PrefillTiles:
    """One shape for queries of any number, so that a query's output depends on no other query.

    A query's keys are walked in tiles counted from key 0, and a tile that it does not see adds 0.
    So its bits follow from the tiles' shape alone, not from the chunk of a prompt that it is in.
    """
    group, dim = q.shape[1] // k_cache.shape[2], q.shape[2]
    if q.dtype == torch.float32:
        tiles = PrefillTiles(32, 32, 4, 2)
    elif dim > 128:
        tiles = PrefillTiles(64, 32, 4, 2)
    else:
        tiles = PrefillTiles(64, 64, 4, 3 if dim <= 64 else 2)
    return replace(tiles, num_rows=max(tiles.num_rows, triton.next_power_of_2(group)))


def _fills_wide_programs(q: Tensor, group: int, num_requests: int) -> bool:
    """Whether tiles of 256 rows and 16 warps pay: on Hopper or later, with as many of them as there
    are multiprocessors, and requests that fill one on average (single tokens leave it empty)."""
    if q.device.type == "meta":  # what is compiled ahead
        return True
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] < 9:
        return False
    num_rows = q.shape[0] * q.shape[1]
    is_enough = num_rows >= 256 * num_multiprocessors(q.device)
    return is_enough and q.shape[0] * group >= 256 * num_requests


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    check_caches(q, k_cache, v_cache, k_scale, v_scale)
    if q.dtype not in DTYPES or q.shape[2] > MAX_HEAD_DIM:
        raise ValueError(
            "queries must be float16, bfloat16 or float32 with heads of at most"
            f" {MAX_HEAD_DIM}, not {q.dtype} with {q.shape[2]}"
        )
    if q.stride(2) != 1 or k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        raise ValueError("the last dimension of queries and caches must be dense")


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        dtype: torch.dtype = torch.bfloat16,
        *,
        heads: int = 32,
        kv_heads: int = 8,
        dim: int = 128,
        block_size: int = 16,
        max_query_len: int = 512,
        cache_dtype: torch.dtype | None = None,
        scale_dims: int = 3,
        has_key_start: bool = False,
        tree_words: int = 0,
        **options: Any,
    ) -> Callable[[], object]:
        def run() -> object:
            empty = partial(torch.empty, device="meta")
            int32 = partial(empty, dtype=torch.int32)
            shape = (64, block_size, kv_heads, dim)
            cache = empty(shape, dtype=cache_dtype or dtype)
            scale = None
            if cache_dtype is not None:
                scale = empty(shape[:3] if scale_dims == 3 else shape[2:3])
            if tree_words:
                options["tree"] = empty((2 * max_query_len, 2 + tree_words), dtype=torch.int64)
            return paged_prefill(
                empty((2 * max_query_len, heads, dim), dtype=dtype),
                cache,
                cache,
                int32((2, 64)),
                int32((3,)),
                int32((2,)),
                dim**-0.5,
                k_scale=scale,
                v_scale=scale,
                max_query_len=max_query_len,
                key_start=int32((2,)) if has_key_start else None,
                **options,
            )

        return run

    fp8 = torch.float8_e4m3fn
    return {
        "bf16, D 128, page 16": call(),
        "bf16, D 128, page 16, long": call(max_query_len=4096),
        "bf16, D 128, page 64": call(block_size=64),
        "fp16, D 64, page 1, window": call(torch.float16, dim=64, block_size=1, sliding_window=99),
        "fp32, D 128": call(torch.float32),
        "bf16, D 256, soft cap": call(dim=256, soft_cap=50.0),
        "bf16, D 80, drafts": call(dim=80, max_query_len=5),
        "bf16, D 128, trees, window": call(max_query_len=61, tree_words=1, sliding_window=99),
        "bf16, fp8 cache, suffix": call(cache_dtype=fp8, has_key_start=True, return_lse=True),
        "bf16, D 128, one tiling for all": call(
            max_query_len=1,
            tiles=invariant_tiles(
                torch.empty(2, 32, 128, dtype=torch.bfloat16, device="meta"),
                torch.empty(1, 16, 8, 128, dtype=torch.bfloat16, device="meta"),
            ),
        ),
        "fp16, int8 cache, fixed scales": call(torch.float16, cache_dtype=torch.int8, scale_dims=1),
    }
