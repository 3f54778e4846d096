"""Host time of the prefix caches for a 2,000-token prompt, one thread.

Of the cache alone: match, lock, publishing all whole blocks and unlock, with blocks from a plain
list. As the product runs it: ``find``, ``admit`` and ``release`` of ``KVSpace``, with blocks from
the paged manager. Outside, since it happens when a request arrives: ``prepare``; and since it
happens only when the pool is dry: ``evict``. Both have a figure of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.fake_runner import Choice, make_scheduler
from tests.helpers.prefix_model import CACHES, make_cache, make_request
from workbench.core.request import Request

SIZE = 16
NUM_TOKENS = 2_000
NUM_BLOCKS = NUM_TOKENS // SIZE
NUM_CACHED = 10_000  # blocks of block_hash, nodes of radix
TARGET_S = {"block_hash": 60e-6, "radix": 100e-6}
#: Hashing 2,000 tokens, or keeping them for the tree, once a request.
PREPARE_S = 200e-6
ROUNDS = 300


def prompt(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(32_000) for _ in range(num_tokens)]


class Pool:
    """A cache that holds ``NUM_CACHED`` blocks, or a tree of so many nodes, and free blocks."""

    def __init__(self, option: str) -> None:
        self.rng = random.Random(0)
        self.cache = make_cache(option, SIZE)
        self.free = list(range(12 * NUM_CACHED))
        while self.num_cached() < NUM_CACHED:
            start = prompt(self.rng, 4 * SIZE)
            for _ in range(10):
                self.serve(self.prepared(start + prompt(self.rng, 2 * SIZE)))
        self.num_blocks = self.cache.num_blocks  # of a tree, more than NUM_CACHED

    def num_cached(self) -> int:
        """Nodes of a tree, blocks of another cache."""
        nodes = getattr(self.cache, "_nodes", self.cache.block_ids)
        return sum(1 for _ in nodes())

    def shrink(self) -> None:
        """Give up what was cached since, so that every round meets the same."""
        self.free += self.cache.evict(max(0, self.cache.num_blocks - self.num_blocks))

    def prepared(self, tokens: list[int]) -> Request:
        request = make_request("r", tokens)
        self.cache.prepare(request)
        return request

    def serve(self, request: Request) -> None:
        """What the figure is about."""
        cache, free = self.cache, self.free
        match = cache.match(request)
        cache.lock(match)
        num_hit = len(match.block_ids)
        blocks = [*match.block_ids]
        for _ in range(-(-request.num_tokens // SIZE) - num_hit):
            blocks.append(free.pop())
        published = cache.insert(request, blocks, request.num_tokens, match)
        cache.unlock(published.match)
        free += blocks[num_hit + len(published.taken) :]


@pytest.fixture(scope="module")
def pools() -> Callable[[str], Pool]:
    made: dict[str, Pool] = {}

    def pool(option: str) -> Pool:
        if option not in made:
            made[option] = Pool(option)
        return made[option]

    return pool


@pytest.mark.parametrize("num_hit", [0, 1008, 1984])
@pytest.mark.parametrize("option", CACHES)
def test_match_lock_publish_unlock(
    benchmark: Any, pools: Callable[[str], Pool], option: str, num_hit: int
) -> None:
    pool = pools(option)
    shared = prompt(pool.rng, num_hit)
    if shared:
        pool.serve(pool.prepared(shared))

    def arrive() -> tuple[tuple[Request], dict[str, Any]]:
        if option == "block_hash":
            pool.shrink()
        return (pool.prepared(shared + prompt(pool.rng, NUM_TOKENS - num_hit)),), {}

    # The tree only grows, since giving up the same number of blocks would take many of its nodes.
    benchmark.pedantic(pool.serve, setup=arrive, rounds=ROUNDS, warmup_rounds=20)
    stats = benchmark.stats.stats
    benchmark.extra_info["median_us"] = 1e6 * stats.median
    assert stats.median < TARGET_S[option]


class Space:
    """The same over the scheduler's own parts."""

    def __init__(self, option: str) -> None:
        self.rng = random.Random(0)
        scheduler = make_scheduler(
            Choice(
                prefix_cache=option,
                eviction="lru",
                max_model_len=4096,
                pool_tokens=12 * NUM_CACHED * SIZE,
                settings={"kv_cache": {"block_size": SIZE}},
            )
        )
        self.space = scheduler.space
        self.cache: Any = scheduler.parts.prefix_cache
        nodes = getattr(self.cache, "_nodes", self.cache.block_ids)
        while sum(1 for _ in nodes()) < NUM_CACHED:
            start = prompt(self.rng, 4 * SIZE)
            for _ in range(10):
                self.serve(self.prepared(start + prompt(self.rng, 2 * SIZE)))

    def prepared(self, tokens: list[int]) -> Request:
        request = make_request(f"r{self.rng.random()}", tokens)
        self.space.prepare(request)
        return request

    def serve(self, request: Request, is_published: bool = True) -> None:
        """What the figure is about: found, given blocks, and let go again, published or not."""
        space, num_tokens = self.space, request.num_tokens
        found = space.find(request)
        assert space.admit(request, found, num_tokens, num_tokens) is not None
        request.num_computed_tokens = num_tokens if is_published else found.num_tokens
        space.release(request)


@pytest.mark.parametrize("num_hit", [0, 1008, 1984])
@pytest.mark.parametrize("is_published", [False, True])
@pytest.mark.parametrize("option", CACHES)
def test_find_admit_release(benchmark: Any, option: str, is_published: bool, num_hit: int) -> None:
    """The target is for finding, allocating and freeing; publishing what was computed may take as
    much again."""
    space = Space(option)
    shared = prompt(space.rng, num_hit)
    if shared:
        space.serve(space.prepared(shared))

    def arrive() -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = shared + prompt(space.rng, NUM_TOKENS - num_hit)
        return (space.prepared(tokens), is_published), {}

    benchmark.pedantic(space.serve, setup=arrive, rounds=ROUNDS, warmup_rounds=20)
    stats = benchmark.stats.stats
    benchmark.extra_info["median_us"] = 1e6 * stats.median
    assert stats.median < (1 + is_published) * TARGET_S[option]


@pytest.mark.parametrize("option", CACHES)
def test_prepare(benchmark: Any, pools: Callable[[str], Pool], option: str) -> None:
    """Once a request, when it arrives."""
    pool = pools(option)
    request = make_request("r", prompt(pool.rng, NUM_TOKENS))

    def prepare() -> None:
        request.prefix_key = None
        pool.cache.prepare(request)

    benchmark(prepare)
    assert benchmark.stats.stats.median < PREPARE_S


@pytest.mark.parametrize("option", CACHES)
def test_match_length_of_a_cached_prompt(
    benchmark: Any, pools: Callable[[str], Pool], option: str
) -> None:
    pool = pools(option)
    request = pool.prepared(prompt(pool.rng, NUM_TOKENS))
    pool.serve(request)
    assert benchmark(pool.cache.match_length, request) == (NUM_BLOCKS - 1) * SIZE


@pytest.mark.parametrize("option", CACHES)
def test_evict_a_prompt(benchmark: Any, pools: Callable[[str], Pool], option: str) -> None:
    """As many blocks as the prompt has, least recently used first."""
    pool = pools(option)

    def fill() -> tuple[tuple[int], dict[str, Any]]:
        pool.serve(pool.prepared(prompt(pool.rng, NUM_TOKENS)))
        return (NUM_BLOCKS,), {}

    def evict(num_blocks: int) -> None:
        pool.free += pool.cache.evict(num_blocks)

    benchmark.pedantic(evict, setup=fill, rounds=ROUNDS, warmup_rounds=20)
