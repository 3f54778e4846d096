"""Why an attention backend cannot serve a model here: each function returns what it finds wrong."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence

import torch

from workbench.slots.attention import AttentionLayer
from workbench.slots.kv_pool import KVPool

_QUANTIZED = (torch.int8, torch.float8_e4m3fn)


def library_reasons(module: str, package: str, extra: str) -> list[str]:
    """A library that is not installed, with what installs it."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above the module is missing
        found = False
    if found:
        return []
    return [
        f"{module} is not installed: pip install {package}, or this project with its extra"
        f" [{extra}]"
    ]


def cuda_reasons(pool: KVPool) -> list[str]:
    """A pool that is not in a GPU's memory."""
    device = pool.layer(0)[0].device
    return [] if device.type == "cuda" else [f"it needs a CUDA device, and the KV is on {device}"]


def capability_reasons(pool: KVPool, least: tuple[int, int]) -> list[str]:
    """A GPU of too low a compute capability; other devices are another reason's concern."""
    device = pool.layer(0)[0].device
    if device.type != "cuda":
        return []
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= least:
        return []
    return [f"compute capability {major}.{minor} is under {least[0]}.{least[1]}"]


def quantized_reasons(pool: KVPool) -> list[str]:
    """KV in 8 bits, which means nothing without its scales."""
    dtypes = {cache.dtype for cache in pool.layer(0)}
    return [
        f"the KV pool holds {dtype}, and this backend reads no scales"
        for dtype in dtypes & set(_QUANTIZED)
    ]


def dtype_reasons(pool: KVPool, served: Collection[torch.dtype]) -> list[str]:
    """A dtype of keys and values beyond those ``served``; 8-bit ones are reported elsewhere."""
    dtype = pool.layer(0)[0].dtype
    if dtype in served or dtype in _QUANTIZED:
        return []
    names = ", ".join(sorted(str(d).removeprefix("torch.") for d in served))
    return [f"it serves {names}, not {str(dtype).removeprefix('torch.')}"]


def head_dim_reasons(
    layers: Sequence[AttentionLayer], *, multiple: int = 1, most: int, among: Collection[int] = ()
) -> list[str]:
    """Head sizes that are too large, no multiple of ``multiple``, or not ``among`` the valid."""
    reasons = []
    for dim in sorted({layer.head_dim for layer in layers}):
        if among and dim not in among:
            valid = ", ".join(str(d) for d in sorted(among))
            reasons.append(f"head size {dim} is not one of {valid}")
        elif dim > most or dim % multiple:
            steps = f" and a multiple of {multiple}" if multiple > 1 else ""
            reasons.append(f"head size {dim} must be at most {most}{steps}")
    return reasons
