"""Paged KV: a request holds fixed-size blocks, taken one by one as it grows.

Kwon et al., SOSP 2023, arXiv:2309.06180. Losslessness: exact. Evidence: ``blocks_allocated``.
"""

from techniques.paged_attention.manager import Paged, PagedConfig

__all__ = ["Paged", "PagedConfig"]
