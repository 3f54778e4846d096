"""Gated activations against fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import gelu_tanh_and_mul, silu_and_mul
from kernels.activation import gelu_tanh_and_mul_reference, silu_and_mul_reference
from kernels.cpu import activation as native

Op = Callable[[Tensor], Tensor]
OPS = [(silu_and_mul, silu_and_mul_reference), (gelu_tanh_and_mul, gelu_tanh_and_mul_reference)]
IDS = ["silu", "gelu_tanh"]


@pytest.fixture(autouse=True)
def _split_small_work(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_PARALLEL_NUMEL", 0)


@pytest.mark.parametrize(("op", "reference"), OPS, ids=IDS)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (1, 3072), (3, 14), (9, 128)], ids=str)
def test_equals_fp64(
    op: Op,
    reference: Op,
    shape: tuple[int, int],
    strided: bool,
    dtype: torch.dtype,
    rows: Any,
    assert_close: Any,
) -> None:
    x = rows(*shape, dtype=dtype, strided=strided, scale=3.0)
    out = op(x)
    assert out.dtype == dtype and out.shape == (shape[0], shape[1] // 2) and out.is_contiguous()
    assert_close(out, reference(x.double()), 32 if dtype == torch.float32 else 4)


@pytest.mark.parametrize(("op", "reference"), OPS, ids=IDS)
def test_extreme_gates_stay_finite_and_right(
    op: Op, reference: Op, dtype: torch.dtype, assert_close: Any
) -> None:
    gate = torch.tensor(
        [-1e30, -1e4, -100.0, -88.0, -20.0, 0.0, 20.0, 88.0, 100.0, 1e4], dtype=dtype
    )
    x = torch.cat([gate, torch.ones_like(gate)]).unsqueeze(0)
    assert_close(op(x), reference(x.double()), 32 if dtype == torch.float32 else 4)


@pytest.mark.parametrize("op", [silu_and_mul, gelu_tanh_and_mul], ids=IDS)
def test_a_nan_shows(op: Op, dtype: torch.dtype) -> None:
    x = torch.ones(1, 64, dtype=dtype)
    x[0, 3] = float("nan")
    assert op(x).isnan().sum() == 1
