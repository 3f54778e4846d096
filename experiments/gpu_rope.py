"""RoPE and KV write as cases of ``experiments.gpu_prefill``: checked, then timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.gpu_attention import DEVICE, L2_BYTES, Work, relative_error
from kernels.quantized_kv import allocate_kv_scales, dequantize_kv
from kernels.rotary import apply_rope_and_write_kv, apply_rope_and_write_kv_reference


@dataclass(slots=True)
class RopeInputs:
    """A fused projection and the caches that it is written to."""

    qkv: Tensor
    positions: Tensor
    cos_sin: Tensor
    slots: Tensor
    caches: list[Tensor]
    options: dict[str, Any]

    def run(self, op: Callable[..., None]) -> None:
        caches = (self.slots, *self.caches)
        op(self.qkv, self.positions, self.cos_sin, *caches, **self.options)


def rope_inputs(
    num_tokens: int, dtype: torch.dtype, cache_dtype: torch.dtype | None, has_norm: bool
) -> RopeInputs:
    heads, kv_heads, dim, block_size = 32, 8, 128, 16
    num_blocks = num_tokens // block_size + 2
    shape = (num_blocks, block_size, kv_heads, dim)
    caches = [torch.zeros(shape, device=DEVICE).to(cache_dtype or dtype) for _ in range(2)]
    scales = [None, None]
    if cache_dtype is not None:
        scales = [allocate_kv_scales(*shape[:3], device=DEVICE) for _ in range(2)]
    norms = [torch.randn(dim, device=DEVICE).to(dtype) if has_norm else None for _ in range(2)]
    angles = torch.rand(8192, dim // 2, device=DEVICE) * 6.28
    return RopeInputs(
        torch.randn(num_tokens, (heads + 2 * kv_heads) * dim, device=DEVICE).to(dtype),
        torch.arange(num_tokens, device=DEVICE) % 8192,
        torch.cat([angles.cos(), angles.sin()], dim=1),
        torch.randperm(num_blocks * block_size, device=DEVICE)[:num_tokens],
        caches,
        {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": dim,
            "q_norm": norms[0],
            "k_norm": norms[1],
            "k_scale": scales[0],
            "v_scale": scales[1],
        },
    )


def rope_work(
    num_tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    has_norm: bool = False,
) -> Work:
    """Rotation and KV write; bytes are those read and written, each once."""
    row_bytes = 48 * 128 * dtype.itemsize
    copies = max(2, min(8, -(-4 * L2_BYTES // (num_tokens * row_bytes))))
    inputs = [rope_inputs(num_tokens, dtype, cache_dtype, has_norm) for _ in range(copies)]

    def error() -> float:
        first = inputs[0]
        scales = [first.options[k] for k in ("k_scale", "v_scale")]
        same = RopeInputs(
            first.qkv.clone(),
            first.positions,
            first.cos_sin,
            first.slots,
            [c.clone() for c in first.caches],
            {**first.options, **{k: _clone(first.options[k]) for k in ("k_scale", "v_scale")}},
        )
        same.run(apply_rope_and_write_kv_reference)
        first.run(apply_rope_and_write_kv)
        pairs = [(first.qkv, same.qkv)]
        expected = [same.options[k] for k in ("k_scale", "v_scale")]
        for cache, scale, truth, true_scale in zip(
            first.caches, scales, same.caches, expected, strict=True
        ):
            if scale is None:
                pairs.append((cache, truth))
            else:
                pairs.append((dequantize_kv(cache, scale), dequantize_kv(truth, true_scale)))
        return max(relative_error(a, b) for a, b in pairs)

    written = 16 * 128 * (cache_dtype or dtype).itemsize
    num_bytes = num_tokens * (row_bytes + 40 * 128 * dtype.itemsize + written)
    return Work(
        calls=[partial(i.run, apply_rope_and_write_kv) for i in inputs],
        error=error,
        # One rounding in a hundred falls the other way; 8 bits are coarser.
        bound=1e-3 if cache_dtype is None else 5e-3,
        num_bytes=num_bytes,
        facts={
            "tokens": num_tokens,
            "heads": 32,
            "kv_heads": 8,
            "head_dim": 128,
            "dtype": str(dtype).removeprefix("torch."),
            "kv_dtype": str(cache_dtype or dtype).removeprefix("torch."),
            "has_norm": has_norm,
        },
    )


def _clone(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


ROPE_CASES: dict[str, Callable[[], Work]] = {
    "rope 8192 tokens": partial(rope_work, 8192),
    "rope 8192 tokens, norms": partial(rope_work, 8192, has_norm=True),
    "rope 8192 tokens, fp8": partial(rope_work, 8192, cache_dtype=torch.float8_e4m3fn),
    "rope 8192 tokens, int8": partial(rope_work, 8192, cache_dtype=torch.int8),
    "rope 8192 tokens, fp16": partial(rope_work, 8192, dtype=torch.float16),
    "rope 512 tokens": partial(rope_work, 512),
    "rope 64 tokens": partial(rope_work, 64),
    "rope 1 token": partial(rope_work, 1),
}
