"""Acceptance as asked, within sampling error; the impossible is named when an engine is built."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from techniques.synthetic_acceptance import (
    SyntheticDrafter,
    SyntheticDrafterConfig,
    SyntheticVerifier,
    SyntheticVerifierConfig,
)
from techniques.synthetic_acceptance.verifier import geometric_curve
from tests.helpers.engines import check_idle, component, tiny_engine
from tests.helpers.prepared import PREPARED
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.slots.graph_runner import VERIFY
from workbench.slots.sampler import SamplingMetadata
from workbench.slots.verifier import DraftsToVerify

NUM_DRAFTS, BATCH, VOCAB = 5, 100, 11


def verifier(**options: object) -> SyntheticVerifier:
    made = SyntheticVerifier(SyntheticVerifierConfig(**options))  # type: ignore[arg-type]
    made.pair_with(SyntheticDrafter(SyntheticDrafterConfig(NUM_DRAFTS)))
    return made


def verify(
    made: SyntheticVerifier, logits: torch.Tensor, num_drafts: int = NUM_DRAFTS
) -> list[int]:
    """Tokens by request of one step; drafts are 3, and the target's own token is the argmax."""
    drafts = torch.full((BATCH, NUM_DRAFTS), 3)
    drafts[:, num_drafts:] = -1
    metadata = SamplingMetadata(params=[], positions=torch.empty(0), seeds=torch.empty(0))
    first = torch.arange(BATCH) * (num_drafts + 1)
    kept = made.verify(
        DraftsToVerify(drafts, first), logits, metadata, component("sampler", "torch")
    ).token_ids
    own = logits.argmax(-1).reshape(BATCH, num_drafts + 1)
    lengths = (kept >= 0).sum(1)
    for row, length, target in zip(kept, lengths, own, strict=True):
        assert (row[: length - 1] == 3).all(), "an accepted token is no draft"
        assert row[length - 1] == target[length - 1], "the last token is not the target's own"
    return lengths.tolist()


@pytest.mark.parametrize("mean", [1.0, 1.4, 2.0, 3.5, 5.9, 6.0])
def test_mean_accepted_length_is_as_asked(mean: float) -> None:
    made = verifier(mean_accepted_length=mean)
    logits = torch.randn(BATCH * (NUM_DRAFTS + 1), VOCAB)
    lengths = [n for _ in range(100) for n in verify(made, logits)]
    deviation = float(torch.tensor(lengths).double().std())
    found = made.counters()["mean_accepted_length"]
    assert found == pytest.approx(sum(lengths) / len(lengths))
    assert abs(found - mean) <= 4.5 * deviation / math.sqrt(len(lengths)) + 1e-9
    at = [made.counters()[f"accepted_at_{i}"] for i in range(1, NUM_DRAFTS + 1)]
    for place, share in enumerate(geometric_curve(mean, NUM_DRAFTS)):
        assert at[place] / len(lengths) == pytest.approx(share, abs=0.025)


@pytest.mark.parametrize("curve", [[0.9, 0.7, 0.5, 0.2, 0.0], [1.0] * 5, [0.0] * 5])
def test_acceptance_by_position_is_the_curve(curve: list[float]) -> None:
    made = verifier(acceptance_curve=curve)
    logits = torch.randn(BATCH * (NUM_DRAFTS + 1), VOCAB)
    for _ in range(100):
        verify(made, logits)
    counters = made.counters()
    assert counters["verifications"] == 100 * BATCH
    for place, share in enumerate(curve, start=1):
        error = 4.5 * math.sqrt(share * (1 - share) / (100 * BATCH))
        assert counters[f"verified_at_{place}"] == 100 * BATCH
        assert abs(counters[f"accepted_at_{place}"] / (100 * BATCH) - share) <= error


def test_fewer_drafts_are_the_beginning_of_the_curve() -> None:
    made = verifier(acceptance_curve=[0.9, 0.7, 0.5, 0.2, 0.0])
    logits = torch.randn(BATCH * 3, VOCAB)
    lengths = [n for _ in range(100) for n in verify(made, logits, num_drafts=2)]
    assert sum(lengths) / len(lengths) == pytest.approx(1 + 0.9 + 0.7, abs=0.03)


def test_is_seeded_and_does_not_look_at_the_logits() -> None:
    def run(seed: int, logits_seed: int) -> list[list[int]]:
        made = verifier(seed=seed)
        generator = torch.Generator().manual_seed(logits_seed)
        shape = (BATCH * (NUM_DRAFTS + 1), VOCAB)
        return [verify(made, torch.randn(shape, generator=generator)) for _ in range(5)]

    assert run(0, 1) == run(0, 2)
    assert run(0, 1) != run(7, 1)
    assert len({tuple(step) for step in run(0, 1)}) == 5


def test_an_engine_saves_the_steps_that_the_mean_promises() -> None:
    engine = tiny_engine(
        "engine.verifier.mean_accepted_length=3.5",
        techniques=("synthetic_acceptance",),
        max_num_seqs=4,
        max_model_len=256,
    )
    prompts = [[10 + i, 11, 12] for i in range(4)]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=240, ignore_eos=True))
    assert [len(o.token_ids) for o in outputs] == [240] * 4
    counters = engine.counters()
    assert counters["verifier.mean_accepted_length"] == pytest.approx(3.5, abs=0.4)
    assert counters["drafter.failures"] == 0
    assert len(engine.steps) == pytest.approx(240 / 3.5, rel=0.2)
    check_idle(engine)


def test_a_prepared_step_accepts_what_verify_does() -> None:
    """The same numbers by place, and the token behind the last accepted draft is not the next."""
    asked, overruling = (verifier(mean_accepted_length=3.0) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        num_drafts = torch.randint(0, NUM_DRAFTS + 1, (BATCH,), generator=generator)
        tokens = torch.randint(0, 4, (BATCH, NUM_DRAFTS + 1), generator=generator)
        drawn = torch.randint(0, 4, (BATCH, NUM_DRAFTS + 1), generator=generator)
        found = overruling.overrule(drawn, tokens, num_drafts)
        counts = asked._num_accepted(num_drafts, NUM_DRAFTS)
        assert counts.sum() > 0 and (counts <= num_drafts).all()
        for place, (count, drafts) in enumerate(zip(counts, num_drafts, strict=True)):
            first = NUM_DRAFTS - int(drafts)  # place of the last known token
            own, wanted = found[place, first:], tokens[place, first + 1 :]
            agrees = (own[:-1] == wanted).long().cumprod(0).sum()
            assert agrees == count, f"step {step}, place {place}"
            last = first + int(count)
            if count == drafts or drawn[place, last] != wanted[count]:
                assert own[count] == drawn[place, last], "not the target's own token"
            assert (found[place, :first] == drawn[place, :first]).all()


def test_an_engine_with_prepared_steps_yields_as_many_tokens() -> None:
    def lengths(*more: str) -> tuple[list[int], float]:
        engine = tiny_engine(
            "engine/kv_cache=paged",
            "engine/scheduler=continuous",
            *more,
            techniques=("synthetic_acceptance",),
            max_num_seqs=4,
            max_model_len=256,
        )
        verifier: Any = engine.parts.components["verifier"]
        found = []
        for mean in (2.0, 4.5):  # what is asked for may change once steps are prepared
            verifier.accept(mean, NUM_DRAFTS)
            engine.clear_cached()
            engine.reset_counters()
            prompts = [[10 + i, 11, 12, 13, 14, 15] for i in range(4)]
            engine.generate(prompts, SamplingParams(max_tokens=200, ignore_eos=True))
            found.append(len(engine.steps))
            mean_found = engine.counters()["verifier.mean_accepted_length"]
            assert mean_found == pytest.approx(mean, abs=0.4)
        kinds = set(getattr(engine.parts.graph_runner, "kinds", ()))
        assert not more or VERIFY in kinds
        return found, mean_found

    assert lengths(*PREPARED) == lengths()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("engine.verifier.mean_accepted_length=6.5", ["6.5", "between 1 and 6"]),
        ("engine.verifier.mean_accepted_length=0.5", ["0.5", "between 1 and 6"]),
        ("engine.verifier.acceptance_curve=[0.5,0.4]", ["2 values", "up to 5"]),
        ("engine.verifier.acceptance_curve=[1.5,1,1,1,1]", ["1.5", "between 0 and 1"]),
        ("engine.verifier.acceptance_curve=[0.5,0.6,0.1,0.1,0.1]", ["never rise"]),
        ("engine.drafter.num_draft_tokens=0", ["num_draft_tokens=0", "1 or more"]),
    ],
)
def test_what_is_impossible_is_named_when_an_engine_is_built(
    override: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as raised:
        tiny_engine(override, techniques=("synthetic_acceptance",))
    assert all(word in str(raised.value) for word in words), raised.value
