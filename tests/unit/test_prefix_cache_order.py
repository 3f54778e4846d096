"""Orders of eviction: the queue against the heap, and both stay small."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from techniques.prefix_cache.order import EvictionOrder, LeafHeap, ReleaseQueue, order_of
from tests.helpers.engines import component
from tests.helpers.prefix_model import CACHES, make_cache, make_request
from workbench.configuration import options_of
from workbench.slots.eviction import Eviction


class Chains:
    """Chains of units, locked and released as a cache does it."""

    def __init__(self, make: Callable[[Callable[[Any], int]], EvictionOrder[Any]]) -> None:
        self.locks: dict[int, int] = {}
        self.chains: dict[int, list[int]] = {}
        self.order = make(lambda unit: self.locks.get(unit, 1))

    def add(self, name: int, units: list[int]) -> None:
        self.chains[name] = units
        self.locks.update(dict.fromkeys(units, 1))
        self.order.add(units, None, 0)
        self.set_locked(name, False)

    def set_locked(self, name: int, locked: bool) -> None:
        units = self.chains[name]
        if not units or (self.locks[units[0]] > 0) == locked:
            return
        self.locks.update(dict.fromkeys(units, 1 if locked else self.order.mark))
        (self.order.lock if locked else self.order.release)(units)

    def pop(self) -> int | None:
        unit: int | None = self.order.first()
        if unit is None:
            return None
        assert self.order.pop() == unit
        del self.locks[unit]
        (chain,) = (chain for chain in self.chains.values() if unit in chain)
        assert chain.pop() == unit, "a unit went before one that hangs under it"
        return unit

    def check(self) -> None:
        unlocked = {unit for unit, count in self.locks.items() if count <= 0}
        self.order.check(unlocked, set(self.locks))


@pytest.mark.parametrize("seed", range(10))
def test_the_queue_is_what_the_heap_computes(seed: int) -> None:
    """Two mechanisms of one order: LRU by the order of release, and by the time of last use."""
    rng = random.Random(seed)
    lru: Eviction = component("eviction", "lru")
    both = [Chains(ReleaseQueue), Chains(lambda _: LeafHeap(lru.priority))]
    num_units = num_popped = 0
    for name in range(400):
        length = rng.randint(1, 4)
        units = list(range(num_units, num_units + length))
        num_units += length
        for chains in both:
            chains.add(name, list(units))
        for _ in range(rng.randint(0, 4)):
            other, locked = rng.randint(0, name), rng.random() < 0.5
            for chains in both:
                chains.set_locked(other, locked)
        for _ in range(rng.randint(0, 4)):
            first, second = (chains.pop() for chains in both)
            assert first == second
            num_popped += first is not None
        for chains in both:
            chains.check()
    assert num_popped > 100


@pytest.mark.parametrize("eviction", [n for n in options_of("engine/eviction") if n != "none"])
def test_memory_is_bound_by_what_is_cached(eviction: str) -> None:
    """A pool that never runs dry uses one prompt again and again, and nothing piles up."""
    order = component("eviction", eviction)
    chains = Chains(lambda locks_of: order_of(order, locks_of))
    for name in range(8):
        chains.add(name, list(range(10 * name, 10 * name + 10)))
    for turn in range(2_000):
        chains.set_locked(turn % 8, True)
        chains.set_locked(turn % 8, False)
    kept = chains.order
    size = len(kept._heap) if isinstance(kept, LeafHeap) else kept._num_queued
    assert size <= 64 + 2 * 80
    chains.check()


def test_lru_takes_the_queue_and_others_the_heap() -> None:
    kinds = {
        name: type(order_of(component("eviction", name), int))
        for name in options_of("engine/eviction")
        if name != "none"
    }
    assert kinds.pop("lru") is ReleaseQueue
    assert set(kinds.values()) == {LeafHeap}


@pytest.mark.parametrize("order", [ReleaseQueue(int), LeafHeap(lambda entry: 0)])
def test_nothing_to_give_up(order: Any) -> None:
    assert order.first() is None
    assert order.take(0) == []
    with pytest.raises(AssertionError, match="all is locked"):
        order.take(1)


@pytest.mark.parametrize("option", CACHES)
def test_a_hit_by_a_request_of_high_priority_lifts_what_it_read(option: str) -> None:
    """... and nothing that only hangs beside it."""
    cache = make_cache(option, 4, "priority")

    def ask(ids: list[int], blocks: list[int], priority: int) -> None:
        request = make_request("r", ids, priority=priority)
        cache.prepare(request)
        match = cache.match(request)
        cache.lock(match)
        cache.unlock(cache.insert(request, blocks, len(ids), match).match)
        cache.check_integrity()

    first, second = list(range(8)), list(range(100, 108))
    ask(first, [0, 1], 1)
    ask(second, [2, 3], 2)
    ask([*first[:4], 0], [0], 5)  # reads the first block of the first prompt
    assert cache.evict(4) == [1, 3, 2, 0]
