"""Speculative decoding with Medusa heads.

Medusa, Cai et al. 2024, arXiv:2401.10774. Losslessness: exact, by its verifier.
Evidence: ``drafted_tokens``, ``accepted_tokens``.
"""

from techniques.medusa.drafter import Medusa, MedusaConfig

__all__ = ["Medusa", "MedusaConfig"]
