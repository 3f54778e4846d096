"""Slot ``kv_offload``: a second tier for KV, in host memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from workbench.slots.component import Component


class KVOffload(Component):
    """Keeps the books of host blocks: which hold what, and which are free.

    Two uses share them: blocks that a prefix cache gives up are kept under a digest of all tokens
    up to their end, and a pre-empted request's blocks are kept until it runs again. This class
    moves no bytes: its answers name host blocks, and the copies travel in the step's plan.

    A host block that a planned copy writes or reads belongs to that copy until
    :meth:`step_planned`: copies of one plan run in any order, but that all out run before all in.

    Parameters
    ----------
    bytes_per_block
        Of the device's KV pool; 0 in a run without a model, where blocks hold nothing.
    num_device_blocks
        Blocks of that pool.
    """

    #: Whether there are host blocks at all.
    holds_blocks: bool = False
    num_host_blocks: int = 0

    def __init__(
        self, config: object = None, *, bytes_per_block: int = 0, num_device_blocks: int = 0
    ) -> None:
        super().__init__(config)

    @abstractmethod
    def keep(self, digest: bytes) -> int | None:
        """A host block that the plan writes with what the prefix cache gave up.

        None where the digest is here already, which counts as a use of it, and where nothing can
        be given up for it. Gives up the least recently used digest where the tier is full.
        """

    @abstractmethod
    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Host blocks of the leading digests that are here, up to the first that is not."""

    @abstractmethod
    def use(self, digests: Sequence[bytes]) -> None:
        """The plan reads the blocks of these digests, all here; they stay."""

    @abstractmethod
    def swap_out(self, request_id: str, num_blocks: int) -> list[int] | None:
        """Host blocks that the plan writes with those of a pre-empted request, or None, with
        nothing changed, for want of room. May give up digests to make room.

        They are the request's until :meth:`drop`, and never given up for others.
        """

    @abstractmethod
    def drop(self, request_id: str, num_read: int = 0) -> None:
        """Free a request's host blocks, ``num_read`` of which the plan reads: it runs again, or
        was aborted. Unknown ids are ignored."""

    @abstractmethod
    def clear(self) -> None:
        """Free every host block; what they held is not to be trusted. No copy may be planned."""

    @abstractmethod
    def step_planned(self) -> None:
        """The plan is complete: what was freed while making it may be used by the next one."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError unless every host block is free or has one owner."""


class NoOffload(KVOffload):
    """No second tier: the null object."""

    def keep(self, digest: bytes) -> int | None:
        return None

    def find(self, digests: Sequence[bytes]) -> list[int]:
        return []

    def use(self, digests: Sequence[bytes]) -> None: ...

    def swap_out(self, request_id: str, num_blocks: int) -> list[int] | None:
        return None

    def drop(self, request_id: str, num_read: int = 0) -> None: ...

    def clear(self) -> None: ...

    def step_planned(self) -> None: ...

    def check_integrity(self) -> None: ...
