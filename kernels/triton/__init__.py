"""Triton implementations of the ops: CUDA, or any device through Triton's interpreter.

With ``TRITON_INTERPRET=1`` in the environment before the first import, the same kernels run in
Python on CPU tensors, slowly: for tests. A module here is imported on its first use, so that the
package works where Triton is not installed.
"""

from __future__ import annotations

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of queries
MAX_HEAD_DIM = 256
HAS_TRITON = importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in Python (``TRITON_INTERPRET=1``)."""
    if not HAS_TRITON:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def unsupported_reason(x: Tensor) -> str | None:
    """Why the Triton kernels cannot take ``x`` (its device); None when they can."""
    if not HAS_TRITON:
        return "Triton is not installed: pip install triton"
    if x.is_cuda or is_interpreted():
        return None
    return f"Triton needs a CUDA tensor, not one on {x.device} (or TRITON_INTERPRET=1, for tests)"


def compiled_together() -> AbstractContextManager[None]:
    """Where Triton is installed, :func:`kernels.triton.launch.compiled_together`."""
    if not HAS_TRITON:
        return nullcontext()
    from kernels.triton import launch

    return launch.compiled_together()


@functools.lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the card; 4 where kernels are interpreted."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache
def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may take 160 KiB of shared memory, as on data-centre cards from A100 on."""
    if device.type != "cuda":
        return True
    major, minor = torch.cuda.get_device_capability(device)
    return (major, minor) == (8, 0) or 9 <= major < 12


@functools.lru_cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it finishes (compute capability 9.0 on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
