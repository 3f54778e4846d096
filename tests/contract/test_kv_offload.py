"""Contract of slot ``kv_offload``: the books of host blocks against a slow and simple model."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.engines import component
from workbench.configuration import options_of
from workbench.core.errors import ConfigError
from workbench.slots.kv_offload import KVOffload

OPTIONS = options_of("engine/kv_offload")
TIERS = [option for option in OPTIONS if option != "none"]


def make_tier(option: str, num_blocks: int = 8) -> KVOffload:
    settings = {} if option == "none" else {"num_blocks": num_blocks}
    tier: KVOffload = component(
        "kv_offload", option, settings=settings, bytes_per_block=64, num_device_blocks=4
    )
    return tier


def digest(number: int) -> bytes:
    return number.to_bytes(4, "big")


class Model:
    """What a tier should hold, in lists that are searched from end to end.

    ``memory`` says what lies in each host block once the copies of each plan have run, in an order
    that is drawn at random; what is read must be what was kept.
    """

    def __init__(self, tier: KVOffload, rng: random.Random) -> None:
        self.tier, self.rng = tier, rng
        self.order: list[bytes] = []  # the least recently used first
        self.planned: set[bytes] = set()
        self.swapped: dict[str, list[int]] = {}
        self.num_freed = 0
        self.num_requests = 0
        self.memory: dict[int, Any] = {}
        self.writes: list[tuple[int, Any]] = []
        self.reads: list[tuple[int, Any]] = []

    def num_free(self) -> int:
        taken = len(self.order) + sum(map(len, self.swapped.values())) + self.num_freed
        return self.tier.num_host_blocks - taken

    def idle(self) -> list[bytes]:
        return [d for d in self.order if d not in self.planned]

    def touch(self, d: bytes) -> None:
        if d in self.order:
            self.order.remove(d)
        self.order.append(d)
        self.planned.add(d)

    # -- operations, each checked against what the model expects -------------------------------

    def keep(self) -> None:
        d = digest(self.rng.randrange(14))
        is_here, has_room = d in self.order, self.num_free() > 0 or bool(self.idle())
        block = self.tier.keep(d)
        assert (block is not None) == (not is_here and has_room)
        if block is None and not is_here:
            return
        if block is not None:
            if self.num_free() == 0:
                self.order.remove(self.idle()[0])
            self.writes.append((block, d))
        self.touch(d)

    def find_and_use(self) -> None:
        first = self.rng.randrange(14)
        wanted = [digest(first + i) for i in range(4)]
        length = next((i for i, d in enumerate(wanted) if d not in self.order), 4)
        blocks = self.tier.find(wanted)
        assert len(blocks) == length
        if self.rng.random() < 0.3:
            return
        self.tier.use(wanted[:length])
        for d in reversed(wanted[:length]):
            self.touch(d)
        self.reads += zip(blocks, wanted, strict=False)

    def swap_out(self) -> None:
        count = self.rng.randint(1, 4)
        name = f"r{self.num_requests}"
        self.num_requests += 1
        idle = self.idle()
        has_room = count <= self.num_free() + len(idle)
        blocks = self.tier.swap_out(name, count)
        assert (blocks is not None) == has_room
        if blocks is None:
            return
        assert len(blocks) == count
        for d in idle[: max(0, count - self.num_free())]:
            self.order.remove(d)
        self.swapped[name] = blocks
        self.writes += [(block, (name, i)) for i, block in enumerate(blocks)]

    def drop(self) -> None:
        name = self.rng.choice([*self.swapped, "nobody"])
        blocks = self.swapped.pop(name, [])
        self.num_freed += len(blocks)
        num_read = self.rng.choice([0, len(blocks)])
        if num_read:
            self.reads += [(block, (name, i)) for i, block in enumerate(blocks)]
        self.tier.drop(name, num_read)

    def step_planned(self) -> None:
        targets = [block for block, _ in self.writes]
        assert len(set(targets)) == len(targets), "a host block is written twice by one plan"
        for copies in (self.writes, self.reads):
            self.rng.shuffle(copies)
        self.memory.update(self.writes)
        for block, content in self.reads:
            assert self.memory[block] == content, "a copy reads what somebody else wrote"
        self.writes.clear()
        self.reads.clear()
        self.tier.step_planned()
        self.planned.clear()
        self.num_freed = 0

    def clear(self) -> None:
        self.step_planned()
        self.tier.clear()
        self.order.clear()
        self.swapped.clear()


@pytest.mark.parametrize("option", TIERS)
@pytest.mark.parametrize("num_blocks", [1, 5, 12])
def test_ten_thousand_random_operations(option: str, num_blocks: int) -> None:
    rng = random.Random(num_blocks)
    tier = make_tier(option, num_blocks)
    model = Model(tier, rng)
    operations: list[Callable[[], None]] = [
        model.keep,
        model.find_and_use,
        model.swap_out,
        model.drop,
        model.step_planned,
        model.clear,
    ]
    for _ in range(10_000):
        rng.choices(operations, [8, 6, 1, 2, 3, 0.05])[0]()
        tier.check_integrity()
        everything = [digest(i) for i in range(18)]
        assert [bool(tier.find([d])) for d in everything] == [d in model.order for d in everything]
    counters = tier.counters()
    for name in ("blocks_out", "blocks_in", "hit_blocks", "evicted", "refused"):
        assert counters[name] > 0, f"{name} never moved: the test did not reach it"
    tier.reset_counters()
    assert tier.counters() == {**dict.fromkeys(counters, 0), "kept_blocks": len(model.order)}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_tier_says_whether_it_holds_blocks_and_refuses_if_not(option: str) -> None:
    tier = make_tier(option)
    assert tier.holds_blocks == (tier.num_host_blocks > 0)
    kept, swapped = tier.keep(b"a"), tier.swap_out("r", 2)
    assert (kept is not None) == (swapped is not None) == tier.holds_blocks
    assert len(tier.find([b"a"])) == int(tier.holds_blocks)
    tier.drop("r", 2)
    tier.step_planned()
    tier.clear()
    assert tier.find([b"a"]) == []
    tier.check_integrity()


@pytest.mark.parametrize("option", TIERS)
class TestTier:
    def test_the_least_recently_used_goes_first(self, option: str) -> None:
        tier = make_tier(option, 3)
        for name in (b"a", b"b", b"c"):
            tier.keep(name)
        tier.step_planned()
        tier.use([b"a"])
        tier.keep(b"b")  # here already: used
        tier.step_planned()
        assert tier.keep(b"d") is not None
        assert [bool(tier.find([n])) for n in (b"a", b"b", b"c", b"d")] == [True, True, False, True]

    def test_the_end_of_a_prefix_goes_before_its_beginning(self, option: str) -> None:
        tier = make_tier(option, 3)
        for name in (b"1", b"2", b"3"):
            tier.keep(name)
        tier.use([b"1", b"2", b"3"])
        tier.step_planned()
        tier.keep(b"x")
        assert len(tier.find([b"1", b"2", b"3"])) == 2

    def test_what_a_plan_reads_is_not_written_by_it(self, option: str) -> None:
        tier = make_tier(option, 2)
        read = [tier.keep(b"a"), tier.keep(b"b")]
        tier.step_planned()
        tier.use([b"a", b"b"])
        assert tier.keep(b"c") is None and tier.swap_out("r", 1) is None
        tier.step_planned()
        assert tier.keep(b"c") in read

    def test_blocks_of_a_request_are_pinned_and_free_only_after_the_plan(self, option: str) -> None:
        tier = make_tier(option, 2)
        blocks = tier.swap_out("r", 2)
        for _ in range(3):
            tier.step_planned()
            assert tier.keep(b"a") is None
        tier.drop("r", 2)
        assert tier.keep(b"a") is None, "the copy in would read what is kept now"
        tier.step_planned()
        assert blocks is not None and tier.keep(b"a") in blocks

    def test_too_large_a_swap_changes_nothing(self, option: str) -> None:
        tier = make_tier(option, 3)
        tier.keep(b"a")
        tier.step_planned()
        assert tier.swap_out("r", 4) is None
        assert tier.find([b"a"]) and tier.swap_out("r", 3) is not None
        assert not tier.find([b"a"]), "a swap makes room for itself"

    def test_counts_what_a_plan_copies(self, option: str) -> None:
        tier = make_tier(option, 6)
        tier.keep(b"a")
        tier.keep(b"b")
        tier.swap_out("r", 3)
        tier.step_planned()
        tier.use([b"a", b"b"])
        tier.drop("r", 2)
        tier.drop("nobody")
        counters = tier.counters()
        assert (counters["blocks_out"], counters["blocks_in"]) == (5, 4)
        assert counters["hit_blocks"] == 2
        assert counters["refused"] == counters["evicted"] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host_gib": -1.0}, "must be 0 or more"),
        ({"num_blocks": -1}, "must be 0 or more"),
        ({"host_gib": float("nan")}, "must be 0 or more"),
        ({"host_gib": 1.0, "num_blocks": 4}, "set one of them"),
        ({"host_gib": 1e-9}, "holds no block of 64 bytes"),
        ({"host_gib": 1e9}, "of host memory are free"),
        ({"host_gib": "much"}, "must be of type float"),
    ],
    ids=lambda value: str(value),
)
def test_sizes_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        component("kv_offload", "host", settings=settings, bytes_per_block=64, num_device_blocks=4)


def test_size_in_gib_in_blocks_or_as_large_as_the_device_s() -> None:
    def size(num_device_blocks: int = 7, **settings: Any) -> int:
        tier: KVOffload = component(
            "kv_offload",
            "host",
            settings=settings,
            bytes_per_block=2**20,
            num_device_blocks=num_device_blocks,
        )
        return tier.num_host_blocks

    assert size() == 7
    assert size(num_blocks=3) == 3
    assert size(host_gib=2**-8) == 4
    with pytest.raises(ConfigError, match="must be 1 or more"):
        size(num_device_blocks=0)
