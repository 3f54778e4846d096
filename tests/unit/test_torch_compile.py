"""Technique ``torch_compile`` in an engine: its tokens are those without it, by a graph an op."""

from __future__ import annotations

import random

import pytest
import torch

from techniques.torch_compile import CompiledOps, CompiledOpsConfig
from techniques.torch_compile import ops as compiled_ops
from techniques.torch_compile.graphs import CompiledFunction
from tests.helpers.engines import (
    FIRST_ORDINARY_ID,
    VOCAB_SIZE,
    mixed_prompts,
    tiny_engine,
    why_not_here,
)
from tests.helpers.interpreted import HAS_GPU
from tests.helpers.tiny_models import tiny_model
from workbench.core.errors import ConfigError, UnsupportedError
from workbench.core.sampling import SamplingParams

DEVICE = "cuda" if HAS_GPU else "cpu"
SETTINGS = (f"engine/platform={DEVICE}", "engine/scheduler=continuous", "engine/kv_cache=paged")

needs_compiler = pytest.mark.skipif(
    not HAS_GPU and why_not_here("torch_compile") is not None, reason="no C++ compiler"
)


@needs_compiler
@pytest.mark.parametrize(("family", "graphs"), [("llama", 3), ("gemma3", 3)])
def test_tokens_are_those_of_the_engine_without_it(family: str, graphs: int) -> None:
    """And one graph an op serves every number of tokens, also 1, whatever ran first."""
    model = tiny_model(family)
    plain = tiny_engine(*SETTINGS, model=model)
    compiled = tiny_engine(*SETTINGS, model=model, techniques=["torch_compile"])
    rng = random.Random(0)
    first = [rng.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE)]  # a step of one token
    for prompts in ([first], mixed_prompts(3, longest=12), mixed_prompts(7, seed=1)):
        sampling = [SamplingParams(max_tokens=3 + i, ignore_eos=True) for i in range(len(prompts))]
        expected, found = (e.generate(prompts, sampling) for e in (plain, compiled))
        assert [o.token_ids for o in found] == [o.token_ids for o in expected]
        counts = compiled.counters()
        assert all(counts[f"ops.{c}_calls"] for c in ("rms_norm", "add_rms_norm", "activation"))
        assert counts["ops.graphs"] == graphs
    compiled.reset_counters()
    assert not any(v for k, v in compiled.counters().items() if k.startswith("ops."))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_for_every_number_of_rows(dtype: torch.dtype) -> None:
    ops = CompiledOps()
    weight = torch.randn(48, device=DEVICE).to(dtype)
    for num_rows in (3, 1, 2, 17, 0, 300, 1):
        x = torch.randn(num_rows, 48, device=DEVICE).to(dtype)
        out = ops.rms_norm(x, weight, 1e-5)
        assert out.shape == x.shape and not hasattr(x, "_dynamo_unbacked_indices")
    assert ops.counters()["graphs"] == 1
    assert [f.num_graphs for f in ops._used.values()] == [1]


@needs_compiler
def test_more_graphs_than_allowed_are_an_error_that_names_them() -> None:
    ops = CompiledOps(CompiledOpsConfig(max_graphs=1))
    x, weight = torch.ones(2, 48, device=DEVICE), torch.ones(48, device=DEVICE)
    ops.rms_norm(x, weight, 1e-5)
    ops.rms_norm(x[:1], weight, 1e-5)
    with pytest.raises(UnsupportedError, match=r"max_graphs.*'rms_norm'.*'silu_and_mul'.*dispatch"):
        ops.silu_and_mul(x)


@needs_compiler
def test_a_graph_that_is_made_again_is_an_error() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x + x

    function = CompiledFunction(double, "double", {"compile_threads": 1})
    x = torch.ones(3, 4, device=DEVICE)
    assert torch.equal(function(x, rows=1), x + x)
    assert torch.equal(function(x[:2], rows=1), x[:2] + x[:2])
    with pytest.raises(UnsupportedError, match=r"double was compiled again.*engine/ops=dispatched"):
        function(torch.ones(3, 5, device=DEVICE), rows=1)


@needs_compiler
def test_graphs_that_another_part_of_the_process_threw_away_are_made_again() -> None:
    ops, weight = CompiledOps(), torch.ones(56, device=DEVICE)
    for num_rows in (3, 1, 17):
        ops.rms_norm(torch.ones(num_rows, 56, device=DEVICE), weight, 1e-5)
    (function,) = ops._used.values()
    torch._dynamo.reset()
    assert function.num_graphs == 0
    for num_rows in (1, 3, 17):
        ops.rms_norm(torch.ones(num_rows, 56, device=DEVICE), weight, 1e-5)
    assert function.num_graphs == 1


def test_no_graphs_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_graphs=0 must be 1 or more"):
        CompiledOps(CompiledOpsConfig(max_graphs=0))


def test_reasons_name_the_compiler_and_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def no_compiler() -> str:
        raise RuntimeError("nothing found")

    compiled_ops._missing_for_cpp.cache_clear()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)
    reasons = CompiledOps().unsupported_reasons(torch.device("cpu"), torch.float64)
    compiled_ops._missing_for_cpp.cache_clear()
    assert "install g++" in reasons[0]
    assert "float64 is none of float16, bfloat16, float32" in reasons[1]
    if HAS_GPU:
        assert CompiledOps().unsupported_reasons(torch.device("cuda"), torch.bfloat16) == []
