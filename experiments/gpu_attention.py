"""Check, then time, the attention kernels on a GPU: ``python -m experiments.gpu_attention``.

Every case is first compared with the fp32 reference on the same inputs, and is timed only when it
is right. A timing is a CUDA graph that runs the case over several copies of its inputs in turn, so
that nothing is read from the L2 cache that a real step would not find there; the median over many
replays is reported, per call.

Options: ``--only TEXT`` (cases whose name contains it), ``--out FILE`` (JSONL records added),
``--replays N``. The exit code is 1 where a case was wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.attention import paged_attend
from kernels.quantized_kv import allocate_kv_scales, find_head_scales, is_quantized, quantize_kv
from kernels.shared_prefix import cascade_attend
from workbench.bench.environment import git_state

L2_BYTES = 64 << 20  # inputs are copied until they exceed this several times
DEVICE = "cuda"


@dataclass(slots=True)
class Work:
    """What a case runs.

    Attributes
    ----------
    calls
        The same work over different memory, timed in turn.
    error
        Relative error ``|out - truth| / |truth|`` of the first call.
    bound
        Greatest error that passes.
    num_bytes
        Bytes of KV (and scales) that a call has to read, each once; 0 where it is not the point.
    num_flops
        Floating-point operations of a call, of visible scores only.
    facts
        Shapes, for the record.
    """

    calls: list[Callable[[], object]]
    error: Callable[[], float]
    bound: float
    num_bytes: int = 0
    num_flops: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Timing:
    """Microseconds a call, over the replays of a graph."""

    median: float
    p10: float
    p90: float
    replays: int


@dataclass(slots=True)
class Batch:
    """Random requests over a paged cache of shuffled blocks."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.q.shape[-1])

    @property
    def max_query_len(self) -> int:
        return int((self.query_start_loc[1:] - self.query_start_loc[:-1]).max())

    def attend(self, **options: Any) -> Tensor:
        lengths = (self.block_table, self.query_start_loc, self.seq_lens)
        options |= {"k_scale": self.k_scale, "v_scale": self.v_scale}
        attend: Callable[..., Tensor] = paged_attend
        return attend(self.q, self.k_cache, self.v_cache, *lengths, self.scale, **options)

    def num_bytes(self, window: int | None = None) -> int:
        """Of the keys and values that the queries see, with their scales."""
        seen = [min(n, window or n) for n in self.seq_lens.tolist()]
        heads, dim = self.k_cache.shape[2:]
        per_token: int = heads * dim * self.k_cache.element_size()
        if self.k_scale is not None and self.k_scale.dim() == 3:
            per_token += heads * 4
        return int(2 * sum(seen) * per_token)


def make_batch(
    seq_lens: Sequence[int],
    query_lens: Sequence[int] | int = 1,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    scales_of: str = "tokens",
    shared_tokens: int = 0,
    num_groups: int = 1,
) -> Batch:
    """Fresh random inputs; requests share the blocks of their first ``shared_tokens`` tokens, the
    requests of each group, which take turns."""
    queries = [query_lens] * len(seq_lens) if isinstance(query_lens, int) else list(query_lens)
    shared = shared_tokens // block_size
    pages = [-(-n // block_size) - shared for n in seq_lens]
    num_blocks = sum(pages) + num_groups * shared + 1
    blocks = torch.randperm(num_blocks, device=DEVICE, dtype=torch.int32)
    table = torch.zeros(len(pages), shared + max(pages), dtype=torch.int32, device=DEVICE)
    used = num_groups * shared
    for group in range(num_groups):
        table[group::num_groups, :shared] = blocks[group * shared : (group + 1) * shared]
    for row, count in enumerate(pages):
        table[row, shared : shared + count] = blocks[used : used + count]
        used += count
    shape = (num_blocks, block_size, kv_heads, head_dim)
    k_cache, v_cache = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(2))
    starts = torch.tensor([0, *queries]).cumsum(0).int().to(DEVICE)
    q = torch.randn(sum(queries), heads, head_dim, dtype=dtype, device=DEVICE)
    lengths = torch.tensor(list(seq_lens), dtype=torch.int32, device=DEVICE)
    batch = Batch(q, k_cache, v_cache, table, starts, lengths)
    if cache_dtype is not None and cache_dtype != dtype:
        batch.k_cache, batch.k_scale = _quantized(k_cache, cache_dtype, scales_of)
        batch.v_cache, batch.v_scale = _quantized(v_cache, cache_dtype, scales_of)
    return batch


def _quantized(cache: Tensor, dtype: torch.dtype, scales_of: str) -> tuple[Tensor, Tensor]:
    if scales_of == "heads":
        return quantize_kv(cache, dtype, find_head_scales(cache, dtype))
    stored, scale = quantize_kv(cache, dtype)
    num_blocks, block_size, heads, _ = cache.shape
    laid_out = allocate_kv_scales(num_blocks, block_size, heads, cache.device)
    return stored, laid_out.copy_(scale)


def relative_error(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth.double()).norm() / truth.double().norm())


def reference(batch: Batch, **options: Any) -> Tensor:
    """The fp32 reference on the batch's inputs."""
    wide = Batch(
        batch.q.float(),
        batch.k_cache if is_quantized(batch.k_cache) else batch.k_cache.float(),
        batch.v_cache if is_quantized(batch.v_cache) else batch.v_cache.float(),
        batch.block_table,
        batch.query_start_loc,
        batch.seq_lens,
        batch.k_scale,
        batch.v_scale,
    )
    return wide.attend(implementation="reference", **options)


def attend_work(seq_lens: Sequence[int], query_lens: Sequence[int] | int = 1, **shape: Any) -> Work:
    """Plain paged attention by the Triton kernels."""
    masks: dict[str, Any] = {k: shape.pop(k) for k in ("sliding_window", "soft_cap") if k in shape}
    first = make_batch(seq_lens, query_lens, **shape)
    num_bytes = first.num_bytes(masks.get("sliding_window"))
    copies = max(1, min(8, -(-4 * L2_BYTES // num_bytes)))
    batches = [first, *(make_batch(seq_lens, query_lens, **shape) for _ in range(copies - 1))]
    longest = first.max_query_len
    options: dict[str, Any] = {"max_query_len": longest, "implementation": "triton", **masks}
    queries = (first.query_start_loc[1:] - first.query_start_loc[:-1]).tolist()
    pairs = sum(n * (s - n) + n * (n + 1) // 2 for n, s in zip(queries, seq_lens, strict=True))
    return Work(
        calls=[partial(batch.attend, **options) for batch in batches],
        error=lambda: relative_error(first.attend(**options), reference(first, **masks)),
        bound=error_bound(first.q.dtype),
        num_bytes=num_bytes,
        num_flops=4 * pairs * first.q.shape[1] * first.q.shape[2],
        facts=describe(first, seq_lens, queries) | masks,
    )


def error_bound(dtype: torch.dtype) -> float:
    """Of the whole output: sums are fp32, the weights of the values and the output are rounded."""
    return {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


def describe(batch: Batch, seq_lens: Sequence[int], query_lens: Sequence[int]) -> dict[str, Any]:
    _, heads, head_dim = batch.q.shape
    return {
        "requests": len(seq_lens),
        "tokens_of_context": sum(seq_lens),
        "longest_context": max(seq_lens),
        "queries": sum(query_lens),
        "heads": heads,
        "kv_heads": batch.k_cache.shape[2],
        "head_dim": head_dim,
        "block_size": batch.k_cache.shape[1],
        "dtype": str(batch.q.dtype).removeprefix("torch."),
        "kv_dtype": str(batch.k_cache.dtype).removeprefix("torch."),
        "scales": "none"
        if batch.k_scale is None
        else ("tokens" if batch.k_scale.dim() == 3 else "heads"),
    }


def cascade_work(
    num_requests: int,
    shared: int,
    own: int,
    *,
    is_cascade: bool,
    num_groups: int = 1,
    max_groups: int = 0,
    heads: int = 32,
) -> Work:
    """Requests over physically shared blocks: one pass over them, or each request on its own.

    Over 0, ``max_groups`` makes it the call of a captured step, with buffers for so many groups.
    """
    seq_lens = [shared + own] * num_requests
    options: dict[str, Any] = {"shared_tokens": shared, "num_groups": num_groups, "heads": heads}
    batches = [make_batch(seq_lens, **options) for _ in range(8)]
    empty = max(0, max_groups - num_groups)

    def run(batch: Batch) -> Tensor:
        if not is_cascade:
            return batch.attend(max_query_len=1, implementation="triton")
        return cascade_attend(
            batch.q,
            batch.k_cache,
            batch.v_cache,
            batch.block_table,
            batch.query_start_loc,
            batch.seq_lens,
            batch.scale,
            group_block_table=batch.block_table[: num_groups + empty],
            prefix_lens=constants[0],
            token_index=constants[1],
            group_start_loc=constants[2],
            key_start=constants[3],
            max_query_len=1,
            is_padded=max_groups > 0,
        )

    index: dict[str, Any] = {"dtype": torch.int32, "device": DEVICE}
    starts = range(0, num_requests + 1, num_requests // num_groups)
    constants = (
        torch.tensor([shared] * num_groups + [0] * empty, **index),
        torch.arange(num_requests, **index).view(-1, num_groups).T.reshape(-1),
        torch.tensor([*starts, *[num_requests] * empty], **index),
        torch.full((num_requests,), shared, **index),
    )
    facts = describe(batches[0], seq_lens, [1] * num_requests) | {"shared": shared, "own": own}
    per_token = 2 * 2 * 8 * 128
    return Work(
        calls=[partial(run, batch) for batch in batches],
        error=lambda: relative_error(run(batches[0]), reference(batches[0])),
        bound=error_bound(torch.bfloat16),
        num_bytes=(num_groups * shared + num_requests * own) * per_token,
        facts=facts
        | {"is_cascade": is_cascade, "num_groups": num_groups, "max_groups": max_groups},
    )


def mixed_lengths(count: int, least: int, most: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(least, most + 1, (count,), generator=generator).tolist()


EIGHT_BIT = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}

#: Name to what makes the inputs. A case is made, checked, timed and dropped before the next.
CASES: dict[str, Callable[[], Work]] = {
    "decode 64 x 2048": lambda: attend_work([2048] * 64),
    "decode 1 x 32768": lambda: attend_work([32768]),
    "decode 1 x 1024": lambda: attend_work([1024]),
    "decode 8 x 4096": lambda: attend_work([4096] * 8),
    "decode 34 x 2048": lambda: attend_work([2048] * 34),
    "decode 256 x 100..2048": lambda: attend_work(mixed_lengths(256, 100, 2048)),
    "decode 64 x 2048, page 1": lambda: attend_work([2048] * 64, block_size=1),
    "decode 64 x 2048, page 64": lambda: attend_work([2048] * 64, block_size=64),
    "decode 64 x 2048, window 512": lambda: attend_work([2048] * 64, sliding_window=512),
    "decode 64 x 2048, soft cap": lambda: attend_work([2048] * 64, soft_cap=30.0),
    "decode 64 x 2048, MHA 16/16": lambda: attend_work([2048] * 64, heads=16, kv_heads=16),
    "decode 64 x 2048, MQA 32/1": lambda: attend_work([2048] * 64, heads=32, kv_heads=1),
    "decode 64 x 2048, 16/8 (0.6B)": lambda: attend_work([2048] * 64, heads=16, kv_heads=8),
    "decode 64 x 2048, D 64": lambda: attend_work([2048] * 64, head_dim=64),
    "decode 64 x 2048, D 80": lambda: attend_work([2048] * 64, head_dim=80),
    "decode 64 x 2048, D 256": lambda: attend_work([2048] * 64, head_dim=256),
    "decode 64 x 2048, fp16": lambda: attend_work([2048] * 64, dtype=torch.float16),
    "decode 16 x 2048, fp32": lambda: attend_work([2048] * 16, dtype=torch.float32),
    "verify 64 x 2048, 5 queries": lambda: attend_work([2048] * 64, 5),
    "verify 64 x 2048, 16 queries": lambda: attend_work([2048] * 64, 16),
    **{
        f"decode {shape}, {name} {scales_of}": partial(
            attend_work, lens, cache_dtype=dtype, scales_of=scales_of
        )
        for name, dtype in EIGHT_BIT.items()
        for scales_of in ("heads", "tokens")
        for shape, lens in {"64 x 2048": [2048] * 64, "1 x 32768": [32768]}.items()
    },
    "plain 32 x (2048 shared + 128)": partial(cascade_work, 32, 2048, 128, is_cascade=False),
    "cascade 32 x (2048 shared + 128)": partial(cascade_work, 32, 2048, 128, is_cascade=True),
    "plain 256 x (2048 shared + 128)": partial(cascade_work, 256, 2048, 128, is_cascade=False),
    "cascade 256 x (2048 shared + 128)": partial(cascade_work, 256, 2048, 128, is_cascade=True),
    **{
        f"{name} 8 x 32 x (2048 shared + 160), {model}": partial(
            cascade_work, 256, 2048, 160, num_groups=8, heads=heads, **how
        )
        for model, heads in {"32/8": 32, "16/8 (0.6B)": 16}.items()
        for name, how in {
            "plain": {"is_cascade": False},
            "cascade": {"is_cascade": True},
            "captured cascade": {"is_cascade": True, "max_groups": 16},
        }.items()
    },
}


def time_graph(calls: Sequence[Callable[[], object]], replays: int) -> Timing:
    """Time calls in turn inside one CUDA graph, at least eight of them a replay."""
    turns = [call for _ in range(-(-8 // len(calls))) for call in calls]
    for call in calls:  # compiles, and allocates what stays
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in turns:
            call()
    for _ in range(5):
        graph.replay()
    event_type: Callable[..., torch.cuda.Event] = torch.cuda.Event
    events = [event_type(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) * 1e3 / len(turns) for a, b in pairwise(events)]
    deciles = statistics.quantiles(times, n=10)
    return Timing(statistics.median(times), deciles[0], deciles[-1], replays)


def copy_bandwidth() -> float:
    """Bytes read plus bytes written a second of an elementwise kernel over 4 GiB."""
    source = torch.empty(1 << 30, dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    timing = time_graph([lambda: torch.neg(source, out=target)], 10)
    return 2 * source.nbytes / timing.median * 1e6


def machine() -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "copy_TBps": round(copy_bandwidth() / 1e12, 3),
        "git_commit": git_state(Path(__file__).parent)[0],
    }


def run_case(name: str, make: Callable[[], Work], replays: int) -> dict[str, Any]:
    """Check a case and time it; a wrong one is a record without a time."""
    torch.manual_seed(0)
    work = make()
    error = work.error()
    record: dict[str, Any] = {
        "case": name,
        "status": "ok" if error <= work.bound else "FAILED",
        "error": error,
        "bound": work.bound,
        "num_bytes": work.num_bytes,
        "num_flops": work.num_flops,
        **work.facts,
    }
    if record["status"] == "ok":
        timing = time_graph(work.calls, replays)
        record["us"] = {k: round(v, 3) for k, v in asdict(timing).items()}
        record["TBps"] = round(work.num_bytes / timing.median / 1e6, 4)
        record["TFLOPps"] = round(work.num_flops / timing.median / 1e6, 2)
    return record


def format_row(record: dict[str, Any]) -> str:
    if "us" not in record:
        return f"{record['case']:40} {record['status']} error {record['error']:.2e}"
    us = record["us"]
    return (
        f"{record['case']:40} {us['median']:9.2f} us [{us['p10']:.2f}, {us['p90']:.2f}]"
        f" {record['TBps']:7.3f} TB/s {record['TFLOPps']:7.1f} TFLOP/s  error {record['error']:.1e}"
    )


def main(arguments: Sequence[str], cases: dict[str, Callable[[], Work]] | None = None) -> int:
    """Run the cases whose name contains one of ``--only``, or all; other modules pass their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--out", default=None)
    parser.add_argument("--replays", type=int, default=30)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: this experiment needs a CUDA device", file=sys.stderr)
        return 2
    host = machine()
    print(host, flush=True)
    rows = []
    for name, make in (cases or CASES).items():
        if options.only and not any(text in name for text in options.only):
            continue
        start = time.perf_counter()
        record = run_case(name, make, options.replays)
        rows.append(record)
        print(format_row(record), f" ({time.perf_counter() - start:.1f} s)", flush=True)
        if options.out:
            with open(options.out, "a") as file:
                file.write(json.dumps({"kind": "kernel", **record, **host}) + "\n")
    return int(any(record["status"] != "ok" for record in rows))


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main(sys.argv[1:]))
