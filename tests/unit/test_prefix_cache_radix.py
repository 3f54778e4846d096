"""The radix tree: what is a node, when one is split, grows or is trimmed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.prefix_model import grow, make_cache, make_request
from workbench.core.request import Request
from workbench.slots.prefix_cache import PrefixMatch

SIZE = 4


@pytest.fixture
def cache() -> Any:
    return make_cache("radix", SIZE)


def runs(cache: Any) -> list[list[int]]:
    """Blocks of each node, sorted."""
    cache.check_integrity()
    return sorted(node.blocks for node in cache._nodes())


def hold(cache: Any, request: Request, block_ids: list[int]) -> PrefixMatch:
    cache.prepare(request)
    match = cache.match(request)
    cache.lock(match)
    blocks = [*match.block_ids, *block_ids[len(match.block_ids) :]]
    held: PrefixMatch = cache.insert(request, blocks, request.num_tokens, match).match
    return held


def test_a_prompt_is_one_node(cache: Any) -> None:
    hold(cache, make_request("r", list(range(20))), [0, 1, 2, 3, 4])
    assert runs(cache) == [[0, 1, 2, 3, 4]]


def test_a_run_is_split_where_two_prompts_part(cache: Any) -> None:
    cache.unlock(hold(cache, make_request("a", list(range(20))), [0, 1, 2, 3, 4]))
    other = [*range(10), *range(50, 60)]  # they part inside the third block
    cache.unlock(hold(cache, make_request("b", other), [0, 1, 7, 8, 9]))
    assert runs(cache) == [[0, 1], [2, 3, 4], [7, 8, 9]]
    assert cache.counters()["node_splits"] == 1


def test_a_run_is_split_where_a_used_prefix_ends(cache: Any) -> None:
    cache.unlock(hold(cache, make_request("a", list(range(20))), [0, 1, 2, 3, 4]))
    request = make_request("b", list(range(9)))
    cache.prepare(request)
    match = cache.match(request)
    assert runs(cache) == [[0, 1, 2, 3, 4]], "looking up changes nothing"
    cache.lock(match)
    assert runs(cache) == [[0, 1], [2, 3, 4]]
    assert cache.num_evictable == 3
    cache.unlock(match)
    assert cache.num_evictable == 5


def test_a_handle_on_a_run_outlives_its_splits(cache: Any) -> None:
    """Requests that hold the whole, and less and less of it, let go in any order."""
    whole = hold(cache, make_request("a", list(range(20))), [0, 1, 2, 3, 4])
    held = []
    for num_blocks in (3, 1, 2, 4):
        request = make_request("b", list(range(num_blocks * SIZE + 1)))
        cache.prepare(request)
        held.append(cache.match(request))
    for match in held:  # all were looked up before the first split
        cache.lock(match)
        cache.check_integrity()
    assert runs(cache) == [[0], [1], [2], [3], [4]]
    cache.unlock(whole)
    assert cache.evict(9) == [4]
    expected = [[], [], [], [3, 2, 1, 0]]
    for match, freed in zip(held, expected, strict=True):
        cache.unlock(match)
        assert cache.evict(9) == freed
        cache.check_integrity()


def test_a_request_that_goes_on_alone_grows_its_node(cache: Any) -> None:
    """A long output is not a chain of nodes of one block each."""
    request = make_request("r", list(range(9)))
    held = hold(cache, request, [0, 1, 2])
    for step in range(2, 40):
        grow(request, [step] * SIZE)
        held = cache.insert(request, list(range(40)), (step + 1) * SIZE, held).match
        assert runs(cache) == [list(range(step + 1))]
    cache.unlock(held)
    assert cache.evict(40) == list(range(39, -1, -1))


def test_a_node_that_others_read_does_not_grow(cache: Any) -> None:
    """Their lock would keep what they never read."""
    request = make_request("r", list(range(8)))
    held = hold(cache, request, [0, 1])
    reader = make_request("reader", list(range(9)))
    cache.prepare(reader)
    read = cache.match(reader)
    cache.lock(read)
    grow(request, list(range(8, 16)))
    held = cache.insert(request, [0, 1, 2, 3], 16, held).match
    assert runs(cache) == [[0, 1], [2, 3]]
    cache.unlock(held)
    assert cache.evict(9) == [3, 2]
    cache.unlock(read)


def test_eviction_trims_a_leaf_and_leaves_the_rest(cache: Any) -> None:
    cache.unlock(hold(cache, make_request("r", list(range(20))), [0, 1, 2, 3, 4]))
    assert cache.evict(2) == [4, 3]
    assert runs(cache) == [[0, 1, 2]]
    request = make_request("again", list(range(21)))
    cache.unlock(hold(cache, request, [9, 9, 9, 5, 6]))
    assert cache.match(request).block_ids == (0, 1, 2, 5, 6)


def test_a_parent_goes_after_its_last_child(cache: Any) -> None:
    shared = list(range(8))
    cache.unlock(hold(cache, make_request("a", [*shared, *range(50, 54)]), [0, 1, 2]))
    cache.unlock(hold(cache, make_request("b", [*shared, *range(60, 64)]), [0, 1, 3]))
    cache.unlock(hold(cache, make_request("short", [*shared, 99]), [0, 1]))
    assert cache.evict(9) == [2, 3, 1, 0]


@pytest.mark.parametrize("num_common", range(1, 18))
def test_where_two_runs_part_is_found_at_every_length(num_common: int) -> None:
    cache = make_cache("radix", 1)
    cache.unlock(hold(cache, make_request("a", list(range(17))), list(range(17))))
    ids = [*range(num_common), *range(100, 120)]
    request = make_request("b", ids)
    cache.prepare(request)
    assert cache.match_length(request) == num_common
    assert cache.match(request).block_ids == tuple(range(num_common))


def test_bytes_of_tokens_are_not_mistaken_for_each_other() -> None:
    """Token 256 holds the byte of token 1, shifted: runs are compared at whole tokens."""
    cache = make_cache("radix", 1)
    cache.unlock(hold(cache, make_request("a", [1, 256, 65536, 1]), [0, 1, 2, 3]))
    for ids, length in (([256, 1, 1], 0), ([1, 1, 1], 1), ([1, 256, 1, 1], 2), ([1, 256] * 3, 2)):
        request = make_request("b", ids)
        cache.prepare(request)
        assert cache.match_length(request) == length
