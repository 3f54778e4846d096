# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The kernel behind :mod:`kernels.triton.quantized_gemm`.

Codes become 16-bit numbers in registers, in the layout in which the tensor cores take them, and are
exact there: 128 + c in bf16 by one mask of two codes, less 128 + z by one addition (under one
instruction a weight). Runs of 32 columns (:mod:`quantized_layout`) are products of their own with
the columns of x that they belong to, so that no code changes its place.

Of few rows, the sum of a group is scaled, in fp32: a group is a step along K, and nothing but its
sum is rounded. Of many rows, that would take as many registers again as the sums: weights are
scaled there before they are multiplied, and are rounded to 16 bits as those of a plain checkpoint
are.

Papers: Frantar et al., "MARLIN", 2024, arXiv:2408.11743 (codes in the order of the tensor cores);
Kim et al., "Who Says Elephants Can't Run", 2022, arXiv:2211.10017 (numbers from codes by masks).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton.activation import gate
from kernels.triton.prefetch import prefetch
from kernels.triton.quantized_layout import TILE_ROWS
from kernels.triton.skinny_gemm import add_pieces, owner_of

_TILE_ROWS = tl.constexpr(TILE_ROWS)


def decoder(run: int, is_half: bool, has_zeros: bool, is_scaled: bool) -> str:
    """Two codes of a run to two numbers, in PTX: ``$1`` holds them, ``$2`` what to add to the
    numbers (minus their offset and zero point), ``$3`` their scales."""
    kind, one, base = ("f16x2", 0x3C00, 0x6400) if is_half else ("bf16x2", 0x3F80, 0x4300)
    shift = -(1024 + 8) if is_half else -(128 + 8)
    dtype = torch.float16 if is_half else torch.bfloat16
    constant = int(torch.tensor(shift, dtype=dtype).view(torch.int16)) & 0xFFFF

    def both(half: int) -> str:
        return f"0x{half * 0x10001:08X}"

    lines = [".reg .b32 t, a, b, z;"]
    source = "$1"
    if run:
        lines.append(f"shr.u32 t, $1, {4 * run};")
        source = "t"
    lines.append(f"lop3.b32 t, {source}, 0x000F000F, {both(base)}, 0xEA;")
    lines += [f"mov.b32 a, {both(one)};", f"mov.b32 z, {both(0x8000)};"]
    lines.append("mov.b32 b, $2;" if has_zeros else f"mov.b32 b, {both(constant)};")
    if not is_scaled:
        lines.append(f"fma.rn.{kind} $0, t, a, b;")
    else:
        lines.append(f"fma.rn.{kind} t, t, a, b;")
        lines.append(f"fma.rn.{kind} $0, t, {'$3' if has_zeros else '$2'}, z;")
    return "{ " + " ".join(lines) + " }"


@triton.jit(do_not_specialize=["num_tokens"])
def quantized_gemm_kernel(
    out,
    x,
    words,
    scales,
    zeros,
    bias,
    parts,
    counters,
    num_tokens,
    out_features,
    in_features,
    x_stride,
    chunks,
    num_groups,
    num_rows,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PREFETCHED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    BESIDE: tl.constexpr,
    SCALES_WEIGHTS: tl.constexpr,
    IS_SHARED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DECODE_0: tl.constexpr,
    DECODE_1: tl.constexpr,
    DECODE_2: tl.constexpr,
    DECODE_3: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (programs). Blocks are counted along K first, then from tile to tile.

    With an activation, a tile is as many rows of the gate as of what it multiplies. ``GROUP`` is 0
    for one scale an output; ``DECODE`` are the instructions of each run of 4 bits. ``IS_SHARED``:
    programs may end within a tile.
    """
    IS_GATED: tl.constexpr = ACTIVATION != "none"
    WIDTH: tl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N  # columns of the output
    STORED: tl.constexpr = BLOCK_K // 4 if BITS == 4 else BLOCK_K  # words of 16 bits, or bytes
    ROW: tl.constexpr = 32 if BITS == 4 else 128  # of them in a row of a tile
    IN_ORDER: tl.constexpr = GROUP == 0 or GROUP >= BLOCK_K  # one scale a block
    # A block of 4 bits is one product where it has one scale and one chunk, else one for each run.
    IS_JOINED: tl.constexpr = BITS == 4 and IN_ORDER and BLOCK_K == 128
    RUNS: tl.constexpr = 4 if BITS == 4 and not IS_JOINED else 1
    IS_CHAINED: tl.constexpr = GROUP == 0 or SCALES_WEIGHTS  # all products into one sum
    # What is multiplied into weights is loaded in its step: carried from step to step, it would
    # not be had in the layout of the tensor cores.
    IS_AHEAD: tl.constexpr = IN_ORDER and not IS_CHAINED
    program = tl.program_id(0)
    blocks = tl.cdiv(in_features, BLOCK_K)  # of a tile
    tiles_n = tl.cdiv(out_features, WIDTH)
    tiles_t = tl.cdiv(num_tokens, BLOCK_T)
    total = tiles_n * tiles_t * blocks
    share = total // tl.num_programs(0)
    extra = total % tl.num_programs(0)  # programs with one block more, the first ones
    block = program * share + tl.minimum(program, extra)
    last_block = block + share + (program < extra).to(tl.int32)
    row = tl.arange(0, BLOCK_N)
    stored = tl.arange(0, STORED)
    if IS_DEPENDENT:
        gdc_launch_dependents()
        if PREFETCHED > 0:
            _prefetch_weight(
                words, block, last_block, blocks, tiles_n, tiles_t, chunks, out_features,
                BITS, BLOCK_N, WIDTH, BLOCK_K, BESIDE, PREFETCHED,
            )  # fmt: skip
        gdc_wait()  # the launch before wrote x, and may use the same parts and counters
    if BITS == 4:
        codes = words.to(tl.pointer_type(tl.int16), bitcast=True)
        column = tl.arange(0, 128) if IS_JOINED else stored // 32 * 128 + stored % 32
    else:
        codes = words.to(tl.pointer_type(tl.int8), bitcast=True)
        column = stored
    while block < last_block:  # one tile's part of the share a turn
        tile = block // blocks
        first = block - tile * blocks
        count = tl.minimum(blocks - first, last_block - block)
        tile_t, tile_n = _place_of(tile, tiles_n, tiles_t, BESIDE)
        token = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
        is_token = token < num_tokens
        # Rows beyond the end are read as the last one, and not written.
        if IS_GATED:
            source = tl.minimum(tile_n * WIDTH + row % WIDTH, out_features - 1)
            source += row // WIDTH * out_features
        else:
            source = tl.minimum(tile_n * WIDTH + row, out_features - 1)
        at = (source // _TILE_ROWS).to(tl.int64) * chunks * (_TILE_ROWS * ROW)
        w_rows = codes + at + source % _TILE_ROWS * ROW
        x_rows = x + token.to(tl.int64) * x_stride
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        s, z = load_grid(
            scales, zeros, source, first * BLOCK_K, num_groups, num_rows, BITS, GROUP, x
        )
        for k in tl.range(first, first + count, num_stages=STAGES):
            at_k = k * BLOCK_K
            if BLOCK_K >= 128:
                chunk = k * (BLOCK_K // 128) + stored // ROW
                if not IS_EVEN:
                    chunk = tl.minimum(chunk, chunks - 1)
                within = chunk * (_TILE_ROWS * ROW) + stored % ROW
            else:  # 8 bits in small groups: a part of a chunk
                within = at_k // 128 * (_TILE_ROWS * ROW) + at_k % 128 + stored
            w = tl.load(w_rows[:, None] + within[None, :])
            if IS_AHEAD:  # on their way while this block is multiplied
                next_s, next_z = load_grid(
                    scales, zeros, source, at_k + BLOCK_K, num_groups, num_rows, BITS, GROUP, x
                )
            elif IN_ORDER and GROUP != 0:
                s, z = load_grid(scales, zeros, source, at_k, num_groups, num_rows, BITS, GROUP, x)
            if not IS_CHAINED:
                part = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            if IS_JOINED:
                runs = decode_runs(
                    w, s[:, None], z[:, None], x, zeros, SCALES_WEIGHTS and GROUP != 0,
                    DECODE_0, DECODE_1, DECODE_2, DECODE_3, IS_INTERPRETED,
                )  # fmt: skip
                numbers = tl.reshape(tl.permute(runs, (0, 3, 2, 1)), [BLOCK_N, 128])
            for RUN in tl.static_range(RUNS):
                if not IN_ORDER and RUN * 32 % GROUP == 0:
                    at_s = at_k + RUN * 32
                    s, z = load_grid(
                        scales, zeros, source, at_s, num_groups, num_rows, BITS, GROUP, x
                    )
                if not IS_JOINED:
                    numbers = decode(
                        w, s[:, None], z[:, None], x, zeros, RUN, BITS,
                        SCALES_WEIGHTS and GROUP != 0,
                        DECODE_0, DECODE_1, DECODE_2, DECODE_3, IS_INTERPRETED,
                    )  # fmt: skip
                at_x = at_k + RUN * 32 + column
                mask = is_token[:, None]
                if not IS_EVEN:
                    mask = mask & (at_x < in_features)[None, :]
                values = tl.load(x_rows[:, None] + at_x[None, :], mask=mask, other=0.0)
                if x.dtype.element_ty == tl.float32:
                    values = values.to(tl.bfloat16)
                if IS_INTERPRETED:  # numpy has no bf16
                    values = values.to(tl.float32)
                if IS_CHAINED:
                    acc = tl.dot(numbers, tl.trans(values), acc, input_precision="ieee")
                else:
                    part = tl.dot(numbers, tl.trans(values), part, input_precision="ieee")
                    if not IN_ORDER and (RUN + 1) * 32 % GROUP == 0:
                        acc += part * s.to(tl.float32)[:, None]
                        part = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            if IN_ORDER and not IS_CHAINED:
                acc += part * s.to(tl.float32)[:, None]
            if IS_AHEAD:
                s = next_s
                z = next_z
        if GROUP == 0:
            acc = acc * tl.load(scales + source).to(tl.float32)[:, None]
        if not IS_SHARED or count == blocks:
            store_tile(out, acc, bias, source, tile_n, token, is_token, out_features, ACTIVATION)
        else:
            # A program has two places: for the tile it begins within, and for one it begins.
            where = program * 2 + (first == 0).to(tl.int32)
            part_of = tl.arange(0, BLOCK_T)[None, :] * BLOCK_N + row[:, None]
            place = parts + where * (BLOCK_T * BLOCK_N) + part_of
            tl.store(place, acc, mask=is_token[None, :])
            # All threads have written before the one that counts says so to other programs.
            tl.debug_barrier()
            first_program = owner_of(tile * blocks, share, extra)
            num_pieces = owner_of(tile * blocks + blocks - 1, share, extra) - first_program + 1
            if tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == num_pieces - 1:
                tl.store(counters + tile, 0)  # for the next launch
                merged = add_pieces(parts, part_of, first_program, num_pieces, is_token)
                store_tile(
                    out, merged, bias, source, tile_n, token, is_token, out_features, ACTIVATION
                )
        block += count


@triton.jit
def _place_of(tile, tiles_n, tiles_t, BESIDE: tl.constexpr):
    """Which rows of x and of the weight a tile multiplies."""
    group_of_tiles = tile // (BESIDE * tiles_n)
    members = tl.minimum(tiles_t - group_of_tiles * BESIDE, BESIDE)
    nth = tile - group_of_tiles * BESIDE * tiles_n
    return group_of_tiles * BESIDE + nth % members, nth // members


@triton.jit
def _prefetch_weight(
    words,
    block,
    last_block,
    blocks,
    tiles_n,
    tiles_t,
    chunks,
    out_features,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BESIDE: tl.constexpr,
    PREFETCHED: tl.constexpr,
):
    """Ask the L2 cache for a program's first blocks of the weight, of the first tile alone."""
    tile = block // blocks
    _, tile_n = _place_of(tile, tiles_n, tiles_t, BESIDE)
    first_row = tl.arange(0, BLOCK_N // _TILE_ROWS) * _TILE_ROWS  # of tiles of the layout
    if WIDTH < BLOCK_N:
        source = tile_n * WIDTH + first_row % WIDTH + first_row // WIDTH * out_features
    else:
        source = tile_n * WIDTH + first_row
    piece = tl.arange(0, PREFETCHED)
    last = tl.minimum(last_block, (tile + 1) * blocks) - 1
    at_k = (tl.minimum(block + piece, last) - tile * blocks) * BLOCK_K
    chunk = tl.minimum(at_k // 128, chunks - 1)
    tiles = tl.minimum(source, out_features * (BLOCK_N // WIDTH) - 1) // _TILE_ROWS
    place = (tiles.to(tl.int64) * chunks)[:, None] + chunk[None, :]
    SIZE: tl.constexpr = 64  # words: 256 bytes, so that threads have places of their own
    part = tl.arange(0, BITS) * SIZE
    prefetch(words + (place * (_TILE_ROWS * BITS * 4))[:, :, None] + part[None, None, :], SIZE)


@triton.jit
def load_grid(
    scales,
    zeros,
    source,
    column,
    num_groups,
    num_rows,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    x,
):
    """Scales of a column's group, ``[rows]``, and what to add to its numbers for zero points."""
    if GROUP == 0:
        at = source
    else:
        at = tl.minimum(column // GROUP, num_groups - 1).to(tl.int64) * num_rows + source
    s = tl.load(scales + at)
    if zeros is None:
        z = s
    else:
        IS_HALF: tl.constexpr = x.dtype.element_ty == tl.float16
        dtype: tl.constexpr = tl.float16 if IS_HALF else tl.bfloat16
        BASE: tl.constexpr = (1024.0 if IS_HALF else 128.0) if BITS == 4 else 0.0
        z = (-BASE - tl.load(zeros + at).to(tl.float32)).to(dtype)
    return s, z


@triton.jit
def decode_runs(
    w,
    s,
    z,
    x,
    zeros,
    IS_SCALED: tl.constexpr,
    DECODE_0: tl.constexpr,
    DECODE_1: tl.constexpr,
    DECODE_2: tl.constexpr,
    DECODE_3: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Numbers of a chunk of 4 bits, ``[..., 32, 2, 2]``: run ``i + 2 j`` is at ``[..., i, j]``.

    Put in the order of its columns by a permutation, no number leaves its thread.
    """
    run_0 = decode(
        w, s, z, x, zeros, 0, 4, IS_SCALED,
        DECODE_0, DECODE_1, DECODE_2, DECODE_3, IS_INTERPRETED,
    )  # fmt: skip
    run_1 = decode(
        w, s, z, x, zeros, 1, 4, IS_SCALED,
        DECODE_0, DECODE_1, DECODE_2, DECODE_3, IS_INTERPRETED,
    )  # fmt: skip
    run_2 = decode(
        w, s, z, x, zeros, 2, 4, IS_SCALED,
        DECODE_0, DECODE_1, DECODE_2, DECODE_3, IS_INTERPRETED,
    )  # fmt: skip
    run_3 = decode(
        w, s, z, x, zeros, 3, 4, IS_SCALED,
        DECODE_0, DECODE_1, DECODE_2, DECODE_3, IS_INTERPRETED,
    )  # fmt: skip
    return tl.join(tl.join(run_0, run_1), tl.join(run_2, run_3))


@triton.jit
def decode(
    w,
    s,
    z,
    x,
    zeros,
    RUN: tl.constexpr,
    BITS: tl.constexpr,
    IS_SCALED: tl.constexpr,
    DECODE_0: tl.constexpr,
    DECODE_1: tl.constexpr,
    DECODE_2: tl.constexpr,
    DECODE_3: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Numbers for tensor cores from a run of codes; scales and zero points broadcast to them."""
    IS_HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    dtype: tl.constexpr = tl.float16 if IS_HALF else tl.bfloat16
    if BITS == 8 or IS_INTERPRETED:
        if BITS == 8:
            numbers = w.to(tl.float32) if IS_INTERPRETED else w.to(dtype)
        else:
            BASE: tl.constexpr = 1024.0 if IS_HALF else 128.0
            numbers = ((w >> (4 * RUN)) & 15).to(tl.float32)
            numbers += BASE if zeros is not None else -8.0
        if zeros is not None:
            numbers += z.to(numbers.dtype)
        if IS_SCALED:
            numbers = (numbers * s.to(numbers.dtype)).to(dtype)
        if IS_INTERPRETED:
            numbers = numbers.to(tl.float32)
        return numbers
    EARLY: tl.constexpr = DECODE_0 if RUN == 0 else DECODE_1
    LATE: tl.constexpr = DECODE_2 if RUN == 2 else DECODE_3
    CODE: tl.constexpr = EARLY if RUN < 2 else LATE
    if zeros is not None and IS_SCALED:
        pairs = tl.inline_asm_elementwise(CODE, "=r,r,r,r", [w, z, s.to(dtype)], tl.int16, True, 2)
    elif zeros is not None:
        pairs = tl.inline_asm_elementwise(CODE, "=r,r,r", [w, z], tl.int16, True, 2)
    elif IS_SCALED:
        pairs = tl.inline_asm_elementwise(CODE, "=r,r,r", [w, s.to(dtype)], tl.int16, True, 2)
    else:
        pairs = tl.inline_asm_elementwise(CODE, "=r,r", [w], tl.int16, True, 2)
    return pairs.to(dtype, bitcast=True)


@triton.jit
def store_tile(
    out, acc, bias, source, tile, token, is_token, out_features, ACTIVATION: tl.constexpr
):
    if bias is not None:
        acc += tl.load(bias + source).to(tl.float32)[:, None]
    dtype: tl.constexpr = out.dtype.element_ty
    if ACTIVATION != "none":
        # Rounded as between a product and an activation of its own.
        halves = tl.reshape(acc, [2, acc.shape[0] // 2, acc.shape[1]]).to(dtype).to(tl.float32)
        gates, up = tl.split(tl.permute(halves, [1, 2, 0]))
        acc = gate(gates, ACTIVATION == "gelu_tanh").to(dtype).to(tl.float32) * up
    feature = tile * acc.shape[0] + tl.arange(0, acc.shape[0])
    places = out + token.to(tl.int64)[None, :] * out_features + feature[:, None]
    mask = (feature < out_features)[:, None] & is_token[None, :]
    tl.store(places, acc.to(dtype), mask=mask)
