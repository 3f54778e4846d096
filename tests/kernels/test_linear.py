"""Packed linear layers against fp64, and what they keep in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import apply_linear, pack_linear
from kernels.linear import can_pack, linear_reference


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 8, 33])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 5), (96, 64), (130, 576)])
def test_equals_fp64(
    n: int,
    k: int,
    num_rows: int,
    strided: bool,
    has_bias: bool,
    dtype: torch.dtype,
    rows: Any,
    assert_close: Any,
) -> None:
    weight, x = (
        rows(n, k, dtype=dtype, scale=k**-0.5),
        rows(num_rows, k, dtype=dtype, strided=strided),
    )
    bias = rows(n, dtype=dtype) if has_bias else None
    out = apply_linear(pack_linear(weight, bias), x)
    assert out.dtype == dtype and out.shape == (num_rows, n) and out.is_contiguous()
    wide_bias = None if bias is None else bias.double()
    truth = linear_reference(weight.double(), wide_bias, x.double())
    assert_close(out, truth, 64 if dtype == torch.float32 else 4)


@pytest.mark.parametrize("expected_m", [1, 8, 512])
def test_the_layout_serves_every_number_of_rows(
    expected_m: int, dtype: torch.dtype, rows: Any, assert_close: Any
) -> None:
    weight = rows(96, 64, dtype=dtype, scale=0.125)
    packed = pack_linear(weight, expected_m=expected_m)
    for num_rows in (1, 2, 17, 64):
        x = rows(num_rows, 64, dtype=dtype)
        truth = x.double() @ weight.double().T
        assert_close(apply_linear(packed, x), truth, 64 if dtype == torch.float32 else 4)


def test_the_layer_owns_its_weight_and_gives_it_back(dtype: torch.dtype, rows: Any) -> None:
    weight = rows(96, 64, dtype=dtype)
    original = weight.clone()
    packed = pack_linear(weight, rows(96, dtype=dtype))
    assert packed.is_packed == can_pack(weight)
    if packed.is_packed:
        weight.zero_()
    assert torch.equal(packed.dense_weight(), original)
    assert packed.num_bytes == (96 * 64 + 96) * weight.element_size()


def test_other_dtypes_are_kept_as_they_are(rows: Any) -> None:
    weight = rows(6, 4, dtype=torch.float64)
    packed = pack_linear(weight)
    assert not packed.is_packed and packed.weight is weight
    x = rows(3, 4, dtype=torch.float64)
    assert torch.equal(apply_linear(packed, x), x @ weight.T)


def test_wrong_shapes_are_named(rows: Any) -> None:
    with pytest.raises(ValueError, match="2 dimensions"):
        pack_linear(rows(4, dtype=torch.float32))
    with pytest.raises(ValueError, match="bias of shape"):
        pack_linear(rows(4, 3, dtype=torch.float32), rows(3, dtype=torch.float32))
