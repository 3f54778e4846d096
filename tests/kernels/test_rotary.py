"""QK-norm, RoPE and KV write against fp64 and against Transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kernels import apply_rope_and_write_kv, write_kv
from kernels.cpu import rotary as native
from kernels.rotary import apply_rope_and_write_kv_reference

MAX_POSITION = 50


@pytest.fixture(autouse=True)
def _split_small_work(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_PARALLEL_NUMEL", 0)


def angles(rotary_dim: int) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    phase = torch.arange(MAX_POSITION).double().unsqueeze(1) * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=1).float()


def caches(
    num_blocks: int, block_size: int, heads: int, dim: int, dtype: torch.dtype, is_joint: bool
) -> tuple[Tensor, Tensor]:
    """Caches full of NaN: two tensors, or two views of one pool."""
    shape = (num_blocks, block_size, heads, dim)
    if not is_joint:
        k, v = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
        return k, v
    pool = torch.full((num_blocks, 2, heads, block_size, dim), float("nan"), dtype=dtype)
    return pool[:, 0].transpose(1, 2), pool[:, 1].transpose(1, 2)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("is_joint", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "heads", "kv_heads", "dim", "rotary_dim", "block_size"),
    [
        (0, 2, 1, 16, 16, 16),
        (1, 9, 3, 64, 64, 16),
        (7, 4, 4, 6, 6, 1),
        (13, 4, 2, 80, 32, 32),
        (33, 8, 1, 128, 128, 64),
    ],
)
def test_equals_fp64(
    num_tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary_dim: int,
    block_size: int,
    is_joint: bool,
    has_norm: bool,
    dtype: torch.dtype,
    rows: Any,
    assert_close: Any,
) -> None:
    qkv = rows(num_tokens, (heads + 2 * kv_heads) * dim, dtype=dtype, strided=is_joint)
    num_blocks = num_tokens // block_size + 3
    k_cache, v_cache = caches(num_blocks, block_size, kv_heads, dim, dtype, is_joint)
    positions = torch.randint(MAX_POSITION, (num_tokens,))
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    norms = [rows(dim, dtype=dtype) for _ in range(2)] if has_norm else [None, None]
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}

    wide = [x.double() for x in (qkv, k_cache, v_cache)]
    wide_norms = [None if w is None else w.double() for w in norms]
    apply_rope_and_write_kv_reference(
        wide[0],
        positions,
        angles(rotary_dim),
        slots,
        wide[1],
        wide[2],
        q_norm=wide_norms[0],
        k_norm=wide_norms[1],
        **sizes,
    )
    arguments = (qkv, positions, angles(rotary_dim), slots, k_cache, v_cache)
    apply_rope_and_write_kv(*arguments, q_norm=norms[0], k_norm=norms[1], **sizes)
    bound = 32 if dtype == torch.float32 else 8
    assert_close(qkv, wide[0], bound)
    for cache, expected in ((k_cache, wide[1]), (v_cache, wide[2])):
        written = ~expected.isnan()
        assert torch.equal(~cache.isnan(), written)
        assert written.sum() == num_tokens * kv_heads * dim
        assert_close(cache[written], expected[written], bound)


def test_equals_transformers(dtype: torch.dtype, rows: Any) -> None:
    num_tokens, heads, kv_heads, dim = 12, 4, 2, 32
    qkv = rows(num_tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    positions = torch.arange(num_tokens)
    table = angles(dim)
    cos, sin = (x.repeat(1, 2)[positions].to(dtype).unsqueeze(0) for x in table.chunk(2, dim=1))
    view = qkv.clone().view(1, num_tokens, -1, dim).transpose(1, 2)
    q, k = apply_rotary_pos_emb(view[:, :heads], view[:, heads : heads + kv_heads], cos, sin)
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
    apply_rope_and_write_kv(qkv, positions, table, None, None, None, **sizes)
    ours = qkv.view(num_tokens, -1, dim)[:, : heads + kv_heads]
    theirs = torch.cat([q, k], dim=1)[0].transpose(0, 1)
    # In bf16 Transformers rounds the cosines, both products and their sum; here only the result is.
    bound = 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize("has_rope", [True, False])
def test_a_negative_slot_is_not_written(has_rope: bool, dtype: torch.dtype, rows: Any) -> None:
    k_cache, v_cache = caches(4, 2, 1, 16, dtype, False)
    slots = torch.tensor([3, -1, 6])
    qkv = rows(3, 4 * 16, dtype=dtype)
    if has_rope:
        sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
        arguments = (qkv, torch.arange(3), angles(16), slots, k_cache, v_cache)
        apply_rope_and_write_kv(*arguments, **sizes)
    else:
        heads = qkv.view(3, 4, 16)
        write_kv(heads[:, 2:3], heads[:, 3:], slots, k_cache, v_cache)
    for cache in (k_cache, v_cache):
        assert (~cache.isnan()).flatten(0, 1).all(-1).squeeze(1).nonzero().squeeze(1).tolist() == [
            3,
            6,
        ]
    assert torch.equal(v_cache.view(8, 16)[[3, 6]], qkv[[0, 2], 48:])


@pytest.mark.parametrize("is_joint", [False, True])
def test_write_kv_copies_exactly(is_joint: bool, dtype: torch.dtype, rows: Any) -> None:
    k_cache, v_cache = caches(5, 3, 2, 8, dtype, is_joint)
    k, v = rows(4, 2, 8, dtype=dtype, strided=True), rows(4, 2, 8, dtype=dtype)
    slots = torch.tensor([14, 0, 7, 8])
    write_kv(k, v, slots, k_cache, v_cache)
    assert torch.equal(k_cache[slots // 3, slots % 3], k)
    assert torch.equal(v_cache[slots // 3, slots % 3], v)
    assert (~k_cache.isnan()).sum() == k.numel()


@pytest.mark.parametrize(("position", "slot"), [(MAX_POSITION, 0), (-1, 0), (0, 8)])
def test_an_index_out_of_range_is_refused(
    position: int, slot: int, dtype: torch.dtype, rows: Any
) -> None:
    k_cache, v_cache = caches(4, 2, 1, 16, dtype, False)
    qkv, good = rows(2, 4 * 16, dtype=dtype), torch.tensor([1, 2])
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}

    def run(positions: Tensor, slots: Tensor) -> None:
        caches_and_slots = (slots, k_cache, v_cache)
        apply_rope_and_write_kv(qkv, positions, angles(16), *caches_and_slots, **sizes)

    with pytest.raises(IndexError, match="position"):
        run(torch.tensor([0, position]), torch.tensor([1, slot]))
    run(good, good)  # the next call is not blamed
    if slot:
        with pytest.raises(IndexError, match="slot"):
            heads = qkv.view(2, 4, 16)
            write_kv(heads[:, 2:3], heads[:, 3:], torch.tensor([1, slot]), k_cache, v_cache)
