"""Technique ``batch_invariant`` on a CUDA device: bits do not depend on the batch.

python -m pytest tests/gpu/test_batch_invariant_cuda.py     # checks
PYTHONPATH=. python tests/gpu/test_batch_invariant_cuda.py  # the same, where there is no pytest
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.helpers.gpu_checks import run_as_program, run_under_pytest
from tests.helpers.tiny_models import tiny_model
from workbench.assemble import Limits, build_engine
from workbench.configuration import compose_config, engine_config
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine

BASE = ("continuous_batching", "paged_attention")
FAST = ("batch_invariant", "cuda_graphs", "overlap")
COUNT, NEW_TOKENS, VOCAB_SIZE = 12, 24, 1024
#: Techniques beside it, under which a request's steps are cut in other ways, and their settings.
BESIDE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "op by op": (("batch_invariant",), ()),
    "graphs": (FAST, ()),
    "graphs, chunks": ((*FAST, "chunked_prefill"), ("engine.prefill.chunk_tokens=50",)),
    "graphs, prefix cache": ((*FAST, "radix_cache"), ()),
    "drafts": (("batch_invariant", "spec_decode"), ("engine.drafter.min_ngram=1",)),
}
#: Wide enough that a row of a product fills several tiles, and queries several tiles of keys.
WIDE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
}


def model_of(family: str) -> Path:
    extra = {"sliding_window": 150} if family == "mistral" else {}
    head_dim = {"qwen3": {"head_dim": 64}, "llama": {"head_dim": 128}}.get(family, {})
    return tiny_model(family, **WIDE, **extra, **head_dim)


def engine_of(model: Path, dtype: str, techniques: Sequence[str], *settings: str) -> Engine:
    names = ",".join((*BASE, *techniques))
    composed = compose_config(
        [
            f"model={model}",
            f"dtype={dtype}",
            "engine/platform=cuda",
            *settings,
            f"+technique=[{names}]",
        ]
    )
    limits = Limits(max_num_seqs=COUNT, max_model_len=640, kv_pool_tokens=COUNT * 640)
    return build_engine(engine_config(composed, limits, download=False))


def prompts() -> list[list[int]]:
    """Of mixed lengths; most start with one passage."""
    rng = random.Random(1)
    passage = [rng.randrange(4, VOCAB_SIZE) for _ in range(90)]
    found = []
    for index in range(COUNT):
        end = [rng.randrange(4, VOCAB_SIZE) for _ in range(rng.randint(1, 500))]
        found.append((passage if index % 3 else []) + end)
    return found


PROMPTS = prompts()
SAMPLING = [
    SamplingParams(
        max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=3, temperature=0.9 * (i % 2), seed=i
    )
    for i in range(COUNT)
]


def outputs_of(engine: Engine, rows: Sequence[int]) -> list[object]:
    """Tokens and log-probabilities, those of the likeliest tokens too, by request."""
    found: list[object] = []
    for result in engine.generate([PROMPTS[i] for i in rows], [SAMPLING[i] for i in rows]):
        assert result.error is None, result.error
        entries = result.outputs[0].logprobs
        assert entries is not None and len(entries) == NEW_TOKENS
        found.append([(e.token_id, e.logprob, tuple(e.top)) for e in entries])
    return found


def alone(engine: Engine) -> list[object]:
    return [outputs_of(engine, [row])[0] for row in range(COUNT)]


def num_differing(engine: Engine, expected: list[object], sizes: Sequence[int]) -> int:
    rng, count = random.Random(2), 0
    for size in sizes:
        rows = rng.sample(range(COUNT), size)
        for row, output in zip(rows, outputs_of(engine, rows), strict=True):
            count += output != expected[row]
    return count


def check_bits(family: str, dtype: str) -> None:
    """Log-probabilities alone and in batches, by every way that a request's steps are cut."""
    model = model_of(family)
    expected = alone(engine_of(model, dtype, ("batch_invariant",)))
    for name, (techniques, settings) in BESIDE.items():
        engine = engine_of(model, dtype, techniques, *settings)
        count = num_differing(engine, expected, (1, 2, 3, 5, 8, 9, COUNT))
        assert count == 0, f"{count} outputs differ ({family}, {dtype}, {name})"
        counters = engine.counters()
        assert counters["linear.invariant_calls"] > 0
        assert "graphs" not in name or counters["graph_runner.replays"] > 0
        assert "chunks" not in name or counters["scheduler.partial_prompts"] > 0
        assert "cache" not in name or counters["prefix_cache.hit_tokens"] > 0
        assert "drafts" not in name or counters["drafter.drafted_tokens"] > 0


def check_the_control() -> None:
    """Without the technique bits do depend on the batch, so that the other checks can fail."""
    model = model_of("llama")
    engine = engine_of(model, "bfloat16", ("triton_attention", "fused_kernels"))
    assert num_differing(engine, alone(engine), (2, 5, 9, COUNT)) > 0


def check_products() -> None:
    """Rows of real layers, from 1 to 8192 of them."""
    from kernels.triton.invariant_gemm import invariant_linear

    for out_features, in_features in ((6144, 4096), (4096, 14336), (1024, 1024), (151936, 1024)):
        generator = torch.Generator("cuda").manual_seed(out_features)
        weight, x = (
            torch.randn(n, in_features, device="cuda", generator=generator).bfloat16()
            for n in (out_features, 8192 if out_features < 1 << 16 else 512)
        )
        together = invariant_linear(x, weight)
        # Sums of standard normal products have a deviation of sqrt(K): one step of bf16 at 4 of it.
        exact = x[:256].double() @ weight.double().T
        bound = 4 * in_features**0.5 * torch.finfo(torch.bfloat16).eps
        assert (together[:256].double() - exact).abs().max().item() <= bound
        for count in (1, 2, 15, 16, 17, 100, 256, 511, 1000, 4096):
            if count > len(x):
                continue
            last = len(x) - count
            assert torch.equal(invariant_linear(x[:count], weight), together[:count]), count
            assert torch.equal(invariant_linear(x[last:], weight), together[last:]), count


def check_norms() -> None:
    """Rows of norms, alone and among as many as change the number of warps otherwise."""
    from kernels.triton.norm import rms_norm

    for hidden in (512, 1024, 4096, 5120):
        x = torch.randn(8192, hidden, device="cuda").bfloat16()
        weight = torch.randn(hidden, device="cuda").bfloat16()
        together = rms_norm(x, weight, 1e-5, is_invariant=True)
        for count in (1, 3, 64, 1000):
            found = rms_norm(x[-count:], weight, 1e-5, is_invariant=True)
            assert torch.equal(found, together[-count:]), (hidden, count)


CHECKS: dict[str, Callable[[], None]] = {
    "products": check_products,
    "norms": check_norms,
    "llama, bf16": lambda: check_bits("llama", "bfloat16"),
    "qwen3, bf16": lambda: check_bits("qwen3", "bfloat16"),
    "mistral, fp16": lambda: check_bits("mistral", "float16"),
    "gemma3, bf16": lambda: check_bits("gemma3", "bfloat16"),
    "llama, fp32": lambda: check_bits("llama", "float32"),
    "control": check_the_control,
}


def test_bits_do_not_depend_on_the_batch_on_a_cuda_device() -> None:
    run_under_pytest(CHECKS)


if __name__ == "__main__":
    raise SystemExit(run_as_program(CHECKS))
