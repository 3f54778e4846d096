"""A prefix cache in its plainest form, and random traffic that holds a real one against it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.engines import component
from workbench.core.request import Request
from workbench.core.sampling import SamplingParams
from workbench.slots.prefix_cache import PrefixCache, PrefixMatch

#: A prefix: extra keys, and all tokens up to the end of a block.
Prefix = tuple[tuple[str, ...], tuple[int, ...]]
CACHES = ("block_hash", "radix")
EXTRA_KEYS: tuple[tuple[str, ...], ...] = ((), ("a",), ("b",), ("a", "b"), ("ab",))


def make_cache(option: str, block_size: int, eviction: str = "lru") -> Any:
    """A cache as the assembly builds it."""
    order = component("eviction", eviction)
    return component("prefix_cache", option, block_size=block_size, eviction=order)


def make_request(
    name: str, tokens: list[int], extra_keys: tuple[str, ...] = (), priority: int = 0
) -> Request:
    """A request with a prompt."""
    request = Request(name, list(tokens), SamplingParams(max_tokens=64), extra_keys=extra_keys)
    request.priority = priority
    return request


def grow(request: Request, tokens: list[int]) -> None:
    """Append output tokens."""
    request.output_token_ids += tokens
    request.num_tokens += len(tokens)


@dataclass
class Remembered:
    """What an order of eviction may ask of one block."""

    inserted: int
    priority: int
    last_used: int = 0
    num_hits: int = 0


@dataclass
class Model:
    """A plain dictionary from prefix to block; everything else is computed from scratch."""

    block_size: int
    eviction: str
    blocks: dict[Prefix, int] = field(default_factory=dict)
    memory: dict[Prefix, Remembered] = field(default_factory=dict)
    locks: Counter[Prefix] = field(default_factory=Counter)
    spares: list[int] = field(default_factory=list)
    now: int = 0

    def prefixes(self, request: Request, num_tokens: int) -> list[Prefix]:
        """By block, as far as the tokens fill whole ones."""
        ids, size = tuple(request.token_ids), self.block_size
        return [(request.extra_keys, ids[: i * size]) for i in range(1, num_tokens // size + 1)]

    def locked(self) -> set[Prefix]:
        """Every prefix that a lock keeps: those that were locked, and all that lead to them."""
        return {
            (extra, tokens[:end])
            for extra, tokens in +self.locks
            for end in range(self.block_size, len(tokens) + 1, self.block_size)
        }

    def match(self, request: Request) -> list[int]:
        found = []
        for prefix in self.prefixes(request, request.num_tokens - 1):
            if prefix not in self.blocks:
                break
            found.append(self.blocks[prefix])
        return found

    def lock(self, request: Request, num_blocks: int) -> None:
        self.now += 1
        held = self.prefixes(request, num_blocks * self.block_size)
        for prefix in held:
            self.memory[prefix].num_hits += 1
            self.memory[prefix].priority = max(self.memory[prefix].priority, request.priority)
        if held:
            self.locks[held[-1]] += 1

    def unlock(self, request: Request, num_blocks: int) -> None:
        self.now += 1
        if num_blocks:
            before = self.locked()
            self.locks[self.prefixes(request, num_blocks * self.block_size)[-1]] -= 1
            for prefix in before - self.locked():
                self.memory[prefix].last_used = self.now

    def insert(
        self, request: Request, block_ids: list[int], num_tokens: int, num_held: int
    ) -> list[int]:
        """Returns the blocks that were taken."""
        self.now += 1
        taken = []
        locked = self.locked()
        prefixes = self.prefixes(request, num_tokens)
        for prefix, block in list(zip(prefixes, block_ids, strict=False))[num_held:]:
            if prefix in self.blocks:
                memory = self.memory[prefix]
                memory.priority = max(memory.priority, request.priority)
                if prefix in locked:
                    continue
                self.spares.append(self.blocks[prefix])
            else:
                self.memory[prefix] = Remembered(self.now, request.priority)
            self.blocks[prefix] = block
            taken.append(block)
        if len(prefixes) > num_held:
            self.locks[prefixes[-1]] += 1
            if num_held:
                self.locks[prefixes[num_held - 1]] -= 1
        return taken

    def owned(self) -> list[int]:
        return [*self.blocks.values(), *self.spares]

    def evictable(self) -> set[Prefix]:
        return set(self.blocks) - self.locked()

    def _sort_key(self, prefix: Prefix) -> Any:
        memory = self.memory[prefix]
        return {
            "lru": memory.last_used,
            "lfu": (memory.num_hits, memory.last_used),
            "fifo": memory.inserted,
            "priority": (memory.priority, memory.last_used),
        }[self.eviction]

    def leaves(self) -> list[Prefix]:
        """Unlocked prefixes that nothing continues, in the order of eviction."""
        parents = {(extra, tokens[: -self.block_size]) for extra, tokens in self.blocks}
        return sorted(self.evictable() - parents, key=self._sort_key)

    def drop(self, prefix: Prefix) -> int:
        del self.memory[prefix]
        return self.blocks.pop(prefix)

    def evict(self, num_blocks: int) -> list[int]:
        """Spares first (the last one made first), then one leaf after the other."""
        freed = [self.spares.pop() for _ in range(min(num_blocks, len(self.spares)))]
        while len(freed) < num_blocks and self.evictable():
            freed.append(self.drop(self.leaves()[0]))
        return freed

    def accept(self, freed: list[int], num_blocks: int) -> None:
        """Follow an eviction of any order, as long as children go first and locks hold."""
        spares = [self.spares.pop() for _ in range(min(num_blocks, len(self.spares)))]
        assert freed[: len(spares)] == spares, "spares go first"
        prefix_of = {block: prefix for prefix, block in self.blocks.items()}
        for block in freed[len(spares) :]:
            assert block in prefix_of, "a block was given up that is not cached, or twice"
            assert prefix_of[block] in self.leaves(), "a block was given up that something needs"
            self.drop(prefix_of[block])
        assert len(freed) == num_blocks or not self.evictable(), "too few were given up"


@dataclass
class Running:
    """A request that holds blocks, and what it has locked in the cache."""

    request: Request
    blocks: list[int]
    held: PrefixMatch
    own: set[int]


class Traffic:
    """Random life of requests over one pool, played to a cache and to the model alike.

    Parameters
    ----------
    exact_order
        Whether evictions must come block for block as the model says, or only be allowed.
    """

    def __init__(
        self, option: str, block_size: int, eviction: str, seed: int, exact_order: bool = True
    ) -> None:
        self.rng = random.Random(seed)
        self.block_size = block_size
        self.num_blocks = 40
        self.cache: PrefixCache = make_cache(option, block_size, eviction)
        self.model = Model(block_size, eviction)
        self.exact_order = exact_order
        self.free = list(range(self.num_blocks))
        self.running: list[Running] = []
        self.known: list[list[int]] = []  # what later prompts may begin with
        self.seen: Counter[str] = Counter()

    # -- operations ---------------------------------------------------------------------------

    def step(self) -> None:
        """One random operation, and all books afterwards."""
        actions = {
            self._arrive: 6,
            self._compute: 12 if self.running else 0,
            self._finish: 3 if self.running else 0,
            self._abort: 1 if self.running else 0,
            self._preempt: 2 if self.running else 0,
            self._evict_some: 1,
            self._look: 2,
        }
        self.rng.choices(list(actions), list(actions.values()))[0]()
        self.check()

    def _extend(self, tokens: list[int], count: int) -> list[int]:
        """Tokens that mostly repeat within a block, so that different requests meet again."""
        for _ in range(count):
            repeats = len(tokens) % self.block_size and self.rng.random() < 0.98
            tokens.append(tokens[-1] if repeats else self.rng.randrange(3))
        return tokens

    def new_request(self) -> Request:
        tokens: list[int] = []
        if self.known and self.rng.random() < 0.8:
            old = self.rng.choice(self.known)
            tokens = old[: self.rng.randint(1, len(old))]
        self._extend(tokens, self.rng.randint(not tokens, 4 * self.block_size))
        del tokens[9 * self.block_size :]
        extra = self.rng.choice(EXTRA_KEYS) if self.rng.random() < 0.5 else ()
        self.known = [*self.known[-20:], tokens]
        name = f"r{self.seen['requests']}"
        self.seen["requests"] += 1
        return make_request(name, tokens, extra, priority=self.rng.randint(0, 3))

    def _looked_up(self, request: Request) -> PrefixMatch:
        match = self.cache.match(request)
        assert list(match.block_ids) == self.model.match(request)
        assert match.num_tokens == len(match.block_ids) * self.block_size < request.num_tokens
        assert (match.entry is None) == (not match.block_ids)
        assert self.cache.match_length(request) == match.num_tokens
        return match

    def _look(self) -> None:
        request = self.new_request()
        self.cache.prepare(request)
        self._looked_up(request)

    def _arrive(self) -> None:
        request = self.new_request()
        self.cache.prepare(request)
        self._start(request)

    def _start(self, request: Request) -> None:
        match = self._looked_up(request)
        self.cache.lock(match)
        self.model.lock(request, len(match.block_ids))
        missing = -(-request.num_tokens // self.block_size) - len(match.block_ids)
        if missing > len(self.free) + self.cache.num_evictable or len(self.running) > 5:
            self.cache.unlock(match)
            self.model.unlock(request, len(match.block_ids))
            self.seen["refused"] += 1
            return
        blocks = self._allocate(missing)
        self.running.append(Running(request, [*match.block_ids, *blocks], match, set(blocks)))
        request.num_computed_tokens = match.num_tokens
        self.seen["hits"] += len(match.block_ids)

    def _allocate(self, count: int) -> list[int]:
        if count > len(self.free):
            self._evict(count - len(self.free))
        return [self.free.pop() for _ in range(count)]

    def _compute(self) -> None:
        """Run some tokens of a request; sometimes publish, sometimes only later."""
        running = self.rng.choice(self.running)
        request = running.request
        left = request.num_tokens - request.num_computed_tokens
        request.num_computed_tokens += self.rng.randint(1, left)
        if request.num_computed_tokens == request.num_tokens:
            num_blocks = -(-(request.num_tokens + 1) // self.block_size)
            if num_blocks > len(running.blocks):
                if (not self.free and not self.cache.num_evictable) or num_blocks > 12:
                    return self._end(running)
                blocks = self._allocate(1)
                running.blocks += blocks
                running.own.update(blocks)
            grow(request, self._extend(request.token_ids, 1)[-1:])
        if self.rng.random() < 0.7:
            self._publish(running)

    def _publish(self, running: Running) -> None:
        request, num_held = running.request, len(running.held.block_ids)
        num_tokens = request.num_computed_tokens
        evictable = self.cache.num_evictable
        published = self.cache.insert(request, list(running.blocks), num_tokens, running.held)
        expected = self.model.insert(request, running.blocks, num_tokens, num_held)
        assert published.taken == expected
        assert set(expected) <= running.own, "a block was taken that is not the request's"
        running.own -= set(expected)
        running.held = published.match
        num_held = max(num_held, num_tokens // self.block_size)
        prefixes = self.model.prefixes(request, num_held * self.block_size)
        assert list(published.match.block_ids) == [self.model.blocks[p] for p in prefixes]
        assert published.match.num_tokens == num_held * self.block_size
        assert self.cache.num_evictable == evictable, "publishing locked what nobody reserved"
        self.seen["taken"] += len(expected)
        self.seen["spares"] += len(self.model.spares)

    def _drop(self, running: Running) -> None:
        self.running.remove(running)
        self.cache.unlock(running.held)
        self.model.unlock(running.request, len(running.held.block_ids))
        self.free += sorted(running.own)

    def _end(self, running: Running) -> None:
        self._publish(running)
        self._drop(running)
        self.known.append(running.request.token_ids)

    def _finish(self) -> None:
        self._end(self.rng.choice(self.running))

    def _abort(self) -> None:
        self._drop(self.rng.choice(self.running))
        self.seen["aborted"] += 1

    def _preempt(self) -> None:
        """Release a request, and start it again with its output among the known tokens."""
        running = self.rng.choice(self.running)
        self._end(running)
        before = running.request.num_prompt_tokens // self.block_size
        self._start(running.request)
        if self.running and self.running[-1].request is running.request:
            self.seen["own output"] += len(self.running[-1].held.block_ids) > before

    def _evict_some(self) -> None:
        self._evict(self.rng.randint(0, 6))

    def _evict(self, count: int) -> None:
        in_use = {block for running in self.running for block in running.blocks}
        freed = self.cache.evict(count)
        if self.exact_order:
            assert freed == self.model.evict(count)
        else:
            self.model.accept(freed, count)
        assert in_use.isdisjoint(freed), "a block was given up that a request reads"
        self.free += freed
        self.seen["evicted"] += len(freed)

    # -- books --------------------------------------------------------------------------------

    def check(self) -> None:
        cache, model = self.cache, self.model
        cache.check_integrity()
        cached = cache.block_ids()
        assert sorted(cached) == sorted(model.owned())
        assert cache.num_blocks == len(cached)
        assert cache.num_evictable == len(model.evictable()) + len(model.spares)
        owned = [block for running in self.running for block in running.own]
        assert sorted([*self.free, *owned, *cached]) == list(range(self.num_blocks))

    def drain(self) -> None:
        """End all requests and give up everything: nothing may be left."""
        while self.running:
            self._finish()
            self.check()
        assert self.cache.num_evictable == self.cache.num_blocks
        self._evict(self.num_blocks)
        self.check()
        assert self.cache.num_blocks == 0
        assert sorted(self.free) == list(range(self.num_blocks))
