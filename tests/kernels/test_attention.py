"""Paged attention against fp64 over mixes of query lengths, layouts of the cache and masks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import paged_attend
from kernels.attention import paged_attend_reference, paged_attend_sdpa
from kernels.attention_reference import attend_reference, causal_mask, gather_pages
from kernels.cpu import attention as native
from kernels.quantized_kv import quantize_kv
from kernels.triton import is_interpreted

DECODE = ([1, 1, 1, 1], [0, 1, 63, 200])
VERIFY = ([5, 5, 8], [17, 64, 129])
PREFILL = ([1, 37, 130], [0, 0, 0])
MIXED = ([1, 70, 0, 5, 1], [512, 33, 9, 0, 64])
LONG = ([1, 3], [3000, 1100])  # split over keys where there are two threads
MIXES = {"decode": DECODE, "verify": VERIFY, "prefill": PREFILL, "mixed": MIXED, "long": LONG}


@dataclass
class Case:
    """A batch whose cache is NaN wherever no request has written."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    query_lens: list[int]
    seq_lens: list[int]

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        starts = torch.tensor([0, *self.query_lens]).cumsum(0)
        return starts.int(), torch.tensor(self.seq_lens).int()

    def run(self, scale: float, **masks: Any) -> Tensor:
        caches = (self.k_cache, self.v_cache, self.block_table)
        return paged_attend(self.q, *caches, *self.lengths, scale, **masks)

    def reference(self, scale: float, dtype: torch.dtype = torch.float64, **masks: Any) -> Tensor:
        tensors = (x.to(dtype) for x in (self.q, self.k_cache, self.v_cache))
        lengths = (self.query_lens, self.seq_lens)
        return paged_attend_reference(*tensors, self.block_table, *lengths, scale, **masks)


def make_case(
    rows: Any,
    dtype: torch.dtype,
    query_lens: list[int],
    contexts: list[int],
    block_size: int,
    heads: int = 9,
    kv_heads: int = 3,
    dim: int = 64,
    is_strided: bool = False,
) -> Case:
    seq_lens = [q + c for q, c in zip(query_lens, contexts, strict=True)]
    pages = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(pages) + 2
    free = random.Random(0).sample(range(num_blocks), num_blocks)
    # Entries past a request's pages must not be followed: they name a block that does not exist.
    block_table = torch.full((len(pages), max(pages) + 1), num_blocks * 1000, dtype=torch.int32)
    shape = (num_blocks, block_size, kv_heads, dim)
    k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    if is_strided:  # heads before tokens in one, blocks apart in the other
        k_cache = k_cache.transpose(1, 2).contiguous().transpose(1, 2)
        v_cache = torch.stack([v_cache, v_cache], dim=1)[:, 0]
    for row, (count, length) in enumerate(zip(pages, seq_lens, strict=True)):
        for page in range(count):
            block = block_table[row, page] = free.pop()
            used = min(block_size, length - page * block_size)
            for cache in (k_cache, v_cache):
                cache[block, :used] = rows(used, kv_heads, dim, dtype=dtype)
    qkv = rows(sum(query_lens), (heads + 2 * kv_heads) * dim, dtype=dtype)
    q = qkv[:, : heads * dim].view(sum(query_lens), heads, dim)
    return Case(q, k_cache, v_cache, block_table, query_lens, seq_lens)


def bound(dtype: torch.dtype) -> float:
    """Roundings: the scores' sums dominate in fp32; in bf16 only the output is rounded."""
    return 40 if dtype == torch.float32 else 2


@pytest.fixture(autouse=True)
def _split_small_work(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_PARALLEL_WORK", 0)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("block_size", [1, 16, 64, 4096])
def test_equals_fp64(
    mix: str, block_size: int, dtype: torch.dtype, rows: Any, assert_close: Any
) -> None:
    case = make_case(rows, dtype, *MIXES[mix], block_size)
    out = case.run(0.125)
    assert out.dtype == dtype and out.shape == case.q.shape and out.is_contiguous()
    assert_close(out, case.reference(0.125), bound(dtype))


@pytest.mark.parametrize(
    "masks", [{"sliding_window": 1}, {"sliding_window": 70}, {"soft_cap": 2.0}]
)
@pytest.mark.parametrize("mix", MIXES)
def test_masks_and_caps_equal_fp64(
    mix: str, masks: dict[str, Any], dtype: torch.dtype, rows: Any, assert_close: Any
) -> None:
    case = make_case(rows, dtype, *MIXES[mix], 16)
    assert_close(case.run(0.125, **masks), case.reference(0.125, **masks), bound(dtype))


@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(1, 1, 16), (4, 4, 32), (8, 1, 80), (14, 2, 64), (70, 1, 16), (8, 4, 256), (3, 1, 20)],
)
def test_head_shapes_and_strided_caches_equal_fp64(
    heads: int,
    kv_heads: int,
    dim: int,
    is_strided: bool,
    dtype: torch.dtype,
    rows: Any,
    assert_close: Any,
) -> None:
    case = make_case(rows, dtype, *MIXED, 16, heads, kv_heads, dim, is_strided)
    assert_close(case.run(dim**-0.5), case.reference(dim**-0.5), bound(dtype))


@pytest.mark.parametrize("seed", range(6))
def test_random_mixes_equal_fp64(
    seed: int, dtype: torch.dtype, rows: Any, assert_close: Any
) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 6)
    query_lens = [draw.choice([0, 1, 1, 6, draw.randint(1, 150)]) for _ in range(count)]
    contexts = [draw.randint(0, 400) for _ in range(count)]
    masks = draw.choice([{}, {"sliding_window": draw.randint(1, 300)}])
    case = make_case(rows, dtype, query_lens, contexts, draw.choice([1, 3, 16, 100]))
    assert_close(case.run(0.125, **masks), case.reference(0.125, **masks), bound(dtype))


@pytest.mark.parametrize("mix", MIXES)
def test_the_reference_equals_torch(mix: str, rows: Any) -> None:
    case = make_case(rows, torch.float64, *MIXES[mix], 16)
    start = 0
    ours = case.reference(0.125, sliding_window=90)
    for row, (num_queries, length) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        k, v = (
            gather_pages(cache, case.block_table[row], 0, length).transpose(0, 1)
            for cache in (case.k_cache, case.v_cache)
        )
        mask = causal_mask(num_queries, length, 90, torch.device("cpu"))
        q = case.q[start : start + num_queries].transpose(0, 1)
        arguments = (q[None], k[None], v[None], mask)
        theirs = F.scaled_dot_product_attention(*arguments, scale=0.125, enable_gqa=True)
        part = ours[start : start + num_queries]
        torch.testing.assert_close(part, theirs[0].transpose(0, 1), rtol=1e-10, atol=1e-12)
        start += num_queries


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("mix", MIXES)
def test_the_padded_form_for_gpus_equals_fp64(
    mix: str, window: int | None, rows: Any, assert_close: Any
) -> None:
    case = make_case(rows, torch.float32, *MIXES[mix], 16)
    # Padding reads a request's last page to its end, and multiplies what it finds by zero.
    for cache in (case.k_cache, case.v_cache):
        cache.nan_to_num_(0.0)
    lengths = (case.block_table, case.query_lens, case.seq_lens)
    out = paged_attend_sdpa(
        case.q, case.k_cache, case.v_cache, *lengths, 0.125, sliding_window=window
    )
    assert_close(out, case.reference(0.125, sliding_window=window), bound(torch.float32))


def test_lengths_on_the_host_change_nothing(rows: Any) -> None:
    case = make_case(rows, torch.float64, *MIXED, 16)
    host = {"query_lens": case.query_lens, "seq_lens_list": case.seq_lens}
    assert torch.equal(case.run(0.125), case.run(0.125, **host))


def test_no_tokens(dtype: torch.dtype, rows: Any) -> None:
    case = make_case(rows, dtype, [0, 0], [5, 7], 16)
    assert case.run(0.125).shape == case.q.shape


def test_large_scores_do_not_overflow(dtype: torch.dtype, rows: Any, assert_close: Any) -> None:
    case = make_case(rows, dtype, *MIXED, 16)
    case.q.mul_(100)
    # A score is a sum of products as large as itself: its absolute error grows with it.
    largest = (
        case.q.double().norm(dim=-1).max() * case.k_cache.nan_to_num().norm(dim=-1).max()
    ).item()
    assert largest > 1000  # its exponential overflows in fp32
    roundings = 2 * largest if dtype == torch.float32 else bound(dtype)
    assert_close(case.run(1.0), case.reference(1.0), roundings)


def test_a_nan_stays_in_its_request(dtype: torch.dtype, rows: Any) -> None:
    case = make_case(rows, dtype, [2, 2], [30, 30], 16)
    case.q[1, 4] = float("nan")
    nan = case.run(0.125).isnan().any(-1)
    assert nan.nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 0), ("soft_cap", 0.0)])
def test_senseless_masks_are_refused(name: str, value: float, rows: Any) -> None:
    case = make_case(rows, torch.float32, [1], [3], 16)
    with pytest.raises(ValueError, match=name):
        case.run(0.125, **{name: value})


@pytest.mark.parametrize("wrong", ["block", "negative block", "length", "queries", "starts"])
def test_an_index_out_of_range_is_refused(wrong: str, dtype: torch.dtype, rows: Any) -> None:
    case = make_case(rows, dtype, [1, 3], [20, 30], 16)
    starts, lengths = case.lengths
    if wrong == "block":
        case.block_table[1, 1] = len(case.k_cache)
    elif wrong == "negative block":
        case.block_table[0, 0] = -1
    elif wrong == "length":
        lengths[1] = case.block_table.shape[1] * 16 + 1
    elif wrong == "queries":
        lengths[1] = 2
    else:
        starts[2] += 1
    arguments = (case.q, case.k_cache, case.v_cache, case.block_table, starts, lengths, 0.125)
    with pytest.raises(IndexError, match="request"):
        paged_attend(*arguments)


def test_blocks_before_the_window_need_not_exist(
    dtype: torch.dtype, rows: Any, assert_close: Any
) -> None:
    case = make_case(rows, dtype, [1, 3], [100, 70], 16)
    truth = case.reference(0.125, sliding_window=20)
    case.block_table[0, :5] = case.block_table[1, :3] = -1
    assert_close(case.run(0.125, sliding_window=20), truth, bound(dtype))


@pytest.mark.parametrize("mix", MIXES)
def test_the_log_sum_exp_is_that_of_the_scores(mix: str, rows: Any) -> None:
    case = make_case(rows, torch.float64, *MIXES[mix], 16)
    out, lse = case.run(0.125, sliding_window=90, return_lse=True)
    assert torch.equal(out, case.reference(0.125, sliding_window=90))
    start = 0
    for row, (num_queries, length) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        k = gather_pages(case.k_cache, case.block_table[row], 0, length)
        k = k.repeat_interleave(3, dim=1)
        scores = torch.einsum("qhd,shd->qhs", case.q[start : start + num_queries], k) * 0.125
        mask = causal_mask(num_queries, length, 90, torch.device("cpu")).unsqueeze(1)
        truth = scores.masked_fill(~mask, float("-inf")).logsumexp(-1)
        torch.testing.assert_close(lse[start : start + num_queries], truth)
        start += num_queries


def test_keys_before_key_start_are_not_seen(dtype: torch.dtype, rows: Any) -> None:
    case = make_case(rows, dtype, [1, 3, 2], [40, 33, 5], 16)
    key_start = torch.tensor([41, 20, 0])
    out, lse = case.run(0.125, key_start=key_start, return_lse=True)
    assert (lse[0] == float("-inf")).all() and not out[0].any()
    # What is hidden may be anything, and need not have blocks.
    case.block_table[0, :2] = case.block_table[1, :1] = -1
    again, again_lse = case.run(0.125, key_start=key_start, return_lse=True)
    assert torch.equal(out, again) and torch.equal(lse, again_lse)
    # The others equal attention to a sequence that begins at key_start.
    k, v = (gather_pages(c, case.block_table[1], 20, 36) for c in (case.k_cache, case.v_cache))
    mask = causal_mask(3, 16, None, torch.device("cpu"))
    truth, truth_lse = attend_reference(case.q[1:4], k, v, 0.125, mask)
    assert torch.equal(out[1:4], truth) and torch.equal(lse[1:4], truth_lse)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_an_eight_bit_cache_is_near_the_plain_one(cache_dtype: torch.dtype, rows: Any) -> None:
    case = make_case(rows, torch.float32, *VERIFY, 16)
    plain = case.reference(0.125)
    stored = [quantize_kv(x.nan_to_num(), cache_dtype) for x in (case.k_cache, case.v_cache)]
    (case.k_cache, k_scale), (case.v_cache, v_scale) = stored
    out = case.run(0.125, k_scale=k_scale, v_scale=v_scale)
    # int8 keeps a value to 1/254 of its row's greatest, fp8 to 1/16 of itself.
    bound = 0.02 if cache_dtype == torch.int8 else 0.08
    error = (out - plain).norm() / plain.norm()
    assert 0 < error < bound


def test_an_implementation_that_cannot_serve_is_refused(rows: Any) -> None:
    case = make_case(rows, torch.float32, [1], [3], 16)
    start = torch.zeros(1, dtype=torch.int32)
    for implementation in ("native", "sdpa"):
        with pytest.raises(ValueError, match="key_start"):
            case.run(0.125, key_start=start, implementation=implementation)
        with pytest.raises(ValueError, match="log-sum-exp"):
            case.run(0.125, return_lse=True, implementation=implementation)
    with pytest.raises(ValueError, match="soft cap"):
        case.run(0.125, soft_cap=1.0, implementation="sdpa")
    with pytest.raises(ValueError, match="does not exist"):
        case.run(0.125, implementation="flash")
    half = make_case(rows, torch.float16, [1], [3], 16)
    with pytest.raises(ValueError, match="native"):
        half.run(0.125, implementation="native")


@pytest.mark.skipif(is_interpreted(), reason="Triton's interpreter takes CPU tensors")
def test_triton_needs_a_gpu(rows: Any) -> None:
    case = make_case(rows, torch.float32, [1], [3], 16)
    with pytest.raises(ValueError, match=r"'triton' cannot serve .*Triton"):
        case.run(0.125, implementation="triton")


@pytest.mark.parametrize("implementation", ["native", "sdpa", "reference"])
@pytest.mark.parametrize("mix", [MIXED, ([0, 1, 1], [5, 7, 30])], ids=["mixed", "none and single"])
def test_every_implementation_equals_fp64(
    implementation: str, mix: tuple[list[int], list[int]], rows: Any, assert_close: Any
) -> None:
    case = make_case(rows, torch.float32, *mix, 16)
    for cache in (case.k_cache, case.v_cache):
        cache.nan_to_num_(0.0)  # sdpa multiplies by zero what lies behind a request's end
    out = case.run(0.125, implementation=implementation)
    assert_close(out, case.reference(0.125), bound(torch.float32))


def test_caches_and_queries_that_do_not_fit_are_refused(rows: Any) -> None:
    case = make_case(rows, torch.float32, [1], [3], 16)
    whole = case.v_cache
    case.v_cache = whole.bfloat16()
    with pytest.raises(ValueError, match="caches differ"):
        case.run(0.125)
    case.v_cache, case.q = whole, case.q.bfloat16()
    with pytest.raises(ValueError, match="the queries are"):
        case.run(0.125)
    case.q = case.q.float()[:, :8]
    with pytest.raises(ValueError, match="8 heads"):
        case.run(0.125)
