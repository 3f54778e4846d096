"""Slot ``eviction``: what a prefix cache gives up first."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from workbench.slots.component import Component


class Eviction(Component):
    """Order in which cached entries are given up, apart from the cache that holds them."""

    @abstractmethod
    def priority(self, entry: Any) -> Any:
        """Sortable; the smallest is evicted first. Entries carry ``last_used``, ``num_hits`` and
        ``inserted``, all step numbers or counts."""


class NoEviction(Eviction):
    """No order, since the null prefix cache holds nothing to evict: the null object."""

    def priority(self, entry: Any) -> Any:
        return 0
