"""Typical acceptance: drafts are kept where the target finds them likely enough.

Medusa, Cai et al. 2024, arXiv:2401.10774. Losslessness: lossy. Evidence: ``drafted_tokens``,
``accepted_tokens``.
"""

from techniques.typical_acceptance.verifier import Typical, TypicalConfig

__all__ = ["Typical", "TypicalConfig"]
