# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Products whose rows do not depend on one another, in Triton: ``x[T, K] @ weight[N, K].T``.

The bits of a row depend on that row and on the weight alone: not on how many rows there are, nor
on its place among them. A matrix library promises no such thing, because it chooses how to cut a
product, and whether to split its sum along K, by the number of rows. Here the cut follows from the
weight's shape alone. Fewer rows than a tile has are filled up with zeros, and a program walks all
of K in order, in blocks of one size.

Paper: He et al., "Defeating Nondeterminism in LLM Inference", Thinking Machines Lab, 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from kernels.triton import (
    has_dependent_launch,
    has_large_shared_memory,
    is_interpreted,
    num_multiprocessors,
)

_GROUP = 8  # tiles of rows that share the weights in L2 before the next ones follow


@dataclass(frozen=True, slots=True)
class InvariantTiling:
    """How a product is cut; the same for every number of rows.

    Attributes
    ----------
    block_m, block_n, block_k
        Rows of ``x``, rows of the weight, and columns of both in a tile.
    num_warps, num_stages
        Of a program; ``num_stages`` tiles are on their way at a time.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 8
    num_stages: int = 4


def invariant_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, tiling: InvariantTiling | None = None
) -> Tensor:
    """``x @ weight.T + bias``, each row the same bits whatever the other rows are.

    Parameters
    ----------
    x : Tensor [T, K]
        fp32, bf16 or fp16; the rows may lie apart.
    weight : Tensor [N, K]
        In the dtype of ``x``, its rows contiguous.
    bias : Tensor [N] or None
    tiling : InvariantTiling or None
        None: :func:`choose_tiling`. Rows are equal only under the same one.

    Returns
    -------
    Tensor [T, N]
        Sums are fp32, rounded once.

    Notes
    -----
    Never waits for the device. A NaN or an infinity stays in its row.
    """
    num_tokens, in_features = x.shape
    out_features = weight.shape[0]
    assert weight.shape[1] == in_features and weight.dtype == x.dtype
    assert weight.stride(1) == 1 or in_features == 1
    if in_features and x.stride(1) != 1:
        x = x.contiguous()
    out = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if in_features == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    if tiling is None:
        tiling = choose_tiling(out_features, x.dtype, x.device)
    num_tiles = triton.cdiv(num_tokens, tiling.block_m) * triton.cdiv(out_features, tiling.block_n)
    is_dependent = has_dependent_launch(x.device)
    invariant_gemm_kernel[(num_tiles,)](
        out,
        x,
        weight,
        bias,
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        weight.stride(0),
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        GROUP=_GROUP,
        STAGES=tiling.num_stages,
        IS_EVEN=in_features % tiling.block_k == 0,
        IS_INTERPRETED=is_interpreted(),
        IS_DEPENDENT=is_dependent,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **({"launch_pdl": True} if is_dependent else {}),
    )
    return out


@triton.jit(do_not_specialize=["num_tokens"])
def invariant_gemm_kernel(
    out,
    x,
    weight,
    bias,
    num_tokens,
    out_features,
    in_features,
    x_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Grid: (tiles). Along the weight first, within ``GROUP`` tiles of rows."""
    if IS_DEPENDENT:
        gdc_wait()  # the launch before wrote x
    program = tl.program_id(0)
    tiles_m = tl.cdiv(num_tokens, BLOCK_M)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    group = program // (GROUP * tiles_n)
    first = group * GROUP
    members = tl.minimum(tiles_m - first, GROUP)
    place = program - first * tiles_n
    token = (first + place % members) * BLOCK_M + tl.arange(0, BLOCK_M)
    feature = place // members * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    is_token = token < num_tokens
    is_feature = feature < out_features
    x_places = x + token.to(tl.int64)[:, None] * x_stride + column[None, :]
    # Rows beyond the end are read as the last one, and not written.
    source = tl.minimum(feature, out_features - 1).to(tl.int64) * weight_stride
    weight_places = (weight + source)[:, None] + column[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(0, tl.cdiv(in_features, BLOCK_K), num_stages=STAGES):
        at = k * BLOCK_K
        if IS_EVEN:
            values = tl.load(x_places + at, mask=is_token[:, None], other=0.0)
            w = tl.load(weight_places + at)
        else:
            is_column = (at + column < in_features)[None, :]
            values = tl.load(x_places + at, mask=is_token[:, None] & is_column, other=0.0)
            w = tl.load(weight_places + at, mask=is_column, other=0.0)
        if IS_INTERPRETED:  # numpy has no bf16
            values = values.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(values, tl.trans(w), acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    target = out + token.to(tl.int64)[:, None] * out_features + feature[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=is_token[:, None] & is_feature[None, :])


def choose_tiling(out_features: int, dtype: torch.dtype, device: torch.device) -> InvariantTiling:
    """The cut of a weight's products: a compromise, since it may not look at the number of rows.

    Tiles of 128 rows, since a prompt has many; as wide as leaves single rows, which are one row of
    tiles, about a tile for every multiprocessor.
    """
    if dtype == torch.float32:  # products without tensor cores, which would round the inputs
        return InvariantTiling(64, 64, 32, num_warps=4, num_stages=3)
    block_n = 128
    while block_n > 32 and out_features < block_n * num_multiprocessors(device):
        block_n //= 2
    num_stages = 4 if has_large_shared_memory(device) else 3
    return InvariantTiling(128, block_n, 64, num_warps=8, num_stages=num_stages)


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        dtype: torch.dtype,
        num_tokens: int,
        out_features: int,
        in_features: int,
        *,
        has_bias: bool = False,
        tiling: InvariantTiling | None = None,
    ) -> Callable[[], object]:
        def run() -> object:
            x = torch.empty(num_tokens, in_features, dtype=dtype, device="meta")
            weight = torch.empty(out_features, in_features, dtype=dtype, device="meta")
            bias = torch.empty(out_features, dtype=dtype, device="meta") if has_bias else None
            return invariant_linear(x, weight, bias, tiling=tiling)

        return run

    half = torch.bfloat16
    return {
        "bf16, 128 wide": call(half, 8192, 28672, 4096),
        "bf16, 64 wide": call(half, 1, 6144, 4096, tiling=InvariantTiling(128, 64, 64)),
        "fp16, 32 wide, bias": call(
            torch.float16, 17, 100, 96, has_bias=True, tiling=InvariantTiling(128, 32, 64)
        ),
        "fp32, 5 x 100 x 96": call(torch.float32, 5, 100, 96),
    }
