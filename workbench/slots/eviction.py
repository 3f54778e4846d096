"""Slot ``eviction``: what a prefix cache gives up first."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from workbench.slots.component import Component


@dataclass(slots=True, eq=False)
class CacheEntry:
    """What an order of eviction may look at: one block, or one run of blocks, of a prefix cache.

    Times are those of a logical clock that counts what happens to the cache, never seconds.

    Attributes
    ----------
    last_used
        When its last lock was given up.
    num_hits
        Requests that found and used it.
    inserted
        When it was published.
    priority
        The highest ``Request.priority`` among the requests that published or used it.
    """

    last_used: int = 0
    num_hits: int = 0
    inserted: int = 0
    priority: int = 0


class Eviction(Component):
    """Order in which cached entries are given up, apart from the cache that holds them.

    An entry is asked about only while no lock keeps it and nothing hangs under it, so a prefix
    outlives whatever continues it under every order.
    """

    #: False where there is no order at all, so that a cache which evicts cannot be built.
    orders: bool = True
    #: True where the smallest priority is always the entry whose last lock was given up first. A
    #: cache may then keep a queue, O(1) an entry, and never ask.
    is_release_order: bool = False

    @abstractmethod
    def priority(self, entry: CacheEntry) -> Any:
        """Sortable; the smallest is evicted first, and of equals the one that was free first.

        Must not change while the entry stays unlocked.
        """


class NoEviction(Eviction):
    """No order, since the null prefix cache holds nothing to evict: the null object."""

    orders = False

    def priority(self, entry: CacheEntry) -> Any:
        return 0
