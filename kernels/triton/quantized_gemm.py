"""Products with a weight of 4 or 8 bits on tensor cores, in Triton: ``x[T, K] @ weight[N, K].T``.

Blocks of the weight are shared out among programs as in :mod:`kernels.triton.skinny_gemm`
(stream-K), or a program takes a tile; of many rows, tiles that share a weight follow one another.
This module checks what it is given and shapes the launch;
:mod:`kernels.triton.quantized_gemm_kernel` has the kernel.

Paper: Osama et al., "Stream-K", 2023, arXiv:2301.03598.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.triton import (
    has_dependent_launch,
    has_large_shared_memory,
    is_interpreted,
    num_multiprocessors,
)
from kernels.triton.activation import ACTIVATIONS
from kernels.triton.launch import Launcher, dependent_options, planned
from kernels.triton.quantized_gemm_kernel import decoder, quantized_gemm_kernel
from kernels.triton.quantized_layout import CHUNK, group_of, num_chunks, packed_shape
from kernels.triton.skinny_gemm import keep_scratch, scratch_of

#: Of more rows, weights are scaled and not sums.
MOST_SUMS_SCALED = 64
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
    prefetched
        Blocks of the weight that a program asks the L2 cache for before it waits for the launch
        ahead; a power of two, or 0.
    """

    block_t: int
    block_n: int
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 4
    programs: int = 0
    scales_weights: bool = False
    prefetched: int = 4


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
        if num_tokens > MOST_SUMS_SCALED if tiling is None else tiling.scales_weights:
            # Only values of 32 bits are copied ahead of their use, without passing registers.
            scales = scales.float()
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
    num_groups = scales.shape[0]
    group = group_of(in_features, num_groups)
    assert words.shape == packed_shape(rows, in_features, bits) and words.is_contiguous()
    assert scales.shape == (num_groups, rows) and scales.is_contiguous()
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
    decoders = [decoder(run, is_half, zeros is not None, is_scaled) for run in range(4)]
    return Launcher(
        quantized_gemm_kernel,
        (num_programs,),
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        num_chunks(in_features),
        num_groups,
        rows,
        BITS=bits,
        GROUP=group,
        PREFETCHED=tiling.prefetched,
        BLOCK_T=tiling.block_t,
        BLOCK_N=tiling.block_n,
        BLOCK_K=block_k,
        STAGES=tiling.num_stages,
        BESIDE=_BESIDE,
        SCALES_WEIGHTS=tiling.scales_weights,
        IS_SHARED=tiling.programs > 0,
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
    has_room = has_large_shared_memory(device)
    stages = 3 if has_room else 2
    is_large = rows > 128 * num_multiprocessors(device)  # as many tiles as programs
    if num_tokens <= 16:
        if bits == 8:
            return QuantizedGemmTiling(16, 32, 128, 2, stages, programs=0 if is_large else 4)
        if is_large or in_features >= 8192:
            return QuantizedGemmTiling(16, 64, 128, 4, 4, programs=0 if is_large else 4)
        shared = 3 if rows > 32 * num_multiprocessors(device) else 2
        return QuantizedGemmTiling(16, 128, 128, 4, 3, programs=shared)
    if num_tokens <= MOST_SUMS_SCALED:
        block_t = 32 if num_tokens <= 32 else 64
        if is_large and bits == 4 and block_t == 64:
            return QuantizedGemmTiling(64, 128, 128, 4, stages)
        return QuantizedGemmTiling(block_t, 64, 128, 4, stages, programs=2)
    if num_tokens <= 128 or not has_room:
        return QuantizedGemmTiling(128, 64, 128, 4, stages, programs=2, scales_weights=True)
    return QuantizedGemmTiling(128, 128, 128, 8, stages, scales_weights=True)


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        dtype: torch.dtype, num_tokens: int, rows: int, in_features: int, form: str, group: int = 0
    ) -> Callable[[], object]:
        def run() -> object:
            bits = 8 if "w8" in form else 4
            shape = (in_features // group if group else 1, rows)
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
