"""Orders of the waiting queue, and who is pre-empted. Losslessness: exact.

They decide when a request runs, never what it computes.
"""

from techniques.scheduling_policies.policies import (
    DecodeFirst,
    DecodeFirstConfig,
    LongestPrefixMatch,
    LongestPrefixMatchConfig,
    Priority,
    PriorityConfig,
    ShortestJobFirst,
)

__all__ = [
    "DecodeFirst",
    "DecodeFirstConfig",
    "LongestPrefixMatch",
    "LongestPrefixMatchConfig",
    "Priority",
    "PriorityConfig",
    "ShortestJobFirst",
]
