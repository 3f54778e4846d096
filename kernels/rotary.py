"""Rotary position embedding on the fused QKV projection, with the KV write and QK-norm folded in.

Paper: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021. The
half-split pairing (element i with i + rotary_dim / 2) is the one of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels import dispatch, triton
from kernels.kv_cache import write_kv_reference
from kernels.norm import rms_norm_reference
from kernels.quantized_kv import is_quantized


def apply_rope_and_write_kv(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Normalise (optionally) and rotate q and k inside ``qkv``, and write k and v into the cache.

    Parameters
    ----------
    qkv : Tensor [T, (num_heads + 2 * num_kv_heads) * head_dim]
        Fused projection: all q heads, all k heads, all v heads. q and k are overwritten. Rows may
        be strided.
    positions : Tensor [T] int64
        Position of each token in its own request.
    cos_sin : Tensor [max_position, rotary_dim]
        Cosines of the ``rotary_dim / 2`` angles, then their sines, fp32 (the rotation is computed
        in fp32). ``rotary_dim <= head_dim``: the elements of a head from ``rotary_dim`` on are left
        as they are.
    slot_mapping : Tensor [T] int64, or None
        Where each token's k and v go: ``block * block_size + offset``. A negative slot is not
        written (padding). None: nothing is written.
    k_cache, v_cache : Tensor [num_blocks, block_size, num_kv_heads, head_dim], or None
        In the dtype of ``qkv``, or int8 or fp8 (e4m3) with scales; any strides but a dense last
        dimension.
    q_norm, k_norm : Tensor [head_dim], or None
        Per-head RMSNorm weights applied before the rotation (Qwen3, Gemma3).
    norm_eps, norm_offset
        As ``eps`` and ``offset`` of :func:`kernels.norm.rms_norm`.
    k_scale, v_scale : Tensor [num_blocks, block_size, num_kv_heads] or [num_kv_heads], or None
        Of quantised caches (:mod:`kernels.quantized_kv`): scales of tokens are written beside the
        values, fixed ones are read.
    """
    if qkv.is_cuda and triton.HAS_TRITON:
        from kernels.triton import rotary as fused

        write: Callable[..., None] = partial(
            fused.apply_rope_and_write_kv, k_scale=k_scale, v_scale=v_scale
        )
    elif dispatch.is_native(qkv) and _is_plain(k_cache, k_scale, v_scale):
        from kernels.cpu import rotary as native

        write = native.apply_rope_and_write_kv
    else:
        write = partial(apply_rope_and_write_kv_reference, k_scale=k_scale, v_scale=v_scale)
    write(
        qkv,
        positions,
        cos_sin,
        slot_mapping,
        k_cache,
        v_cache,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
    )


def _is_plain(k_cache: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None) -> bool:
    """Whether what is written has no scales."""
    is_plain = k_cache is None or not is_quantized(k_cache)
    return is_plain and k_scale is None and v_scale is None


def apply_rope_and_write_kv_reference(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slot_mapping: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_offset: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Plain torch form of :func:`apply_rope_and_write_kv`."""
    heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, head_dim)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    for x, norm in ((q, q_norm), (k, k_norm)):
        if norm is not None:
            x.copy_(rms_norm_reference(x, norm, norm_eps, offset=norm_offset))
        x.copy_(rotate_reference(x, positions, cos_sin))
    if slot_mapping is not None:
        assert k_cache is not None and v_cache is not None
        write_kv_reference(k, v, slot_mapping, k_cache, v_cache, k_scale=k_scale, v_scale=v_scale)


def rotate_reference(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the heads ``x [T, heads, head_dim]`` by the angles of their ``positions [T]``."""
    wide = x.to(dispatch.accumulate_dtype(x))
    rotary_dim = cos_sin.shape[-1]
    cos, sin = cos_sin[positions].to(wide.dtype).unsqueeze(1).chunk(2, dim=-1)
    first, second = wide[..., :rotary_dim].chunk(2, dim=-1)
    parts = (first * cos - second * sin, second * cos + first * sin, wide[..., rotary_dim:])
    return torch.cat(parts, dim=-1).to(x.dtype)
