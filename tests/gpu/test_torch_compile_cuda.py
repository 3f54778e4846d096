"""Technique ``torch_compile`` on a CUDA device: in captured steps, at every size, without waiting.

python -m pytest tests/gpu/test_torch_compile_cuda.py     # checks
PYTHONPATH=. python tests/gpu/test_torch_compile_cuda.py  # the same, where there is no pytest
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from techniques.torch_compile import CompiledOps
from tests.helpers.gpu_checks import run_as_program, run_under_pytest
from tests.helpers.tiny_models import tiny_model
from workbench.assemble import Limits, build_engine
from workbench.configuration import compose_config, engine_config
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine

BASE = "continuous_batching,paged_attention,triton_attention"
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


def engine_of(techniques: str, family: str = "llama", dtype: str = "float32") -> Engine:
    composed = compose_config(
        [
            f"model={tiny_model(family)}",
            f"dtype={dtype}",
            "engine/platform=cuda",
            f"+technique=[{BASE}{techniques}]",
        ]
    )
    limits = Limits(max_num_seqs=12, max_model_len=128, kv_pool_tokens=2048)
    return build_engine(engine_config(composed, limits, download=False))


def prompts_of(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(4, 128) for _ in range(rng.randint(1, 60))] for _ in range(count)]


def check_tokens(family: str) -> None:
    """Greedy tokens in fp32, launched op by op and captured; one graph an op."""
    prompts = prompts_of(24)
    plain = [o.token_ids for o in engine_of("", family).generate(prompts, GREEDY)]
    for techniques in (",torch_compile", ",torch_compile,cuda_graphs,overlap"):
        engine = engine_of(techniques, family)
        found = [o.token_ids for o in engine.generate(prompts, GREEDY)]
        ties = sum(a != b for a, b in zip(found, plain, strict=True))
        assert ties <= 1, f"{ties} of {len(plain)} requests differ; near-ties of fp32 are rare"
        counters = engine.counters()
        assert counters["ops.graphs"] == 3, counters["ops.graphs"]
        assert counters["ops.add_rms_norm_calls"] > 0
        assert "cuda_graphs" not in techniques or counters["graph_runner.replays"] > 10


def check_half_precision(dtype: torch.dtype) -> None:
    """Rounded where the reference rounds: what differs, differs by a step or two of the dtype."""
    from kernels.norm import add_rms_norm_reference_

    ops = CompiledOps()
    with torch.inference_mode():
        for rows in (1, 32, 1000, 1, 8192):
            x, residual = (torch.randn(rows, 4096, device="cuda").to(dtype) for _ in range(2))
            weight = torch.randn(4096, device="cuda").to(dtype)
            total = residual.clone()
            expected = add_rms_norm_reference_(x, total, weight, 1e-5)
            found = ops.add_rms_norm_(x, residual, weight, 1e-5)
            assert torch.equal(residual, total)
            torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            assert (found != expected).double().mean().item() < 0.02
    assert ops.counters()["graphs"] == 1


def check_it_never_waits() -> None:
    """No operation that waits for the device, once each op is compiled."""
    engine = engine_of(",torch_compile,cuda_graphs,overlap")
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    for index, prompt in enumerate(prompts_of(9)):
        engine.add_request(prompt, params, f"r{index}")
    for _ in range(5):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            engine.step()
        engine.add_request([5, 6, 7], params, "late")  # a prompt, launched op by op
        for _ in range(20):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while engine.has_unfinished():
        engine.step()


def check_capture_before_the_first_call() -> None:
    """An error that says what to do, not a broken capture."""
    ops = CompiledOps()
    x = torch.ones(2, 2 * 56, device="cuda")  # a form that no other check has
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            ops.silu_and_mul(x)
    except RuntimeError as error:
        assert "outside of the capture" in str(error), error
    else:
        raise AssertionError("compiled within a capture")


CHECKS: dict[str, Callable[[], None]] = {
    "tokens, llama": lambda: check_tokens("llama"),
    "tokens, gemma3": lambda: check_tokens("gemma3"),
    "bf16": lambda: check_half_precision(torch.bfloat16),
    "fp16": lambda: check_half_precision(torch.float16),
    "never waits": check_it_never_waits,
    "capture": check_capture_before_the_first_call,
}


def test_compiled_ops_on_a_cuda_device() -> None:
    run_under_pytest(CHECKS)


if __name__ == "__main__":
    raise SystemExit(run_as_program(CHECKS))
