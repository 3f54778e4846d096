"""Keys and values in 8 bits: error bounds, the layout of scales, and writing into a cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.quantized_kv import (
    GREATEST_VALUE,
    allocate_kv_scales,
    check_kv_scale,
    dequantize_kv,
    find_head_scales,
    quantize_kv,
    write_quantized_kv_reference,
)

DTYPES = pytest.mark.parametrize("dtype", list(GREATEST_VALUE), ids=["int8", "fp8"])


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Heads and tokens of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 3, shape[-2]).unsqueeze(1)
    return (torch.randn(*shape, generator=generator) * sizes).to(dtype)


def error_bound(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a step of the format at each value, and fp32's own rounding."""
    own = 1e-6 * x.abs()
    if dtype == torch.int8:
        return scale.unsqueeze(-1) / 2 + own
    return torch.maximum(x.abs() / 16, scale.unsqueeze(-1) / 1024) + own


@DTYPES
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_half_a_step(dtype: torch.dtype, source: torch.dtype) -> None:
    x = draw(7, 3, 40, dtype=source)
    stored, scale = quantize_kv(x, dtype)
    assert stored.dtype == dtype and scale.shape == (7, 3) and scale.dtype == torch.float32
    error = (dequantize_kv(stored, scale, torch.float64) - x.double()).abs()
    assert (error <= error_bound(x.double(), scale.double(), dtype)).all()
    # The greatest value of each token and head is the greatest of the format: no range is wasted.
    assert (stored.float().abs().amax(-1) == GREATEST_VALUE[dtype]).all()


@DTYPES
def test_fixed_scales_saturate_beyond_the_sample(dtype: torch.dtype) -> None:
    sample = draw(50, 4, 16)
    scale = find_head_scales(sample, dtype)
    assert scale.shape == (4,)
    torch.testing.assert_close(scale * GREATEST_VALUE[dtype], sample.abs().amax((0, 2)))
    stored, same = quantize_kv(10 * sample, dtype, scale)
    assert same is scale
    assert stored.float().abs().max() == GREATEST_VALUE[dtype]
    error = (dequantize_kv(stored, scale) - 10 * sample).abs()
    is_inside = (10 * sample).abs() <= scale.unsqueeze(-1) * GREATEST_VALUE[dtype]
    assert is_inside.any() and not is_inside.all()
    assert (error <= error_bound(10 * sample, scale, dtype))[is_inside].all()


@DTYPES
def test_zeros_stay_zeros(dtype: torch.dtype) -> None:
    stored, scale = quantize_kv(torch.zeros(2, 1, 8), dtype)
    assert (scale > 0).all() and not stored.float().any()


def test_integers_are_rounded_to_even() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 127.0]])
    stored, _ = quantize_kv(x, torch.int8)
    assert stored.tolist() == [[0, 2, 2, 0, -2, 127]]


def test_a_heads_scales_lie_side_by_side() -> None:
    scale = allocate_kv_scales(3, 16, 2)
    assert scale.shape == (3, 16, 2) and scale.stride() == (32, 1, 16)


@DTYPES
@pytest.mark.parametrize("scales_of", ["tokens", "heads"])
def test_writing_equals_quantising_and_leaves_the_rest_alone(
    dtype: torch.dtype, scales_of: str
) -> None:
    k, v = draw(4, 2, 8), -draw(4, 2, 8)
    slots = torch.tensor([14, -1, 3, 8])  # block_size 3; the second token is padding
    caches = [torch.full((5, 3, 2, 8), 7, dtype=torch.int8).view(dtype) for _ in range(2)]
    before = caches[0].view(torch.uint8).clone()
    fixed = find_head_scales(k, dtype)
    if scales_of == "heads":
        scales = [fixed.clone() for _ in range(2)]
    else:
        scales = [allocate_kv_scales(5, 3, 2) for _ in range(2)]
    write_quantized_kv_reference(k, v, slots, caches[0], caches[1], *scales)
    kept = slots >= 0
    for x, cache, scale in zip((k, v), caches, scales, strict=True):
        stored, own = quantize_kv(x[kept], dtype, fixed if scales_of == "heads" else None)
        flat = cache.view(torch.uint8).view(15, 2, 8)
        assert torch.equal(flat[slots[kept]], stored.view(torch.uint8))
        others = [i for i in range(15) if i not in slots.tolist()]
        assert torch.equal(flat[others], before.view(15, 2, 8)[others])
        if scales_of == "tokens":
            flat_scale = scale.reshape(15, 2)
            assert torch.equal(flat_scale[slots[kept]], own)
            assert not flat_scale[others].any()
        else:
            assert torch.equal(scale, fixed)


def test_scales_that_do_not_fit_the_cache_are_refused() -> None:
    plain, cache = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="k_scale was given"):
        check_kv_scale(plain, torch.ones(3), "k_scale")
    with pytest.raises(ValueError, match="needs v_scale"):
        check_kv_scale(cache, None, "v_scale")
    for wrong in (torch.ones(2), torch.ones(2, 3, 4), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"float32 of shape \(2, 4, 3\)"):
            check_kv_scale(cache, wrong, "k_scale")
    for right in (torch.ones(3), torch.ones(2, 4, 3)):
        check_kv_scale(cache, right, "k_scale")
    with pytest.raises(ValueError, match="int8 or float8_e4m3fn"):
        quantize_kv(plain, torch.int16)
