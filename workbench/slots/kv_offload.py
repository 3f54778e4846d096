"""Slot ``kv_offload``: a second tier for KV, in host memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from workbench.slots.component import Component


class KVOffload(Component):
    """Keeps the books of host blocks: which hold what, and which are free.

    Two uses share them: blocks that a prefix cache gives up are kept under a digest of all tokens
    up to their end, and a pre-empted request's blocks are kept until it runs again. This class
    moves no bytes: every answer names host blocks, and the copies travel in the step's plan.

    A host block that is read by a planned copy stays as it is until :meth:`step_planned`, since
    copies out run before copies in.
    """

    #: Whether there are host blocks at all.
    holds_blocks: bool = False
    num_host_blocks: int = 0

    @abstractmethod
    def keep(self, digest: bytes) -> int | None:
        """A host block for a block that the prefix cache gave up; None where it is here already.

        Gives up the least recently used digest where the tier is full, None where nothing can be.
        """

    @abstractmethod
    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Host blocks of the leading digests that are here, up to the first that is not."""

    @abstractmethod
    def use(self, digests: Sequence[bytes]) -> None:
        """Note that the blocks of these digests, all here, are copied in by the plan being made."""

    @abstractmethod
    def swap_out(self, request_id: str, num_blocks: int) -> list[int] | None:
        """Host blocks for a pre-empted request, or None, with nothing changed, for want of room.

        May give up digests to make room.
        """

    @abstractmethod
    def swapped(self, request_id: str) -> list[int]:
        """Host blocks of a pre-empted request; empty for one that was not swapped out."""

    @abstractmethod
    def drop(self, request_id: str) -> None:
        """Free a request's host blocks (it runs again, or was aborted); unknown ids are ignored."""

    @abstractmethod
    def clear(self) -> None:
        """Free every host block; what they held is not to be trusted."""

    @abstractmethod
    def step_planned(self) -> None:
        """The plan is complete: what was freed while making it may be used by the next one."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError unless every host block is free or has one owner."""


class NoOffload(KVOffload):
    """No second tier: the null object."""

    def __init__(self, config: object = None, *, bytes_per_block: int = 0) -> None:
        super().__init__(config)

    def keep(self, digest: bytes) -> int | None:
        return None

    def find(self, digests: Sequence[bytes]) -> list[int]:
        return []

    def use(self, digests: Sequence[bytes]) -> None: ...

    def swap_out(self, request_id: str, num_blocks: int) -> list[int] | None:
        return None

    def swapped(self, request_id: str) -> list[int]:
        return []

    def drop(self, request_id: str) -> None: ...

    def clear(self) -> None: ...

    def step_planned(self) -> None: ...

    def check_integrity(self) -> None: ...
