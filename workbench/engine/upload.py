"""Small host arrays to the device, without waiting for it, and views that hold no memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def upload(
    values: np.ndarray | Sequence[int] | Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype = torch.int64,
) -> torch.Tensor:
    """Copy a few integers to the device in the order of the current stream.

    On a CUDA device they go through pinned memory, which torch keeps until the copy has run: a copy
    from ordinary memory may wait for all that is queued before it.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    pinned = torch.empty(host.shape, dtype=dtype, pin_memory=True)
    pinned.copy_(host)
    return pinned.to(device, non_blocking=True)


def upload_into(target: torch.Tensor, values: np.ndarray | Sequence[int]) -> None:
    """Overwrite a tensor on the device as :func:`upload` would make it."""
    host = torch.as_tensor(values, dtype=target.dtype)
    if target.is_cuda:
        pinned = torch.empty(host.shape, dtype=target.dtype, pin_memory=True)
        pinned.copy_(host)
        host = pinned
    target.copy_(host, non_blocking=True)


class _Memory:
    """Device memory as 16-bit integers, for whoever reads the CUDA array interface."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes // 2,),
            "typestr": "<i2",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def borrowed(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without keeping it from being used again; for memory of a CUDA graph, which
    is written anew at every replay. On other devices the tensor itself."""
    if not tensor.is_cuda:
        return tensor
    assert tensor.is_contiguous()
    memory = torch.as_tensor(_Memory(tensor), device=tensor.device)
    return memory.view(tensor.dtype).view(tensor.shape)
