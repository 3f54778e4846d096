"""Argmax of ``kernels.triton`` against torch's: the same index, always."""

from __future__ import annotations

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
INF, NAN = float("inf"), float("nan")


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds the greatest integer, or NaN, until it is written."""
    empty, new_empty = torch.empty, Tensor.new_empty

    def poison(out: Tensor) -> Tensor:
        return out.fill_(NAN if out.is_floating_point() else torch.iinfo(out.dtype).max)

    def from_new(self: Tensor, *args: Any, **options: Any) -> Tensor:
        return poison(new_empty(self, *args, **options))

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", from_new)


def check(logits: Tensor) -> None:
    from kernels.triton.argmax import argmax

    actual = argmax(logits)
    assert actual.dtype == torch.int64
    # The first of equals, which torch does not promise on every device.
    wide = logits.float().cpu()
    is_nan = wide.isnan()
    best = torch.where(is_nan.any(-1, keepdim=True), is_nan, wide == wide.amax(-1, keepdim=True))
    assert actual.tolist() == best.int().argmax(-1).tolist()


def values(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "vocab"),
    [(1, 1), (1, 17), (3, 2048), (1, 2049), (2, 32000), (20, 5000), (1, 151936), (1, 262144)],
)
def test_equals_torch(num_rows: int, vocab: int, dtype: torch.dtype) -> None:
    check(values(num_rows, vocab, dtype=dtype))


@needs_kernels
@pytest.mark.parametrize("place", [0, 1, 2047, 2048, 4095, 9000, 9999])
def test_a_single_greatest_is_found_anywhere(place: int) -> None:
    logits = values(3, 10000, dtype=torch.bfloat16)
    logits[1, place] = 100.0
    check(logits)
    check(-logits.abs())  # negative numbers alone: the order of their bits is another


@needs_kernels
@pytest.mark.parametrize("value", [0.0, -3.0, -INF, INF, NAN])
@pytest.mark.parametrize("num_rows", [1, 40])
def test_of_equals_the_first(value: float, num_rows: int) -> None:
    check(torch.full((num_rows, 9000), value, device=DEVICE))


@needs_kernels
def test_zeros_of_both_signs_are_equal() -> None:
    logits = torch.full((2, 9000), -0.0, device=DEVICE)
    logits[0, 5] = 0.0
    logits[1, 8000:] = 0.0
    check(logits)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_counts_as_the_greatest(dtype: torch.dtype) -> None:
    logits = values(6, 9000, dtype=dtype)
    logits[0, [7, 6000]] = NAN
    logits[1, 8999] = NAN
    logits[2, 3], logits[2, 4500] = INF, -NAN
    logits[3, [3, 2051, 4099]] = NAN  # one lane, one after another
    logits[4] = -INF
    logits[4, 8000] = NAN
    check(logits)


@needs_kernels
def test_nan_of_either_sign_and_any_payload_are_alike() -> None:
    bits = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, 0x7FFFFFFF], dtype=torch.int32)
    logits = values(4, 5000, dtype=torch.float32)
    logits[:, [4000, 4001, 3000, 4500]] = bits.view(torch.float32).to(DEVICE)
    check(logits)


@needs_kernels
def test_strided_rows() -> None:
    wide = values(9, 7000, dtype=torch.bfloat16)
    for view in (wide[:, 3:5003], wide[::2, 1:], wide[4:5, 6999:], wide[:1].expand(3, -1)):
        check(view)


@needs_kernels
def test_nothing() -> None:
    from kernels.triton.argmax import argmax

    assert argmax(torch.zeros(0, 100, device=DEVICE)).tolist() == []
    with pytest.raises(ValueError, match="without a value"):
        argmax(torch.zeros(2, 0, device=DEVICE))
