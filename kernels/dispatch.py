"""Which implementation an op takes: by device and dtype, decided in one place.

An op's module holds its torch reference and its dispatcher; a fast implementation for a device
lives in that device's sub-package (``kernels.cpu``, ``kernels.triton``) and is imported on its
first use. What has none there takes torch's ops.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

HAS_NUMBA = importlib.util.find_spec("numba") is not None

_NATIVE_DTYPES = (torch.float32, torch.bfloat16) if HAS_NUMBA else ()


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which a reference sums ``x``: fp32, or fp64 for fp64 (the tests' ground truth)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_native(x: Tensor) -> bool:
    """Whether the compiled CPU kernels serve ``x``: fp32 or bf16, and numba is installed."""
    return x.dtype in _NATIVE_DTYPES and x.is_cpu


def describe_cpu() -> str:
    """One line on how CPU tensors are served, for ``doctor`` and for records."""
    if not HAS_NUMBA:
        return "torch ops (numba is not installed: pip install numba)"
    from kernels.cpu import threads

    number = threads.num_threads()
    if number > 1:
        return f"numba kernels on the {number} threads of torch's pool"
    if torch.get_num_threads() > 1:
        return "numba kernels on 1 thread (numba's OpenMP layer does not share torch's pool here)"
    return "numba kernels on 1 thread"
