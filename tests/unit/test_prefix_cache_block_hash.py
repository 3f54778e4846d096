"""Block hashes: exact even where hashes are not, and what a lookup by halves relies on."""

from __future__ import annotations

import random
from typing import Any

import pytest

from techniques.prefix_cache import block_hash
from tests.helpers.prefix_model import EXTRA_KEYS, make_cache, make_request
from workbench.core.request import Request

SIZE = 4


def publish(cache: Any, request: Request, block_ids: list[int]) -> list[int]:
    """Returns the blocks that the cache took."""
    cache.prepare(request)
    match = cache.match(request)
    cache.lock(match)
    blocks = [*match.block_ids, *block_ids[len(match.block_ids) :]]
    published = cache.insert(request, blocks, request.num_tokens, match)
    cache.check_integrity()
    cache.unlock(published.match)
    cache.check_integrity()
    taken: list[int] = published.taken
    return taken


def weaken(monkeypatch: pytest.MonkeyPatch, num_keys: int) -> None:
    """Give the module a hash of few values, so that different prefixes get the same key."""
    strong = hash
    monkeypatch.setattr(block_hash, "hash", lambda item: strong(item) % num_keys, raising=False)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_keys", [1, 7, 40])
def test_prefixes_of_one_key_never_share_a_block(
    monkeypatch: pytest.MonkeyPatch, num_keys: int, seed: int
) -> None:
    weaken(monkeypatch, num_keys)
    rng = random.Random(seed)
    cache = make_cache("block_hash", SIZE)
    prefix_of: dict[int, Any] = {}  # what each cached block holds, with all that leads to it
    free = list(range(60))
    collisions = hits = 0
    for _ in range(300):
        ids = [value for _ in range(rng.randint(1, 5)) for value in [rng.randrange(3)] * SIZE]
        request = make_request("r", [*ids, 0], rng.choice(EXTRA_KEYS))
        cache.prepare(request)
        match = cache.match(request)
        for index, block in enumerate(match.block_ids):
            prefix = (request.extra_keys, tuple(ids[: (index + 1) * SIZE]))
            assert prefix_of[block] == prefix, "a block was found for another prefix"
        hits += len(match.block_ids)
        missing = len(ids) // SIZE - len(free)
        if missing > 0:
            free += cache.evict(missing)
        own = [free.pop() for _ in range(len(ids) // SIZE)]
        taken = publish(cache, request, own)
        for index, block in enumerate(own):
            if block in taken:
                prefix_of[block] = (request.extra_keys, tuple(ids[: (index + 1) * SIZE]))
        free += [block for block in own if block not in taken]
        collisions += len(taken) + len(match.block_ids) < len(own)
    assert collisions, "no two prefixes had one key: the test shows nothing"
    assert hits or num_keys == 1


def test_what_collides_is_cached_once_the_other_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    weaken(monkeypatch, 1)
    cache = make_cache("block_hash", SIZE)
    first, second = make_request("a", [1] * 9), make_request("b", [2] * 9)
    assert publish(cache, first, [0, 1, 9]) == [0], "the second block has the key of the first"
    assert publish(cache, second, [2, 3, 8]) == []
    assert cache.match(second).num_tokens == 0
    assert cache.evict(5) == [0]
    assert publish(cache, second, [2, 3, 8]) == [2]
    assert cache.match(second).block_ids == (2,)


def test_a_request_goes_on_publishing_behind_a_collision(monkeypatch: pytest.MonkeyPatch) -> None:
    weaken(monkeypatch, 1)
    cache = make_cache("block_hash", SIZE)
    request = make_request("a", list(range(13)))
    cache.prepare(request)
    held = cache.match(request)
    cache.lock(held)
    for written in (4, 8, 12):
        published = cache.insert(request, [0, 1, 2, 3], written, held)
        held = published.match
        assert held.block_ids == (0,), "blocks whose keys are another's are not cached"
        cache.check_integrity()
    cache.unlock(held)
    assert cache.num_evictable == cache.num_blocks == 1


def test_lookup_by_halves_finds_every_length() -> None:
    cache = make_cache("block_hash", SIZE)
    num_blocks = 37
    ids = list(range(num_blocks * SIZE))
    asked = make_request("asked", [*ids, 0])
    cache.prepare(asked)
    for cached in range(num_blocks + 1):
        request = make_request("r", ids[: cached * SIZE] + [-1])
        publish(cache, request, list(range(num_blocks)))
        assert cache.match_length(asked) == cached * SIZE == cache.match(asked).num_tokens


def test_keys_of_output_are_those_of_the_same_prompt() -> None:
    """Keys made in pieces, over the end of the prompt, are the keys made at once."""
    cache = make_cache("block_hash", SIZE)
    ids = list(range(30))
    whole = make_request("whole", ids)
    cache.prepare(whole)
    pieces = make_request("pieces", ids[:6])
    cache.prepare(pieces)
    pieces.output_token_ids += ids[6:]
    for num_tokens in range(7, 31):
        pieces.num_tokens = num_tokens
        cache.match(pieces)
        done = len(pieces.prefix_key)
        assert pieces.prefix_key == whole.prefix_key[:done]
    assert done == 29 // SIZE
