"""Contract of slot ``ops``: norms and activations are the reference's, in place where they say so.

On a CPU that cannot run an option this is skipped; ``tests/kernels`` has its kernels interpreted.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.activation import gelu_tanh_and_mul_reference, silu_and_mul_reference
from kernels.norm import add_rms_norm_reference_, rms_norm_reference
from tests.helpers.engines import component
from tests.helpers.interpreted import DEVICE
from workbench.configuration import options_of
from workbench.slots.ops import Ops

OPTIONS = options_of("engine/ops")
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-5

every_option = pytest.mark.parametrize("option", OPTIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_count = pytest.mark.parametrize("num_rows", [0, 1, 5, 64])


def ops_of(option: str, dtype: torch.dtype = torch.float32) -> Ops:
    ops: Ops = component("ops", option)
    reasons = ops.unsupported_reasons(DEVICE, dtype)
    if reasons:
        pytest.skip("; ".join(reasons))
    return ops


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 3).to(dtype).to(DEVICE)


def check(actual: Tensor, expected: Tensor) -> None:
    assert actual.is_contiguous() and actual.dtype == expected.dtype
    # A step a rounding: sum, norm, product. Triton's interpreter cuts off where a GPU rounds.
    eps = 3 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=max(eps, 2e-6), atol=2e-6)


@every_option
@every_dtype
@every_count
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(option: str, dtype: torch.dtype, num_rows: int, offset: float) -> None:
    ops = ops_of(option, dtype)
    weight = values(96, dtype=dtype, seed=1)
    x, residual = values(num_rows, 96, dtype=dtype), values(num_rows, 96, dtype=dtype, seed=2)
    expected = rms_norm_reference(x, weight, EPS, offset=offset)
    check(ops.rms_norm(x, weight, EPS, offset=offset), expected)
    total = residual.clone()
    expected = add_rms_norm_reference_(x, total, weight, EPS, offset=offset)
    before = x.clone()
    check(ops.add_rms_norm_(x, residual, weight, EPS, offset=offset), expected)
    check(residual, total)
    assert torch.equal(x, before)


@every_option
@every_dtype
def test_norms_of_heads_within_a_wider_row(option: str, dtype: torch.dtype) -> None:
    ops = ops_of(option, dtype)
    heads = values(5, 8, 64, dtype=dtype)[:, 2:6]
    weight = values(64, dtype=dtype, seed=1)
    check(ops.rms_norm(heads, weight, EPS), rms_norm_reference(heads, weight, EPS))


@every_option
@every_dtype
@every_count
def test_activations(option: str, dtype: torch.dtype, num_rows: int) -> None:
    ops = ops_of(option, dtype)
    gate_up = values(num_rows, 2 * 160, dtype=dtype)
    before = gate_up.clone()
    check(ops.silu_and_mul(gate_up), silu_and_mul_reference(gate_up))
    check(ops.gelu_tanh_and_mul(gate_up), gelu_tanh_and_mul_reference(gate_up))
    assert torch.equal(gate_up, before)


@every_option
def test_a_row_does_not_depend_on_the_others(option: str) -> None:
    ops = ops_of(option)
    x, weight = values(64, 96, dtype=torch.float32), values(96, dtype=torch.float32, seed=1)
    together = ops.rms_norm(x, weight, EPS)
    alone = torch.cat([ops.rms_norm(row, weight, EPS) for row in x[:, None]])
    check(together, alone)


@every_option
def test_counters_count_and_start_again(option: str) -> None:
    ops = ops_of(option)
    assert not any(ops.counters().values())
    x, weight = values(2, 96, dtype=torch.float32), values(96, dtype=torch.float32)
    ops.rms_norm(x, weight, EPS)
    ops.add_rms_norm_(x, x.clone(), weight, EPS)
    ops.silu_and_mul(x)
    ops.gelu_tanh_and_mul(x)
    assert all(ops.counters().values())
    ops.reset_counters()
    assert not any(ops.counters().values())


@every_option
def test_reasons_are_sentences_and_the_null_object_has_none(option: str) -> None:
    ops: Ops = component("ops", option)
    reasons = ops.unsupported_reasons(torch.device("cpu"), torch.float64)
    assert all(isinstance(reason, str) and reason for reason in reasons)
    assert bool(reasons) == (option != "dispatched")
