"""Check, then time, products of few rows on a GPU: ``python -m experiments.gpu_linear``.

cuBLAS (``F.linear``) beside ``kernels.triton.skinny_gemm`` for the layers of Llama-3.1-8B and
Qwen3-0.6B in bf16. Every case is first compared with the product in fp32, and is timed only when it
is right; timing as in ``experiments.gpu_attention``: a CUDA graph over copies of the weight that
exceed the L2 cache several times. TB/s counts the bytes of the weight alone.

Modes, of which several may be given: ``--compare`` (the default) times both for 1 to 16 rows,
``--chain`` a layer's four products in sequence with the norms and the activation between them, with
and without dependent launches, ``--tiles`` the kernel in many cuts; modes after it take the best
that it found.

Options: ``--only TEXT,TEXT`` (layers whose name contains one of these), ``--rows 1,8``,
``--out FILE`` (records are appended, as JSONL), ``--replays N``, ``--limit-seconds S`` (no cut is
tried after so long). The exit code is 1 where a case was wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.gpu_attention import DEVICE, L2_BYTES, machine, relative_error, time_graph
from kernels.triton.activation import silu_and_mul
from kernels.triton.norm import add_rms_norm_, rms_norm
from kernels.triton.skinny_gemm import (
    SkinnyTiling,
    choose_tiling,
    skinny_linear,
)

DTYPE = torch.bfloat16
#: One rounding of the output, of half a step at most, and sums in fp32.
BOUND = 3e-3
EPS = 1e-6

#: Model, then layer: rows and columns of its weight.
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    },
    "0.6B": {
        "qkv": (4096, 1024),
        "o": (1024, 2048),
        "gate_up": (6144, 1024),
        "down": (1024, 3072),
        "head": (151936, 1024),
    },
}
LAYERS = {f"{m} {name}": shape for m, layers in MODELS.items() for name, shape in layers.items()}

#: block_n, block_k, num_warps, num_stages, and how many such programs a multiprocessor holds.
SHAPES = (
    (64, 64, 4, 5, 4), (64, 64, 4, 8, 2), (64, 128, 4, 3, 3), (64, 128, 4, 4, 2),
    (64, 128, 4, 5, 2), (64, 256, 4, 3, 1), (64, 256, 4, 5, 1), (128, 64, 4, 4, 3),
    (128, 64, 4, 6, 2), (128, 128, 4, 3, 2), (128, 128, 8, 3, 2), (128, 128, 8, 6, 1),
    (32, 128, 4, 4, 4), (32, 256, 4, 4, 2), (16, 256, 2, 4, 4), (32, 128, 2, 6, 3),
)  # fmt: skip


def candidates() -> list[SkinnyTiling]:
    """Cuts to try: shared out among as many programs as run at a time or twice as many, or one
    program a tile, and some with less and more asked of the L2 cache."""
    found = []
    for block_n, block_k, warps, stages, resident in SHAPES:
        prefetched = max(1, (64 << 10) // (2 * block_n * block_k * resident))
        for programs in (resident, 2 * resident, 0):
            found.append(SkinnyTiling(block_n, block_k, warps, stages, programs, prefetched))
    for prefetched in (0, 4, 8):
        found.append(SkinnyTiling(64, 128, 4, 5, 2, prefetched))
    return found


@dataclass(slots=True)
class Layer:
    """Copies of a weight, and inputs of it."""

    name: str
    weights: list[Tensor]
    truths: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return self.weights[0].nbytes

    def input(self, rows: int) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(rows)
        shape = (rows, self.weights[0].shape[1])
        return torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE)

    def truth(self, rows: int) -> Tensor:
        if rows not in self.truths:
            self.truths[rows] = self.input(rows).float() @ self.weights[0].float().T
        return self.truths[rows]


def make_layer(name: str) -> Layer:
    out_features, in_features = LAYERS[name]
    copies = max(2, -(-4 * L2_BYTES // (2 * out_features * in_features)))
    return Layer(name, [random_weight(out_features, in_features) for _ in range(copies)])


def random_weight(out_features: int, in_features: int) -> Tensor:
    weight = torch.empty(out_features, in_features, dtype=DTYPE, device=DEVICE)
    return weight.normal_(0.0, in_features**-0.5)


def run_case(
    layer: Layer, rows: int, op: Callable[..., Tensor], replays: int, **facts: Any
) -> dict[str, Any]:
    """Check a product and time it; a wrong one is a record without a time."""
    x = layer.input(rows)
    poison = torch.full_like(layer.truth(rows), float("nan"), dtype=DTYPE)
    del poison  # what the op allocates next holds NaN
    errors = [relative_error(op(x, layer.weights[0]), layer.truth(rows)) for _ in range(2)]
    error = max(errors)
    record: dict[str, Any] = {
        "case": f"linear {layer.name}, {rows} rows",
        "status": "ok" if error <= BOUND else "FAILED",
        "error": error,
        "bound": BOUND,
        "rows": rows,
        "out_features": layer.weights[0].shape[0],
        "in_features": layer.weights[0].shape[1],
        "dtype": "bfloat16",
        "num_bytes": layer.num_bytes,
        **facts,
    }
    if record["status"] == "ok":
        timing = time_graph([partial(op, x, w) for w in layer.weights], replays)
        record["us"] = {k: round(v, 3) for k, v in asdict(timing).items()}
        record["TBps"] = round(layer.num_bytes / timing.median / 1e6, 4)
    return record


def ours(tiling: SkinnyTiling | None = None, **options: Any) -> Callable[..., Tensor]:
    return partial(skinny_linear, tiling=tiling, **options)


def build(tilings: Sequence[SkinnyTiling], rows: Sequence[int]) -> None:
    """Compile kernels, to be found on disk: run in processes of their own."""
    weight = torch.zeros(256, 4096, dtype=DTYPE, device=DEVICE)
    for tiling in tilings:
        for count in rows:
            x = torch.zeros(count, 4096, dtype=DTYPE, device=DEVICE)
            try:
                skinny_linear(x, weight, tiling=tiling)
            except Exception as error:  # too much shared memory, say: told where it is timed
                print(tiling, str(error)[:200])
    torch.cuda.synchronize()


def build_all(tilings: Sequence[SkinnyTiling], rows: Sequence[int], processes: int = 14) -> None:
    kernels: dict[Any, SkinnyTiling] = {}
    for tiling in tilings:
        kernels.setdefault(tuple(v for k, v in asdict(tiling).items() if k != "programs"), tiling)
    chosen = list(kernels.values())
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=build, args=(chosen[i::processes], rows)) for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


class Report:
    """Rows for people, records for the file."""

    def __init__(self, path: str | None, host: dict[str, Any]) -> None:
        self.path = path
        self.host = host
        self.is_right = True
        self.summary: list[str] = []

    def add(self, record: dict[str, Any]) -> None:
        self.is_right &= record["status"] in ("ok", "unsupported")
        if record["status"] == "FAILED":
            print(record, flush=True)
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps({"kind": "kernel", **record, **self.host}) + "\n")

    def say(self, row: str) -> None:
        self.summary.append(row)
        print(row, flush=True)


def describe(tiling: SkinnyTiling) -> str:
    return (
        f"{tiling.block_n}x{tiling.block_k} w{tiling.num_warps} s{tiling.num_stages}"
        f" p{tiling.programs} f{tiling.prefetched}"
    )


Best = dict[tuple[str, int], SkinnyTiling]


def try_tiles(
    layer: Layer, rows: Sequence[int], report: Report, deadline: float, replays: int
) -> Best:
    best: Best = {}
    tilings = candidates()
    for count in (min(rows), max(rows)):
        timed = []
        for tiling in tilings:
            if time.perf_counter() > deadline:
                continue
            facts = {"mode": "tiles", "implementation": "skinny_gemm", "tiling": asdict(tiling)}
            try:
                record = run_case(layer, count, ours(tiling), replays, **facts)
            except Exception as error:  # what the card has no room for
                record = {"case": layer.name, "status": "unsupported", "reason": str(error)[:200]}
                record |= facts
                torch.cuda.synchronize()
            report.add(record)
            if "us" in record:
                timed.append((record["us"]["median"], tiling))
        timed.sort(key=lambda pair: pair[0])
        if timed:
            best[layer.name, count] = timed[0][1]
        if count == 1:  # with more rows, those that were fast with one
            tilings = [tiling for _, tiling in timed][:8]
        for us, tiling in timed[:3]:
            report.say(
                f"tiles {layer.name:13} T={count:<2} {us:8.2f} us"
                f" {layer.num_bytes / us / 1e6:6.3f} TB/s  {describe(tiling)}"
            )
    return best


def pick(best: Best, name: str, rows: int) -> SkinnyTiling:
    """What was found to be best, for the nearest of the numbers of rows that were tried."""
    tried = [count for layer, count in best if layer == name and (count == 1) == (rows == 1)]
    if tried:
        return best[name, tried[0]]
    out_features, in_features = LAYERS[name]
    return choose_tiling(out_features, in_features, rows, DTYPE, torch.device(DEVICE))


def compare(layer: Layer, rows: Sequence[int], best: Best, report: Report, replays: int) -> None:
    for count in rows:
        tiling = pick(best, layer.name, count)
        facts: dict[str, Any] = {"mode": "compare", "implementation": "cublas"}
        dense = run_case(layer, count, F.linear, replays, **facts)
        facts = {"mode": "compare", "implementation": "skinny_gemm", "tiling": asdict(tiling)}
        skinny = run_case(layer, count, ours(tiling), replays, **facts)
        report.add(dense)
        report.add(skinny)
        if "us" in dense and "us" in skinny:
            a, b = dense["us"], skinny["us"]
            report.say(
                f"{layer.name:13} T={count:<2} cuBLAS {a['median']:7.2f} us {dense['TBps']:5.2f}"
                f"  skinny {b['median']:7.2f} [{b['p10']:.2f}, {b['p90']:.2f}]"
                f" {skinny['TBps']:5.2f} TB/s  {a['median'] / b['median']:.2f}x  {describe(tiling)}"
            )


def run_layer(
    products: dict[str, Callable[..., Tensor]],
    weights: dict[str, Tensor],
    norm: Tensor,
    hidden: Tensor,
    residual: Tensor,
    has_rest: bool,
) -> Tensor:
    """A layer without its attention: the queries stand for what it returns.

    ``hidden`` is the norm of ``residual``. Returns the residual where norms are run, else what the
    last product gives.
    """
    width = weights["o"].shape[1]
    x = products["qkv"](hidden, weights["qkv"])[:, :width]
    x = products["o"](x, weights["o"])
    if has_rest:
        x = add_rms_norm_(x, residual, norm, EPS)
    if has_rest and "gated" in products:
        x = products["gated"](x, weights["gate_up"])
    else:
        x = products["gate_up"](x, weights["gate_up"])
        x = silu_and_mul(x) if has_rest else x[:, : x.shape[1] // 2]
    x = products["down"](x, weights["down"])
    if not has_rest:
        return x
    add_rms_norm_(x, residual, norm, EPS)
    return residual


def with_fresh_residual(call: Callable[..., Tensor], raw: Tensor, **given: Any) -> Tensor:
    return call(residual=raw.clone(), **given)


def last_of_graph(calls: Sequence[Callable[[], Tensor]]) -> Tensor:
    """What the last of calls in one graph gives: there a launch overlaps the one ahead of it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            out = call()
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    return out


def chain(model: str, rows: Sequence[int], best: Best, report: Report, replays: int) -> None:
    shapes = {name: shape for name, shape in MODELS[model].items() if name != "head"}
    num_bytes = sum(2 * n * k for n, k in shapes.values())
    copies = max(2, -(-4 * L2_BYTES // num_bytes))
    layers = [
        {name: random_weight(*shape) for name, shape in shapes.items()} for _ in range(copies)
    ]
    width = shapes["qkv"][1]
    norm = torch.ones(width, dtype=DTYPE, device=DEVICE)
    for count in rows:
        raw = torch.randn(count, width, device=DEVICE).to(DTYPE)
        hidden = rms_norm(raw, norm, EPS)
        tilings = {name: pick(best, f"{model} {name}", count) for name in shapes}
        kinds: dict[str, dict[str, Callable[..., Tensor]]]
        kinds = {"cublas": dict.fromkeys(shapes, F.linear)}
        for name, flag in (("skinny_gemm", True), ("skinny_gemm, not dependent", False)):
            kinds[name] = {n: ours(t, is_dependent=flag) for n, t in tilings.items()}
        for has_rest in (False, True):
            row, truth = [], None
            if has_rest:
                gated = partial(skinny_linear, activation="silu")
                kinds["skinny_gemm, gated"] = {**kinds["skinny_gemm"], "gated": gated}
            for kind, products in kinds.items():
                residual = raw.clone()
                call = partial(run_layer, products, norm=norm, has_rest=has_rest)
                out = call(weights=layers[0], hidden=hidden, residual=residual)
                truth = out if truth is None else truth
                calls = [
                    partial(call, weights=w, hidden=hidden, residual=raw.clone()) for w in layers
                ]
                # Residuals are added to in place: each replay needs one as it was.
                fresh = [
                    partial(with_fresh_residual, call, raw, weights=w, hidden=hidden)
                    for w in layers
                ]
                error = max(relative_error(o, truth) for o in (out, last_of_graph(fresh[::-1])))
                record: dict[str, Any] = {
                    "case": f"chain {model}, {count} rows",
                    "status": "ok" if error <= 4 * BOUND else "FAILED",
                    "error": error,
                    "bound": 4 * BOUND,
                    "mode": "chain",
                    "implementation": kind,
                    "has_norms_and_activation": has_rest,
                    "rows": count,
                    "num_bytes": num_bytes,
                }
                if record["status"] == "ok":
                    timing = time_graph(calls, replays)
                    record["us"] = {k: round(v, 3) for k, v in asdict(timing).items()}
                    record["TBps"] = round(num_bytes / timing.median / 1e6, 4)
                    row.append(f"{kind} {timing.median:.2f} us {record['TBps']:.2f} TB/s")
                report.add(record)
            rest = "with norms, silu" if has_rest else "products alone"
            report.say(f"chain {model:4} T={count:<2} {rest}: " + "; ".join(row))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for mode in ("--compare", "--chain", "--tiles"):
        parser.add_argument(mode, action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--rows", default="1,4,8,16")
    parser.add_argument("--out", default=None)
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--limit-seconds", type=float, default=300.0)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: this experiment needs a CUDA device", file=sys.stderr)
        return 2
    began = time.perf_counter()
    wanted = [text for text in options.only.split(",") if text]
    names = [n for n in LAYERS if not wanted or any(text in n for text in wanted)]
    rows = [int(n) for n in options.rows.split(",")]
    if options.tiles:
        build_all(candidates(), sorted({min(rows), max(rows)}))
        print(f"built after {time.perf_counter() - began:.1f} s", flush=True)
    report = Report(options.out, machine())
    print(report.host, flush=True)
    best: Best = {}
    for index, name in enumerate(names):
        layer = make_layer(name)
        if options.tiles:
            left = began + options.limit_seconds - time.perf_counter()
            deadline = time.perf_counter() + left / (len(names) - index)
            best |= try_tiles(layer, rows, report, deadline, max(8, options.replays // 3))
        if options.compare or not (options.chain or options.tiles):
            compare(layer, rows, best, report, options.replays)
        del layer
        torch.cuda.empty_cache()
        print(f"{name}: after {time.perf_counter() - began:.1f} s", flush=True)
    if options.chain:
        for model in MODELS:
            if any(name.startswith(model) for name in names):
                chain(model, sorted({rows[0], rows[-1]}), best, report, options.replays)
    print("\n".join(["", *report.summary]))
    return int(not report.is_right)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main(sys.argv[1:]))
