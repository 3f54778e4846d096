# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The loop over a stretch of keys that decoding and shared prefixes have in common."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantized_kv import is_quantized
from kernels.triton.numbers import compute_dtype, decode_kv
from kernels.triton.tiles import (
    HEAD_SCALE,
    LOG2_E,
    NO_SCALE,
    TOKEN_SCALE,
    cap_scores,
    load_roots,
    sees_nodes,
    update_softmax,
)

# fp8 values come out of :func:`split_pairs` smaller by this.
FP8_FACTOR = tl.constexpr(256.0)

# Two 16-bit lanes at a time. e4m3 in the high byte of a lane, shifted right by one but for its
# sign, is the fp16 number 2 ** 8 times smaller, subnormals included.
_FP8_ASM = tl.constexpr("""{
    .reg .b32 even, odd;
    shl.b32 even, $2, 8;
    shr.u32 odd, $2, 1;
    shr.u32 $0, even, 1;
    and.b32 odd, odd, 0x3f803f80;
    and.b32 $0, $0, 0x3f803f80;
    lop3.b32 $1, $2, 0x80008000, odd, 0xea;
    lop3.b32 $0, even, 0x80008000, $0, 0xea;
}""")
# An int8 with its sign bit turned over, in the low bits of the fp16 number 1024, makes 1152 + x.
_INT8_ASM = tl.constexpr("""{
    .reg .b32 even, odd, bias;
    mov.b32 bias, 0xe480e480;
    shr.u32 odd, $2, 8;
    lop3.b32 even, $2, 0x00ff00ff, 0x64806480, 0x6a;
    lop3.b32 odd, odd, 0x00ff00ff, 0x64806480, 0x6a;
    add.rn.f16x2 $0, even, bias;
    add.rn.f16x2 $1, odd, bias;
}""")


@triton.jit
def split_pairs(pairs, KIND: tl.constexpr, IS_INTERPRETED: tl.constexpr):
    """Even and odd values of 16-bit pairs of 8-bit ones, in fp16, exactly.

    16-bit elements take the same way into the tensor cores as those of a plain cache, which 8-bit
    ones cannot; on it they are taken apart two lanes at a time. fp8 comes out smaller by
    ``FP8_FACTOR``, to be made good on the sums, and its NaN as 480.
    """
    if IS_INTERPRETED:  # it knows no assembly
        even = decode_kv((pairs & 0xFF).to(tl.uint8), KIND, tl.float16)
        odd = decode_kv(((pairs >> 8) & 0xFF).to(tl.uint8), KIND, tl.float16)
        if KIND == "fp8":
            even, odd = even * (1.0 / FP8_FACTOR), odd * (1.0 / FP8_FACTOR)
        else:
            even = tl.where(even > 127.0, even - 256.0, even)
            odd = tl.where(odd > 127.0, odd - 256.0, odd)
        even, odd = even.to(tl.float16), odd.to(tl.float16)
    else:
        even, odd = tl.inline_asm_elementwise(
            _FP8_ASM if KIND == "fp8" else _INT8_ASM,
            "=&r,=&r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return even, odd


@triton.jit
def attend_keys(
    q,
    factor,
    position,
    start,
    stop,
    table,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    TREE_WORDS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SCALES: tl.constexpr,
    KIND: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Online softmax of a tile over the keys ``start .. stop - 1``.

    Pointers are at the head's, those to rows of the tree tensor at each query's.
    """
    IS_PAIRED: tl.constexpr = KIND != "plain"
    # An 8-bit cache is read two values at a time: as many columns, and twice the sums.
    COLUMNS: tl.constexpr = BLOCK_D // 2 if IS_PAIRED else BLOCK_D
    acc = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    odd_acc = acc
    total = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if IS_PAIRED:
        q, odd_q = tl.split(tl.reshape(q, [BLOCK_M, COLUMNS, 2]))
    if TREE_WORDS > 0:
        root, position_in_text = load_roots(tree_rows, position)
    offsets = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, COLUMNS)
    is_column = columns < (HEAD_DIM // 2 if IS_PAIRED else HEAD_DIM)
    # Page numbers are read a step ahead: their latency would come on top of that of the keys. (Two
    # steps ahead, Triton gives the pipeline up.)
    page = tl.load(table + (start + offsets) // BLOCK_SIZE, mask=start + offsets < stop, other=0)
    for step in range(start, stop, BLOCK_N):
        key = step + offsets
        is_key = key < stop
        block = page.to(tl.int64)
        slot = key % BLOCK_SIZE
        mask = is_key[:, None] & is_column[None, :]
        k_at = block * k_stride_block + slot * k_stride_token
        v_at = block * v_stride_block + slot * v_stride_token
        k = tl.load(k_cache + k_at[:, None] + columns[None, :], mask=mask, other=0)
        v = tl.load(v_cache + v_at[:, None] + columns[None, :], mask=mask, other=0)
        following = key + BLOCK_N
        page = tl.load(table + following // BLOCK_SIZE, mask=following < stop, other=0)
        if IS_PAIRED:
            k, odd_k = split_pairs(k, KIND, IS_INTERPRETED)
            scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
            scores = tl.dot(odd_q, tl.trans(odd_k.to(q.dtype)), scores, input_precision="ieee")
        else:
            scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        scores *= factor[:, None]
        if SCALES == TOKEN_SCALE:
            scale_at = block * scale_stride_block + slot * scale_stride_token
            scores *= tl.load(k_scale + scale_at, mask=is_key, other=0.0)[None, :]
        if HAS_CAP:
            scores = cap_scores(scores, soft_cap) * LOG2_E
        visible = is_key[None, :]
        if IS_CAUSAL:
            visible = visible & (key[None, :] <= position[:, None])
        if TREE_WORDS > 0:
            is_node = key[None, :] >= root[:, None]
            visible = visible & sees_nodes(tree_rows, root, key, TREE_WORDS)
            if WINDOW > 0:
                near = key[None, :] > position_in_text[:, None] - WINDOW
                visible = visible & (is_node | near)
        elif WINDOW > 0:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        weights, correction, maximum, total = update_softmax(maximum, total, scores)
        acc *= correction[:, None]
        if IS_PAIRED:
            v, odd_v = split_pairs(v, KIND, IS_INTERPRETED)
            odd_acc *= correction[:, None]
            if SCALES == TOKEN_SCALE:
                # Weights times small scales would underflow in fp16: the greatest stays outside.
                values_scale = tl.load(v_scale + scale_at, mask=is_key, other=0.0)
                greatest = tl.max(values_scale, 0)
                greatest = tl.where(greatest > 0.0, greatest, 1.0)
                weights = (weights * (values_scale / greatest)[None, :]).to(q.dtype)
                acc += greatest * tl.dot(weights, v.to(q.dtype), input_precision="ieee")
                odd_acc += greatest * tl.dot(weights, odd_v.to(q.dtype), input_precision="ieee")
            else:
                weights = weights.to(q.dtype)
                acc = tl.dot(weights, v.to(q.dtype), acc, input_precision="ieee")
                odd_acc = tl.dot(weights, odd_v.to(q.dtype), odd_acc, input_precision="ieee")
        else:
            acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")
    if IS_PAIRED:
        acc = tl.interleave(acc, odd_acc)
        if KIND == "fp8":
            acc *= FP8_FACTOR
    return acc, maximum, total


def scale_mode(cache: Tensor, scale: Tensor | None) -> int:
    """What the scales of a cache belong to, as the kernels name it."""
    if not is_quantized(cache):
        return int(NO_SCALE.value)
    assert scale is not None
    return int(HEAD_SCALE.value if scale.dim() == 1 else TOKEN_SCALE.value)


def products_dtype(q: Tensor, cache: Tensor) -> tl.dtype:
    """Dtype of the products: that of ``q``, but fp16 for half-precision queries of an 8-bit cache.

    Every int8 and e4m3 value is exact in fp16, and converts to it faster than to bf16.
    """
    if is_quantized(cache) and q.dtype != torch.float32:
        return tl.float16
    return compute_dtype(q.dtype)


def cache_views(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor, str]:
    """Caches as the kernels take them, 8-bit values in pairs, and what they hold (``KIND``)."""
    assert k_cache.stride(3) == v_cache.stride(3) == 1
    kind = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(k_cache.dtype, "plain")
    return as_pairs(k_cache), as_pairs(v_cache), kind


def as_pairs(x: Tensor) -> Tensor:
    """8-bit values as pairs in 16-bit integers; anything else as it is."""
    return x.view(torch.int16) if is_quantized(x) else x
