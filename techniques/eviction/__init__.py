"""Orders in which a prefix cache gives up what it holds. Losslessness: exact.

They decide what is computed again, never what is computed.
"""

from techniques.eviction.policies import Fifo, Lfu, Lru, Priority

__all__ = ["Fifo", "Lfu", "Lru", "Priority"]
