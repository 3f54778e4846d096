"""Check, then time, products with weights of 4 and 8 bits: ``python -m experiments.gpu_quantized``.

The four products of a layer of Llama-3.1-8B for 1 to 512 rows: cuBLAS in bf16 beside
``kernels.triton.quantized_gemv``, ``quantized_gemm`` and the weight written out, whichever
``kernels.triton.quantized_product`` chooses. Every case is first compared with the product of the
written-out weight in fp32, and is timed only when it is right; timing as in
``experiments.gpu_attention``: a CUDA graph over copies of the weight that exceed the L2 cache
several times. TB/s counts the bytes of codes, scales and zero points.

``--tune`` first tries the kernels in many cuts and prints the fastest of each; what follows then
takes them. The rules are in ``choose_tiling`` of each kernel and in ``quantized_product``.

Options: ``--schemes w4g128,w8``, ``--only TEXT,TEXT`` (layers whose name contains one of these),
``--rows 1,8``, ``--tuned-rows 1,16``, ``--out FILE`` (records are appended), ``--replays N``,
``--limit-seconds S`` (no cut is tried after so long). The exit code is 1 where a case was wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.gpu_attention import DEVICE, L2_BYTES, machine, relative_error, time_graph
from experiments.gpu_linear import BOUND, DTYPE, MODELS, Report, random_weight
from kernels.quantized_linear import QuantizedLinear, dequantized_weight, kernel_of
from kernels.triton.launch import compiled_together
from kernels.triton.quantized_gemm import QuantizedGemmTiling, quantized_gemm
from kernels.triton.quantized_gemv import QuantizedGemvTiling, quantized_gemv
from kernels.triton.quantized_layout import packed_shape
from kernels.triton.quantized_product import KERNELS, multiply, multiply_written_out
from kernels.triton.quantized_split import QuantizedSplitTiling, quantized_split
from techniques.quantization.weights import WeightScheme

LAYERS = {name: shape for name, shape in MODELS["8B"].items() if name != "head"}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
#: Weights that are scaled before they are multiplied are rounded as those of bf16 are.
BOUND_OF_SCALED = 2 * BOUND

#: A kernel, and how it is cut.
Cut = tuple[str, Any]


def gemv_cuts() -> list[Cut]:
    """block_n, pieces of 16 bytes, num_warps."""
    shapes = ((8, 32, 2), (4, 64, 2), (4, 128, 4), (8, 128, 4), (8, 64, 2), (16, 64, 4))
    return [("gemv", QuantizedGemvTiling(*shape)) for shape in shapes]


def split_cuts() -> list[Cut]:
    """block_n, num_warps, num_stages, prefetched."""
    shapes = [(n, w, s, 2) for n in (16, 32) for w in (4, 8) for s in (3, 4)]
    shapes += [(16, 16, 2, 2), (32, 16, 2, 2), (16, 8, 3, 0), (32, 8, 3, 0), (16, 4, 6, 2)]
    shapes += [(64, 4, 3, 2), (64, 8, 2, 2)]
    return [("split", QuantizedSplitTiling(*shape)) for shape in shapes]


def gemm_cuts(rows: int, bits: int) -> list[Cut]:
    """Cuts by shared-out blocks for few rows, by whole tiles for many."""
    found: list[QuantizedGemmTiling] = []
    block_t = max(16, min(128, 1 << (rows - 1).bit_length()))
    if rows <= 16:
        shapes = [(64, 4, 4), (128, 4, 3), (128, 8, 4), (32, 2, 3)]
        for block_n, warps, stages in shapes:
            for programs in (2, 3, 4, 0):
                cut = QuantizedGemmTiling(block_t, block_n, 128, warps, stages, programs)
                found.append(cut)
    elif rows <= 64:
        shapes = [(64, 4, 3), (64, 4, 4), (128, 8, 3), (128, 4, 3), (32, 2, 3)]
        for block_n, warps, stages in shapes:
            for programs in (1, 2, 3, 0):
                cut = QuantizedGemmTiling(block_t, block_n, 128, warps, stages, programs)
                found.append(cut)
        found += [
            QuantizedGemmTiling(block_t, *shape, scales_weights=True)
            for shape in ((128, 128, 8, 3, 1), (128, 128, 8, 3, 2), (128, 128, 8, 3, 0),
                          (64, 128, 4, 3, 2), (64, 128, 4, 3, 3), (64, 128, 4, 3, 0))
        ]  # fmt: skip
    else:
        for block_t, block_n, warps, stages in (
            (64, 128, 8, 3), (64, 256, 8, 3), (128, 64, 4, 3), (128, 128, 8, 3), (128, 128, 8, 4),
            (128, 256, 8, 3), (128, 256, 8, 4), (256, 128, 8, 2), (256, 128, 8, 3),
        ):  # fmt: skip
            if block_t > rows:
                continue
            for programs in (0, 1) if block_n * block_t >= 128 * 128 else (0, 2):
                shape = (block_t, block_n, 128, warps, stages, programs)
                found.append(QuantizedGemmTiling(*shape, scales_weights=True))
    return [("gemm", tiling) for tiling in found]


def cuts(rows: int, bits: int) -> list[Cut]:
    """What may be best for so many rows."""
    found = gemv_cuts() if rows == 1 else []
    found += split_cuts() if rows <= 32 else []
    found += gemm_cuts(rows, bits)
    if rows >= 128:
        found += [("written_out", size << 20) for size in (24, 64, 512)]
    return found


@dataclass(slots=True)
class Layer:
    """Copies of a quantised weight, and inputs of it."""

    name: str
    scheme: WeightScheme
    copies: list[QuantizedLinear]
    truths: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return self.copies[0].num_bytes

    def input(self, rows: int) -> Tensor:
        generator = torch.Generator(DEVICE).manual_seed(rows)
        shape = (rows, self.copies[0].in_features)
        return torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE)

    def truth(self, rows: int) -> Tensor:
        if rows not in self.truths:
            weight = dequantized_weight(self.copies[0], torch.float32)
            self.truths[rows] = self.input(rows).float() @ weight.T
        return self.truths[rows]


def make_layer(name: str, scheme: WeightScheme, copies: int = 0) -> Layer:
    """Random bits are codes of any value. ``copies`` 0: as many as exceed the L2 cache."""
    out_features, in_features = LAYERS[name]
    grid = (scheme.num_groups(in_features), out_features)
    size = out_features * in_features * scheme.bits // 8

    def draw() -> QuantizedLinear:
        shape = packed_shape(out_features, in_features, scheme.bits)
        words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=DEVICE)
        step = 2.0 ** (1 - scheme.bits) * in_features**-0.5
        scales = (torch.rand(grid, device=DEVICE) + 0.5) * step
        scales = scales.to(torch.float32 if grid[0] == 1 else DTYPE)
        zeros = None
        if scheme.has_zeros:
            low = 0 if scheme.bits == 4 else -128
            high = low + (1 << scheme.bits)
            zeros = torch.randint(low, high, grid, dtype=torch.int8, device=DEVICE)
        return QuantizedLinear(
            in_features, out_features, scheme.bits, scheme.group_size, "triton", words, scales,
            zeros, None,
        )  # fmt: skip

    return Layer(name, scheme, [draw() for _ in range(copies or max(2, -(-4 * L2_BYTES // size)))])


def product(layer: QuantizedLinear, cut: Cut | None, x: Tensor) -> Tensor:
    """``x @ weight.T`` by a cut; None: as :func:`kernel_of` and the kernels choose."""
    parts = (layer.packed, layer.scales, layer.zeros, None)
    bits, rows = layer.bits, layer.out_features
    if cut is None:
        return multiply(x, *parts, bits, rows)
    name, how = cut
    if name == "gemv":
        return quantized_gemv(x, *parts, bits=bits, rows=rows, tiling=how)
    if name == "split":
        return quantized_split(x, *parts, bits=bits, rows=rows, tiling=how)
    if name == "gemm":
        return quantized_gemm(x, *parts, bits=bits, rows=rows, tiling=how)
    return multiply_written_out(x, *parts, bits=bits, rows=rows, piece_bytes=how)


def describe(cut: Cut | None) -> str:
    if cut is None:
        return "as chosen"
    name, how = cut
    if name == "gemv":
        return f"gemv {how.block_n}x{how.block_q} w{how.num_warps}"
    if name == "split":
        return f"split {how.block_n} w{how.num_warps} s{how.num_stages} f{how.prefetched}"
    if name == "gemm":
        scaled = " scaled" if how.scales_weights else ""
        shape = f"{how.block_t}x{how.block_n}x{how.block_k}"
        cut = f"gemm {shape} w{how.num_warps} s{how.num_stages} p{how.programs}"
        return f"{cut} f{how.prefetched}{scaled}"
    return f"written_out {how >> 20} MiB"


def run_case(
    layer: Layer, rows: int, cut: Cut | None, replays: int, **facts: Any
) -> dict[str, Any]:
    """Check a product and time it; a wrong one is a record without a time."""
    x, truth = layer.input(rows), layer.truth(rows)
    poison = torch.full_like(truth, float("nan"), dtype=DTYPE)
    del poison  # what the op allocates next holds NaN
    error = max(relative_error(product(layer.copies[0], cut, x), truth) for _ in range(2))
    kernel = kernel_of(layer.copies[0], rows, DTYPE) if cut is None else cut[0]
    bound = BOUND if kernel == "gemv" else BOUND_OF_SCALED
    record: dict[str, Any] = {
        "case": f"{layer.scheme.name} {layer.name}, {rows} rows",
        "status": "ok" if error <= bound else "FAILED",
        "error": error,
        "bound": bound,
        "rows": rows,
        "out_features": layer.copies[0].out_features,
        "in_features": layer.copies[0].in_features,
        "scheme": layer.scheme.name,
        "dtype": "bfloat16",
        "kernel": kernel,
        "cut": describe(cut),
        "num_bytes": layer.num_bytes,
        **facts,
    }
    if record["status"] == "ok":
        timing = time_graph([partial(product, one, cut, x) for one in layer.copies], replays)
        record["us"] = {k: round(v, 3) for k, v in asdict(timing).items()}
        record["TBps"] = round(layer.num_bytes / timing.median / 1e6, 4)
    return record


def dense_case(name: str, rows: int, replays: int) -> dict[str, Any]:
    """The product with the weight in bf16, by cuBLAS."""
    out_features, in_features = LAYERS[name]
    num_bytes = 2 * out_features * in_features
    weights = [
        random_weight(out_features, in_features)
        for _ in range(max(2, -(-4 * L2_BYTES // num_bytes)))
    ]
    x = torch.randn(rows, in_features, device=DEVICE).to(DTYPE)
    timing = time_graph([partial(F.linear, x, w) for w in weights], replays)
    return {
        "case": f"bf16 {name}, {rows} rows", "status": "ok", "rows": rows, "mode": "compare",
        "implementation": "cublas", "out_features": out_features, "in_features": in_features,
        "dtype": "bfloat16", "num_bytes": num_bytes,
        "us": {k: round(v, 3) for k, v in asdict(timing).items()},
        "TBps": round(num_bytes / timing.median / 1e6, 4),
    }  # fmt: skip


Best = dict[tuple[str, str, int], Cut]


def compile_all(names: Sequence[str], schemes: Sequence[WeightScheme], rows: Sequence[int]) -> None:
    """Every cut, for all layers: their kernels are the same where their columns are as many."""
    with compiled_together():
        for scheme in schemes:
            for name in names:
                layer = make_layer(name, scheme, copies=1)
                for count in rows:
                    x = layer.input(count)
                    for cut in cuts(count, scheme.bits):
                        if cut[0] != "written_out":
                            product(layer.copies[0], cut, x)


def tune(layer: Layer, rows: Sequence[int], report: Report, deadline: float, replays: int) -> Best:
    """The fastest cut for each number of rows."""
    best: Best = {}
    for count in rows:
        tried = cuts(count, layer.scheme.bits)
        timed: list[tuple[float, Cut]] = []
        for cut in tried:
            if time.perf_counter() > deadline:
                break
            facts = {"mode": "tune", "implementation": cut[0]}
            try:
                record = run_case(layer, count, cut, replays, **facts)
            except Exception as error:  # what the card has no room for
                record = {"case": layer.name, "status": "unsupported", "reason": str(error)[:200]}
                record |= {"cut": describe(cut), **facts}
                torch.cuda.synchronize()
            report.add(record)
            if "us" in record:
                timed.append((record["us"]["median"], cut))
        timed.sort(key=lambda pair: pair[0])
        label = f"tune {layer.scheme.name:7} {layer.name:7} T={count:<3}"
        for kernel in KERNELS:
            some = [(us, cut) for us, cut in timed if cut[0] == kernel]
            if some:
                shown = "; ".join(f"{us:.2f} {describe(cut)}" for us, cut in some[:4])
                report.say(f"{label} {shown}  ({len(some)} of {len(tried)} tried)")
        if timed:
            best[layer.scheme.name, layer.name, count] = timed[0][1]
    return best


Times = dict[tuple[str, str, int], dict[str, Any]]


def summarise(dense: Times, times: Times, schemes: Sequence[str], report: Report) -> None:
    """A row for each layer and number of rows, then the sums over the layers."""
    names = list(dict.fromkeys(name for _, name, _ in dense))
    counts = list(dict.fromkeys(count for _, _, count in dense))
    for name in [*names, "sum"]:
        for count in counts:
            some = [name] if name != "sum" else names
            before = sum(dense["bf16", n, count]["us"]["median"] for n in some)
            row = f"{name:8} T={count:<3} cuBLAS {before:8.2f} us"
            for scheme in schemes:
                found = [times[scheme, n, count] for n in some]
                if not all("us" in record for record in found):
                    row += f"  {scheme} WRONG"
                    continue
                us = sum(record["us"]["median"] for record in found)
                size = sum(record["num_bytes"] for record in found)
                kinds = "/".join(dict.fromkeys(record["kernel"] for record in found))
                row += f"  {scheme} {us:8.2f} us {size / us / 1e6:5.2f} TB/s {before / us:5.2f}x"
                row += f" {kinds}"
            report.say(row)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tuned-rows", default="1,16,32,64,128,512")
    parser.add_argument("--schemes", default="w4g128,w8")
    parser.add_argument("--only", default="")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--out", default=None)
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--limit-seconds", type=float, default=150.0)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: this experiment needs a CUDA device", file=sys.stderr)
        return 2
    began = time.perf_counter()
    wanted = [text for text in options.only.split(",") if text]
    names = [n for n in LAYERS if not wanted or any(text in n for text in wanted)]
    counts = sorted(int(n) for n in options.rows.split(","))
    tuned = sorted(int(n) for n in options.tuned_rows.split(","))
    schemes = [WeightScheme.parse(name) for name in options.schemes.split(",")]
    report = Report(options.out, machine())
    print(report.host, flush=True)
    dense = {("bf16", n, c): dense_case(n, c, options.replays) for n in names for c in counts}
    for record in dense.values():
        report.add(record)
    if options.tune:
        compile_all(names, schemes, tuned)
        print(f"compiled after {time.perf_counter() - began:.1f} s", flush=True)
    times: Times = {}
    num_left = len(schemes) * len(names)
    for scheme in schemes:
        for name in names:
            layer = make_layer(name, scheme)
            best: Best = {}
            if options.tune:
                left = began + options.limit_seconds - time.perf_counter()
                deadline = time.perf_counter() + left / num_left
                best = tune(layer, tuned, report, deadline, max(5, options.replays // 3))
            num_left -= 1
            for count in counts:
                # What was the best for as many rows, or for the next greater number that was tried.
                near = next((n for n in tuned if n >= count), None)
                cut = best.get((scheme.name, name, near or 0))
                record = run_case(layer, count, cut, options.replays, mode="compare")
                report.add(record)
                times[scheme.name, name, count] = record
            del layer
            torch.cuda.empty_cache()
            print(f"{scheme.name} {name}: {time.perf_counter() - began:.1f} s", flush=True)
    report.summary.append("")
    summarise(dense, times, [scheme.name for scheme in schemes], report)
    return int(not report.is_right)


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main(sys.argv[1:]))
