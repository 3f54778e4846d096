"""Block tables over a pool of small blocks (Kwon et al. 2023, arXiv:2309.06180, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from workbench.core.errors import ConfigError
from workbench.slots.kv_cache import KVCacheManager, Reclaimer


@dataclass(frozen=True, slots=True)
class PagedConfig:
    """Options of :class:`Paged`.

    Attributes
    ----------
    block_size
        Tokens a block. On average half a block a request is wasted.
    """

    block_size: int = 16


@dataclass(slots=True)
class _Holding:
    """A request's blocks in order; those in ``shared`` belong to the prefix cache."""

    blocks: list[int]
    num_tokens: int
    promised_blocks: int
    shared: set[int] = field(default_factory=set)


class _NothingToReclaim:
    """Stands where there is no prefix cache."""

    num_blocks = 0
    num_evictable = 0

    def evict(self, num_blocks: int) -> list[int]:
        return []

    def block_ids(self) -> list[int]:
        return []


class Paged(KVCacheManager):
    """Hands out blocks lazily, while keeping every promise made at admission.

    A block is free, a request's own, or the prefix cache's. A promise is a number, not blocks:
    ``free + evictable >= sum of promises not yet called in`` holds always, so growth within a
    promise cannot fail and nothing sits allocated ahead of its use.
    """

    Config = PagedConfig
    config: PagedConfig
    can_share_blocks = True

    def __init__(self, config: PagedConfig, *, num_blocks: int, block_size: int) -> None:
        super().__init__(config)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._held: dict[str, _Holding] = {}
        self._outstanding = 0  # promised blocks that are not allocated yet
        self._reclaimer: Reclaimer = _NothingToReclaim()
        self._on_evicted: Callable[[list[int]], None] | None = None
        self._blocks_allocated = 0

    @classmethod
    def choose_block_size(cls, config: object, max_model_len: int) -> int:
        assert isinstance(config, PagedConfig)
        if config.block_size < 1:
            raise ConfigError(f"engine.kv_cache.block_size={config.block_size} must be 1 or more.")
        return config.block_size

    def attach(
        self, reclaimer: Reclaimer, on_evicted: Callable[[list[int]], None] | None = None
    ) -> None:
        self._reclaimer, self._on_evicted = reclaimer, on_evicted

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _available(self) -> int:
        """Blocks that are neither used nor promised; negative after a lock on cached ones, until
        the request that locked them is refused."""
        return len(self._free) + self._reclaimer.num_evictable - self._outstanding

    def fits(self, num_tokens: int) -> bool:
        return self._blocks(num_tokens) <= self.num_blocks

    def admit(
        self, request_id: str, reserve_tokens: int, cached_blocks: Sequence[int] = ()
    ) -> bool:
        num_cached = len(cached_blocks)
        promised = max(self._blocks(reserve_tokens), num_cached)
        if promised - num_cached > self._available():
            return False
        num_tokens = num_cached * self.block_size
        held = _Holding(list(cached_blocks), num_tokens, promised, set(cached_blocks))
        self._held[request_id] = held
        self._outstanding += promised - num_cached
        self.num_shared_tokens += num_tokens
        return True

    def allocate_slots(self, request_id: str, num_tokens: int) -> list[int] | None:
        held = self._held[request_id]
        if num_tokens <= held.num_tokens:
            return []
        missing = self._blocks(num_tokens) - len(held.blocks)
        if missing > 0:
            beyond = max(0, len(held.blocks) + missing - held.promised_blocks)
            if beyond > self._available():
                return None
            if missing > len(self._free):
                self._reclaim(missing - len(self._free))
            self._outstanding -= missing - beyond
            held.promised_blocks += beyond
            added = [self._free.pop() for _ in range(missing)]
            held.blocks += added
            self._blocks_allocated += missing
        else:
            added = []
        held.num_tokens = num_tokens
        return added

    def _reclaim(self, num_blocks: int) -> None:
        evicted = self._reclaimer.evict(num_blocks)
        if self._on_evicted is not None:
            self._on_evicted(evicted)
        self._free.extend(evicted)

    def take_back(self, block_ids: list[int]) -> None:
        self._free.extend(block_ids)

    def hand_over(self, request_id: str, block_ids: list[int]) -> None:
        held = self._held[request_id]
        held.shared.update(block_ids)
        self.num_shared_tokens += len(block_ids) * self.block_size

    def free(self, request_id: str) -> None:
        held = self._held.pop(request_id, None)
        if held is None:
            return
        if held.shared:
            self._free.extend(b for b in reversed(held.blocks) if b not in held.shared)
        else:
            self._free.extend(reversed(held.blocks))
        self._outstanding -= held.promised_blocks - len(held.blocks)
        self.num_shared_tokens -= len(held.shared) * self.block_size

    def block_ids(self, request_id: str) -> list[int]:
        return self._held[request_id].blocks

    def allocated_tokens(self) -> int:
        in_use = self.num_blocks - len(self._free) - self._reclaimer.num_evictable
        return in_use * self.block_size

    def check_integrity(self) -> None:
        holdings = self._held.values()
        owned = [block for held in holdings for block in held.blocks if block not in held.shared]
        cached = self._reclaimer.block_ids()
        everything = [*self._free, *owned, *cached]
        assert len(everything) == self.num_blocks, "blocks lost or made up"
        assert len(set(everything)) == len(everything), "a block has two owners"
        promised = sum(h.promised_blocks - len(h.blocks) for h in holdings)
        assert promised == self._outstanding, "promises miscounted"
        assert self._available() >= 0, "more promised than free"
        for held in holdings:
            assert len(held.blocks) == self._blocks(held.num_tokens), "blocks held without tokens"
            assert held.shared <= set(held.blocks), "a block is shared that is not held"
            assert held.shared <= set(cached), "a request reads a block that was given up"
        shared = sum(len(h.shared) for h in holdings) * self.block_size
        assert shared == self.num_shared_tokens, "shared tokens miscounted"

    def counters(self) -> dict[str, float]:
        return {"blocks_allocated": self._blocks_allocated}

    def reset_counters(self) -> None:
        self._blocks_allocated = 0
