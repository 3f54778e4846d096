"""Orders of eviction, each a few lines over what an entry remembers."""

from __future__ import annotations

from workbench.slots.eviction import CacheEntry, Eviction


class Lru(Eviction):
    """What nobody has read for the longest time goes first."""

    is_release_order = True

    def priority(self, entry: CacheEntry) -> int:
        return entry.last_used


class Lfu(Eviction):
    """What was found least often goes first; of equals, what nobody has read for longest."""

    def priority(self, entry: CacheEntry) -> tuple[int, int]:
        return entry.num_hits, entry.last_used


class Fifo(Eviction):
    """What was published first goes first, used or not."""

    def priority(self, entry: CacheEntry) -> int:
        return entry.inserted


class Priority(Eviction):
    """What only requests of low priority used goes first; of equals, the least recently used."""

    uses_priority = True

    def priority(self, entry: CacheEntry) -> tuple[int, int]:
        return entry.priority, entry.last_used
