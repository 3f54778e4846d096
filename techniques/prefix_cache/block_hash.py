"""Prefixes by the block: one dictionary of hashes, each of a block and of all blocks before it.

The idea is that of vLLM's automatic prefix caching, which grew out of its paged blocks (Kwon et
al. 2023, arXiv:2309.06180, section 4.4): a block's key is the hash of its tokens and of the key
before it, so equal keys stand for equal prefixes. Here they do so without a doubt: a key holds one
block, whose tokens and preceding key are compared on every hit. A block outlives those that follow
it, so its preceding key still stands for the block that it was published behind.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice

from techniques.prefix_cache.order import EvictionOrder, order_of
from techniques.prefix_cache.shared import (
    TOKEN_BYTES,
    Lookup,
    SharingCache,
    SharingConfig,
    token_bytes,
)
from workbench.core.request import Request
from workbench.slots.eviction import Eviction
from workbench.slots.prefix_cache import PrefixMatch, Published

#: What a block is: its key, what precedes it, and the bytes of its token ids. What precedes it is
#: a key, at the start of a prefix ``Request.extra_keys``; the key is the hash of the other two.
_Identity = tuple[int, int | tuple[str, ...], bytes]


class BlockHashCache(SharingCache):
    """Finds a prefix block by block.

    What is known of a cached block stands in lists, at the block's number: publishing a prompt
    makes no object a block, which would be half of its cost. A lock on the last block of a prefix
    keeps all before it, by counts that change only where a block turns from unlocked to locked or
    back. ``Request.prefix_key`` is the list of its whole blocks' identities.
    """

    def __init__(
        self, config: SharingConfig | None = None, *, block_size: int, eviction: Eviction
    ) -> None:
        super().__init__(config, block_size=block_size, eviction=eviction)
        self._block_of: dict[int, int] = {}  # by key
        self._identity_of: list[_Identity | None] = []  # None: not cached
        # Requests whose prefix ends with the block, and locked blocks that follow it; a mark of
        # the order, 0 or less, where there are none.
        self._locks: list[int] = []
        self._order: EvictionOrder[int] = order_of(eviction, self._locks.__getitem__)

    # -- keys ---------------------------------------------------------------------------------

    def prepare(self, request: Request) -> None:
        self._key(request, request.num_tokens // self.block_size)

    def _key(self, request: Request, num_blocks: int) -> list[_Identity]:
        """Identities of the request's blocks, at least of the first ``num_blocks``."""
        if request.prefix_key is None:  # asked for before it arrived
            request.prefix_key = []
        identities: list[_Identity] = request.prefix_key
        known, size = len(identities), self.block_size
        if num_blocks > known:
            data = token_bytes(request, known * size, num_blocks * size)
            parent = identities[-1][0] if identities else request.extra_keys
            for start in range(0, len(data), size * TOKEN_BYTES):
                tokens = data[start : start + size * TOKEN_BYTES]
                key = hash((parent, tokens))
                identities.append((key, parent, tokens))
                parent = key
        return identities

    # -- looking up ---------------------------------------------------------------------------

    def match(self, request: Request) -> Lookup:
        limit = (request.num_tokens - 1) // self.block_size
        blocks = self._follow(self._key(request, limit), 0, limit)
        return Lookup(
            block_ids=tuple(blocks),
            num_tokens=len(blocks) * self.block_size,
            entry=self._identity_of[blocks[-1]] if blocks else None,
            num_queried=request.num_tokens,
            priority=request.priority,
        )

    def match_length(self, request: Request) -> int:
        """As :meth:`match`, by halves: of a prefix, the first blocks are cached.

        Looks at keys alone. Two prefixes of one 64-bit key would show here, and only here.
        """
        limit = (request.num_tokens - 1) // self.block_size
        cached, identities = self._block_of, self._key(request, limit)
        if not limit or identities[0][0] not in cached:
            return 0
        found = bisect_left(identities, True, 1, limit, key=lambda item: item[0] not in cached)
        return found * self.block_size

    def _follow(self, identities: list[_Identity], start: int, stop: int) -> list[int]:
        """Cached blocks of a prompt from block ``start`` on, whose predecessors are cached."""
        find, identity_of = self._block_of.get, self._identity_of
        blocks: list[int] = []
        found = blocks.append
        for identity in islice(identities, start, stop):
            block = find(identity[0])
            if block is None or identity_of[block] != identity:
                break
            found(block)
        return blocks

    # -- locks --------------------------------------------------------------------------------

    def _lock(self, match: PrefixMatch) -> None:
        last = self._identity_of[match.block_ids[-1]]
        assert last is match.entry, "a match from before an eviction"
        self._acquire(match.block_ids)

    def _acquire(self, blocks: Sequence[int]) -> int:
        """Lock the last block of a prefix; returns how many blocks were not locked before."""
        locks = self._locks
        num_locked = len(blocks)
        for block in reversed(blocks):
            count = locks[block]
            if count > 0:
                locks[block] = count + 1
                break
            locks[block] = 1
            num_locked -= 1
        added = blocks[num_locked:]
        self._order.lock(added)
        self.num_evictable -= len(added)
        return len(added)

    def _unlock(self, match: PrefixMatch) -> None:
        locks, mark = self._locks, self._order.mark
        num_locked = len(match.block_ids)
        for block in reversed(match.block_ids):
            count = locks[block]
            if count > 1:
                locks[block] = count - 1
                break
            locks[block] = mark
            num_locked -= 1
        released = match.block_ids[num_locked:]
        if released:
            self._order.release(released)
            self.num_evictable += len(released)

    def _note_hits(self, match: Lookup, num_hits: int) -> None:
        self._order.use(match.block_ids, match.priority, num_hits)

    # -- publishing and evicting --------------------------------------------------------------

    def insert(
        self, request: Request, block_ids: list[int], num_tokens: int, held: PrefixMatch
    ) -> Published:
        num_blocks = num_tokens // self.block_size
        num_held = len(held.block_ids)
        if num_blocks <= num_held:
            return Published(held, [])
        identities = self._key(request, num_blocks)
        blocks = [*held.block_ids, *self._follow(identities, num_held, num_blocks)]
        taken: list[int] = []
        if len(blocks) > num_held:
            taken = self._join(request, blocks, block_ids, num_held)
        # The lock on what they follow stays, as that of a locked successor.
        added = self._add(request, identities, blocks, block_ids[len(blocks) : num_blocks])
        taken += added
        blocks += added
        if len(blocks) == num_held:
            return Published(held, [])
        last = self._identity_of[blocks[-1]]
        return Published(PrefixMatch(tuple(blocks), len(blocks) * self.block_size, last), taken)

    def _join(
        self, request: Request, blocks: list[int], block_ids: list[int], num_held: int
    ) -> list[int]:
        """Move a request's lock from its first ``num_held`` blocks on to the end of ``blocks``,
        which others have published; returns its own blocks that replace some of them there."""
        num_unlocked = self._acquire(blocks)
        if num_held:
            self._locks[blocks[num_held - 1]] -= 1
        self._order.use(blocks[num_held:], request.priority, 0)
        replaced: list[int] = []
        self._grow(block_ids)
        for index in range(len(blocks) - num_unlocked, len(blocks)):
            old, new = blocks[index], block_ids[index]
            identity = self._identity_of[new] = self._identity_of[old]
            assert identity is not None, "a block was found that is not cached"
            self._block_of[identity[0]] = new
            self._identity_of[old] = None
            self._locks[new], self._locks[old] = self._locks[old], 0
            self._order.replace(old, new)
            self._spares.append(old)
            blocks[index] = new
            replaced.append(new)
        self.num_blocks += num_unlocked
        self.num_evictable += num_unlocked
        self._num_inserted += num_unlocked
        return replaced

    def _add(
        self,
        request: Request,
        identities: list[_Identity],
        before: list[int],
        block_ids: list[int],
    ) -> list[int]:
        """Cache blocks that follow those ``before``, locked by the request that publishes them.

        Stops where another prefix has the same key: what follows is not cached as long as that is.
        """
        if not block_ids:
            return []
        self._grow(block_ids)
        block_of, identity_of, locks = self._block_of, self._identity_of, self._locks
        num_added = 0
        for block, identity in zip(block_ids, islice(identities, len(before), None), strict=False):
            if block_of.setdefault(identity[0], block) != block:
                break
            identity_of[block] = identity
            locks[block] = 1
            num_added += 1
        added = block_ids[:num_added]
        self._order.add(added, before[-1] if before else None, request.priority)
        self.num_blocks += num_added
        self._num_inserted += num_added
        return added

    def _grow(self, block_ids: list[int]) -> None:
        """Make room in the lists for these blocks."""
        missing = max(block_ids) + 1 - len(self._locks)
        if missing > 0:
            missing += len(self._locks)  # at least double them
            self._identity_of += [None] * missing
            self._locks += [0] * missing

    def _evict(self, num_blocks: int) -> list[int]:
        freed = self._order.take(num_blocks)
        for block in freed:
            identity = self._identity_of[block]
            assert identity is not None, "a block was evicted that is not cached"
            del self._block_of[identity[0]]
            self._identity_of[block] = None
        self.num_blocks -= num_blocks
        self.num_evictable -= num_blocks
        return freed

    # -- books --------------------------------------------------------------------------------

    def block_ids(self) -> list[int]:
        return [*self._block_of.values(), *self._spares]

    def check_integrity(self) -> None:
        cached = {block: item for block, item in enumerate(self._identity_of) if item is not None}
        assert self._block_of == {item[0]: block for block, item in cached.items()}
        assert len(self._block_of) == len(cached), "two blocks have one key"
        locked_successors = dict.fromkeys(cached, 0)
        for block, (key, parent, tokens) in cached.items():
            assert key == hash((parent, tokens)), "a key that is not the block's"
            assert len(tokens) == self.block_size * TOKEN_BYTES, "part of a block is cached"
            if isinstance(parent, int):
                assert parent in self._block_of, "a block outlived what it follows"
                locked_successors[self._block_of[parent]] += self._locks[block] > 0
        for block, count in locked_successors.items():
            assert max(0, self._locks[block]) >= count, "a locked block follows an unlocked one"
        unlocked = {block for block in cached if self._locks[block] <= 0}
        self._order.check(unlocked, set(cached))
        blocks = self.block_ids()
        assert len(blocks) == self.num_blocks == len(set(blocks)), "a block counted wrong or twice"
        assert self.num_evictable == len(unlocked) + len(self._spares), "unlocked ones miscounted"
