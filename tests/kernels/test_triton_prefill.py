"""Prefill attention of ``kernels.triton`` against an fp64 reference written out here."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.quantized_kv import allocate_kv_scales, dequantize_kv, find_head_scales, quantize_kv
from tests.helpers.interpreted import DEVICE, needs_kernels, run_in_interpreter, starts_interpreter

#: Of the greatest value. Weights are rounded to the dtype before they meet the values, and Triton's
#: interpreter cuts bf16 off instead of rounding it.
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
#: Entries of a block table that must not be read: beyond any cache of these tests.
NOWHERE = 10**6


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@dataclass
class Case:
    """Requests over scattered blocks. Whatever is nobody's holds NaN."""

    contexts: list[int]
    queries: list[int]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    scales_of: str = "tokens"
    first_key: int = 0  # blocks that lie wholly before it do not exist
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        rng = random.Random(self.seed)
        size, pages = self.block_size, [-(-n // self.block_size) for n in self.contexts]
        blocks = list(range(sum(pages) + 2))
        rng.shuffle(blocks)
        shape = (len(blocks), size, self.kv_heads, self.dim)
        # Both caches are views of one pool with heads before tokens: no stride is what it seems.
        pool = torch.full((shape[0], 2, shape[2], size, shape[3]), float("nan"))
        self.k, self.v = (pool[:, i].transpose(1, 2) for i in range(2))
        table = torch.full((len(pages), max(pages) + 1), NOWHERE, dtype=torch.int32)
        self.rows: list[Tensor] = []
        for row, length in enumerate(self.contexts):
            own = [blocks.pop() for _ in range(pages[row])]
            slots = torch.tensor([own[i // size] * size + i % size for i in range(length)])
            kept = slots[self.first_key // size * size :]
            for cache in (self.k, self.v):
                values = torch.randn(len(kept), *shape[2:], generator=generator)
                cache[kept // size, kept % size] = values.to(self.dtype).float()
            first_block = self.first_key // size
            table[row, first_block : pages[row]] = torch.tensor(own[first_block:])
            self.rows.append(slots)
        self.table = table.to(DEVICE)
        q = torch.randn(sum(self.queries), self.heads + 1, self.dim, generator=generator)
        self.q = q.to(self.dtype).to(DEVICE)[:, 1:]
        self.starts = torch.tensor([0, *self.queries]).cumsum(0).int().to(DEVICE)
        self.lengths = torch.tensor(self.contexts, dtype=torch.int32, device=DEVICE)

    def stored(self) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        """Caches and scales as the kernel takes them, and the values that they stand for."""
        caches, scales, wide = [], [], []
        for values in (self.k, self.v):
            if self.cache_dtype is None:
                caches.append(values.to(self.dtype).to(DEVICE))
                scales.append(None)
                wide.append(values.double())
                continue
            finite = values.nan_to_num(0.0)
            fixed = (
                find_head_scales(finite, self.cache_dtype) if self.scales_of == "heads" else None
            )
            cache, scale = quantize_kv(finite, self.cache_dtype, fixed)
            wide.append(dequantize_kv(cache, scale, torch.float64))
            if fixed is None:
                laid_out = allocate_kv_scales(*cache.shape[:3])
                scale = laid_out.copy_(scale)
                scale[values.isnan().any(-1)] = float("nan")
            caches.append(cache.to(DEVICE))
            scales.append(scale.to(DEVICE))
        return caches, scales, wide

    def run(self, **options: Any) -> tuple[Tensor, Tensor]:
        from kernels.triton.paged_prefill import paged_prefill

        caches, scales, _ = self.stored()
        lengths = (self.table, self.starts, self.lengths)
        out = paged_prefill(
            self.q,
            *caches,
            *lengths,
            self.dim**-0.5,
            k_scale=scales[0],
            v_scale=scales[1],
            max_query_len=max(self.queries),
            return_lse=True,
            **options,
        )
        assert isinstance(out, tuple)
        return out

    def truth(
        self,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        key_start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Every score and every sum in fp64."""
        _, _, (k, v) = self.stored()
        group, outs, lses = self.heads // self.kv_heads, [], []
        for row, q in enumerate(self.q.double().cpu().split(self.queries)):
            slots, length = self.rows[row], self.contexts[row]
            keys, values = (
                x[slots // self.block_size, slots % self.block_size].repeat_interleave(group, 1)
                for x in (k, v)
            )
            scores = torch.einsum("qhd,khd->hqk", q, keys) * self.dim**-0.5
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            position = torch.arange(length - len(q), length).unsqueeze(1)
            key = torch.arange(length)
            seen = key <= position
            if sliding_window is not None:
                seen &= key > position - sliding_window
            if key_start is not None:
                seen &= key >= int(key_start[row])
            scores = scores.masked_fill(~seen, float("-inf"))
            lses.append(scores.logsumexp(-1).T)
            weights = scores.softmax(-1).nan_to_num(0.0)
            outs.append(torch.einsum("hqk,khd->qhd", weights, values.nan_to_num(0.0)))
        return torch.cat(outs), torch.cat(lses)

    def check(self, tiles: Any = None, **masks: Any) -> None:
        out, lse = self.run(tiles=tiles, **masks)
        expected, expected_lse = self.truth(**masks)
        bound = BOUNDS[self.dtype]
        assert out.dtype == self.dtype and out.is_contiguous()
        largest = float(expected.abs().max())
        torch.testing.assert_close(out.double().cpu(), expected, atol=bound * largest, rtol=0)
        torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=5 * bound, rtol=bound)


#: Contexts and queries: plain decodes, whole prompts, chunks, drafts, mixtures, a padding row.
BATCHES = {
    "decodes": ([9, 1, 17, 40], [1, 1, 1, 1]),
    "prompts": ([5, 37], [5, 37]),
    "mixed": ([50, 40, 7, 64, 3], [1, 21, 7, 1, 3]),
    "drafts": ([33, 32, 31], [4, 1, 3]),
    "uneven": ([70, 1, 2, 1, 1, 1], [70, 1, 2, 1, 1, 1]),
    "padding": ([8, 20, 8], [8, 0, 3]),
}


@needs_kernels
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("block_size", [1, 16, 24, 64])
def test_every_batch_and_block_size(batch: tuple[list[int], list[int]], block_size: int) -> None:
    Case(*batch, block_size=block_size).check()


@needs_kernels
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(4, 4, 64), (3, 1, 80), (8, 1, 96), (14, 2, 112), (32, 1, 128), (2, 1, 256), (6, 2, 40)],
)
def test_head_groups_and_head_sizes(heads: int, kv_heads: int, dim: int) -> None:
    Case([20, 9], [12, 1], heads, kv_heads, dim).check()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    Case([50, 40, 7], [1, 33, 7], dtype=dtype).check()


@needs_kernels
@pytest.mark.parametrize("block_size", [1, 16, 128])
@pytest.mark.parametrize("window", [1, 32, 1000])
def test_sliding_window(block_size: int, window: int) -> None:
    case = Case([90, 40, 7, 100], [1, 21, 7, 70], block_size=block_size)
    case.check(sliding_window=window)


@needs_kernels
@pytest.mark.parametrize("masks", [{"soft_cap": 3.0}, {"soft_cap": 0.5, "sliding_window": 20}])
def test_soft_cap(masks: dict[str, Any]) -> None:
    Case([90, 40, 7], [1, 21, 7]).check(**masks)


@needs_kernels
@pytest.mark.parametrize("starts", [[0, 0, 0], [33, 32, 3], [89, 5, 7], [200, 39, 40]])
def test_key_start(starts: list[int]) -> None:
    """In the last one two requests see no key at all: 0 and ``-inf``."""
    case = Case([90, 40, 7], [1, 21, 7])
    case.check(key_start=torch.tensor(starts, dtype=torch.int32, device=DEVICE))


@needs_kernels
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_blocks_that_nobody_sees_need_not_exist(block_size: int) -> None:
    """Neither those before ``key_start`` nor, under a window, those that it has left behind."""
    case = Case([200, 190], [4, 1], block_size=block_size, first_key=150)
    case.check(key_start=torch.full((2,), 150, dtype=torch.int32, device=DEVICE))
    case.check(sliding_window=30)


@needs_kernels
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("scales_of", ["tokens", "heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantised_caches(cache_dtype: torch.dtype, scales_of: str, dtype: torch.dtype) -> None:
    lengths = ([50, 40, 7], [1, 21, 7])
    case = Case(*lengths, dtype=dtype, cache_dtype=cache_dtype, scales_of=scales_of)
    case.check()
    case.check(sliding_window=20, soft_cap=4.0)


@needs_kernels
def test_small_values_of_a_quantised_cache_survive_fp16() -> None:
    case = Case([40], [8], dtype=torch.float16, cache_dtype=torch.int8)
    case.v *= 1e-4
    case.check()


@needs_kernels
@pytest.mark.parametrize(("num_rows", "num_keys"), [(16, 64), (32, 32), (64, 16), (64, 64)])
def test_every_tile_gives_the_same(num_rows: int, num_keys: int) -> None:
    from kernels.triton.paged_prefill import PrefillTiles

    case = Case([50, 40, 7, 64, 3], [1, 21, 7, 1, 3])
    case.check(PrefillTiles(num_rows, num_keys, 4, 2), sliding_window=37)


@needs_kernels
@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 5)
    contexts = [rng.randint(1, 80) for _ in range(count)]
    queries = [rng.choice([1, rng.randint(1, n), n]) for n in contexts]
    kv_heads = rng.randint(1, 3)
    case = Case(
        contexts,
        queries,
        kv_heads * rng.randint(1, 5),
        kv_heads,
        rng.choice([16, 24, 64, 72]),
        rng.choice([1, 2, 8, 16, 32, 48, 256]),
        seed=seed,
    )
    case.check(sliding_window=rng.choice([None, rng.randint(1, 60)]))


@needs_kernels
def test_max_query_len_may_be_more_than_there_is() -> None:
    from kernels.triton.paged_prefill import paged_prefill

    case = Case([50, 40], [1, 21])
    (k, v), _, _ = case.stored()
    args = (case.q, k, v, case.table, case.starts, case.lengths, case.dim**-0.5)
    exact = paged_prefill(*args, max_query_len=21)
    longer = paged_prefill(*args, max_query_len=100)
    assert isinstance(exact, Tensor) and isinstance(longer, Tensor)
    torch.testing.assert_close(exact, longer, atol=1e-6, rtol=1e-6)


@needs_kernels
@pytest.mark.parametrize("num_requests", [2, 3, 40])
def test_tokens_and_requests_that_pad_change_no_bit(num_requests: int) -> None:
    """As a captured step has them: requests without a query behind the last one, whose blocks are
    nowhere, and tokens of nobody."""
    from kernels.triton.paged_prefill import paged_prefill

    case, size = Case([50, 40], [1, 21]), 64
    (k, v), _, _ = case.stored()
    tail = (k, v, case.table, case.starts, case.lengths, case.dim**-0.5)
    exact = paged_prefill(case.q, *tail, max_query_len=size)
    q = torch.full((size, *case.q.shape[1:]), float("nan"), device=DEVICE)
    q[: len(case.q)] = case.q
    more = num_requests - 2
    table = torch.nn.functional.pad(case.table, (0, 0, 0, more), value=NOWHERE)
    starts = torch.nn.functional.pad(case.starts, (0, more), value=len(case.q))
    lengths = torch.nn.functional.pad(case.lengths, (0, more))
    padded = paged_prefill(q, k, v, table, starts, lengths, case.dim**-0.5, max_query_len=size)
    assert isinstance(exact, Tensor) and isinstance(padded, Tensor)
    assert torch.equal(exact, padded[: len(case.q)])


@needs_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.float64}, "float64"),
        ({"k_cache": torch.float16}, "cache holds"),
        ({"k_cache": torch.int8}, "same|one shape|k_scale"),
    ],
)
def test_what_it_does_not_take_is_an_error(change: dict[str, torch.dtype], message: str) -> None:
    from kernels.triton.paged_prefill import paged_prefill

    case = Case([20], [4])
    (k, v), _, _ = case.stored()
    q = case.q.to(change.get("q", case.dtype))
    k, v = (x.to(change.get("k_cache", x.dtype)) for x in (k, v))
    with pytest.raises(ValueError, match=message):
        paged_prefill(q, k, v, case.table, case.starts, case.lengths, 0.1, max_query_len=4)
