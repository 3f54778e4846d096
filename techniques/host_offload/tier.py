"""The books of KV blocks in host memory."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from workbench.core.errors import ConfigError
from workbench.slots.kv_offload import KVOffload

#: Share of the free host memory that the tier may take: the rest of the program grows too.
_MOST_OF_FREE = 0.9


@dataclass(frozen=True, slots=True)
class HostTierConfig:
    """Options of :class:`HostTier`: one of the two, or none for as many blocks as the device has.

    Attributes
    ----------
    host_gib
        GiB of host memory.
    num_blocks
        Host blocks.
    """

    host_gib: float = 0.0
    num_blocks: int = 0


class HostTier(KVOffload):
    """Host blocks by digest, the least recently used given up first; and those of requests.

    A digest stays when its block is copied in: should the device give the block up once more, it
    is here already and no byte moves. Every operation is O(1) a block.

    ``_digests`` is in order of use, and what the plan being made touches is moved to its end. So
    the digests that this plan protects are the last ones, and if the first is among them, all are.
    """

    Config = HostTierConfig
    config: HostTierConfig
    holds_blocks = True

    def __init__(
        self, config: HostTierConfig, *, bytes_per_block: int = 0, num_device_blocks: int = 0
    ) -> None:
        super().__init__(config)
        self.num_host_blocks = _choose_num_blocks(config, bytes_per_block, num_device_blocks)
        _check_memory(self.num_host_blocks, bytes_per_block)
        self._digests: OrderedDict[bytes, int] = OrderedDict()
        self._swapped: dict[str, list[int]] = {}
        self._planned: set[bytes] = set()  # digests that the plan being made writes or reads
        self._freed: list[int] = []  # free once that plan is complete
        self._free = list(range(self.num_host_blocks - 1, -1, -1))
        self.reset_counters()

    # -- blocks of the prefix cache -----------------------------------------------------------

    def keep(self, digest: bytes) -> int | None:
        if digest in self._digests:
            self._touch(digest)
            return None
        block = self._take()
        if block is None:
            self._counts["refused"] += 1
            return None
        self._digests[digest] = block
        self._planned.add(digest)
        self._counts["blocks_out"] += 1
        return block

    def find(self, digests: Sequence[bytes]) -> list[int]:
        found: list[int] = []
        get = self._digests.get
        for digest in digests:
            block = get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def use(self, digests: Sequence[bytes]) -> None:
        # Backwards, so that the end of a prefix is given up before what leads to it.
        for digest in reversed(digests):
            self._touch(digest)
        self._counts["blocks_in"] += len(digests)
        self._counts["hit_blocks"] += len(digests)

    def _touch(self, digest: bytes) -> None:
        self._digests.move_to_end(digest)
        self._planned.add(digest)

    def _take(self) -> int | None:
        """A block that no planned copy touches; None where there is none."""
        if self._free:
            return self._free.pop()
        if len(self._digests) == len(self._planned):
            return None
        _, block = self._digests.popitem(last=False)
        self._counts["evicted"] += 1
        return block

    # -- blocks of requests -------------------------------------------------------------------

    def swap_out(self, request_id: str, num_blocks: int) -> list[int] | None:
        assert request_id not in self._swapped, "a request is swapped out twice"
        if num_blocks > len(self._free) + len(self._digests) - len(self._planned):
            self._counts["refused"] += 1
            return None
        taken = [block for _ in range(num_blocks) if (block := self._take()) is not None]
        assert len(taken) == num_blocks
        self._swapped[request_id] = taken
        self._counts["blocks_out"] += num_blocks
        return taken

    def drop(self, request_id: str, num_read: int = 0) -> None:
        # Not free yet: a planned copy may read them, or still have to write them.
        self._freed += self._swapped.pop(request_id, [])
        self._counts["blocks_in"] += num_read

    # -- all of them --------------------------------------------------------------------------

    def clear(self) -> None:
        self._digests.clear()
        self._swapped.clear()
        self._planned.clear()
        self._freed.clear()
        self._free = list(range(self.num_host_blocks - 1, -1, -1))

    def step_planned(self) -> None:
        self._free += reversed(self._freed)  # so that they are taken in the same order again
        self._freed.clear()
        self._planned.clear()

    def check_integrity(self) -> None:
        swapped = [block for blocks in self._swapped.values() for block in blocks]
        everything = [*self._free, *self._freed, *swapped, *self._digests.values()]
        assert sorted(everything) == list(range(self.num_host_blocks)), "a host block lost or twice"
        count = len(self._planned)
        last = list(self._digests)[len(self._digests) - count :]
        assert set(last) == self._planned, "a digest that the plan touches may be given up"

    # -- counters -----------------------------------------------------------------------------

    def counters(self) -> dict[str, float]:
        return {**self._counts, "kept_blocks": len(self._digests)}

    def reset_counters(self) -> None:
        names = ("blocks_out", "blocks_in", "hit_blocks", "evicted", "refused")
        self._counts: dict[str, int] = dict.fromkeys(names, 0)


def _choose_num_blocks(config: HostTierConfig, bytes_per_block: int, num_device_blocks: int) -> int:
    if not 0 <= config.host_gib < math.inf or config.num_blocks < 0:
        raise ConfigError(
            f"engine.kv_offload.host_gib={config.host_gib} and "
            f"engine.kv_offload.num_blocks={config.num_blocks} must be 0 or more."
        )
    if config.host_gib and config.num_blocks:
        raise ConfigError(
            f"engine.kv_offload.host_gib={config.host_gib} and "
            f"engine.kv_offload.num_blocks={config.num_blocks} both say how large the host tier "
            "is: set one of them, or none for as many blocks as the device has."
        )
    if config.host_gib and not bytes_per_block:
        raise ConfigError(
            f"engine.kv_offload.host_gib={config.host_gib} is a size in bytes, and the blocks of a "
            "run without a model have none: set engine.kv_offload.num_blocks."
        )
    if config.host_gib:
        num_blocks = int(config.host_gib * 2**30) // max(1, bytes_per_block)
        if not num_blocks:
            raise ConfigError(
                f"engine.kv_offload.host_gib={config.host_gib} holds no block of "
                f"{bytes_per_block} bytes. Raise it, or set engine.kv_offload.num_blocks."
            )
        return num_blocks
    num_blocks = config.num_blocks or num_device_blocks
    if not num_blocks:
        raise ConfigError(
            "engine.kv_offload.num_blocks must be 1 or more, or engine.kv_offload.host_gib be set."
        )
    return num_blocks


def _check_memory(num_blocks: int, bytes_per_block: int) -> None:
    needed, free = num_blocks * bytes_per_block, psutil.virtual_memory().available
    if needed > _MOST_OF_FREE * free:
        raise ConfigError(
            f"the host tier needs {needed / 2**30:.2f} GiB for {num_blocks} blocks, but "
            f"{free / 2**30:.2f} GiB of host memory are free, of which it may take "
            f"{100 * _MOST_OF_FREE:.0f} %. Set engine.kv_offload.host_gib or "
            "engine.kv_offload.num_blocks (one of them) to less."
        )
