"""Technique ``skinny_gemm`` in an engine: the tokens of the engine without it."""

from __future__ import annotations

import pytest
import torch

from kernels.triton import HAS_TRITON, is_interpreted
from techniques.skinny_gemm import SkinnyLinear, SkinnyLinearConfig
from tests.helpers.engines import mixed_prompts, tiny_engine
from tests.helpers.interpreted import (
    HAS_GPU,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)
from tests.helpers.tiny_models import tiny_model
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@needs_kernels
@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])  # some heads are tied
def test_tokens_are_those_of_the_engine_without_it(family: str, is_fused: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = (f"engine/platform={device}", "engine/scheduler=continuous")
    model = tiny_model(family)
    plain = tiny_engine(*options, model=model)
    fused = f"engine.linear.fuse_one_row={str(is_fused).lower()}"
    skinny = tiny_engine(*options, fused, model=model, techniques=["skinny_gemm"])
    prompts = mixed_prompts(3, longest=8)
    # Of different lengths, so that one request is left: in fp32 the kernel takes single rows.
    sampling = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 3, 6)]
    expected, found = (e.generate(prompts, sampling) for e in (plain, skinny))
    assert [a.outputs[0].token_ids for a in found] == [a.outputs[0].token_ids for a in expected]
    counts = skinny.counters()
    assert counts["linear.skinny_calls"] > 0
    assert counts["linear.dense_calls"] > 0
    assert (counts["linear.fused_calls"] > 0) == is_fused


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gate_and_up_are_multiplied_where_they_come_out(family: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = (f"engine/platform={device}", "engine/scheduler=continuous", "dtype=bfloat16")
    prompts = mixed_prompts(3, longest=8)
    sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    tokens, fused = [], []
    for gated in ("true", "false"):
        engine = tiny_engine(
            *options,
            f"engine.linear.gate_rows={gated}",
            "engine.linear.fuse_one_row=false",
            model=tiny_model(family),
            techniques=["skinny_gemm"],
        )
        tokens.append([o.outputs[0].token_ids for o in engine.generate(prompts, sampling)])
        fused.append(engine.counters()["linear.fused_calls"])
    assert tokens[0] == tokens[1]
    assert fused[0] > 0 and fused[1] == 0


def test_reasons_name_the_device_and_the_dtype() -> None:
    reasons = SkinnyLinear().unsupported_reasons(torch.device("cpu"), torch.float64)
    text = "; ".join(reasons)
    if HAS_TRITON:
        assert "float64 is none of float16, bfloat16, float32" in text
        assert ("cpu" in text) != is_interpreted()
    else:
        assert "not installed" in text
    if HAS_GPU:
        assert SkinnyLinear().unsupported_reasons(torch.device("cuda"), torch.bfloat16) == []


@pytest.mark.parametrize("max_rows", [0, 65])
def test_rows_that_the_kernel_does_not_take_are_refused(max_rows: int) -> None:
    with pytest.raises(ConfigError, match=rf"max_rows={max_rows} must be from 1 to 64"):
        SkinnyLinear(SkinnyLinearConfig(max_rows=max_rows))
