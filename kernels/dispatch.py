"""Which implementation an op takes: by device and dtype, decided in one place.

An op's module holds its torch reference and its dispatcher; a fast implementation for a device lives in the
sub-package of that device (``kernels.cpu``) under the same name. A CUDA tensor takes the torch reference until
a ``kernels.triton`` exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which a reference sums ``x``: fp32, or fp64 for an fp64 input (the tests' ground truth)."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_native(x: Tensor) -> bool:
    """Whether ``x`` is served by the compiled CPU kernels (a CPU tensor in fp32 or bf16)."""
    return False
