"""Schemes of quantised weights, and rounding to the nearest code."""

from __future__ import annotations

import pytest
import torch

from techniques.quantization import WeightScheme, encode, find_grid
from workbench.core.errors import ConfigError

NAMES = ("w4g32", "w4g64z", "w8", "w8z", "w4", "w8g128")


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    scheme = WeightScheme.parse(name)
    assert scheme.name == name and WeightScheme.parse(scheme.name) == scheme
    assert scheme.greatest - scheme.least == 2**scheme.bits - 1
    assert scheme.least == (0 if name.endswith("z") else -(2 ** (scheme.bits - 1)))


@pytest.mark.parametrize("name", ["w3g64", "w4g0", "int4", "w4g64x", ""])
def test_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown scheme of weights .*w4g128"):
        WeightScheme.parse(name)


def test_groups_that_do_not_divide() -> None:
    assert WeightScheme(4, 64).num_groups(576) == 9 and WeightScheme(8, 0).num_groups(576) == 1
    with pytest.raises(ConfigError, match=r"groups of 128 do not divide 576.*32, 64"):
        WeightScheme(4, 128).num_groups(576)
    for wrong in ({"bits": 3}, {"group_size": -1}):
        with pytest.raises(ConfigError, match=r"not known|must be 0"):
            WeightScheme(**wrong)


@pytest.mark.parametrize("name", NAMES)
def test_values_lie_within_half_a_step(name: str) -> None:
    """Of the grid that holds all of them; and what lies on it is kept."""
    scheme = WeightScheme.parse(name)
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(0)) + 0.3
    weight[2, :128] = 0
    weight[3] = weight[3].abs()
    scales, zeros = find_grid(weight, scheme)
    assert (scales > 0).all() and (zeros is None) == (not scheme.has_zeros)
    found = encode(weight, scheme, scales, zeros)
    assert found.codes.min() >= scheme.least and found.codes.max() <= scheme.greatest
    values = found.dequantize()
    step = scales[:, found.group_of_inputs()]
    # The zero point is rounded as well, which may push an end of the range over the grid's.
    assert ((values - weight).abs() <= (1.0 if scheme.has_zeros else 0.5) * step * 1.001).all()
    assert (values[2, :128] == 0).all()
    again = encode(values, scheme, scales, zeros)
    assert torch.equal(again.codes, found.codes)


def test_inputs_in_groups_of_another_order() -> None:
    scheme = WeightScheme(4, 4)
    weight = torch.arange(16.0).view(2, 8)
    index = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0], dtype=torch.int32)
    order = index.argsort(stable=True)
    scales, _ = find_grid(weight[:, order], scheme)
    found = encode(weight, scheme, scales, group_index=index).dequantize()
    sorted_found = encode(weight[:, order], scheme, scales).dequantize()
    assert torch.equal(found[:, order], sorted_found)
