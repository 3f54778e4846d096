"""Writing keys and values into a paged cache."""

from __future__ import annotations

from torch import Tensor

from kernels import dispatch, triton
from kernels.quantized_kv import check_kv_scale, is_quantized, write_quantized_kv_reference


def write_kv(
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Copy each token's k and v to its slot.

    Models with rotary embeddings use :func:`kernels.rotary.apply_rope_and_write_kv`, which does
    this on the way.

    Parameters
    ----------
    k, v : Tensor [T, num_kv_heads, head_dim]
        Leading dimensions of any strides.
    slot_mapping : Tensor [T] int64
        ``block * block_size + offset`` of each token; a negative slot is not written (padding).
    k_cache, v_cache : Tensor [num_blocks, block_size, num_kv_heads, head_dim]
        Same dtype as ``k``, or int8 or fp8 (e4m3) with scales.
    k_scale, v_scale : Tensor [num_blocks, block_size, num_kv_heads] or [num_kv_heads], or None
        Of quantised caches (:mod:`kernels.quantized_kv`): scales of tokens are written beside the
        values, fixed ones are read.
    """
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    if k.is_cuda and triton.HAS_TRITON:
        from kernels.triton import rotary as fused

        return fused.write_kv(k, v, slot_mapping, k_cache, v_cache, **scales)
    if dispatch.is_native(k) and not is_quantized(k_cache):
        from kernels.cpu import rotary

        return rotary.write_kv(k, v, slot_mapping, k_cache, v_cache)
    return write_kv_reference(k, v, slot_mapping, k_cache, v_cache, **scales)


def write_kv_reference(
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Plain torch form of :func:`write_kv`."""
    if k_scale is not None and v_scale is not None:
        return write_quantized_kv_reference(k, v, slot_mapping, k_cache, v_cache, k_scale, v_scale)
    check_kv_scale(k_cache, k_scale, "k_scale")
    check_kv_scale(v_cache, v_scale, "v_scale")
    block_size = k_cache.shape[1]
    if slot_mapping.device.type == "cpu" and bool((slot_mapping < 0).any()):
        kept = slot_mapping >= 0
        slot_mapping, k, v = slot_mapping[kept], k[kept], v[kept]
    # On a GPU a mask would cost a synchronisation: there the caller maps padding to a trash block.
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    k_cache[blocks, offsets] = k
    v_cache[blocks, offsets] = v
