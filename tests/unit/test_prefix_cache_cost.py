"""What the caches do is counted in lines of their code that run: the same on every machine.

A lookup must not cost more the more is cached, and a block must cost a few lines, not a walk.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import techniques.prefix_cache
from tests.helpers.prefix_model import CACHES, make_cache, make_request
from workbench.core.request import Request

FOLDER = str(Path(techniques.prefix_cache.__file__).parent)
SIZE = 16


def lines(function: Callable[[], object]) -> int:
    """Lines of the caches' own code that a call runs."""
    count = 0

    def on_line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return on_line

    def on_call(frame: FrameType, event: str, argument: object) -> Any:
        return on_line if frame.f_code.co_filename.startswith(FOLDER) else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def prompt(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(32_000) for _ in range(num_tokens)]


class Pool:
    """A cache and the free blocks beside it."""

    def __init__(self, option: str) -> None:
        self.cache = make_cache(option, SIZE)
        self.num_left = 100_000  # handed out from the last on, so that lists grow once

    def serve(self, request: Request) -> None:
        """Match, lock, allocate, publish and unlock; the prompt was prepared when it arrived."""
        match = self.cache.match(request)
        self.cache.lock(match)
        missing = -(-request.num_tokens // SIZE) - len(match.block_ids)
        self.num_left -= missing
        blocks = [*match.block_ids, *range(self.num_left, self.num_left + missing)]
        self.cache.unlock(self.cache.insert(request, blocks, request.num_tokens, match).match)

    def prepared(self, tokens: list[int]) -> Request:
        request = make_request("r", tokens)
        self.cache.prepare(request)
        return request

    def fill(self, rng: random.Random, num_prompts: int) -> None:
        """Prompts of ten blocks, by tens with a common start of five."""
        start: list[int] = []
        for index in range(num_prompts):
            if index % 10 == 0:
                start = prompt(rng, 5 * SIZE)
            self.serve(self.prepared(start + prompt(rng, 5 * SIZE)))


def cost(option: str, num_tokens: int, num_hit: int, num_prompts: int) -> int:
    """Lines of one request's visit, ``num_hit`` of whose tokens are cached among others."""
    rng = random.Random(0)
    pool = Pool(option)
    shared = prompt(rng, num_hit)
    if shared:
        pool.serve(pool.prepared(shared))
    pool.fill(rng, num_prompts)
    request = pool.prepared(shared + prompt(rng, num_tokens - num_hit))
    return lines(lambda: pool.serve(request))


@pytest.mark.parametrize("num_hit", [0, 992, 1984])
@pytest.mark.parametrize("option", CACHES)
def test_what_else_is_cached_costs_nothing(option: str, num_hit: int) -> None:
    assert cost(option, 2000, num_hit, 20) == cost(option, 2000, num_hit, 1000)


def test_a_tree_of_ten_thousand_nodes_costs_a_prompt_no_more() -> None:
    pool, rng = Pool("radix"), random.Random(0)
    pool.fill(rng, 9_100)
    assert sum(1 for _ in pool.cache._nodes()) >= 10_000
    shared = prompt(rng, 992)
    pool.serve(pool.prepared(shared))
    request = pool.prepared(shared + prompt(rng, 2000 - 992))
    assert lines(lambda: pool.serve(request)) <= 180


@pytest.mark.parametrize("hit", [0.0, 0.5, 1.0])
def test_a_block_costs_block_hash_a_few_lines(hit: float) -> None:
    """Each block is followed or added, locked, and released."""
    short, long = (cost("block_hash", n * SIZE + 1, int(n * hit) * SIZE, 20) for n in (100, 200))
    assert long - short <= 18 * 100


@pytest.mark.parametrize("hit", [0.0, 0.5, 1.0])
def test_radix_costs_by_the_run_and_not_by_the_block(hit: float) -> None:
    short, long = (cost("radix", n * SIZE + 1, int(n * hit) * SIZE, 20) for n in (128, 256))
    # Finding where two runs part takes one more halving for twice as many blocks.
    assert short <= long <= short + 6
    assert long <= 180


@pytest.mark.parametrize("option", CACHES)
def test_ordering_a_queue_costs_less_than_a_match(option: str) -> None:
    """For block_hash a logarithm of the blocks, found or not."""
    rng = random.Random(0)
    pool = Pool(option)
    shared = prompt(rng, 250 * SIZE)
    pool.serve(pool.prepared(shared))
    request = pool.prepared([*shared, 1])
    length, match = (
        lines(lambda: pool.cache.match_length(request)),
        lines(lambda: pool.cache.match(request)),
    )
    assert length <= match
    assert length <= 40


@pytest.mark.parametrize("option", CACHES)
def test_giving_up_a_block_costs_the_same_however_much_is_cached(option: str) -> None:
    def cost_of_eviction(num_prompts: int) -> int:
        pool = Pool(option)
        pool.fill(random.Random(0), num_prompts)
        pool.cache.evict(1)
        return lines(lambda: pool.cache.evict(50))

    assert cost_of_eviction(30) == cost_of_eviction(600)
