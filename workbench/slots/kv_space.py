"""The KV of all requests: between the manager of blocks, the prefix cache and the host tier."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

from workbench.core.errors import ConfigError
from workbench.core.request import Request
from workbench.slots.kv_cache import KVCacheManager, KVUsage
from workbench.slots.kv_offload import KVOffload
from workbench.slots.prefix_cache import PrefixCache, PrefixMatch

_NO_MATCH = PrefixMatch()


@dataclass(frozen=True, slots=True)
class Found:
    """KV that a waiting request would find, had it started now.

    Attributes
    ----------
    match
        Blocks of the prefix cache on the device.
    host_blocks
        Host blocks whose content follows the match.
    num_tokens
        Tokens that need not be computed, both together.
    swapped
        The host blocks are the last of the request's own, from before it was pre-empted.
    """

    match: PrefixMatch = _NO_MATCH
    host_blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class _Swapped:
    """KV of a pre-empted request on the host: its blocks in order, and the tokens they hold."""

    host_blocks: list[int]
    num_tokens: int


class KVSpace:
    """Gives requests their blocks, and says what they hold already.

    The one place where manager, prefix cache and host tier meet; only the scheduler calls it. A
    request's life here: ``prepare`` when it arrives, ``find`` and ``admit`` when it starts,
    ``grow`` as it runs, ``publish_planned`` once the step that writes a prompt's KV is planned and
    ``publish`` once KV is written, and ``release`` or ``preempt``.
    """

    def __init__(
        self, kv_cache: KVCacheManager, prefix_cache: PrefixCache, offload: KVOffload
    ) -> None:
        if prefix_cache.shares_blocks and not kv_cache.can_share_blocks:
            raise ConfigError(
                f"prefix cache {type(prefix_cache).__name__} shares blocks between requests, which "
                f"KV manager {type(kv_cache).__name__} cannot. Choose engine/kv_cache=paged, or "
                "engine/prefix_cache=none."
            )
        self.kv_cache = kv_cache
        self.prefix_cache = prefix_cache
        self.offload = offload
        self.caches = prefix_cache.shares_blocks
        #: Copies of the plan being made: (device block, host block) and (host block, device block).
        self.copies_out: list[tuple[int, int]] = []
        self.copies_in: list[tuple[int, int]] = []
        #: Blocks that were published in the plan being made, which writes them.
        self._in_flight: set[int] = set()
        #: Whether the last plan published blocks that it has yet to write.
        self.has_unwritten = False
        #: Tokens that requests shared in the step that computed them.
        self.num_in_flight_tokens = 0
        self._held: dict[str, PrefixMatch] = {}
        self._swapped: dict[str, _Swapped] = {}
        self._tiered = self.caches and offload.holds_blocks
        self._digests: dict[str, list[bytes]] = {}  # by request, of its leading blocks
        self._digest_of: dict[int, bytes] = {}  # by block of the prefix cache
        kv_cache.attach(prefix_cache, self._note_evicted)

    # -- a request's life ---------------------------------------------------------------------

    def prepare(self, request: Request) -> None:
        """Do what can be done when a request arrives, off the step's path."""
        self.prefix_cache.prepare(request)
        if self._tiered:
            self._extend_digests(request, request.num_tokens)

    def find(self, request: Request) -> Found:
        """What of the request's KV is here; locks and moves nothing."""
        match = self.prefix_cache.match(request)
        own = self._swapped.get(request.request_id)
        if own is not None:  # what the device still has of it need not be copied
            host_blocks = own.host_blocks[len(match.block_ids) :]
            return Found(match, host_blocks, max(own.num_tokens, match.num_tokens), swapped=True)
        if not self._tiered:
            return Found(match, num_tokens=match.num_tokens)
        block_size = self.kv_cache.block_size
        # One token is left to run, as after a match on the device.
        last = (request.num_tokens - 1) // block_size
        digests = self._extend_digests(request, last * block_size)[len(match.block_ids) : last]
        host_blocks = self.offload.find(digests)
        num_tokens = match.num_tokens + len(host_blocks) * block_size
        return Found(match, host_blocks, num_tokens)

    def admit(
        self, request: Request, found: Found, reserve_tokens: int, num_tokens: int
    ) -> list[int] | None:
        """Give a waiting request blocks for its first ``num_tokens`` tokens, those of ``found``
        first, and promise it ``reserve_tokens`` in all.

        Returns all its blocks in order, or None, with nothing changed, where there is no room.
        """
        match, request_id = found.match, request.request_id
        if self.caches:
            self.prefix_cache.lock(match)
        reserve_tokens = max(reserve_tokens, num_tokens)
        if not self.kv_cache.admit(request_id, reserve_tokens, match.block_ids):
            if self.caches:
                self.prefix_cache.unlock(match, used=False)
            return None
        if self.caches:
            self._held[request_id] = match
        if self._in_flight:
            shared = len(self._in_flight.intersection(match.block_ids))
            self.num_in_flight_tokens += shared * self.kv_cache.block_size
        self._claim(request_id, found)  # before room is made, which may fill the host tier
        added = self.kv_cache.allocate_slots(request_id, num_tokens)
        assert added is not None, "admission promised these slots"
        self.copies_in += zip(found.host_blocks, added, strict=False)
        return [*match.block_ids, *added]

    def _claim(self, request_id: str, found: Found) -> None:
        """The host blocks of ``found`` are read by this plan."""
        if found.swapped:
            self.offload.drop(request_id, num_read=len(found.host_blocks))
            del self._swapped[request_id]
        elif found.host_blocks:
            first = len(found.match.block_ids)
            self.offload.use(self._digests[request_id][first : first + len(found.host_blocks)])

    def grow(self, request: Request, num_tokens: int) -> list[int] | None:
        """Blocks added so that the request holds ``num_tokens`` tokens; None for want of room."""
        return self.kv_cache.allocate_slots(request.request_id, num_tokens)

    def publish(self, request: Request) -> None:
        """Offer the request's computed tokens to other requests. Their KV must be written."""
        self._publish(request, request.num_computed_tokens)

    def publish_planned(self, request: Request, num_tokens: int) -> None:
        """Offer what the request will have computed after the step being planned, its first
        ``num_tokens`` tokens, where the prefix cache does so; to requests of this step too.

        Of a prompt alone, and once nobody can be put back out of the plan any more. A layer writes
        the keys and values of all tokens of a step before any of them attends.
        """
        if self.prefix_cache.shares_in_flight:
            self._in_flight.update(
                self._publish(request, min(num_tokens, request.num_prompt_tokens))
            )

    def _publish(self, request: Request, num_tokens: int) -> list[int]:
        """Returns the blocks that the cache took."""
        if not self.caches:
            return []
        request_id = request.request_id
        held = self._held[request_id]
        num_blocks = num_tokens // self.kv_cache.block_size
        if num_blocks <= len(held.block_ids):
            return []
        blocks = self.kv_cache.block_ids(request_id)
        published = self.prefix_cache.insert(request, blocks, num_tokens, held)
        self._held[request_id] = published.match
        if published.taken:
            self.kv_cache.hand_over(request_id, published.taken)
            if self._tiered:
                digests = self._extend_digests(request, num_tokens)
                self._note_taken(digests, blocks, published.taken, len(held.block_ids))
        return published.taken

    def release(self, request: Request) -> None:
        """Free all that a request holds on the device; what it computed stays in the cache."""
        self.publish(request)
        if self.caches:
            self.prefix_cache.unlock(self._held.pop(request.request_id))
        self.kv_cache.free(request.request_id)

    def preempt(self, request: Request, to_host: bool) -> bool:
        """Release a request that will run again; returns whether its KV went to the host.

        Where the host tier is full, the KV is given up and computed again.
        """
        swapped = False
        num_tokens = request.num_computed_tokens
        if to_host and num_tokens:
            blocks = self.kv_cache.block_ids(request.request_id)
            blocks = blocks[: -(-num_tokens // self.kv_cache.block_size)]
            host = self.offload.swap_out(request.request_id, len(blocks))
            if host is not None:
                self.copies_out += zip(blocks, host, strict=True)
                self._swapped[request.request_id] = _Swapped(host, num_tokens)
                swapped = True
        self.release(request)
        return swapped

    def forget(self, request: Request) -> None:
        """A request has ended, wherever it stood; what it held on the device is released."""
        self.offload.drop(request.request_id)
        self._swapped.pop(request.request_id, None)
        self._digests.pop(request.request_id, None)

    def take_copies(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The copies of the plan that is now complete, out and in."""
        out, into = self.copies_out, self.copies_in
        if out or into:
            self.copies_out, self.copies_in = [], []
        self.has_unwritten = bool(self._in_flight)
        self._in_flight.clear()
        self.offload.step_planned()
        return out, into

    def clear_cached(self) -> None:
        """Forget every prefix that no running request reads, on the device and on the host."""
        self.clear_device()
        self.distrust_host()

    def clear_device(self) -> None:
        """Forget every prefix on the device that no running request reads."""
        self.has_unwritten = False
        blocks = self.prefix_cache.evict(self.prefix_cache.num_evictable)
        self.kv_cache.take_back(blocks)
        for block in blocks:
            self._digest_of.pop(block, None)

    def distrust_host(self) -> None:
        """Forget what the host tier holds: copies were planned that may not have run."""
        assert not self.copies_in, "a request that was just admitted counts on the host tier"
        self.copies_out.clear()  # to host blocks that hold nothing from now on
        self.offload.clear()
        self._swapped.clear()

    # -- books --------------------------------------------------------------------------------

    def usage(self, num_kv_tokens: int) -> KVUsage:
        """Slots now, where running requests have ``num_kv_tokens`` computed tokens, summed by
        request: tokens that several share are one token in use."""
        kv_cache = self.kv_cache
        return KVUsage(
            total_tokens=kv_cache.total_tokens,
            allocated_tokens=kv_cache.allocated_tokens(),
            used_tokens=self.num_distinct(num_kv_tokens),
        )

    def num_distinct(self, num_tokens: int) -> int:
        """Of tokens that running requests have or may come to, each counted with all of its own:
        the same with what several share counted once. In O(1)."""
        if not self.caches:
            return num_tokens
        locked = self.prefix_cache.num_blocks - self.prefix_cache.num_evictable
        return num_tokens + locked * self.kv_cache.block_size - self.kv_cache.num_shared_tokens

    def check_integrity(self, running: dict[str, Request]) -> None:
        """Raise AssertionError where the books contradict each other."""
        self.kv_cache.check_integrity()
        self.prefix_cache.check_integrity()
        self.offload.check_integrity()
        if self.caches:
            assert set(self._held) == set(running), "a lock without a request, or the reverse"
        if self._tiered:
            assert set(self._digest_of) == set(self.prefix_cache.block_ids())
        assert self._swapped.keys().isdisjoint(running), "a running request is swapped out"
        for pairs in (self.copies_out, self.copies_in):
            assert len({target for _, target in pairs}) == len(pairs), "a block is written twice"

    # -- the host tier ------------------------------------------------------------------------

    def _extend_digests(self, request: Request, num_tokens: int) -> list[bytes]:
        """Digests of the request's leading blocks: each covers all tokens up to its end, and what
        else their KV depends on. Cryptographic, since nothing else tells two contents apart."""
        digests = self._digests.setdefault(request.request_id, [])
        block_size = self.kv_cache.block_size
        num_blocks = num_tokens // block_size
        if num_blocks <= len(digests):
            return digests
        start = len(digests) * block_size
        data = array("q", request.token_ids[start : num_blocks * block_size]).tobytes()
        last = digests[-1] if digests else _digest(repr(request.extra_keys).encode())
        step = 8 * block_size
        for offset in range(0, len(data), step):
            last = _digest(last + data[offset : offset + step])
            digests.append(last)
        return digests

    def _note_taken(
        self, digests: list[bytes], blocks: list[int], taken: list[int], first: int
    ) -> None:
        """Note the digests of blocks that the cache took, none of which is before ``first``."""
        wanted = set(taken)
        for block, digest in zip(blocks[first:], digests[first:], strict=False):
            if block in wanted:
                self._digest_of[block] = digest

    def _note_evicted(self, blocks: list[int]) -> None:
        """Keep what the cache gives up, before the blocks are written again."""
        if not self._tiered:
            return
        for block in blocks:
            host = self.offload.keep(self._digest_of.pop(block))
            if host is not None:
                self.copies_out.append((block, host))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()
