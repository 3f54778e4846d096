"""A smaller model of the same vocabulary drafts, the target verifies.

Leviathan et al. 2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318. Losslessness: exact, or
that of the verifier. Evidence: ``drafted_tokens``, ``draft_passes``, ``accepted_tokens``.
"""

from techniques.draft_model.drafter import DraftModel, DraftModelConfig

__all__ = ["DraftModel", "DraftModelConfig"]
