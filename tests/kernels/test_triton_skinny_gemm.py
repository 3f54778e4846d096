"""Products of few rows in ``kernels.triton`` against double precision, and against themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.interpreted import (
    DEVICE,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = [0, 1, 2, 5, 16, 17, 40]
NAN = float("nan")
KINDS = [
    "shared out",
    "many pieces a tile",
    "few programs",
    "a program a tile",
]


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds NaN until it is written; scratch memory is new in every test."""
    empty = torch.empty

    def poison(*args: Any, **options: Any) -> Tensor:
        return empty(*args, **options).fill_(NAN)

    monkeypatch.setattr(torch, "empty", poison)
    if DEVICE.type == "cpu":
        from kernels.triton import skinny_gemm

        monkeypatch.setattr(skinny_gemm, "_PARTS", {})
        monkeypatch.setattr(skinny_gemm, "_COUNTERS", {})
        skinny_gemm._skinny.forget()


def values(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def strided(x: Tensor) -> Tensor:
    """``x`` inside a wider tensor of NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + 24), NAN, dtype=x.dtype, device=x.device)
    view = wide[:, 8 : 8 + x.shape[1]]
    return view.copy_(x)


def tilings() -> dict[str, Any]:
    """Cuts of every kind: shares within a tile, over several, of whole ones, without an end."""
    from kernels.triton.skinny_gemm import SkinnyTiling

    cuts = (
        SkinnyTiling(32, 32, num_stages=2, programs=3),
        SkinnyTiling(64, 16, num_stages=2, programs=16),
        SkinnyTiling(16, 32, num_stages=2, programs=1),
        SkinnyTiling(32, 64, num_stages=2, programs=0),
    )
    return dict(zip(KINDS, cuts, strict=True))


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None, tiling: Any = None) -> Tensor:
    from kernels.triton import skinny_gemm

    out = skinny_gemm.skinny_linear(x, weight, bias, tiling=tiling)
    assert out.shape == (x.shape[0], weight.shape[0])
    assert out.dtype == x.dtype and out.is_contiguous()
    truth = x.double() @ weight.double().T
    if bias is not None:
        truth += bias.double()
    # Sums in fp32, then one rounding (Triton's interpreter cuts off where a GPU rounds).
    scale = truth.abs().max().item() if truth.numel() else 1.0
    bound = torch.finfo(x.dtype).eps
    torch.testing.assert_close(out.double(), truth, rtol=bound, atol=4e-6 * scale)
    for counters in itertools.chain(*skinny_gemm._COUNTERS.values()):
        assert not counters.any(), "a launch left a counter behind"
    return out


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize(("out_features", "in_features"), [(100, 96), (64, 512), (33, 1040)])
def test_equals_the_product(
    num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    x = values(num_tokens, in_features, dtype=dtype)
    check(x, values(out_features, in_features, dtype=dtype, seed=1))


@needs_kernels
def test_more_columns_than_a_whole_number_of_blocks() -> None:
    check(values(2, 4096 + 16), values(70, 4096 + 16, seed=1))


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(100, 96), (130, 400)])
def test_every_cut_gives_the_same(
    kind: str, out_features: int, in_features: int, has_bias: bool
) -> None:
    tiling = tilings()[kind]
    weight = values(out_features, in_features, seed=1)
    bias = values(out_features, seed=2) if has_bias else None
    for num_tokens in (1, 5):
        x = values(num_tokens, in_features)
        first = check(x, weight, bias, tiling)
        assert torch.equal(check(x, weight, bias, tiling), first), "two launches differ"
        assert torch.equal(check(strided(x), weight, bias, tiling), first)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("inner", "in_features"), [(50, 96), (64, 400)])
def test_gates_what_it_multiplies(kind: str, activation: str, inner: int, in_features: int) -> None:
    from kernels.triton import activation as activations
    from kernels.triton.skinny_gemm import skinny_linear

    weight, bias = values(2 * inner, in_features, seed=1), values(2 * inner, seed=2)
    for num_tokens, tiling in ((2, tilings()[kind]), (17, None)):
        x = strided(values(num_tokens, in_features)).mul_(in_features**-0.5)
        halves = skinny_linear(x, weight, bias, tiling=tiling)
        expected = getattr(activations, f"{activation}_and_mul")(halves).double()
        out = skinny_linear(x, weight, bias, activation=activation, tiling=tiling)
        assert out.shape == (num_tokens, inner) and out.is_contiguous()
        # Pieces may be cut elsewhere: a sum may be rounded to the number beside, twice.
        bound = 4 * torch.finfo(out.dtype).eps
        torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound / 4)
        again = skinny_linear(x, weight, bias, activation=activation, tiling=tiling)
        assert torch.equal(again, out), "two launches differ"


@needs_kernels
def test_a_row_is_the_same_alone_and_among_others() -> None:
    weight, x = values(100, 400, seed=1), values(16, 400)
    together = check(x, weight)
    for index in (0, 7, 15):
        assert torch.equal(check(x[index : index + 1], weight)[0], together[index])


@needs_kernels
def test_sizes_share_scratch_memory() -> None:
    from kernels.triton import skinny_gemm

    small, large = values(40, 256, seed=1), values(300, 512, seed=2)
    for _ in range(2):
        check(values(3, 256), small)
        check(values(17, 512), large)
    device = small.device  # with its index
    assert len(skinny_gemm._PARTS[device]) == len(skinny_gemm._COUNTERS[device]) == 1


@needs_kernels
def test_scratch_memory_grows_and_the_old_stays() -> None:
    from kernels.triton import skinny_gemm

    device = torch.device("cpu")
    parts = skinny_gemm._PARTS.setdefault(device, [])
    counters = skinny_gemm._COUNTERS.setdefault(device, [])
    skinny_gemm.keep_scratch(10, 10, device)
    before = parts[-1]
    skinny_gemm.keep_scratch(before.numel() + 1, counters[-1].numel() + 1, device)
    assert parts[-1].numel() > before.numel() and counters[-1].numel() > counters[0].numel()
    assert parts[0] is before
    assert not counters[-1].any()


@needs_kernels
def test_no_columns_leave_the_bias() -> None:
    from kernels.triton.skinny_gemm import skinny_linear

    x, weight, bias = values(2, 0), values(5, 0), values(5)
    assert torch.equal(skinny_linear(x, weight, bias), bias.expand(2, 5))
    assert not skinny_linear(x, weight).any()


@needs_kernels
def test_weights_may_be_rows_of_a_larger_tensor() -> None:
    check(values(3, 96), strided(values(50, 96, seed=1)))


@needs_kernels
def test_what_it_does_not_take_is_refused() -> None:
    from kernels.triton.skinny_gemm import skinny_linear

    with pytest.raises(ValueError, match="up to 64"):
        skinny_linear(values(65, 96), values(50, 96))
    with pytest.raises(ValueError, match="'relu' must be one of silu, gelu_tanh"):
        skinny_linear(values(2, 96), values(50, 96), activation="relu")
