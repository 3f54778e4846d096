# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Many rows of 8-bit activations times an 8-bit weight, in Triton.

Codes go to the tensor cores as they are; scales multiply sums, once where values come out, or for
blocks of 128 inputs that have their own, block by block in fp32 (which also makes up for the few
bits in which tensor cores sum fp8). Unlike the matrix library's integer product, whose sums go
through memory before they are scaled, one launch does it all.

Paper of the blocks: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, arXiv:2412.19437.
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
from kernels.triton.scaled_skinny import GROUP_SIZE, check_scaled

_GROUP = 8  # tiles of rows that share the weights in L2 before the next ones follow


@dataclass(frozen=True, slots=True)
class GemmTiling:
    """How a product is cut.

    Attributes
    ----------
    block_m, block_n, block_k
        Rows of activations, rows of the weight, and columns of both in a tile; scales of groups
        need 128 columns, and a number of rows of the weight that divides 128 or is it.
    num_warps, num_stages
        Of a program; ``num_stages`` tiles are on their way at a time.
    """

    block_m: int
    block_n: int
    block_k: int = 128
    num_warps: int = 8
    num_stages: int = 4


def scaled_gemm(
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    tiling: GemmTiling | None = None,
) -> Tensor:
    """``(codes * scales) @ (weight * weight_scales).T + bias``, of any number of rows.

    Parameters and result are those of :func:`kernels.triton.scaled_skinny.scaled_skinny_linear`.
    """
    out = torch.empty(codes.shape[0], weight.shape[0], dtype=out_dtype, device=codes.device)
    if out.numel():
        _gemm((out, codes, scales, weight, weight_scales, bias), tiling)
    return out


@planned
def _gemm(
    out: Tensor,
    codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    _bias: Tensor | None,
    tiling: GemmTiling | None,
) -> Launcher:
    (num_tokens, in_features), out_features = codes.shape, weight.shape[0]
    has_groups = check_scaled(codes, scales, weight, weight_scales)
    if tiling is None:
        tiling = choose_tiling(num_tokens, out_features, has_groups, codes.device, codes.dtype)
    if has_groups and (tiling.block_k != GROUP_SIZE or GROUP_SIZE % tiling.block_n):
        raise ValueError(f"scales of groups do not fit tiles of {tiling}")
    num_tiles = triton.cdiv(num_tokens, tiling.block_m) * triton.cdiv(out_features, tiling.block_n)
    is_dependent = has_dependent_launch(codes.device)
    return Launcher(
        scaled_gemm_kernel,
        (num_tiles,),
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
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        TILES=_GROUP,
        STAGES=tiling.num_stages,
        IS_EVEN=in_features % tiling.block_k == 0,
        IS_INTERPRETED=is_interpreted(),
        IS_DEPENDENT=is_dependent,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **dependent_options(is_dependent),
    )


@triton.jit(do_not_specialize=["num_tokens"])
def scaled_gemm_kernel(
    out,
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (tiles). Along the weight first, within ``TILES`` tiles of rows."""
    if IS_DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()  # the launch before wrote x
    program = tl.program_id(0)
    tiles_m = tl.cdiv(num_tokens, BLOCK_M)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    group = program // (TILES * tiles_n)
    start = group * TILES
    members = tl.minimum(tiles_m - start, TILES)
    place = program - start * tiles_n
    token = (start + place % members) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = place // members * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    # Rows beyond the end are read as the last one, and not written.
    x_row = tl.minimum(token, num_tokens - 1).to(tl.int64)
    row = tl.minimum(feature, out_features - 1).to(tl.int64)
    x_places = (x + x_row * x_stride)[:, None] + column[None, :]
    places = (weight + row * weight_stride)[None, :] + column[:, None]
    SUM: tl.constexpr = tl.int32 if KIND == "int8" and GROUP == 0 else tl.float32
    acc = tl.zeros([BLOCK_M, BLOCK_N], SUM)
    for k in tl.range(0, tl.cdiv(in_features, BLOCK_K), num_stages=STAGES):
        at = k * BLOCK_K
        if IS_EVEN:
            values = tl.load(x_places + at)
            w = tl.load(places + at)
        else:
            is_column = at + column < in_features
            values = tl.load(x_places + at, mask=is_column[None, :], other=0.0)
            w = tl.load(places + at, mask=is_column[:, None], other=0.0)
        if IS_INTERPRETED:  # numpy has no fp8, and sums bytes in bytes
            values = decode_kv(values, KIND, tl.float32)
            w = decode_kv(w, KIND, tl.float32)
        if GROUP > 0:
            part = tl.dot(values, w, input_precision="ieee")
            by_token = tl.load(x_scale + x_row * x_scale_stride + k * x_group_stride)
            by_block = tl.load(
                weight_scale + place // members * BLOCK_N // GROUP * scale_stride + k
            )
            acc += part.to(tl.float32) * (by_token * by_block)[:, None]
        elif IS_INTERPRETED:
            acc += tl.dot(values, w, input_precision="ieee").to(SUM)
        else:
            acc = tl.dot(values, w, acc, out_dtype=SUM)
    found = acc.to(tl.float32)
    if GROUP == 0:
        by_token = tl.load(x_scale + x_row * x_scale_stride)
        by_row = tl.load(weight_scale + row * scale_stride)
        found = found * by_token[:, None] * by_row[None, :]
    if bias is not None:
        found += tl.load(bias + row).to(tl.float32)[None, :]
    target = out + token.to(tl.int64)[:, None] * out_features + feature[None, :]
    mask = (token < num_tokens)[:, None] & (feature < out_features)[None, :]
    tl.store(target, found.to(out.dtype.element_ty), mask=mask)


def choose_tiling(
    num_tokens: int,
    out_features: int,
    has_groups: bool,
    device: torch.device,
    code_dtype: torch.dtype = torch.float8_e4m3fn,
) -> GemmTiling:
    """The cut that suits a shape: the largest of which there are about as many tiles as there are
    multiprocessors. Sizes as measured on an H100 (``experiments.gpu_scaled --tune``)."""
    if not has_large_shared_memory(device):
        return GemmTiling(64, 64, num_warps=4, num_stages=3)
    sizes = [
        GemmTiling(128, 128, num_warps=8, num_stages=4 if has_groups else 3),
        GemmTiling(64, 128, num_warps=4, num_stages=5),
    ]
    if not has_groups and code_dtype != torch.int8:
        sizes.insert(0, GemmTiling(128, 256, num_warps=8, num_stages=3))
    for tiling in sizes:
        tiles = triton.cdiv(num_tokens, tiling.block_m) * triton.cdiv(out_features, tiling.block_n)
        if 10 * tiles >= 9 * num_multiprocessors(device):
            return tiling
    return GemmTiling(64, 64, num_warps=4, num_stages=5)


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        dtype: torch.dtype, num_tokens: int, rows: int, in_features: int, form: str = ""
    ) -> Callable[[], object]:
        def run() -> object:
            codes = torch.empty(num_tokens, in_features, dtype=dtype, device="meta")
            weight = torch.empty(rows, in_features, dtype=dtype, device="meta")
            groups = triton.cdiv(in_features, GROUP_SIZE) if "groups" in form else 1
            shape = (triton.cdiv(rows, GROUP_SIZE), groups) if "groups" in form else (rows,)
            scales = torch.empty(num_tokens, groups, device="meta")
            weight_scales = torch.empty(shape, device="meta")
            bias = torch.empty(rows, device="meta") if "bias" in form else None
            return scaled_gemm(codes, scales, weight, weight_scales, bias, out_dtype=torch.bfloat16)

        return run

    fp8, int8 = torch.float8_e4m3fn, torch.int8
    return {
        "int8, 33 x 512 x 1024": call(int8, 33, 512, 1024),
        "fp8, 4096 x 4096 x 4096": call(fp8, 4096, 4096, 4096),
        "fp8, 4096 x 4096 x 4096, groups": call(fp8, 4096, 4096, 4096, "groups"),
        "int8, 4096 x 4096 x 4096": call(int8, 4096, 4096, 4096),
        "fp8, 100 x 600 x 576, groups, bias": call(fp8, 100, 600, 576, "groups bias"),
    }
