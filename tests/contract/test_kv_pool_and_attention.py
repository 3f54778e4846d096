"""Contracts of slots ``kv_pool`` and ``attention`` against dense references in float64."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from tests.helpers.engines import component
from tests.helpers.interpreted import DEVICE, run_in_interpreter, starts_interpreter
from workbench.configuration import options_of
from workbench.core.step import ForwardBatch
from workbench.slots.attention import AttentionBackend, AttentionLayer, CudaGraphSupport
from workbench.slots.kv_pool import KVPool, KVShape, ModelDtypePool, RopeInputs

CPU = torch.device("cpu")
POOLS = options_of("engine/kv_pool")
ATTENTIONS = options_of("engine/attention")
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 16
#: Of the largest value; pools that store less than the model's precision state more.
POOL_TOLERANCE = {"model_dtype": 1e-5}


def make_pool(
    option: str, dtype: torch.dtype = torch.float32, num_blocks: int = 6, block_size: int = 4
) -> KVPool:
    shape = KVShape((NUM_KV_HEADS, 1), (HEAD_DIM, 32), dtype)
    pool: KVPool = component(
        "kv_pool", option, shape=shape, num_blocks=num_blocks, block_size=block_size, device=CPU
    )
    return pool


def rope_tables(max_position: int = 64, dim: int = HEAD_DIM) -> torch.Tensor:
    inverse = 100.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(max_position, dtype=torch.float64).unsqueeze(1) * inverse
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def rotate(x: torch.Tensor, positions: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Half-split rotary embedding in float64 through complex numbers; ``x[T, heads, D]``."""
    half = x.shape[-1] // 2
    cos, sin = tables.double()[positions].unsqueeze(1).chunk(2, dim=-1)
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], dim=-1)


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    wide = x.double()
    return wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * (weight.double() + offset)


@pytest.mark.parametrize("option", POOLS)
class TestKVPool:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bytes_are_what_it_said_before_it_existed(
        self, option: str, dtype: torch.dtype
    ) -> None:
        pool = make_pool(option, dtype)
        per_token = type(pool).bytes_per_token(KVShape((NUM_KV_HEADS, 1), (HEAD_DIM, 32), dtype))
        assert pool.num_bytes == per_token * (pool.num_blocks + 1) * pool.block_size

    def test_layers_have_their_shapes_and_a_trash_block(self, option: str) -> None:
        pool = make_pool(option)
        for layer, (heads, dim) in enumerate([(NUM_KV_HEADS, HEAD_DIM), (1, 32)]):
            for cache in pool.layer(layer):
                assert cache.shape == (pool.num_blocks + 1, pool.block_size, heads, dim)
                assert bool(torch.isfinite(cache.float()).all())

    @pytest.mark.parametrize("norms", [False, True])
    def test_rotates_and_writes_where_it_is_told(self, option: str, norms: bool) -> None:
        pool = make_pool(option)
        generator = torch.Generator().manual_seed(0)
        count = 7
        width = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
        qkv = torch.randn(count, width, generator=generator)
        positions = torch.tensor([0, 1, 2, 30, 31, 5, 63])
        slots = torch.tensor([3, 9, 0, 22, 23, 14, 4])
        rope = RopeInputs(rope_tables())
        if norms:
            q_norm, k_norm = torch.randn(2, HEAD_DIM, generator=generator)
            rope = RopeInputs(rope_tables(), q_norm, k_norm, eps=1e-5, norm_offset=1.0)
        q, k, v = qkv.unflatten(1, (-1, HEAD_DIM)).split(
            [NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1
        )
        if rope.q_norm is not None and rope.k_norm is not None:
            q, k = rms(q, rope.q_norm, 1e-5, 1.0), rms(k, rope.k_norm, 1e-5, 1.0)
        expected_q = rotate(q, positions, rope.cos_sin)
        expected_k, expected_v = rotate(k, positions, rope.cos_sin), v.double().clone()
        rotated = pool.rotate_and_write(0, qkv.clone(), positions, slots, NUM_HEADS, rope)
        torch.testing.assert_close(rotated.double(), expected_q, atol=1e-5, rtol=1e-5)
        k_cache, v_cache = (c.flatten(0, 1).double() for c in pool.layer(0))
        tolerance = POOL_TOLERANCE[option]
        for cache, expected in ((k_cache, expected_k), (v_cache, expected_v)):
            largest = float(expected.abs().max())
            torch.testing.assert_close(cache[slots], expected, atol=tolerance * largest, rtol=0.0)
            untouched = sorted(set(range(len(cache))) - set(slots.tolist()))
            assert bool((cache[untouched] == 0).all()), "a slot of somebody else was written"
        assert bool((pool.layer(1)[0] == 0).all()), "another layer was written"


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: AttentionLayer
) -> torch.Tensor:
    """Causal attention of the last ``len(q)`` positions over all of ``k``, in float64."""
    length, count = len(k), len(q)
    group = layer.num_heads // layer.num_kv_heads
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * layer.scale
    if layer.soft_cap is not None:
        scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
    query = torch.arange(length - count, length).unsqueeze(1)
    key = torch.arange(length)
    seen = key <= query
    if layer.sliding_window is not None:
        seen &= key > query - layer.sliding_window
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def fill_pool(
    pool: KVPool, lengths: list[int], rng: random.Random
) -> tuple[torch.Tensor, list[list[int]]]:
    """Put random KV of each request into scattered blocks; block table and slots by request."""
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    for cache in pool.layer(0):
        # Whatever lies in slots that are not the request's own must not matter.
        cache.copy_(torch.randn(cache.shape, generator=generator) * 50)
    size = pool.block_size
    free = list(range(pool.num_blocks))
    rng.shuffle(free)
    columns = max(-(-n // size) for n in lengths) + 1
    table, slots = [], []
    for length in lengths:
        blocks = [free.pop() for _ in range(-(-length // size))]
        table.append(blocks + [pool.num_blocks] * (columns - len(blocks)))
        slots.append([blocks[i // size] * size + i % size for i in range(length)])
        for cache in pool.layer(0):
            shape = (length, *cache.shape[2:])
            cache.flatten(0, 1)[slots[-1]] = torch.randn(shape, generator=generator).to(cache)
    return torch.tensor(table, dtype=torch.int32), slots


def make_batch(
    table: torch.Tensor,
    lengths: list[int],
    queries: list[int],
    block_size: int,
    device: torch.device = CPU,
) -> ForwardBatch:
    total = sum(queries)
    nothing = torch.zeros(total, dtype=torch.int64, device=device)
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n - q, n) for n, q in zip(lengths, queries, strict=True)])
    return ForwardBatch(
        input_ids=nothing,
        positions=positions.to(device),
        query_start_loc=starts.to(device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table=table.to(device),
        slot_mapping=nothing,
        logits_indices=nothing,
        rows=torch.arange(len(lengths), device=device),
        query_lens_host=queries,
        seq_lens_host=lengths,
        block_size=block_size,
    )


LAYER = AttentionLayer(0, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, scale=HEAD_DIM**-0.5)
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 3},
    "window_of_one": {"sliding_window": 1},
    "soft_cap": {"soft_cap": 2.0},
    "both": {"sliding_window": 6, "soft_cap": 5.0},
}
BATCHES = {
    "decodes": ([9, 1, 17, 4], [1, 1, 1, 1]),
    "whole_prompts": ([5, 8], [5, 8]),
    "mixed": ([12, 20, 7, 3], [1, 6, 7, 2]),
    "one": ([33], [33]),
    "drafts": ([15, 15, 9], [4, 1, 3]),
}


#: Where the contract of attention is checked: what the libraries take on a GPU, else the CPU.
ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
WIDTH = 64 if ON_GPU else HEAD_DIM
#: Outputs are averages of values about as large as one.
TOLERANCE = 2e-2 if ON_GPU else 1e-5
BLOCK_SIZES = [1, 4, 48, 64, 128] if ON_GPU else [1, 4, 48]


def layer_of(fields: dict[str, Any]) -> AttentionLayer:
    return dataclasses.replace(LAYER, head_dim=WIDTH, scale=WIDTH**-0.5, **fields)


def pool_of(num_blocks: int, block_size: int) -> KVPool:
    shape = KVShape((NUM_KV_HEADS,), (WIDTH,), DTYPE)
    return ModelDtypePool(shape=shape, num_blocks=num_blocks, block_size=block_size, device=DEVICE)


def why_not(option: str, fields: dict[str, Any], block_size: int) -> list[str]:
    attention: AttentionBackend = component("attention", option)
    return attention.unsupported_reasons([layer_of(fields)], pool_of(2, block_size))


#: Backend, layer and block size, where the backend takes them on this device.
CASES = [
    pytest.param(option, fields, block_size, id=f"{option}-{name}-{block_size}")
    for option in ATTENTIONS
    for name, fields in LAYERS.items()
    for block_size in BLOCK_SIZES
    if not why_not(option, fields, block_size)
]


def test_a_backend_has_no_case_only_for_want_of_a_gpu_or_a_package() -> None:
    tested = {case.values[0] for case in CASES}
    for option in {*ATTENTIONS} - tested:
        reasons = " ".join(why_not(option, {}, 64))
        assert "not installed" in reasons or ("CUDA" in reasons and not ON_GPU), reasons


@pytest.mark.parametrize(("option", "fields", "block_size"), CASES)
@pytest.mark.parametrize("shape", BATCHES.values(), ids=BATCHES)
def test_attention_equals_dense_attention(
    option: str, fields: dict[str, Any], shape: tuple[list[int], list[int]], block_size: int
) -> None:
    attention: AttentionBackend = component("attention", option)
    layer = layer_of(fields)
    lengths, queries = shape
    pool = pool_of(sum(-(-n // block_size) for n in lengths) + 2, block_size)
    assert not attention.unsupported_reasons([layer], pool)
    table, slots = fill_pool(pool, lengths, random.Random(0))
    batch = make_batch(table, lengths, queries, block_size, DEVICE)
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(sum(queries), NUM_HEADS, WIDTH, generator=generator).to(DEVICE, DTYPE)
    before = [cache.clone() for cache in pool.layer(0)]
    out = attention.forward(q.clone(), layer, attention.build_metadata(batch), pool)
    assert out.shape == q.shape
    for cache, old in zip(pool.layer(0), before, strict=True):
        assert torch.equal(cache, old), "attention wrote to the pool"
    keys, values = (cache.flatten(0, 1).cpu() for cache in pool.layer(0))
    expected = [
        dense_attention(part, keys[own], values[own], layer)
        for part, own in zip(q.cpu().split(queries), slots, strict=True)
    ]
    torch.testing.assert_close(
        out.double().cpu(), torch.cat(expected), atol=TOLERANCE, rtol=TOLERANCE
    )


@starts_interpreter
def test_triton_meets_the_contract_in_its_interpreter() -> None:
    """A few of the cases above, which are none on a CPU where Triton does not interpret."""
    chosen = "attention_equals and triton and (mixed or drafts) and (plain or both)"
    run_in_interpreter(__file__, "-k", chosen)


@pytest.mark.parametrize("option", ATTENTIONS)
def test_reasons_are_sentences_and_graph_support_is_declared(option: str) -> None:
    attention: AttentionBackend = component("attention", option)
    pool = make_pool("model_dtype")
    assert all(isinstance(r, str) and r for r in attention.unsupported_reasons([LAYER], pool))
    # `auto` supports what its picks do: on a CPU, what the reference does.
    always = {"triton", "invariant"}
    wanted = CudaGraphSupport.ALWAYS if option in always else CudaGraphSupport.NEVER
    if option == "cascade":  # its plan lies in a buffer for steps of single tokens
        wanted = CudaGraphSupport.UNIFORM_SINGLE_TOKEN
    assert attention.cudagraph_support is wanted
