"""Chunked prefill: long prompts run in pieces, beside the decoding of others.

Sarathi-Serve, Agrawal et al., OSDI 2024, arXiv:2403.02310. Losslessness: exact.
Evidence: ``partial_prompts``.
"""

from techniques.chunked_prefill.chunks import Chunked, ChunkedConfig

__all__ = ["Chunked", "ChunkedConfig"]
