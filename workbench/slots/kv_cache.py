"""Slot ``kv_cache``: which blocks of the KV pool belong to which request."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from workbench.slots.component import Component


@dataclass(slots=True)
class KVUsage:
    """Token slots at one moment. ``allocated - used`` is what fragmentation wastes."""

    total_tokens: int
    allocated_tokens: int
    used_tokens: int

    @property
    def waste(self) -> float:
        """Share of allocated slots that hold no token, 0 when nothing is allocated."""
        if not self.allocated_tokens:
            return 0.0
        return 1.0 - self.used_tokens / self.allocated_tokens


class Reclaimer(Protocol):
    """Owns blocks that it gives up on demand (a prefix cache)."""

    num_blocks: int
    num_evictable: int

    def evict(self, num_blocks: int) -> list[int]:
        """Give up so many blocks, or as many as there are."""
        ...

    def block_ids(self) -> list[int]:
        """All blocks it owns."""
        ...


class KVCacheManager(Component):
    """Owns the pool's blocks: hands them to requests and takes them back.

    Only the scheduler calls it. Block ids are ``0 .. num_blocks - 1``; slot ``s`` of a request
    lives at ``block_ids[s // block_size] * block_size + s % block_size``.
    """

    block_size: int
    num_blocks: int
    #: Whether a request's first blocks may belong to a prefix cache.
    can_share_blocks: bool = False
    #: Tokens of running requests that lie in a prefix cache's blocks, summed by request.
    num_shared_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Slots of the pool."""
        return self.num_blocks * self.block_size

    @classmethod
    @abstractmethod
    def choose_block_size(cls, config: object, max_model_len: int) -> int:
        """Tokens a block, before the pool exists."""

    @abstractmethod
    def fits(self, num_tokens: int) -> bool:
        """Whether a request of ``num_tokens`` could ever be held, were the pool empty."""

    @abstractmethod
    def admit(
        self, request_id: str, reserve_tokens: int, cached_blocks: Sequence[int] = ()
    ) -> bool:
        """Promise ``reserve_tokens`` slots to a new request, or return False and change nothing.

        Its first slots lie in ``cached_blocks``, which a prefix cache owns and has locked for it.
        """

    @abstractmethod
    def allocate_slots(self, request_id: str, num_tokens: int) -> list[int] | None:
        """Grow a request's blocks to hold ``num_tokens`` tokens in all.

        Returns the block ids that were added (often none), or None, with nothing changed, where
        the pool has no room. Within the promise of :meth:`admit` it never returns None.
        """

    @abstractmethod
    def free(self, request_id: str) -> None:
        """Take back all blocks and the promise; an id that was never admitted is ignored."""

    @abstractmethod
    def allocated_tokens(self) -> int:
        """Slots of all blocks that requests hold, in O(1); cached ones that nobody reads apart."""

    @abstractmethod
    def block_ids(self, request_id: str) -> list[int]:
        """A request's blocks in order, those of the prefix cache included; not to be changed."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError unless free + used == total and no block has two owners."""

    def attach(
        self, reclaimer: Reclaimer, on_evicted: Callable[[list[int]], None] | None = None
    ) -> None:
        """Say whom to ask for blocks when none is free, and whom to tell before they are reused."""

    def take_back(self, block_ids: list[int]) -> None:
        """Blocks that the prefix cache gave up unasked are free."""
        assert not block_ids, f"{type(self).__name__} shares no blocks"

    def hand_over(self, request_id: str, block_ids: list[int]) -> None:
        """Full blocks of a request belong to the prefix cache from now on."""
        raise NotImplementedError(f"{type(self).__name__} shares no blocks")


@dataclass(frozen=True, slots=True)
class ContiguousConfig:
    """Options of :class:`Contiguous`: none; a region is always ``max_model_len`` long."""


class Contiguous(KVCacheManager):
    """One region of ``max_model_len`` tokens a request: the null object.

    It is what serving systems did before paging (Kwon et al. 2023, arXiv:2309.06180, section 3):
    a region is one block, so the rest of the engine sees the same arithmetic.
    """

    Config = ContiguousConfig

    def __init__(self, config: ContiguousConfig, *, num_blocks: int, block_size: int) -> None:
        super().__init__(config)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owner: dict[str, int] = {}
        self._told: set[str] = set()  # whose region allocate_slots has told of
        self._regions_allocated = 0

    @classmethod
    def choose_block_size(cls, config: object, max_model_len: int) -> int:
        return max_model_len

    def fits(self, num_tokens: int) -> bool:
        return self.num_blocks > 0 and num_tokens <= self.block_size

    def admit(
        self, request_id: str, reserve_tokens: int, cached_blocks: Sequence[int] = ()
    ) -> bool:
        assert not cached_blocks, "a region belongs to one request"
        if not self._free or reserve_tokens > self.block_size:
            return False
        # The region is taken at once, but told to the caller by the first allocate_slots.
        self._owner[request_id] = self._free.pop()
        self._regions_allocated += 1
        return True

    def allocate_slots(self, request_id: str, num_tokens: int) -> list[int] | None:
        if num_tokens > self.block_size:
            return None
        if num_tokens < 1 or request_id in self._told:
            return []
        self._told.add(request_id)
        return [self._owner[request_id]]

    def block_ids(self, request_id: str) -> list[int]:
        return [self._owner[request_id]]

    def free(self, request_id: str) -> None:
        region = self._owner.pop(request_id, None)
        if region is None:
            return
        self._free.append(region)
        self._told.discard(request_id)

    def allocated_tokens(self) -> int:
        return len(self._owner) * self.block_size

    def check_integrity(self) -> None:
        owned = list(self._owner.values())
        assert len(self._free) + len(owned) == self.num_blocks, "regions lost or made up"
        assert set(self._free).isdisjoint(owned), "a region is free and owned"
        assert len(set(owned)) == len(owned), "a region has two owners"
        assert self._told <= self._owner.keys(), "a region was told of that nobody owns"

    def counters(self) -> dict[str, float]:
        return {"regions_allocated": self._regions_allocated}

    def reset_counters(self) -> None:
        self._regions_allocated = 0
