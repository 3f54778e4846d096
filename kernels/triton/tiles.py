# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What the attention kernels share: rows of a tile, tiles of a paged cache, the online softmax.

Scores are kept in base 2 (multiplied by log2 e), since a GPU has ``exp2`` and ``log2`` only. A row
without any key has the running maximum ``-inf``; nothing here makes NaN of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# What a scale of a quantised cache belongs to.
NO_SCALE = tl.constexpr(0)
HEAD_SCALE = tl.constexpr(1)
TOKEN_SCALE = tl.constexpr(2)


@triton.jit
def finite_or_zero(maximum):
    """A running maximum to subtract: 0 where no key has been seen."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def cap_scores(scores, cap):
    """``cap * tanh(scores / cap)``; exp2 overflows to infinity or to 0, which is right for both."""
    return cap - 2.0 * cap / (1.0 + tl.exp2(scores * LOG2_E * (2.0 / cap)))


@triton.jit
def round_query(q, COMPUTE: tl.constexpr):
    """Queries for products in ``COMPUTE``, and the factor of each row to put back on its scores.

    A bf16 query may lie beyond the range of fp16, in which the products of an 8-bit cache run:
    there each row is divided by its greatest value.
    """
    factor = tl.full([q.shape[0]], 1.0, tl.float32)
    if tl.float16 == COMPUTE and q.dtype == tl.bfloat16:
        wide = q.to(tl.float32)
        amax = tl.max(tl.abs(wide), 1)
        factor = tl.where(amax > 0.0, amax, 1.0)
        q = wide / factor[:, None]
    return q.to(COMPUTE), factor


@triton.jit
def update_softmax(maximum, total, scores):
    """Take a tile of scores ``[M, N]`` (base 2, ``-inf`` where hidden) into the running state.

    Returns the weights of the values ``[M, N]``, the correction ``[M]`` of what was summed before,
    and the new maximum and total ``[M]``.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    shift = finite_or_zero(new_maximum)
    weights = tl.exp2(scores - shift[:, None])
    correction = tl.exp2(maximum - shift)
    return weights, correction, new_maximum, total * correction + tl.sum(weights, 1)


@triton.jit
def finish_softmax(acc, maximum, total):
    """Output ``[M, D]`` and log-sum-exp ``[M]`` (base 2); 0 and ``-inf`` where no key was seen."""
    has_none = total == 0.0  # false for NaN, which must show
    out = acc / tl.where(has_none, 1.0, total)[:, None]
    lse = tl.where(has_none, float("-inf"), maximum + tl.log2(tl.where(has_none, 1.0, total)))
    return out, lse


@triton.jit
def merge_tiles(
    outs,
    lses,
    row,
    stride,
    first_shift,
    count,
    is_row,
    dims,
    is_dim,
    acc,
    maximum,
    total,
    LSE_FACTOR: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Merge ``count`` states in memory into a running one ``[R, D]``, ``BLOCK_P`` at a time.

    State ``s`` of row ``r`` lies at row ``row[r] + s * stride`` of ``outs [.., D]`` and ``lses``,
    and state 0 at ``first_shift`` rows more; ``LSE_FACTOR`` brings the latter to base 2. Returns
    the running state, for ``finish_softmax``.
    """
    for start in range(0, count, BLOCK_P):
        state = start + tl.arange(0, BLOCK_P)
        at = row[None, :] + (state * stride + tl.where(state == 0, first_shift, 0))[:, None]
        mask = (state < count)[:, None] & is_row[None, :]
        lse = tl.load(lses + at, mask=mask, other=float("-inf"), cache_modifier=".cg") * LSE_FACTOR
        values = tl.load(
            outs + at[:, :, None] * HEAD_DIM + dims[None, None, :],
            mask=mask[:, :, None] & is_dim[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_maximum = tl.maximum(maximum, tl.max(lse, 0))
        shift = finite_or_zero(new_maximum)
        weights = tl.exp2(lse - shift[None, :])
        correction = tl.exp2(maximum - shift)
        acc = acc * correction[:, None] + tl.sum(weights[:, :, None] * values, 0)
        total = total * correction + tl.sum(weights, 0)
        maximum = new_maximum
    return acc, maximum, total


@triton.jit
def merge_pair(out_a, lse_a, out_b, lse_b):
    """Attention over two disjoint sets of keys from each one's ``[M, D]`` and ``[M]`` (base 2).

    The output of a side that saw no key may hold anything.
    """
    out_a = tl.where((lse_a == float("-inf"))[:, None], 0.0, out_a)
    out_b = tl.where((lse_b == float("-inf"))[:, None], 0.0, out_b)
    shift = finite_or_zero(tl.maximum(lse_a, lse_b))
    a, b = tl.exp2(lse_a - shift), tl.exp2(lse_b - shift)
    total = a + b
    has_none = total == 0.0
    total = tl.where(has_none, 1.0, total)
    out = out_a * (a / total)[:, None] + out_b * (b / total)[:, None]
    return out, tl.where(has_none, float("-inf"), shift + tl.log2(total))


@triton.jit
def load_roots(tree_rows, index):
    """Where each row's tree begins, and its position in the text of its path, which stands at
    ``index``; pointers are to rows of :mod:`kernels.tree_attention`."""
    root = tl.load(tree_rows).to(tl.int32)
    depth = tl.load(tree_rows + 1).to(tl.int32)
    return root, tl.where(depth > 0, root - 1 + depth, index)


@triton.jit
def sees_nodes(tree_rows, root, key, TREE_WORDS: tl.constexpr):
    """Whether rows see keys, as far as trees hide them: ``[rows, keys]``."""
    node = key[None, :] - root[:, None]
    seen = node < 0
    for word in tl.static_range(TREE_WORDS):
        bits = tl.load(tree_rows + 2 + word)
        place = node - 64 * word
        is_here = (place >= 0) & (place < 64)
        seen |= is_here & ((bits[:, None] >> tl.where(is_here, place, 0).to(tl.int64)) & 1 != 0)
    return seen
