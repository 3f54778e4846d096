"""Speculative decoding with drafts by frequency from suffix automata.

SuffixDecoding, Oliaro et al. 2024, arXiv:2411.04975. Losslessness: exact, by its verifier.
Evidence: ``drafted_tokens``, ``accepted_tokens``.
"""

from techniques.suffix_decoding.automaton import SuffixAutomaton
from techniques.suffix_decoding.drafter import Suffix, SuffixConfig

__all__ = ["Suffix", "SuffixAutomaton", "SuffixConfig"]
