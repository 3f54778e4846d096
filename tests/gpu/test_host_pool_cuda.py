"""The host tier's copies on a CUDA device: right under races, and how fast.

python -m pytest tests/gpu/test_host_pool_cuda.py     # checks
PYTHONPATH=. python tests/gpu/test_host_pool_cuda.py  # and a table; needs torch alone
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch

from workbench.engine.host_pool import HostPool
from workbench.slots.kv_pool import KVShape, ModelDtypePool

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16  # 2 MiB a block in bf16


def make_pool(num_blocks: int, num_layers: int = NUM_LAYERS) -> ModelDtypePool:
    shape = KVShape((NUM_KV_HEADS,) * num_layers, (HEAD_DIM,) * num_layers, torch.bfloat16)
    return ModelDtypePool(
        shape=shape, num_blocks=num_blocks, block_size=BLOCK_SIZE, device=torch.device("cuda")
    )


def fill(pool: ModelDtypePool, values: dict[int, int]) -> None:
    """Write a number all over each of these blocks, as a forward pass would."""
    for tensor in pool.block_tensors():
        for block, value in values.items():
            tensor[block].fill_(value)


def number_in(pool: ModelDtypePool, block: int) -> int:
    """The number that a block holds all over; -1 for two different ones."""
    low, high = (f(t[block]) for t in pool.block_tensors() for f in (torch.amin, torch.amax))
    return int(low) if bool(low == high) else -1


def check_random_plans(num_steps: int = 60) -> None:
    """Copies of random plans, with blocks written again as soon as the host has queued them."""
    rng = random.Random(0)
    num_blocks, num_hosts = 24, 40
    pool = make_pool(num_blocks, num_layers=8)
    # 0.5 MiB a block and two buffers of three blocks: plans go in several chunks.
    host = HostPool(pool, num_hosts, staging_bytes=3 << 20)
    device = {block: block for block in range(num_blocks)}
    fill(pool, device)
    on_host: dict[int, int] = {}
    for _ in range(num_steps):
        targets = rng.sample(range(num_hosts), rng.randint(0, 20))
        out = [(rng.randrange(num_blocks), target) for target in targets]
        before = dict(device)
        on_host |= {h: before[d] for d, h in out}
        into = [
            (rng.choice(list(on_host)), d)
            for d in rng.sample(range(num_blocks), rng.randint(0, 12) if on_host else 0)
        ]
        host.copy(out, into)
        device |= {d: on_host[h] for h, d in into}
        written = {d: rng.randrange(200) for d in rng.sample(range(num_blocks), 6)}
        fill(pool, written)
        device |= written
    for block, value in device.items():
        assert number_in(pool, block) == value, f"device block {block}"
    for h, value in on_host.items():
        host.copy([], [(h, 0)])
        assert number_in(pool, 0) == value, f"host block {h}"


def test_random_plans_on_a_cuda_device() -> None:
    import pytest

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    check_random_plans()


def milliseconds(work: Any, repeats: int = 5) -> tuple[float, float, float]:
    """Medians: until the host is free, until the main stream is, until all is done."""
    rows = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        queued = time.perf_counter()
        torch.cuda.current_stream().synchronize()
        main = time.perf_counter()
        torch.cuda.synchronize()
        rows.append([1e3 * (t - began) for t in (queued, main, time.perf_counter())])
    queued, main, done = (sorted(column)[repeats // 2] for column in zip(*rows, strict=True))
    return queued, main, done


def measure() -> list[dict[str, Any]]:
    """Copies of 2 MiB blocks, scattered on the device, in a run or scattered on the host."""
    num_blocks = 1024
    pool = make_pool(num_blocks)
    began = time.perf_counter()
    host = HostPool(pool, num_blocks)
    pinning_s = time.perf_counter() - began
    block_bytes = host.num_bytes // num_blocks
    rng = random.Random(1)
    rows = []
    for count in (1, 16, 512):
        for scattered in (False, True):
            blocks = rng.sample(range(num_blocks), count)
            hosts = rng.sample(range(num_blocks), count) if scattered else list(range(count))
            for way in ("out", "in"):
                pairs = list(zip(blocks, hosts, strict=True))
                back = [(h, d) for d, h in pairs]

                def work(
                    out: Any = pairs if way == "out" else [],
                    into: Any = back if way == "in" else [],
                ) -> None:
                    host.copy(out, into)

                queued, main, done = milliseconds(work)
                rows.append(
                    {
                        "way": way,
                        "blocks": count,
                        "host_blocks": "scattered" if scattered else "in a run",
                        "bytes": count * block_bytes,
                        "host_ms": queued,
                        "main_stream_ms": main,
                        "done_ms": done,
                        "gb_s": count * block_bytes / done / 1e6,
                        "pinning_s": pinning_s,
                        "device": torch.cuda.get_device_name(),
                        "torch": torch.__version__,
                    }
                )
    return rows


if __name__ == "__main__":
    check_random_plans()
    print("copies are right")
    records = measure()
    for row in records:
        print(
            f"{row['way']:>3} {row['blocks']:>4} blocks {row['host_blocks']:>9}: "
            f"host {row['host_ms']:8.3f} ms, main stream {row['main_stream_ms']:8.3f} ms, "
            f"done {row['done_ms']:8.3f} ms, {row['gb_s']:6.1f} GB/s"
        )
    folder = os.environ.get("OUT")
    if folder:
        text = "".join(json.dumps(row) + "\n" for row in records)
        Path(folder, "host_pool.jsonl").write_text(text)
