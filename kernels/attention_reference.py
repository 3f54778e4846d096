"""Attention in plain torch, one request at a time: the truth that fast kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import dispatch
from kernels.quantized_kv import dequantize_kv
from kernels.tree_attention import tree_mask


def paged_attend_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    scale: float,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    key_start: Sequence[int] | None = None,
    tree: Tensor | None = None,
) -> Tensor:
    """Plain torch form of :func:`paged_attend`, one request at a time; lengths on the host."""
    return paged_attend_reference_with_lse(
        q,
        k_cache,
        v_cache,
        block_table,
        query_lens,
        seq_lens,
        scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
        key_start=key_start,
        tree=tree,
    )[0]


def paged_attend_reference_with_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    scale: float,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    key_start: Sequence[int] | None = None,
    tree: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`paged_attend_reference` and the log-sum-exps ``[T, Hq]`` (fp32; fp64 for fp64)."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=dispatch.accumulate_dtype(q), device=q.device)
    begin = 0
    for row, (num_queries, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        first = 0 if key_start is None else min(key_start[row], seq_len)
        k, v = (
            gather_dequantized(cache, cache_scale, block_table[row], first, seq_len, lse.dtype)
            for cache, cache_scale in ((k_cache, k_scale), (v_cache, v_scale))
        )
        rows = slice(begin, begin + num_queries)
        if tree is None:
            mask = causal_mask(num_queries, seq_len, sliding_window, q.device)
        else:
            index = torch.arange(seq_len - num_queries, seq_len, device=q.device)
            mask = tree_mask(tree[rows], index, seq_len, sliding_window)
        mask = mask[:, first:]
        out[rows], lse[rows] = attend_reference(q[rows], k, v, scale, mask, soft_cap=soft_cap)
        begin += num_queries
    return out, lse


def gather_pages(cache: Tensor, blocks: Tensor, start: int, stop: int) -> Tensor:
    """Copy positions ``start .. stop - 1`` of one request out of ``cache``: ``[.., Hkv, D]``."""
    block_size = cache.shape[1]
    first = start // block_size
    pages = cache[blocks[first : -(-stop // block_size)].long()].flatten(0, 1)
    return pages[start - first * block_size : stop - first * block_size]


def gather_dequantized(
    cache: Tensor, scale: Tensor | None, blocks: Tensor, start: int, stop: int, wide: torch.dtype
) -> Tensor:
    """:func:`gather_pages`; the values of an 8-bit cache come out in ``wide``."""
    stored = gather_pages(cache, blocks, start, stop)
    if scale is None:
        return stored
    pages = scale if scale.dim() == 1 else gather_pages(scale, blocks, start, stop)
    return dequantize_kv(stored, pages, wide)


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    *,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries to keys, with every step written out.

    Parameters
    ----------
    q : Tensor [Q, Hq, D]
    k, v : Tensor [S, Hkv, D]
    mask : Tensor [Q, S] bool, or None
        Which keys each query sees; None: all.

    Returns
    -------
    out : Tensor [Q, Hq, D]
        0 for a query that sees no key.
    lse : Tensor [Q, Hq]
        Natural log-sum-exp of the scores; ``-inf`` there.
    """
    wide = dispatch.accumulate_dtype(q)
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(wide).repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,shd->hqs", q.to(wide), k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is None:
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    probabilities = scores.softmax(dim=-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    out = torch.einsum("hqs,shd->qhd", probabilities, v)
    return out.to(q.dtype), lse.transpose(0, 1)


def causal_mask(
    num_queries: int, seq_len: int, sliding_window: int | None, device: torch.device
) -> Tensor:
    """Which keys the last ``num_queries`` positions see: bool ``[num_queries, seq_len]``."""
    query = torch.arange(seq_len - num_queries, seq_len, device=device).unsqueeze(1)
    key = torch.arange(seq_len, device=device)
    mask = key <= query
    return mask if sliding_window is None else mask & (key > query - sliding_window)
