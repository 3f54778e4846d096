# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""QK-norm, rotary embedding and KV write in one pass over the fused QKV projection, in Triton.

Every element of a token's row is read once. Heads are rows of a tile, each in two halves and what
rotation leaves alone; values take the same way with a rotation by nothing. Keys and values go to
their slots as they are, or in 8 bits with a scale of their own or a fixed one, from the same
registers. Semantics: :mod:`kernels.rotary`, :mod:`kernels.quantized_kv`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.quantized_kv import GREATEST_VALUE, LEAST_AMAX, check_kv_scale
from kernels.triton import has_dependent_launch, num_multiprocessors
from kernels.triton.launch import Launcher, dependent_options, planned
from kernels.triton.numbers import as_bits, encode_fp8, encode_int8, kind_of, scale_strides

_LEAST_AMAX = tl.constexpr(LEAST_AMAX)


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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """See :func:`kernels.rotary.apply_rope_and_write_kv`."""
    if len(qkv):
        tensors = (qkv, positions, cos_sin, slot_mapping, k_cache, v_cache, k_scale, v_scale)
        sizes = (num_heads, num_kv_heads, head_dim)
        _rope((*tensors, q_norm, k_norm), *sizes, norm_eps, norm_offset)


def write_kv(
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """See :func:`kernels.kv_cache.write_kv`."""
    assert v.shape == k.shape
    if k.shape[0] == 0:
        return
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        # Heads that are all "values" are copied and nothing else.
        tensors = (x, None, None, slot_mapping, None, cache, None, scale, None, None)
        _rope(tensors, 0, 0, x.shape[2], 0.0, 0.0)


@planned
def _rope(
    x: Tensor,
    positions: Tensor | None,
    cos_sin: Tensor | None,
    slot_mapping: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    norm_eps: float,
    norm_offset: float,
) -> Launcher:
    """The kernel over ``x [T, (q heads, then k heads, then v heads) * D]``, or ``[T, heads, D]`` of
    which all are values."""
    heads = x
    assert x.stride(-1) == 1
    if cos_sin is not None:
        assert x.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim
        assert cos_sin.stride(1) == 1 and cos_sin.shape[1] <= head_dim and cos_sin.shape[1] % 2 == 0
        total = num_heads + (2 * num_kv_heads if slot_mapping is not None else num_kv_heads)
        heads = x.unflatten(1, (-1, head_dim))[:, :total]
    num_tokens, total = heads.shape[:2]
    rotary_dim = 0 if cos_sin is None else cos_sin.shape[1]
    half, rest = rotary_dim // 2, head_dim - rotary_dim
    for cache, scale, name in ((k_cache, k_scale, "k_scale"), (v_cache, v_scale, "v_scale")):
        if cache is not None:
            check_kv_scale(cache, scale, name)
            assert cache.stride(3) == 1
    if k_cache is not None and v_cache is not None:
        dims = [None if s is None else s.dim() for s in (k_scale, v_scale)]
        is_alike = k_cache.dtype == v_cache.dtype and k_cache.shape[1] == v_cache.shape[1]
        if not is_alike or dims[0] != dims[1]:
            raise ValueError(
                "keys and values must be stored alike: in one dtype, block size and kind of scale"
            )
    cache = v_cache
    scale = v_scale
    block_size = 1 if cache is None else cache.shape[1]
    rows = _rows_a_program(num_tokens, total, head_dim, heads.device)
    is_dependent = has_dependent_launch(heads.device)
    return Launcher(
        rope_kernel,
        (num_tokens, triton.cdiv(total, rows)),
        norm_eps,
        norm_offset,
        heads.stride(0),
        heads.stride(1),
        0 if cos_sin is None else cos_sin.stride(0),
        *_strides(k_cache),
        *_strides(v_cache),
        *scale_strides(k_scale),
        *scale_strides(v_scale),
        num_heads,
        num_kv_heads,
        total,
        HEAD_DIM=head_dim,
        HALF=half,
        BLOCK_HALF=max(1, triton.next_power_of_2(max(half, 1))),
        REST=rest,
        BLOCK_REST=max(1, triton.next_power_of_2(max(rest, 1))),
        PAGE=block_size,
        ROWS=rows,
        KIND="plain" if cache is None else kind_of(cache),
        GREATEST=1.0 if cache is None else GREATEST_VALUE.get(cache.dtype, 1.0),
        SCALE_DIMS=0 if scale is None else scale.dim(),
        HAS_NORM_OFFSET=norm_offset != 0.0,
        IS_DEPENDENT=is_dependent,
        num_warps=4 if rows * head_dim >= 2048 else 1,
        seen_as=as_bits,
        **dependent_options(is_dependent),
    )


def _rows_a_program(num_tokens: int, total: int, head_dim: int, device: torch.device) -> int:
    """Heads a program: all of a token where tokens fill the card by themselves, else a few.

    Not fewer than give each thread eight values of a head's half: how many it has decides in which
    order a head's squares are added, which must not depend on the number of tokens.
    """
    enough = total * num_tokens // (64 * num_multiprocessors(device))
    least = 8 if num_tokens > 1 else 4
    least = max(least, min(64, triton.next_power_of_2(triton.cdiv(512, head_dim))))
    return int(max(least, min(64, triton.next_power_of_2(max(1, enough)))))


def _strides(cache: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if cache is None else cache.stride()[:3]


@triton.jit
def _normalize(x, rstd, weight, offset, dtype: tl.constexpr, HAS_OFFSET: tl.constexpr):
    """``x`` over its root mean square, times the weight: rounded where the reference rounds."""
    x = x * rstd[:, None]
    if HAS_OFFSET:
        return (x * (weight.to(tl.float32) + offset)).to(dtype).to(tl.float32)
    product = x.to(dtype).to(tl.float32) * weight.to(tl.float32)
    return product.to(dtype).to(tl.float32)


@triton.jit
def _encode(x, scale, KIND: tl.constexpr, GREATEST: tl.constexpr, dtype: tl.constexpr):
    """What a cache stores of ``x``, divided by its row's scale."""
    if KIND == "plain":
        stored = x.to(dtype)
    else:
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        x = tl.minimum(tl.maximum(x, -GREATEST), GREATEST)
        if KIND == "int8":
            stored = encode_int8(x)
        else:
            stored = encode_fp8(x)
    return stored


@triton.jit
def _write(
    first,
    second,
    rest,
    scale,
    base,
    scale_base,
    is_row,
    half,
    tail,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    KIND: tl.constexpr,
    GREATEST: tl.constexpr,
    SCALE_DIMS: tl.constexpr,
):
    """Rows of a head's three parts to their places in a cache, and their scales beside them."""
    dtype: tl.constexpr = base.dtype.element_ty
    if HALF > 0:
        is_half = is_row[:, None] & (half < HALF)[None, :]
        place = base[:, None] + half[None, :]
        tl.store(place, _encode(first, scale, KIND, GREATEST, dtype), mask=is_half)
        tl.store(place + HALF, _encode(second, scale, KIND, GREATEST, dtype), mask=is_half)
    if REST > 0:
        tl.store(
            base[:, None] + 2 * HALF + tail[None, :],
            _encode(rest, scale, KIND, GREATEST, dtype),
            mask=is_row[:, None] & (tail < REST)[None, :],
        )
    if SCALE_DIMS == 3:
        tl.store(scale_base, scale, mask=is_row)


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads", "total"])
def rope_kernel(
    heads_ptr,
    positions_ptr,
    cos_sin_ptr,
    slots_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    q_norm_ptr,
    k_norm_ptr,
    norm_eps,
    norm_offset,
    stride_token,
    stride_head,
    cos_stride,
    k_stride_block,
    k_stride_token,
    k_stride_head,
    v_stride_block,
    v_stride_token,
    v_stride_head,
    ks_stride_block,
    ks_stride_token,
    ks_stride_head,
    vs_stride_block,
    vs_stride_token,
    vs_stride_head,
    num_heads,
    num_kv_heads,
    total,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    GREATEST: tl.constexpr,
    SCALE_DIMS: tl.constexpr,
    HAS_NORM_OFFSET: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (tokens, heads / ROWS). Keys follow the queries and values the keys."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    half = tl.arange(0, BLOCK_HALF)
    tail = tl.arange(0, BLOCK_REST)
    dtype: tl.constexpr = heads_ptr.dtype.element_ty
    is_head = head < total
    is_query = head < num_heads
    is_rotated = head < num_heads + num_kv_heads
    rows = heads_ptr + token * stride_token + head * stride_head

    is_half = is_head[:, None] & (half < HALF)[None, :]
    is_tail = is_head[:, None] & (tail < REST)[None, :]
    if IS_DEPENDENT:
        gdc_launch_dependents()
    # Positions and slots are a step's inputs, older than the launch ahead, which wrote the rows.
    if HALF > 0:
        angles = cos_sin_ptr + tl.load(positions_ptr + token) * cos_stride + half
        cos = tl.load(angles, mask=half < HALF, other=0.0)[None, :]
        sin = tl.load(angles + HALF, mask=half < HALF, other=0.0)[None, :]
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + token)
    if IS_DEPENDENT:
        gdc_wait()
    first = tl.zeros([ROWS, BLOCK_HALF], tl.float32)
    second = first
    rest = tl.zeros([ROWS, BLOCK_REST], tl.float32)
    if HALF > 0:
        place = rows[:, None] + half[None, :]
        first = tl.load(place, mask=is_half, other=0.0).to(tl.float32)
        second = tl.load(place + HALF, mask=is_half, other=0.0).to(tl.float32)
    if REST > 0:
        place = rows[:, None] + 2 * HALF + tail[None, :]
        rest = tl.load(place, mask=is_tail, other=0.0).to(tl.float32)

    if q_norm_ptr is not None or k_norm_ptr is not None:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / HEAD_DIM + norm_eps))
        for which in tl.static_range(2):
            norm_ptr = q_norm_ptr if which == 0 else k_norm_ptr
            if norm_ptr is not None:
                chosen = is_query if which == 0 else (is_rotated & (head >= num_heads))
                chosen = chosen[:, None]
                if HALF > 0:
                    w = tl.load(norm_ptr + half, mask=half < HALF, other=0.0)[None, :]
                    x = _normalize(first, rstd, w, norm_offset, dtype, HAS_NORM_OFFSET)
                    first = tl.where(chosen, x, first)
                    w = tl.load(norm_ptr + HALF + half, mask=half < HALF, other=0.0)[None, :]
                    x = _normalize(second, rstd, w, norm_offset, dtype, HAS_NORM_OFFSET)
                    second = tl.where(chosen, x, second)
                if REST > 0:
                    w = tl.load(norm_ptr + 2 * HALF + tail, mask=tail < REST, other=0.0)[None, :]
                    x = _normalize(rest, rstd, w, norm_offset, dtype, HAS_NORM_OFFSET)
                    rest = tl.where(chosen, x, rest)

    if HALF > 0:
        turned_first = first * cos - second * sin
        turned_second = second * cos + first * sin
        # Rounded to the model's precision, as what is read back from the projection would be.
        turned_first = turned_first.to(dtype).to(tl.float32)
        turned_second = turned_second.to(dtype).to(tl.float32)
        first = tl.where(is_rotated[:, None], turned_first, first)
        second = tl.where(is_rotated[:, None], turned_second, second)
        place = rows[:, None] + half[None, :]
        is_changed = is_half & is_rotated[:, None]
        tl.store(place, first.to(dtype), mask=is_changed)
        tl.store(place + HALF, second.to(dtype), mask=is_changed)
    if (REST > 0) and (q_norm_ptr is not None or k_norm_ptr is not None):
        place = rows[:, None] + 2 * HALF + tail[None, :]
        tl.store(place, rest.to(dtype), mask=is_tail & is_rotated[:, None])

    if slots_ptr is not None:  # noqa: SIM102 - known when it is compiled, the other is not
        if slot >= 0:
            block = slot // PAGE
            offset = slot % PAGE
            scale = tl.zeros([ROWS], tl.float32)
            if SCALE_DIMS == 3:
                amax = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
                amax = tl.maximum(amax, tl.max(tl.abs(rest), 1))
                scale = tl.div_rn(
                    tl.maximum(amax, _LEAST_AMAX), tl.full([ROWS], GREATEST, tl.float32)
                )
            for which in tl.static_range(2):
                cache_ptr = k_ptr if which == 0 else v_ptr
                if cache_ptr is not None:
                    if which == 0:
                        kv_head = head - num_heads
                        is_row = is_rotated & (kv_head >= 0) & is_head
                        base = (
                            k_ptr
                            + block * k_stride_block
                            + offset * k_stride_token
                            + kv_head * k_stride_head
                        )
                        scale_base = k_scale_ptr
                        if SCALE_DIMS > 0:
                            scale_base = (
                                k_scale_ptr
                                + block * ks_stride_block
                                + offset * ks_stride_token
                                + kv_head * ks_stride_head
                            )
                    else:
                        kv_head = head - num_heads - num_kv_heads
                        is_row = (kv_head >= 0) & is_head
                        base = (
                            v_ptr
                            + block * v_stride_block
                            + offset * v_stride_token
                            + kv_head * v_stride_head
                        )
                        scale_base = v_scale_ptr
                        if SCALE_DIMS > 0:
                            scale_base = (
                                v_scale_ptr
                                + block * vs_stride_block
                                + offset * vs_stride_token
                                + kv_head * vs_stride_head
                            )
                    if SCALE_DIMS == 1:
                        scale = tl.load(scale_base, mask=is_row, other=1.0)
                    _write(
                        first,
                        second,
                        rest,
                        scale,
                        base,
                        scale_base,
                        is_row,
                        half,
                        tail,
                        HEAD_DIM,
                        HALF,
                        REST,
                        KIND,
                        GREATEST,
                        SCALE_DIMS,
                    )


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        dtype: torch.dtype = torch.bfloat16,
        *,
        num_tokens: int = 4096,
        dim: int = 128,
        rotary_dim: int | None = None,
        cache_dtype: torch.dtype | None = None,
        scale_dims: int = 3,
        has_norm: bool = False,
    ) -> Callable[[], object]:
        def run() -> object:
            heads, kv_heads = 32, 8
            empty = partial(torch.empty, device="meta")
            index = empty((num_tokens,), dtype=torch.int64)
            cache = empty((64, 16, kv_heads, dim), dtype=cache_dtype or dtype)
            norm = empty((dim,), dtype=dtype) if has_norm else None
            scale = None
            if cache_dtype is not None:
                scale = empty((64, 16, kv_heads) if scale_dims == 3 else (kv_heads,))
            apply_rope_and_write_kv(
                empty((num_tokens, (heads + 2 * kv_heads) * dim), dtype=dtype),
                index,
                empty((4096, rotary_dim or dim)),
                index,
                cache,
                cache,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=dim,
                q_norm=norm,
                k_norm=norm,
                k_scale=scale,
                v_scale=scale,
            )
            return None

        return run

    def write() -> object:
        x = torch.empty(64, 8, 128, dtype=torch.bfloat16, device="meta")
        cache = torch.empty(64, 16, 8, 128, dtype=torch.bfloat16, device="meta")
        write_kv(x, x, torch.empty(64, dtype=torch.int64, device="meta"), cache, cache)
        return None

    return {
        "bf16, D 128": call(),
        "bf16, one token, norms": call(num_tokens=1, has_norm=True),
        "fp16, D 80, rotary 32": call(torch.float16, dim=80, rotary_dim=32),
        "fp32, D 64, norms": call(torch.float32, dim=64, has_norm=True),
        "bf16 to int8": call(cache_dtype=torch.int8),
        "bf16 to fp8, fixed scales": call(cache_dtype=torch.float8_e4m3fn, scale_dims=1),
        "write alone": write,
    }
