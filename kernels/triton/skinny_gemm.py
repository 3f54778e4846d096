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

A gated activation is part of the product whose halves it multiplies, where values come out. (The
norms on either side gain nothing there: taken where rows are read, they send the values for the
tensor cores through registers, and begun where a product is added to the residual, they lengthen
the end of that launch by as much as their own would take.)

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

from kernels.triton import (
    has_dependent_launch,
    has_large_shared_memory,
    is_interpreted,
    num_multiprocessors,
)
from kernels.triton.activation import ACTIVATIONS, gate
from kernels.triton.launch import Launcher, dependent_options, planned
from kernels.triton.prefetch import PIECE, prefetch

MAX_ROWS = 64
_MERGED = tl.constexpr(4)  # pieces whose sums are read together
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


@triton.jit(do_not_specialize=["num_tokens"])
def skinny_gemm_kernel(
    out,
    x,
    weight,
    bias,
    parts,
    counters,
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
        if count == blocks:
            _store(out, acc, bias, source, tile, token, is_token, out_features, ACTIVATION)
        else:
            # A program has two places: for the tile it begins within, and for one it begins.
            place = program * 2 + (first == 0).to(tl.int32)
            part = token[None, :] * BLOCK_N + row[:, None]
            tl.store(parts + place * (BLOCK_T * BLOCK_N) + part, acc, mask=is_token[None, :])
            # All threads have written before the one that counts says so to other programs.
            tl.debug_barrier()
            first_program = owner_of(tile * blocks, share, extra)
            num_pieces = owner_of(tile * blocks + blocks - 1, share, extra) - first_program + 1
            if tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == num_pieces - 1:
                tl.store(counters + tile, 0)  # for the next launch
                merged = add_pieces(parts, part, first_program, num_pieces, is_token)
                _store(out, merged, bias, source, tile, token, is_token, out_features, ACTIVATION)
        block += count


@triton.jit
def owner_of(block, share, extra):
    """Program whose share holds a block; shares are of ``share + 1`` blocks, then of ``share``."""
    long = extra * (share + 1)
    return tl.where(
        block < long, block // (share + 1), extra + (block - long) // tl.maximum(share, 1)
    )


@triton.jit
def add_pieces(parts, part, first_program, num_pieces, is_token):
    """Sums ``[N, T]`` of a tile from those of its pieces, which lie at ``part`` from their places,
    in their order along K."""
    SIZE: tl.constexpr = part.shape[0] * part.shape[1]
    merged = tl.zeros(part.shape, tl.float32)
    for piece in range(0, num_pieces, _MERGED):
        for i in tl.static_range(_MERGED):
            place = (first_program + piece + i) * 2 + (piece + i == 0)
            merged += tl.load(
                parts + place * SIZE + part,
                mask=is_token[None, :] & (piece + i < num_pieces),
                other=0.0,
                cache_modifier=".cg",
            )
    return merged


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
    places = out + token[None, :] * out_features + feature[:, None]
    mask = (feature < out_features)[:, None] & is_token[None, :]
    tl.store(places, acc.to(dtype), mask=mask)


@triton.jit
def _prefetch(weight, weight_stride, source, first, stop, COLUMNS: tl.constexpr):
    """Ask the L2 cache for columns from ``first`` on, ``COLUMNS`` and none from ``stop`` on."""
    column = first + tl.arange(0, COLUMNS // PIECE) * PIECE
    column = tl.minimum(column, stop - PIECE)
    prefetch((weight + source.to(tl.int64) * weight_stride)[:, None] + column[None, :])


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    tiling: SkinnyTiling | None = None,
    is_dependent: bool | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` for few rows, or that activation of its first half times the second.

    Parameters
    ----------
    x : Tensor [T, K]
        At most ``MAX_ROWS`` rows; the rows may lie apart.
    weight : Tensor [N, K]
        In the dtype of ``x``, its rows contiguous. With an activation, ``N = 2 F``: the rows of the
        gate first.
    bias : Tensor [N] or None
    activation : str or None
        ``silu`` or ``gelu_tanh``.
    tiling : SkinnyTiling or None
        None: :func:`choose_tiling`.
    is_dependent : bool or None
        Whether to start before the launch ahead has ended; None: where the card can.

    Returns
    -------
    Tensor [T, N], [T, F] with an activation
        Sums are fp32, rounded once, and then as :mod:`kernels.activation` rounds.

    Notes
    -----
    Never waits for the device. Launches on one device share scratch memory, so they must follow
    one another on one stream.
    """
    num_tokens, in_features = x.shape
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}")
    if num_tokens > MAX_ROWS:
        raise ValueError(f"{num_tokens} rows: this kernel takes up to {MAX_ROWS}")
    rows = weight.shape[0]
    out_features = rows if activation is None else rows // 2
    if in_features and x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if in_features == 0:
        assert activation is None
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    tensors = (out, x, weight, bias)
    is_aligned = weight.data_ptr() % 16 == 0
    launch = _skinny.find(tensors, activation or "none", is_aligned, tiling, is_dependent)
    launch(*tensors, *scratch_of(x.device))
    return out


@planned
def _skinny(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias: Tensor | None,
    activation: str,
    is_aligned: bool,
    tiling: SkinnyTiling | None,
    is_dependent: bool | None,
) -> Launcher:
    num_tokens, in_features = x.shape
    rows, out_features = weight.shape[0], out.shape[1]
    assert weight.shape[1] == in_features and weight.dtype == x.dtype
    assert weight.stride(1) == 1 or in_features == 1
    if tiling is None:
        tiling = choose_tiling(rows, in_features, num_tokens, x.dtype, x.device)
    width = tiling.block_n if activation == "none" else tiling.block_n // 2
    tiles = triton.cdiv(out_features, width)
    num_programs = tiles
    if tiling.programs:
        blocks = tiles * triton.cdiv(in_features, tiling.block_k)
        num_programs = min(tiling.programs * num_multiprocessors(x.device), blocks)
    block_t = max(16, triton.next_power_of_2(num_tokens))
    keep_scratch(2 * num_programs * block_t * tiling.block_n, tiles, x.device)
    if is_dependent is None:
        is_dependent = has_dependent_launch(x.device)
    can_prefetch = (
        in_features % int(PIECE.value) == 0
        and weight.stride(0) % 16 == 0
        and is_aligned
        and tiling.block_k % int(PIECE.value) == 0
    )
    return Launcher(
        skinny_gemm_kernel,
        (num_programs,),
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
        IS_INTERPRETED=is_interpreted(),
        IS_DEPENDENT=is_dependent,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **dependent_options(is_dependent),
    )


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


def keep_scratch(num_parts: int, num_counters: int, device: torch.device) -> None:
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


def scratch_of(device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for sums, and counters, after :func:`keep_scratch`."""
    return _PARTS[device][-1], _COUNTERS[device][-1]


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        dtype: torch.dtype, num_tokens: int, rows: int, in_features: int, form: str = ""
    ) -> Callable[[], object]:
        def run() -> object:
            x = torch.empty(num_tokens, in_features, dtype=dtype)
            weight = torch.empty(rows, in_features, dtype=dtype)
            bias = torch.empty(rows, dtype=dtype) if "bias" in form else None
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
        "bf16, 32 x 28672 x 4096, silu": call(half, 32, 28672, 4096, "silu"),
        "bf16, 16 x 6144 x 1024, bias": call(half, 16, 6144, 1024, "bias"),
        "fp16, 2 x 200 x 512, gelu_tanh": call(torch.float16, 2, 200, 512, "gelu_tanh"),
        "fp32, 2 x 100 x 128": call(torch.float32, 2, 100, 128),
    }
