# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Products of few rows with a weight, in Triton: ``x[T, K] @ weight[N, K].T``.

Such a product reads every weight once and does little with it, so its floor is the memory's
bandwidth. A weight is cut into blocks of ``BLOCK_N`` rows and ``BLOCK_K`` columns, and all blocks
are shared out evenly, in order, among the programs that run at a time (stream-K): no wave of
programs is part empty, whatever the shape. A program's share may end inside of a tile of output;
the last program to finish a tile adds the sums of all its pieces, in their order along K, so that
the same launch gives the same bits.

Where a kernel may start before the one ahead of it has ended (compute capability 9.0 on), its
programs have the first weights fetched into the L2 cache while they wait for ``x``.

What stands around a product in a layer can be part of it: the gated activation and the addition to
the residual are done where values come out. So is the first half of the norm that follows the
addition: new residuals are multiplied by the norm's weight as well, and each program leaves the
squares of its columns behind (:class:`ScaledRows`). The product after it multiplies these rows, and
its sums by a factor a row, which the squares give. (Taking the norm where rows are read instead
takes a third longer: values for the tensor cores then go through registers.)

Papers: Osama et al., "Stream-K", 2023, arXiv:2301.03598.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.norm import RowNorm
from kernels.triton import (
    has_dependent_launch,
    has_large_shared_memory,
    is_interpreted,
    num_multiprocessors,
)
from kernels.triton.activation import ACTIVATIONS, gate
from kernels.triton.launch import Launcher, dependent_options, planned

MAX_ROWS = 64
_PIECE = tl.constexpr(128)  # columns that one prefetch asks for
_MERGED = tl.constexpr(4)  # pieces whose sums are read together
_SQUARES = tl.constexpr(16)  # the same of squares
_MIN_COUNTERS = 1 << 14
_MIN_PARTS = 1 << 21  # fp32 values
_COUNTERS: dict[torch.device, list[Tensor]] = {}
_PARTS: dict[torch.device, list[Tensor]] = {}


@dataclass(frozen=True, slots=True)
class SkinnyTiling:
    """How the kernel is cut.

    Attributes
    ----------
    block_n, block_k
        Rows and columns of the weight in a block.
    num_warps, num_stages
        Of a program; ``num_stages`` blocks are on their way at a time.
    programs
        Programs a multiprocessor; 0 for one program a tile, whose sums need no merging.
    prefetched
        Blocks that a program asks the L2 cache for while it waits for the launch before.
    """

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 4
    programs: int = 2
    prefetched: int = 2


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """Rows under a norm, before they are divided by their sizes.

    Attributes
    ----------
    rows : Tensor [T, K]
        Rows times the norm's weight.
    squares : Tensor [S, T] fp32
        Sums of the squares of the rows themselves, in ``S`` parts.
    eps
        Of the norm.
    """

    rows: Tensor
    squares: Tensor
    eps: float


@triton.jit(do_not_specialize=["num_tokens", "num_squares"])
def skinny_gemm_kernel(
    out,
    x,
    weight,
    bias,
    squares,
    norm_weight,
    scaled,
    new_squares,
    parts,
    counters,
    eps,
    offset,
    num_squares,
    num_tokens,
    out_features,
    in_features,
    x_stride,
    weight_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCHED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADDS: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (programs). Blocks are counted along K first, then from tile to tile.

    With an activation, a tile is as many rows of the gate as of what it multiplies.
    """
    IS_GATED: tl.constexpr = ACTIVATION != "none"
    WIDTH: tl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N  # columns of the output
    program = tl.program_id(0)
    blocks = tl.cdiv(in_features, BLOCK_K)  # of a tile
    total = tl.cdiv(out_features, WIDTH) * blocks
    share = total // tl.num_programs(0)
    extra = total % tl.num_programs(0)  # programs with one block more, the first ones
    block = program * share + tl.minimum(program, extra)
    last_block = block + share + (program < extra).to(tl.int32)
    row = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    token = tl.arange(0, BLOCK_T)
    is_token = token < num_tokens
    if IS_DEPENDENT:
        gdc_launch_dependents()
        if PREFETCHED > 0:
            _prefetch(
                weight, weight_stride,
                _sources(block // blocks, out_features, BLOCK_N, IS_GATED),
                block % blocks * BLOCK_K,
                tl.minimum(block % blocks + last_block - block, blocks) * BLOCK_K,
                PREFETCHED * BLOCK_K,
            )  # fmt: skip
        gdc_wait()  # the launch before wrote x, and may use the same parts and counters
    while block < last_block:  # one tile's part of the share a turn
        tile = block // blocks
        first = block - tile * blocks
        count = tl.minimum(blocks - first, last_block - block)
        source = _sources(tile, out_features, BLOCK_N, IS_GATED)
        places = (weight + source.to(tl.int64) * weight_stride)[:, None] + column[None, :]
        x_places = x + token[:, None] * x_stride + column[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for k in tl.range(first, first + count, num_stages=STAGES):
            at = k * BLOCK_K
            if IS_EVEN:
                w = tl.load(places + at)
                values = tl.load(x_places + at, mask=is_token[:, None], other=0.0)
            else:
                is_column = (at + column < in_features)[None, :]
                w = tl.load(places + at, mask=is_column, other=0.0)
                values = tl.load(x_places + at, mask=is_token[:, None] & is_column, other=0.0)
            if IS_INTERPRETED:  # numpy has no bf16
                w = w.to(tl.float32)
                values = values.to(tl.float32)
            acc = tl.dot(w, tl.trans(values), acc, input_precision="ieee")
        is_whole = count == blocks
        if not is_whole:
            # A program has two places: for the tile it begins within, and for one it begins.
            place = program * 2 + (first == 0).to(tl.int32)
            part = token[None, :] * BLOCK_N + row[:, None]
            tl.store(parts + place * (BLOCK_T * BLOCK_N) + part, acc, mask=is_token[None, :])
            # All threads have written before the one that counts says so to other programs.
            tl.debug_barrier()
            first_program = _owner(tile * blocks, share, extra)
            num_pieces = _owner(tile * blocks + blocks - 1, share, extra) - first_program + 1
            if tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == num_pieces - 1:
                tl.store(counters + tile, 0)  # for the next launch
                acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
                for piece in range(0, num_pieces, _MERGED):
                    for i in tl.static_range(_MERGED):
                        place = (first_program + piece + i) * 2 + (piece + i == 0)
                        acc += tl.load(
                            parts + place * (BLOCK_T * BLOCK_N) + part,
                            mask=is_token[None, :] & (piece + i < num_pieces),
                            other=0.0,
                            cache_modifier=".cg",
                        )
                is_whole = num_pieces > 0
        if is_whole:
            if squares is not None:
                acc *= _row_factors(
                    squares, token, is_token, num_squares, num_tokens, in_features, eps
                )[None, :]
            _store(
                out, acc, bias, norm_weight, scaled, new_squares, offset, source, tile, token,
                is_token, num_tokens, out_features, ACTIVATION, ADDS,
            )  # fmt: skip
        block += count


@triton.jit
def _owner(block, share, extra):
    """Program whose share holds a block; shares are of ``share + 1`` blocks, then of ``share``."""
    long = extra * (share + 1)
    return tl.where(
        block < long, block // (share + 1), extra + (block - long) // tl.maximum(share, 1)
    )


@triton.jit
def _sources(tile, out_features, BLOCK_N: tl.constexpr, IS_GATED: tl.constexpr):
    """Rows of the weight that a tile reads: rows of the gate, then those that they gate.

    Beyond the end they are read as the last one, and not written.
    """
    row = tl.arange(0, BLOCK_N)
    if IS_GATED:
        WIDTH: tl.constexpr = BLOCK_N // 2
        feature = tl.minimum(tile * WIDTH + row % WIDTH, out_features - 1)
        return feature + row // WIDTH * out_features
    return tl.minimum(tile * BLOCK_N + row, out_features - 1)


@triton.jit
def _row_factors(squares, token, is_token, num_squares, num_tokens, in_features, eps):
    """What a norm divides by, inverted, from the squares ``[num_squares, num_tokens]``."""
    total = tl.zeros([token.shape[0]], tl.float32)
    part = tl.arange(0, _SQUARES)
    for first in range(0, num_squares, _SQUARES):
        values = tl.load(
            squares + (first + part)[:, None] * num_tokens + token[None, :],
            mask=(first + part < num_squares)[:, None] & is_token[None, :],
            other=0.0,
        )
        total += tl.sum(values, 0)
    return tl.rsqrt(total / in_features + eps)


@triton.jit
def _store(
    out,
    acc,
    bias,
    norm_weight,
    scaled,
    new_squares,
    offset,
    source,
    tile,
    token,
    is_token,
    num_tokens,
    out_features,
    ACTIVATION: tl.constexpr,
    ADDS: tl.constexpr,
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
    places = out + token[None, :] * out_features + feature[:, None]
    mask = (feature < out_features)[:, None] & is_token[None, :]
    values = acc.to(dtype)
    if ADDS:
        before = tl.load(places, mask=mask, other=0.0)
        values = (before.to(tl.float32) + values.to(tl.float32)).to(dtype)
    tl.store(places, values, mask=mask)
    if norm_weight is not None:
        exact = tl.where(mask, values.to(tl.float32), 0.0)
        norm = tl.load(norm_weight + feature, mask=feature < out_features, other=0.0)
        rows = exact * (norm.to(tl.float32) + offset)[:, None]
        tl.store(scaled + token[None, :] * out_features + feature[:, None], rows.to(dtype), mask)
        sums = tl.sum(exact * exact, 0)
        tl.store(new_squares + tile * num_tokens + token, sums, mask=is_token)


@triton.jit
def _prefetch(weight, weight_stride, source, first, stop, COLUMNS: tl.constexpr):
    """Ask the L2 cache for columns from ``first`` on, ``COLUMNS`` and none from ``stop`` on.

    It is a hint that waits for nothing, and takes nothing from what the L2 cache knows to be new.
    """
    column = first + tl.arange(0, COLUMNS // _PIECE) * _PIECE
    column = tl.minimum(column, stop - _PIECE)
    place = (weight + source.to(tl.int64) * weight_stride)[:, None] + column[None, :]
    SIZE: tl.constexpr = _PIECE * weight.dtype.element_ty.primitive_bitwidth // 8
    tl.inline_asm_elementwise(
        "mov.u32 $0, 0; cp.async.bulk.prefetch.L2.global [$1], $2;",
        "=r,l,r",
        [place.to(tl.int64), tl.full(place.shape, SIZE, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def skinny_linear(
    x: Tensor | ScaledRows,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    tiling: SkinnyTiling | None = None,
    is_dependent: bool | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` for few rows; then either gated or added to the residual.

    Parameters
    ----------
    x : Tensor [T, K] or ScaledRows
        At most ``MAX_ROWS`` rows; the rows may lie apart. Scaled ones stand for their norm.
    weight : Tensor [N, K]
        In the dtype of ``x``, its rows contiguous. With an activation, ``N = 2 F``: the rows of the
        gate first.
    bias : Tensor [N] or None
    residual : Tensor [T, N] or None
        Contiguous, where the product is added in place; then it is what is returned.
    activation : str or None
        ``silu`` or ``gelu_tanh``, of the first half of the product, times the second half.
    tiling : SkinnyTiling or None
        None: :func:`choose_tiling`.
    is_dependent : bool or None
        Whether to start before the launch ahead has ended; None: where the card can.

    Returns
    -------
    Tensor [T, N], [T, F] with an activation
        Sums are fp32, rounded once, and then as the ops alone round (:mod:`kernels.activation`,
        :mod:`kernels.norm`); of a norm, what is rounded is the product with its weight.

    Notes
    -----
    Never waits for the device. Launches on one device share scratch memory, so they must follow
    one another on one stream.
    """
    return _launch(x, weight, bias, residual, None, activation, tiling, is_dependent)[0]


def skinny_add_(
    x: Tensor | ScaledRows,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: RowNorm,
    *,
    tiling: SkinnyTiling | None = None,
    is_dependent: bool | None = None,
) -> ScaledRows:
    """Add the product to the residual in place, as :func:`skinny_linear` does.

    Returns
    -------
    ScaledRows
        Of the new residual under ``norm``. Rows times the norm's weight must fit the dtype, which
        in fp16 they may not.
    """
    made = _launch(x, weight, bias, residual, norm, None, tiling, is_dependent)[1]
    assert made is not None
    return made


def _launch(
    x: Tensor | ScaledRows,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: RowNorm | None,
    activation: str | None,
    tiling: SkinnyTiling | None,
    is_dependent: bool | None,
) -> tuple[Tensor, ScaledRows | None]:
    squares, eps = None, 0.0
    if isinstance(x, ScaledRows):
        squares, eps = x.squares, x.eps
        x = x.rows
    num_tokens, in_features = x.shape
    if activation is not None and (activation not in ACTIVATIONS or residual is not None):
        raise ValueError(
            f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}, without a residual"
        )
    if num_tokens > MAX_ROWS:
        raise ValueError(f"{num_tokens} rows: this kernel takes up to {MAX_ROWS}")
    rows = weight.shape[0]
    out_features = rows if activation is None else rows // 2
    if in_features and x.stride(1) != 1:
        x = x.contiguous()
    if residual is not None:
        out = residual
    else:
        out = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    if out.numel() == 0 or in_features == 0:
        assert residual is None and activation is None and squares is None
        return (out.zero_() if bias is None else out.copy_(bias.expand_as(out))), None
    if tiling is None:
        tiling = choose_tiling(rows, in_features, num_tokens, x.dtype, x.device)
    made = None
    if norm is not None:
        num_squares = triton.cdiv(out_features, tiling.block_n)
        new_squares = torch.empty(num_squares, num_tokens, dtype=torch.float32, device=x.device)
        made = ScaledRows(torch.empty_like(out), new_squares, norm.eps)
    tensors = (
        out, x, weight, bias, squares, None if norm is None else norm.weight,
        None if made is None else made.rows, None if made is None else made.squares,
    )  # fmt: skip
    launch = _skinny.find(
        tensors,
        eps,
        0.0 if norm is None else norm.offset,
        activation or "none",
        residual is not None,
        weight.data_ptr() % 16 == 0,
        tiling,
        is_dependent,
    )
    launch(*tensors, _PARTS[x.device][-1], _COUNTERS[x.device][-1])
    return out, made


@planned
def _skinny(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias: Tensor | None,
    squares: Tensor | None,
    norm_weight: Tensor | None,
    scaled: Tensor | None,
    new_squares: Tensor | None,
    eps: float,
    offset: float,
    activation: str,
    adds: bool,
    is_aligned: bool,
    tiling: SkinnyTiling,
    is_dependent: bool | None,
) -> Launcher:
    num_tokens, in_features = x.shape
    out_features = out.shape[1]
    assert weight.shape[1] == in_features and weight.dtype == x.dtype
    assert weight.stride(1) == 1 or in_features == 1
    assert out.shape[0] == num_tokens and out.is_contiguous()
    assert squares is None or (squares.shape[1] == num_tokens and squares.is_contiguous())
    if norm_weight is not None:
        assert scaled is not None and scaled.is_contiguous() and adds
        assert new_squares is not None and new_squares.is_contiguous()
        assert norm_weight.shape == (out_features,) and norm_weight.is_contiguous()
    width = tiling.block_n if activation == "none" else tiling.block_n // 2
    tiles = triton.cdiv(out_features, width)
    num_programs = tiles
    if tiling.programs:
        blocks = tiles * triton.cdiv(in_features, tiling.block_k)
        num_programs = min(tiling.programs * num_multiprocessors(x.device), blocks)
    block_t = max(16, triton.next_power_of_2(num_tokens))
    _keep_scratch(2 * num_programs * block_t * tiling.block_n, tiles, x.device)
    if is_dependent is None:
        is_dependent = has_dependent_launch(x.device)
    can_prefetch = (
        in_features % int(_PIECE.value) == 0
        and weight.stride(0) % 16 == 0
        and is_aligned
        and tiling.block_k % int(_PIECE.value) == 0
    )
    return Launcher(
        skinny_gemm_kernel,
        (num_programs,),
        eps,
        offset,
        0 if squares is None else squares.shape[0],
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        weight.stride(0),
        BLOCK_T=block_t,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        STAGES=tiling.num_stages,
        PREFETCHED=tiling.prefetched if can_prefetch else 0,
        IS_EVEN=in_features % tiling.block_k == 0,
        ACTIVATION=activation,
        ADDS=adds,
        IS_INTERPRETED=is_interpreted(),
        IS_DEPENDENT=is_dependent,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **dependent_options(is_dependent),
    )


def scale_rows(x: Tensor, norm: RowNorm) -> ScaledRows:
    """Rows ``x[T, K]`` under a norm, for a product that is not behind one of this module."""
    assert x.stride(1) == 1 and norm.weight.is_contiguous()
    made = ScaledRows(
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(1, x.shape[0], dtype=torch.float32, device=x.device),
        norm.eps,
    )
    if x.numel():
        _scale((made.rows, made.squares, x, norm.weight), norm.offset)
    return made


@planned
def _scale(_rows: Tensor, _squares: Tensor, x: Tensor, _weight: Tensor, offset: float) -> Launcher:
    is_dependent = has_dependent_launch(x.device)
    return Launcher(
        scale_rows_kernel,
        (x.shape[0],),
        offset,
        x.shape[1],
        x.stride(0),
        BLOCK=triton.next_power_of_2(x.shape[1]),
        IS_DEPENDENT=is_dependent,
        num_warps=max(1, min(8, x.shape[1] // 512)),
        **dependent_options(is_dependent),
    )


@triton.jit
def scale_rows_kernel(
    rows,
    squares,
    x,
    weight,
    offset,
    width,
    stride,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (rows)."""
    if IS_DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    values = tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32) + offset
    tl.store(rows + row * width + column, (values * scale).to(rows.dtype.element_ty), mask=mask)
    tl.store(squares + row, tl.sum(values * values, 0))


def choose_tiling(
    out_features: int, in_features: int, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> SkinnyTiling:
    """The cut that suits a shape, as measured on an H100 (``experiments.gpu_linear --tiles``).

    Rows of the weight are held in tiles of 64, of which a small weight has too few for all
    multiprocessors: so they share its blocks out. (One row has a kernel of its own,
    :mod:`kernels.triton.gemv`.)
    """
    multiprocessors = num_multiprocessors(device)
    if dtype == torch.float32:  # products without tensor cores, which would round the inputs
        return SkinnyTiling(32, 32, num_warps=4, num_stages=3, prefetched=0)
    if not has_large_shared_memory(device):
        return SkinnyTiling(64, 128, num_stages=4 if num_tokens <= 16 else 3, programs=0)
    if num_tokens > 16:
        if out_features <= 8 * multiprocessors:
            return SkinnyTiling(32, 256, num_stages=4, programs=2)
        if in_features > 2 * out_features:
            return SkinnyTiling(64, 256, num_stages=3, programs=1)
        return SkinnyTiling(64, 128, num_stages=5 if num_tokens <= 32 else 4, programs=0)
    if out_features >= 128 * multiprocessors:
        return SkinnyTiling(64, 128, num_stages=4, programs=0)
    if in_features <= 1024 and out_features >= 4096:  # little to share out
        return SkinnyTiling(64, 256, num_stages=5, programs=0)
    return SkinnyTiling(64, 256, num_stages=3, programs=1)


def _keep_scratch(num_parts: int, num_counters: int, device: torch.device) -> None:
    """Have room for sums, and counters that each launch leaves at 0.

    Kept for ever, since a captured graph may hold them.
    """
    parts, counters = _PARTS.setdefault(device, []), _COUNTERS.setdefault(device, [])
    lacks_parts = not parts or parts[-1].numel() < num_parts
    lacks_counters = not counters or counters[-1].numel() < num_counters
    if lacks_parts or lacks_counters:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a product of few rows needs its scratch memory before a CUDA graph is captured:"
                " run the same call once outside of the capture"
            )
        if lacks_parts:
            parts.append(
                torch.empty(max(num_parts, _MIN_PARTS), dtype=torch.float32, device=device)
            )
        if lacks_counters:
            size = max(num_counters, _MIN_COUNTERS)
            counters.append(torch.zeros(size, dtype=torch.int32, device=device))


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        dtype: torch.dtype, num_tokens: int, rows: int, in_features: int, form: str = ""
    ) -> Callable[[], object]:
        def run() -> object:
            plain = torch.empty(num_tokens, in_features, dtype=dtype)
            norm = RowNorm(torch.empty(in_features, dtype=dtype), 1e-6)
            x = scale_rows(plain, norm) if "scaled" in form else plain
            weight = torch.empty(rows, in_features, dtype=dtype)
            bias = torch.empty(rows, dtype=dtype) if "bias" in form else None
            if "add" in form:
                residual = torch.empty(num_tokens, rows, dtype=dtype)
                norm = RowNorm(torch.empty(rows, dtype=dtype), 1e-6)
                return skinny_add_(x, weight, bias, residual, norm)
            activation = next((a for a in ACTIVATIONS if a in form), None)
            return skinny_linear(x, weight, bias, activation=activation)

        return run

    half = torch.bfloat16
    return {
        "bf16, 1 x 512 x 1024": call(half, 1, 512, 1024),
        "bf16, 16 x 512 x 1024": call(half, 16, 512, 1024),
        "fp16, 17 x 100 x 96, bias": call(torch.float16, 17, 100, 96, "bias"),
        "bf16, 1 x 100 x 1024": call(half, 1, 100, 1024),
        "bf16, 16 x 512 x 2048, shared out": call(half, 16, 512, 2048),
        "bf16, 17 x 4096 x 1024": call(half, 17, 4096, 1024),
        "bf16, 32 x 28672 x 4096, scaled, silu": call(half, 32, 28672, 4096, "scaled silu"),
        "bf16, 8 x 4096 x 14336, add": call(half, 8, 4096, 14336, "add"),
        "bf16, 16 x 6144 x 1024, scaled, bias": call(half, 16, 6144, 1024, "scaled bias"),
        "fp16, 2 x 200 x 512, gelu_tanh": call(torch.float16, 2, 200, 512, "gelu_tanh"),
        "fp32, 2 x 100 x 128": call(torch.float32, 2, 100, 128),
    }
