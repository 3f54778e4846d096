"""Attention of requests that begin with the same tokens, the shared keys read once for all.

Where many requests share a prefix (a system prompt), attention splits into two parts: that to the
prefix, where the queries of all requests meet the same keys, in one pass without a causal mask; and
that to each request's own keys. :func:`merge_states` joins them exactly.

Papers: Juravsky et al., "Hydragen", 2024; Ye et al., "ChunkAttention", 2024; Ye et al., "Cascade
inference" (FlashInfer), 2024.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels import dispatch, triton
from kernels.attention import MAX_DECODE_QUERIES, as_int32, check_caches, paged_attend
from kernels.attention_reference import attend_reference, gather_dequantized

Implementation = Literal["auto", "triton", "reference"]


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
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend from the tokens of each group to the group's shared prefix, all of it.

    Parameters
    ----------
    q : Tensor [T, Hq, D]
        Queries of a step. The last dimension is dense.
    k_cache, v_cache : Tensor [num_blocks, block_size, Hkv, D]
        As of :func:`kernels.paged_attend`.
    group_block_table : Tensor [G, P] int32
        Blocks of each group's prefix in order; entries past its length are not read.
    prefix_lens : Tensor [G] int32
        Tokens of each prefix. Every token of the group lies behind them.
    token_index : Tensor [N] int32
        Rows of ``q`` by group, none twice. ``N = T`` promises that every row is in a group.
    group_start_loc : Tensor [G + 1] int32
        Where each group's tokens begin in ``token_index``; the last entry is ``N``.
    scale : float
        Factor on the scores.
    soft_cap, k_scale, v_scale
        As of :func:`kernels.paged_attend`.
    implementation : str
        ``triton`` (CUDA; never waits for the device), ``reference`` (torch), or ``auto``: Triton
        for CUDA tensors where it is installed.

    Returns
    -------
    out : Tensor [T, Hq, D]
        In the dtype of ``q``; 0 for tokens in no group.
    lse : Tensor [T, Hq] fp32
        Natural log-sum-exp of the scores; ``-inf`` for tokens in no group.
    """
    check_caches(q, k_cache, v_cache, k_scale, v_scale)
    groups = (group_block_table, prefix_lens, token_index, group_start_loc)
    if not _takes_triton(q, implementation):
        return shared_prefix_attend_reference(
            q, k_cache, v_cache, *groups, scale, soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale
        )
    from kernels.triton import shared_prefix

    table, lens, index = as_int32(group_block_table, prefix_lens, token_index)
    groups = (table, lens, index, group_start_loc.to(torch.int32))
    return shared_prefix.shared_prefix_attend(
        q, k_cache, v_cache, *groups, scale, soft_cap=soft_cap, k_scale=k_scale, v_scale=v_scale
    )


def shared_prefix_attend_reference(
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
) -> tuple[Tensor, Tensor]:
    """Plain torch form of :func:`shared_prefix_attend`, one group at a time."""
    wide = dispatch.accumulate_dtype(q)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=wide, device=q.device)
    starts = group_start_loc.tolist()
    for group, length in enumerate(prefix_lens.tolist()):
        k, v = (
            gather_dequantized(cache, cache_scale, group_block_table[group], 0, length, wide)
            for cache, cache_scale in ((k_cache, k_scale), (v_cache, v_scale))
        )
        rows = token_index[starts[group] : starts[group + 1]].long()
        out[rows], lse[rows] = attend_reference(q[rows], k, v, scale, soft_cap=soft_cap)
    return out, lse


def merge_states(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from attention over each.

    Parameters
    ----------
    out_a, out_b : Tensor [T, Hq, D]
        Of one dtype. Where a side saw no key its output may hold anything.
    lse_a, lse_b : Tensor [T, Hq] fp32
        Natural log-sum-exps; ``-inf`` where no key was seen.
    implementation : str
        As of :func:`shared_prefix_attend`.

    Returns
    -------
    out : Tensor [T, Hq, D]
        In the dtype of ``out_a``; 0 where neither saw a key.
    lse : Tensor [T, Hq] fp32
    """
    if not _takes_triton(out_a, implementation):
        return merge_states_reference(out_a, lse_a, out_b, lse_b)
    from kernels.triton import merge

    return merge.merge_states(out_a, lse_a, out_b, lse_b)


def merge_states_reference(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain torch form of :func:`merge_states`."""
    lse = torch.logaddexp(lse_a, lse_b)
    parts = []
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        is_empty = part == float("-inf")
        weight = (part - lse).exp().masked_fill(is_empty, 0.0)
        parts.append(
            out.to(lse.dtype).masked_fill(is_empty.unsqueeze(-1), 0.0) * weight.unsqueeze(-1)
        )
    return (parts[0] + parts[1]).to(out_a.dtype), lse


def cascade_attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    group_block_table: Tensor,
    prefix_lens: Tensor,
    token_index: Tensor,
    group_start_loc: Tensor,
    key_start: Tensor,
    soft_cap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    max_query_len: int,
    tree: Tensor | None = None,
    is_padded: bool = False,
    implementation: Implementation = "auto",
) -> Tensor:
    """:func:`kernels.paged_attend`, with the keys that groups of requests share read once a group.

    Parameters
    ----------
    q, k_cache, v_cache, block_table, query_start_loc, seq_lens, scale
        As of :func:`kernels.paged_attend`. Without a sliding window: a prefix is seen whole.
    group_block_table, prefix_lens, token_index, group_start_loc
        As of :func:`shared_prefix_attend`.
    key_start : Tensor [B] int32
        Length of each request's shared prefix, its group's; 0 for a request in no group.
    soft_cap, k_scale, v_scale
        As of :func:`kernels.paged_attend`.
    max_query_len : int
        A bound on the queries of a request.
    tree
        As of :func:`kernels.paged_attend`. Prefixes end before trees.
    is_padded : bool
        The groups are buffers of the largest size: ``group_start_loc`` ends with the number of
        entries of ``token_index`` that are used, and groups past the last one are empty. Nothing
        on the host depends on which those are, so that a captured graph may be replayed with
        others.
    implementation : str
        As of :func:`shared_prefix_attend`.

    Returns
    -------
    Tensor [T, Hq, D]
        In the dtype of ``q``.
    """
    groups = (group_block_table, prefix_lens, token_index, group_start_loc)
    rest = (block_table, query_start_loc, seq_lens)
    is_triton = _takes_triton(q, implementation)
    if is_triton and max_query_len <= MAX_DECODE_QUERIES:
        check_caches(q, k_cache, v_cache, k_scale, v_scale)
        from kernels.triton.paged_decode import paged_decode
        from kernels.triton.shared_prefix import prefix_states

        table, lens, index = as_int32(*groups[:3])
        groups = (table, lens, index, group_start_loc.to(torch.int32))
        # Before the prefix is launched: what the second kernel reads must not be written between.
        rest, key_start = as_int32(*rest), key_start.to(torch.int32)
        prior = prefix_states(
            q,
            k_cache,
            v_cache,
            *groups,
            scale,
            soft_cap=soft_cap,
            k_scale=k_scale,
            v_scale=v_scale,
            is_padded=is_padded,
        )
        out = paged_decode(
            q,
            k_cache,
            v_cache,
            *rest,
            scale,
            soft_cap=soft_cap,
            k_scale=k_scale,
            v_scale=v_scale,
            max_query_len=max_query_len,
            key_start=key_start,
            prior=prior,
            tree=tree,
        )
        assert isinstance(out, Tensor)
        return out
    by: Implementation = "triton" if is_triton else "reference"
    # Beside pieces of prompts few tokens are in a group: the rest has nothing to be joined with.
    rows = None if is_padded or len(token_index) == len(q) else token_index.long()
    if rows is not None:
        groups = (*groups[:2], torch.arange(len(rows), device=q.device), group_start_loc)
    prefix = shared_prefix_attend(
        q if rows is None else q[rows],
        k_cache,
        v_cache,
        *groups,
        scale,
        soft_cap=soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
        implementation=by,
    )
    own = paged_attend(
        q,
        k_cache,
        v_cache,
        *rest,
        scale,
        soft_cap=soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
        key_start=key_start,
        return_lse=True,
        max_query_len=max_query_len,
        tree=tree,
        implementation=by,
    )
    if rows is None:
        return merge_states(*prefix, *own, implementation=by)[0]
    out, lse = own
    out[rows] = merge_states(*prefix, out[rows], lse[rows], implementation=by)[0]
    return out


def _takes_triton(x: Tensor, implementation: Implementation) -> bool:
    if implementation == "auto":
        return x.is_cuda and triton.HAS_TRITON
    if implementation not in ("triton", "reference"):
        raise ValueError(
            f"implementation {implementation!r} does not exist: take auto, triton or reference"
        )
    reason = triton.unsupported_reason(x) if implementation == "triton" else None
    if reason is not None:
        raise ValueError(f"implementation 'triton' cannot serve this call: {reason}")
    return implementation == "triton"
