"""Quantised weights on a CUDA device: every kernel's products, graphs, and engines.

python -m pytest tests/gpu/test_quantized_cuda.py     # checks
PYTHONPATH=. python tests/gpu/test_quantized_cuda.py  # the same, where there is no pytest
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.norm import RowNorm, rms_norm_reference
from kernels.quantized_linear import (
    QuantizedLinear,
    apply_quantized_linear,
    apply_quantized_row,
    dequantized_weight,
    kernel_of,
    pack_quantized_linear,
)
from kernels.triton import quantized_split
from kernels.triton.launch import compiled_together
from kernels.triton.quantized_gemm import quantized_gemm
from kernels.triton.quantized_gemv import MAX_ROWS, quantized_gemv
from kernels.triton.quantized_product import multiply_written_out
from tests.helpers.gpu_checks import run_as_program, run_under_pytest
from tests.helpers.tiny_models import tiny_model
from workbench.assemble import Limits, build_engine
from workbench.configuration import compose_config, engine_config
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine

HALF = torch.bfloat16
#: Bits, inputs of a group (0: all), zero points.
GRIDS = (
    (4, 128, False), (4, 128, True), (4, 64, True), (4, 32, True), (4, 256, False), (4, 0, True),
    (8, 0, False), (8, 0, True), (8, 128, True), (8, 32, False),
)  # fmt: skip
SMALL, LARGE = ((96, 256), (1000, 768)), ((4096, 4096), (48, 14336))
#: One rounding of the output; weights are rounded as well where they are scaled first.
BOUND = 6e-3
FAST = ("continuous_batching", "paged_attention", "triton_attention", "cuda_graphs",
        "fused_kernels", "overlap")  # fmt: skip


def draw(
    bits: int,
    group: int,
    has_zeros: bool,
    shape: tuple[int, int],
    dtype: torch.dtype = HALF,
    has_bias: bool = False,
    act_order: bool = False,
) -> tuple[QuantizedLinear, Tensor, Tensor | None]:
    """A layer of codes over their whole range, its values in fp64, and its bias."""
    generator = torch.Generator("cuda").manual_seed(sum(shape) + bits + group)
    options = {"generator": generator, "device": "cuda"}
    rows, columns = shape
    low = 0 if has_zeros else -(1 << (bits - 1))
    codes = torch.randint(low, low + (1 << bits), shape, **options)
    grid = (rows, columns // group if group else 1)
    scales = ((torch.rand(grid, **options) + 0.5) * columns**-0.5).to(dtype).float()
    zeros = torch.randint(0, 1 << bits, grid, **options) if has_zeros else None
    bias = torch.randn(rows, **options).to(dtype) if has_bias else None
    index = torch.arange(columns, device="cuda") // (columns // grid[1])
    if act_order:
        index = index[torch.randperm(columns, **options)]
    layer = pack_quantized_linear(
        codes, scales, zeros, bias, bits=bits, dtype=dtype, group_index=index if act_order else None
    )
    assert layer.implementation == "triton"
    values = codes.double()
    if zeros is not None:
        values -= zeros.double()[:, index]
    return layer, values * scales.double()[:, index], bias


def inputs(rows: int, columns: int, dtype: torch.dtype = HALF) -> Tensor:
    """Rows that lie apart, inside a tensor of NaN; of fp32 what bf16 can say."""
    generator = torch.Generator("cuda").manual_seed(rows)
    wide = torch.full((rows, columns + 24), float("nan"), dtype=dtype, device="cuda")
    view = wide[:, 8 : 8 + columns]
    new = torch.randn(rows, columns, generator=generator, device="cuda").to(HALF)
    return view.copy_(new)


def compare(found: Tensor, wanted: Tensor, what: object, bound: float = BOUND) -> None:
    assert found.shape == wanted.shape, (what, found.shape)
    error = float((found.double() - wanted).norm() / wanted.norm())
    assert error < bound, (what, error)


def poison(*shape: int, dtype: torch.dtype = HALF) -> None:
    """What is allocated next, of this size, holds NaN."""
    torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def products(
    shape: tuple[int, int],
    grid: tuple[int, int, bool],
    row_counts: Sequence[int],
    has_run: bool = True,
) -> None:
    """Launch every kernel, and compare what it gives where it has run."""
    layer, values, bias = draw(*grid, shape, has_bias=grid[2])
    parts = (layer.packed, layer.scales, layer.zeros, layer.bias)
    facts = {"bits": layer.bits, "rows": layer.out_features}
    compare(dequantized_weight(layer, torch.float32), values, (shape, grid), 1e-6)
    for rows in row_counts:
        x = inputs(rows, shape[1])
        wanted = x.double() @ values.T
        wanted = wanted if bias is None else wanted + bias.double()
        kernels = [quantized_gemm, multiply_written_out]
        kernels += [quantized_gemv] * (rows <= MAX_ROWS)
        is_few = rows <= quantized_split.MAX_ROWS
        kernels += [quantized_split.quantized_split] * is_few
        for kernel in kernels:
            poison(rows, shape[0])
            found = kernel(x, *parts, **facts)
            if has_run:
                compare(found, wanted, (kernel.__name__, shape, grid, rows))


def check_products() -> None:
    few, many = (1, 2, 5, 17, 100), (1, 2, 3, 5, 16, 17, 64, 65, 129, 256, 600)
    cases = [*itertools.product(SMALL, GRIDS, [few]), *itertools.product(LARGE, GRIDS[::6], [many])]
    with compiled_together():
        for case in cases:
            products(*case, has_run=False)
    for case in cases:
        products(*case)


def check_other_dtypes() -> None:
    for dtype in (torch.float16, torch.float32):
        for grid in ((4, 128, True), (4, 32, False), (8, 0, False)):
            layer, values, bias = draw(*grid, (520, 1024), dtype=dtype, has_bias=True)
            assert bias is not None
            for rows in (1, 4, 33, 200):
                x = inputs(rows, 1024, dtype)
                found = apply_quantized_linear(layer, x)
                assert found.dtype == dtype
                compare(found, x.double() @ values.T + bias.double(), (dtype, grid, rows))


def check_no_rows_and_act_order() -> None:
    layer, values, _ = draw(4, 128, True, (96, 512), act_order=True)
    assert layer.input_order is not None
    compare(dequantized_weight(layer, torch.float32), values, "act-order", 1e-6)
    for rows in (0, 1, 7, 70, 2000):
        x = inputs(rows, 512)
        found = apply_quantized_linear(layer, x)
        if rows:
            compare(found, x.double() @ values.T, rows)
        assert found.shape == (rows, 96)


def check_what_stands_beside_a_product() -> None:
    for grid in ((4, 128, False), (8, 0, False)):
        layer, values, _ = draw(*grid, (1024, 1024))
        for rows in (1, 4, 40, 64):
            x = inputs(rows, 1024)
            gates, rest = (x.double() @ values.T).chunk(2, dim=1)
            found = apply_quantized_linear(layer, x, "silu")
            compare(found, torch.nn.functional.silu(gates) * rest, (grid, rows), 2 * BOUND)
        x, weight = inputs(1, 1024), torch.rand(1024, device="cuda").to(HALF) + 0.5
        normed = rms_norm_reference(x, weight, 1e-5).double() @ values.T
        compare(apply_quantized_row(layer, x, norm=RowNorm(weight, 1e-5)), normed, grid)
        residual = torch.ones(1, 1024, dtype=HALF, device="cuda")
        apply_quantized_row(layer, x, residual=residual)
        compare(residual, x.double() @ values.T + 1, grid)


def check_a_replay_is_the_products_bit_for_bit() -> None:
    """A chain of launches that overlap, in each kernel: what is read too early differs."""
    up, _, _ = draw(4, 128, False, (4096, 1024))
    down, _, _ = draw(8, 0, False, (1024, 4096))
    for rows in (1, 4, 16, 64, 200, 1500):
        x = inputs(rows, 1024).contiguous()

        def chain(x: Tensor) -> Tensor:
            for _ in range(4):
                hidden = apply_quantized_linear(up, x)
                x = apply_quantized_linear(down, torch.tanh(hidden))
            return x

        eager = chain(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = chain(x)
        for _ in range(3):
            replayed.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(eager, replayed), (rows, kernel_of(up, rows, HALF))


def engine_of(platform: str, scheme: str, *techniques: str) -> Engine:
    names = ",".join((*techniques, "int4_weights"))
    settings = [
        f"model={tiny_model('llama')}", "dtype=bfloat16", f"engine/platform={platform}",
        f"+technique=[{names}]", f"engine.linear.scheme={scheme}",
    ]  # fmt: skip
    limits = Limits(max_num_seqs=8, max_model_len=128, kv_pool_tokens=1024)
    return build_engine(engine_config(compose_config(settings), limits, download=False))


def check_engines_say_what_the_cpu_says() -> None:
    """Log-probabilities of each request's tokens, up to one that falls the other way."""
    rng = random.Random(0)
    prompts = [[rng.randrange(100) for _ in range(rng.randint(1, 40))] for _ in range(7)]
    params = [SamplingParams(max_tokens=4 + 3 * n, ignore_eos=True, logprobs=0) for n in range(7)]
    for scheme in ("w4g32z", "w8"):
        said = []
        for platform, techniques in (("cpu", FAST[:2]), ("cuda", FAST)):
            engine = engine_of(platform, scheme, *techniques)
            outputs = engine.generate(prompts, params)
            said.append([[(e.token_id, e.logprob) for e in o.outputs[0].logprobs] for o in outputs])
            counts = engine.counters()
            assert counts["linear.quantized_layers"] == 9, counts
        assert counts["linear.gemv_calls"] > 0 and counts["linear.gemm_calls"] > 0
        assert counts["linear.native_calls"] == counts["linear.reference_calls"] == 0
        compared = 0
        for some, others in zip(*said, strict=True):
            for (token, a), (other, b) in zip(some, others, strict=True):
                assert abs(a - b) < 0.1, (scheme, some, others)
                compared += 1
                if token != other:
                    break
        assert compared > 20, f"{compared} tokens stand on the same context"


def check_graphs_say_what_launches_say() -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(100) for _ in range(rng.randint(1, 40))] for _ in range(6)]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    without = tuple(name for name in FAST if name not in ("cuda_graphs", "overlap"))
    for scheme in ("w4g32z", "w8"):
        said = [
            [o.token_ids for o in engine_of("cuda", scheme, *names).generate(prompts, params)]
            for names in (FAST, without)
        ]
        same = sum(a == b for a, b in zip(*said, strict=True))
        assert same >= 5, (scheme, said)


CHECKS = {
    "products": check_products,
    "other dtypes": check_other_dtypes,
    "no rows, act-order": check_no_rows_and_act_order,
    "what stands beside a product": check_what_stands_beside_a_product,
    "a replay is the products": check_a_replay_is_the_products_bit_for_bit,
    "engines say what the CPU says": check_engines_say_what_the_cpu_says,
    "graphs say what launches say": check_graphs_say_what_launches_say,
}


def test_quantised_weights_on_a_cuda_device() -> None:
    run_under_pytest(CHECKS)


if __name__ == "__main__":
    with torch.inference_mode():
        raise SystemExit(run_as_program(CHECKS))
