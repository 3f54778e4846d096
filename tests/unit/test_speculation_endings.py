"""Ends inside a draft, log-probabilities, penalties and seeds: as without speculation, for every
drafter and verifier whose greedy tokens are the target's."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from techniques.adaptive_drafts.costs import StepCosts
from tests.helpers.engines import check_idle, markers_here, shared_engine, tiny_engine
from workbench.core.outputs import RequestOutput
from workbench.core.request import FinishReason
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine

STARTS = [[9, 9, 9], [80] * 12, [40, 41, 42] * 6]
LEARNT, NEW = 40, 30
LONG = {"max_model_len": 128}
SHORT_NGRAMS = ("engine.drafter.min_ngram=1",)
EAGER_CONTROLLER = (
    "engine.draft_length.allowance=1000",
    "engine.draft_length.max_gap_steps=1",
)
WAYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ngram": (("spec_decode",), SHORT_NGRAMS),
    "suffix": (("suffix_decoding",), ()),
    "suffix tree": (("suffix_decoding", "suffix_tree"), ()),
    "eagle tree": (("eagle", "eagle_tree"), ()),
    "medusa tree": (("medusa", "medusa_tree"), ()),
    "rejection": (("rejection_sampling",), SHORT_NGRAMS),
    "typical": (("typical_acceptance",), SHORT_NGRAMS),
    "draft model": (("draft_model",), ()),
    "adaptive ngram": (("spec_decode", "adaptive_drafts"), (*SHORT_NGRAMS, *EAGER_CONTROLLER)),
    "adaptive suffix": (("suffix_decoding", "adaptive_drafts"), EAGER_CONTROLLER),
    "paged": (
        ("paged_attention", "continuous_batching", "radix_cache", "suffix_decoding"),
        ("engine.kv_cache.block_size=4",),
    ),
}
#: Of those, the ones whose random draws are the target's own.
EXACT = [
    way
    for way, (techniques, _) in WAYS.items()
    if all(markers_here()[name].losslessness == "exact" for name in techniques)
]
every_way = pytest.mark.parametrize("way", WAYS)
exact_way = pytest.mark.parametrize("way", EXACT)


@pytest.fixture(autouse=True)
def drafts_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps cost what they would on hardware with compute to spare, however busy this one is."""
    add = StepCosts.add

    def add_fixed(self: StepCosts, num_requests: int, num_drafts: int, seconds: float) -> None:
        add(self, num_requests, num_drafts, 1e-3 * (1 + 0.01 * num_drafts))

    monkeypatch.setattr(StepCosts, "add", add_fixed)


@functools.cache
def plain() -> Engine:
    return tiny_engine(max_num_seqs=3, **LONG)


def drafting(way: str) -> Engine:
    techniques, settings = WAYS[way]
    engine = shared_engine(*settings, techniques=techniques, max_num_seqs=3, **LONG)
    engine.clear_cached()
    return engine


@functools.cache
def prompts() -> list[list[int]]:
    """Prompts that hold what the target goes on to write, so that drafts are right at once."""
    params = SamplingParams(max_tokens=LEARNT, ignore_eos=True)
    outputs = plain().generate(STARTS, params)
    return [start + o.token_ids for start, o in zip(STARTS, outputs, strict=True)]


def check_same(found: RequestOutput, wanted: RequestOutput) -> None:
    """What a user sees is equal, log-probabilities but for how sums are rounded."""
    for got, other in zip(found.outputs, wanted.outputs, strict=True):
        assert got.token_ids == other.token_ids
        assert (got.text, got.finish_reason, got.stop_reason) == (
            other.text,
            other.finish_reason,
            other.stop_reason,
        )
        assert (got.logprobs is None) == (other.logprobs is None)
        for e, f in zip(got.logprobs or [], other.logprobs or [], strict=True):
            assert (e.token_id, [t for t, _ in e.top]) == (f.token_id, [t for t, _ in f.top])
            values = [f.logprob, *(v for _, v in f.top)]
            assert [e.logprob, *(v for _, v in e.top)] == pytest.approx(values, abs=1e-4)


def compare(way: str, params: SamplingParams | list[SamplingParams]) -> list[RequestOutput]:
    """Serve the prompts both ways; the outputs, which are equal."""
    engine = drafting(way)
    found = engine.generate(prompts(), params)
    expected = plain().generate(prompts(), params)
    for got, wanted in zip(found, expected, strict=True):
        check_same(got, wanted)
    check_idle(engine)
    return found


def cuts(engine: Engine) -> int:
    """Steps of one request that verified more tokens than it got: it ended inside a draft."""
    return sum(
        s.num_draft_tokens > 0 and 1 + s.num_accepted_tokens > s.num_output_tokens
        for s in engine.steps
    )


def continuation(index: int, count: int = NEW) -> list[int]:
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    return plain().generate([prompts()[index]], params)[0].token_ids


@every_way
def test_stop_ids_inside_a_draft(way: str) -> None:
    engine, num_cuts = drafting(way), 0
    for index, prompt in enumerate(prompts()):
        written = continuation(index)
        for stop in sorted(set(written)):
            engine.reset_counters()
            params = SamplingParams(max_tokens=NEW, stop_token_ids=(stop,), ignore_eos=True)
            (output,) = engine.generate([prompt], params)
            assert output.token_ids == written[: written.index(stop) + 1]
            assert output.outputs[0].finish_reason is FinishReason.STOP
            num_cuts += cuts(engine)
    assert num_cuts > 0, "no stop id was inside a draft"
    check_idle(engine)


@every_way
def test_stop_strings_inside_a_draft(way: str) -> None:
    tokenizer = plain().tokenizer
    assert tokenizer is not None
    engine, num_stops = drafting(way), 0
    for index, prompt in enumerate(prompts()):
        for place in (2, 5, 9):
            text = tokenizer.decode([continuation(index)[place]])
            if not text.strip():
                continue
            params = SamplingParams(max_tokens=NEW, stop=(text,), ignore_eos=True, logprobs=1)
            (found,) = engine.generate([prompt], params)
            (wanted,) = plain().generate([prompt], params)
            check_same(found, wanted)
            num_stops += found.outputs[0].finish_reason is FinishReason.STOP
    assert num_stops > 0, "no stop string was found"
    assert engine.counters()["verifier.accepted_tokens"] > 0
    check_idle(engine)


@every_way
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 8, 13])
def test_max_tokens_inside_a_draft(way: str, max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    outputs = compare(way, params)
    assert [len(o.token_ids) for o in outputs] == [max_tokens] * len(STARTS)
    assert drafting(way).counters()["drafter.failures"] == 0


@every_way
def test_log_probabilities_of_accepted_tokens(way: str) -> None:
    outputs = compare(way, SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=3))
    for output in outputs:
        (completion,) = output.outputs
        assert completion.logprobs is not None
        assert [e.token_id for e in completion.logprobs] == completion.token_ids


PENALTIES: list[dict[str, float]] = [
    {"repetition_penalty": 1.1},
    {"presence_penalty": 0.3},
    {"frequency_penalty": 0.05},
    {"repetition_penalty": 1.05, "presence_penalty": 0.1, "frequency_penalty": 0.02},
]


@every_way
@pytest.mark.parametrize("penalties", PENALTIES, ids="+".join)
def test_penalties_change_with_the_drafts_before(way: str, penalties: dict[str, float]) -> None:
    engine = drafting(way)
    compare(way, SamplingParams(max_tokens=NEW, ignore_eos=True, **penalties))  # type: ignore[arg-type]
    assert engine.counters()["verifier.verified_tokens"] > 0


@exact_way
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.3},
        {"temperature": 0.8, "top_p": 0.7, "top_k": 5, "min_p": 0.1},
        {"temperature": 0.5, "repetition_penalty": 1.1, "frequency_penalty": 0.1, "logprobs": 2},
        {"temperature": 0.4, "n": 2},
    ],
    ids="+".join,
)
def test_seeded_draws(way: str, fields: dict[str, Any]) -> None:
    engine = drafting(way)
    compare(way, SamplingParams(max_tokens=NEW, ignore_eos=True, seed=11, **fields))
    assert engine.counters()["verifier.accepted_tokens"] > 0


@exact_way
def test_each_request_of_a_batch_in_its_own_way(way: str) -> None:
    stop = continuation(1)[4]
    compare(
        way,
        [
            SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.4, seed=3, logprobs=1),
            SamplingParams(max_tokens=NEW, ignore_eos=True, stop_token_ids=(stop,)),
            SamplingParams(max_tokens=7, ignore_eos=True, repetition_penalty=1.1),
        ],
    )


@pytest.mark.parametrize("way", sorted(set(WAYS) - set(EXACT)))
def test_draws_of_another_law_or_path_are_repeated_by_their_seed(way: str) -> None:
    """Beside greedy requests, which keep the target's tokens."""
    engine = drafting(way)
    params = [
        SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.5, seed=3, logprobs=1),
        SamplingParams(max_tokens=NEW, ignore_eos=True),
        SamplingParams(max_tokens=7, ignore_eos=True, temperature=0.8, seed=4),
    ]
    first, again = ([o.token_ids for o in engine.generate(prompts(), params)] for _ in range(2))
    assert first == again
    assert first[1] == continuation(1)
    assert [len(tokens) for tokens in first] == [NEW, NEW, 7]
    assert engine.counters()["verifier.accepted_tokens"] > 0
    alone = engine.generate([prompts()[0]], params[0])[0].token_ids
    assert alone == first[0], "a request's draws depend on its batch"
