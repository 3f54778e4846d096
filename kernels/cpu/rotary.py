"""QK-norm, rotary embedding and KV write on the CPU, in one pass over the tokens.

Semantics: :mod:`kernels.rotary` and :mod:`kernels.kv_cache`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.launch import float_argument, int_arguments, kernel, report_fault
from kernels.cpu.norm import normalize
from kernels.cpu.pointers import (
    advance,
    float_pointer,
    helper,
    int64_pointer,
    load,
    load_int,
    pointer,
    store,
)

_PARALLEL_NUMEL = 1 << 17  # under which a second thread costs more than it saves


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
    row_stride, dense = qkv.stride()
    rotary_dim = cos_sin.shape[1]
    assert width == (num_heads + 2 * num_kv_heads) * head_dim and dense == 1
    assert rotary_dim <= head_dim and cos_sin.dtype is torch.float32 and cos_sin.is_contiguous()
    assert positions.shape[0] == num_tokens and positions.dtype is torch.int64
    assert positions.is_contiguous()
    _rope(
        qkv.dtype,
        num_tokens,
        num_tokens * width >= _PARALLEL_NUMEL,
        qkv.data_ptr(),
        row_stride,
        positions.data_ptr(),
        cos_sin.data_ptr(),
        cos_sin.shape[0],
        rotary_dim,
        num_heads,
        num_kv_heads,
        head_dim,
        _norm_address(q_norm, qkv, head_dim),
        _norm_address(k_norm, qkv, head_dim),
        *_cache_arguments(slot_mapping, k_cache, v_cache, qkv, num_kv_heads, head_dim),
        norm_eps,
        norm_offset,
    )


def write_kv(k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """See :func:`kernels.kv_cache.write_kv`."""
    num_tokens, num_kv_heads, head_dim = k.shape
    k0, k1, k2 = k.stride()
    v0, v1, v2 = v.stride()
    assert k2 == v2 == 1 and k.dtype == v.dtype and v.shape == k.shape
    _write_kv(
        k.dtype,
        num_tokens,
        num_tokens * num_kv_heads * head_dim >= _PARALLEL_NUMEL,
        k.data_ptr(),
        k0,
        k1,
        v.data_ptr(),
        v0,
        v1,
        num_kv_heads,
        head_dim,
        *_cache_arguments(slot_mapping, k_cache, v_cache, k, num_kv_heads, head_dim),
    )


def _norm_address(weight: Tensor | None, like: Tensor, head_dim: int) -> int:
    if weight is None:
        return 0
    assert weight.dtype == like.dtype and weight.shape[0] == head_dim and weight.is_contiguous()
    return weight.data_ptr()


def _cache_arguments(
    slot_mapping: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    like: Tensor,
    num_kv_heads: int,
    head_dim: int,
) -> tuple[int, ...]:
    """Slots, numbers of slots and of slots a block, and each cache's address and strides.

    Zeros where nothing is to be written.
    """
    if slot_mapping is None:
        return (0, 0, 1) + (0,) * 8
    assert k_cache is not None and v_cache is not None
    assert k_cache.dtype == v_cache.dtype == like.dtype and slot_mapping.dtype is torch.int64
    assert slot_mapping.shape[0] == like.shape[0] and slot_mapping.is_contiguous()
    num_blocks, block_size, kv_heads, dim = k_cache.shape
    assert kv_heads == num_kv_heads and dim == head_dim and v_cache.shape == k_cache.shape
    k0, k1, k2, k3 = k_cache.stride()
    v0, v1, v2, v3 = v_cache.stride()
    assert k3 == v3 == 1
    caches = (k_cache.data_ptr(), k0, k1, k2, v_cache.data_ptr(), v0, v1, v2)
    return (slot_mapping.data_ptr(), num_blocks * block_size, block_size, *caches)


@helper
def _rotate_heads(marker, heads, count, head_dim, norm, eps, offset, cos, half):
    """Normalise and rotate consecutive heads of one token in place: the pairs (j, j + half)."""
    sin = advance(cos, half)
    for h in range(count):
        lower = advance(heads, h * head_dim)
        if norm != 0:
            normalize(lower, pointer(norm, marker), lower, head_dim, eps, offset)
        upper = advance(lower, half)
        for j in range(half):
            a, b = load(lower, j), load(upper, j)
            store(lower, j, a * load(cos, j) - b * load(sin, j))
            store(upper, j, b * load(cos, j) + a * load(sin, j))


@helper
def _write_heads(marker, source, head_stride, num_kv_heads, head_dim, slot, block_size, cache):
    """The k or v heads of one token into their slot; ``cache`` is an address and three strides."""
    block, offset = slot // block_size, slot % block_size
    target = advance(pointer(cache[0], marker), block * cache[1] + offset * cache[2])
    for h in range(num_kv_heads):
        head, to = advance(source, h * head_stride), advance(target, h * cache[3])
        for j in range(head_dim):
            store(to, j, load(head, j))


@kernel(
    ints=22,
    floats=2,
    fault="a position is past the rows of cos_sin, or a slot past the end of the cache",
)
def _rope(marker, arguments, begin, end):
    values = int_arguments(arguments, 22)
    qkv, row_stride, positions, cos_sin, num_positions, rotary_dim = values[:6]
    num_heads, num_kv_heads, head_dim, q_norm, k_norm = values[6:11]
    slots, num_slots, block_size = values[11:14]
    k_cache, v_cache = values[14:18], values[18:22]
    eps, offset = float_argument(arguments, 22), float_argument(arguments, 23)
    half = rotary_dim // 2
    for token in range(begin, end):
        position = load_int(int64_pointer(positions), token)
        slot = load_int(int64_pointer(slots), token) if slots != 0 else -1
        if position < 0 or position >= num_positions or (slots != 0 and slot >= num_slots):
            report_fault(arguments)
            continue
        cos = advance(float_pointer(cos_sin), position * rotary_dim)
        q = advance(pointer(qkv, marker), token * row_stride)
        k = advance(q, num_heads * head_dim)
        v = advance(k, num_kv_heads * head_dim)
        _rotate_heads(marker, q, num_heads, head_dim, q_norm, eps, offset, cos, half)
        _rotate_heads(marker, k, num_kv_heads, head_dim, k_norm, eps, offset, cos, half)
        if slot >= 0:
            _write_heads(marker, k, head_dim, num_kv_heads, head_dim, slot, block_size, k_cache)
            _write_heads(marker, v, head_dim, num_kv_heads, head_dim, slot, block_size, v_cache)


@kernel(ints=19, fault="a slot is past the end of the cache")
def _write_kv(marker, arguments, begin, end):
    values = int_arguments(arguments, 19)
    k, k_stride, k_head_stride, v, v_stride, v_head_stride, num_kv_heads, head_dim = values[:8]
    slots, num_slots, block_size = values[8:11]
    k_cache, v_cache = values[11:15], values[15:19]
    for token in range(begin, end):
        slot = load_int(int64_pointer(slots), token)
        if slot >= num_slots:
            report_fault(arguments)
        elif slot >= 0:
            row = advance(pointer(k, marker), token * k_stride)
            _write_heads(
                marker, row, k_head_stride, num_kv_heads, head_dim, slot, block_size, k_cache
            )
            row = advance(pointer(v, marker), token * v_stride)
            _write_heads(
                marker, row, v_head_stride, num_kv_heads, head_dim, slot, block_size, v_cache
            )
