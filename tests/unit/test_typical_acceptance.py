"""Typical acceptance: the criterion by hand, greedy requests exact, and lossy as declared."""

from __future__ import annotations

import math

import pytest
import torch

from techniques.typical_acceptance import Typical, TypicalConfig
from tests.helpers.engines import component, tiny_engine
from tests.helpers.tiny_models import hf_greedy, tiny_model
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.slots.sampler import SamplingMetadata
from workbench.slots.verifier import DraftsToVerify

VOCAB, BATCH, NUM_DRAFTS = 8, 60, 3
SAMPLER = component("sampler", "torch")


def metadata(params: SamplingParams) -> SamplingMetadata:
    rows = BATCH * (NUM_DRAFTS + 1)
    return SamplingMetadata(
        params=[params] * rows,
        positions=torch.arange(NUM_DRAFTS + 1).repeat(BATCH),
        seeds=torch.arange(BATCH).repeat_interleave(NUM_DRAFTS + 1),
        all_greedy=params.is_greedy,
        any_logprobs=params.logprobs is not None,
    )


@pytest.mark.parametrize(("threshold", "alpha"), [(0.09, 0.3), (0.3, 1.0), (1.0, 0.2)])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_keeps_what_the_criterion_says(threshold: float, alpha: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH * (NUM_DRAFTS + 1), VOCAB, generator=generator) * 2
    drafts = torch.randint(0, VOCAB, (BATCH, NUM_DRAFTS), generator=generator)
    drafts[::3, 1:] = -1
    first = torch.arange(BATCH) * (NUM_DRAFTS + 1)
    params = SamplingParams(temperature=temperature, logprobs=0)
    verifier = Typical(TypicalConfig(threshold, alpha))
    accepted = verifier.verify(
        DraftsToVerify(drafts, first), logits.clone(), metadata(params), SAMPLER
    )
    own = SAMPLER.sample(logits.clone(), metadata(params)).token_ids.tolist()
    total = 0
    for b, draft in enumerate(drafts.tolist()):
        expected: list[int] = []
        for place, token in enumerate([*draft, -1]):
            p = torch.softmax(logits[int(first[b]) + place] / temperature, -1)
            entropy = -float((p * p.log()).sum())
            if token < 0 or p[token] <= min(threshold, alpha * math.exp(-entropy)):
                expected.append(own[int(first[b]) + place])
                break
            expected.append(token)
        kept = [t for t in accepted.token_ids[b].tolist() if t >= 0]
        assert kept == expected
        total += len(kept) - 1
        assert accepted.logprobs is not None
        entries = accepted.logprobs[int(first[b]) : int(first[b]) + len(kept)]
        assert [e.token_id for e in entries if e is not None] == kept
    assert verifier.counters()["accepted_tokens"] == total > 0


def test_greedy_requests_get_the_target_s_tokens_also_beside_random_ones() -> None:
    prompts = [[9, 9, 9], [80] * 12, [40, 41, 42] * 6]
    engine = tiny_engine("engine.drafter.min_ngram=1", techniques=("typical_acceptance",))
    random = SamplingParams(max_tokens=30, ignore_eos=True, temperature=1.0)
    params = [SamplingParams(max_tokens=30, ignore_eos=True)] * 3
    outputs = engine.generate([*prompts, prompts[1]], [*params, random])
    folder = tiny_model("llama")
    assert [o.token_ids for o in outputs[:3]] == [hf_greedy(folder, p, 30) for p in prompts]
    assert engine.counters()["verifier.accepted_tokens"] > 0


def test_accepts_more_than_a_kept_distribution_allows() -> None:
    """Lossy, as it declares: a draft of probability 0.4 is always kept."""
    logits = torch.log(torch.tensor([0.4, 0.3, 0.3] + [1e-9] * 5)).repeat(BATCH * 4, 1)
    drafts = torch.zeros(BATCH, NUM_DRAFTS, dtype=torch.int64)
    first = torch.arange(BATCH) * (NUM_DRAFTS + 1)
    verifier = Typical()
    verifier.verify(
        DraftsToVerify(drafts, first), logits, metadata(SamplingParams(temperature=1.0)), SAMPLER
    )
    assert verifier.counters()["acceptance_rate"] == 1
    assert verifier.losslessness == "lossy"


@pytest.mark.parametrize("name", ["threshold", "alpha"])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_refuses_impossible_settings(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        Typical(TypicalConfig(**{name: value}))
