"""Longest prefix match: the waiting request of which the prefix cache holds most starts first.

SGLang, Zheng et al. 2024, arXiv:2312.07104, section 3. Losslessness: exact.
Evidence: ``overtakes``.
"""

from techniques.scheduling_policies import LongestPrefixMatch, LongestPrefixMatchConfig

__all__ = ["LongestPrefixMatch", "LongestPrefixMatchConfig"]
