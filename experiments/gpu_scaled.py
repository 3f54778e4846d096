"""Check, then time, products in 8 bits on a GPU: ``python -m experiments.gpu_scaled``.

The layers of Llama-3.1-8B in bf16 by cuBLAS, beside every format and product of
:mod:`kernels.scaled_linear` with the quantisation of the activations. Every case is first compared
with the reference of its format, and is timed only when it is right; timing as in
``experiments.gpu_attention``: a CUDA graph over copies of the weight that exceed the L2 cache
several times. TB/s counts the bytes of the weight alone.

Modes, of which several may be given: ``--compare`` (the default), ``--quantize`` times the
quantisation of activations alone and within norms and gates, beside the ops without it, ``--tune``
tries cuts of the Triton products; modes after it take the best that it found.

Options: ``--only TEXT,TEXT`` (layers), ``--rows 1,8``, ``--formats fp8,int8``, ``--out FILE``
(records are appended, as JSONL), ``--replays N``, ``--limit-seconds S`` (no cut is tried after so
long). The exit code is 1 where a case was wrong.
"""

from __future__ import annotations

import argparse
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
from experiments.gpu_linear import Report
from kernels import scaled_linear
from kernels.norm import RowNorm
from kernels.scaled_linear import (
    FORMATS,
    QuantizedRows,
    ScaledLinear,
    apply_scaled_linear,
    choose_implementation,
    cublas_limit,
    pack_scaled_linear,
    quantize_input,
    quantize_rows_reference,
    quantize_weight,
)
from kernels.triton import scaled_gemm, scaled_skinny
from kernels.triton.activation import silu_and_mul
from kernels.triton.norm import add_rms_norm_
from kernels.triton.scaled_gemm import GemmTiling
from kernels.triton.scaled_skinny import MAX_ROWS, ScaledTiling

DTYPE = torch.bfloat16
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 4096)
#: The output is rounded once; tensor cores sum fp8 with fewer bits than the reference.
BOUNDS = {"fp8": 6e-3, "fp8_tensor": 6e-3, "fp8_block": 6e-3, "int8": 3e-3}
LAYERS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
SKINNY = tuple(
    ScaledTiling(n, k, w, s, p, f)
    for n, k, w, s, p, f in (
        (64, 256, 4, 4, 0, 2), (64, 512, 4, 3, 0, 1), (64, 128, 4, 6, 0, 4),
        (32, 512, 4, 4, 0, 1), (32, 256, 4, 6, 0, 2), (32, 512, 2, 4, 0, 1),
        (32, 1024, 4, 3, 0, 1), (16, 1024, 4, 3, 0, 1), (16, 1024, 2, 3, 0, 1),
        (16, 512, 2, 5, 0, 1), (16, 512, 4, 5, 0, 2), (128, 256, 4, 3, 0, 1),
        (64, 256, 4, 4, 2, 2), (64, 512, 4, 3, 1, 2), (32, 512, 4, 4, 2, 1),
        (128, 256, 8, 4, 1, 1), (64, 128, 4, 6, 2, 2), (64, 256, 4, 4, 1, 1),
        (64, 256, 4, 3, 0, 1), (128, 128, 8, 5, 1, 1),
    )
)  # fmt: skip
SKINNY_BLOCK = tuple(
    ScaledTiling(n, 128, w, s, p, f)
    for n, w, s, p, f in (
        (64, 4, 6, 2, 2), (64, 4, 8, 2, 4), (64, 4, 6, 0, 4), (64, 4, 10, 0, 4), (128, 4, 6, 2, 2),
        (128, 4, 8, 1, 4), (32, 4, 8, 0, 4), (32, 2, 8, 0, 4), (16, 2, 10, 0, 4), (16, 4, 10, 0, 4),
        (32, 4, 10, 1, 4), (64, 4, 5, 1, 2), (128, 8, 5, 1, 2), (64, 4, 4, 0, 2),
    )
)  # fmt: skip
GEMMS = tuple(
    GemmTiling(m, n, k, w, s)
    for m, n, k, w, s in (
        (128, 128, 128, 8, 4), (128, 128, 128, 8, 3), (128, 256, 128, 8, 3), (128, 256, 128, 8, 4),
        (256, 128, 128, 8, 3), (64, 128, 128, 4, 5), (64, 64, 128, 4, 6), (128, 64, 128, 4, 4),
        (64, 64, 256, 4, 4), (128, 64, 256, 4, 3), (64, 32, 256, 4, 5), (128, 32, 256, 4, 4),
        (64, 128, 256, 4, 3), (128, 128, 128, 4, 4),
    )
)  # fmt: skip


@dataclass(slots=True)
class Layer:
    """Copies of a weight in bf16 and in one format; made and dropped one after another."""

    name: str
    dense: list[Tensor]
    scaled: dict[str, list[ScaledLinear]] = field(default_factory=dict)

    def in_format(self, format: str) -> list[ScaledLinear]:
        if format not in self.scaled:
            self.scaled.clear()
            x = self.input(64)
            scale = x.abs().amax().float().view(1) / 448 if format == "fp8_tensor" else None
            copies = self.dense * (1 if len(self.dense) > 4 else 2)  # half the bytes each
            self.scaled[format] = [
                pack_scaled_linear(*quantize_weight(w, format), format=format, input_scale=scale)
                for w in copies
            ]
        return self.scaled[format]

    def input(self, rows: int) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(rows)
        shape = (rows, self.dense[0].shape[1])
        return torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE)


def make_layer(name: str) -> Layer:
    out_features, in_features = LAYERS[name]
    copies = max(2, -(-4 * L2_BYTES // (2 * out_features * in_features)))
    weights = [
        torch.empty(out_features, in_features, dtype=DTYPE, device=DEVICE).normal_(
            0.0, in_features**-0.5
        )
        for _ in range(copies)
    ]
    return Layer(name, weights)


def run_case(
    layer: Layer,
    rows: int,
    format: str,
    calls: Sequence[Callable[[], Tensor]],
    truth: Tensor,
    replays: int,
    **facts: Any,
) -> dict[str, Any]:
    """Check a product and time it; a wrong one is a record without a time."""
    poison = torch.full_like(truth, float("nan"), dtype=DTYPE)
    del poison  # what the product allocates next holds NaN
    bound = BOUNDS.get(format, 3e-3)
    num_bytes = layer.dense[0].numel() * (2 if format == "bf16" else 1)
    record: dict[str, Any] = {
        "case": f"{format} {layer.name}, {rows} rows",
        "bound": bound,
        "rows": rows,
        "format": format,
        "out_features": layer.dense[0].shape[0],
        "in_features": layer.dense[0].shape[1],
        "num_bytes": num_bytes,
        **facts,
    }
    try:
        record["error"] = max(relative_error(calls[0](), truth) for _ in range(2))
        record["status"] = "ok" if record["error"] <= bound else "FAILED"
        if record["status"] == "ok":
            timing = time_graph(calls, replays)
            record["us"] = {k: round(v, 3) for k, v in asdict(timing).items()}
            record["TBps"] = round(num_bytes / timing.median / 1e6, 4)
            record["TFLOPs"] = round(2 * rows * layer.dense[0].numel() / timing.median / 1e6, 1)
    except Exception as error:  # what the card or the library does not have
        record |= {"status": "unsupported", "reason": f"{type(error).__name__}: {error}"[:300]}
        torch.cuda.synchronize()
    return record


Best = dict[tuple[str, str, int, str], Any]


def products(
    layer: ScaledLinear, rows: int, best: Best, name: str
) -> dict[str, Callable[[ScaledLinear, QuantizedRows], Tensor]]:
    """What can multiply so many rows, by name."""

    def tiled(kind: str, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        near = [k for k in best if k[:2] == (layer.format, name) and k[3] == kind]
        at = min(near, key=lambda k: abs(k[2] - rows), default=None)
        tiling = None if at is None else best[at]

        def call(scaled: ScaledLinear, x: QuantizedRows) -> Tensor:
            parts = (x.codes, x.scales, scaled.codes, scaled.scales, scaled.bias)
            return op(*parts, out_dtype=x.dtype, tiling=tiling)

        return call

    found: dict[str, Callable[..., Tensor]] = {}
    if rows <= MAX_ROWS:
        found["skinny"] = tiled("skinny", scaled_skinny.scaled_skinny_linear)
    if rows >= 16:
        found["triton"] = tiled("triton", scaled_gemm.scaled_gemm)
    if cublas_limit(layer, rows, DTYPE) is None:
        found["cublas"] = scaled_linear._cublas
        if rows >= 128 and layer.format != "fp8_block":
            found["cublas exact"] = partial(scaled_linear._cublas, is_fast=False)
    if layer.format == "int8" and rows > 16:
        found["int_mm"] = partial(apply_scaled_linear, implementation="int_mm")
    return found


def multiply(
    product: Callable[[ScaledLinear, QuantizedRows], Tensor], x: Tensor, layer: ScaledLinear
) -> Tensor:
    """A product with the quantisation of its activations."""
    return product(layer, quantize_input(layer, x))


def truth_of(scaled: ScaledLinear, x: Tensor) -> Tensor:
    quantized = quantize_rows_reference(
        x, scaled.codes.dtype, scaled.group_size, scaled.input_scale
    )
    return apply_scaled_linear(scaled, QuantizedRows(*quantized, torch.float32), "reference")


def compare(
    layer: Layer, rows: Sequence[int], formats: Sequence[str], best: Best, report: Report,
    replays: int,
) -> None:  # fmt: skip
    dense: dict[int, float] = {}
    for count in rows:
        x = layer.input(count)
        truth = x.float() @ layer.dense[0].float().T
        calls = [partial(F.linear, x, w) for w in layer.dense]
        record = run_case(layer, count, "bf16", calls, truth, replays, implementation="cublas")
        report.add(record)
        dense[count] = record["us"]["median"]
        report.say(
            f"{layer.name:8} T={count:<4} bf16        cublas       {dense[count]:8.2f} us"
            f" {record['TBps']:5.2f} TB/s {record['TFLOPs']:7.1f} TFLOP/s"
        )
    for format in formats:
        copies = layer.in_format(format)
        for count in rows:
            x = layer.input(count)
            truth = truth_of(copies[0], x)
            chosen = choose_implementation(copies[0], count, DTYPE)
            for name, product in products(copies[0], count, best, layer.name).items():
                calls = [partial(multiply, product, x, one) for one in copies]
                record = run_case(
                    layer, count, format, calls, truth, replays, mode="compare", implementation=name
                )
                report.add(record)
                say(layer, count, format, name, record, dense[count], name == chosen, report)
            del truth


def say(
    layer: Layer, rows: int, format: str, name: str, record: dict[str, Any], dense: float,
    is_chosen: bool, report: Report,
) -> None:  # fmt: skip
    head = f"{layer.name:8} T={rows:<4} {format:11} {name:12}"
    if "us" not in record:
        report.say(f"{head} {record['status']} {record.get('reason', record.get('error'))}"[:240])
        return
    us = record["us"]["median"]
    report.say(
        f"{head} {us:8.2f} us {record['TBps']:5.2f} TB/s {record['TFLOPs']:7.1f} TFLOP/s"
        f"  {dense / us:.2f}x  error {record['error']:.1e}{'  chosen' if is_chosen else ''}"
    )


#: Kind of product and rows that are tuned for.
TUNED = (
    ("skinny", 1), ("skinny", 16), ("skinny", 32), ("skinny", 128), ("triton", 128),
    ("triton", 512), ("triton", 4096),
)  # fmt: skip


def cuts_of(kind: str, format: str, rows: int) -> list[Any]:
    is_block = format == "fp8_block"
    if kind == "skinny":
        return [t for t in (SKINNY_BLOCK if is_block else SKINNY) if rows < 32 or t.block_n > 16]
    found = [t for t in GEMMS if not is_block or (t.block_k == 128 and t.block_n <= 128)]
    return [t for t in found if (rows < 1024) or t.block_m * t.block_n >= 128 * 128]


def operation(kind: str) -> Callable[..., Tensor]:
    return scaled_gemm.scaled_gemm if kind == "triton" else scaled_skinny.scaled_skinny_linear


def build(jobs: Sequence[tuple[str, str, int, Any]]) -> None:
    """Compile kernels, to be found on disk: run in processes of their own."""
    weight = torch.ones(256, 4096, dtype=DTYPE, device=DEVICE)
    for format, kind, count, tiling in jobs:
        scaled = pack_scaled_linear(*quantize_weight(weight, format), format=format)
        x = torch.ones(min(count, 128), 4096, dtype=DTYPE, device=DEVICE)
        rows = quantize_input(scaled, x)
        parts = (rows.codes, rows.scales, scaled.codes, scaled.scales)
        try:
            operation(kind)(*parts, out_dtype=DTYPE, tiling=tiling)
        except Exception as error:  # too much shared memory, say: told where it is timed
            print(tiling, str(error)[:200])
    torch.cuda.synchronize()


def build_all(formats: Sequence[str], processes: int = 14) -> None:
    kernels: dict[Any, tuple[str, str, int, Any]] = {}
    for format in formats:
        for kind, count in TUNED:
            for tiling in cuts_of(kind, format, count):
                cut = tuple(v for k, v in asdict(tiling).items() if k != "programs")
                kernels.setdefault((format, kind, count, cut), (format, kind, count, tiling))
    jobs = list(kernels.values())
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=build, args=(jobs[i::processes],)) for i in range(processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def tune(
    layer: Layer, formats: Sequence[str], report: Report, deadline: float, replays: int
) -> Best:
    """The best cut of each product, by time; on the codes alone."""
    best: Best = {}
    for format in formats:
        copies = layer.in_format(format)
        for kind, count in TUNED:
            x = layer.input(count)
            truth = truth_of(copies[0], x)
            rows = quantize_input(copies[0], x)
            timed = []
            for tiling in cuts_of(kind, format, count):
                if time.perf_counter() > deadline:
                    break
                calls = [
                    partial(operation(kind), rows.codes, rows.scales, one.codes, one.scales, None,
                            out_dtype=DTYPE, tiling=tiling)
                    for one in copies
                ]  # fmt: skip
                record = run_case(
                    layer, count, format, calls, truth, replays,
                    mode="tune", implementation=kind, tiling=asdict(tiling),
                )  # fmt: skip
                report.add(record)
                if "us" in record:
                    timed.append((record["us"]["median"], record["TFLOPs"], tiling))
            timed.sort(key=lambda pair: pair[0])
            for us, tflops, tiling in timed[:3]:
                cut = " ".join(f"{v}" for v in asdict(tiling).values())
                report.say(
                    f"tune {format:10} {layer.name:8} {kind} T={count:<4} {us:8.2f} us"
                    f" {copies[0].codes.nbytes / us / 1e6:5.2f} TB/s {tflops:7.1f} TFLOP/s  {cut}"
                )
            if timed:
                best[format, layer.name, count, kind] = timed[0][2]
            del truth
    return best


def quantize(rows: Sequence[int], formats: Sequence[str], report: Report, replays: int) -> None:
    """Quantisation alone, behind a norm, behind a gate; beside norm and gate alone."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    norm = RowNorm(torch.ones(4096, dtype=DTYPE, device=DEVICE), 1e-5)
    for count in rows:
        copies = max(2, min(16, 4 * L2_BYTES // (count * 28672 * 2)))
        shape = (count, 28672)
        wide = [
            torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE) for _ in range(copies)
        ]
        hidden = [w[:, :4096].contiguous() for w in wide]
        residual = torch.zeros_like(hidden[0])
        plain = {
            "add, norm": [
                partial(add_rms_norm_, h, residual, norm.weight, norm.eps) for h in hidden
            ],
            "gate": [partial(silu_and_mul, w) for w in wide],
        }
        parts = [f"{n} {time_graph(c, replays).median:7.2f}" for n, c in plain.items()]
        report.say(f"quantize T={count:<4} ops alone: " + ", ".join(parts) + " us")
        for format in formats:
            small, large = (
                pack_scaled_linear(
                    *quantize_weight(torch.ones(16, k, dtype=DTYPE, device=DEVICE), format),
                    format=format,
                )
                for k in (4096, 14336)
            )
            calls: dict[str, list[Callable[[], object]]] = {
                "4096": [partial(quantize_input, small, h) for h in hidden],
                "14336": [partial(quantize_input, large, w[:, :14336]) for w in wide],
                "add, norm, 4096": [
                    partial(quantize_input, small, h, norm=norm, residual=residual) for h in hidden
                ],
                "gate, 14336": [partial(quantize_input, large, w, activation="silu") for w in wide],
            }
            parts = []
            for name, turns in calls.items():
                timing = time_graph(turns, replays)
                parts.append(f"{name} {timing.median:7.2f}")
                report.add(
                    {
                        "case": f"quantize {format} {name}, {count} rows",
                        "status": "ok",
                        "rows": count,
                        "format": format,
                        "mode": "quantize",
                        "us": {k: round(v, 3) for k, v in asdict(timing).items()},
                    }
                )
            report.say(f"quantize T={count:<4} {format:10} " + ", ".join(parts) + " us")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for mode in ("--compare", "--quantize", "--tune"):
        parser.add_argument(mode, action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--out", default=None)
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--limit-seconds", type=float, default=100.0)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: this experiment needs a CUDA device", file=sys.stderr)
        return 2
    began = time.perf_counter()
    wanted = [text for text in options.only.split(",") if text]
    names = [n for n in LAYERS if not wanted or n in wanted]
    rows = [int(n) for n in options.rows.split(",")]
    formats = options.formats.split(",")
    report = Report(options.out, machine())
    print(report.host, flush=True)
    if options.quantize:
        quantize(rows, formats, report, options.replays)
    # Scales of one checkpoint's layer are multiplied by the kernel of one an output.
    tuned = [format for format in formats if format != "fp8_tensor"]
    if options.tune:
        build_all(tuned)
        print(f"built after {time.perf_counter() - began:.1f} s", flush=True)
    best: Best = {}
    for index, name in enumerate(names):
        layer = make_layer(name)
        if options.tune:
            left = began + options.limit_seconds - time.perf_counter()
            deadline = time.perf_counter() + left / (len(names) - index)
            best |= tune(layer, tuned, report, deadline, max(5, options.replays // 4))
        if options.compare or not (options.quantize or options.tune):
            compare(layer, rows, formats, best, report, options.replays)
        del layer
        torch.cuda.empty_cache()
        print(f"{name}: after {time.perf_counter() - began:.1f} s", flush=True)
    return int(not report.is_right)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main(sys.argv[1:]))
