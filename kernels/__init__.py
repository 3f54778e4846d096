"""Ops of a decoder, one a file: a plain torch reference, and a dispatcher that picks by device.

==========================================  ====================================================
``pack_linear``, ``apply_linear``           linear layer, its weight laid out for the machine
``rms_norm``, ``add_rms_norm_``             RMSNorm, alone or with the residual addition before it
``apply_rope_and_write_kv``                 (QK-norm,) rotary embedding, KV write on the fused QKV
``write_kv``                                KV write alone
``silu_and_mul``, ``gelu_tanh_and_mul``     gated activation on the fused gate-up projection
``paged_attend``                            causal attention over a paged cache, any query lengths
``shared_prefix_attend``, ``merge_states``  attention to keys that requests share; joining parts
``cascade_attend``                          both in one: shared keys read once, own ones after
``quantize_kv``, ``dequantize_kv``          keys and values in 8 bits, with their scales
``embedding``                               token embedding rows
``argmax``                                  greedy token
==========================================  ====================================================

Every op has a reference of the same meaning, named ``<op>_reference``, in its module. The folder
shares its name with a Hugging Face package: it must not define ``__version__``, by which
Transformers would take it for that package.
"""

from __future__ import annotations

from kernels.activation import gelu_tanh_and_mul, silu_and_mul
from kernels.attention import paged_attend
from kernels.embedding import embedding
from kernels.kv_cache import write_kv
from kernels.linear import PackedLinear, apply_linear, pack_linear
from kernels.norm import RowNorm, add_rms_norm_, rms_norm
from kernels.quantized_kv import allocate_kv_scales, dequantize_kv, quantize_kv
from kernels.rotary import apply_rope_and_write_kv
from kernels.sampling import argmax
from kernels.shared_prefix import cascade_attend, merge_states, shared_prefix_attend

__all__ = [
    "PackedLinear",
    "RowNorm",
    "add_rms_norm_",
    "allocate_kv_scales",
    "apply_linear",
    "apply_rope_and_write_kv",
    "argmax",
    "cascade_attend",
    "dequantize_kv",
    "embedding",
    "gelu_tanh_and_mul",
    "merge_states",
    "pack_linear",
    "paged_attend",
    "quantize_kv",
    "rms_norm",
    "shared_prefix_attend",
    "silu_and_mul",
    "write_kv",
]
