# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The kernel behind :mod:`kernels.triton.quantized_gemv`.

A step of few requests is as fast as its weights are read, and these come twice or four times as
fast as 16-bit ones: at 3 TB/s an H100 has 4.9 instructions for each weight of 4 bits and 9.8 for
one of 8, of which half may be those of integers. So

- a thread loads 16 bytes at a time, in the order in which they lie (:mod:`quantized_layout`);
- a code of 4 bits becomes an fp32 number by one mask that also sets an exponent (a single
  instruction): four bits at places 16 to 19 are then 128 + c, at places 12 to 15 they are 2048 + c,
  so that half of all shifts are spared. With the multiplication that is 2.6 instructions a weight
  (1.5 of integers); 8 bits take 4, exact;
- zero points and these offsets are taken off the sum of 32 products, not off each weight:
  ``sum((o + c - o - z) x) = sum((o + c) x) - (o + z) sum(x)``, and sums of x are shared by all rows
  of the weight that a thread takes; the scale multiplies once as well.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton.activation import gate
from kernels.triton.quantized_layout import TILE_ROWS

_TILE_ROWS = tl.constexpr(TILE_ROWS)


@triton.jit
def quantized_gemv_kernel(
    out,
    x,
    words,
    scales,
    zeros,
    bias,
    residual,
    norm_weight,
    eps,
    offset,
    out_features,
    in_features,
    x_stride,
    chunks,
    num_groups,
    num_rows,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (tiles). A tile of a gated product holds as many rows of the gate as of the rest.

    ``GROUP`` is 0 for one scale an output. ``IS_EVEN``: blocks of columns end where x does.
    """
    tile = tl.program_id(0)
    row = tl.arange(0, BLOCK_N)
    if ACTIVATION == "none":
        feature = tile * BLOCK_N + row
        source = tl.minimum(feature, out_features - 1)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        inner = tl.minimum(tile * HALF + row % HALF, out_features - 1)
        source = inner + (row // HALF) * out_features
    if IS_DEPENDENT:
        gdc_launch_dependents()
    w = _load_words(words, source, 0, chunks, BITS, BLOCK_Q, IS_EVEN)
    s = _load_grid(scales, source, 0, num_groups, num_rows, BITS, GROUP, BLOCK_Q)
    z = s
    if zeros is not None:
        z = _load_grid(zeros, source, 0, num_groups, num_rows, BITS, GROUP, BLOCK_Q)
    if IS_DEPENDENT:
        gdc_wait()  # the launch before wrote x and the residual
    rstd = 1.0
    if norm_weight is not None:
        whole = tl.arange(0, BLOCK_ROW)
        value = tl.load(x + whole, mask=whole < in_features, other=0.0).to(tl.float32)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(value * value, 0) / in_features + eps))
    HAS_ZEROS: tl.constexpr = zeros is not None
    total_0 = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    total_1 = total_0
    total_2 = total_0
    total_3 = total_0
    for block in tl.range(0, NUM_BLOCKS, num_stages=1):
        next_w = w
        next_s = s
        next_z = z
        if NUM_BLOCKS > 1:  # on their way while this block is multiplied
            ahead = tl.minimum(block + 1, NUM_BLOCKS - 1)
            next_w = _load_words(words, source, ahead, chunks, BITS, BLOCK_Q, IS_EVEN)
            next_s = _load_grid(scales, source, ahead, num_groups, num_rows, BITS, GROUP, BLOCK_Q)
            next_z = next_s
            if zeros is not None:
                next_z = _load_grid(
                    zeros, source, ahead, num_groups, num_rows, BITS, GROUP, BLOCK_Q
                )
        total_0 += _multiply(
            w, s, z, x, norm_weight, rstd, offset, block, in_features,
            BITS, GROUP, BLOCK_Q, HAS_ZEROS, HAS_OFFSET, IS_EVEN, IS_INTERPRETED,
        )  # fmt: skip
        if ROWS > 1:
            total_1 += _multiply(
                w, s, z, x + x_stride, norm_weight, rstd, offset, block, in_features,
                BITS, GROUP, BLOCK_Q, HAS_ZEROS, HAS_OFFSET, IS_EVEN, IS_INTERPRETED,
            )  # fmt: skip
        if ROWS > 2:
            total_2 += _multiply(
                w, s, z, x + 2 * x_stride, norm_weight, rstd, offset, block, in_features,
                BITS, GROUP, BLOCK_Q, HAS_ZEROS, HAS_OFFSET, IS_EVEN, IS_INTERPRETED,
            )  # fmt: skip
        if ROWS > 3:
            total_3 += _multiply(
                w, s, z, x + 3 * x_stride, norm_weight, rstd, offset, block, in_features,
                BITS, GROUP, BLOCK_Q, HAS_ZEROS, HAS_OFFSET, IS_EVEN, IS_INTERPRETED,
            )  # fmt: skip
        w = next_w
        s = next_s
        z = next_z
    _finish(out, total_0, bias, residual, tile, source, out_features, ACTIVATION)
    if ROWS > 1:
        place = out + out_features
        _finish(place, total_1, bias, residual, tile, source, out_features, ACTIVATION)
    if ROWS > 2:
        place = out + 2 * out_features
        _finish(place, total_2, bias, residual, tile, source, out_features, ACTIVATION)
    if ROWS > 3:
        place = out + 3 * out_features
        _finish(place, total_3, bias, residual, tile, source, out_features, ACTIVATION)


@triton.jit
def _load_words(
    words, source, block, chunks, BITS: tl.constexpr, BLOCK_Q: tl.constexpr, IS_EVEN: tl.constexpr
):
    """Codes of one block of columns, ``[rows, pieces, 4]`` words of 32 bits.

    Beyond the last chunk it is read again; x is 0 there.
    """
    PIECES: tl.constexpr = BITS  # of 16 bytes in a row of a tile
    piece = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    chunk = piece // PIECES
    if not IS_EVEN:
        chunk = tl.minimum(chunk, chunks - 1)
    within = chunk * (_TILE_ROWS * PIECES * 4) + piece % PIECES * 4
    place = (source // _TILE_ROWS).to(tl.int64) * chunks * (_TILE_ROWS * PIECES * 4)
    place += source % _TILE_ROWS * (PIECES * 4)
    word = tl.arange(0, 4)
    return tl.load((words + place)[:, None, None] + (within[:, None] + word[None, :])[None, :, :])


@triton.jit
def _load_grid(
    grid,
    source,
    block,
    num_groups,
    num_rows,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Scales or zero points of the groups that each piece lies in.

    ``[rows, pieces]``; with several groups in a piece (4 bits in groups of 32 or 64)
    ``[rows, pieces, groups]``; with one scale an output ``[rows, 1]``.
    """
    piece = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    if GROUP == 0:
        return tl.load(grid + source)[:, None]
    elif BITS == 4 and GROUP < 128:
        SHARE: tl.constexpr = 128 // GROUP
        group = (piece // 4 * SHARE)[:, None] + tl.arange(0, SHARE)[None, :]
        place = tl.minimum(group, num_groups - 1).to(tl.int64) * num_rows
        return tl.load((grid + source)[:, None, None] + place[None, :, :])
    else:
        first = piece // 4 * 128 if BITS == 4 else piece * 16
        place = tl.minimum(first // GROUP, num_groups - 1).to(tl.int64) * num_rows
        return tl.load((grid + source)[:, None] + place[None, :])


@triton.jit
def _multiply(
    w,
    s,
    z,
    x,
    norm_weight,
    rstd,
    offset,
    block,
    in_features,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Sums of a block's products, ``[rows, pieces]``, of one row of x."""
    piece = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    bits = w.to(tl.uint32, bitcast=True)
    if BITS == 8:
        column = (piece * 16)[:, None] + tl.arange(0, 16)[None, :]
        values = _load_row(x, norm_weight, rstd, offset, column, in_features, HAS_OFFSET, IS_EVEN)
        even, odd = tl.split(tl.reshape(values, [BLOCK_Q, 4, 2, 2]))
        x_0, x_2 = tl.split(even)
        x_1, x_3 = tl.split(odd)
        acc = _byte(bits, 0) * x_0[None, :, :]
        acc += _byte(bits, 1) * x_1[None, :, :]
        acc += _byte(bits, 2) * x_2[None, :, :]
        acc += _byte(bits, 3) * x_3[None, :, :]
        total = tl.sum(acc, 2)
        if HAS_ZEROS:
            total -= z.to(tl.float32) * tl.sum(values, 1)[None, :]
        return total * s.to(tl.float32)
    first = piece // 4 * 128 + piece % 4 * 8
    low_0, high_0, sum_0 = _load_run(
        x, norm_weight, rstd, offset, first, in_features, BLOCK_Q, HAS_OFFSET, IS_EVEN
    )
    low_1, high_1, sum_1 = _load_run(
        x, norm_weight, rstd, offset, first + 32, in_features, BLOCK_Q, HAS_OFFSET, IS_EVEN
    )
    low_2, high_2, sum_2 = _load_run(
        x, norm_weight, rstd, offset, first + 64, in_features, BLOCK_Q, HAS_OFFSET, IS_EVEN
    )
    low_3, high_3, sum_3 = _load_run(
        x, norm_weight, rstd, offset, first + 96, in_features, BLOCK_Q, HAS_OFFSET, IS_EVEN
    )
    off_0 = 128.0 * sum_0
    off_1 = 2048.0 * sum_1
    off_2 = 128.0 * sum_2
    off_3 = 2048.0 * sum_3
    IS_ONE: tl.constexpr = GROUP == 0 or GROUP >= 128
    acc = _at_16(bits << 16, IS_INTERPRETED) * low_0[None, :, :]
    acc += _at_16(bits, IS_INTERPRETED) * high_0[None, :, :]
    if GROUP == 32:
        acc_0 = acc
        acc = tl.zeros_like(acc_0)
    acc += _at_12(bits << 8, IS_INTERPRETED) * low_1[None, :, :]
    acc += _at_12(bits >> 8, IS_INTERPRETED) * high_1[None, :, :]
    if not IS_ONE:
        acc_1 = acc
        acc = tl.zeros_like(acc_1)
    acc += _at_16(bits << 8, IS_INTERPRETED) * low_2[None, :, :]
    acc += _at_16(bits >> 8, IS_INTERPRETED) * high_2[None, :, :]
    if GROUP == 32:
        acc_2 = acc
        acc = tl.zeros_like(acc_2)
    acc += _at_12(bits, IS_INTERPRETED) * low_3[None, :, :]
    acc += _at_12(bits >> 16, IS_INTERPRETED) * high_3[None, :, :]
    if IS_ONE:
        offs = off_0 + off_1 + off_2 + off_3
        total = _shift(tl.sum(acc, 2), offs, sum_0 + sum_1 + sum_2 + sum_3, z, HAS_ZEROS)
        return total * s.to(tl.float32)
    elif GROUP == 64:
        s_0, s_1 = tl.split(s)
        z_0, z_1 = tl.split(z)
        total_0 = _shift(tl.sum(acc_1, 2), off_0 + off_1, sum_0 + sum_1, z_0, HAS_ZEROS)
        total_1 = _shift(tl.sum(acc, 2), off_2 + off_3, sum_2 + sum_3, z_1, HAS_ZEROS)
        return total_0 * s_0.to(tl.float32) + total_1 * s_1.to(tl.float32)
    else:
        s_even, s_odd = tl.split(tl.reshape(s, [s.shape[0], s.shape[1], 2, 2]))
        s_0, s_2 = tl.split(s_even)
        s_1, s_3 = tl.split(s_odd)
        z_even, z_odd = tl.split(tl.reshape(z, [s.shape[0], s.shape[1], 2, 2]))
        z_0, z_2 = tl.split(z_even)
        z_1, z_3 = tl.split(z_odd)
        total = _shift(tl.sum(acc_0, 2), off_0, sum_0, z_0, HAS_ZEROS) * s_0.to(tl.float32)
        total += _shift(tl.sum(acc_1, 2), off_1, sum_1, z_1, HAS_ZEROS) * s_1.to(tl.float32)
        total += _shift(tl.sum(acc_2, 2), off_2, sum_2, z_2, HAS_ZEROS) * s_2.to(tl.float32)
        total += _shift(tl.sum(acc, 2), off_3, sum_3, z_3, HAS_ZEROS) * s_3.to(tl.float32)
        return total


@triton.jit
def _at_16(bits, IS_INTERPRETED: tl.constexpr):
    """128 + the code at places 16 to 19."""
    if IS_INTERPRETED:
        return ((bits & 0xF0000) | 0x43000000).to(tl.float32, bitcast=True)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; lop3.b32 t, $1, 0x000F0000, 0x43000000, 0xEA; mov.b32 $0, t; }",
        "=f,r", [bits], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _at_12(bits, IS_INTERPRETED: tl.constexpr):
    """2048 + the code at places 12 to 15."""
    if IS_INTERPRETED:
        return ((bits & 0xF000) | 0x45000000).to(tl.float32, bitcast=True)
    # One instruction: written apart, mask and exponent, two constants, would be one each.
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; lop3.b32 t, $1, 0x0000F000, 0x45000000, 0xEA; mov.b32 $0, t; }",
        "=f,r", [bits], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _byte(bits, INDEX: tl.constexpr):
    """A signed byte of words, as fp32: 2 ** 23 + 128 + byte, less what was added."""
    found = ((bits >> (8 * INDEX)) & 0xFF) ^ 0x4B000080
    return found.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _shift(total, offs, sums, z, HAS_ZEROS: tl.constexpr):
    """Sums of ``code - zero`` from sums of ``offset + code``; without zero points it is 8."""
    if HAS_ZEROS:
        return (total - offs[None, :]) - z.to(tl.float32) * sums[None, :]
    else:
        return total - (offs + 8.0 * sums)[None, :]


@triton.jit
def _load_run(
    x,
    norm_weight,
    rstd,
    offset,
    first,
    in_features,
    BLOCK_Q: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    IS_EVEN: tl.constexpr,
):
    """8 columns from each of ``first`` on: even ones and odd ones ``[pieces, 4]``, and sums."""
    column = first[:, None] + tl.arange(0, 8)[None, :]
    values = _load_row(x, norm_weight, rstd, offset, column, in_features, HAS_OFFSET, IS_EVEN)
    low, high = tl.split(tl.reshape(values, [BLOCK_Q, 4, 2]))
    return low, high, tl.sum(low + high, 1)


@triton.jit
def _load_row(
    x,
    norm_weight,
    rstd,
    offset,
    column,
    in_features,
    HAS_OFFSET: tl.constexpr,
    IS_EVEN: tl.constexpr,
):
    """Columns of the row, normed where there is a norm and rounded as the norm alone does; fp32
    ones are rounded to bf16."""
    is_column = column < in_features
    if IS_EVEN:
        values = tl.load(x + column).to(tl.float32)
    else:
        values = tl.load(x + column, mask=is_column, other=0.0).to(tl.float32)
    if norm_weight is not None:
        dtype: tl.constexpr = x.dtype.element_ty
        if IS_EVEN:
            scale = tl.load(norm_weight + column).to(tl.float32)
        else:
            scale = tl.load(norm_weight + column, mask=is_column, other=0.0).to(tl.float32)
        values = values * rstd
        if HAS_OFFSET:
            values = values * (scale + offset)
        else:
            values = values.to(dtype).to(tl.float32) * scale
        values = values.to(dtype).to(tl.float32)
        if not IS_EVEN and HAS_OFFSET:
            values = tl.where(is_column, values, 0.0)
    if x.dtype.element_ty == tl.float32:
        values = values.to(tl.bfloat16).to(tl.float32)
    return values


@triton.jit
def _finish(out, sums, bias, residual, tile, source, out_features, ACTIVATION: tl.constexpr):
    """Write a row of the output; it is read from ``residual`` before, where there is one."""
    dtype: tl.constexpr = out.dtype.element_ty
    total = tl.sum(sums, 1)
    BLOCK_N: tl.constexpr = total.shape[0]
    if bias is not None:
        total += tl.load(bias + source).to(tl.float32)
    total = total.to(dtype).to(tl.float32)
    if ACTIVATION == "none":
        feature = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_feature = feature < out_features
        if residual is not None:
            total += tl.load(residual + feature, mask=is_feature, other=0.0).to(tl.float32)
            tl.store(residual + feature, total.to(dtype), mask=is_feature)
        else:
            tl.store(out + feature, total.to(dtype), mask=is_feature)
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        gates, rest = tl.split(tl.trans(tl.reshape(total, [2, HALF])))
        feature = tile * HALF + tl.arange(0, HALF)
        gated = gate(gates, ACTIVATION == "gelu_tanh").to(dtype).to(tl.float32)
        tl.store(out + feature, (gated * rest).to(dtype), mask=feature < out_features)
