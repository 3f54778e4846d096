"""Attention to shared prefixes, merging, and both with the attention to own keys, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import cascade_attend, merge_states, shared_prefix_attend
from kernels.attention_reference import attend_reference, gather_pages
from tests.helpers.interpreted import DEVICE, needs_kernels, run_in_interpreter, starts_interpreter
from tests.helpers.paged_cases import NOWHERE, PagedCase

IMPLEMENTATIONS = [
    "reference",
    pytest.param("triton", marks=needs_kernels),
]
INF = float("inf")


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


def index(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Grouped:
    """Two pairs of requests that share 32 tokens each, and one request that shares none."""

    def __init__(self, query_lens: tuple[int, ...] = (1, 2, 1, 1, 1), **shape: Any) -> None:
        self.case = case = PagedCase(list(query_lens), [60, 48, 90, 34, 20], seed=3, **shape)
        pages = 32 // case.block_size
        for first, second in ((0, 1), (2, 3)):
            case.block_table[second, :pages] = case.block_table[first, :pages]
        starts = torch.tensor([0, *query_lens]).cumsum(0).tolist()
        self.tokens = [list(range(starts[0], starts[2])), list(range(starts[2], starts[4]))]
        self.groups = {
            "group_block_table": case.block_table[[0, 2], :pages],
            "prefix_lens": index(32, 32),
            "token_index": index(*self.tokens[0], *self.tokens[1]),
            "group_start_loc": index(0, starts[2], starts[4]),
        }
        self.key_start = index(32, 32, 32, 32, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_merging_halves_equals_the_whole(implementation: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(5, 4, 24, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(40, 2, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    whole, whole_lse = attend_reference(q, k, v, 0.3)
    parts = []
    for keys in (slice(0, 13), slice(13, 40)):
        out, lse = attend_reference(q, k[keys], v[keys], 0.3)
        parts += [out.float().to(DEVICE), lse.float().to(DEVICE)]
    out, lse = merge_states(*parts, implementation=implementation)
    torch.testing.assert_close(out.double().cpu(), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.double().cpu(), whole_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_side_without_keys_is_ignored_whatever_it_holds(implementation: Any) -> None:
    out_a, out_b = torch.full((2, 3, 1, 8), float("nan"), device=DEVICE)
    lse_a, lse_b = torch.full((2, 3, 1), -INF, device=DEVICE)
    out_a[0], lse_a[0] = 2.0, 700.0  # its exponential overflows
    out_b[1], lse_b[1] = 3.0, -700.0
    out, lse = merge_states(out_a, lse_a, out_b, lse_b, implementation=implementation)
    expected = torch.tensor([2.0, 3.0, 0.0]).view(3, 1, 1).expand(3, 1, 8)
    assert torch.equal(out.cpu(), expected)
    torch.testing.assert_close(lse.flatten().cpu(), torch.tensor([700.0, -700.0, -INF]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"dtype": torch.bfloat16, "block_size": 32},
        {"heads": 12, "kv_heads": 1, "dim": 80},
        {"cache_dtype": torch.int8, "block_size": 1},
        {"cache_dtype": torch.float8_e4m3fn, "dtype": torch.float16, "scales_of": "heads"},
    ],
    ids=["fp32", "bf16, page 32", "MQA, D 80", "int8, page 1", "fp8"],
)
def test_tokens_of_a_group_see_the_whole_prefix(shape: dict[str, Any], implementation: Any) -> None:
    grouped = Grouped(**shape)
    case = grouped.case
    arguments = (case.q, case.k_cache, case.v_cache, *grouped.groups.values(), case.scale)
    out, lse = shared_prefix_attend(
        *arguments, soft_cap=3.0, implementation=implementation, **case.scales
    )
    truth, truth_lse = torch.zeros(out.shape).double(), torch.full(lse.shape, -INF).double()
    for group, tokens in enumerate(grouped.tokens):
        k, v = (
            wide_prefix(case, name, grouped.groups["group_block_table"][group]) for name in "kv"
        )
        q = case.q[tokens].double().cpu()
        truth[tokens], truth_lse[tokens] = attend_reference(q, k, v, case.scale, soft_cap=3.0)
    case.check(out.cpu(), truth)
    case.check_lse(lse.cpu(), truth_lse)
    assert (lse[-1] == -INF).all() and not out[-1].any()


def wide_prefix(case: PagedCase, name: str, blocks: Tensor) -> Tensor:
    cache: Tensor = getattr(case, f"{name}_cache")
    scale: Tensor | None = getattr(case, f"{name}_scale")
    pages = gather_pages(cache, blocks, 0, 32).double()
    if scale is not None:
        own = scale if scale.dim() == 1 else gather_pages(scale, blocks, 0, 32)
        pages = pages * own.double().unsqueeze(-1)
    return pages.cpu()


@needs_kernels
@pytest.mark.parametrize("num_parts", [1, 3])
def test_parts_and_tiles_of_a_prefix_equal_fp64(num_parts: int) -> None:
    from kernels.triton.shared_prefix import PrefixTiling
    from kernels.triton.shared_prefix import shared_prefix_attend as attend

    grouped = Grouped(heads=24, kv_heads=2)  # 36 rows of a group: three tiles of 16
    case = grouped.case
    arguments = (case.q, case.k_cache, case.v_cache, *grouped.groups.values(), case.scale)
    out, lse = attend(*arguments, tiling=PrefixTiling(16, 16, 4, 2, num_parts))
    truth, truth_lse = shared_prefix_attend(
        case.q.double(), case.k_cache.double(), case.v_cache.double(), *arguments[3:],
        implementation="reference",
    )  # fmt: skip
    case.check(out, truth)
    case.check_lse(lse, truth_lse)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("query_lens", [(1, 2, 1, 1, 1), (1, 20, 1, 1, 2)], ids=["few", "many"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"dtype": torch.bfloat16, "cache_dtype": torch.float8_e4m3fn}],
    ids=["fp32", "fp8"],
)
def test_cascade_equals_plain_attention(
    shape: dict[str, Any], query_lens: tuple[int, ...], implementation: Any
) -> None:
    grouped = Grouped(query_lens, **shape)
    case = grouped.case
    out = cascade_attend(
        *case.arguments,
        **grouped.groups,
        **case.scales,
        key_start=grouped.key_start,
        max_query_len=max(query_lens),
        implementation=implementation,
    )
    case.check(out, case.truth()[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_call_on_padded_groups_serves_whatever_they_hold(implementation: Any) -> None:
    """As a captured graph does it: the same tensors throughout, of which more or less is used."""
    grouped = Grouped(query_lens=(1, 1, 1, 1, 1))
    case = grouped.case
    num_requests, num_groups = 5, 4
    pages = grouped.groups["group_block_table"].shape[1]
    table = torch.full((num_groups, pages + 3), NOWHERE, dtype=torch.int32, device=DEVICE)
    lens, starts = index(*[0] * num_groups), index(*[0] * (num_groups + 1))
    tokens, key_start = index(*[0] * num_requests), index(*[0] * num_requests)

    def attend() -> Tensor:
        return cascade_attend(
            *case.arguments,
            group_block_table=table,
            prefix_lens=lens,
            token_index=tokens,
            group_start_loc=starts,
            key_start=key_start,
            max_query_len=1,
            is_padded=True,
            implementation=implementation,
        )

    truth = case.truth()[0]
    case.check(attend(), truth)
    blocks = grouped.groups["group_block_table"]
    for members in ([[0, 1], [2, 3]], [[2, 3]], [[1, 0]], []):
        table.fill_(NOWHERE)
        ends = [0]
        for tensor in (lens, tokens, key_start):
            tensor.zero_()
        for group, requests in enumerate(members):
            table[group, :pages] = blocks[0 if 0 in requests else 1]
            lens[group] = 32
            tokens[ends[-1] : ends[-1] + len(requests)] = index(*requests)
            key_start[requests] = 32
            ends.append(ends[-1] + len(requests))
        starts.copy_(index(*ends, *[ends[-1]] * (num_groups + 1 - len(ends))))
        case.check(attend(), truth)
        if members:  # and it is the groups that are read
            table[:, 0] = table[:, 1]
            assert not torch.allclose(attend(), truth.to(DEVICE).float(), atol=1e-3)


@needs_kernels
def test_requests_in_pieces_take_the_prefix_in_once() -> None:
    from kernels.triton.decode_tiling import DecodeTiling
    from kernels.triton.paged_decode import paged_decode
    from kernels.triton.shared_prefix import PrefixTiling, prefix_states

    grouped = Grouped()
    case = grouped.case
    tiling = PrefixTiling(16, 16, 4, 2, num_parts=2)
    arguments = (case.q, case.k_cache, case.v_cache, *grouped.groups.values(), case.scale)
    prior = prefix_states(*arguments, tiling=tiling)
    for programs in (1, 12):
        out = paged_decode(
            *case.arguments,
            max_query_len=2,
            key_start=grouped.key_start,
            prior=prior,
            tiling=DecodeTiling(16, 4, 2, programs, 1),
        )
        case.check(out, case.truth()[0])


def test_an_implementation_that_does_not_exist_is_refused() -> None:
    one = torch.zeros(1, 1, 8)
    lse = torch.zeros(1, 1)
    wrong: Any = "cuda"
    with pytest.raises(ValueError, match="auto, triton or reference"):
        merge_states(one, lse, one, lse, implementation=wrong)
