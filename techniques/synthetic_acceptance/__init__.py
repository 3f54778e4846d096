"""Drafts that are accepted as often as told, to measure speed with random weights.

Losslessness: lossy; the tokens mean nothing. Evidence: ``drafted_tokens``, ``accepted_tokens``.
"""

from techniques.synthetic_acceptance.drafter import SyntheticDrafter, SyntheticDrafterConfig
from techniques.synthetic_acceptance.verifier import SyntheticVerifier, SyntheticVerifierConfig

__all__ = [
    "SyntheticDrafter",
    "SyntheticDrafterConfig",
    "SyntheticVerifier",
    "SyntheticVerifierConfig",
]
