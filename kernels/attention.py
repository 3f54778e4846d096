"""Causal attention of packed queries over a paged KV cache.

One op serves every mix: a token being decoded, the draft tokens of a verification and a chunk of a
prompt are requests with 1, a few and many queries. The queries of a request are the last ones of
its sequence. Papers: Kwon et al., "Efficient Memory Management for Large Language Model Serving
with PagedAttention", 2023; Dao et al., "FlashAttention", 2022 (online softmax).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch

_NATIVE_HEAD_DIM = 16  # the CPU kernel serves the multiples of it


def paged_attend(
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
    query_lens: Sequence[int] | None = None,
    seq_lens_list: Sequence[int] | None = None,
) -> Tensor:
    """Attend from every query to its request's cached keys up to and including its own position.

    Parameters
    ----------
    q : Tensor [T, Hq, D]
        Queries of all requests one after another. The last dimension is dense.
    k_cache, v_cache : Tensor [num_blocks, block_size, Hkv, D]
        Cache that already holds this step's keys and values. ``Hq`` is a multiple of ``Hkv``. The
        last dimension is dense.
    block_table : Tensor [B, P] int32
        Blocks of each request in order; entries past its length are not read.
    query_start_loc : Tensor [B + 1] int32
        Where each request's queries begin in ``q``; the last entry is ``T``.
    seq_lens : Tensor [B] int32
        Length of each request's sequence including its queries.
    scale : float
        Factor on the scores, usually ``D ** -0.5``.
    sliding_window : int or None
        A query sees itself and at most ``sliding_window - 1`` tokens before it.
    soft_cap : float or None
        Scores become ``soft_cap * tanh(score / soft_cap)`` (Gemma 2).
    query_lens, seq_lens_list : sequence of int [B], or None
        The same lengths on the host, where the caller has them: avoids a device synchronisation.

    Returns
    -------
    Tensor [T, Hq, D]
        Contiguous, in the dtype of ``q``.
    """
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 (or None), not {sliding_window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive (or None), not {soft_cap}")
    if dispatch.is_native(q) and q.shape[-1] % _NATIVE_HEAD_DIM == 0:
        from kernels.cpu import attention

        block_table = block_table.to(torch.int32)  # nothing to do as a rule
        query_start_loc, seq_lens = query_start_loc.to(torch.int32), seq_lens.to(torch.int32)
        return attention.paged_attend(
            q,
            k_cache,
            v_cache,
            block_table,
            query_start_loc,
            seq_lens,
            scale,
            sliding_window,
            soft_cap,
        )
    if query_lens is None:
        query_lens = (query_start_loc[1:] - query_start_loc[:-1]).tolist()
    if seq_lens_list is None:
        seq_lens_list = seq_lens.tolist()
    arguments = (q, k_cache, v_cache, block_table, query_lens, seq_lens_list, scale)
    if q.is_cuda and soft_cap is None:
        return paged_attend_sdpa(*arguments, sliding_window=sliding_window)
    return paged_attend_reference(*arguments, sliding_window=sliding_window, soft_cap=soft_cap)


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
) -> Tensor:
    """Plain torch form of :func:`paged_attend`, one request at a time; lengths on the host."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    start = 0
    for row, (num_queries, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        k, v = (gather_pages(c, block_table[row], 0, seq_len) for c in (k_cache, v_cache))
        stop = start + num_queries
        out[start:stop] = attend_reference(
            q[start:stop], k, v, scale, sliding_window=sliding_window, soft_cap=soft_cap
        )
        start = stop
    return out


def paged_attend_sdpa(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    scale: float,
    *,
    sliding_window: int | None = None,
) -> Tensor:
    """:func:`paged_attend` by torch's fused attention.

    Requests with the same number of queries are padded into one call. Padding reads a request's
    last block to its end and multiplies by 0 what it finds there: a cache must hold no NaN.
    """
    groups: dict[int, list[int]] = {}
    for row, num_queries in enumerate(query_lens):
        if num_queries:
            groups.setdefault(num_queries, []).append(row)
    if len(groups) == 1 and len(groups[query_lens[0]]) == len(query_lens):
        rows = (q.view(len(query_lens), -1, *q.shape[1:]), k_cache, v_cache, block_table, seq_lens)
        return _attend_padded(*rows, scale, sliding_window).flatten(0, 1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    starts = [0]
    for num_queries in query_lens:
        starts.append(starts[-1] + num_queries)
    for num_queries, members in groups.items():
        first = torch.tensor([starts[row] for row in members])
        tokens = (first.unsqueeze(1) + torch.arange(num_queries)).to(q.device)  # [members, queries]
        blocks = block_table[torch.tensor(members, device=q.device)]
        lens = [seq_lens[row] for row in members]
        out[tokens] = _attend_padded(
            q[tokens], k_cache, v_cache, blocks, lens, scale, sliding_window
        )
    return out


def _attend_padded(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Sequence[int],
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Requests of one query length: ``q [B, Q, Hq, D]`` -> ``[B, Q, Hq, D]``."""
    num_queries, longest = q.shape[1], max(seq_lens)
    block_size = k_cache.shape[1]
    blocks = block_table[:, : -(-longest // block_size)].long()
    lens = torch.tensor(seq_lens).to(q.device, non_blocking=True).unsqueeze(1)
    # Entries past a request's end may be anything: read its first block there, masked below.
    page_starts = block_size * torch.arange(blocks.shape[1], device=q.device)
    blocks = torch.where(page_starts < lens, blocks, blocks[:, :1])
    k, v = (
        cache[:, :longest][blocks].flatten(1, 2)[:, :longest].transpose(1, 2)  # [B, Hkv, S, D]
        for cache in (k_cache, v_cache)
    )
    query = lens - num_queries + torch.arange(num_queries, device=q.device)
    query = query.unsqueeze(2)  # [B, Q, 1]: position of each query
    key = torch.arange(longest, device=q.device)
    mask = key <= query
    if sliding_window is not None:
        mask &= key > query - sliding_window
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask.unsqueeze(1), scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def gather_pages(cache: Tensor, blocks: Tensor, start: int, stop: int) -> Tensor:
    """Copy positions ``start .. stop - 1`` of one request out of ``cache``: ``[.., Hkv, D]``."""
    block_size = cache.shape[1]
    first = start // block_size
    pages = cache[blocks[first : -(-stop // block_size)].long()].flatten(0, 1)
    return pages[start - first * block_size : stop - first * block_size]


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention of the last ``Q`` positions of one sequence, with every step written out.

    Parameters
    ----------
    q : Tensor [Q, Hq, D]
    k, v : Tensor [S, Hkv, D]

    Returns
    -------
    Tensor [Q, Hq, D]
    """
    wide = dispatch.accumulate_dtype(q)
    num_queries, num_heads, _ = q.shape
    seq_len, num_kv_heads, _ = k.shape
    k, v = (x.to(wide).repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,shd->hqs", q.to(wide), k) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    mask = causal_mask(num_queries, seq_len, sliding_window, q.device)
    probabilities = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqs,shd->qhd", probabilities, v).to(q.dtype)


def causal_mask(
    num_queries: int, seq_len: int, sliding_window: int | None, device: torch.device
) -> Tensor:
    """Which keys the last ``num_queries`` positions see: bool ``[num_queries, seq_len]``."""
    query = torch.arange(seq_len - num_queries, seq_len, device=device).unsqueeze(1)
    key = torch.arange(seq_len, device=device)
    mask = key <= query
    return mask if sliding_window is None else mask & (key > query - sliding_window)
