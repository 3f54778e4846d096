"""Speculative decoding with drafts looked up in the prompt, verified exactly.

Leviathan et al. 2022, arXiv:2211.17192 (verification); prompt lookup decoding, Saxena 2023.
Losslessness: exact. Evidence: ``drafted_tokens``, ``accepted_tokens``.
"""

from techniques.spec_decode.exact_match import ExactMatch
from techniques.spec_decode.ngram import Ngram, NgramConfig

__all__ = ["ExactMatch", "Ngram", "NgramConfig"]
