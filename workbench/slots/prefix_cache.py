"""Slot ``prefix_cache``: KV of earlier requests that a new one may reuse."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from workbench.core.request import Request
from workbench.slots.component import Component


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Blocks that already hold the leading tokens of a request.

    Safe to use only between ``lock`` and ``unlock``.
    """

    block_ids: tuple[int, ...] = ()
    num_tokens: int = 0


class PrefixCache(Component):
    """Finds, keeps and gives up cached prefixes. Keys are token ids and ``Request.extra_keys``.

    A prefix is published (``insert``) only after its KV is written.
    """

    @abstractmethod
    def match(self, request: Request) -> PrefixMatch:
        """Longest cached prefix, shorter than the prompt, so that one token is left to run."""

    @abstractmethod
    def lock(self, match: PrefixMatch) -> None:
        """Keep the match's blocks from eviction."""

    @abstractmethod
    def unlock(self, match: PrefixMatch) -> None:
        """Undo one ``lock``."""

    @abstractmethod
    def insert(self, request: Request, block_ids: list[int]) -> int:
        """Publish the request's computed blocks; returns how many the cache has taken over."""

    @abstractmethod
    def evict(self, num_blocks: int) -> list[int]:
        """Give up at least ``num_blocks`` unlocked blocks if there are so many; returns them."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError where the structure contradicts itself."""


class NoPrefixCache(PrefixCache):
    """Remembers nothing: the null object."""

    _NO_MATCH = PrefixMatch()

    def match(self, request: Request) -> PrefixMatch:
        return self._NO_MATCH

    def lock(self, match: PrefixMatch) -> None: ...

    def unlock(self, match: PrefixMatch) -> None: ...

    def insert(self, request: Request, block_ids: list[int]) -> int:
        return 0

    def evict(self, num_blocks: int) -> list[int]:
        return []

    def check_integrity(self) -> None: ...
