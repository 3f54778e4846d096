"""RMSNorm against fp64, against Transformers, and against its own reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernels import add_rms_norm_, rms_norm
from kernels.cpu import norm as native
from kernels.norm import rms_norm_reference

EPS = 1e-5
SHAPES = [(0, 64), (1, 1), (1, 64), (3, 7), (5, 576), (33, 100), (4, 3, 16), (0, 3, 16)]


@pytest.fixture(autouse=True)
def _split_small_work(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_PARALLEL_NUMEL", 0)


def truth(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    return rms_norm_reference(x.double(), weight.double(), EPS, offset=offset)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_equals_fp64(
    shape: tuple[int, ...],
    strided: bool,
    offset: float,
    dtype: torch.dtype,
    rows: Any,
    assert_close: Any,
) -> None:
    x = rows(*shape, dtype=dtype, strided=strided)
    weight = rows(shape[-1], dtype=dtype)
    out = rms_norm(x, weight, EPS, offset=offset)
    assert out.dtype == dtype and out.shape == x.shape and out.is_contiguous()
    assert_close(out, truth(x, weight, offset), 16 if dtype == torch.float32 else 4)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) == 2], ids=str)
def test_add_rms_norm_updates_the_residual_and_norms_it(
    shape: tuple[int, ...],
    strided: bool,
    offset: float,
    dtype: torch.dtype,
    rows: Any,
    assert_close: Any,
) -> None:
    x = rows(*shape, dtype=dtype, strided=strided)
    residual = rows(*shape, dtype=dtype, strided=strided)
    weight = rows(shape[-1], dtype=dtype)
    total = residual + x
    out = add_rms_norm_(x, residual, weight, EPS, offset=offset)
    assert torch.equal(residual, total)
    assert_close(out, truth(total, weight, offset), 16 if dtype == torch.float32 else 4)


def test_heads_inside_a_fused_projection_are_normed_in_their_place(
    dtype: torch.dtype, rows: Any, assert_close: Any
) -> None:
    qkv = rows(5, 10 * 16, dtype=dtype)
    k = qkv[:, 6 * 16 : 8 * 16].view(5, 2, 16)
    weight = rows(16, dtype=dtype)
    bound = 16 if dtype == torch.float32 else 4
    assert_close(rms_norm(k, weight, EPS), truth(k, weight, 0.0), bound)


@pytest.mark.parametrize(
    ("module", "offset"), [(LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0)], ids=["llama", "gemma3"]
)
def test_equals_transformers(
    module: Callable[..., torch.nn.Module], offset: float, dtype: torch.dtype, rows: Any
) -> None:
    x, weight = rows(64, 576, dtype=dtype), rows(576, dtype=dtype)
    theirs = module(576, eps=EPS).to(dtype)
    theirs.weight.data.copy_(weight)
    expected = theirs(x)
    ours = rms_norm(x, weight, EPS, offset=offset)
    if dtype == torch.float32:
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    else:  # the same roundings: a sum in another order may tip one of them, rarely
        torch.testing.assert_close(ours, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert (ours != expected).float().mean() < 0.01


def test_a_nan_stays_in_its_row(dtype: torch.dtype, rows: Any) -> None:
    x = rows(3, 64, dtype=dtype)
    x[1, 5] = float("nan")
    out = rms_norm(x, rows(64, dtype=dtype), EPS)
    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()
