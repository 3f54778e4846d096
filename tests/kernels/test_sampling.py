"""Greedy choice against torch's argmax, with ties, NaN and infinities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import argmax
from kernels.cpu import sampling as native


@pytest.fixture(autouse=True)
def _split_small_work(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_PARALLEL_NUMEL", 0)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(
    "shape", [(0, 5), (1, 1), (1, 31), (4, 1023), (3, 1025), (2, 49152)], ids=str
)
def test_finds_the_greatest(
    shape: tuple[int, int], strided: bool, dtype: torch.dtype, rows: Any
) -> None:
    logits = rows(*shape, dtype=dtype, strided=strided)
    chosen = argmax(logits)
    assert chosen.dtype == torch.int64 and chosen.shape == shape[:1]
    best = logits.gather(1, chosen.unsqueeze(1))
    assert torch.equal(best.squeeze(1), logits.amax(1)) if shape[0] else True


@pytest.mark.parametrize("width", [40, 5000])
@pytest.mark.parametrize("first", [0, 17, 39])
def test_takes_the_first_of_equals(first: int, width: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, width, dtype=dtype)
    logits[0, [first, width - 1]] = 1.0
    assert argmax(logits).tolist() == [first, 0]


@pytest.mark.parametrize("position", [0, 1023, 1024, 2999])
def test_a_nan_is_the_greatest_as_in_torch(position: int, dtype: torch.dtype, rows: Any) -> None:
    logits = rows(3, 3000, dtype=dtype)
    logits[1, position] = float("nan")
    logits[1, 2999] = float("nan")
    assert argmax(logits)[1] == position == torch.argmax(logits[1])


def test_infinities(dtype: torch.dtype) -> None:
    low = torch.full((3, 2000), float("-inf"), dtype=dtype)
    low[1, 1500] = -1e30
    low[2, 1999] = float("inf")
    assert argmax(low).tolist() == [0, 1500, 1999]
