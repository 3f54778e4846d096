"""Which kernels serve: Triton's on a GPU and in its interpreter, else numba's and oneDNN's."""

from __future__ import annotations

import torch

from kernels import dispatch, triton
from techniques.fused_kernels.ops import unsupported_reasons as triton_reasons


def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels serve tensors of ``device``."""
    return triton.HAS_TRITON and (device.type == "cuda" or triton.is_interpreted())


def unsupported_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why no kernel here has rows that do not depend on one another."""
    if device.type != "cpu" or has_triton(device):
        return triton_reasons(device, dtype)
    if not dispatch.HAS_NUMBA:
        return [
            "torch's own sums on a CPU may be cut by the number of rows, and the compiled kernels, "
            "whose are not, need numba: pip install numba"
        ]
    if not dispatch.is_native(torch.empty(0, dtype=dtype)):
        name = str(dtype).removeprefix("torch.")
        return [f"{name} on a CPU is none of float32, bfloat16: choose one with dtype=..."]
    return []
