"""Technique ``fused_kernels`` in an engine: the tokens of the engine without it."""

from __future__ import annotations

import pytest
import torch

from kernels.triton import HAS_TRITON, is_interpreted
from techniques.fused_kernels import FusedOps, FusedSampler
from tests.helpers.engines import mixed_prompts, tiny_engine
from tests.helpers.interpreted import (
    HAS_GPU,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)
from tests.helpers.tiny_models import tiny_model
from workbench.core.sampling import SamplingParams

HOW = {
    "greedy": SamplingParams(max_tokens=5),
    "drawn": SamplingParams(max_tokens=5, temperature=1.0, top_k=20, top_p=0.9, seed=3),
    "penalised": SamplingParams(
        max_tokens=5, temperature=0.8, presence_penalty=1.0, logprobs=2, seed=3
    ),
}


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tokens_are_those_of_the_engine_without_it(family: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = (f"engine/platform={device}", "engine/scheduler=continuous")
    model = tiny_model(family)
    plain = tiny_engine(*options, model=model)
    fused = tiny_engine(*options, model=model, techniques=["fused_kernels"])
    prompts = mixed_prompts(3, longest=12)
    for sampling in HOW.values():
        fused.reset_counters()
        expected, found = (e.generate(prompts, sampling) for e in (plain, fused))
        for a, b in zip(expected, found, strict=True):
            assert a.outputs[0].token_ids == b.outputs[0].token_ids
        counts = fused.counters()
        assert all(counts[f"ops.{c}_calls"] for c in ("rms_norm", "add_rms_norm", "activation"))
        assert counts["sampler.fused_calls"] > 0
        assert bool(counts["sampler.torch_penalty_calls"]) == sampling.has_penalties
        assert bool(counts["sampler.torch_logprob_calls"]) == (sampling.logprobs is not None)


def test_reasons_name_the_device_and_the_dtype() -> None:
    for component in (FusedOps(), FusedSampler()):
        reasons = component.unsupported_reasons(torch.device("cpu"), torch.float64)
        text = "; ".join(reasons)
        if HAS_TRITON:
            assert "float64 is none of float16, bfloat16, float32" in text
            assert ("cpu" in text) != is_interpreted()
        else:
            assert "not installed" in text
        if HAS_GPU:
            assert component.unsupported_reasons(torch.device("cuda"), torch.bfloat16) == []
