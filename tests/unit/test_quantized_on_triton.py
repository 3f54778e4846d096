"""Slot ``linear`` with quantised weights on Triton's kernels: on a GPU, or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from kernels import quantized_linear
from kernels.quantized_linear import (
    apply_quantized_linear,
    apply_quantized_row,
    dequantized_weight,
    pack_quantized_linear,
)
from kernels.triton import HAS_TRITON, is_interpreted
from techniques.quantization import PackedCheckpoint, WeightOnly
from techniques.quantization import linear as weight_only
from tests.helpers.engines import mixed_prompts, tiny_engine
from tests.helpers.interpreted import (
    DEVICE,
    HAS_GPU,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)
from tests.helpers.tiny_models import tiny_model
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


def engine(*settings: str, family: str = "llama") -> Engine:
    return tiny_engine(
        f"engine/platform={DEVICE.type}",
        "engine/scheduler=continuous",
        "engine/linear=weight_only",
        *(f"engine.linear.{text}" for text in settings),
        model=tiny_model(family),
    )


def run(built: Engine) -> tuple[list[list[tuple[int, float]]], dict[str, float]]:
    """Each request's tokens with their log-probabilities, and counters."""
    # Of different lengths, so that one request is left.
    sampling = [SamplingParams(max_tokens=n, ignore_eos=True, logprobs=0) for n in (2, 2, 5)]
    outputs = built.generate(mixed_prompts(3, longest=8), sampling)
    found = [o.outputs[0].logprobs or [] for o in outputs]
    return [[(e.token_id, e.logprob) for e in some] for some in found], built.counters()


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])  # some heads are tied
@pytest.mark.parametrize(
    "settings", [("scheme=w4g32z", "layers=['lm_head:w8']"), ("scheme=w8",), ("scheme=w4g32",)]
)
def test_an_engine_says_what_the_reference_products_say(
    settings: tuple[str, ...], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, counts = run(engine(*settings, family=family))
    assert counts["linear.gemv_calls"] > 0 and counts["linear.gemm_calls"] > 0
    assert counts["linear.fused_calls"] > 0
    assert counts["linear.native_calls"] == counts["linear.reference_calls"] == 0
    monkeypatch.setattr(quantized_linear, "triton_limit", lambda *_: "not here")
    monkeypatch.setattr(weight_only, "kernel_limit", lambda *_: None)
    wanted, plain = run(engine(*settings, family=family))
    assert plain["linear.reference_calls"] > 0 and plain["linear.gemv_calls"] == 0
    assert plain["linear.fused_calls"] == 0
    # Rows of x are rounded to bf16 on their way in: a near tie may fall the other way.
    for some, others in zip(found, wanted, strict=True):
        for (token, a), (other, b) in zip(some, others, strict=True):
            assert abs(a - b) < 0.03, (some, others)
            if token != other:
                break  # what follows has another context


@needs_kernels
def test_layers_left_dense_stand_beside_others() -> None:
    settings = ("scheme=w8", "layers=['*.gate_up_proj:dense','lm_head:dense']")
    found, counts = run(engine(*settings))
    assert counts["linear.dense_layers"] == 1 + 2
    assert counts["linear.fused_calls"] > 0
    assert all(-20 < value <= 0 for some in found for _, value in some)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_inputs_in_the_order_of_their_groups(bits: int, rows: int) -> None:
    """Act-order: the product is that of the weight whose columns lie as the model has them."""
    generator = torch.Generator().manual_seed(bits)
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (48, 256), generator=generator).to(DEVICE)
    scales = (torch.rand(48, 4, generator=generator) + 0.5).bfloat16().float().to(DEVICE)
    index = torch.randperm(256, generator=generator).to(DEVICE) % 4
    layer = pack_quantized_linear(codes, scales, bits=bits, dtype=torch.float32, group_index=index)
    assert layer.implementation == "triton"
    values = codes.double() * scales.double()[:, index]
    torch.testing.assert_close(dequantized_weight(layer, torch.float32).double(), values)
    x = torch.randn(rows, 256, generator=generator).bfloat16().float().to(DEVICE)
    wanted = x.double() @ values.T
    torch.testing.assert_close(
        apply_quantized_linear(layer, x).double(), wanted, rtol=1e-4, atol=1e-3 * 2**bits
    )
    if rows == 1:
        residual = torch.ones(1, 48, device=DEVICE)
        apply_quantized_row(layer, x, residual=residual)
        torch.testing.assert_close(residual.double(), wanted + 1, rtol=1e-4, atol=1e-3 * 2**bits)
    with pytest.raises(ValueError, match="must have as many"):
        pack_quantized_linear(
            codes, scales, bits=bits, dtype=torch.float32, group_index=index.clamp(max=2)
        )


def test_which_kernel_takes_a_product_follows_from_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product = pytest.importorskip("kernels.triton.quantized_product")

    many, small = product.LEAST_WRITTEN_OUT_ROWS, product.MOST_GEMV_VALUES

    def kernels(num_values: int, dtype: torch.dtype) -> list[str]:
        rows = (1, 2, many - 1, many)
        return [product.kernel_for(n, num_values, dtype) for n in rows]

    half = torch.bfloat16
    assert kernels(small, half) == ["gemv", "gemm", "gemm", "written_out"]
    assert kernels(small + 1, half) == ["gemm", "gemm", "gemm", "written_out"]
    assert kernels(small, torch.float32) == ["gemv", "gemm", "gemm", "gemm"]
    monkeypatch.setattr(product, "MOST_SPLIT_ROWS", 2)
    assert kernels(small, half) == ["split", "split", "gemm", "written_out"]


@needs_kernels
def test_groups_that_the_kernels_lack_are_refused_with_the_layer() -> None:
    with pytest.raises(ConfigError, match="lm_head cannot be served in scheme w4g16 here: groups"):
        engine("scheme=w4g16")


@pytest.mark.parametrize("method", [WeightOnly, PackedCheckpoint])
def test_reasons_name_the_device_and_the_dtype(
    method: type[WeightOnly] | type[PackedCheckpoint],
) -> None:
    def reasons(device: str, dtype: torch.dtype) -> str:
        return "; ".join(method().unsupported_reasons(torch.device(device), dtype))

    if not is_interpreted():
        assert reasons("cpu", torch.float32) == ""
        if HAS_TRITON:
            assert "Triton needs a CUDA device, not mps" in reasons("mps", torch.float32)
    if HAS_GPU:
        assert reasons("cuda", torch.bfloat16) == ""
        assert "float64 is none of" in reasons("cuda", torch.float64)
