"""Speculation on a tiny model: fewer steps, the same tokens, honest counters, room at every end."""

from __future__ import annotations

import pytest

from tests.helpers.engines import check_idle, shared_engine, tiny_engine
from tests.helpers.tiny_models import hf_greedy, tiny_model
from workbench.core.sampling import SamplingParams

#: Greedy output of the tiny Llama settles into a loop on these, so that look-ups are right.
PROMPTS = [[9, 9, 9], [80] * 12, [40, 41, 42] * 6]
SETTINGS = ("engine.drafter.min_ngram=1",)


def test_fewer_steps_and_the_same_tokens() -> None:
    plain = shared_engine(max_num_seqs=1)
    speculative = shared_engine(*SETTINGS, techniques=("spec_decode",), max_num_seqs=1)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    for prompt in PROMPTS:
        for engine in (plain, speculative):
            (output,) = engine.generate([prompt], params)
            assert output.token_ids == hf_greedy(tiny_model("llama"), prompt, 60)
    assert len(plain.steps) == 60 * len(PROMPTS)
    assert len(speculative.steps) < len(plain.steps)
    saved = sum(s.num_accepted_tokens for s in speculative.steps)
    assert len(plain.steps) - len(speculative.steps) == saved
    counters = speculative.counters()
    assert counters["verifier.accepted_tokens"] == saved
    verified = sum(s.num_draft_tokens for s in speculative.steps)
    assert counters["verifier.verified_tokens"] == verified
    assert counters["verifier.verified_tokens"] <= counters["drafter.drafted_tokens"]
    assert counters["verifier.acceptance_rate"] == saved / verified
    verifications = sum(s.num_draft_tokens > 0 for s in speculative.steps)
    assert counters["verifier.mean_accepted_length"] == 1 + saved / verifications
    check_idle(speculative)


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_drafts_never_carry_a_request_past_its_end(max_tokens: int) -> None:
    engine = shared_engine(
        *SETTINGS, "engine.drafter.num_draft_tokens=20", techniques=("spec_decode",)
    )
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        assert output.token_ids == hf_greedy(tiny_model("llama"), prompt, max_tokens)


@pytest.mark.parametrize("techniques", [("spec_decode",), ("spec_decode", "paged_attention")])
def test_drafts_up_to_the_last_slot_of_the_context_and_of_the_pool(
    techniques: tuple[str, ...],
) -> None:
    """The longest request there is, in a pool that holds exactly it."""
    engine = tiny_engine(
        *SETTINGS,
        "engine.drafter.num_draft_tokens=16",
        techniques=techniques,
        max_num_seqs=1,
        max_model_len=64,
        kv_pool_tokens=64,
    )
    for prompt in PROMPTS:
        (output,) = engine.generate([prompt], SamplingParams(max_tokens=1000, ignore_eos=True))
        assert output.error is None
        count = 64 - len(prompt)
        assert output.token_ids == hf_greedy(tiny_model("llama"), prompt, count)
    check_idle(engine)


def test_without_repetition_nothing_is_drafted_and_nothing_is_lost() -> None:
    engine = shared_engine(techniques=("spec_decode",))
    prompt = list(range(4, 60))
    (output,) = engine.generate([prompt], SamplingParams(max_tokens=2, ignore_eos=True))
    assert output.token_ids == hf_greedy(tiny_model("llama"), prompt, 2)
    counters = engine.counters()
    assert counters["verifier.acceptance_rate"] == 0
    assert counters["verifier.mean_accepted_length"] == 1
