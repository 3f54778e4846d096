"""Products in 8 bits on a CUDA device: the reference's values, in graphs, without a wait.

python -m pytest tests/gpu/test_scaled_cuda.py     # checks
PYTHONPATH=. python tests/gpu/test_scaled_cuda.py  # the same, where there is no pytest
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch

from kernels.norm import RowNorm
from kernels.scaled_linear import (
    FORMATS,
    QuantizedRows,
    ScaledLinear,
    apply_scaled_linear,
    cublas_limit,
    pack_scaled_linear,
    quantize_input,
    quantize_rows_reference,
    quantize_weight,
    unsupported_reason,
)
from kernels.triton.launch import compiled_together
from kernels.triton.scaled_skinny import MAX_ROWS
from tests.helpers.engines import mixed_prompts, tiny_engine
from tests.helpers.gpu_checks import run_as_program, run_under_pytest
from tests.helpers.tiny_models import tiny_model
from workbench.core.sampling import SamplingParams

SHAPES = ((6144, 4096), (4096, 4096), (4096, 14336), (576, 1536), (100, 200))
ROWS = (1, 3, 16, 17, 64, 100, 128, 129, 500, 1024)
Products: TypeAlias = dict[str, torch.Tensor]
#: One rounding to bf16, and sums of fp8 in fewer bits than fp32 has.
BOUND = 6e-3


def formats() -> list[str]:
    device = torch.device("cuda", torch.cuda.current_device())
    return [f for f in FORMATS if unsupported_reason(f, device) is None]


def make_layer(format: str, out_features: int, in_features: int, **options: object) -> ScaledLinear:
    generator = torch.Generator("cuda").manual_seed(out_features)
    weight = torch.randn(out_features, in_features, generator=generator, device="cuda")
    weight = (weight / in_features**0.5).bfloat16()
    return pack_scaled_linear(*quantize_weight(weight, format), format=format, **options)  # type: ignore[arg-type]


def inputs(num_rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(num_rows)
    return torch.randn(num_rows, width, generator=generator, device="cuda").to(dtype)


def truth_of(layer: ScaledLinear, x: torch.Tensor) -> torch.Tensor:
    rows = quantize_rows_reference(x, layer.codes.dtype, layer.group_size, layer.input_scale)
    return apply_scaled_linear(layer, QuantizedRows(*rows, torch.float32), "reference")


def relative_error(out: torch.Tensor, truth: torch.Tensor) -> float:
    return float((out.double() - truth.double()).norm() / truth.double().norm())


def check_rows_get_the_bits_of_the_reference() -> None:
    for format in formats():
        layer = make_layer(format, 16, 4096)
        for num_rows in (1, 33, 500):
            x = inputs(num_rows, 4096)
            found = quantize_input(layer, x)
            codes, scales = quantize_rows_reference(x, layer.codes.dtype, layer.group_size)
            assert torch.equal(found.scales, scales), format
            assert torch.equal(found.codes.float(), codes.float()), format


def products(format: str, shape: tuple[int, int]) -> Iterator[tuple[int, torch.Tensor, Products]]:
    """Rows, what they give by the reference, and by every product that takes them."""
    layer = make_layer(format, *shape)
    for num_rows in ROWS:
        x = inputs(num_rows, shape[1])
        names: list[str | None] = [None, "triton"]
        if num_rows <= MAX_ROWS:
            names.append("skinny")
        if cublas_limit(layer, num_rows, x.dtype) is None:
            names.append("cublas")
        found = {str(name): apply_scaled_linear(layer, x, name) for name in names}
        yield num_rows, truth_of(layer, x), found


def check_products_equal_the_reference() -> None:
    cases = [(format, shape) for format in formats() for shape in SHAPES]
    with compiled_together():
        for case in cases:
            for _ in products(*case):
                pass
    for format, shape in cases:
        for num_rows, truth, found in products(format, shape):
            for name, out in found.items():
                error = relative_error(out, truth)
                assert error < BOUND, f"{format} {shape} {num_rows} rows, {name}: {error}"


def check_static_scales() -> None:
    if "fp8_tensor" not in formats():
        return
    scale = torch.tensor([0.01], device="cuda")
    layer = make_layer("fp8_tensor", 512, 1024, input_scale=scale)
    for num_rows in (1, 40, 300):
        x = inputs(num_rows, 1024)
        for name in (None, "triton", "cublas"):
            assert relative_error(apply_scaled_linear(layer, x, name), truth_of(layer, x)) < BOUND


def check_graphs_give_what_launches_give_without_waiting() -> None:
    for format in formats():
        layer, down = make_layer(format, 2048, 1024), make_layer(format, 512, 1024)
        norm = RowNorm(torch.ones(1024, device="cuda", dtype=torch.bfloat16), 1e-5)
        for num_rows in (1, 24, 300):
            x, residual = inputs(num_rows, 1024), inputs(num_rows, 1024)

            def step(
                x: torch.Tensor = x, residual: torch.Tensor = residual,
                layer: ScaledLinear = layer, down: ScaledLinear = down, norm: RowNorm = norm,
            ) -> torch.Tensor:  # fmt: skip
                rows = quantize_input(layer, x, norm=norm, residual=residual)
                wide = apply_scaled_linear(layer, rows)
                rows = quantize_input(down, wide, activation="silu")
                return apply_scaled_linear(down, rows)

            kept = residual.clone()
            expected = step()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                residual.copy_(kept)
                again = step()
                residual.copy_(kept)
                graph = torch.cuda.CUDAGraph()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            with torch.cuda.graph(graph):
                captured = step()
            for _ in range(2):
                captured.fill_(float("nan"))
                residual.copy_(kept)
                graph.replay()
                torch.cuda.synchronize()
                assert torch.equal(captured, expected) and torch.equal(again, expected), format


def check_engines_run_it_in_graphs() -> None:
    """Tokens of the eager engine; norms and gates round their own outputs."""
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    prompts = mixed_prompts(6, longest=40)
    names = ("continuous_batching", "paged_attention", "triton_attention", "cuda_graphs",
             "fused_kernels")  # fmt: skip
    model = tiny_model("llama", hidden_size=256, intermediate_size=512, num_attention_heads=4)
    for format in formats():
        chosen = ("engine/linear=scaled", f"engine.linear.format={format}",
                  "engine/platform=cuda", "dtype=bfloat16")  # fmt: skip
        eager = tiny_engine(*chosen, model=model)
        graphs = tiny_engine(*chosen, model=model, techniques=names)
        wanted = [o.token_ids for o in eager.generate(prompts, params)]
        found = [o.token_ids for o in graphs.generate(prompts, params)]
        counts = graphs.counters()
        assert counts["linear.joined_inputs"] > 0 and counts["graph_runner.replays"] > 0, format
        assert counts["linear.skinny_calls"] > 0 and counts["linear.reference_calls"] == 0, format
        same = [
            a == b for x, y in zip(wanted, found, strict=True) for a, b in zip(x, y, strict=True)
        ]
        # Near ties fall another way: codes of values that differ in the last bit differ in more.
        assert sum(same) > 0.5 * len(same), f"{format}: {sum(same)} of {len(same)} tokens"


CHECKS = {
    "rows get the bits of the reference": check_rows_get_the_bits_of_the_reference,
    "products equal the reference": check_products_equal_the_reference,
    "static scales": check_static_scales,
    "graphs give what launches give": check_graphs_give_what_launches_give_without_waiting,
    "engines run it in graphs": check_engines_run_it_in_graphs,
}


def test_scaled_products_on_a_cuda_device() -> None:
    run_under_pytest(CHECKS)


if __name__ == "__main__":
    raise SystemExit(run_as_program(CHECKS))
