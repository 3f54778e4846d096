"""Copies between the pool's blocks and the host's: the right bytes, whatever the order of work."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from workbench.engine import host_pool
from workbench.engine.host_pool import HostPool
from workbench.slots.kv_pool import KVShape, ModelDtypePool

CPU = torch.device("cpu")
Pairs = list[tuple[int, int]]


def make_pool(
    num_blocks: int = 7, dtype: torch.dtype = torch.float32, heads: Sequence[int] = (2, 1, 2)
) -> ModelDtypePool:
    dims = tuple(8 if n == 2 else 24 for n in heads)
    pool = ModelDtypePool(
        shape=KVShape(tuple(heads), dims, dtype), num_blocks=num_blocks, block_size=3, device=CPU
    )
    return pool


class WithScales(ModelDtypePool):
    """A pool of which a block has more than keys and values, in other types."""

    def __init__(self, num_blocks: int = 7) -> None:
        shape = KVShape((2, 2), (8, 8), torch.bfloat16)
        super().__init__(shape=shape, num_blocks=num_blocks, block_size=3, device=CPU)
        self.codes = torch.zeros(num_blocks + 1, 3, 5, dtype=torch.float8_e4m3fn)
        self.scales = torch.zeros(num_blocks + 1, 3, 1)
        self.strided = torch.zeros(num_blocks + 1, 3, 6, dtype=torch.uint8)[..., :4]

    def block_tensors(self) -> list[torch.Tensor]:
        return [*super().block_tensors(), self.codes, self.scales, self.strided]


POOLS: dict[str, Callable[[], ModelDtypePool]] = {
    "fp32": make_pool,
    "bf16": lambda: make_pool(dtype=torch.bfloat16),
    "one layer": lambda: make_pool(heads=(2,)),
    "scales": WithScales,
}


def block_of(pool: ModelDtypePool, index: int) -> list[torch.Tensor]:
    return [tensor[index].clone() for tensor in pool.block_tensors()]


def write_block(pool: ModelDtypePool, index: int, value: int) -> None:
    for n, tensor in enumerate(pool.block_tensors()):
        content = torch.randn(tensor[index].shape, generator=torch.Generator().manual_seed(value))
        tensor[index].copy_((content + n).to(tensor.dtype))


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x.float(), y.float()) for x, y in zip(a, b, strict=True))


def test_block_tensors_of_a_pool_are_its_layers_memory() -> None:
    pool = make_pool()
    write_block(pool, 4, 1)
    assert len(pool.block_tensors()) == 2, "layers of one size are copied by one call"
    assert sum(t[0].numel() * t.element_size() for t in pool.block_tensors()) * 8 == pool.num_bytes
    for i in range(3):
        for cache in pool.layer(i):
            assert bool((cache[4] != 0).all()) and bool((cache[:4] == 0).all())
            assert cache.is_contiguous()
    # The default of a pool that says nothing of its own.
    default = super(ModelDtypePool, pool).block_tensors()
    assert [t.shape[0] for t in default] == [8] * 6
    assert bool(all((t[4] != 0).all() for t in default))


class DelayedLanes:
    """Two queues whose work runs as late, and as interleaved, as marks allow: a device's streams.

    Work waits until somebody asks for the result; then lanes are run in random steps.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.queues: dict[str, deque[tuple[str, Any]]] = {"main": deque(), "side": deque()}
        self.reached: set[object] = set()

    def main(self, work: Callable[[], object]) -> None:
        self.queues["main"].append(("work", work))

    def side(self, work: Callable[[], object]) -> None:
        self.queues["side"].append(("work", work))

    def _mark(self, lane: str) -> object:
        mark = object()
        self.queues[lane].append(("mark", mark))
        return mark

    def mark_main(self) -> object:
        return self._mark("main")

    def mark_side(self) -> object:
        return self._mark("side")

    def main_waits(self, mark: object) -> None:
        self.queues["main"].append(("wait", mark))

    def side_waits(self, mark: object) -> None:
        self.queues["side"].append(("wait", mark))

    def _can_go(self, lane: str) -> bool:
        queue = self.queues[lane]
        if not queue:
            return False
        kind, what = queue[0]
        return kind != "wait" or what is None or what in self.reached

    def run(self, until_main_is_done: bool = True) -> None:
        """Run the lanes; the side one may be left behind, as on a device."""
        slow = self.rng.choice(["main", "side", None])  # one lane may be far behind the other
        while self.queues["main"] or (not until_main_is_done and self.queues["side"]):
            ready = [lane for lane in self.queues if self._can_go(lane)]
            assert ready, "the lanes wait for each other"
            if len(ready) > 1 and slow is not None and self.rng.random() < 0.9:
                ready.remove(slow)
            kind, what = self.queues[self.rng.choice(ready)].popleft()
            if kind == "work":
                what()
            elif kind == "mark":
                self.reached.add(what)


def random_plan(rng: random.Random, num_blocks: int, num_hosts: int) -> tuple[Pairs, Pairs]:
    def pairs(sources: int, targets: int) -> Pairs:
        count = rng.randint(0, targets)
        return [(rng.randrange(sources), t) for t in rng.sample(range(targets), count)]

    return pairs(num_blocks, num_hosts), pairs(num_hosts, num_blocks)


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("delayed", [False, True])
def test_random_plans_copy_what_they_say(
    kind: str, chunk: int, delayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(chunk)
    pool = POOLS[kind]()
    block_bytes = sum(t[0].numel() * t.element_size() for t in pool.block_tensors())
    monkeypatch.setattr(host_pool, "_SEGMENT_BYTES", 4 * block_bytes)
    lanes = DelayedLanes(rng) if delayed else None
    host = HostPool(pool, 10, staging_bytes=2 * chunk * block_bytes, lanes=lanes)
    device_model = {i: i for i in range(7)}
    host_model: dict[int, int] = {}
    values = 100
    for i in range(7):
        write_block(pool, i, device_model[i])
    for _ in range(30):
        out, into = random_plan(rng, 7, 10)
        into = [(h, d) for h, d in into if h in {**host_model, **{t: 0 for _, t in out}}]
        before = dict(device_model)
        host.copy(out, into)
        host_model |= {h: before[d] for d, h in out}
        device_model |= {d: host_model[h] for h, d in into}
        # The forward pass writes to blocks as soon as the main lane comes to it.
        written = {d: values + d for d in rng.sample(range(7), 2)}
        values += 10

        def forward(written: dict[int, int] = written) -> None:
            for block, value in written.items():
                write_block(pool, block, value)

        if lanes is None:
            forward()
        else:
            lanes.main(forward)
            if rng.random() < 0.7:
                lanes.run()
        device_model |= written
    if lanes is not None:
        lanes.run(until_main_is_done=False)
    other = POOLS[kind]()
    for index, value in device_model.items():
        write_block(other, index, value)
        assert same(block_of(pool, index), block_of(other, index)), f"device block {index}"
    for h, value in host_model.items():  # each through block 0 of the pool
        host.copy([], [(h, 0)])
        if lanes is not None:
            lanes.run()
        write_block(other, 0, value)
        assert same(block_of(pool, 0), block_of(other, 0)), f"host block {h}"


def test_out_goes_before_in_and_a_plan_may_do_both_with_one_block() -> None:
    pool = make_pool()
    host = HostPool(pool, 4)
    write_block(pool, 0, 5)
    write_block(pool, 1, 6)
    old = block_of(pool, 0), block_of(pool, 1)
    host.copy([(0, 2)], [])
    host.copy([(1, 3), (0, 1)], [(3, 0), (2, 1)])
    assert same(block_of(pool, 0), old[1]) and same(block_of(pool, 1), old[0])


def test_memory_is_what_it_says() -> None:
    pool = make_pool()
    block_bytes = pool.num_bytes // 8
    host = HostPool(pool, 10, staging_bytes=6 * block_bytes)
    assert host.num_bytes == 10 * block_bytes
    assert host.num_device_bytes == (10 + 6) * block_bytes, "the device's memory is the host's here"
    small = HostPool(pool, 2)
    assert small.num_device_bytes == (2 + 2 * 2) * block_bytes, "no more staging than host blocks"
    none = HostPool(pool, 0)
    assert (none.num_bytes, none.num_device_bytes) == (0, 0)
    none.copy([], [])


def test_a_plan_that_contradicts_itself_is_refused() -> None:
    pool = make_pool()
    with pytest.raises(AssertionError, match="no host tier"):
        HostPool(pool, 0).copy([(0, 0)], [])
    host = HostPool(pool, 4)
    with pytest.raises(AssertionError, match="written twice"):
        host.copy([(0, 1), (2, 1)], [])
    with pytest.raises(AssertionError, match="written twice"):
        host.copy([], [(0, 1), (2, 1)])
    with pytest.raises(AssertionError, match="no such host block"):
        host.copy([(0, 4)], [])
    with pytest.raises(AssertionError, match="no such host block"):
        host.copy([], [(-1, 0)])
    with pytest.raises(IndexError):
        host.copy([(8, 0)], [])
