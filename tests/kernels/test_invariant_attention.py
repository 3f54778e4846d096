"""A query's output has the same bits alone, in a batch and in a chunk of any length: on the CPU
with ``is_invariant``, in Triton with ``invariant_tiles``."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.attention_reference import paged_attend_reference
from tests.helpers.interpreted import DEVICE, needs_kernels, run_in_interpreter, starts_interpreter

Attend = Callable[..., Tensor]
NUM_REQUESTS = 5
#: Heads, KV heads, head size, block size.
SHAPES = [(4, 2, 16, 16), (9, 3, 64, 8), (4, 4, 32, 48)]
#: Entries of a block table for blocks that were given away.
NOWHERE = 10**6

needs_numba = pytest.mark.skipif(not dispatch.HAS_NUMBA, reason="numba is not installed")


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__, "-k", "triton")


class Requests:
    """Sequences over scattered blocks, and their queries."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, longest: int) -> None:
        heads, kv_heads, dim, block_size = shape
        rng, generator = random.Random(0), torch.Generator().manual_seed(0)
        self.block_size = block_size
        self.lens = [rng.randint(longest // 3, longest) for _ in range(NUM_REQUESTS)]
        pages = -(-longest // block_size)
        count = pages * NUM_REQUESTS

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(dtype).to(DEVICE)

        self.caches = [draw(count, block_size, kv_heads, dim) for _ in range(2)]
        table = torch.randperm(count, generator=generator).view(NUM_REQUESTS, pages)
        self.table = table.int().to(DEVICE)
        self.queries = [draw(n, heads, dim) for n in self.lens]

    def attend(
        self,
        attend: Attend,
        rows: list[int],
        query_lens: list[int],
        ends: list[int],
        window: int | None,
        cap: float | None,
    ) -> list[Tensor]:
        """Outputs of each request's ``query_lens`` queries before ``ends``."""
        starts = torch.tensor([0, *query_lens]).cumsum(0).int().to(DEVICE)
        table = self.table[rows].clone()
        if window is not None:
            for row, (count, end) in enumerate(zip(query_lens, ends, strict=True)):
                table[row, : max(0, end - count + 1 - window) // self.block_size] = NOWHERE
        parts = zip(rows, query_lens, ends, strict=True)
        q = torch.cat([self.queries[r][end - n : end] for r, n, end in parts])
        lens = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        scale = q.shape[-1] ** -0.5
        out = attend(q, *self.caches, table, starts, lens, scale, window, cap, max(query_lens))
        return list(out.split(query_lens))


def on_cpu(*arguments: object) -> Tensor:
    from kernels.cpu import attention

    return attention.paged_attend(*arguments[:-1], is_invariant=True)  # type: ignore[arg-type]


def by_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    starts: Tensor,
    lens: Tensor,
    scale: float,
    window: int | None,
    cap: float | None,
    longest: int,
) -> Tensor:
    from kernels.triton.paged_prefill import invariant_tiles, paged_prefill

    out = paged_prefill(
        q, k, v, table, starts, lens, scale, sliding_window=window, soft_cap=cap,
        max_query_len=longest, tiles=invariant_tiles(q, k),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def check(
    attend: Attend,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    window: int | None,
    cap: float | None,
    *,
    longest: int,
    rounds: int,
) -> None:
    requests, rng = Requests(shape, dtype, longest), random.Random(1)
    lens = requests.lens
    whole = [requests.attend(attend, [r], [n], [n], window, cap)[0] for r, n in enumerate(lens)]
    for row, n in enumerate(lens):
        truth = paged_attend_reference(
            requests.queries[row].double(), *(c.double() for c in requests.caches),
            requests.table[row : row + 1], [n], [n], shape[2] ** -0.5,
            sliding_window=window, soft_cap=cap,
        )  # fmt: skip
        bound = 2e-6 if dtype == torch.float32 else 2e-2
        assert (whole[row].double() - truth).abs().max() <= bound * 4
    for _ in range(rounds):
        rows = rng.sample(range(NUM_REQUESTS), rng.randint(1, NUM_REQUESTS))
        ends = [rng.randint(1, lens[r]) for r in rows]
        counts = [rng.choice([1, 1, rng.randint(1, end)]) for end in ends]
        found = requests.attend(attend, rows, counts, ends, window, cap)
        for r, n, end, out in zip(rows, counts, ends, found, strict=True):
            assert torch.equal(out, whole[r][end - n : end]), (lens[r], end, n)


@needs_numba
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the tensors of this file are on a GPU")
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("cap", [None, 20.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_the_cpu(
    shape: tuple[int, int, int, int],
    cap: float | None,
    window: int | None,
    dtype: torch.dtype,
    num_threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kernels.cpu import attention

    monkeypatch.setattr(attention, "num_threads", lambda: num_threads)
    monkeypatch.setattr(attention, "_MIN_SPLIT", 16)
    check(on_cpu, shape, dtype, window, cap, longest=300, rounds=20)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("window", "cap"), [(None, None), (40, None), (None, 20.0)], ids=["plain", "window", "cap"]
)
def test_by_triton(dtype: torch.dtype, window: int | None, cap: float | None) -> None:
    check(by_triton, (4, 2, 32, 16), dtype, window, cap, longest=150, rounds=4)


@needs_kernels
def test_by_triton_with_more_heads_than_a_tile_has_rows() -> None:
    check(by_triton, (40, 1, 16, 8), torch.float32, None, None, longest=40, rounds=3)


@needs_numba
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the tensors of this file are on a GPU")
def test_the_cpu_s_default_is_not_invariant() -> None:
    """So the tests above can fail: blocks of keys are counted from the window of a chunk."""

    def by_default(*arguments: object) -> Tensor:
        from kernels.cpu import attention

        return attention.paged_attend(*arguments[:-1])  # type: ignore[arg-type]

    with pytest.raises(AssertionError):
        check(by_default, SHAPES[0], torch.float32, 40, None, longest=300, rounds=20)
