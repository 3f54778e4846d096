"""RoPE, QK-norm and KV write of ``kernels.triton`` against the torch reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.kv_cache import write_kv_reference
from kernels.quantized_kv import allocate_kv_scales, dequantize_kv, quantize_kv
from kernels.rotary import apply_rope_and_write_kv, apply_rope_and_write_kv_reference
from tests.helpers.interpreted import (
    DEVICE,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)

CPU = torch.device("cpu")
MAX_POSITION = 50
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EIGHT_BIT = [torch.int8, torch.float8_e4m3fn]
#: tokens, query heads, KV heads, head size, rotated part of it, block size
SHAPES = [
    (1, 9, 3, 64, 64, 16),
    (5, 4, 4, 6, 6, 1),
    (7, 4, 2, 80, 32, 32),
    (5, 8, 1, 128, 128, 64),
    (3, 2, 1, 96, 96, 48),
]


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


def angles(rotary_dim: int) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    phase = torch.arange(MAX_POSITION).double().unsqueeze(1) * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=1).float().to(DEVICE)


class Case:
    """Inputs of one call, and room for what it writes: NaN, or a mark no scale can be."""

    def __init__(
        self,
        shape: tuple[int, int, int, int, int, int],
        dtype: torch.dtype,
        cache_dtype: torch.dtype | None = None,
        scales_of: str = "tokens",
        has_norm: bool = False,
        offset: float = 0.0,
    ) -> None:
        tokens, heads, kv_heads, dim, rotary_dim, block_size = shape
        generator = torch.Generator().manual_seed(sum(shape))
        wide = torch.randn(tokens, (heads + 2 * kv_heads) * dim + 3, generator=generator)
        wide[0, ::2] *= 1e-3  # small and large values in a row
        self.qkv = wide.to(dtype).to(DEVICE)[:, 3:]
        self.positions = torch.randint(MAX_POSITION, (tokens,), generator=generator).to(DEVICE)
        self.cos_sin = angles(rotary_dim)
        num_blocks = tokens // block_size + 2
        slots = torch.randperm(num_blocks * block_size, generator=generator)[:tokens]
        slots[-1:] = -1 if tokens > 1 else slots[-1:]
        self.slots = slots.to(DEVICE)
        # Keys and values as two views of one pool, heads before tokens.
        pool = torch.zeros(num_blocks, 2, kv_heads, block_size, dim, device=DEVICE)
        pool = pool.fill_(7).to(cache_dtype or dtype)
        self.caches = [pool[:, i].transpose(1, 2) for i in range(2)]
        self.scales: list[Tensor | None] = [None, None]
        if cache_dtype is not None:
            marked = [
                allocate_kv_scales(num_blocks, block_size, kv_heads, DEVICE).fill_(-3.0)
                for _ in range(2)
            ]
            fixed = [torch.linspace(0.004, 0.03, kv_heads, device=DEVICE) for _ in range(2)]
            self.scales = list(marked if scales_of == "tokens" else fixed)
        norms = (1 + torch.randn(2, dim, generator=generator) / 4).to(dtype).to(DEVICE)
        self.options: dict[str, Any] = {
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": dim,
            "q_norm": norms[0] if has_norm else None,
            "k_norm": norms[1] if has_norm else None,
            "norm_offset": offset,
        }

    def run(
        self, op: Any, device: torch.device = DEVICE
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        """Outputs of ``op``, which ran on ``device``: the projection, the caches, the scales."""

        def copied(value: Any) -> Any:
            return value.clone().to(device) if isinstance(value, Tensor) else value

        qkv, caches = copied(self.qkv), [copied(c) for c in self.caches]
        scales = [copied(s) for s in self.scales]
        options = {name: copied(value) for name, value in self.options.items()}
        options |= {"k_scale": scales[0], "v_scale": scales[1]}
        inputs = [copied(x) for x in (self.positions, self.cos_sin, self.slots)]
        op(qkv, *inputs, *caches, **options)
        return (
            qkv.to(DEVICE),
            [c.to(DEVICE) for c in caches],
            [None if s is None else s.to(DEVICE) for s in scales],
        )


def fused(*args: Any, **options: Any) -> None:
    from kernels.triton import rotary

    rotary.apply_rope_and_write_kv(*args, **options)


def check(case: Case, dtype: torch.dtype) -> None:
    qkv, caches, _ = case.run(fused)
    # On the CPU, where the reference leaves out the tokens without a slot.
    expected_qkv, expected_caches, _ = case.run(apply_rope_and_write_kv_reference, CPU)
    # fp32 arithmetic in another order may cross a boundary of rounding: once in the norm, once in
    # the rotation, whose two products are as large as the numbers that it turns.
    eps = torch.finfo(dtype).eps
    bound = {"rtol": 2 * eps, "atol": eps * float(expected_qkv.abs().max())}
    torch.testing.assert_close(qkv, expected_qkv, **bound)
    for cache, expected in zip(caches, expected_caches, strict=True):
        torch.testing.assert_close(cache, expected, **bound)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "has_norm", "offset"),
    [
        (torch.float32, False, 0.0),
        (torch.float32, True, 0.0),
        (torch.float32, True, 1.0),
        (torch.bfloat16, True, 0.0),
        (torch.float16, True, 1.0),
    ],
)
def test_equals_reference(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, has_norm: bool, offset: float
) -> None:
    check(Case(shape, dtype, has_norm=has_norm, offset=offset), dtype)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES[::2])
@pytest.mark.parametrize("cache_dtype", EIGHT_BIT)
@pytest.mark.parametrize("scales_of", ["tokens", "heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_write_equals_reference(
    shape: tuple[int, int, int, int, int, int],
    cache_dtype: torch.dtype,
    scales_of: str,
    dtype: torch.dtype,
) -> None:
    case = Case(shape, dtype, cache_dtype, scales_of, has_norm=True)
    qkv, caches, scales = case.run(fused)
    _, expected_caches, expected_scales = case.run(apply_rope_and_write_kv_reference)
    heads, kv_heads, dim = shape[1:4]
    written = case.slots[case.slots >= 0]
    blocks, offsets = written // shape[5], written % shape[5]
    for which in range(2):
        cache, scale = caches[which], scales[which]
        expected, expected_scale = expected_caches[which], expected_scales[which]
        assert scale is not None and expected_scale is not None
        # In bf16 two roundings (norm, rotation) lie before it, and Triton's interpreter cuts off.
        bound = 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(scale, expected_scale, rtol=bound, atol=0)
        # Exactly what quantising the very keys and values that were rotated gives.
        first = heads + which * kv_heads
        source = qkv.unflatten(1, (-1, dim))[case.slots >= 0, first : first + kv_heads]
        fixed = None if scale.dim() == 3 else scale
        stored, own = quantize_kv(source, cache_dtype, fixed)
        assert torch.equal(cache[blocks, offsets].view(torch.int8), stored.view(torch.int8))
        if fixed is None:
            assert torch.equal(scale[blocks, offsets], own)
        # And nobody else's slot is touched.
        others = torch.ones(cache.shape[:2], dtype=torch.bool, device=DEVICE)
        others[blocks, offsets] = False
        assert torch.equal(cache[others].view(torch.int8), expected[others].view(torch.int8))
        if fixed is None:
            assert bool((scale[others] == -3.0).all())


@needs_kernels
@pytest.mark.parametrize("cache_dtype", EIGHT_BIT)
def test_rounding_is_exact_on_every_value_of_the_format_and_halfway(
    cache_dtype: torch.dtype,
) -> None:
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = bits.view(cache_dtype).float()
    values = values[values.isfinite() & (values > -128)].sort().values
    halfway = (values[1:] + values[:-1]) / 2
    near = torch.cat([halfway * (1 + 1e-6), halfway * (1 - 1e-6)])
    x = torch.cat([values, halfway, near, values * 10])
    x = torch.cat([x, x.new_zeros(-len(x) % 16)]).view(-1, 1, 16).to(DEVICE)
    cache = torch.zeros(len(x), 1, 1, 16, device=DEVICE).to(cache_dtype)
    one = torch.ones(1, device=DEVICE)
    from kernels.triton import rotary

    slots = torch.arange(len(x), device=DEVICE)
    rotary.write_kv(x, x, slots, cache, cache.clone(), k_scale=one, v_scale=one)
    stored, _ = quantize_kv(x, cache_dtype, one)
    assert torch.equal(dequantize_kv(cache[:, 0], one), dequantize_kv(stored, one))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_copies_exactly_and_leaves_negative_slots_out(dtype: torch.dtype) -> None:
    from kernels.triton import rotary

    k, v = torch.randn(2, 4, 2, 24, device=DEVICE).to(dtype)
    slots = torch.tensor([14, -1, 7, 8], device=DEVICE)
    caches = [torch.full((5, 3, 2, 24), 9.0, device=DEVICE, dtype=dtype) for _ in range(4)]
    rotary.write_kv(k, v, slots, caches[0], caches[1])
    write_kv_reference(k[[0, 2, 3]], v[[0, 2, 3]], slots[[0, 2, 3]], caches[2], caches[3])
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


@needs_kernels
def test_without_slots_nothing_is_written_and_values_stay() -> None:
    case = Case((4, 4, 2, 32, 32, 16), torch.float32)
    qkv = case.qkv.clone()
    fused(qkv, case.positions, case.cos_sin, None, None, None, **case.options)
    expected = case.qkv.clone()
    sizes = {k: case.options[k] for k in ("num_heads", "num_kv_heads", "head_dim")}
    apply_rope_and_write_kv_reference(
        expected, case.positions, case.cos_sin, None, None, None, **sizes
    )
    torch.testing.assert_close(qkv, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(qkv[:, 6 * 32 :], case.qkv[:, 6 * 32 :])


@needs_kernels
def test_no_token_is_no_launch() -> None:
    case = Case((3, 4, 2, 32, 32, 16), torch.float32)
    before = [c.clone() for c in case.caches]
    nothing = (case.qkv[:0], case.positions[:0], case.cos_sin, case.slots[:0])
    fused(*nothing, *case.caches, **case.options)
    assert all(torch.equal(a, b) for a, b in zip(case.caches, before, strict=True))


@pytest.mark.parametrize("cache_dtype", EIGHT_BIT)
def test_the_op_takes_quantised_caches_on_the_cpu(cache_dtype: torch.dtype) -> None:
    case = Case(SHAPES[0], torch.float32, cache_dtype)
    _, caches, scales = case.run(apply_rope_and_write_kv, CPU)
    _, expected, expected_scales = case.run(apply_rope_and_write_kv_reference, CPU)
    for a, b in zip([*caches, *scales], [*expected, *expected_scales], strict=True):
        assert a is not None and b is not None
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize(("given", "message"), [(0, "needs k_scale"), (1, "was given")])
def test_scales_that_do_not_belong_are_refused(given: int, message: str) -> None:
    case = Case(SHAPES[0], torch.float32, torch.int8 if given == 0 else None)
    case.scales = [None, None] if given == 0 else [torch.ones(3, device=DEVICE)] * 2
    with pytest.raises(ValueError, match=message):
        case.run(apply_rope_and_write_kv)
