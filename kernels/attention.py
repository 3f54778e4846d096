"""Causal attention of packed queries over a paged KV cache.

One op serves every mix: a token being decoded, the draft tokens of a verification and a chunk of a
prompt are requests with 1, a few and many queries. The queries of a request are the last ones of
its sequence. Papers: Kwon et al., "Efficient Memory Management for Large Language Model Serving
with PagedAttention", 2023; Dao et al., "FlashAttention", 2022 (online softmax).

==================  ===============================================================================
implementation      what serves, and what it leaves out
==================  ===============================================================================
``triton``          CUDA (and TRITON_INTERPRET=1): fp16, bf16 and fp32 with head sizes up to 256; a
                    decode kernel and a prefill one
``native``          compiled CPU kernel: fp32 and bf16; no 8-bit cache, no ``key_start``, no lse
``sdpa``            torch's fused attention over gathered pages, any device: no 8-bit cache, no soft
                    cap, no ``key_start``, no lse
``reference``       torch, every step written out, any device: everything
==================  ===============================================================================

``auto`` takes the first that serves the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch, triton
from kernels.attention_reference import paged_attend_reference, paged_attend_reference_with_lse
from kernels.quantized_kv import check_kv_scale, is_quantized
from kernels.tree_attention import tree_mask

__all__ = [
    "MAX_DECODE_QUERIES",
    "Implementation",
    "as_int32",
    "check_caches",
    "paged_attend",
    "paged_attend_reference",
    "paged_attend_sdpa",
]

_NATIVE_HEAD_DIM = 16  # the CPU kernel serves the multiples of it
MAX_DECODE_QUERIES = 16  # more queries a request are the prefill kernel's

Implementation = Literal["auto", "triton", "native", "sdpa", "reference"]


@overload
def paged_attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    sliding_window: int | None = ...,
    soft_cap: float | None = ...,
    k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ...,
    key_start: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    query_lens: Sequence[int] | None = ...,
    seq_lens_list: Sequence[int] | None = ...,
    max_query_len: int | None = ...,
    tree: Tensor | None = ...,
    implementation: Implementation = ...,
) -> Tensor: ...


@overload
def paged_attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    sliding_window: int | None = ...,
    soft_cap: float | None = ...,
    k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ...,
    key_start: Tensor | None = ...,
    return_lse: Literal[True],
    query_lens: Sequence[int] | None = ...,
    seq_lens_list: Sequence[int] | None = ...,
    max_query_len: int | None = ...,
    tree: Tensor | None = ...,
    implementation: Implementation = ...,
) -> tuple[Tensor, Tensor]: ...


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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    key_start: Tensor | None = None,
    return_lse: bool = False,
    query_lens: Sequence[int] | None = None,
    seq_lens_list: Sequence[int] | None = None,
    max_query_len: int | None = None,
    tree: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every query to its request's cached keys up to and including its own position.

    Parameters
    ----------
    q : Tensor [T, Hq, D]
        Queries of all requests one after another. The last dimension is dense.
    k_cache, v_cache : Tensor [num_blocks, block_size, Hkv, D]
        Cache that already holds this step's keys and values. ``Hq`` is a multiple of ``Hkv``. The
        last dimension is dense. In the dtype of ``q``, or 8-bit with scales.
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
    k_scale, v_scale : Tensor [num_blocks, block_size, Hkv] or [Hkv] fp32, or None
        Scales of an int8 or fp8 cache (:mod:`kernels.quantized_kv`).
    key_start : Tensor [B] int32, or None
        Keys before it are skipped, and blocks that lie wholly before it need not exist: what is
        left for a request when its shared prefix was attended to apart.
    return_lse : bool
        Return the log-sum-exp of the scores as well.
    query_lens, seq_lens_list : sequence of int [B], or None
        The same lengths on the host, where the caller has them: avoids a device synchronisation.
    max_query_len : int or None
        A bound on the queries of a request. It is all that ``triton`` needs of lengths on the
        host, so that a captured graph may be replayed with others.
    tree : Tensor [T, 2 + W] int64, or None
        Which of the last tokens of its sequence a query sees, where these are a tree
        (:mod:`kernels.tree_attention`).
    implementation : str
        One of the table at the head of this module. One that cannot serve the call is an error,
        and never replaced.

    Returns
    -------
    Tensor [T, Hq, D], or (Tensor [T, Hq, D], Tensor [T, Hq] fp32)
        Contiguous, in the dtype of ``q``; with ``return_lse`` the natural log-sum-exp too (fp64
        for fp64 queries, of the reference). A query that sees no key gets 0 and ``-inf``.

    Raises
    ------
    ValueError
        An argument out of range, a cache and scales that do not belong together, or a call that
        the implementation asked for cannot serve.
    """
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 (or None), not {sliding_window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive (or None), not {soft_cap}")
    is_plain = not is_quantized(k_cache) and key_start is None and not return_lse
    if implementation == "auto":
        implementation = _choose(q, is_plain, soft_cap)
    else:
        _check_implementation(implementation, q, is_plain, soft_cap)
    if implementation != "triton":  # which does so itself, once for shapes that repeat
        check_caches(q, k_cache, v_cache, k_scale, v_scale)
    pages = as_int32(block_table, query_start_loc, seq_lens)  # nothing to do as a rule
    if implementation == "native":
        from kernels.cpu import attention

        return attention.paged_attend(
            q, k_cache, v_cache, *pages, scale, sliding_window, soft_cap, tree=tree
        )
    if implementation == "triton" and max_query_len is not None:
        query_lens = query_lens or [max_query_len]
    if query_lens is None:
        query_lens = (query_start_loc[1:] - query_start_loc[:-1]).tolist()
    if implementation == "triton":
        return _paged_attend_triton(
            q,
            k_cache,
            v_cache,
            *pages,
            scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            k_scale=k_scale,
            v_scale=v_scale,
            key_start=None if key_start is None else key_start.to(torch.int32),
            return_lse=return_lse,
            max_query_len=max(query_lens, default=0) if max_query_len is None else max_query_len,
            tree=tree,
        )
    if seq_lens_list is None:
        seq_lens_list = seq_lens.tolist()
    arguments = (q, k_cache, v_cache, block_table, query_lens, seq_lens_list, scale)
    if implementation == "sdpa":
        return paged_attend_sdpa(*arguments, sliding_window=sliding_window, tree=tree)
    out, lse = paged_attend_reference_with_lse(
        *arguments,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
        key_start=None if key_start is None else key_start.tolist(),
        tree=tree,
    )
    return (out, lse) if return_lse else out


def _choose(q: Tensor, is_plain: bool, soft_cap: float | None) -> Implementation:
    if q.is_cuda:
        if triton.HAS_TRITON and _triton_limit(q) is None:
            return "triton"
        return "sdpa" if is_plain and soft_cap is None else "reference"
    if is_plain and dispatch.is_native(q) and q.shape[-1] % _NATIVE_HEAD_DIM == 0:
        return "native"
    return "reference"


def _triton_limit(q: Tensor) -> str | None:
    """Why the Triton kernels cannot serve queries of this dtype and head size, if so."""
    if q.dtype in triton.DTYPES and q.shape[-1] <= triton.MAX_HEAD_DIM:
        return None
    return (
        f"it serves float16, bfloat16 and float32 with head sizes up to {triton.MAX_HEAD_DIM}, not"
        f" {q.dtype} with {q.shape[-1]}"
    )


def _check_implementation(
    implementation: str, q: Tensor, is_plain: bool, soft_cap: float | None
) -> None:
    reason = None
    if implementation == "triton":
        reason = triton.unsupported_reason(q) or _triton_limit(q)
    elif implementation == "native":
        if not dispatch.is_native(q) or q.shape[-1] % _NATIVE_HEAD_DIM:
            reason = (
                "it serves fp32 and bf16 CPU tensors with head sizes that"
                f" {_NATIVE_HEAD_DIM} divides, with numba installed; not {q.dtype} on {q.device}"
                f" of head size {q.shape[-1]}"
            )
    elif implementation == "sdpa":
        reason = "it has no soft cap" if soft_cap is not None else None
    elif implementation != "reference":
        raise ValueError(
            f"implementation {implementation!r} does not exist: take auto, triton, native, sdpa or"
            " reference"
        )
    if implementation in ("native", "sdpa") and not is_plain:
        reason = "it takes no 8-bit cache and no key_start, and returns no log-sum-exp"
    if reason is not None:
        raise ValueError(f"implementation {implementation!r} cannot serve this call: {reason}")


def as_int32(first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Index tensors as the kernels read them."""
    return first.to(torch.int32), second.to(torch.int32), third.to(torch.int32)


def check_caches(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """Raise ValueError unless queries, caches and scales belong together."""
    check_kv_scale(k_cache, k_scale, "k_scale")
    check_kv_scale(v_cache, v_scale, "v_scale")
    if k_cache.dtype != v_cache.dtype or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"the caches differ: {k_cache.dtype} of {tuple(k_cache.shape)}, and {v_cache.dtype} of"
            f" {tuple(v_cache.shape)}"
        )
    if not is_quantized(k_cache) and k_cache.dtype != q.dtype:
        raise ValueError(f"the cache holds {k_cache.dtype}, the queries are {q.dtype}")
    if k_scale is not None and v_scale is not None and k_scale.stride() != v_scale.stride():
        raise ValueError("k_scale and v_scale must have the same shape and strides")
    num_kv_heads, head_dim = k_cache.shape[2:]
    if q.shape[1] % num_kv_heads or q.shape[2] != head_dim:
        raise ValueError(
            f"queries of {q.shape[1]} heads of {q.shape[2]} do not fit a cache of {num_kv_heads}"
            f" heads of {head_dim}: sizes must be equal, and heads a multiple"
        )


def _paged_attend_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    sliding_window: int | None,
    soft_cap: float | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    key_start: Tensor | None,
    return_lse: bool,
    max_query_len: int,
    tree: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """By the kernel that suits the longest query; shapes and meaning as :func:`paged_attend`."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the Triton kernels take fp16, bf16 and fp32 queries, not {q.dtype}")
    kernel: Callable[..., Tensor | tuple[Tensor, Tensor]]
    if max_query_len <= MAX_DECODE_QUERIES:
        from kernels.triton import paged_decode

        kernel = paged_decode.paged_decode
    else:
        from kernels.triton import paged_prefill

        kernel = paged_prefill.paged_prefill
    return kernel(
        q,
        k_cache,
        v_cache,
        block_table,
        query_start_loc,
        seq_lens,
        scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        k_scale=k_scale,
        v_scale=v_scale,
        max_query_len=max_query_len,
        key_start=key_start,
        return_lse=return_lse,
        tree=tree,
    )


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
    tree: Tensor | None = None,
) -> Tensor:
    """:func:`paged_attend` by torch's fused attention.

    Requests with the same number of queries are padded into one call. Padding reads a request's
    last block to its end and multiplies by 0 what it finds there: a cache must hold no NaN.
    """
    groups: dict[int, list[int]] = {}
    for row, num_queries in enumerate(query_lens):
        if num_queries:
            groups.setdefault(num_queries, []).append(row)
    if len(groups) == 1 and len(next(iter(groups.values()))) == len(query_lens):
        rows = (q.view(len(query_lens), -1, *q.shape[1:]), k_cache, v_cache, block_table, seq_lens)
        trees = None if tree is None else tree.view(len(query_lens), -1, tree.shape[1])
        return _attend_padded(*rows, scale, sliding_window, trees).flatten(0, 1)
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
            q[tokens],
            k_cache,
            v_cache,
            blocks,
            lens,
            scale,
            sliding_window,
            None if tree is None else tree[tokens],
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
    tree: Tensor | None,
) -> Tensor:
    """Requests of one query length: ``q [B, Q, Hq, D]`` and ``tree [B, Q, 2 + W]`` -> ``[B, Q, Hq,
    D]``."""
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
    query = lens - num_queries + torch.arange(num_queries, device=q.device)  # [B, Q]: where it is
    if tree is None:
        key, query = torch.arange(longest, device=q.device), query.unsqueeze(2)
        mask = key <= query
        if sliding_window is not None:
            mask &= key > query - sliding_window
    else:
        mask = tree_mask(tree, query, longest, sliding_window)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask.unsqueeze(1), scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)
