"""Few rows times a weight of 4 or 8 bits, in Triton and without tensor cores.

Like :mod:`kernels.triton.gemv`, a program asks for its first weights before it waits for the launch
ahead, and the norm of a single row, the gated activation and the addition to the residual are part
of it. This module checks what it is given and shapes the launch;
:mod:`kernels.triton.quantized_gemv_kernel` has the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.norm import RowNorm
from kernels.triton import has_dependent_launch, is_interpreted, num_multiprocessors
from kernels.triton.activation import ACTIVATIONS
from kernels.triton.launch import Launcher, dependent_options, planned
from kernels.triton.quantized_gemv_kernel import quantized_gemv_kernel
from kernels.triton.quantized_layout import group_of, num_chunks, packed_shape

MAX_ROWS = 4
MAX_NORMED = 16384


@dataclass(frozen=True, slots=True)
class QuantizedGemvTiling:
    """How the kernel is cut.

    Attributes
    ----------
    block_n
        Rows of the weight that a program takes.
    block_q
        Pieces of 16 bytes that it takes of each at a time: 32 columns of 4 bits, 16 of 8.
    num_warps
        Of a program.
    """

    block_n: int
    block_q: int
    num_warps: int = 4


def quantized_gemv(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    rows: int,
    norm: RowNorm | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    tiling: QuantizedGemvTiling | None = None,
    is_dependent: bool | None = None,
) -> Tensor:
    """``norm(x) @ weight.T + bias`` for few rows; then either gated or added to the residual.

    Parameters
    ----------
    x : Tensor [T, K]
        fp32, bf16 or fp16; fp32 is rounded to bf16. Up to ``MAX_ROWS`` rows, which may lie apart.
    words : Tensor int32
        Codes of ``[N, K]`` as :func:`kernels.triton.quantized_layout.pack_tiles` lays them out.
    scales : Tensor [G, N] float
        ``K / G`` consecutive columns share one: 32, 64 or a multiple of 128, or all of them.
    zeros : Tensor [G, N] int8, or None
        Codes of 0. None: that is 8 of 4 bits, and 0 of 8.
    bias : Tensor [N] or None
    bits : int
        4 or 8.
    rows : int
        ``N``. With an activation, ``N = 2 F``: the rows of the gate first.
    norm : RowNorm or None
        Of a single row. None: ``x`` as it is.
    residual : Tensor [1, N] or None
        Where the product of a single row is added in place; then it is what is returned.
    activation : str or None
        One of :data:`ACTIVATIONS`, of the first half of the product, times the second half.
    tiling : QuantizedGemvTiling or None
        None: :func:`choose_tiling`.
    is_dependent : bool or None
        Whether to start before the launch ahead has ended; None: where the card can.

    Returns
    -------
    Tensor [T, N], [T, F] with an activation
        In the dtype of ``x``; sums are fp32, rounded once.

    Notes
    -----
    Never waits for the device. Weights, their norms and biases must not have been written by the
    launch ahead: they are read before it has ended.
    """
    num_rows, in_features = x.shape
    if num_rows > MAX_ROWS:
        raise ValueError(f"{num_rows} rows: this kernel takes up to {MAX_ROWS}")
    if activation is not None and (activation not in ACTIVATIONS or residual is not None):
        raise ValueError(
            f"activation {activation!r} must be one of {', '.join(ACTIVATIONS)}, without a residual"
        )
    if num_rows != 1 and (norm is not None or residual is not None):
        raise ValueError(f"{num_rows} rows: norms and residuals are of one")
    if norm is not None and in_features > MAX_NORMED:
        raise ValueError(f"a norm of {in_features} values: this kernel takes up to {MAX_NORMED}")
    if x.stride(1) != 1:
        x = x.contiguous()
    if residual is not None:
        out = residual
    else:
        out_features = rows if activation is None else rows // 2
        out = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    if out.numel():
        norm_weight = None if norm is None else norm.weight
        tensors = (out, x, words, scales, zeros, bias, residual, norm_weight)
        eps, offset = (0.0, 0.0) if norm is None else (norm.eps, norm.offset)
        _gemv(tensors, eps, offset, bits, rows, activation or "none", tiling, is_dependent)
    return out


@planned
def _gemv(
    out: Tensor,
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    _bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    offset: float,
    bits: int,
    rows: int,
    activation: str,
    tiling: QuantizedGemvTiling | None,
    is_dependent: bool | None,
) -> Launcher:
    (num_rows, in_features), out_features = x.shape, out.shape[1]
    num_groups = scales.shape[0]
    group = group_of(in_features, num_groups)
    assert words.shape == packed_shape(rows, in_features, bits) and words.is_contiguous()
    assert scales.shape == (num_groups, rows) and scales.is_contiguous()
    assert zeros is None or (zeros.shape == scales.shape and zeros.is_contiguous())
    assert residual is None or (residual.shape == (1, rows) and residual.stride(1) == 1)
    assert norm_weight is None or (
        norm_weight.shape == (in_features,) and norm_weight.stride(0) == 1
    )
    if tiling is None:
        tiling = choose_tiling(rows, in_features, bits, num_rows, x.device)
    block_n = tiling.block_n if activation == "none" else tiling.block_n // 2
    if is_dependent is None:
        is_dependent = has_dependent_launch(x.device)
    columns = tiling.block_q * (128 // bits)
    return Launcher(
        quantized_gemv_kernel,
        (triton.cdiv(out_features, block_n),),
        eps,
        offset,
        out_features,
        in_features,
        x.stride(0),
        num_chunks(in_features),
        num_groups,
        rows,
        ROWS=num_rows,
        BITS=bits,
        GROUP=group,
        BLOCK_N=tiling.block_n,
        BLOCK_Q=tiling.block_q,
        NUM_BLOCKS=triton.cdiv(in_features, columns),
        ACTIVATION=activation,
        BLOCK_ROW=triton.next_power_of_2(in_features) if norm_weight is not None else 1,
        HAS_OFFSET=norm_weight is not None and offset != 0.0,
        IS_EVEN=in_features % columns == 0,
        IS_INTERPRETED=is_interpreted(),
        IS_DEPENDENT=is_dependent,
        num_warps=tiling.num_warps,
        **dependent_options(is_dependent),
    )


def choose_tiling(
    rows: int, in_features: int, bits: int, num_rows: int, device: torch.device
) -> QuantizedGemvTiling:
    """The cut that suits a shape (``experiments.gpu_quantized --tune``).

    A row of up to 4,096 columns of 4 bits is taken at once, so that all weights of a program are
    asked for before it waits.
    """
    pieces = num_chunks(in_features) * bits  # of 16 bytes, in a row
    block_q = 64 if bits == 8 else 128
    while block_q > pieces or (pieces % block_q and block_q > 32):
        block_q //= 2
    block_q = max(block_q, 8)
    if bits == 8:
        return QuantizedGemvTiling(4, block_q, num_warps=2)
    few = rows <= 32 * num_multiprocessors(device)
    return QuantizedGemvTiling(8 if few or num_rows > 1 else 4, block_q, num_warps=4)


def example_launches() -> dict[str, Callable[[], object]]:
    """Calls that :mod:`kernels.triton.compile_ahead` builds."""

    def call(
        dtype: torch.dtype, num_rows: int, rows: int, in_features: int, form: str, group: int = 0
    ) -> Callable[[], object]:
        def run() -> object:
            bits = 8 if "w8" in form else 4
            x = torch.empty(num_rows, in_features, dtype=dtype)
            shape = (in_features // group if group else 1, rows)
            norm = RowNorm(torch.empty(in_features, dtype=dtype), 1e-6)
            return quantized_gemv(
                x,
                torch.empty(packed_shape(rows, in_features, bits), dtype=torch.int32),
                torch.empty(shape, dtype=dtype),
                torch.empty(shape, dtype=torch.int8) if "zeros" in form else None,
                torch.empty(rows, dtype=dtype) if "bias" in form else None,
                bits=bits,
                rows=rows,
                norm=norm if "norm" in form else None,
                residual=torch.empty(1, rows, dtype=dtype) if "residual" in form else None,
                activation=next((a for a in ACTIVATIONS if a in form), None),
            )

        return run

    half = torch.bfloat16
    return {
        "w4g128, 1 x 4096 x 4096, norm": call(half, 1, 4096, 4096, "w4 norm", 128),
        "w4g128, 1 x 512 x 14336, residual": call(half, 1, 512, 14336, "w4 zeros residual", 128),
        "w4g32z, 1 x 512 x 1024, silu": call(half, 1, 512, 1024, "w4 zeros norm silu", 32),
        "w4g64, 2 x 100 x 192, bias": call(torch.float16, 2, 100, 192, "w4 bias", 64),
        "w8, 1 x 512 x 4096": call(half, 1, 512, 4096, "w8"),
        "w8g128z, 4 x 512 x 4096, gelu": call(half, 4, 512, 4096, "w8 zeros gelu_tanh", 128),
        "w4, fp32, 3 x 100 x 1000": call(torch.float32, 3, 100, 1000, "w4"),
    }
