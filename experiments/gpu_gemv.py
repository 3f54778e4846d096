"""Tune, check and time the layer of one token on a GPU: ``python -m experiments.gpu_gemv``.

The four products of a layer of Llama-3.1-8B and of Qwen3-0.6B, one row in bf16, with the norms, the
activation and the additions between them (the queries stand for what attention returns): as
``kernels.triton.gemv`` has them, beside the same in one launch each with the products of cuBLAS and
of ``kernels.triton.skinny_gemm``. Layers follow one another in one CUDA graph, as in a step, with
weights that exceed the L2 cache several times; a chain is timed only when its output is right.

``--tune`` first tries other cuts for each product in turn, the others as they are, and prints what
was fastest; the rule is in ``kernels.triton.gemv.choose_tiling``. Options: ``--models 8B,0.6B``,
``--out FILE`` (records are appended, as JSONL), ``--replays N``. The exit code is 1 where an output
was wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.gpu_attention import DEVICE, L2_BYTES, machine, relative_error, time_graph
from experiments.gpu_linear import (
    BOUND,
    DTYPE,
    EPS,
    MODELS,
    Report,
    last_of_graph,
    ours,
    random_weight,
    run_layer,
)
from kernels.norm import RowNorm
from kernels.triton.gemv import GemvTiling, choose_tiling, gemv

Tilings = dict[str, GemvTiling]

#: What puts the residual back, and calls that each run one layer on it in place.
Chain = tuple[Callable[[], Tensor], list[Callable[[], Tensor]]]

#: block_n, block_k, num_warps, num_stages
SHAPES = (
    (2, 1024, 2, 1), (4, 1024, 2, 1), (4, 1024, 4, 1), (8, 1024, 4, 1), (8, 1024, 8, 1),
    (16, 1024, 8, 1), (2, 2048, 4, 1), (4, 2048, 4, 1), (4, 2048, 8, 1), (8, 2048, 8, 1),
    (2, 4096, 8, 1), (4, 4096, 8, 1), (8, 512, 4, 1), (8, 512, 4, 4), (16, 512, 4, 1),
    (16, 512, 4, 3), (16, 512, 8, 3), (16, 256, 4, 4), (4, 512, 2, 4), (32, 256, 8, 3),
)  # fmt: skip
PREFETCHED = (0, 1, 2, 4, 8)


def forms(norm: RowNorm, residual: Tensor) -> dict[str, dict[str, Any]]:
    """What each product of the layer has inside it."""
    return {
        "qkv": {"norm": norm},
        "o": {"residual": residual},
        "gate_up": {"norm": norm, "activation": "silu"},
        "down": {"residual": residual},
    }


def run_fused(
    weights: dict[str, Tensor], norm: Tensor, residual: Tensor, tilings: Tilings
) -> Tensor:
    """A layer on ``residual[1, H]`` in place, which is what is returned."""
    inside = forms(RowNorm(norm, EPS), residual)
    width = weights["o"].shape[1]
    x = gemv(residual, weights["qkv"], tiling=tilings["qkv"], **inside["qkv"])[:, :width]
    gemv(x, weights["o"], tiling=tilings["o"], **inside["o"])
    x = gemv(residual, weights["gate_up"], tiling=tilings["gate_up"], **inside["gate_up"])
    return gemv(x, weights["down"], tiling=tilings["down"], **inside["down"])


def build(jobs: Sequence[tuple[str, str, GemvTiling]]) -> None:
    """Compile kernels, to be found on disk: run in processes of their own."""
    for model, name, tiling in jobs:
        rows, columns = MODELS[model][name]
        weight = torch.zeros(rows, columns, dtype=DTYPE, device=DEVICE)
        norm = RowNorm(torch.ones(columns, dtype=DTYPE, device=DEVICE), EPS)
        residual = torch.zeros(1, rows, dtype=DTYPE, device=DEVICE)
        x = torch.zeros(1, columns, dtype=DTYPE, device=DEVICE)
        gemv(x, weight, tiling=tiling, **forms(norm, residual)[name])
    torch.cuda.synchronize()


def build_all(models: Sequence[str], processes: int = 14) -> None:
    jobs = [
        (model, name, replace(tiling, prefetched=prefetched))
        for model in models
        for name in MODELS[model]
        if name != "head"
        for tiling in candidates()
        for prefetched in PREFETCHED[:2]
    ]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=build, args=(jobs[i::processes],)) for i in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def candidates() -> list[GemvTiling]:
    return [GemvTiling(*shape, prefetched=1) for shape in SHAPES]


def default_tilings(model: str) -> Tilings:
    device = torch.device(DEVICE, torch.cuda.current_device())
    return {
        name: choose_tiling(rows, columns, DTYPE, device)
        for name, (rows, columns) in MODELS[model].items()
        if name != "head"
    }


def describe(tiling: GemvTiling) -> str:
    return (
        f"{tiling.block_n}x{tiling.block_k} w{tiling.num_warps} s{tiling.num_stages}"
        f" f{tiling.prefetched}"
    )


class Layers:
    """Weights of some layers of a model, and chains through them."""

    def __init__(self, model: str) -> None:
        shapes = {name: shape for name, shape in MODELS[model].items() if name != "head"}
        self.num_bytes = sum(2 * n * k for n, k in shapes.values())
        copies = max(2, -(-4 * L2_BYTES // self.num_bytes))
        self.weights = [
            {name: random_weight(*shape) for name, shape in shapes.items()} for _ in range(copies)
        ]
        width = shapes["qkv"][1]
        self.norm = torch.ones(width, dtype=DTYPE, device=DEVICE)
        self.hidden = torch.randn(1, width, device=DEVICE).to(DTYPE)

    def fused(self, tilings: Tilings) -> Chain:
        residual = self.hidden.clone()
        calls = [partial(run_fused, w, self.norm, residual, tilings) for w in self.weights]
        return partial(residual.copy_, self.hidden), calls

    def apart(self, product: Callable[..., Tensor]) -> Chain:
        """The same with a launch for each op; a layer's last one norms for the next."""
        from kernels.triton.norm import rms_norm

        residual = self.hidden.clone()
        normed: dict[str, Tensor] = {}

        def reset() -> Tensor:
            normed.clear()
            return residual.copy_(self.hidden)

        def call(weights: dict[str, Tensor]) -> Tensor:
            hidden = normed.pop("x", None)
            if hidden is None:
                hidden = rms_norm(residual, self.norm, EPS)
            products = dict.fromkeys(weights, product)
            normed["x"] = run_layer(products, weights, self.norm, hidden, residual, True)
            return residual

        return reset, [partial(call, w) for w in self.weights]


def tune(layers: Layers, tilings: Tilings, report: Report, label: str) -> Tilings:
    """Cuts by which the chain is fastest, found one product after another."""

    def us(changed: Tilings) -> float:
        try:
            return time_graph(layers.fused(changed)[1], 10).median
        except Exception as error:  # no room for it on the card
            print(label, changed, str(error)[:200])
            torch.cuda.synchronize()
            return float("inf")

    for name in tilings:
        timed = {t: us({**tilings, name: t}) for t in (tilings[name], *candidates())}
        ranked = sorted(timed, key=lambda t: timed[t])
        for tiling in ranked[:2]:
            for prefetched in PREFETCHED:
                other = replace(tiling, prefetched=prefetched)
                if other not in timed:
                    timed[other] = us({**tilings, name: other})
        before = timed[tilings[name]]
        ranked = sorted(timed, key=lambda t: timed[t])
        shown = ", ".join(f"{describe(t)} {timed[t]:.2f}" for t in ranked[:5])
        report.say(
            f"tune {label} {name:8} {describe(tilings[name])} {before:.2f} us a layer; {shown}"
        )
        tilings = {**tilings, name: ranked[0]}
    return tilings


def measure(
    layers: Layers, kinds: dict[str, Chain], label: str, report: Report, replays: int
) -> None:
    truth = None
    for kind, (reset, calls) in kinds.items():
        reset()
        alone = calls[0]().clone()
        in_graph = last_of_graph([reset, calls[0]])
        truth = alone.float() if truth is None else truth
        error = max(relative_error(out, truth) for out in (alone, in_graph))
        record: dict[str, Any] = {
            "case": f"layer of one row, {label}",
            "status": "ok" if error <= 4 * BOUND else "FAILED",
            "error": error,
            "bound": 4 * BOUND,
            "mode": "gemv",
            "implementation": kind,
            "num_bytes": layers.num_bytes,
        }
        if record["status"] == "ok":
            timing = time_graph(calls, replays)
            record["us"] = {k: round(v, 3) for k, v in asdict(timing).items()}
            record["TBps"] = round(layers.num_bytes / timing.median / 1e6, 4)
            report.say(
                f"{label:5} {kind:32} {timing.median:8.2f} [{timing.p10:.2f}, {timing.p90:.2f}] us"
                f" {record['TBps']:.2f} TB/s"
            )
        report.add(record)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--models", default="8B,0.6B")
    parser.add_argument("--out", default=None)
    parser.add_argument("--replays", type=int, default=30)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: this experiment needs a CUDA device", file=sys.stderr)
        return 2
    models = options.models.split(",")
    began = time.perf_counter()
    if options.tune:
        build_all(models)
        print(f"built after {time.perf_counter() - began:.1f} s", flush=True)
    report = Report(options.out, machine())
    for model in models:
        layers = Layers(model)
        tilings = default_tilings(model)
        kinds = {
            "cuBLAS, an op a launch": layers.apart(torch.nn.functional.linear),
            "skinny_gemm, an op a launch": layers.apart(ours()),
            "gemv": layers.fused(tilings),
        }
        if options.tune:
            best = tune(layers, tilings, report, model)
            kinds["gemv, tuned"] = layers.fused(best)
        measure(layers, kinds, model, report, options.replays)
        print(f"{model}: after {time.perf_counter() - began:.1f} s", flush=True)
        del layers
        torch.cuda.empty_cache()
    print("\n".join(["", *report.summary]))
    return int(not report.is_right)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main(sys.argv[1:]))
