"""Optimistic admission: a request starts with room for what is known of it; pre-emption pays.

PagedAttention, Kwon et al., SOSP 2023, arXiv:2309.06180, section 4.5. Losslessness: exact.
Evidence: ``overcommitted_starts``.
"""

from techniques.optimistic_admission.admission import Optimistic, OptimisticConfig

__all__ = ["Optimistic", "OptimisticConfig"]
