"""QK-norm, rotary embedding and KV write on the CPU, in one pass over the tokens.

Semantics: :mod:`kernels.rotary` and :mod:`kernels.kv_cache`.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from kernels.cpu.norm import normalize, sum_of_squares
from kernels.cpu.pointers import (
    MARKERS,
    advance,
    entry,
    helper,
    load,
    load_int,
    parallel_entry,
    pointer,
    store,
)
from kernels.cpu.threads import num_threads

_PARALLEL_NUMEL = 1 << 17


def apply_rope_and_write_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
) -> None:
    """See :func:`kernels.rotary.apply_rope_and_write_kv`."""
    num_tokens, width = qkv.shape
    rotary_dim = cos_sin.shape[1]
    assert width == (num_heads + 2 * num_kv_heads) * head_dim and qkv.stride(1) == 1
    assert rotary_dim <= head_dim and cos_sin.dtype is torch.float32 and cos_sin.is_contiguous()
    assert positions.shape[0] == num_tokens and positions.dtype is torch.int64
    slots, block_size, caches = _cache_arguments(slot_mapping, k_cache, v_cache, qkv)
    arguments = (
        MARKERS[qkv.dtype],
        qkv.data_ptr(),
        qkv.stride(0),
        positions.data_ptr(),
        cos_sin.data_ptr(),
        rotary_dim,
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        norm_eps,
        norm_offset,
        slots,
        block_size,
        caches,
    )
    if qkv.numel() >= _PARALLEL_NUMEL and num_threads() > 1:
        _rope_parallel(*arguments)
    else:
        _rope_serial(*arguments)


def write_kv(k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """See :func:`kernels.kv_cache.write_kv`."""
    assert k.stride(2) == v.stride(2) == 1 and k.dtype == v.dtype
    slots, block_size, caches = _cache_arguments(slot_mapping, k_cache, v_cache, k)
    _write_kv(
        MARKERS[k.dtype],
        k.data_ptr(),
        v.data_ptr(),
        (k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        k.shape,
        slots,
        block_size,
        caches,
    )


def _cache_arguments(
    slot_mapping: Tensor | None, k_cache: Tensor | None, v_cache: Tensor | None, like: Tensor
) -> tuple[int, int, tuple[int, ...]]:
    """Addresses and strides of the two caches, or zeros where nothing is to be written."""
    if slot_mapping is None:
        return 0, 1, (0,) * 8
    assert k_cache is not None and v_cache is not None
    assert k_cache.dtype == v_cache.dtype == like.dtype and slot_mapping.dtype is torch.int64
    assert slot_mapping.shape[0] == like.shape[0] and slot_mapping.is_contiguous()
    k0, k1, k2, k3 = k_cache.stride()
    v0, v1, v2, v3 = v_cache.stride()
    assert k3 == v3 == 1
    caches = (k_cache.data_ptr(), k0, k1, k2, v_cache.data_ptr(), v0, v1, v2)
    return slot_mapping.data_ptr(), k_cache.shape[1], caches


@helper
def _rotate(head, cos_sin, half):
    """Rotate the pairs (j, j + half) of one head in place."""
    upper, sin = advance(head, half), advance(cos_sin, half)
    for j in range(half):
        a, b = load(head, j), load(upper, j)
        store(head, j, a * load(cos_sin, j) - b * load(sin, j))
        store(upper, j, b * load(cos_sin, j) + a * load(sin, j))


@helper
def _copy(source, target, count):
    for j in range(count):
        store(target, j, load(source, j))


@helper
def _norm_and_rotate(marker, heads, count, head_dim, norm, eps, offset, cos_sin, half):
    """Consecutive heads of one token."""
    for h in range(count):
        head = advance(heads, h * head_dim)
        if norm != 0:
            total = sum_of_squares(head, head_dim)
            normalize(head, total, pointer(norm, marker), head, head_dim, eps, offset)
        _rotate(head, cos_sin, half)


@helper
def _write_token(marker, k, v, k_stride, v_stride, num_kv_heads, head_dim, slot, block_size, caches):
    """Heads of one token into their slot."""
    if slot < 0:
        return
    block, offset = slot // block_size, slot % block_size
    k_cache = advance(pointer(caches[0], marker), block * caches[1] + offset * caches[2])
    v_cache = advance(pointer(caches[4], marker), block * caches[5] + offset * caches[6])
    for h in range(num_kv_heads):
        _copy(advance(k, h * k_stride), advance(k_cache, h * caches[3]), head_dim)
        _copy(advance(v, h * v_stride), advance(v_cache, h * caches[7]), head_dim)


@helper
def _rope_token(
    marker,
    token,
    qkv,
    row_stride,
    positions,
    cos_sin,
    rotary_dim,
    num_heads,
    num_kv_heads,
    head_dim,
    q_norm,
    k_norm,
    eps,
    offset,
    slots,
    block_size,
    caches,
):
    q = advance(pointer(qkv, marker), token * row_stride)
    k = advance(q, num_heads * head_dim)
    v = advance(k, num_kv_heads * head_dim)
    position = load_int(pointer(positions, np.int64(0)), token)
    angles = advance(pointer(cos_sin, np.float32(0)), position * rotary_dim)
    half = rotary_dim // 2
    _norm_and_rotate(marker, q, num_heads, head_dim, q_norm, eps, offset, angles, half)
    _norm_and_rotate(marker, k, num_kv_heads, head_dim, k_norm, eps, offset, angles, half)
    if slots != 0:
        slot = load_int(pointer(slots, np.int64(0)), token)
        _write_token(
            marker, k, v, head_dim, head_dim, num_kv_heads, head_dim, slot, block_size, caches
        )


@entry
def _rope_serial(
    marker,
    qkv,
    row_stride,
    positions,
    cos_sin,
    rotary_dim,
    num_tokens,
    num_heads,
    num_kv_heads,
    head_dim,
    q_norm,
    k_norm,
    eps,
    offset,
    slots,
    block_size,
    caches,
):
    for token in range(num_tokens):
        _rope_token(
            marker,
            token,
            qkv,
            row_stride,
            positions,
            cos_sin,
            rotary_dim,
            num_heads,
            num_kv_heads,
            head_dim,
            q_norm,
            k_norm,
            eps,
            offset,
            slots,
            block_size,
            caches,
        )


@parallel_entry
def _rope_parallel(
    marker,
    qkv,
    row_stride,
    positions,
    cos_sin,
    rotary_dim,
    num_tokens,
    num_heads,
    num_kv_heads,
    head_dim,
    q_norm,
    k_norm,
    eps,
    offset,
    slots,
    block_size,
    caches,
):
    for token in prange(num_tokens):
        _rope_token(
            marker,
            token,
            qkv,
            row_stride,
            positions,
            cos_sin,
            rotary_dim,
            num_heads,
            num_kv_heads,
            head_dim,
            q_norm,
            k_norm,
            eps,
            offset,
            slots,
            block_size,
            caches,
        )


@entry
def _write_kv(marker, k, v, strides, shape, slots, block_size, caches):
    num_tokens, num_kv_heads, head_dim = shape
    k, v, slots = pointer(k, marker), pointer(v, marker), pointer(slots, np.int64(0))
    for token in range(num_tokens):
        _write_token(
            marker,
            advance(k, token * strides[0]),
            advance(v, token * strides[2]),
            strides[1],
            strides[3],
            num_kv_heads,
            head_dim,
            load_int(slots, token),
            block_size,
            caches,
        )
