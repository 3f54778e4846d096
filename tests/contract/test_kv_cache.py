"""Contract of slot ``kv_cache``: random admission, growth and release against a simple model."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.helpers.engines import component, node_of
from workbench.assemble import build_config, load_class
from workbench.configuration import options_of
from workbench.slots.kv_cache import KVCacheManager, KVUsage

MAX_MODEL_LEN = 24
POOL_TOKENS = 4 * MAX_MODEL_LEN
OPTIONS = options_of("engine/kv_cache")


def make(option: str, pool_tokens: int = POOL_TOKENS, **settings: Any) -> KVCacheManager:
    node = {**node_of("kv_cache", option), **settings}
    cls = load_class(node.pop("_target_"))
    block_size = cls.choose_block_size(build_config(cls, "kv_cache", node), MAX_MODEL_LEN)
    manager: KVCacheManager = component(
        "kv_cache",
        option,
        settings=settings,
        num_blocks=pool_tokens // block_size,
        block_size=block_size,
    )
    return manager


@dataclass
class Held:
    """What the test knows of a request that was admitted."""

    reserved: int
    num_tokens: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass
class Model:
    """The simplest books that can be kept beside a manager."""

    manager: KVCacheManager
    held: dict[str, Held] = field(default_factory=dict)

    def check(self) -> None:
        manager = self.manager
        manager.check_integrity()
        blocks = [b for h in self.held.values() for b in h.blocks]
        assert len(set(blocks)) == len(blocks), "two requests own one block"
        assert all(0 <= b < manager.num_blocks for b in blocks)
        for h in self.held.values():
            assert len(h.blocks) * manager.block_size >= h.num_tokens, "tokens without a slot"
        allocated = manager.allocated_tokens()
        assert manager.total_tokens == manager.num_blocks * manager.block_size
        assert sum(h.num_tokens for h in self.held.values()) <= allocated <= manager.total_tokens
        assert allocated >= len(blocks) * manager.block_size
        if not self.held:
            assert allocated == 0

    def admit(self, request_id: str, reserve: int) -> bool:
        before = self.manager.allocated_tokens()
        admitted = self.manager.admit(request_id, reserve)
        if admitted:
            assert self.manager.fits(reserve), "admitted what could never be held"
            self.held[request_id] = Held(reserve)
        else:
            assert self.manager.allocated_tokens() == before, "a refusal changed something"
        return admitted

    def grow(self, request_id: str, num_tokens: int) -> bool:
        held, before = self.held[request_id], self.manager.allocated_tokens()
        added = self.manager.allocate_slots(request_id, num_tokens)
        if added is None:
            assert num_tokens > held.reserved, "a promise was broken"
            assert self.manager.allocated_tokens() == before, "None, but something changed"
            return False
        held.blocks += added
        held.num_tokens = max(held.num_tokens, num_tokens)
        return True

    def free(self, request_id: str) -> None:
        self.manager.free(request_id)
        self.held.pop(request_id, None)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_keeps_the_books(option: str, seed: int) -> None:
    rng = random.Random(seed)
    manager = make(option)
    model = Model(manager)
    refused = grown_beyond = 0
    for step in range(400):
        action = rng.random()
        if action < 0.3 or not model.held:
            refused += not model.admit(f"r{step}", rng.randint(1, MAX_MODEL_LEN))
        elif action < 0.75:
            name = rng.choice(list(model.held))
            held = model.held[name]
            beyond = rng.random() < 0.15
            limit = MAX_MODEL_LEN if beyond else held.reserved
            kept = model.grow(name, rng.randint(0, limit))
            grown_beyond += beyond and not kept
        elif action < 0.8:
            model.free(f"unknown{step}")
        else:
            model.free(rng.choice(list(model.held)))
        model.check()
    assert refused, "traffic never filled the pool"
    for name in list(model.held):
        model.free(name)
        model.check()
    assert manager.allocated_tokens() == 0


@pytest.mark.parametrize("option", OPTIONS)
def test_promises_hold_even_when_everyone_calls_them_in_at_once(option: str) -> None:
    model = Model(make(option))
    rng = random.Random(0)
    count = 0
    while model.admit(f"r{count}", rng.randint(1, MAX_MODEL_LEN)):
        count += 1
    assert count >= POOL_TOKENS // MAX_MODEL_LEN
    for length in range(1, MAX_MODEL_LEN + 1):
        for held_id, held in model.held.items():
            if length <= held.reserved:
                assert model.grow(held_id, length)
                model.check()


@pytest.mark.parametrize("option", OPTIONS)
def test_fits_is_what_an_empty_pool_admits(option: str) -> None:
    for tokens in range(1, POOL_TOKENS + 2):
        manager = make(option)
        assert manager.fits(tokens) == manager.admit("r", tokens), tokens
        if manager.fits(tokens):
            assert manager.allocate_slots("r", tokens) is not None


@pytest.mark.parametrize("option", OPTIONS)
def test_nothing_fits_an_empty_pool(option: str) -> None:
    cls = load_class(node_of("kv_cache", option)["_target_"])
    manager = cls(cls.Config(), num_blocks=0, block_size=8)
    assert not manager.fits(1)
    assert not manager.admit("r", 1)
    manager.check_integrity()


@pytest.mark.parametrize("option", OPTIONS)
def test_slots_of_a_request_never_overlap_another_s(option: str) -> None:
    """The arithmetic of the interface: slot ``s`` lives in ``block_ids[s // block_size]``."""
    model = Model(make(option))
    rng = random.Random(1)
    names = []
    for index in range(3):
        assert model.admit(f"r{index}", 20)
        names.append(f"r{index}")
    for length in range(1, 21):
        for name in rng.sample(names, 3):
            assert model.grow(name, length)
    slots = [
        held.blocks[s // model.manager.block_size] * model.manager.block_size
        + s % model.manager.block_size
        for held in model.held.values()
        for s in range(held.num_tokens)
    ]
    assert len(slots) == 60
    assert len(set(slots)) == 60


@pytest.mark.parametrize("option", OPTIONS)
def test_growth_is_told_once_and_shrinking_changes_nothing(option: str) -> None:
    manager = make(option)
    assert manager.admit("r", 20)
    first = manager.allocate_slots("r", 9)
    assert first
    assert manager.allocate_slots("r", 9) == []
    assert manager.allocate_slots("r", 1) == []
    more = manager.allocate_slots("r", 20)
    assert more is not None
    assert set(more).isdisjoint(first)


@pytest.mark.parametrize("option", ["contiguous", "paged"])  # reaches into their own books
def test_integrity_check_notices_a_corrupted_book(option: str) -> None:
    manager = make(option)
    manager.admit("r", 5)
    manager.allocate_slots("r", 5)
    manager._free.pop()  # type: ignore[attr-defined]
    with pytest.raises(AssertionError):
        manager.check_integrity()


def test_waste_is_the_share_of_allocated_slots_without_a_token() -> None:
    assert KVUsage(100, 0, 0).waste == 0.0
    assert KVUsage(100, 40, 30).waste == 1 - 30 / 40


@pytest.mark.parametrize("option", OPTIONS)
def test_blocks_are_counted_as_evidence(option: str) -> None:
    manager = make(option)
    assert all(value == 0 for value in manager.counters().values())
    manager.admit("r", 5)
    manager.allocate_slots("r", 5)
    assert any(value > 0 for value in manager.counters().values())
    manager.reset_counters()
    assert all(value == 0 for value in manager.counters().values())


def test_paged_takes_blocks_as_it_grows_and_wastes_less_than_one_each() -> None:
    manager = make("paged", block_size=4)
    manager.admit("r", 20)
    assert manager.allocated_tokens() == 0, "a promise is a number, not blocks"
    for length in range(1, 21):
        manager.allocate_slots("r", length)
        assert length <= manager.allocated_tokens() < length + 4


@pytest.mark.parametrize("block_size", [0, -3])
def test_paged_refuses_a_block_without_tokens(block_size: int) -> None:
    with pytest.raises(ValueError, match="block_size"):
        make("paged", block_size=block_size)
