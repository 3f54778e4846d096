"""Keys and values in 8 bits: the layout of their scales, and the reference of reading and writing.

A quantised cache keeps ``[num_blocks, block_size, Hkv, D]`` like any other, in int8 or fp8 (e4m3),
and a scale tensor beside it; the value of an element is ``stored * scale``. The number of
dimensions of the scale tensor says what a scale belongs to:

==========================================  ======================================================
``[num_blocks, block_size, Hkv]`` fp32      a scale for each token and head, set when it is written
``[Hkv]`` fp32                              a fixed scale for each head, found beforehand
==========================================  ======================================================

Scales of tokens may have any strides. :func:`allocate_kv_scales` lays a block's tokens of one head
side by side, because attention reads them head by head.

Papers: Xiao et al., "SmoothQuant", 2023 (int8, symmetric, greatest absolute value); Micikevicius et
al., "FP8 Formats for Deep Learning", 2022 (e4m3); Liu et al., "KIVI", 2024 (values are safe to
quantise per token, keys have outlier channels).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch

# Greatest value of each format; int8 leaves -128 out, so that it is symmetric.
GREATEST_VALUE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# A row of zeros is divided by this over the greatest value, not by zero.
LEAST_AMAX = 1e-30


def is_quantized(cache: Tensor) -> bool:
    """Whether ``cache`` holds 8-bit values, which mean nothing without their scales."""
    return cache.dtype in GREATEST_VALUE


def allocate_kv_scales(
    num_blocks: int, block_size: int, num_kv_heads: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Scales of tokens, all 0: ``[num_blocks, block_size, num_kv_heads]`` fp32, a head's adjacent.

    In memory it is ``[num_blocks, num_kv_heads, block_size]``.
    """
    shape = (num_blocks, num_kv_heads, block_size)
    return torch.zeros(shape, dtype=torch.float32, device=device).transpose(1, 2)


def quantize_kv(
    x: Tensor, dtype: torch.dtype, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round ``x`` to 8 bits, with a scale of its own for each token and head or with given ones.

    ``stored = round(x / scale)``: to the nearest integer, ties to even, or to the nearest e4m3
    value; beyond the format's range it saturates. A new scale is
    ``max(amax(|x|), 1e-30) / greatest``, with ``greatest`` 127 or 448, so that nothing saturates:
    the error is at most ``scale / 2`` in int8, and ``max(|x| / 16, scale / 1024)`` in fp8.

    Parameters
    ----------
    x : Tensor [..., Hkv, D]
        Keys or values.
    dtype : torch.int8 or torch.float8_e4m3fn
    scale : Tensor [Hkv] fp32, or None
        Fixed scale of each head. None: each token and head gets its own.

    Returns
    -------
    stored : Tensor [..., Hkv, D]
        In ``dtype``.
    scale : Tensor [..., Hkv] or [Hkv] fp32
        The new scales, or ``scale`` as given.
    """
    greatest = _greatest(dtype)
    wide = x.to(dispatch.accumulate_dtype(x))
    if scale is None:
        amax = wide.abs().amax(dim=-1).clamp_min(LEAST_AMAX).float()
        # By a tensor: a CUDA device divides by a number by multiplying with its rounded inverse.
        scale = amax / torch.full_like(amax, greatest)
    scaled = (wide / scale.unsqueeze(-1)).clamp(-greatest, greatest)
    return (scaled.round() if dtype == torch.int8 else scaled.float()).to(dtype), scale


def dequantize_kv(stored: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``stored [..., Hkv, D]`` times ``scale [..., Hkv]`` or ``[Hkv]``, in ``dtype``."""
    return stored.to(dtype) * scale.to(dtype).unsqueeze(-1)


def find_head_scales(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Fixed scales ``[Hkv]`` fp32 from a sample ``x [..., Hkv, D]`` of the keys or values to come.

    The greatest value of the sample lands on the greatest one of the format; what is greater later
    saturates.
    """
    amax = x.abs().transpose(-1, -2).flatten(0, -2).amax(dim=0)
    amax = amax.float().clamp_min(LEAST_AMAX)
    return amax / torch.full_like(amax, _greatest(dtype))


def write_quantized_kv_reference(
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Quantise each token's k and v into its slot; the 8-bit form of :func:`kernels.write_kv`.

    Parameters
    ----------
    k, v : Tensor [T, Hkv, D]
    slot_mapping : Tensor [T] int64
        ``block * block_size + offset`` of each token; a negative slot is not written (padding).
    k_cache, v_cache : Tensor [num_blocks, block_size, Hkv, D]
        int8 or fp8 (e4m3).
    k_scale, v_scale : Tensor [num_blocks, block_size, Hkv] or [Hkv] fp32
        Scales of tokens are written beside the values; fixed ones are read.
    """
    kept = slot_mapping >= 0
    blocks, offsets = slot_mapping[kept] // k_cache.shape[1], slot_mapping[kept] % k_cache.shape[1]
    for x, cache, scale, name in ((k, k_cache, k_scale, "k"), (v, v_cache, v_scale, "v")):
        check_kv_scale(cache, scale, f"{name}_scale")
        stored, new = quantize_kv(x[kept], cache.dtype, scale if scale.dim() == 1 else None)
        cache[blocks, offsets] = stored
        if scale.dim() == 3:
            scale[blocks, offsets] = new


def check_kv_scale(cache: Tensor, scale: Tensor | None, name: str) -> None:
    """Raise ValueError unless ``scale`` is what ``cache`` needs (None where it holds plain values).

    Parameters
    ----------
    cache : Tensor [num_blocks, block_size, Hkv, D]
    scale : Tensor or None
    name : str
        What the caller calls the scale.
    """
    if not is_quantized(cache):
        if scale is not None:
            raise ValueError(
                f"{name} was given, but the cache holds {cache.dtype}: scales belong to an int8 or"
                " float8_e4m3fn cache; leave them out"
            )
        return
    if scale is None:
        raise ValueError(f"a cache of {cache.dtype} needs {name}, the scales of its values")
    num_blocks, block_size, num_kv_heads, _ = cache.shape
    shapes = ((num_blocks, block_size, num_kv_heads), (num_kv_heads,))
    if tuple(scale.shape) not in shapes or scale.dtype != torch.float32:
        raise ValueError(
            f"{name} must be float32 of shape {shapes[0]} (a scale for each token and head) or"
            f" {shapes[1]} (for each head), not {scale.dtype} of {tuple(scale.shape)}"
        )


def _greatest(dtype: torch.dtype) -> float:
    if dtype not in GREATEST_VALUE:
        raise ValueError(f"keys and values are quantised to int8 or float8_e4m3fn, not {dtype}")
    return GREATEST_VALUE[dtype]
