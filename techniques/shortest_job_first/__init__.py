"""Shortest job first: among the waiting, the one with the least left to compute starts first.

Smith 1956, doi:10.1002/nav.3800030106. Losslessness: exact. Evidence: ``overtakes``.
"""

from techniques.scheduling_policies import ShortestJobFirst

__all__ = ["ShortestJobFirst"]
