"""Lookahead decoding: the target guesses ahead in parallel, and what it repeats is drafted.

Fu et al. 2024, arXiv:2402.02057. Losslessness: exact. Evidence: ``drafted_tokens``,
``collected_ngrams``, ``accepted_tokens``.
"""

from techniques.lookahead_decoding.drafter import Lookahead, LookaheadConfig

__all__ = ["Lookahead", "LookaheadConfig"]
