"""Continuous batching: requests join and leave the batch at every step.

Orca, Yu et al., OSDI 2022. Losslessness: exact. Evidence: ``joins_while_others_run``.
"""

from techniques.continuous_batching.scheduler import ContinuousScheduler

__all__ = ["ContinuousScheduler"]
