# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Products with a weight of 4 or 8 bits on tensor cores, in Triton: ``x[T, K] @ weight[N, K].T``.

Codes become 16-bit numbers in registers, in the layout in which the tensor cores take them, and are
exact there: 128 + c in bf16 by one mask of two codes, less 128 + z by one addition (under one
instruction a weight). Runs of 32 columns (:mod:`quantized_layout`) are products of their own with
the columns of x that they belong to, so that no code changes its place.

Of few rows, the sum of a group is scaled, in fp32: a group is a step along K, and nothing but its
sum is rounded. Of many rows, that would take as many registers again as the sums: weights are
scaled there before they are multiplied, and are rounded to 16 bits as those of a plain checkpoint
are. Blocks of the weight are shared out among programs as in :mod:`kernels.triton.skinny_gemm`
(stream-K), or a program takes a tile; of many rows, tiles that share a weight follow one another.

Of thousands of rows :mod:`kernels.quantized_linear` may instead write the weight out in pieces that
stay in the L2 cache, by the other kernel here, and multiply them by the matrix library.

Papers: Frantar et al., "MARLIN", 2024, arXiv:2408.11743 (codes in the order of the tensor cores);
Kim et al., "Who Says Elephants Can't Run", 2022, arXiv:2211.10017 (numbers from codes by masks);
Osama et al., "Stream-K", 2023, arXiv:2301.03598.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.triton import (
    has_dependent_launch,
    has_large_shared_memory,
    is_interpreted,
    num_multiprocessors,
)
from kernels.triton.activation import ACTIVATIONS, gate
from kernels.triton.launch import Launcher, dependent_options, planned
from kernels.triton.quantized_layout import (
    CHUNK,
    TILE_ROWS,
    group_of,
    num_chunks,
    packed_shape,
)
from kernels.triton.skinny_gemm import add_pieces, keep_scratch, owner_of, scratch_of

_TILE_ROWS = tl.constexpr(TILE_ROWS)
_BESIDE = 8  # tiles of rows of x that share a weight in L2 before the next ones follow


@dataclass(frozen=True, slots=True)
class QuantizedGemmTiling:
    """How the kernel is cut.

    Attributes
    ----------
    block_t, block_n, block_k
        Rows of x, rows of the weight and columns of both in a block.
    num_warps, num_stages
        Of a program; ``num_stages`` blocks are on their way at a time.
    programs
        Programs a multiprocessor; 0 for one program a tile, whose sums need no merging.
    scales_weights
        Whether weights are scaled before they are multiplied, and not their sums.
    """

    block_t: int
    block_n: int
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 4
    programs: int = 0
    scales_weights: bool = False


def _decoder(run: int, is_half: bool, has_zeros: bool, is_scaled: bool) -> str:
    """Two codes of a run to two numbers, in PTX: ``$1`` holds them, ``$2`` what to add to the
    numbers (minus their offset and zero point), ``$3`` their scales."""
    kind, one, base = ("f16x2", 0x3C00, 0x6400) if is_half else ("bf16x2", 0x3F80, 0x4300)
    shift = -(1024 + 8) if is_half else -(128 + 8)
    dtype = torch.float16 if is_half else torch.bfloat16
    constant = torch.tensor(shift, dtype=dtype).view(torch.int16).item() & 0xFFFF

    def both(half: float) -> str:
        return f"0x{int(half) * 0x10001:08X}"

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
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    BESIDE: tl.constexpr,
    SCALES_WEIGHTS: tl.constexpr,
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
    for one scale an output; ``DECODE`` are the instructions of each run of 4 bits.
    """
    IS_GATED: tl.constexpr = ACTIVATION != "none"
    WIDTH: tl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N  # columns of the output
    STORED: tl.constexpr = BLOCK_K // 4 if BITS == 4 else BLOCK_K  # words of 16 bits, or bytes
    ROW: tl.constexpr = 32 if BITS == 4 else 128  # of them in a row of a tile
    RUNS: tl.constexpr = 4 if BITS == 4 else 1
    IN_ORDER: tl.constexpr = GROUP == 0 or GROUP >= BLOCK_K  # one scale a block
    IS_CHAINED: tl.constexpr = GROUP == 0 or SCALES_WEIGHTS  # all products into one sum
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
        gdc_wait()  # the launch before wrote x, and may use the same parts and counters
    if BITS == 4:
        codes = words.to(tl.pointer_type(tl.int16), bitcast=True)
        column = stored // 32 * 128 + stored % 32
    else:
        codes = words.to(tl.pointer_type(tl.int8), bitcast=True)
        column = stored
    while block < last_block:  # one tile's part of the share a turn
        tile = block // blocks
        first = block - tile * blocks
        count = tl.minimum(blocks - first, last_block - block)
        group_of_tiles = tile // (BESIDE * tiles_n)
        members = tl.minimum(tiles_t - group_of_tiles * BESIDE, BESIDE)
        nth = tile - group_of_tiles * BESIDE * tiles_n
        tile_n = nth // members
        token = (group_of_tiles * BESIDE + nth % members) * BLOCK_T + tl.arange(0, BLOCK_T)
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
        grid_rows = source.to(tl.int64) * num_groups
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        s, z = _load_grid(scales, zeros, grid_rows, first * BLOCK_K, num_groups, BITS, GROUP, x)
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
            if IN_ORDER and GROUP != 0:  # on their way while this block is multiplied
                next_s, next_z = _load_grid(
                    scales, zeros, grid_rows, at_k + BLOCK_K, num_groups, BITS, GROUP, x
                )
            if not IS_CHAINED:
                part = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            for RUN in tl.static_range(RUNS):
                if not IN_ORDER and RUN * 32 % GROUP == 0:
                    s, z = _load_grid(
                        scales, zeros, grid_rows, at_k + RUN * 32, num_groups, BITS, GROUP, x
                    )
                numbers = _decode(
                    w, s, z, x, zeros, RUN, BITS, SCALES_WEIGHTS and GROUP != 0,
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
            if IN_ORDER and GROUP != 0:
                if not IS_CHAINED:
                    acc += part * s.to(tl.float32)[:, None]
                s = next_s
                z = next_z
        if GROUP == 0:
            acc = acc * tl.load(scales + source).to(tl.float32)[:, None]
        if count == blocks:
            _store(out, acc, bias, source, tile_n, token, is_token, out_features, ACTIVATION)
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
                _store(out, merged, bias, source, tile_n, token, is_token, out_features, ACTIVATION)
        block += count


@triton.jit
def _load_grid(
    scales,
    zeros,
    grid_rows,
    column,
    num_groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    x,
):
    """Scales of a column's group, ``[rows]``, and what to add to its numbers for zero points."""
    if GROUP == 0:
        at = grid_rows
    else:
        at = grid_rows + tl.minimum(column // GROUP, num_groups - 1)
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
def _decode(
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
    """Numbers for tensor cores from the codes of a run."""
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
            numbers += z.to(numbers.dtype)[:, None]
        if IS_SCALED:
            numbers = (numbers * s.to(numbers.dtype)[:, None]).to(dtype)
        if IS_INTERPRETED:
            numbers = numbers.to(tl.float32)
        return numbers
    if RUN == 0:
        CODE: tl.constexpr = DECODE_0
    elif RUN == 1:
        CODE: tl.constexpr = DECODE_1
    elif RUN == 2:
        CODE: tl.constexpr = DECODE_2
    else:
        CODE: tl.constexpr = DECODE_3
    if zeros is not None and IS_SCALED:
        pairs = tl.inline_asm_elementwise(
            CODE, "=r,r,r,r", [w, z[:, None], s.to(dtype)[:, None]], tl.int16, True, 2
        )
    elif zeros is not None:
        pairs = tl.inline_asm_elementwise(CODE, "=r,r,r", [w, z[:, None]], tl.int16, True, 2)
    elif IS_SCALED:
        pairs = tl.inline_asm_elementwise(
            CODE, "=r,r,r", [w, s.to(dtype)[:, None]], tl.int16, True, 2
        )
    else:
        pairs = tl.inline_asm_elementwise(CODE, "=r,r", [w], tl.int16, True, 2)
    return pairs.to(dtype, bitcast=True)


@triton.jit
def _store(out, acc, bias, source, tile, token, is_token, out_features, ACTIVATION: tl.constexpr):
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


def quantized_gemm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    rows: int,
    activation: str | None = None,
    tiling: QuantizedGemmTiling | None = None,
    is_dependent: bool | None = None,
) -> Tensor:
    """``x @ weight.T + bias``, or that activation of its first half times the second.

    Parameters
    ----------
    x : Tensor [T, K]
        fp32, bf16 or fp16, any number of rows, which may lie apart; fp32 is rounded to bf16.
    words, scales, zeros, bias, bits, rows
        As of :func:`kernels.triton.quantized_gemv.quantized_gemv`.
    activation : str or None
        ``silu`` or ``gelu_tanh``; ``N = 2 F`` then, the rows of the gate first.
    tiling : QuantizedGemmTiling or None
        None: :func:`choose_tiling`.
    is_dependent : bool or None
        Whether to start before the launch ahead has ended; None: where the card can.

    Returns
    -------
    Tensor [T, N], [T, F] with an activation
        In the dtype of ``x``; sums are fp32, rounded once.

    Notes
    -----
    Never waits for the device. Launches on one device share scratch memory, so they must follow
    one another on one stream.
    """
    num_tokens = x.shape[0]
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}")
    if x.stride(1) != 1:
        x = x.contiguous()
    out_features = rows if activation is None else rows // 2
    out = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    if out.numel():
        tensors = (out, x, words, scales, zeros, bias)
        launch = _gemm.find(tensors, bits, rows, activation or "none", tiling, is_dependent)
        launch(*tensors, *scratch_of(x.device))
    return out


@planned
def _gemm(
    out: Tensor,
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    _bias: Tensor | None,
    bits: int,
    rows: int,
    activation: str,
    tiling: QuantizedGemmTiling | None,
    is_dependent: bool | None,
) -> Launcher:
    (num_tokens, in_features), out_features = x.shape, out.shape[1]
    num_groups = scales.shape[1]
    group = group_of(in_features, num_groups)
    assert words.shape == packed_shape(rows, in_features, bits) and words.is_contiguous()
    assert scales.shape == (rows, num_groups) and scales.is_contiguous()
    assert zeros is None or (zeros.shape == scales.shape and zeros.is_contiguous())
    if tiling is None:
        tiling = choose_tiling(rows, in_features, bits, group, num_tokens, x.device)
    block_k = tiling.block_k
    if group:  # a block holds one group, or of 4 bits some that its runs make up
        block_k = min(block_k, max(group, CHUNK if bits == 4 else 32))
    width = tiling.block_n if activation == "none" else tiling.block_n // 2
    tiles = triton.cdiv(out_features, width) * triton.cdiv(num_tokens, tiling.block_t)
    num_programs = tiles
    if tiling.programs:
        blocks = tiles * triton.cdiv(in_features, block_k)
        num_programs = min(tiling.programs * num_multiprocessors(x.device), blocks)
    places = 2 * num_programs if tiling.programs else 0
    keep_scratch(places * tiling.block_t * tiling.block_n, tiles, x.device)
    if is_dependent is None:
        is_dependent = has_dependent_launch(x.device)
    is_scaled = tiling.scales_weights and group != 0
    is_half = x.dtype == torch.float16
    decoders = [_decoder(run, is_half, zeros is not None, is_scaled) for run in range(4)]
    return Launcher(
        quantized_gemm_kernel,
        (num_programs,),
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        num_chunks(in_features),
        num_groups,
        BITS=bits,
        GROUP=group,
        BLOCK_T=tiling.block_t,
        BLOCK_N=tiling.block_n,
        BLOCK_K=block_k,
        STAGES=tiling.num_stages,
        BESIDE=_BESIDE,
        SCALES_WEIGHTS=tiling.scales_weights,
        IS_EVEN=in_features % block_k == 0,
        ACTIVATION=activation,
        DECODE_0=decoders[0] if bits == 4 else "",
        DECODE_1=decoders[1] if bits == 4 else "",
        DECODE_2=decoders[2] if bits == 4 else "",
        DECODE_3=decoders[3] if bits == 4 else "",
        IS_INTERPRETED=is_interpreted(),
        IS_DEPENDENT=is_dependent,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **dependent_options(is_dependent),
    )


def choose_tiling(
    rows: int, in_features: int, bits: int, group: int, num_tokens: int, device: torch.device
) -> QuantizedGemmTiling:
    """The cut that suits a shape (``experiments.gpu_quantized --tune``)."""
    is_large = has_large_shared_memory(device)
    block_t = max(16, min(128, triton.next_power_of_2(num_tokens)))
    if num_tokens <= 64:
        block_k = 128 if group else 256
        return QuantizedGemmTiling(block_t, 64, block_k, 4, 4 if is_large else 3, programs=2)
    stages = 4 if is_large else 3
    return QuantizedGemmTiling(block_t, 128, 128, 8, stages, scales_weights=True)


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        dtype: torch.dtype, num_tokens: int, rows: int, in_features: int, form: str, group: int = 0
    ) -> Callable[[], object]:
        def run() -> object:
            bits = 8 if "w8" in form else 4
            shape = (rows, in_features // group if group else 1)
            return quantized_gemm(
                torch.empty(num_tokens, in_features, dtype=dtype),
                torch.empty(packed_shape(rows, in_features, bits), dtype=torch.int32),
                torch.empty(shape, dtype=dtype),
                torch.empty(shape, dtype=torch.int8) if "zeros" in form else None,
                torch.empty(rows, dtype=dtype) if "bias" in form else None,
                bits=bits,
                rows=rows,
                activation=next((a for a in ACTIVATIONS if a in form), None),
            )

        return run

    half = torch.bfloat16
    return {
        "w4g128, 16 x 512 x 4096": call(half, 16, 512, 4096, "w4", 128),
        "w4g128, 64 x 512 x 4096": call(half, 64, 512, 4096, "w4", 128),
        "w4g128, 512 x 512 x 4096": call(half, 512, 512, 4096, "w4", 128),
        "w4g32z, 16 x 512 x 1024, silu": call(half, 16, 512, 1024, "w4 zeros silu", 32),
        "w4g64z, 512 x 100 x 192, bias": call(torch.float16, 512, 100, 192, "w4 zeros bias", 64),
        "w4z, fp16, 16 x 100 x 1000": call(torch.float16, 16, 100, 1000, "w4 zeros"),
        "w4, fp32, 512 x 100 x 1000": call(torch.float32, 512, 100, 1000, "w4"),
        "w8, 16 x 512 x 4096": call(half, 16, 512, 4096, "w8"),
        "w8, 512 x 512 x 4096": call(half, 512, 512, 4096, "w8"),
        "w8g32z, 16 x 512 x 1024": call(half, 16, 512, 1024, "w8 zeros", 32),
        "w8g64z, fp16, 512 x 512 x 1024": call(torch.float16, 512, 512, 1024, "w8 zeros", 64),
    }
