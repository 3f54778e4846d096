"""An engine on Triton's attention, its kernels interpreted: tests/gpu has it on a GPU."""

from __future__ import annotations

import pytest

from kernels.triton import is_interpreted
from tests.helpers.engines import mixed_prompts, tiny_engine
from tests.helpers.interpreted import run_in_interpreter, starts_interpreter
from tests.helpers.prepared import CALLED, MIXED_CALLED
from tests.helpers.recalling import RECALLING
from tests.helpers.tiny_models import hf_greedy, tiny_model
from workbench.core.sampling import SamplingParams


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.mark.skipif(not is_interpreted(), reason="runs where Triton interprets its kernels")
def test_tokens_are_those_of_transformers() -> None:
    prompts = [*mixed_prompts(2, longest=8), list(range(4, 24))]  # and one no draft is as long as
    overrides = ["engine/attention=triton", "engine/kv_cache=paged", "engine.kv_cache.block_size=4"]
    engine = tiny_engine(*overrides, max_num_seqs=2, max_model_len=48)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.token_ids == hf_greedy(tiny_model("llama"), prompt, 4)
    counters = engine.counters()
    assert counters["attention.decode_calls"] > 0
    assert counters["attention.prefill_calls"] > 0


@pytest.mark.skipif(not is_interpreted(), reason="runs where Triton interprets its kernels")
def test_prepared_steps_verify_drafts() -> None:
    """Inputs, attention, choice and write-back of such a step, all by the kernels."""
    prompts = [list(range(4, 12)), [5, 6] * 5]
    overrides = ["engine/attention=triton", "engine/kv_cache=paged", "engine.kv_cache.block_size=4"]
    speculating = [*CALLED, *RECALLING, "engine.drafter.num_draft_tokens=3"]
    engine = tiny_engine(*overrides, *speculating, max_num_seqs=3, max_model_len=48)
    answers = [hf_greedy(tiny_model("llama"), prompt, 8) for prompt in prompts]
    pairs = zip(prompts, answers, strict=True)
    engine.parts.components["drafter"].answers = [p + a for p, a in pairs]  # type: ignore[attr-defined]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
    assert [o.token_ids for o in outputs] == answers
    replayed = [s for s in engine.steps if s.num_draft_tokens and s.graph_mode == "graph"]
    assert replayed and all(s.num_padded_tokens >= 4 for s in replayed)
    assert engine.counters()["verifier.accepted_tokens"] > 0


@pytest.mark.skipif(not is_interpreted(), reason="runs where Triton interprets its kernels")
def test_prepared_steps_run_pieces_of_prompts() -> None:
    """Inputs and attention of such a step, for places without a request and tokens of nobody."""
    prompts = [list(range(4, 16)), [5, 6] * 3, [9, 8, 7]]
    overrides = ["engine/attention=triton", "engine/kv_cache=paged", "engine.kv_cache.block_size=4"]
    chunked = ["engine/scheduler=continuous", "engine/prefill=chunked"]
    chunked += ["engine.prefill.chunk_tokens=9", *MIXED_CALLED]
    engine = tiny_engine(*overrides, *chunked, max_num_seqs=3, max_model_len=48)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
    answers = [hf_greedy(tiny_model("llama"), prompt, 4) for prompt in prompts]
    assert [o.token_ids for o in outputs] == answers
    assert {s.graph_mode for s in engine.steps} == {"graph"}
    assert any(s.num_single_tokens and s.num_prompt_tokens for s in engine.steps)
