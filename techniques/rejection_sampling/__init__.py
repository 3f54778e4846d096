"""Speculative sampling: drafts are accepted so that the target's distribution is kept.

Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318.
Losslessness: distributional. Evidence: ``drafted_tokens``, ``accepted_tokens``.
"""

from techniques.rejection_sampling.verifier import Rejection

__all__ = ["Rejection"]
