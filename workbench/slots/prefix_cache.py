"""Slot ``prefix_cache``: KV of earlier requests that a new one may reuse."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from workbench.core.request import Request
from workbench.slots.component import Component
from workbench.slots.eviction import Eviction


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Whole blocks that already hold the leading tokens of a request.

    Safe to use only between ``lock`` and ``unlock``.

    Attributes
    ----------
    block_ids
        In order, from the request's first token on.
    num_tokens
        ``len(block_ids) * block_size``.
    entry
        The cache's own handle of the last block, None where nothing matched.
    """

    block_ids: tuple[int, ...] = ()
    num_tokens: int = 0
    entry: Any = None


@dataclass(frozen=True, slots=True)
class Published:
    """What became of blocks that a request published.

    Attributes
    ----------
    match
        The request's prefix as the cache holds it now, locked for the request.
    taken
        Those of the request's blocks that belong to the cache from now on. Blocks whose tokens the
        cache holds already are taken only where nobody reads the cached ones, which are then given
        up first; else they stay the request's own. So publishing never lowers ``num_evictable``.
    """

    match: PrefixMatch
    taken: list[int]


class PrefixCache(Component):
    """Finds, keeps and gives up cached prefixes, in whole blocks.

    Keys are token ids and ``Request.extra_keys``: requests that differ in either share nothing.
    A block belongs to the pool's free list, to one request or to the cache, never to two of them.
    A cached block is locked as long as a running request reads it; unlocked ones may be evicted,
    the last block of a prefix before the ones that lead to it.

    Only the scheduler's :class:`~workbench.slots.kv_space.KVSpace` calls it.
    """

    #: Whether requests may share blocks at all; needs a KV manager whose blocks can be shared.
    shares_blocks: bool = True
    #: Whether blocks are published once the step that writes them is planned, so that requests
    #: which start in that very step share them; else once they are written.
    shares_in_flight: bool = False
    #: Blocks that the cache owns, and those of them that no lock keeps.
    num_blocks: int = 0
    num_evictable: int = 0

    def __init__(self, config: object = None, *, block_size: int, eviction: Eviction) -> None:
        super().__init__(config)
        self.block_size = block_size
        self.eviction = eviction

    @abstractmethod
    def prepare(self, request: Request) -> None:
        """Compute what the cache needs of a prompt, once, when it arrives (off the step's path).

        May store it in ``request.prefix_key`` and nowhere else; tokens that the request gains
        later are keyed when they are looked up or published.
        """

    @abstractmethod
    def match(self, request: Request) -> PrefixMatch:
        """Longest cached prefix of the request's known tokens, output included, that leaves at
        least one token to run. Locks nothing; counts nothing until it is locked."""

    @abstractmethod
    def match_length(self, request: Request) -> int:
        """``match(request).num_tokens``, as cheaply as possible: for ordering a queue."""

    @abstractmethod
    def lock(self, match: PrefixMatch) -> None:
        """Keep the match's blocks from eviction; counts as a use of them."""

    @abstractmethod
    def unlock(self, match: PrefixMatch, used: bool = True) -> None:
        """Undo one ``lock``; what it counted too where the match was not used after all."""

    @abstractmethod
    def insert(
        self, request: Request, block_ids: list[int], num_tokens: int, held: PrefixMatch
    ) -> Published:
        """Publish the request's first ``num_tokens`` tokens, whose KV is written (or will be by
        the step being planned, with ``shares_in_flight``), as far as they fill whole blocks.

        ``block_ids`` are the request's blocks in order. ``held``, which the request has locked, is
        unlocked in exchange for the lock on what is returned.
        """

    @abstractmethod
    def evict(self, num_blocks: int) -> list[int]:
        """Give up ``num_blocks`` unlocked blocks, or as many as there are; returns them."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError where the structure contradicts itself."""

    def block_ids(self) -> list[int]:
        """All blocks that the cache owns, for integrity checks."""
        return []


class NoPrefixCache(PrefixCache):
    """Remembers nothing: the null object."""

    shares_blocks = False
    _NO_MATCH = PrefixMatch()

    def prepare(self, request: Request) -> None: ...

    def match(self, request: Request) -> PrefixMatch:
        return self._NO_MATCH

    def match_length(self, request: Request) -> int:
        return 0

    def lock(self, match: PrefixMatch) -> None: ...

    def unlock(self, match: PrefixMatch, used: bool = True) -> None: ...

    def insert(
        self, request: Request, block_ids: list[int], num_tokens: int, held: PrefixMatch
    ) -> Published:
        return Published(held, [])

    def evict(self, num_blocks: int) -> list[int]:
        return []

    def check_integrity(self) -> None: ...
