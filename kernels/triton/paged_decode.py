# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Attention of a few queries a request over a paged cache: decoding, and verifying drafts.

A program takes a stretch of keys for one KV head: all query heads of the group and all queries of
the request are rows of its tile, so that a key is read once (GQA packing). The keys of all requests
are shared out evenly among as many programs as the card runs at a time, whichever request they
belong to; the last program to finish a piece of a request merges all of them (flash-decoding, with
the merge inside).

The shares follow from the sequence lengths on the device. The launch depends on nothing but shapes,
so that it can be captured in a CUDA graph and replayed while the sequences grow.

Papers: Dao et al., "Flash-Decoding for long-context inference", 2023; Sanovar et al., "Lean
Attention", 2024 (even shares across requests).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.attention import check_caches
from kernels.quantized_kv import is_quantized
from kernels.triton import (
    has_dependent_launch,
    has_large_shared_memory,
    is_interpreted,
    num_multiprocessors,
)
from kernels.triton.attend import (
    FP8_FACTOR,
    as_pairs,
    attend_keys,
    cache_views,
    products_dtype,
    scale_mode,
)
from kernels.triton.decode_tiling import DecodeTiling, choose_tiling
from kernels.triton.launch import Launcher, dependent_options, planned
from kernels.triton.pieces import (
    count_all_blocks,
    count_blocks,
    drop_padding,
    find_request,
    span,
    store_rows,
)
from kernels.triton.tiles import (
    HEAD_SCALE,
    LOG2_E,
    TOKEN_SCALE,
    finish_softmax,
    merge_tiles,
    round_query,
)

_BLOCK_B = (1, 16, 128, 256, 1024)  # requests looked at together; each is a kernel of its own
_MIN_COUNTERS = 1 << 17
_COUNTERS: dict[torch.device, list[Tensor]] = {}

Prior = tuple[Tensor, Tensor]


@triton.jit(
    do_not_specialize=[
        "table_stride",
        "num_requests",
        "min_share",
        "num_prior",
        "num_tokens",
    ]
)
def paged_decode_kernel(
    out,
    lse,
    part_out,
    part_lse,
    counters,
    q,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    block_table,
    query_start_loc,
    seq_lens,
    key_start,
    prior_out,
    prior_lse,
    tree,
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
    num_requests,
    min_share,
    num_prior,
    num_tokens,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    TREE_WORDS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SCALES: tl.constexpr,
    KIND: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FEW_PIECES: tl.constexpr,
    PRIORS: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (KV heads * row tiles, items). Rows of a tile: query * GROUP + head of the group.

    An item is the share of blocks of keys that a program takes for its head and tile.
    """
    TILES: tl.constexpr = (MAX_ROWS + BLOCK_M - 1) // BLOCK_M
    HEADS: tl.constexpr = KV_HEADS * GROUP
    head = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    item = tl.program_id(1)
    if IS_DEPENDENT:
        gdc_launch_dependents()
    requests = tl.arange(0, BLOCK_B)
    counts = count_blocks(
        seq_lens, query_start_loc, key_start, tree, requests, num_requests,
        WINDOW, TREE_WORDS, BLOCK_N,
    )  # fmt: skip
    ends = tl.cumsum(counts, 0)
    num_blocks = count_all_blocks(
        counts, seq_lens, query_start_loc, key_start, tree, num_requests,
        WINDOW, TREE_WORDS, BLOCK_N, BLOCK_B, IS_ONE_BLOCK,
    )  # fmt: skip
    share = tl.maximum(tl.cdiv(num_blocks, tl.num_programs(1)), min_share)
    block = item * share
    last_block = tl.minimum(block + share, num_blocks)

    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_DIM
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    all_row = tile * BLOCK_M + tl.arange(0, BLOCK_R)  # without the rows that pad a product
    q += head * GROUP * q_stride_head
    k_cache += head * k_stride_head
    v_cache += head * v_stride_head
    head_factor = scale
    if not HAS_CAP:
        head_factor *= LOG2_E
    if KIND == "fp8":
        head_factor *= FP8_FACTOR
    value_factor = 1.0
    if SCALES == HEAD_SCALE:
        head_factor *= tl.load(k_scale + head)
        value_factor = tl.load(v_scale + head)
    if SCALES == TOKEN_SCALE:
        k_scale += head * scale_stride_head
        v_scale += head * scale_stride_head
    while block < last_block:  # one request's part of the share a turn
        request, num_before = find_request(
            block, counts, ends, seq_lens, query_start_loc, key_start, tree, num_requests,
            WINDOW, TREE_WORDS, BLOCK_N, BLOCK_B, IS_ONE_BLOCK,
        )  # fmt: skip
        query_start, num_queries, first, stop = span(
            seq_lens, query_start_loc, key_start, tree, request, True, WINDOW, TREE_WORDS
        )
        num_own = tl.maximum(tl.cdiv(stop - first, BLOCK_N), 1)
        end_block = tl.minimum(last_block, num_before + num_own)
        is_row = row < num_queries * GROUP
        q_at = (query_start + row // GROUP).to(tl.int64) * q_stride_token
        q_at += row % GROUP * q_stride_head
        mask = is_row[:, None] & is_dim[None, :]
        if IS_DEPENDENT and prior_out is None:
            # The launch ahead wrote the queries and their keys; lengths and tables are older.
            gdc_wait()
        queries = tl.load(q + q_at[:, None] + dims[None, :], mask=mask, other=0.0)
        queries, factor = round_query(queries, COMPUTE)
        tree_rows = None
        if TREE_WORDS > 0:
            node = query_start + tl.minimum(row // GROUP, num_queries - 1)
            tree_rows = tree + node.to(tl.int64) * (2 + TREE_WORDS)
        acc, maximum, total = attend_keys(
            queries,
            factor * head_factor,
            tl.load(seq_lens + request) - num_queries + row // GROUP,
            first + (block - num_before) * BLOCK_N,
            tl.minimum(first + (end_block - num_before) * BLOCK_N, stop),
            block_table + request.to(tl.int64) * table_stride,
            k_cache,
            v_cache,
            k_scale,
            v_scale,
            tree_rows,
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
            WINDOW,
            TREE_WORDS,
            HAS_CAP,
            MAX_ROWS > GROUP,
            SCALES,
            KIND,
            IS_INTERPRETED,
        )
        acc *= value_factor
        prior_count = num_prior
        if prior_out is not None:
            prior_count = tl.where(tl.load(key_start + request) > 0, num_prior, 0)
            if IS_DEPENDENT:
                gdc_wait()
        first_item = num_before // share
        num_pieces = (num_before + num_own - 1) // share - first_item + 1
        out_row = query_start.to(tl.int64) * HEADS + head * GROUP
        if num_pieces == 1:
            if prior_out is not None:
                own, own_maximum, own_total = drop_padding(
                    acc, maximum, total, is_row, BLOCK_M, BLOCK_R, BLOCK_D
                )
                store_rows(
                    out, lse, own, own_maximum, own_total, prior_out, prior_lse, prior_count,
                    num_tokens, out_row + all_row // GROUP * HEADS + all_row % GROUP,
                    all_row < num_queries * GROUP, dims, is_dim, HEADS, HEAD_DIM, PRIORS,
                )  # fmt: skip
            else:
                store_rows(
                    out, lse, acc, maximum, total, prior_out, prior_lse, prior_count, num_tokens,
                    out_row + row // GROUP * HEADS + row % GROUP, is_row, dims, is_dim,
                    HEADS, HEAD_DIM, PRIORS,
                )  # fmt: skip
        else:
            # An item has two places: for the request it begins with, and for one it begins.
            place = item * 2 + (block > item * share).to(tl.int32)
            part = (place.to(tl.int64) * KV_HEADS + head) * MAX_ROWS + row
            values, values_lse = finish_softmax(acc, maximum, total)
            tl.store(part_out + part[:, None] * HEAD_DIM + dims[None, :], values, mask=mask)
            tl.store(part_lse + part, values_lse, mask=is_row)
            # All threads have written before the one that counts says so to other programs.
            tl.debug_barrier()
            counter = counters + request * (KV_HEADS * TILES) + tl.program_id(0)
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_pieces - 1:
                tl.store(counter, 0)  # for the next launch
                is_any = all_row < num_queries * GROUP
                merged = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
                merged_maximum = tl.full([BLOCK_R], float("-inf"), tl.float32)
                merged_total = tl.zeros([BLOCK_R], tl.float32)
                first_row = (first_item.to(tl.int64) * 2 * KV_HEADS + head) * MAX_ROWS + all_row
                shift = tl.where(num_before > first_item * share, KV_HEADS * MAX_ROWS, 0)
                # Few pieces, as requests in a large batch have, would be lost in a large tile.
                if num_pieces <= FEW_PIECES:
                    merged, merged_maximum, merged_total = merge_tiles(
                        part_out, part_lse, first_row, 2 * KV_HEADS * MAX_ROWS, shift, num_pieces,
                        is_any, dims, is_dim, merged, merged_maximum, merged_total,
                        1.0, HEAD_DIM, FEW_PIECES,
                    )  # fmt: skip
                else:
                    merged, merged_maximum, merged_total = merge_tiles(
                        part_out, part_lse, first_row, 2 * KV_HEADS * MAX_ROWS, shift, num_pieces,
                        is_any, dims, is_dim, merged, merged_maximum, merged_total,
                        1.0, HEAD_DIM, BLOCK_P,
                    )  # fmt: skip
                store_rows(
                    out, lse, merged, merged_maximum, merged_total, prior_out, prior_lse,
                    prior_count, num_tokens, out_row + all_row // GROUP * HEADS + all_row % GROUP,
                    is_any, dims, is_dim, HEADS, HEAD_DIM, PRIORS,
                )  # fmt: skip
        block = end_block
    if IS_DEPENDENT:
        gdc_wait()  # nobody may take this launch for finished before the one it followed


def _keep_counters(count: int, device: torch.device) -> None:
    """Have ``count`` counters that each launch leaves at 0; kept for ever, since a captured graph
    may hold them.

    Launches on one device share them, so they must follow one another on one stream.
    """
    kept = _COUNTERS.setdefault(device, [])
    if not kept or kept[-1].numel() < count:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "paged decode needs its counters before a CUDA graph is captured: run the same"
                " call once outside of the capture"
            )
        kept.append(torch.zeros(max(count, _MIN_COUNTERS), dtype=torch.int32, device=device))


def paged_decode(
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
    prior: Prior | None = None,
    tree: Tensor | None = None,
    tiling: DecodeTiling | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`kernels.paged_attend` for requests of at most ``max_query_len`` queries, a few.

    Parameters
    ----------
    max_query_len : int
        Bound on the queries of any request; a longer one would lose its last queries.
    prior : (Tensor [S, T, Hq, D] fp32, Tensor [S, T, Hq] fp32), or None
        Outputs and natural log-sum-exps over the keys before ``key_start``, in ``S`` disjoint
        parts, to be merged into the result of the requests whose ``key_start`` is positive.
    tree : Tensor [T, 2 + W] int64, or None
        Which of the last tokens of its sequence a query sees (:mod:`kernels.tree_attention`).
    tiling : DecodeTiling or None
        None: :func:`choose_tiling`.

    Notes
    -----
    Never waits for the device. Rows of ``q`` that belong to no request are left unwritten.
    """
    device = q.device
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=device) if return_lse else None
    if len(q) and len(seq_lens):
        caches = (k_cache, v_cache, k_scale, v_scale)
        lengths = (block_table, query_start_loc, seq_lens, key_start)
        tensors = (q, *caches, *lengths, *(prior or (None, None)), tree)
        masks = (sliding_window, soft_cap)
        launch = _decode.find(tensors, scale, *masks, max_query_len, return_lse, tiling)
        parts = [torch.empty(s, dtype=torch.float32, device=device) for s in launch.scratch]
        launch(out, lse, *parts, _COUNTERS[device][-1], *tensors)
    return out if lse is None else (out, lse)


@planned
def _decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    key_start: Tensor | None,
    prior_out: Tensor | None,
    prior_lse: Tensor | None,
    tree: Tensor | None,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    max_query_len: int,
    return_lse: bool,
    tiling: DecodeTiling | None,
) -> Launcher:
    check_caches(q, k_cache, v_cache, k_scale, v_scale)
    assert q.stride(2) == 1
    assert tree is None or (tree.is_contiguous() and len(tree) == len(q))
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    # Lengths of drafts and of prompts' last pieces vary: five kernels serve 1 to 16 queries.
    max_rows = triton.next_power_of_2(max_query_len) * group
    scales, products = scale_mode(k_cache, k_scale), products_dtype(q, k_cache)
    block_d = max(32, triton.next_power_of_2(head_dim))
    num_requests = len(seq_lens)
    if tiling is None:
        room = num_multiprocessors(q.device) if has_large_shared_memory(q.device) else 0
        num_pairs = num_requests * num_kv_heads
        tiling = choose_tiling(
            head_dim,
            k_cache.dtype,
            max_rows,
            is_few=num_pairs <= room,
            has_token_scales=scales == int(TOKEN_SCALE.value),
            are_tiles_few=num_pairs * triton.cdiv(max_rows, 16) <= room,
        )
    block_r = min(triton.next_power_of_2(max_rows), tiling.max_tile_rows)
    block_m = max(16, block_r)
    programs_per_item = num_kv_heads * triton.cdiv(max_rows, block_m)
    programs = num_multiprocessors(q.device) * tiling.programs_per_multiprocessor
    num_items = max(1, programs // programs_per_item)
    is_dependent = has_dependent_launch(q.device)
    k_cache, v_cache, kind = cache_views(k_cache, v_cache)
    block_b = next((b for b in _BLOCK_B if num_requests <= b), _BLOCK_B[-1])
    scale_strides = k_scale.stride() if k_scale is not None and k_scale.dim() == 3 else (0, 0, 0)
    _keep_counters(num_requests * programs_per_item, q.device)
    pieces = (2 * num_items, num_kv_heads, max_rows)
    return Launcher(
        paged_decode_kernel,
        (programs_per_item, num_items),
        scale,
        soft_cap or 0.0,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *scale_strides,
        block_table.stride(0),
        num_requests,
        tiling.min_share,
        0 if prior_out is None else len(prior_out),
        num_tokens,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        MAX_ROWS=max_rows,
        WINDOW=sliding_window or 0,
        TREE_WORDS=0 if tree is None else tree.shape[1] - 2,
        HAS_CAP=soft_cap is not None,
        SCALES=scales,
        KIND=kind,
        COMPUTE=products,
        BLOCK_M=block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_D=block_d,
        BLOCK_B=block_b,
        IS_ONE_BLOCK=num_requests <= block_b,
        BLOCK_R=block_r,
        BLOCK_P=max(1, min(32, 4096 * tiling.num_warps // (block_r * block_d))),
        PRIORS=max(1, min(8, 2048 * tiling.num_warps // (block_r * block_d))),
        FEW_PIECES=max(1, min(4, 4096 * tiling.num_warps // (block_r * block_d))),
        IS_INTERPRETED=is_interpreted(),
        IS_DEPENDENT=is_dependent,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        seen_as=as_pairs,
        scratch=((*pieces, head_dim), pieces),
        **dependent_options(is_dependent),
    )


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that cover the forms of the kernel, for building it ahead of time."""

    def call(
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        *,
        head_dim: int = 128,
        queries: int = 1,
        requests: int = 2,
        scales_of: str = "tokens",
        is_suffix: bool = False,
        tree_words: int = 0,
        **masks: float | int,
    ) -> Callable[[], object]:
        q = torch.empty(requests * queries, 8, head_dim, dtype=dtype)
        cache = torch.empty(16, 16, 2, head_dim, dtype=cache_dtype)
        index = torch.zeros(16 * requests, dtype=torch.int32)
        scale = None
        if is_quantized(cache):
            scale = torch.ones(16, 16, 2) if scales_of == "tokens" else torch.ones(2)
        options: dict[str, Any] = {"k_scale": scale, "v_scale": scale, **masks}
        if is_suffix:
            prior = (torch.empty(3, *q.shape), torch.empty(3, *q.shape[:2]))
            options |= {"key_start": index[:requests], "prior": prior, "return_lse": True}
        if tree_words:
            options["tree"] = torch.zeros(len(q), 2 + tree_words, dtype=torch.int64)
        lengths = (index.view(requests, 16), index[: requests + 1], index[:requests])
        return lambda: paged_decode(
            q, cache, cache, *lengths, 1.0, max_query_len=queries, **options
        )

    half, fp8 = torch.bfloat16, torch.float8_e4m3fn
    return {
        "bf16, suffix of a shared prefix": call(half, half, is_suffix=True),
        "fp8, scales of tokens": call(half, fp8),
        "fp16, 8 queries, window, soft cap": call(
            torch.float16, torch.float16, queries=8, sliding_window=32, soft_cap=1.0
        ),
        "bf16, head size 80, many requests": call(half, half, head_dim=80, requests=8),
        "int8, head size 256, scales of heads": call(
            half, torch.int8, head_dim=256, scales_of="heads"
        ),
        "fp32": call(torch.float32, torch.float32),
        "bf16, trees": call(half, half, queries=6, tree_words=1),
        "bf16, larger trees, window": call(half, half, queries=6, tree_words=2, sliding_window=32),
    }
