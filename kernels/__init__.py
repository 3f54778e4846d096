"""Ops of a decoder, one a file: a plain torch reference, and a dispatcher that picks by device.

==========================================  ====================================================
``pack_linear``, ``apply_linear``           linear layer, its weight laid out for the machine
``rms_norm``, ``add_rms_norm_``             RMSNorm, alone or with the residual addition before it
``apply_rope_and_write_kv``                 (QK-norm,) rotary embedding, KV write on the fused QKV
``write_kv``                                KV write alone
``silu_and_mul``, ``gelu_tanh_and_mul``     gated activation on the fused gate-up projection
``paged_attend``                            causal attention over a paged cache, any query lengths
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
from kernels.norm import add_rms_norm_, rms_norm
from kernels.rotary import apply_rope_and_write_kv
from kernels.sampling import argmax

__all__ = [
    "PackedLinear",
    "add_rms_norm_",
    "apply_linear",
    "apply_rope_and_write_kv",
    "argmax",
    "embedding",
    "gelu_tanh_and_mul",
    "pack_linear",
    "paged_attend",
    "rms_norm",
    "silu_and_mul",
    "write_kv",
]
