"""Which kernel multiplies a weight of 4 or 8 bits.

==================  ===============================================================================
kernel              serves
==================  ===============================================================================
``gemv``            single rows of small weights (:mod:`kernels.triton.quantized_gemv`)
``split``           a few rows, K shared out among warps (:mod:`kernels.triton.quantized_split`)
``gemm``            more, on tensor cores (:mod:`kernels.triton.quantized_gemm`)
``written_out``     thousands: rows of the weight are written out in 16 bits, some at a time into
                    the same memory, which the L2 cache holds, and multiplied by the matrix library
==================  ===============================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kernels.triton.activation import gelu_tanh_and_mul, silu_and_mul
from kernels.triton.dequantize import dequantize_rows_
from kernels.triton.quantized_gemm import quantized_gemm
from kernels.triton.quantized_gemv import quantized_gemv
from kernels.triton.quantized_split import quantized_split

Kernel = Literal["gemv", "split", "gemm", "written_out"]
KERNELS: tuple[Kernel, ...] = ("gemv", "split", "gemm", "written_out")

#: Single rows of weights of so many values take no tensor cores, as measured on an H100
#: (``experiments.gpu_quantized``).
MOST_GEMV_VALUES = 32 << 20
#: 0: not measured on a GPU yet. ``--tune`` of that experiment has the kernel among its cuts.
MOST_SPLIT_ROWS = 0
#: The weight is written out as fast for any number of rows: of the one product that was measured
#: (6144 x 4096, 8 bits), that and the library's product take less than ``gemm`` from here on.
LEAST_WRITTEN_OUT_ROWS = 512
PIECE_BYTES = 24 << 20
_PRODUCTS: dict[Kernel, Callable[..., Tensor]] = {
    "gemv": quantized_gemv,
    "split": quantized_split,
    "gemm": quantized_gemm,
}
_PIECES: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}


def kernel_for(num_rows: int, num_values: int, dtype: torch.dtype) -> Kernel:
    """Which kernel multiplies so many rows in ``dtype`` with a weight of so many values."""
    if num_rows <= MOST_SPLIT_ROWS:
        return "split"
    if num_rows == 1 and num_values <= MOST_GEMV_VALUES:
        return "gemv"
    # The library would multiply fp32 without tensor cores.
    if num_rows < LEAST_WRITTEN_OUT_ROWS or dtype == torch.float32:
        return "gemm"
    return "written_out"


def multiply(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    rows: int,
    activation: str | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` by the kernel that :func:`kernel_for` says; arguments as of
    :func:`kernels.triton.quantized_gemv.quantized_gemv`.

    Returns
    -------
    Tensor [T, N], [T, N / 2] with an activation
    """
    kernel = kernel_for(len(x), rows * x.shape[1], x.dtype)
    if kernel == "written_out":
        out = multiply_written_out(x, words, scales, zeros, bias, bits=bits, rows=rows)
        if activation is None:
            return out
        return silu_and_mul(out) if activation == "silu" else gelu_tanh_and_mul(out)
    return _PRODUCTS[kernel](
        x, words, scales, zeros, bias, bits=bits, rows=rows, activation=activation
    )


def multiply_written_out(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    rows: int,
    piece_bytes: int = PIECE_BYTES,
) -> Tensor:
    """As :func:`multiply`, for any number of rows in bf16 or fp16.

    Notes
    -----
    Products on one device share the memory of a piece, so they must follow one another on one
    stream.
    """
    num_rows, in_features = x.shape
    out = torch.empty(num_rows, rows, dtype=x.dtype, device=x.device)
    at_a_time = min(rows, max(256, piece_bytes // (2 * in_features) // 256 * 256))
    piece = _keep_piece(at_a_time * in_features, x.dtype, x.device)
    for first in range(0, rows, at_a_time):
        count = min(at_a_time, rows - first)
        weight = piece[: count * in_features].view(count, in_features)
        dequantize_rows_(weight, words, scales, zeros, bits=bits, rows=rows, first_row=first)
        columns = out[:, first : first + count]
        if bias is None:
            torch.mm(x, weight.T, out=columns)
        else:
            torch.addmm(bias[first : first + count], x, weight.T, out=columns)
    return out


def _keep_piece(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a piece of a weight, kept for ever, since a captured graph may hold it."""
    pieces = _PIECES.setdefault((device, dtype), [])
    if not pieces or pieces[-1].numel() < size:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a product of many rows needs its scratch memory before a CUDA graph is captured:"
                " run the same call once outside of the capture"
            )
        pieces.append(torch.empty(size, dtype=dtype, device=device))
    return pieces[-1]
