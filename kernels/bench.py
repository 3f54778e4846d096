"""Time every op against its torch reference: ``python -m kernels.bench [--dtype bf16]``.

The shapes are those of SmolLM2-135M. Each row is the least of many runs; ``GB/s`` counts the bytes
that the op has to move, once each. Linear layers run through a whole model's worth of different
weights, as a step does, so that none of them stays in a cache. The last table is a step of the
whole decoder made of these ops, with no framework around it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import kernels
from kernels import activation, dispatch, linear, norm, rotary, sampling
from kernels.attention import paged_attend_reference

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 30, 576, 9, 3, 64, 1536, 49152
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
CONTEXT, BLOCK_SIZE, EPS = 200, 16, 1e-5
SHAPES = {"qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * FFN, HIDDEN)}
SHAPES |= {"down": (HIDDEN, FFN)}

Row = tuple[str, Callable[[], object], Callable[[], object], int]  # name, both forms, bytes


def least_time(run: Callable[[], object], seconds: float = 0.3) -> float:
    """Least time of one call, in seconds, over as many as fit."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


class Batch:
    """Requests of one query length over a paged cache, and a projection's worth of activations."""

    def __init__(
        self, num_requests: int, num_queries: int, context: int, dtype: torch.dtype
    ) -> None:
        self.num_tokens = num_requests * num_queries
        self.seq_len = context + num_queries
        pages = -(-self.seq_len // BLOCK_SIZE)
        num_blocks = num_requests * pages
        self.block_table = torch.randperm(num_blocks).view(num_requests, pages).int()
        self.query_lens, self.seq_lens = [num_queries] * num_requests, [self.seq_len] * num_requests
        self.starts = torch.arange(num_requests + 1, dtype=torch.int32) * num_queries
        self.lengths = torch.tensor(self.seq_lens, dtype=torch.int32)
        self.positions = torch.arange(context, self.seq_len).repeat(num_requests)
        pages_of = self.block_table.long().repeat_interleave(num_queries, 0)
        block = pages_of.gather(1, (self.positions // BLOCK_SIZE).unsqueeze(1)).squeeze(1)
        self.slots = block * BLOCK_SIZE + self.positions % BLOCK_SIZE
        shape = (LAYERS, num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        self.k_cache, self.v_cache = (torch.randn(shape).to(dtype) for _ in range(2))
        self.cos_sin = torch.randn(self.seq_len, HEAD_DIM).clamp(-1, 1)
        self.sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}

    def rope(self, op: Callable[..., None], qkv: Tensor, layer: int = 0) -> None:
        caches = (self.k_cache[layer], self.v_cache[layer])
        op(qkv, self.positions, self.cos_sin, self.slots, *caches, **self.sizes)

    def attend(self, qkv: Tensor, layer: int = 0) -> Tensor:
        q = qkv[:, : HEADS * HEAD_DIM].view(-1, HEADS, HEAD_DIM)
        cache = (self.k_cache[layer], self.v_cache[layer], self.block_table)
        lengths = (self.starts, self.lengths, HEAD_DIM**-0.5)
        out: Tensor = kernels.paged_attend(q, *cache, *lengths)
        return out.view(-1, HEADS * HEAD_DIM)


class Decoder:
    """Random weights in the shape of SmolLM2-135M."""

    def __init__(self, dtype: torch.dtype) -> None:
        def weight(shape: tuple[int, int]) -> Tensor:
            return (torch.randn(shape) / math.sqrt(shape[1])).to(dtype)

        self.dense = {name: [weight(s) for _ in range(LAYERS)] for name, s in SHAPES.items()}
        self.dense["head"] = [weight((VOCAB, HIDDEN))]
        self.packed = {n: [linear.pack_linear(w) for w in ws] for n, ws in self.dense.items()}
        self.norm = torch.ones(HIDDEN, dtype=dtype)

    def step(self, batch: Batch, ids: Tensor, num_logits: int) -> Tensor:
        """Token ids to the next ones, as an engine does it."""
        residual = kernels.embedding(self.dense["head"][0], ids)
        x = kernels.rms_norm(residual, self.norm, EPS)
        for layer in range(LAYERS):
            qkv = linear.apply_linear(self.packed["qkv"][layer], x)
            batch.rope(kernels.apply_rope_and_write_kv, qkv, layer)
            x = linear.apply_linear(self.packed["o"][layer], batch.attend(qkv, layer))
            x = kernels.add_rms_norm_(x, residual, self.norm, EPS)
            x = kernels.silu_and_mul(linear.apply_linear(self.packed["gate_up"][layer], x))
            x = linear.apply_linear(self.packed["down"][layer], x)
            x = kernels.add_rms_norm_(x, residual, self.norm, EPS)
        logits = linear.apply_linear(self.packed["head"][0], x[-num_logits:])
        return kernels.argmax(logits)


def linear_rows(model: Decoder, num_tokens: int, dtype: torch.dtype) -> Iterator[Row]:
    def run_dense(x: Tensor, weights: list[Tensor]) -> None:
        for weight in weights:
            linear.linear_reference(weight, None, x)

    def run_packed(x: Tensor, packed: list[linear.PackedLinear]) -> None:
        for one in packed:
            linear.apply_linear(one, x)

    for name, weights in model.dense.items():
        if name == "head" and num_tokens > 64:
            continue
        x = torch.randn(num_tokens, weights[0].shape[1]).to(dtype)
        moved = sum(w.numel() for w in weights) * dtype.itemsize
        dense, packed = partial(run_dense, x, weights), partial(run_packed, x, model.packed[name])
        yield f"linear {name} x{len(weights)}", dense, packed, moved


def op_rows(batch: Batch, dtype: torch.dtype) -> Iterator[Row]:
    tokens, size = batch.num_tokens, dtype.itemsize
    x, residual = (torch.zeros(tokens, HIDDEN, dtype=dtype) for _ in range(2))
    scale, qkv = torch.ones(HIDDEN, dtype=dtype), torch.randn(tokens, QKV).to(dtype)
    gate_up = torch.randn(tokens, 2 * FFN).to(dtype)
    q = qkv[:, : HEADS * HEAD_DIM].view(-1, HEADS, HEAD_DIM)
    yield (
        "add_rms_norm_",
        lambda: norm.add_rms_norm_reference_(x, residual, scale, EPS),
        lambda: kernels.add_rms_norm_(x, residual, scale, EPS),
        4 * x.numel() * size,
    )
    yield (
        "rope + kv write",
        lambda: batch.rope(rotary.apply_rope_and_write_kv_reference, qkv),
        lambda: batch.rope(kernels.apply_rope_and_write_kv, qkv),
        2 * qkv.numel() * size,
    )
    cache = (batch.k_cache[0], batch.v_cache[0], batch.block_table)
    lengths = (batch.query_lens, batch.seq_lens, HEAD_DIM**-0.5)
    yield (
        "paged_attend",
        lambda: paged_attend_reference(q, *cache, *lengths),
        lambda: batch.attend(qkv),
        2 * sum(batch.seq_lens) * KV_HEADS * HEAD_DIM * size + 2 * q.numel() * size,
    )
    yield (
        "silu_and_mul",
        lambda: activation.silu_and_mul_reference(gate_up),
        lambda: kernels.silu_and_mul(gate_up),
        3 * tokens * FFN * size,
    )
    if tokens <= 64:
        logits = torch.randn(tokens, VOCAB).to(dtype)
        yield (
            "argmax",
            lambda: sampling.argmax_reference(logits),
            lambda: kernels.argmax(logits),
            logits.numel() * size,
        )


def print_row(name: str, tokens: int, rows: Row) -> None:
    _, reference, fast, moved = rows
    seconds = least_time(fast)
    before = least_time(reference)
    print(
        f"{tokens:5d} {name:20s} {before * 1e6:11.1f} {seconds * 1e6:11.1f}"
        f" {before / seconds:6.1f}x {moved / seconds / 1e9:8.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps-only", action="store_true", help="only the table of whole steps")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype]
    model = Decoder(dtype)
    decode = [Batch(count, 1, CONTEXT, dtype) for count in (1, 8, 32)]
    print(f"{arguments.dtype}, torch {torch.__version__}, {dispatch.describe_cpu()}")
    if not arguments.steps_only:
        print(f"{'T':>5s} {'op':20s} {'torch us':>11s} {'fast us':>11s} {'':7s} {'GB/s':>8s}")
        for batch in (*decode, Batch(1, 512, 0, dtype)):
            for row in (*linear_rows(model, batch.num_tokens, dtype), *op_rows(batch, dtype)):
                print_row(row[0], batch.num_tokens, row)
    print(f"{'requests':>8s} {'queries':>8s} {'context':>8s} {'step ms':>9s} {'tok/s':>9s}")
    steps = (*decode, Batch(1, 6, CONTEXT, dtype), *(Batch(n, 128, 0, dtype) for n in (1, 8)))
    for batch in (*steps, Batch(1, 512, 0, dtype)):
        ids = torch.randint(VOCAB, (batch.num_tokens,))
        count = len(batch.query_lens)
        logits = batch.num_tokens if batch.query_lens[0] < 100 else count
        seconds = least_time(partial(model.step, batch, ids, logits), 2.0)
        print(
            f"{count:8d} {batch.query_lens[0]:8d} {batch.seq_len - batch.query_lens[0]:8d}"
            f" {seconds * 1e3:9.1f} {batch.num_tokens / seconds:9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
