# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Few rows of 8-bit activations times an 8-bit weight, in Triton.

As :mod:`kernels.triton.skinny_gemm`, whose floor is the memory's bandwidth and which cuts a weight
into blocks that are shared out evenly: with half the bytes a weight. Codes go to the tensor cores
as they are, 8 bits by 8 bits; scales multiply sums, where values come out or, if blocks of inputs
have their own, block by block.

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
from kernels.triton.launch import Launcher, dependent_options, planned
from kernels.triton.numbers import as_bits, decode_kv
from kernels.triton.prefetch import PIECE, prefetch
from kernels.triton.skinny_gemm import keep_scratch, owner_of, scratch_of

MAX_ROWS = 128
_MERGED = tl.constexpr(4)  # pieces whose sums are read together
GROUP_SIZE = 128


@dataclass(frozen=True, slots=True)
class ScaledTiling:
    """How the kernel is cut.

    Attributes
    ----------
    block_n, block_k
        Rows and columns of the weight in a block; scales of groups need 128 columns.
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
def scaled_skinny_kernel(
    out,
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
    parts,
    counters,
    num_tokens,
    out_features,
    in_features,
    x_stride,
    weight_stride,
    x_scale_stride,
    x_group_stride,
    scale_stride,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCHED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (programs). Blocks are counted along K first, then from tile to tile."""
    program = tl.program_id(0)
    blocks = tl.cdiv(in_features, BLOCK_K)  # of a tile
    total = tl.cdiv(out_features, BLOCK_N) * blocks
    share = total // tl.num_programs(0)
    extra = total % tl.num_programs(0)  # programs with one block more, the first ones
    block = program * share + tl.minimum(program, extra)
    last_block = block + share + (program < extra).to(tl.int32)
    row = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    token = tl.arange(0, BLOCK_T)
    is_token = token < num_tokens
    SUM: tl.constexpr = tl.int32 if KIND == "int8" else tl.float32
    if IS_DEPENDENT:
        gdc_launch_dependents()
        if PREFETCHED > 0:
            ahead = block % blocks * BLOCK_K
            stop = tl.minimum(block % blocks + last_block - block, blocks) * BLOCK_K
            ahead += tl.arange(0, PREFETCHED * BLOCK_K // PIECE) * PIECE
            ahead = tl.minimum(ahead, stop - PIECE)
            source = tl.minimum(block // blocks * BLOCK_N + row, out_features - 1)
            prefetch((weight + source.to(tl.int64) * weight_stride)[:, None] + ahead[None, :])
        gdc_wait()  # the launch before wrote x, and may use the same parts and counters
    while block < last_block:  # one tile's part of the share a turn
        tile = block // blocks
        first = block - tile * blocks
        count = tl.minimum(blocks - first, last_block - block)
        # Rows beyond the end are read as the last one, and not written.
        source = tl.minimum(tile * BLOCK_N + row, out_features - 1)
        places = (weight + source.to(tl.int64) * weight_stride)[:, None] + column[None, :]
        x_places = x + token[:, None] * x_stride + column[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_T], SUM)
        for k in tl.range(first, first + count, num_stages=STAGES):
            at = k * BLOCK_K
            if IS_EVEN:
                w = tl.load(places + at)
                values = tl.load(x_places + at, mask=is_token[:, None], other=0.0)
            else:
                is_column = (at + column < in_features)[None, :]
                w = tl.load(places + at, mask=is_column, other=0.0)
                values = tl.load(x_places + at, mask=is_token[:, None] & is_column, other=0.0)
            if GROUP > 0:
                part = _multiply(w, values, tl.zeros([BLOCK_N, BLOCK_T], SUM), KIND, IS_INTERPRETED)
                by_token = tl.load(
                    x_scale + token * x_scale_stride + k * x_group_stride, mask=is_token, other=0.0
                )
                by_row = tl.load(weight_scale + source // GROUP * scale_stride + k)
                acc += part * by_row[:, None] * by_token[None, :]
            else:
                acc = _multiply(w, values, acc, KIND, IS_INTERPRETED)
        is_last = count == blocks
        if not is_last:
            # A program has two places: for the tile it begins within, and for one it begins.
            place = program * 2 + (first == 0).to(tl.int32)
            part_at = token[None, :] * BLOCK_N + row[:, None]
            seen = parts.to(tl.pointer_type(SUM), bitcast=True)
            tl.store(seen + place * (BLOCK_T * BLOCK_N) + part_at, acc, mask=is_token[None, :])
            # All threads have written before the one that counts says so to other programs.
            tl.debug_barrier()
            first_program = owner_of(tile * blocks, share, extra)
            num_pieces = owner_of(tile * blocks + blocks - 1, share, extra) - first_program + 1
            is_last = (
                tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == num_pieces - 1
            )
            if is_last:
                tl.store(counters + tile, 0)  # for the next launch
                acc = tl.zeros([BLOCK_N, BLOCK_T], SUM)
                for piece in range(0, num_pieces, _MERGED):
                    for i in tl.static_range(_MERGED):
                        place = (first_program + piece + i) * 2 + (piece + i == 0)
                        acc += tl.load(
                            seen + place * (BLOCK_T * BLOCK_N) + part_at,
                            mask=is_token[None, :] & (piece + i < num_pieces),
                            other=0.0,
                            cache_modifier=".cg",
                        )
        if is_last:
            found = acc.to(tl.float32)
            if GROUP == 0:
                by_token = tl.load(x_scale + token * x_scale_stride, mask=is_token, other=0.0)
                by_row = tl.load(weight_scale + source * scale_stride)
                found = found * by_row[:, None] * by_token[None, :]
            if bias is not None:
                found += tl.load(bias + source).to(tl.float32)[:, None]
            feature = tile * BLOCK_N + row
            target = out + token[None, :] * out_features + feature[:, None]
            mask = (feature < out_features)[:, None] & is_token[None, :]
            tl.store(target, found.to(out.dtype.element_ty), mask=mask)
        block += count


@triton.jit
def _multiply(w, values, acc, KIND: tl.constexpr, IS_INTERPRETED: tl.constexpr):
    if IS_INTERPRETED:  # numpy has no fp8, and sums bytes in bytes
        w = decode_kv(w, KIND, tl.float32)
        values = decode_kv(values, KIND, tl.float32)
        acc += tl.dot(w, tl.trans(values), input_precision="ieee").to(acc.dtype)
    elif KIND == "int8":
        acc = tl.dot(w, tl.trans(values), acc, out_dtype=tl.int32)
    else:
        # Tensor cores sum fp8 with fewer bits than fp32 has, so over no more than 128 columns.
        acc = tl.dot(w, tl.trans(values), acc, max_num_imprecise_acc=128)
    return acc


def scaled_skinny_linear(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    tiling: ScaledTiling | None = None,
    is_dependent: bool | None = None,
) -> Tensor:
    """``(codes * scales) @ (weight * weight_scales).T + bias`` for few rows.

    Parameters
    ----------
    codes : Tensor [T, K] float8_e4m3fn or int8
        At most ``MAX_ROWS`` rows.
    scales : Tensor [T, 1] or [T, ceil(K / 128)] float32
    weight : Tensor [N, K]
        In the dtype of ``codes``, its rows contiguous.
    weight_scales : Tensor [N], or [ceil(N / 128), ceil(K / 128)] float32
        Of groups where the activations' are.
    bias : Tensor [N] or None
    out_dtype
        Of the product.
    tiling : ScaledTiling or None
        None: :func:`choose_tiling`.
    is_dependent : bool or None
        Whether to start before the launch ahead has ended; None: where the card can.

    Returns
    -------
    Tensor [T, N]
        Rounded once.

    Notes
    -----
    Never waits for the device. Launches on one device share scratch memory, also with
    :func:`kernels.triton.skinny_gemm.skinny_linear`, so they must follow one another on one stream.
    """
    num_tokens = codes.shape[0]
    if num_tokens > MAX_ROWS:
        raise ValueError(f"{num_tokens} rows: this kernel takes up to {MAX_ROWS}")
    out = torch.empty(num_tokens, weight.shape[0], dtype=out_dtype, device=codes.device)
    if out.numel() == 0:
        return out
    tensors = (out, codes, scales, weight, weight_scales, bias)
    launch = _skinny.find(tensors, weight.data_ptr() % 16 == 0, tiling, is_dependent)
    launch(*tensors, *scratch_of(codes.device))
    return out


@planned
def _skinny(
    out: Tensor,
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    _bias: Tensor | None,
    is_aligned: bool,
    tiling: ScaledTiling | None,
    is_dependent: bool | None,
) -> Launcher:
    (num_tokens, in_features), out_features = codes.shape, weight.shape[0]
    has_groups = check_scaled(codes, scales, weight, weight_scales)
    if tiling is None:
        tiling = choose_tiling(out_features, in_features, num_tokens, has_groups, codes.device)
    if has_groups and tiling.block_k != GROUP_SIZE:
        raise ValueError(f"scales of groups need block_k={GROUP_SIZE}, not {tiling.block_k}")
    tiles = triton.cdiv(out_features, tiling.block_n)
    num_programs = tiles
    if tiling.programs:
        blocks = tiles * triton.cdiv(in_features, tiling.block_k)
        num_programs = min(tiling.programs * num_multiprocessors(codes.device), blocks)
    block_t = max(16, triton.next_power_of_2(num_tokens))
    keep_scratch(2 * num_programs * block_t * tiling.block_n, tiles, codes.device)
    if is_dependent is None:
        is_dependent = has_dependent_launch(codes.device)
    can_prefetch = (
        in_features % int(PIECE.value) == 0
        and weight.stride(0) % 16 == 0
        and is_aligned
        and tiling.block_k % int(PIECE.value) == 0
    )
    return Launcher(
        scaled_skinny_kernel,
        (num_programs,),
        num_tokens,
        out_features,
        in_features,
        codes.stride(0),
        weight.stride(0),
        scales.stride(0),
        scales.stride(1),
        weight_scales.stride(0),
        seen_as=as_bits if is_interpreted() else None,
        KIND="int8" if codes.dtype == torch.int8 else "fp8",
        GROUP=GROUP_SIZE if has_groups else 0,
        BLOCK_T=block_t,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        STAGES=tiling.num_stages,
        PREFETCHED=tiling.prefetched if can_prefetch else 0,
        IS_EVEN=in_features % tiling.block_k == 0,
        IS_INTERPRETED=is_interpreted(),
        IS_DEPENDENT=is_dependent,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **dependent_options(is_dependent),
    )


def check_scaled(codes: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> bool:
    """Whether scales are those of groups; they and the codes must fit one another."""
    (num_tokens, in_features), out_features = codes.shape, weight.shape[0]
    assert weight.shape[1] == in_features and weight.dtype == codes.dtype
    assert codes.dtype in (torch.int8, torch.float8_e4m3fn)
    assert codes.stride(1) == 1 and weight.stride(1) == 1
    assert scales.dtype == weight_scales.dtype == torch.float32
    has_groups = weight_scales.dim() == 2
    groups = triton.cdiv(in_features, GROUP_SIZE) if has_groups else 1
    assert scales.shape == (num_tokens, groups), (scales.shape, codes.shape)
    if has_groups:
        assert weight_scales.shape == (triton.cdiv(out_features, GROUP_SIZE), groups)
        assert weight_scales.stride(1) == 1 or groups == 1
    else:
        assert weight_scales.shape == (out_features,)
    return has_groups


def choose_tiling(
    out_features: int,
    in_features: int,
    num_tokens: int,
    has_groups: bool,
    device: torch.device,
) -> ScaledTiling:
    """The cut that suits a shape, as measured on an H100 (``experiments.gpu_scaled --tune``).

    Tiles of whole rows need no merging, which costs as much as a third of a small weight; only a
    long sum with few outputs is shared out.
    """
    if not has_large_shared_memory(device):
        return ScaledTiling(64, 128, num_stages=4, programs=0)
    if has_groups:
        if num_tokens <= 16:
            return ScaledTiling(64, 128, num_stages=8, programs=2, prefetched=4)
        return ScaledTiling(64, 128, num_stages=6, programs=2)
    if num_tokens > 32:
        if in_features > 2 * out_features:
            return ScaledTiling(64, 256, num_stages=3, programs=1)
        return ScaledTiling(64, 128, num_stages=5, programs=0, prefetched=4)
    if in_features > 2 * out_features:
        return ScaledTiling(64, 256, num_stages=4, programs=2)
    if out_features >= 128 * num_multiprocessors(device):
        return ScaledTiling(64, 256, num_stages=4, programs=0)
    return ScaledTiling(64, 512, num_stages=3, programs=0, prefetched=1)


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        dtype: torch.dtype, num_tokens: int, rows: int, in_features: int, form: str = ""
    ) -> Callable[[], object]:
        def run() -> object:
            codes = torch.empty(num_tokens, in_features, dtype=dtype)
            weight = torch.empty(rows, in_features, dtype=dtype)
            groups = triton.cdiv(in_features, GROUP_SIZE) if "groups" in form else 1
            scales, weight_scales = torch.empty(num_tokens, groups), torch.empty(rows)
            if "groups" in form:
                weight_scales = torch.empty(triton.cdiv(rows, GROUP_SIZE), groups)
            bias = torch.empty(rows, dtype=torch.bfloat16) if "bias" in form else None
            return scaled_skinny_linear(
                codes, scales, weight, weight_scales, bias, out_dtype=torch.bfloat16
            )

        return run

    fp8, int8 = torch.float8_e4m3fn, torch.int8
    return {
        "int8, 1 x 512 x 1024": call(int8, 1, 512, 1024),
        "fp8, 1 x 512 x 1024": call(fp8, 1, 512, 1024),
        "fp8, 16 x 28672 x 4096": call(fp8, 16, 28672, 4096),
        "fp8, 64 x 4096 x 4096, bias": call(fp8, 64, 4096, 4096, "bias"),
        "fp8, 5 x 600 x 576, groups": call(fp8, 5, 600, 576, "groups"),
        "int8, 17 x 100 x 96, bias": call(int8, 17, 100, 96, "bias"),
    }
