# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Attention of many requests' queries to a prefix that they share, its keys read once.

The queries of all requests of a group, and the query heads of a KV head, are rows of one tile: what
decoding does as many products of a few rows becomes one of many, on the tensor cores. A prefix is
cut into a few parts, so that small groups fill the card; each part's result is a state of its own,
which the attention to the requests' own keys merges on its way out.

Papers: Juravsky et al., "Hydragen", 2024; Ye et al., "ChunkAttention", 2024; Ye et al., "Cascade
inference" (FlashInfer), 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from kernels.quantized_kv import is_quantized
from kernels.triton import has_dependent_launch, is_interpreted, num_multiprocessors
from kernels.triton.attend import (
    FP8_FACTOR,
    as_pairs,
    attend_keys,
    cache_views,
    products_dtype,
    scale_mode,
)
from kernels.triton.launch import Launcher, planned
from kernels.triton.merge import merge_stacked
from kernels.triton.tiles import (
    HEAD_SCALE,
    LN_2,
    LOG2_E,
    TOKEN_SCALE,
    finish_softmax,
    round_query,
)

_MIN_PART = 128  # keys: a shorter part costs more than it saves
_MAX_PARTS = 8


@dataclass(slots=True, frozen=True)
class PrefixTiling:
    """Rows of a tile (query, head) and keys a step; parts of a prefix, None for as many as fit."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    num_parts: int | None = None


@triton.jit
def _find_tile(tile, group_start_loc, num_groups, GROUP, BLOCK_M, BLOCK_G: tl.constexpr):
    """Which group of requests the tile belongs to, and which tile of the group it is."""
    found = 0
    first_tile = 0
    num_tiles = 0
    for start in range(0, num_groups, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        mask = group < num_groups
        begin = tl.load(group_start_loc + group, mask=mask, other=0)
        end = tl.load(group_start_loc + group + 1, mask=mask, other=0)
        tiles = tl.cdiv((end - begin) * GROUP, BLOCK_M)
        is_before = mask & (num_tiles + tl.cumsum(tiles, 0) <= tile)
        found += tl.sum(is_before.to(tl.int32), 0)
        first_tile += tl.sum(tl.where(is_before, tiles, 0), 0)
        num_tiles += tl.sum(tiles, 0)
    return found, tile - first_tile


@triton.jit(do_not_specialize=["table_stride", "num_groups", "num_tokens"])
def shared_prefix_kernel(
    out,
    lse,
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    group_block_table,
    prefix_lens,
    token_index,
    group_start_loc,
    scale,
    soft_cap,
    q_stride_token,
    q_stride_head,
    k_stride_block,
    k_stride_token,
    k_stride_head,
    v_stride_block,
    v_stride_token,
    v_stride_head,
    scale_stride_block,
    scale_stride_token,
    scale_stride_head,
    table_stride,
    num_groups,
    num_tokens,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SCALES: tl.constexpr,
    KIND: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    HAS_DEPENDENT: tl.constexpr,
):
    """Grid: (KV heads, parts of a prefix, tiles of all groups). Rows: token * GROUP + head."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    if HAS_DEPENDENT:
        gdc_launch_dependents()  # the attention to own keys needs this one's results at its end
    head = tl.program_id(0)
    part = tl.program_id(1)
    group, tile = _find_tile(tl.program_id(2), group_start_loc, num_groups, GROUP, BLOCK_M, BLOCK_G)
    if group >= num_groups:
        return
    begin = tl.load(group_start_loc + group)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < (tl.load(group_start_loc + group + 1) - begin) * GROUP
    token = tl.load(token_index + begin + row // GROUP, mask=is_row, other=0).to(tl.int64)
    q_head = head * GROUP + row % GROUP
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_DIM
    mask = is_row[:, None] & is_dim[None, :]
    q_at = token * q_stride_token + q_head * q_stride_head
    queries = tl.load(q + q_at[:, None] + dims[None, :], mask=mask, other=0.0)
    queries, factor = round_query(queries, COMPUTE)
    factor *= scale
    if not HAS_CAP:
        factor *= LOG2_E
    if KIND == "fp8":
        factor *= FP8_FACTOR
    if SCALES == HEAD_SCALE:
        factor *= tl.load(k_scale + head)
    if SCALES == TOKEN_SCALE:
        k_scale += head * scale_stride_head
        v_scale += head * scale_stride_head
    length = tl.load(prefix_lens + group)
    share = tl.cdiv(tl.cdiv(length, tl.num_programs(1)), BLOCK_N) * BLOCK_N
    start = tl.minimum(part * share, length)
    acc, maximum, total = attend_keys(
        queries,
        factor,
        row,
        start,
        tl.minimum(start + share, length),
        group_block_table + group.to(tl.int64) * table_stride,
        k_cache + head * k_stride_head,
        v_cache + head * v_stride_head,
        k_scale,
        v_scale,
        None,
        soft_cap,
        k_stride_block,
        k_stride_token,
        v_stride_block,
        v_stride_token,
        scale_stride_block,
        scale_stride_token,
        HEAD_DIM,
        BLOCK_SIZE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        0,
        0,
        HAS_CAP,
        False,
        SCALES,
        KIND,
        IS_INTERPRETED,
    )
    values, values_lse = finish_softmax(acc, maximum, total)
    if SCALES == HEAD_SCALE:
        values *= tl.load(v_scale + head)
    at = (part.to(tl.int64) * num_tokens + token) * HEADS + q_head
    values = values.to(out.dtype.element_ty)
    tl.store(out + at[:, None] * HEAD_DIM + dims[None, :], values, mask=mask)
    tl.store(lse + at, values_lse * LN_2, mask=is_row)


def choose_tiling(head_dim: int, q_dtype: torch.dtype, rows_per_group: int) -> PrefixTiling:
    """The tiling that an H100 liked best (experiments/gpu_attention.py)."""
    if q_dtype == torch.float32:
        return PrefixTiling(32, 32, num_warps=4, num_stages=2)
    block_m = 64 if rows_per_group > 32 else 16
    return PrefixTiling(block_m, 64 if head_dim <= 128 else 32, num_warps=4, num_stages=3)


def prefix_states(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    group_block_table: Tensor,
    prefix_lens: Tensor,
    token_index: Tensor,
    group_start_loc: Tensor,
    scale: float,
    *,
    soft_cap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tiling: PrefixTiling | None = None,
    is_filled: bool = False,
    is_padded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention to shared prefixes in parts: ``[S, T, Hq, D]`` and ``[S, T, Hq]``, both fp32.

    Arguments as in :func:`kernels.shared_prefix_attend`, and ``is_padded`` as in
    :func:`kernels.shared_prefix.cascade_attend`; ``S`` is chosen from shapes. Rows of tokens in no
    group are 0 and ``-inf`` with ``is_filled``, else undefined.
    """
    groups = (group_block_table, prefix_lens, token_index, group_start_loc)
    tensors = (q, k_cache, v_cache, k_scale, v_scale, *groups)
    launch = _prefix.find(tensors, scale, soft_cap, tiling, is_padded)
    wide: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    shape, lse_shape = launch.scratch
    if is_filled and len(token_index) < len(q):
        out, lse = torch.zeros(shape, **wide), torch.full(lse_shape, float("-inf"), **wide)
    else:
        out, lse = torch.empty(shape, **wide), torch.empty(lse_shape, **wide)
    if len(token_index) and len(prefix_lens):
        launch(out, lse, *tensors)
    return out, lse


@planned
def _prefix(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    group_block_table: Tensor,
    prefix_lens: Tensor,
    token_index: Tensor,
    _group_start_loc: Tensor,
    scale: float,
    soft_cap: float | None,
    tiling: PrefixTiling | None,
    is_padded: bool,
) -> Launcher:
    assert q.stride(2) == 1
    num_tokens, num_heads, head_dim = q.shape
    num_requests, num_groups = len(token_index), len(prefix_lens)
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    num_rows = num_requests * group
    if tiling is None:
        # Of a padded batch, whose groups nobody knows here: as if all were in one.
        likely_groups = 1 if is_padded else max(1, num_groups)
        rows_per_group = triton.cdiv(num_requests, likely_groups) * group
        tiling = choose_tiling(head_dim, q.dtype, rows_per_group)
    # Full tiles, and at most one more for each group.
    num_tiles = num_rows // tiling.block_m + num_groups
    num_parts = tiling.num_parts
    if num_parts is None:
        longest = group_block_table.shape[1] * block_size
        programs = 2 * num_multiprocessors(q.device)
        if is_padded:  # tiles of no row end at once; the others are to run all at a time
            wanted = programs // (num_kv_heads * max(1, num_rows // tiling.block_m))
        else:
            wanted = triton.cdiv(programs, max(1, num_kv_heads * num_tiles))
        num_parts = max(1, min(wanted, longest // _MIN_PART, _MAX_PARTS))
    scales, products = scale_mode(k_cache, k_scale), products_dtype(q, k_cache)
    k_cache, v_cache, kind = cache_views(k_cache, v_cache)
    scale_strides = k_scale.stride() if k_scale is not None and k_scale.dim() == 3 else (0, 0, 0)
    return Launcher(
        shared_prefix_kernel,
        (num_kv_heads, num_parts, num_tiles),
        scale,
        soft_cap or 0.0,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *scale_strides,
        group_block_table.stride(0),
        num_groups,
        num_tokens,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HAS_CAP=soft_cap is not None,
        SCALES=scales,
        KIND=kind,
        COMPUTE=products,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_D=max(32, triton.next_power_of_2(head_dim)),
        BLOCK_G=16 if num_groups <= 16 else 256,
        IS_INTERPRETED=is_interpreted(),
        HAS_DEPENDENT=has_dependent_launch(q.device),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        seen_as=as_pairs,
        scratch=((num_parts, num_tokens, num_heads, head_dim), (num_parts, num_tokens, num_heads)),
    )


def shared_prefix_attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    group_block_table: Tensor,
    prefix_lens: Tensor,
    token_index: Tensor,
    group_start_loc: Tensor,
    scale: float,
    *,
    soft_cap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tiling: PrefixTiling | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`kernels.shared_prefix_attend`."""
    groups = (group_block_table, prefix_lens, token_index, group_start_loc)
    scales: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale}
    outs, lses = prefix_states(
        q, k_cache, v_cache, *groups, scale, soft_cap=soft_cap, tiling=tiling, is_filled=True,
        **scales,
    )  # fmt: skip
    if len(outs) > 1:
        return merge_stacked(outs, lses, q.dtype)
    return outs[0].to(q.dtype), lses[0]


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that cover the forms of the kernel, for building it ahead of time."""

    def call(dtype: torch.dtype, cache_dtype: torch.dtype, **masks: float) -> Callable[[], object]:
        q = torch.empty(64, 8, 128, dtype=dtype)
        cache = torch.empty(16, 16, 2, 128, dtype=cache_dtype)
        index = torch.zeros(64, dtype=torch.int32)
        groups = (index[:16].view(1, 16), index[:1], index, index[:2])
        scale = torch.ones(16, 16, 2) if is_quantized(cache) else None
        options: dict[str, Any] = {"k_scale": scale, "v_scale": scale, **masks}
        return lambda: prefix_states(q, cache, cache, *groups, 1.0, **options)

    half = torch.bfloat16
    return {
        "bf16, soft cap": call(half, half, soft_cap=1.0),
        "fp8, scales of tokens": call(half, torch.float8_e4m3fn),
    }
