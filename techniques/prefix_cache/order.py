"""Which unlocked unit of a cache is given up next."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from workbench.slots.eviction import CacheEntry, Eviction

Unit = TypeVar("Unit")


class EvictionOrder(ABC, Generic[Unit]):
    """Keeps the units that no lock keeps, and says which goes next, children before parents.

    A unit is what a cache locks and evicts as one: a block, or a node of a tree. Units are
    compared as dictionary keys. The cache reports every change of a unit here, once.
    """

    #: What the cache must note as the lock count of the units that it releases next: 0 or less.
    mark: int = 0

    def add(self, units: Sequence[Unit], parent: Unit | None, priority: int) -> None:
        """New units, locked; the first hangs under ``parent``, each other under the one before."""

    def use(self, units: Iterable[Unit], priority: int, num_hits: int) -> None:
        """A request of this priority used these units; ``num_hits`` is added to their hits."""

    def split(self, upper: Unit, lower: Unit) -> None:
        """``upper``, locked, took over the first part of ``lower``, and stands between it and its
        parent."""

    @abstractmethod
    def replace(self, old: Unit, new: Unit) -> None:
        """``new`` stands for the locked unit ``old`` from now on."""

    def lock(self, units: Sequence[Unit]) -> None:
        """These units got their first lock."""

    @abstractmethod
    def release(self, units: Sequence[Unit]) -> None:
        """These units lost their last lock; parents stand before their children."""

    @abstractmethod
    def first(self) -> Unit | None:
        """The unit that goes next, None where all are locked. Nothing hangs under it."""

    @abstractmethod
    def pop(self) -> Unit:
        """Forget the unit that :meth:`first` shows, and return it."""

    def take(self, num_units: int) -> list[Unit]:
        """Several times :meth:`pop`."""
        return [self.pop() for _ in range(num_units)]

    @abstractmethod
    def check(self, unlocked: set[Unit], units: set[Unit]) -> None:
        """Raise AssertionError unless exactly ``unlocked`` of ``units`` may be given up."""


class ReleaseQueue(EvictionOrder[Unit]):
    """The unit whose last lock was given up first goes first. Amortised O(1) a change of a unit.

    No child goes behind its parent here: one lock keeps a unit and all that lead to it, a lock that
    is given up releases them together, and a new child hangs under a locked parent only.

    A release queues its units as one run, under a mark of its own. Units that were locked since
    are still in it, and passed over because their mark is gone; the queue is built anew when they
    are the most of it.

    Parameters
    ----------
    locks_of
        Lock count of a unit; where it has none, the mark under which it was released.
    """

    def __init__(self, locks_of: Callable[[Unit], int]) -> None:
        self.mark = -1
        self._locks_of = locks_of
        self._runs: deque[tuple[int, list[Unit]]] = deque()
        self._num_queued = self._num_unlocked = 0

    def replace(self, old: Unit, new: Unit) -> None:
        """A locked unit is not in the queue."""

    def lock(self, units: Sequence[Unit]) -> None:
        self._num_unlocked -= len(units)

    def release(self, units: Sequence[Unit]) -> None:
        self._runs.append((self.mark, list(units)))
        self.mark -= 1
        self._num_unlocked += len(units)
        self._num_queued += len(units)
        if self._num_queued > 64 + 2 * self._num_unlocked:
            self._rebuild()

    def _rebuild(self) -> None:
        locks_of = self._locks_of
        runs = [(mark, [u for u in run if locks_of(u) == mark]) for mark, run in self._runs]
        self._runs = deque(run for run in runs if run[1])
        self._num_queued = self._num_unlocked

    def first(self) -> Unit | None:
        runs, locks_of = self._runs, self._locks_of
        while runs:
            mark, units = runs[0]
            while units:
                if locks_of(units[-1]) == mark:
                    return units[-1]
                units.pop()
                self._num_queued -= 1
            runs.popleft()
        return None

    def pop(self) -> Unit:
        unit = self.first()
        assert unit is not None, "pop where all is locked"
        self._runs[0][1].pop()
        self._num_queued -= 1
        self._num_unlocked -= 1
        return unit

    def take(self, num_units: int) -> list[Unit]:
        taken: list[Unit] = []
        runs, locks_of = self._runs, self._locks_of
        while len(taken) < num_units:
            assert runs, "take where all is locked"
            mark, units = runs[0]
            before = len(units)
            while units and len(taken) < num_units:
                unit = units.pop()
                if locks_of(unit) == mark:
                    taken.append(unit)
            self._num_queued -= before - len(units)
            if not units:
                runs.popleft()
        self._num_unlocked -= num_units
        return taken

    def check(self, unlocked: set[Unit], units: set[Unit]) -> None:
        queued = [unit for mark, run in self._runs for unit in run if self._locks_of(unit) == mark]
        assert len(queued) == len(set(queued)) == self._num_unlocked, "a unit is queued twice"
        assert set(queued) == unlocked, "the queue is not what is unlocked"
        assert self._num_queued == sum(len(run) for _, run in self._runs)


@dataclass(slots=True, eq=False)
class _Record(CacheEntry, Generic[Unit]):
    """What is remembered of a unit, and where it hangs.

    Attributes
    ----------
    ticket
        Number of its only valid item in the heap; 0 where it has none.
    """

    unit: Unit = None  # type: ignore[assignment]
    parent: _Record[Unit] | None = None
    num_children: int = 0
    is_unlocked: bool = False
    ticket: int = 0


class LeafHeap(EvictionOrder[Unit]):
    """Any order of eviction: a heap of the unlocked units under which nothing hangs.

    Items of units that were locked since, or got a child, stay in the heap and are passed over;
    the heap is built anew when they are the most of it.
    """

    def __init__(self, priority: Callable[[CacheEntry], Any]) -> None:
        self._priority = priority
        self._records: dict[Unit, _Record[Unit]] = {}
        self._heap: list[tuple[Any, int, _Record[Unit]]] = []
        self._clock = 0
        self._tickets = 0

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def add(self, units: Sequence[Unit], parent: Unit | None, priority: int) -> None:
        now = self._tick()
        above = None if parent is None else self._records[parent]
        for unit in units:
            if above is not None:
                above.num_children += 1
            above = self._records[unit] = _Record(now, 0, now, priority, unit, above)

    def use(self, units: Iterable[Unit], priority: int, num_hits: int) -> None:
        for unit in units:
            record = self._records[unit]
            record.num_hits += num_hits
            record.priority = max(record.priority, priority)

    def split(self, upper: Unit, lower: Unit) -> None:
        below = self._records[lower]
        self._records[upper] = _Record(
            below.last_used,
            below.num_hits,
            below.inserted,
            below.priority,
            upper,
            below.parent,
            num_children=1,
        )
        below.parent = self._records[upper]

    def replace(self, old: Unit, new: Unit) -> None:
        record = self._records[new] = self._records.pop(old)
        record.unit = new

    def lock(self, units: Sequence[Unit]) -> None:
        for unit in units:
            record = self._records[unit]
            record.is_unlocked = False
            record.ticket = 0

    def release(self, units: Sequence[Unit]) -> None:
        now = self._tick()
        for unit in units:
            record = self._records[unit]
            record.is_unlocked = True
            record.last_used = now
            if not record.num_children:
                self._push(record)

    def _push(self, record: _Record[Unit]) -> None:
        self._tickets += 1
        record.ticket = self._tickets
        heapq.heappush(self._heap, (self._priority(record), record.ticket, record))
        if len(self._heap) > 64 + 2 * len(self._records):
            self._heap = [item for item in self._heap if item[2].ticket == item[1]]
            heapq.heapify(self._heap)

    def first(self) -> Unit | None:
        heap = self._heap
        while heap and heap[0][2].ticket != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][2].unit if heap else None

    def pop(self) -> Unit:
        unit = self.first()
        assert unit is not None, "pop where all is locked"
        heapq.heappop(self._heap)
        parent = self._records.pop(unit).parent
        if parent is not None:
            parent.num_children -= 1
            if not parent.num_children and parent.is_unlocked:
                self._push(parent)
        return unit

    def check(self, unlocked: set[Unit], units: set[Unit]) -> None:
        records = self._records
        assert records.keys() == units, "a unit has no record, or a record no unit"
        assert {u for u, r in records.items() if r.is_unlocked} == unlocked
        waiting = [r.unit for _, ticket, r in self._heap if r.ticket == ticket]
        leaves = [u for u, r in records.items() if r.is_unlocked and not r.num_children]
        assert len(waiting) == len(leaves) and set(waiting) == set(leaves), "the heap has gaps"


def order_of(eviction: Eviction, locks_of: Callable[[Any], int]) -> EvictionOrder[Any]:
    """The cheapest structure that keeps an order of eviction."""
    return ReleaseQueue(locks_of) if eviction.is_release_order else LeafHeap(eviction.priority)
