"""Technique ``batch_invariant`` in an engine: a request's bits do not depend on its batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kernels import dispatch
from kernels.triton import HAS_TRITON, is_interpreted
from techniques.batch_invariant import InvariantLinear, InvariantOps, InvariantSampler
from techniques.batch_invariant import linear as invariant_linear
from tests.helpers.engines import FIRST_ORDINARY_ID, VOCAB_SIZE, component, tiny_engine
from tests.helpers.interpreted import HAS_GPU, run_in_interpreter, starts_interpreter
from tests.helpers.tiny_models import tiny_model
from workbench.core.errors import UnsupportedError
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine

#: The interpreter is slow: it gets fewer requests.
COUNT, LONGEST, NEW_TOKENS = (3, 30, 2) if is_interpreted() else (9, 60, 6)
BASE = ("continuous_batching", "paged_attention")
#: Techniques beside it, under which a request's steps are cut in other ways, and their settings.
BESIDE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "whole prompts": ((), ()),
    "chunks": (("chunked_prefill",), ("engine.prefill.chunk_tokens=13",)),
    "prefix cache": (("radix_cache",), ()),
    "drafts": (("spec_decode",), ("engine.drafter.min_ngram=1",)),
}
needs_invariance = pytest.mark.skipif(
    not (dispatch.HAS_NUMBA or is_interpreted() or HAS_GPU),
    reason="numba is not installed, and there is no GPU",
)
#: Everything that one engine says of one request.
Output = tuple[tuple[int, ...], tuple[tuple[int, float, tuple[tuple[int, float], ...]], ...]]


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__, "-k", "same_bits and (mistral-bfloat16 or qwen3-float32)")


def prompts(count: int) -> list[list[int]]:
    """Of mixed lengths; most start with one passage."""
    rng = random.Random(1)
    passage = [rng.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(13)]
    found = []
    for index in range(count):
        end = [rng.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(rng.randint(1, LONGEST))]
        found.append((passage if index % 3 else []) + end)
    return found


PROMPTS = prompts(COUNT)
SAMPLING = [
    SamplingParams(
        max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=3, temperature=0.9 * (i % 2), seed=i
    )
    for i in range(len(PROMPTS))
]


def engine_of(
    model: Path, dtype: str, beside: str = "whole prompts", techniques: Sequence[str] = ()
) -> Engine:
    names, settings = BESIDE[beside]
    device = "cuda" if HAS_GPU and not is_interpreted() else "cpu"
    return tiny_engine(
        f"engine/platform={device}",
        f"dtype={dtype}",
        "engine.kv_cache.block_size=4",
        *settings,
        techniques=[*BASE, *names, *techniques],
        model=model,
        max_num_seqs=len(PROMPTS),
    )


def outputs_of(engine: Engine, rows: Sequence[int]) -> list[Output]:
    found = []
    for result in engine.generate([PROMPTS[i] for i in rows], [SAMPLING[i] for i in rows]):
        assert result.error is None
        output = result.outputs[0]
        assert output.logprobs is not None and len(output.logprobs) == NEW_TOKENS
        entries = tuple((e.token_id, e.logprob, tuple(e.top)) for e in output.logprobs)
        found.append((tuple(output.token_ids), entries))
    return found


def alone(engine: Engine) -> list[Output]:
    found = []
    for row in range(len(PROMPTS)):
        engine.clear_cached()
        found += outputs_of(engine, [row])
    return found


def differing(engine: Engine, expected: list[Output], sizes: Sequence[int]) -> int:
    """Requests whose outputs in batches are not, bit for bit, those of ``expected``."""
    rng, count = random.Random(2), 0
    for size in sizes:
        rows = rng.sample(range(len(PROMPTS)), size)
        for row, output in zip(rows, outputs_of(engine, rows), strict=True):
            count += output != expected[row]
    return count


def model_of(family: str) -> Path:
    return tiny_model(family, **({"sliding_window": 40} if family == "mistral" else {}))


@needs_invariance
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "float32"),
        ("llama", "bfloat16"),
        ("mistral", "float32"),
        ("mistral", "bfloat16"),
        ("qwen3", "float32"),
        ("gemma3", "bfloat16"),
    ],
)
def test_a_request_has_the_same_bits_in_every_batch(family: str, dtype: str) -> None:
    model = model_of(family)
    engine = engine_of(model, dtype, techniques=["batch_invariant"])
    expected = alone(engine)
    assert differing(engine, expected, range(2, COUNT + 1)) == 0
    counts = engine.counters()
    assert counts["linear.invariant_calls"] > 0
    assert counts["attention.decode_calls"] > 0 and counts["attention.prefill_calls"] > 0
    for beside in BESIDE:
        if is_interpreted() and beside != "chunks":
            continue
        other = engine_of(model, dtype, beside, techniques=["batch_invariant"])
        assert differing(other, expected, (1, COUNT // 2, COUNT)) == 0, beside
        counts = other.counters()
        assert beside != "chunks" or counts["scheduler.partial_prompts"] > 0
        assert beside != "prefix cache" or counts["prefix_cache.hit_tokens"] > 0
        assert beside != "drafts" or counts["drafter.drafted_tokens"] > 0


@pytest.mark.skipif(is_interpreted() or HAS_GPU, reason="of the products on a CPU")
def test_a_library_whose_rows_depend_on_their_place_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apply = invariant_linear.kernels.apply_linear

    def uneven(packed: object, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = apply(packed, x)  # type: ignore[arg-type]
        out[5] = torch.nextafter(out[5], out[5] + 1)
        return out

    monkeypatch.setattr(invariant_linear.kernels, "apply_linear", uneven)
    with pytest.raises(UnsupportedError, match=r"other bits at another place.*engine/linear=dense"):
        engine_of(tiny_model("llama"), "float32", techniques=["batch_invariant"])


@pytest.mark.skipif(is_interpreted() or HAS_GPU, reason="of the products on a CPU")
@pytest.mark.parametrize("num_rows", [0, 1, 15, 16, 17, 40])
def test_products_in_chunks_are_the_products(num_rows: int) -> None:
    import kernels

    x, weight, bias = torch.randn(num_rows, 48), torch.randn(20, 48), torch.randn(20)
    packed = kernels.pack_linear(weight, bias, 16)
    found = invariant_linear.linear_by_chunks(packed, x)
    torch.testing.assert_close(found, x @ weight.T + bias)


def test_reasons_name_the_device_and_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (InvariantLinear(), InvariantOps(), InvariantSampler())
    for part in parts:
        text = "; ".join(part.unsupported_reasons(torch.device("cpu"), torch.float64))
        assert "float64" in text or "numba" in text or not HAS_TRITON
        if HAS_GPU:
            assert part.unsupported_reasons(torch.device("cuda"), torch.bfloat16) == []
    if is_interpreted():
        return
    monkeypatch.setattr(dispatch, "HAS_NUMBA", False)
    for part in parts:
        assert "pip install numba" in "; ".join(
            part.unsupported_reasons(torch.device("cpu"), torch.float32)
        )
    assert component("attention", "invariant").counters() == {
        "decode_calls": 0,
        "prefill_calls": 0,
    }
