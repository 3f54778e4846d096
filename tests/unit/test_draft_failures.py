"""A drafter that raises or proposes rubbish costs its request the drafts, and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from tests.helpers.engines import VOCAB_SIZE, check_idle, tiny_engine
from tests.helpers.tiny_models import hf_greedy, tiny_model
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.engine.drafting import Drafting
from workbench.engine.engine import Engine
from workbench.slots.drafter import DraftContext, Drafter, DraftTokens

PROMPTS = [[9, 9, 9], [80] * 12, [40, 41, 42] * 6]
BAD, NEW_TOKENS, NUM_DRAFTS = 1, 30, 4
Fault = Callable[[], list[int]]


def raising() -> list[int]:
    raise RuntimeError("the drafter broke")


#: What the drafter does for the request ``BAD``, and what the log says of it.
FAULTS: dict[str, tuple[Fault, str]] = {
    "raises": (raising, "RuntimeError: the drafter broke"),
    "outside the vocabulary": (lambda: [3, VOCAB_SIZE], f"ids are 0 to {VOCAB_SIZE - 1}"),
    "negative": (lambda: [-1], f"ids are 0 to {VOCAB_SIZE - 1}"),
    "too many": (lambda: [3] * (NUM_DRAFTS + 1), f"{NUM_DRAFTS + 1} tokens where {NUM_DRAFTS}"),
    "no integers": (lambda: [3.0], "ids are integers"),  # type: ignore[list-item]
    "a tensor": (lambda: torch.tensor([3]), "drafts are a list"),  # type: ignore[arg-type,return-value]
    "nothing at all": (lambda: None, "drafts are a list"),  # type: ignore[arg-type,return-value]
}


class Scripted(Drafter):
    """Repeats the last token, and misbehaves for one request once it has some output."""

    num_lookahead_tokens = NUM_DRAFTS

    def __init__(self, bad: str, fault: Fault) -> None:
        super().__init__()
        self.bad, self.fault = bad, fault
        self.asked: list[str] = []

    def propose(self, context: DraftContext) -> DraftTokens:
        drafts = []
        for name, tokens, limit, prompt in zip(
            context.request_ids,
            context.token_ids,
            context.max_draft_tokens,
            context.num_prompt_tokens,
            strict=True,
        ):
            self.asked.append(name)
            fails = name == self.bad and len(tokens) > prompt + 6 and limit >= NUM_DRAFTS
            drafts.append(self.fault() if fails else [int(tokens[-1])] * min(limit, NUM_DRAFTS))
        return DraftTokens(drafts)

    def finish(self, request_id: str) -> None: ...


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine(f"engine.drafter.num_draft_tokens={NUM_DRAFTS}", techniques=("spec_decode",))


def put_in(engine: Engine, drafter: Drafter) -> None:
    engine.parts.executor.runner.drafting = Drafting(drafter, VOCAB_SIZE)  # type: ignore[attr-defined]
    engine.reset_counters()


@pytest.mark.parametrize("kind", FAULTS)
def test_only_that_request_goes_on_without_drafts(
    engine: Engine, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    fault, words = FAULTS[kind]
    drafter = Scripted(f"{kind}-{BAD}", fault)
    put_in(engine, drafter)
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    names = [engine.add_request(prompt, params, f"{kind}-{i}") for i, prompt in enumerate(PROMPTS)]
    tokens: dict[str, list[int]] = {}
    with caplog.at_level(logging.WARNING):
        while engine.has_unfinished():
            for output in engine.step():
                tokens[output.request_id] = list(output.token_ids)
    folder = tiny_model("llama")
    assert [tokens[n] for n in names] == [hf_greedy(folder, p, NEW_TOKENS) for p in PROMPTS]
    assert engine.counters()["drafter.failures"] == 1
    assert sum(s.num_draft_failures for s in engine.steps) == 1
    (failed_at,) = (i for i, s in enumerate(engine.steps) if s.num_draft_failures)
    later = list(engine.steps)[failed_at + 1 :]
    assert sum(s.num_draft_tokens for s in later) > 0, "the others lost their drafts too"
    last_asked = len(drafter.asked) - 1 - drafter.asked[::-1].index(names[BAD])
    assert drafter.asked[last_asked + 1 :].count(names[0]) > 1
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    for expected in ("Scripted", repr(names[BAD]), words):
        assert expected in record.getMessage()
    check_idle(engine)


def test_an_id_that_comes_again_is_drafted_for_again(engine: Engine) -> None:
    drafter = Scripted("again", raising)
    put_in(engine, drafter)
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    for _ in range(2):
        engine.add_request(PROMPTS[0], params, "again")
        while engine.has_unfinished():
            engine.step()
    engine.add_request(PROMPTS[0], SamplingParams(max_tokens=1), "other")
    engine.step()
    assert engine.counters()["drafter.failures"] == 2


def test_a_drafter_that_answers_for_too_few_or_cannot_forget(engine: Engine) -> None:
    class Lazy(Scripted):
        def propose(self, context: DraftContext) -> DraftTokens:
            return DraftTokens([])

        def finish(self, request_id: str) -> None:
            if request_id != "other":  # of the test before
                raise KeyError(request_id)

    put_in(engine, Lazy("", raising))
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    outputs = engine.generate(PROMPTS, params)
    folder = tiny_model("llama")
    assert [o.token_ids for o in outputs] == [hf_greedy(folder, p, 8) for p in PROMPTS]
    assert engine.counters()["drafter.failures"] == len(PROMPTS)
    engine.generate([PROMPTS[0]], SamplingParams(max_tokens=1))
    assert engine.counters()["drafter.failures"] >= 2 * len(PROMPTS)
    engine.reset_counters()
    assert engine.counters()["drafter.failures"] == 0
    check_idle(engine)


def test_drafts_without_a_verifier_name_those_that_there_are() -> None:
    with pytest.raises(ConfigError) as raised:
        tiny_engine("engine/drafter=ngram")
    for expected in ("engine/drafter=ngram", "engine/verifier=none", "exact_match"):
        assert expected in str(raised.value)
