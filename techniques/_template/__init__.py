"""Shortest prompt first: among the waiting, the request with the shortest prompt starts first.

Smith, "Various optimizers for single-stage production", 1956. Losslessness: exact.
Evidence: ``overtakes``.
"""

from techniques._template.policy import ShortestPromptFirst, ShortestPromptFirstConfig

__all__ = ["ShortestPromptFirst", "ShortestPromptFirstConfig"]
