"""Contract of slot ``prefix_cache``, over every cache, block size and order of eviction."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.engines import component
from tests.helpers.prefix_model import (
    CACHES,
    EXTRA_KEYS,
    Traffic,
    grow,
    make_cache,
    make_request,
)
from workbench.configuration import options_of
from workbench.core.errors import ConfigError
from workbench.core.request import Request
from workbench.slots.eviction import CacheEntry
from workbench.slots.prefix_cache import PrefixCache, PrefixMatch

BLOCK_SIZES = (1, 4, 16)
ORDERS = [name for name in options_of("engine/eviction") if name != "none"]
EVERY_CACHE = pytest.mark.parametrize("option", CACHES)
EVERY_SIZE = pytest.mark.parametrize("size", BLOCK_SIZES)


def tokens(num_tokens: int, first: int = 10) -> list[int]:
    return list(range(first, first + num_tokens))


def publish(
    cache: PrefixCache, request: Request, block_ids: list[int], num_tokens: int | None = None
) -> PrefixMatch:
    """Look a request up, lock what is found, and publish its tokens, all by default."""
    cache.prepare(request)
    match = cache.match(request)
    cache.lock(match)
    count = request.num_tokens if num_tokens is None else num_tokens
    return cache.insert(request, block_ids, count, match).match


def found(cache: PrefixCache, request: Request) -> PrefixMatch:
    cache.prepare(request)
    return cache.match(request)


def test_every_option_is_tested() -> None:
    assert {*CACHES, "none"} == set(options_of("engine/prefix_cache"))
    assert "lru" in ORDERS


# -- random traffic against a plain dictionary ----------------------------------------------------


@pytest.mark.parametrize(
    ("size", "eviction"),
    [(size, order) for order in ORDERS for size in BLOCK_SIZES if order == "lru" or size == 4],
)
@EVERY_CACHE
def test_random_traffic_agrees_with_the_model(option: str, size: int, eviction: str) -> None:
    """Ten thousand operations under LRU at every block size, fewer at one under the other orders;
    block for block, but where an order is asked of nodes."""
    num_operations = 10_000 if eviction == "lru" else 2_500
    exact = eviction == "lru" or option == "block_hash"
    traffic = Traffic(option, size, eviction, seed=size, exact_order=exact)
    for _ in range(num_operations):
        traffic.step()
    kinds = ("hits", "taken", "evicted", "spares", "refused", "aborted", "own output")
    assert all(traffic.seen[kind] for kind in kinds), "traffic missed a case"
    counters = traffic.cache.counters()
    assert counters["inserted_blocks"] == traffic.seen["taken"]
    assert counters["evicted_blocks"] == traffic.seen["evicted"]
    assert counters["hit_tokens"] == counters["hit_blocks"] * size
    assert counters["hit_tokens"] < counters["queried_tokens"]
    traffic.drain()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("page", "size"), [(1, 1), (1, 4), (4, 4), (1, 16), (4, 16), (16, 16)])
def test_radix_never_finds_less_than_block_hash(page: int, size: int, seed: int) -> None:
    """On the same traffic, nothing evicted, and pages no longer than blocks."""
    source = Traffic("radix", size, "lru", seed)
    radix, blocks = make_cache("radix", page), make_cache("block_hash", size)
    num_blocks = 0
    lengths = []
    for _ in range(150):
        request = source.new_request()
        twin = make_request(request.request_id, request.prompt_token_ids, request.extra_keys)
        pair = found(radix, request), found(blocks, twin)
        assert pair[0].num_tokens >= pair[1].num_tokens
        lengths.append(pair[1].num_tokens)
        fresh = list(range(num_blocks, num_blocks + request.num_tokens))
        num_blocks += request.num_tokens
        radix.unlock(publish(radix, request, fresh))
        blocks.unlock(publish(blocks, twin, fresh))
    assert radix.num_evictable == radix.num_blocks
    assert any(lengths)


# -- what a match is ------------------------------------------------------------------------------


@EVERY_SIZE
@EVERY_CACHE
class TestMatch:
    def test_unknown_prompt_matches_nothing(self, option: str, size: int) -> None:
        cache = make_cache(option, size)
        match = found(cache, make_request("r", tokens(5 * size)))
        assert (match.block_ids, match.num_tokens, match.entry) == ((), 0, None)
        cache.check_integrity()

    def test_one_token_is_left_to_run(self, option: str, size: int) -> None:
        cache = make_cache(option, size)
        publish(cache, make_request("r", tokens(3 * size)), [7, 8, 9])
        for num_tokens in range(1, 5 * size):
            request = make_request("again", tokens(num_tokens))
            match = found(cache, request)
            expected = [7, 8, 9][: (num_tokens - 1) // size]
            assert list(match.block_ids) == expected
            assert match.num_tokens == len(expected) * size < num_tokens
            assert cache.match_length(request) == match.num_tokens

    def test_part_of_a_block_is_never_published(self, option: str, size: int) -> None:
        cache = make_cache(option, size)
        for written in range(3 * size + 1):
            publish(cache, make_request("r", tokens(4 * size)), [7, 8, 9, 3], written)
            assert cache.num_blocks == written // size
        other = make_request("again", tokens(4 * size))
        assert found(cache, other).num_tokens == 3 * size
        cache.check_integrity()

    def test_first_different_token_ends_it(self, option: str, size: int) -> None:
        cache = make_cache(option, size)
        publish(cache, make_request("r", tokens(6 * size)), list(range(6)))
        for place in range(6 * size):
            ids = tokens(6 * size + 1)
            ids[place] += 1000
            assert found(cache, make_request("x", ids)).num_tokens == place // size * size

    def test_output_is_matched_too(self, option: str, size: int) -> None:
        """As a pre-empted request asks, whose prompt was keyed before it had any output."""
        cache = make_cache(option, size)
        request = make_request("r", tokens(2 * size + size // 2))
        held = publish(cache, request, [0, 1])
        grow(request, tokens(3 * size, first=500))
        held = cache.insert(request, [0, 1, 2, 3, 4], 5 * size, held).match
        cache.unlock(held)
        assert cache.match(request).num_tokens == (request.num_tokens - 1) // size * size
        follow_up = make_request("next turn", [*request.token_ids, 3, 4])
        assert found(cache, follow_up).num_tokens == 5 * size
        cache.check_integrity()

    def test_extra_keys_are_other_roots(self, option: str, size: int) -> None:
        """Two tenants with different salts never share a block, whatever their prompts."""
        cache = make_cache(option, size)
        blocks: dict[tuple[str, ...], set[int]] = {}
        for index, extra in enumerate(EXTRA_KEYS):
            mine = list(range(10 * index, 10 * index + 4))
            request = make_request("r", tokens(4 * size + 1), extra)
            assert found(cache, request).num_tokens == 0
            cache.unlock(publish(cache, request, mine))
            blocks[extra] = set(mine)
        for extra in EXTRA_KEYS:
            match = found(cache, make_request("again", tokens(4 * size + 1), extra))
            assert set(match.block_ids) == blocks[extra]
        cache.check_integrity()


# -- what a lock keeps ----------------------------------------------------------------------------


@EVERY_SIZE
@EVERY_CACHE
class TestLocks:
    def test_locked_blocks_are_never_given_up(self, option: str, size: int) -> None:
        cache = make_cache(option, size)
        cache.unlock(publish(cache, make_request("r", tokens(4 * size)), [0, 1, 2, 3]))
        match = found(cache, make_request("reads two", tokens(2 * size + 1)))
        cache.lock(match)
        cache.lock(match)
        assert cache.num_evictable == 2
        assert cache.evict(10) == [3, 2]
        assert cache.evict(10) == []
        cache.unlock(match)
        assert cache.num_evictable == 0
        cache.unlock(match)
        assert cache.evict(10) == [1, 0]
        assert (cache.num_blocks, cache.num_evictable) == (0, 0)
        cache.check_integrity()

    def test_tail_goes_first_and_only_what_is_asked_for(self, option: str, size: int) -> None:
        cache = make_cache(option, size)
        cache.unlock(publish(cache, make_request("r", tokens(5 * size)), [9, 8, 7, 6, 5]))
        assert [cache.evict(n) for n in (0, 1, 2, 0, 5)] == [[], [5], [6, 7], [], [8, 9]]
        cache.check_integrity()

    def test_a_fork_keeps_what_it_shares(self, option: str, size: int) -> None:
        cache = make_cache(option, size)
        shared = tokens(2 * size)
        first = publish(cache, make_request("a", shared + tokens(size, 100)), [0, 1, 2])
        second = publish(cache, make_request("b", shared + tokens(size, 200)), [0, 1, 3])
        assert second.block_ids == (0, 1, 3)
        assert cache.num_blocks == 4
        cache.unlock(first)
        assert cache.evict(10) == [2]
        cache.unlock(second)
        assert cache.evict(10) == [3, 1, 0]

    def test_publishing_moves_the_lock_with_the_request(self, option: str, size: int) -> None:
        """In pieces, as its KV is written; nothing of it can be given up meanwhile."""
        cache = make_cache(option, size)
        request = make_request("r", tokens(6 * size))
        cache.prepare(request)
        held = cache.match(request)
        cache.lock(held)
        for written in range(0, 6 * size + 1, max(1, size // 2)):
            published = cache.insert(request, list(range(6)), written, held)
            held = published.match
            assert held.block_ids == tuple(range(written // size))
            assert cache.evict(10) == []
        cache.unlock(held)
        assert cache.evict(10) == [5, 4, 3, 2, 1, 0]

    def test_nothing_new_changes_nothing(self, option: str, size: int) -> None:
        cache = make_cache(option, size)
        request = make_request("r", tokens(3 * size))
        held = publish(cache, request, [0, 1, 2], 2 * size)
        again = cache.insert(request, [0, 1, 2], 3 * size - 1, held)
        assert (again.match.block_ids, again.taken) == ((0, 1), [])
        cache.unlock(again.match)
        assert cache.num_evictable == 2


@EVERY_SIZE
@EVERY_CACHE
class TestPublishedTwice:
    """Two requests that began with the same prompt before either had written it."""

    def start(self, cache: PrefixCache, size: int) -> tuple[list[Request], list[PrefixMatch]]:
        requests = [make_request(name, tokens(3 * size + 1)) for name in ("a", "b")]
        matches = []
        for request in requests:
            cache.prepare(request)
            matches.append(cache.match(request))
            cache.lock(matches[-1])
        return requests, matches

    def test_while_the_first_runs_the_second_keeps_its_copy(self, option: str, size: int) -> None:
        cache = make_cache(option, size)
        (a, b), (held_a, held_b) = self.start(cache, size)
        first = cache.insert(a, [0, 1, 2], 3 * size, held_a)
        second = cache.insert(b, [5, 6, 7], 3 * size, held_b)
        assert (first.taken, second.taken) == ([0, 1, 2], [])
        assert second.match.block_ids == (0, 1, 2)
        cache.unlock(first.match)
        assert cache.evict(9) == []
        cache.unlock(second.match)
        assert cache.evict(9) == [2, 1, 0]

    def test_after_the_first_ended_the_second_replaces_it(self, option: str, size: int) -> None:
        """A lock on blocks that nobody reserved would break promises made at admission."""
        cache = make_cache(option, size)
        (a, b), (held_a, held_b) = self.start(cache, size)
        cache.unlock(cache.insert(a, [0, 1, 2], 3 * size, held_a).match)
        second = cache.insert(b, [5, 6, 7], 2 * size, held_b)
        assert second.taken == [5, 6]
        assert second.match.block_ids == (5, 6)
        assert (cache.num_blocks, cache.num_evictable) == (5, 3)
        cache.check_integrity()
        assert found(cache, make_request("c", tokens(3 * size + 1))).block_ids == (5, 6, 2)
        assert sorted(cache.evict(9)) == [0, 1, 2]
        cache.unlock(second.match)
        assert cache.evict(9) == [6, 5]


# -- the order of eviction ------------------------------------------------------------------------


@EVERY_CACHE
@pytest.mark.parametrize(
    ("eviction", "expected"),
    [("lru", "bdca"), ("lfu", "dbca"), ("fifo", "abcd"), ("priority", "bacd")],
)
def test_order_of_eviction(option: str, eviction: str, expected: str) -> None:
    """Four prompts of two blocks, used differently."""
    cache = make_cache(option, 4, eviction)

    def ask(name: str, priority: int = 0) -> None:
        place = "abcd".index(name)
        request = make_request(name, tokens(9, first=100 * place), priority=priority)
        cache.unlock(publish(cache, request, [2 * place, 2 * place + 1, 99]))

    for name, priority in [("a", 0), ("b", 0), ("c", 1), ("d", 2)]:
        ask(name, priority)
    ask("b")
    for name in ("c", "a", "a"):  # hits: a 2, b 1, c 1, d 0
        ask(name)
    if eviction in {"lru", "priority"}:  # ... and last used: b, d, c, a
        for name in ("b", "d", "c", "a"):
            ask(name)
    freed = cache.evict(8)
    assert "".join("abcd"[block // 2] for block in freed[::2]) == expected
    assert all(tail == head + 1 for tail, head in zip(freed[::2], freed[1::2], strict=True))


@pytest.mark.parametrize("option", options_of("engine/eviction"))
def test_priorities_of_every_order_compare(option: str) -> None:
    eviction = component("eviction", option)
    entries = [
        CacheEntry(a, b, c, d) for a in (1, 2) for b in (0, 3) for c in (1, 2) for d in (0, 5)
    ]
    before = [str(entry) for entry in entries]
    assert len(sorted(eviction.priority(entry) for entry in entries)) == len(entries)
    assert [str(entry) for entry in entries] == before


# -- counters and errors --------------------------------------------------------------------------


@EVERY_CACHE
class TestCounters:
    def test_a_match_counts_once_it_is_used(self, option: str) -> None:
        cache = make_cache(option, 4)
        cache.unlock(publish(cache, make_request("a", tokens(9)), [0, 1, 2]))
        cache.reset_counters()
        request = make_request("b", tokens(11))
        match = found(cache, request)
        assert cache.match_length(request) == 8
        assert not any(v for k, v in cache.counters().items() if k != "cached_blocks")
        cache.lock(match)
        expected = {"lookups": 1, "hits": 1, "queried_tokens": 11, "hit_tokens": 8, "hit_blocks": 2}
        assert {name: cache.counters()[name] for name in expected} == expected
        cache.lock(found(cache, make_request("miss", tokens(6, first=50))))
        counters = cache.counters()
        assert (counters["lookups"], counters["hits"], counters["queried_tokens"]) == (2, 1, 17)

    def test_a_lock_of_no_lookup_counts_nothing(self, option: str) -> None:
        """As for a request whose KV came back from elsewhere."""
        cache = make_cache(option, 4)
        cache.lock(PrefixMatch())
        cache.unlock(PrefixMatch())
        assert not any(cache.counters().values())

    def test_what_was_not_used_is_taken_back(self, option: str) -> None:
        cache = make_cache(option, 4, "lfu")
        cache.unlock(publish(cache, make_request("a", tokens(9)), [0, 1, 2]))
        cache.unlock(publish(cache, make_request("b", tokens(9, first=50)), [3, 4, 5]))
        used = found(cache, make_request("b", tokens(9, first=50)))
        cache.lock(used)
        cache.unlock(used)
        before = cache.counters()
        for _ in range(5):
            match = found(cache, make_request("a", tokens(9)))
            cache.lock(match)
            cache.unlock(match, used=False)
        assert {k: v for k, v in cache.counters().items() if k != "node_splits"} == {
            k: v for k, v in before.items() if k != "node_splits"
        }
        assert cache.evict(2) == [1, 0], "a request that did not start is no hit"

    def test_reset_leaves_what_is_held(self, option: str) -> None:
        cache = make_cache(option, 4)
        publish(cache, make_request("a", tokens(9)), [0, 1, 2])
        assert cache.counters()["inserted_blocks"] == 2
        cache.reset_counters()
        counters = cache.counters()
        assert counters.pop("cached_blocks") == 2
        assert not any(counters.values())


@EVERY_CACHE
class TestErrors:
    def test_a_cache_without_an_order_of_eviction(self, option: str) -> None:
        with pytest.raises(ConfigError, match=r"engine/eviction=lru"):
            make_cache(option, 4, "none")

    @pytest.mark.parametrize("size", [0, -1])
    def test_block_size(self, option: str, size: int) -> None:
        with pytest.raises(ConfigError, match=rf"block_size={size} must be 1 or more"):
            make_cache(option, size)

    def test_a_match_from_before_an_eviction_is_found_out(self, option: str) -> None:
        cache = make_cache(option, 4)
        cache.unlock(publish(cache, make_request("a", tokens(9)), [0, 1, 2]))
        match = found(cache, make_request("b", tokens(9)))
        cache.evict(1)
        with pytest.raises(AssertionError, match="before an eviction"):
            cache.lock(match)


# -- the null object ------------------------------------------------------------------------------


def test_null_object_remembers_nothing() -> None:
    order = component("eviction", "none")
    cache: Any = component("prefix_cache", "none", block_size=4, eviction=order)
    assert not cache.shares_blocks
    request = make_request("r", tokens(12))
    cache.prepare(request)
    assert request.prefix_key is None
    match = cache.match(request)
    assert (match.block_ids, match.num_tokens, match.entry) == ((), 0, None)
    cache.lock(match)
    published = cache.insert(request, [0, 1, 2], 12, match)
    assert (published.match, published.taken) == (match, [])
    cache.unlock(published.match)
    assert cache.match_length(request) == 0
    assert cache.evict(3) == [] == cache.block_ids()
    assert (cache.num_blocks, cache.num_evictable) == (0, 0)
    cache.check_integrity()
