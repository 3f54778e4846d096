"""What both prefix caches share: counting, evicting, and the bytes of token ids."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from dataclasses import dataclass

from workbench.core.errors import ConfigError
from workbench.core.request import Request
from workbench.slots.eviction import Eviction
from workbench.slots.prefix_cache import PrefixCache, PrefixMatch

#: Bytes that a token id takes in a key.
TOKEN_BYTES = array("i").itemsize


@dataclass(frozen=True, slots=True)
class SharingConfig:
    """Options of :class:`SharingCache`.

    Attributes
    ----------
    share_in_flight
        Requests share a prefix with the one that computes it from the very step that does so;
        else from the next step on.
    """

    share_in_flight: bool = True


@dataclass(frozen=True, slots=True)
class Lookup(PrefixMatch):
    """A match that was looked up, with what is counted once it is used.

    Attributes
    ----------
    num_queried
        Tokens that were looked up.
    priority
        Of the request.
    """

    num_queried: int = 0
    priority: int = 0


def token_bytes(request: Request, start: int, stop: int) -> bytes:
    """Token ids ``start .. stop - 1`` of a request, prompt and output, as 32-bit integers."""
    output_start = request.num_prompt_tokens
    if start >= output_start:
        ids = request.output_token_ids[start - output_start : stop - output_start]
    else:
        ids = request.prompt_token_ids[start:stop]
        if stop > output_start:
            ids = ids + request.output_token_ids[: stop - output_start]
    return array("i", ids).tobytes()


class SharingCache(PrefixCache):
    """Base of the caches: counts, and gives up spare blocks before anything else.

    A **spare** is a block that was published twice. Where a request publishes tokens whose block
    the cache holds already, and

    - somebody reads that block: the request keeps its own copy, and locks the cached one, since
      what it publishes next hangs under it;
    - nobody reads it: the request's block takes its place and the old one becomes a spare. A lock
      on the old one would take a block out of what may be evicted that nobody has reserved.
    """

    Config = SharingConfig
    config: SharingConfig

    def __init__(
        self, config: SharingConfig | None = None, *, block_size: int, eviction: Eviction
    ) -> None:
        super().__init__(config, block_size=block_size, eviction=eviction)
        self.shares_in_flight = self.config.share_in_flight
        if not eviction.orders:
            raise ConfigError(
                f"prefix cache {type(self).__name__} must give up blocks when the pool runs dry, "
                f"and {type(eviction).__name__} says not which. Choose engine/eviction=lru (or "
                "lfu, fifo, priority)."
            )
        if block_size < 1:
            raise ConfigError(f"engine.kv_cache.block_size={block_size} must be 1 or more.")
        self.num_blocks = 0
        self.num_evictable = 0
        self._spares: list[int] = []
        self.reset_counters()

    def lock(self, match: PrefixMatch) -> None:
        if match.block_ids:
            self._lock(match)
        if isinstance(match, Lookup):
            self._count_use(match, 1)

    def unlock(self, match: PrefixMatch, used: bool = True) -> None:
        """Undo one ``lock``; its counts too where it was not ``used``, as by a request that could
        not start after all."""
        if not used and isinstance(match, Lookup):
            self._count_use(match, -1)
        if match.block_ids:
            self._unlock(match)

    def evict(self, num_blocks: int) -> list[int]:
        assert num_blocks >= 0, "a negative number of blocks"
        spares = self._spares
        freed = [spares.pop() for _ in range(min(num_blocks, len(spares)))]
        self.num_evictable -= len(freed)
        self.num_blocks -= len(freed)
        freed += self._evict(min(num_blocks - len(freed), self.num_evictable))
        self._num_evicted += len(freed)
        return freed

    @abstractmethod
    def _lock(self, match: PrefixMatch) -> None:
        """Lock a match of at least one block."""

    @abstractmethod
    def _unlock(self, match: PrefixMatch) -> None:
        """Unlock a match of at least one block."""

    @abstractmethod
    def _note_hits(self, match: Lookup, num_hits: int) -> None:
        """Tell the order of eviction that a match is used (or, below 0, that it was not)."""

    @abstractmethod
    def _evict(self, num_blocks: int) -> list[int]:
        """Give up ``num_blocks`` blocks, of which there are enough, apart from spares."""

    # -- counters -----------------------------------------------------------------------------

    def _count_use(self, match: Lookup, sign: int) -> None:
        self._num_lookups += sign
        self._num_queried_tokens += sign * match.num_queried
        if match.block_ids:
            self._num_hits += sign
            self._num_hit_blocks += sign * len(match.block_ids)
            self._note_hits(match, sign)

    def counters(self) -> dict[str, float]:
        return {
            "lookups": self._num_lookups,
            "hits": self._num_hits,
            "queried_tokens": self._num_queried_tokens,
            "hit_tokens": self._num_hit_blocks * self.block_size,
            "hit_blocks": self._num_hit_blocks,
            "inserted_blocks": self._num_inserted,
            "evicted_blocks": self._num_evicted,
            "cached_blocks": self.num_blocks,
        }

    def reset_counters(self) -> None:
        self._num_lookups = self._num_hits = 0
        self._num_queried_tokens = self._num_hit_blocks = 0
        self._num_inserted = self._num_evicted = 0
