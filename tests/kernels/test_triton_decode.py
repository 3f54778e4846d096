"""Paged decode attention of ``kernels.triton`` against fp64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from kernels import paged_attend
from tests.helpers.interpreted import DEVICE, needs_kernels, run_in_interpreter, starts_interpreter
from tests.helpers.paged_cases import PagedCase

DECODE = ([1, 1, 1, 1], [0, 1, 33, 70])
VERIFY = ([3, 1, 5], [9, 32, 61])
PADDED = ([1, 0, 2, 0], [20, 7, 0, 0])  # rows of a captured graph that no request fills
LONG = ([1, 1], [200, 3])
MIXES = {"decode": DECODE, "verify": VERIFY, "padded": PADDED, "long": LONG}
#: Block of keys, and programs for each of the interpreter's four multiprocessors: from one share
#: that holds all requests to a piece for every block.
TILINGS = {"one": (16, 1), "few": (16, 4), "many": (16, 12), "wide": (64, 4)}


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


def decode(case: PagedCase, tiling: str = "few", max_tile_rows: int = 64, **options: Any) -> Any:
    from kernels.triton.decode_tiling import DecodeTiling
    from kernels.triton.paged_decode import paged_decode

    block_n, programs = TILINGS[tiling]
    options.setdefault("max_query_len", max(case.query_lens))
    chosen = DecodeTiling(block_n, 4, 2, programs, 1, max_tile_rows)
    return paged_decode(*case.arguments, **case.scales, tiling=chosen, **options)


@needs_kernels
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("mix", MIXES)
def test_every_cut_equals_fp64(mix: str, tiling: str) -> None:
    case = PagedCase(*MIXES[mix])
    out, lse = decode(case, tiling, return_lse=True)
    truth, truth_lse = case.truth()
    case.check(out, truth)
    case.check_lse(lse, truth_lse)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 32, 64])
def test_dtypes_and_block_sizes_equal_fp64(dtype: torch.dtype, block_size: int) -> None:
    case = PagedCase(*VERIFY, block_size=block_size, dtype=dtype)
    case.check(decode(case), case.truth()[0])


@needs_kernels
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "query_lens"),
    [
        (1, 1, 16, [1, 2]),
        (3, 3, 64, [1, 1]),  # as many KV heads as heads
        (8, 1, 80, [2, 1]),  # one KV head
        (6, 2, 96, [1, 3]),
        (5, 1, 112, [1, 1]),
        (4, 1, 256, [1, 4]),
        (70, 1, 16, [1, 2]),  # rows of a group fill more than one tile
    ],
)
def test_head_shapes_and_strided_caches_equal_fp64(
    heads: int, kv_heads: int, dim: int, query_lens: list[int]
) -> None:
    case = PagedCase(query_lens, [40, 21], heads, kv_heads, dim, is_strided=True)
    case.check(decode(case), case.truth()[0])


@needs_kernels
@pytest.mark.parametrize("max_tile_rows", [16, 32])
def test_queries_of_a_request_in_several_tiles_equal_fp64(max_tile_rows: int) -> None:
    case = PagedCase([6, 1, 3], [40, 21, 3], 8, 1, 32, dtype=torch.bfloat16)
    out, lse = decode(case, max_tile_rows=max_tile_rows, return_lse=True)
    truth, truth_lse = case.truth()
    case.check(out, truth)
    case.check_lse(lse, truth_lse)


@needs_kernels
@pytest.mark.parametrize(
    "masks",
    [{"sliding_window": 1}, {"sliding_window": 20}, {"soft_cap": 1.5}],
    ids=["window 1", "window 20", "soft cap"],
)
@pytest.mark.parametrize("mix", ["decode", "verify"])
def test_masks_and_caps_equal_fp64(mix: str, masks: dict[str, Any]) -> None:
    case = PagedCase(*MIXES[mix])
    case.check(decode(case, **masks), case.truth(**masks)[0])


@needs_kernels
def test_keys_before_key_start_are_skipped_and_need_no_blocks() -> None:
    first = [17, 0, 33, 90]  # the last request has no key of its own left
    case = PagedCase([1, 2, 1, 1], [40, 20, 60, 80], first_keys=[17, 0, 33, 64])
    key_start = torch.tensor(first, dtype=torch.int32, device=DEVICE)
    out, lse = decode(case, key_start=key_start, return_lse=True)
    truth, truth_lse = case.truth(first)
    assert (truth_lse[-1] == float("-inf")).all() and not truth[-1].any()
    case.check(out, truth)
    case.check_lse(lse, truth_lse)


@needs_kernels
def test_blocks_before_the_window_need_not_exist() -> None:
    case = PagedCase([1, 2], [100, 70], first_keys=[81, 51])
    whole = PagedCase([1, 2], [100, 70])
    assert (case.block_table != whole.block_table).any()
    out = decode(case, sliding_window=20)
    first = [81, 51]  # what the first query of each request sees begins here
    case.check(out, case.truth(first, sliding_window=20)[0])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales_of", ["tokens", "heads"])
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_eight_bit_caches_equal_fp64(
    cache_dtype: torch.dtype, scales_of: str, dtype: torch.dtype
) -> None:
    case = PagedCase(*VERIFY, dtype=dtype, cache_dtype=cache_dtype, scales_of=scales_of, dim=48)
    out, lse = decode(case, return_lse=True)
    truth, truth_lse = case.truth()
    case.check(out, truth)
    case.check_lse(lse, truth_lse)


@needs_kernels
@pytest.mark.parametrize("size", [1e-7, 1e5])
def test_eight_bit_caches_of_any_size_keep_their_precision(size: float) -> None:
    """Products run in fp16, which holds neither weights times small scales nor great queries."""
    case = PagedCase(*DECODE, dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn, size=size)
    case.q.mul_(1.0 / size)
    case.check(decode(case), case.truth()[0])


@needs_kernels
def test_every_code_of_eight_bits_is_read_exactly() -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        case = PagedCase([1], [255], 2, 2, 32, cache_dtype=dtype, scales_of="heads")
        codes = torch.arange(256, dtype=torch.uint8)
        if dtype == torch.float8_e4m3fn:
            codes[[0x7F, 0xFF]] = 0  # not numbers
        # The value of key i is code i, all over; a huge score picks one key.
        blocks = case.block_table[0, :16].long()
        case.v_cache[blocks] = codes.view(16, 16, 1, 1).expand(16, 16, 2, 32).view(dtype).to(DEVICE)
        expected = case.v_cache[blocks].float().view(256, 2, 32)
        for key in range(256) if DEVICE.type == "cuda" else (1, 100, 200):
            case.k_cache.zero_()
            block, slot = divmod(key, 16)
            case.k_cache[case.block_table[0, block], slot] = torch.ones(32).to(dtype)
            case.q.fill_(1e4)
            case.k_scale = case.v_scale = torch.ones(2, device=DEVICE)
            out = decode(case, "wide")
            torch.testing.assert_close(out[0], expected[key], rtol=0, atol=1e-6)


@needs_kernels
def test_more_requests_than_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.triton import paged_decode

    monkeypatch.setattr(paged_decode, "_BLOCK_B", (1, 2, 4))
    paged_decode._decode.forget()
    case = PagedCase([1, 0, 2, 1, 1, 0, 1, 1, 3], [3, 0, 60, 17, 0, 9, 40, 16, 31])
    for tiling in ("one", "few"):
        case.check(decode(case, tiling), case.truth()[0])


@needs_kernels
def test_a_launch_leaves_nothing_behind_for_the_next() -> None:
    from kernels.triton import paged_decode

    case = PagedCase(*LONG)
    first = decode(case, "many")
    counters = paged_decode._COUNTERS[case.q.device][-1]
    assert not counters.any()
    assert torch.equal(decode(case, "many"), first)


@needs_kernels
def test_a_bound_above_the_longest_query_changes_nothing() -> None:
    case = PagedCase(*VERIFY)
    case.check(decode(case, max_query_len=16), case.truth()[0])


@needs_kernels
def test_a_nan_stays_in_its_row() -> None:
    case = PagedCase(*VERIFY)
    case.q[1, 2] = float("nan")
    nan = decode(case).isnan().any(-1)
    assert nan.nonzero().tolist() == [[1, 2]]


@needs_kernels
@pytest.mark.parametrize("seed", range(8))
def test_random_batches_equal_fp64(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 6)
    query_lens = [draw.choice([0, 1, 1, draw.randint(1, 6)]) for _ in range(count)]
    query_lens[draw.randrange(count)] = 1
    case = PagedCase(
        query_lens,
        [draw.choice([0, draw.randint(0, 90)]) for _ in range(count)],
        heads=4 * draw.choice([1, 2]),
        kv_heads=draw.choice([1, 2, 4]),
        dim=draw.choice([16, 40, 64]),
        block_size=draw.choice([1, 2, 16, 128]),
        dtype=draw.choice([torch.float32, torch.bfloat16]),
        cache_dtype=draw.choice([None, None, torch.int8, torch.float8_e4m3fn]),
        scales_of=draw.choice(["tokens", "heads"]),
        seed=seed,
    )
    masks: dict[str, Any] = {"sliding_window": draw.choice([None, draw.randint(1, 60)])}
    masks["soft_cap"] = draw.choice([None, 2.0])
    first = [draw.choice([0, draw.randint(0, 50)]) for _ in range(count)]
    key_start = torch.tensor(first, dtype=torch.int32, device=DEVICE)
    tiling = draw.choice(list(TILINGS))
    out, lse = decode(case, tiling, key_start=key_start, return_lse=True, **masks)
    truth, truth_lse = case.truth(first, **masks)
    case.check(out, truth)
    case.check_lse(lse, truth_lse)


@needs_kernels
def test_paged_attend_takes_decode_or_prefill_by_the_longest_query() -> None:
    for query_lens in ([1, 3], [1, 30]):
        case = PagedCase(query_lens, [20, 5])
        out = paged_attend(*case.arguments, implementation="triton")
        case.check(out, case.truth()[0])


@needs_kernels
def test_a_bound_on_queries_is_all_that_is_read_of_lengths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = PagedCase(*DECODE)
    truth = case.truth()[0]

    def refuse(*_: object) -> None:
        raise AssertionError("a device value went to the host")

    arguments = case.arguments
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "tolist", refuse)
        patched.setattr(torch.Tensor, "item", refuse)
        out = paged_attend(*arguments, max_query_len=1, implementation="triton")
    case.check(out, truth)
