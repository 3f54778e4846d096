"""Check, then time, prefill attention and RoPE + KV write: ``python -m experiments.gpu_prefill``.

Our Triton kernels beside the libraries that the attention slot knows (flash_attn.cute, flashinfer,
torch's sdpa, FlexAttention), over the same paged caches. A case is compared with a fp32 truth on
its own inputs and timed only when it is right; timing as in ``experiments.gpu_attention``. A case
whose library is missing is a record that says so.

Options: ``--only TEXT,TEXT`` (cases whose name contains one of these), ``--out FILE`` (records are
appended, as JSONL), ``--replays N``, ``--tiles`` (our kernel in other shapes of a program).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.gpu_attention import (
    DEVICE,
    EIGHT_BIT,
    L2_BYTES,
    Batch,
    Work,
    describe,
    error_bound,
    machine,
    make_batch,
    reference,
    relative_error,
    run_case,
)
from experiments.gpu_rope import ROPE_CASES
from kernels.triton.paged_prefill import PrefillTiles, paged_prefill
from techniques.flash_attention_cute import FlashAttention
from techniques.flashinfer_attention import FlashInferAttention
from techniques.flex_attention import FlexAttention
from techniques.triton_attention import TritonAttention
from workbench.core.step import ForwardBatch
from workbench.slots.attention import AttentionBackend, AttentionLayer
from workbench.slots.kv_pool import KVPool


@dataclass(frozen=True, slots=True)
class Lengths:
    """What the host knows of a batch."""

    queries: list[int]
    contexts: list[int]

    @property
    def longest(self) -> int:
        """Longest query."""
        return max(self.queries)


Calls = list[Callable[[], object]]
Attend = Callable[[list[Batch], Lengths], Calls]


def ours(
    batch: Batch, lengths: Lengths, *, tiles: PrefillTiles | None = None, **masks: Any
) -> Tensor:
    """The Triton kernel of ``kernels.triton.paged_prefill``."""
    out = paged_prefill(
        batch.q,
        batch.k_cache,
        batch.v_cache,
        batch.block_table,
        batch.query_start_loc,
        batch.seq_lens,
        batch.scale,
        k_scale=batch.k_scale,
        v_scale=batch.v_scale,
        max_query_len=lengths.longest,
        tiles=tiles,
        **masks,
    )
    assert isinstance(out, Tensor)
    return out


def dense_truth(batch: Batch) -> Tensor:
    """Whole prompts in fp32 through torch, a request at a time."""
    parts = []
    starts = batch.query_start_loc.tolist()
    for row, (begin, stop) in enumerate(itertools.pairwise(starts)):
        blocks = batch.block_table[row, : -(-(stop - begin) // batch.k_cache.shape[1])].long()
        k, v = (
            c[blocks].flatten(0, 1)[: stop - begin].float().transpose(0, 1)
            for c in (batch.k_cache, batch.v_cache)
        )
        q = batch.q[begin:stop].float().transpose(0, 1)
        group = q.shape[0] // k.shape[0]
        heads = [
            F.scaled_dot_product_attention(
                q[h : h + 1], k[h // group][None], v[h // group][None], is_causal=True
            )
            for h in range(q.shape[0])
        ]
        parts.append(torch.cat(heads).transpose(0, 1))
    return torch.cat(parts)


def prefill_work(
    attend: Attend,
    seq_lens: Sequence[int],
    query_lens: Sequence[int] | int,
    **shape: Any,
) -> Work:
    """Attention by ``attend``, which makes a call for each of the batches."""
    masks = {k: shape.pop(k) for k in ("sliding_window", "soft_cap") if k in shape}
    queries = [query_lens] * len(seq_lens) if isinstance(query_lens, int) else list(query_lens)
    first = make_batch(seq_lens, queries, **shape)
    num_bytes = first.num_bytes(masks.get("sliding_window"))
    copies = max(1, min(8, -(-4 * L2_BYTES // num_bytes)))
    batches = [first, *(make_batch(seq_lens, queries, **shape) for _ in range(copies - 1))]
    calls = attend(batches, Lengths(queries, list(seq_lens)))
    is_whole = queries == list(seq_lens) and not masks and first.k_scale is None

    def error() -> float:
        truth = dense_truth(first) if is_whole else reference(first, **masks)
        out = calls[0]()
        assert isinstance(out, Tensor)
        return relative_error(out, truth)

    window = masks.get("sliding_window")
    pairs = sum(_pairs(n, s, window) for n, s in zip(queries, seq_lens, strict=True))
    return Work(
        calls=calls,
        error=error,
        bound=error_bound(first.q.dtype),
        num_bytes=num_bytes,
        num_flops=4 * pairs * first.q.shape[1] * first.q.shape[2],
        facts=describe(first, seq_lens, queries) | masks,
    )


def _pairs(num_queries: int, seq_len: int, window: int | None) -> int:
    """Visible (query, key) pairs."""
    positions = range(seq_len - num_queries, seq_len)
    return sum(min(p + 1, window or p + 1) for p in positions)


def by_triton(tiles: PrefillTiles | None = None, **masks: Any) -> Attend:
    return lambda batches, lengths: [
        partial(ours, b, lengths, tiles=tiles, **masks) for b in batches
    ]


class Pages(KVPool):
    """A pool of one layer around a batch's caches, for backends of the attention slot."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.num_blocks = batch.k_cache.shape[0] - 1
        self.block_size = batch.k_cache.shape[1]
        self._caches = (batch.k_cache, batch.v_cache)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self._caches

    @classmethod
    def bytes_per_token(cls, shape: Any) -> int:
        raise NotImplementedError

    def rotate_and_write(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        raise NotImplementedError


def forward_batch(batch: Batch, lengths: Lengths) -> ForwardBatch:
    """The batch as an engine's step has it, tokens left out."""
    nothing = torch.zeros(batch.q.shape[0], dtype=torch.int64, device=DEVICE)
    return ForwardBatch(
        input_ids=nothing,
        positions=nothing,
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        block_table=batch.block_table,
        slot_mapping=nothing,
        logits_indices=nothing,
        rows=nothing[: len(lengths.queries)],
        query_lens_host=lengths.queries,
        seq_lens_host=lengths.contexts,
        block_size=batch.k_cache.shape[1],
    )


def by_backend(make: Callable[[], AttentionBackend], **masks: Any) -> Attend:
    """A backend of the attention slot; its metadata are built outside the timed calls."""

    def calls(batches: list[Batch], lengths: Lengths) -> Calls:
        found: Calls = []
        for batch in batches:
            _, heads, head_dim = batch.q.shape
            kv_heads = batch.k_cache.shape[2]
            layer = AttentionLayer(0, heads, kv_heads, head_dim, scale=batch.scale, **masks)
            backend, pool = make(), Pages(batch)
            reasons = backend.unsupported_reasons([layer], pool)
            if reasons:
                raise RuntimeError("; ".join(reasons))
            metadata = backend.build_metadata(forward_batch(batch, lengths))
            found.append(partial(backend.forward, batch.q, layer, metadata, pool))
        return found

    return calls


def by_flash_attn_dense(batches: list[Batch], lengths: Lengths) -> Calls:
    """Without pages: keys and values of whole prompts packed like the queries."""
    from flash_attn.cute import flash_attn_varlen_func

    def pack(batch: Batch, cache: Tensor) -> Tensor:
        rows = [
            cache[batch.block_table[i].long()].flatten(0, 1)[:n]
            for i, n in enumerate(lengths.contexts)
        ]
        return torch.cat(rows)

    def run(batch: Batch, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_varlen_func(
            batch.q,
            k,
            v,
            cu_seqlens_q=batch.query_start_loc,
            cu_seqlens_k=batch.query_start_loc,
            max_seqlen_q=lengths.longest,
            max_seqlen_k=lengths.longest,
            softmax_scale=batch.scale,
            causal=True,
        )
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    return [partial(run, b, pack(b, b.k_cache), pack(b, b.v_cache)) for b in batches]


def by_sdpa(batches: list[Batch], lengths: Lengths) -> Calls:
    from kernels.attention import paged_attend_sdpa

    def run(batch: Batch) -> Tensor:
        caches = (batch.k_cache, batch.v_cache, batch.block_table)
        lens = (lengths.queries, lengths.contexts)
        return paged_attend_sdpa(batch.q, *caches, *lens, batch.scale)

    return [partial(run, b) for b in batches]


WHOLE = ([4096] * 4, 4096)
SHAPES: dict[str, tuple[list[int], Any]] = {
    "4 x 4096": WHOLE,
    "4 x 512 of 8192": ([8192] * 4, 512),
    # Decodes beside a chunk of a prompt, as a step of chunked prefill has them.
    "63 decodes + 2048 of 4096": ([2048] * 63 + [4096], [1] * 63 + [2048]),
    "decode 64 x 2048": ([2048] * 64, 1),
    "decode 1 x 32768": ([32768], 1),
}
BACKENDS: dict[str, Attend] = {
    "triton": by_backend(TritonAttention),
    "flash_attn": by_backend(FlashAttention),
    "flashinfer": by_backend(FlashInferAttention),
    "sdpa": by_sdpa,
}
#: Smaller, because the truth writes every score out.
MASKS: dict[str, dict[str, Any]] = {
    "window 512": {"sliding_window": 512},
    "soft cap": {"soft_cap": 30.0},
}
_FEW_HEADS = {"heads": 8, "kv_heads": 2}
_MIXED_SMALL = ([2048, 1500, 700, 33], [2048, 1, 5, 33])


def _triton(suffix: str, masks: dict[str, Any] | None = None, **shape: Any) -> Any:
    masks = masks or {}
    lengths = shape.pop("lengths", WHOLE)
    return f"triton {suffix}", partial(prefill_work, by_triton(**masks), *lengths, **masks, **shape)


CASES: dict[str, Callable[[], Work]] = dict(
    [
        *(
            (f"{backend} {name}", partial(prefill_work, attend, *lengths))
            for name, lengths in SHAPES.items()
            for backend, attend in BACKENDS.items()
        ),
        (
            "flash_attn 4 x 4096, page 128",
            partial(prefill_work, BACKENDS["flash_attn"], *WHOLE, block_size=128),
        ),
        ("flash_attn 4 x 4096, no pages", partial(prefill_work, by_flash_attn_dense, *WHOLE)),
        *(
            (
                f"{backend} mixed, {name}",
                partial(
                    prefill_work, by_backend(make, **masks), *_MIXED_SMALL, **_FEW_HEADS, **masks
                ),
            )
            for name, masks in MASKS.items()
            for backend, make in (
                ("triton", TritonAttention),
                ("flash_attn", FlashAttention),
                ("flashinfer", FlashInferAttention),
                ("flex", FlexAttention),
            )
        ),
        (
            "flex 2 x 2048",
            partial(prefill_work, by_backend(FlexAttention), [2048] * 2, 2048, block_size=64),
        ),
        _triton("4 x 4096, page 1", block_size=1),
        _triton("4 x 4096, page 64", block_size=64),
        _triton("4 x 4096, page 128", block_size=128),
        _triton("4 x 4096, fp16", dtype=torch.float16),
        _triton("4 x 4096, D 64", head_dim=64),
        _triton("4 x 4096, D 80", head_dim=80),
        _triton("4 x 4096, D 256, 16/4", head_dim=256, heads=16, kv_heads=4),
        _triton("4 x 4096, MHA 16/16", heads=16, kv_heads=16),
        _triton("4 x 4096, 16/8 (0.6B)", heads=16, kv_heads=8),
        _triton("1 x 1024, fp32", lengths=([1024], 1024), dtype=torch.float32, **_FEW_HEADS),
        *(
            _triton(
                f"4 x 2048, {name} {scales_of}",
                lengths=([2048] * 4, 2048),
                cache_dtype=dtype,
                scales_of=scales_of,
                **_FEW_HEADS,
            )
            for name, dtype in EIGHT_BIT.items()
            for scales_of in ("heads", "tokens")
        ),
        *ROPE_CASES.items(),
    ]
)

TILES = [
    PrefillTiles(128, 128, 8, 2),
    PrefillTiles(128, 64, 8, 3),
    PrefillTiles(128, 64, 8, 2, max_registers=128),
    PrefillTiles(256, 64, 16, 2),
    PrefillTiles(64, 64, 4, 2),
]


def tiles_cases() -> dict[str, Callable[[], Work]]:
    """Our kernel in other shapes of a program, for a few shapes of a model."""
    shapes: dict[str, dict[str, Any]] = {
        "D 128": {},
        "D 128, page 64": {"block_size": 64},
        "D 64": {"head_dim": 64},
        "D 256": {"head_dim": 256, "heads": 16, "kv_heads": 4},
    }
    return {
        f"tiles {name}: {t.num_rows} x {t.num_keys}, {t.num_warps} warps, {t.num_stages} stages, "
        f"{t.max_registers}": partial(prefill_work, by_triton(t), *WHOLE, **shape)
        for name, shape in shapes.items()
        for t in TILES
        if not (name == "D 256" and t.num_keys == 128)
    }


def run_one(name: str, make: Callable[[], Work], replays: int) -> dict[str, Any]:
    """Check a case and time it; torch's sdpa copies lengths from the host, which no graph holds."""
    if not name.startswith("sdpa"):
        return run_case(name, make, replays) | {"timing": "graph"}
    torch.manual_seed(0)
    work = make()
    error = work.error()
    record: dict[str, Any] = {"case": name, "error": error, "bound": work.bound, **work.facts}
    if error > work.bound:
        return record | {"status": "FAILED"}
    times = []
    for _ in range(replays):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for call in work.calls:
            call()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) * 1e3 / len(work.calls))
    median, deciles = statistics.median(times), statistics.quantiles(times, n=10)
    us = {"median": median, "p10": deciles[0], "p90": deciles[-1], "replays": replays}
    rates = {"TBps": work.num_bytes / median / 1e6, "TFLOPps": work.num_flops / median / 1e6}
    return record | {"status": "ok", "us": us, "timing": "events"} | rates


def format_row(name: str, record: dict[str, Any]) -> str:
    if "message" in record:
        return f"{name:44} {record['status']}: {record['message'][:160]}"
    median, error = record.get("us", {}).get("median", "-"), record["error"]
    rates = f"{record.get('TFLOPps', '-'):>8} TFLOP/s {record.get('TBps', '-'):>7} TB/s"
    return f"{name:44} {median:>10} us {rates} error {error:.1e} {record['status']}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", default="")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--tiles", action="store_true")
    args = parser.parse_args(arguments)
    facts = machine()
    print(json.dumps(facts))
    cases = tiles_cases() if args.tiles else CASES
    wanted = args.only.split(",")
    failed = 0
    for name, make in cases.items():
        if not any(text in name for text in wanted):
            continue
        began = time.perf_counter()
        try:
            record = run_one(name, make, args.replays)
        except Exception as error:  # a library that is missing, or a shape that does not fit
            record = {"case": name, "status": "ERROR", "message": f"{error!r}"[:500]}
        record |= {"machine": facts, "wall_s": round(time.perf_counter() - began, 2)}
        failed += record["status"] == "FAILED"
        print(format_row(name, record), flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(record) + "\n")
        torch.cuda.empty_cache()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
