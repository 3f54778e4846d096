"""Block tables over a pool of small blocks (Kwon et al. 2023, arXiv:2309.06180, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.core.errors import ConfigError
from workbench.slots.kv_cache import KVCacheManager, KVUsage


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
    blocks: list[int]
    num_tokens: int
    promised_blocks: int


class Paged(KVCacheManager):
    """Hands out blocks lazily, while keeping every promise made at admission.

    A promise is a number, not blocks: ``free blocks >= sum of promises not yet called in`` holds
    always, so growth within a promise cannot fail and nothing sits allocated ahead of its use.
    """

    Config = PagedConfig
    config: PagedConfig

    def __init__(self, config: PagedConfig, *, num_blocks: int, block_size: int) -> None:
        super().__init__(config)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._held: dict[str, _Holding] = {}
        self._outstanding = 0  # promised blocks that are not allocated yet
        self._used_tokens = 0
        self._blocks_allocated = 0

    @classmethod
    def choose_block_size(cls, config: object, max_model_len: int) -> int:
        assert isinstance(config, PagedConfig)
        if config.block_size < 1:
            raise ConfigError(f"kv_cache.block_size={config.block_size} must be 1 or more.")
        return config.block_size

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def fits(self, num_tokens: int) -> bool:
        return self._blocks(num_tokens) <= self.num_blocks

    def admit(self, request_id: str, reserve_tokens: int) -> bool:
        promised = self._blocks(reserve_tokens)
        if promised > len(self._free) - self._outstanding:
            return False
        self._held[request_id] = _Holding([], 0, promised)
        self._outstanding += promised
        return True

    def allocate_slots(self, request_id: str, num_tokens: int) -> list[int] | None:
        held = self._held[request_id]
        if num_tokens <= held.num_tokens:
            return []
        missing = self._blocks(num_tokens) - len(held.blocks)
        if missing > 0:
            beyond = max(0, len(held.blocks) + missing - held.promised_blocks)
            if beyond > len(self._free) - self._outstanding:
                return None
            self._outstanding -= missing - beyond
            held.promised_blocks += beyond
            added = [self._free.pop() for _ in range(missing)]
            held.blocks += added
            self._blocks_allocated += missing
        else:
            added = []
        self._used_tokens += num_tokens - held.num_tokens
        held.num_tokens = num_tokens
        return added

    def free(self, request_id: str) -> None:
        held = self._held.pop(request_id, None)
        if held is None:
            return
        self._free.extend(reversed(held.blocks))
        self._outstanding -= held.promised_blocks - len(held.blocks)
        self._used_tokens -= held.num_tokens

    def usage(self) -> KVUsage:
        return KVUsage(
            total_tokens=self.num_blocks * self.block_size,
            allocated_tokens=(self.num_blocks - len(self._free)) * self.block_size,
            used_tokens=self._used_tokens,
        )

    def check_integrity(self) -> None:
        owned = [block for held in self._held.values() for block in held.blocks]
        assert len(self._free) + len(owned) == self.num_blocks, "blocks lost or made up"
        assert set(self._free).isdisjoint(owned), "a block is free and owned"
        assert len(set(owned)) == len(owned), "a block has two owners"
        promised = sum(h.promised_blocks - len(h.blocks) for h in self._held.values())
        assert promised == self._outstanding, "promises miscounted"
        assert self._outstanding <= len(self._free), "more promised than free"
        for held in self._held.values():
            assert len(held.blocks) == self._blocks(held.num_tokens), "blocks held without tokens"
        assert self._used_tokens == sum(h.num_tokens for h in self._held.values())

    def counters(self) -> dict[str, float]:
        return {"blocks_allocated": self._blocks_allocated}

    def reset_counters(self) -> None:
        self._blocks_allocated = 0
