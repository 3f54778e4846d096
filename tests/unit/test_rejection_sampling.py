"""Rejection sampling beside greedy rows, log-probabilities, penalties, and through the engine."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from techniques.rejection_sampling import Rejection
from tests.helpers.engines import VOCAB_SIZE, check_idle, component, tiny_engine
from workbench.core.sampling import SamplingParams
from workbench.engine.drafting import Drafting
from workbench.slots.drafter import DraftContext, Drafter, DraftTokens
from workbench.slots.sampler import Sampler, SamplingMetadata
from workbench.slots.verifier import Accepted, DraftsToVerify

VOCAB, NUM_DRAFTS = 7, 3
SAMPLER: Sampler = component("sampler", "torch")


def batch(
    params: list[SamplingParams], drafts: list[list[int]], seed: int = 0
) -> tuple[DraftsToVerify, torch.Tensor, SamplingMetadata]:
    """Requests of so many drafts each, with random logits and seeds by their place."""
    generator = torch.Generator().manual_seed(seed)
    firsts, rows, positions, seeds = [], [], [], []
    for i, draft in enumerate(drafts):
        firsts.append(len(rows))
        rows += [params[i]] * (len(draft) + 1)
        positions += range(10 * i, 10 * i + len(draft) + 1)
        seeds += [i] * (len(draft) + 1)
    width = max(map(len, drafts))
    padded = [d + [-1] * (width - len(d)) for d in drafts]
    return (
        DraftsToVerify(torch.tensor(padded), torch.tensor(firsts)),
        torch.randn(len(rows), VOCAB, generator=generator) * 2,
        SamplingMetadata(
            params=rows,
            positions=torch.tensor(positions),
            seeds=torch.tensor(seeds),
            all_greedy=all(p.is_greedy for p in rows),
            any_logprobs=any(p.logprobs is not None for p in rows),
        ),
    )


def lists(accepted: Accepted) -> list[list[int]]:
    return [[t for t in row if t >= 0] for row in accepted.token_ids.tolist()]


@pytest.mark.parametrize("seed", range(10))
def test_greedy_requests_and_those_without_drafts_are_as_without_it(seed: int) -> None:
    greedy, random = SamplingParams(), SamplingParams(temperature=1.0)
    params = [greedy, random, greedy, random]
    drafts = [[1, 2, 3], [4, 5], [6], []]
    drafts_in, logits, metadata = batch(params, drafts, seed)
    likeliest = logits.argmax(-1).tolist()
    drafts[0][:2] = likeliest[:2]
    drafts_in = dataclasses.replace(drafts_in, token_ids=drafts_in.token_ids.clone())
    drafts_in.token_ids[0, :2] = torch.tensor(likeliest[:2])
    own = SAMPLER.sample(logits.clone(), metadata).token_ids.tolist()
    kept = lists(Rejection().verify(drafts_in, logits.clone(), metadata, SAMPLER))
    exact = lists(
        component("verifier", "exact_match").verify(drafts_in, logits.clone(), metadata, SAMPLER)
    )
    assert (kept[0], kept[2]) == (exact[0], exact[2])
    assert kept[3] == own[-1:]


def test_a_request_s_tokens_do_not_depend_on_its_batch() -> None:
    params = [SamplingParams(temperature=1.0), SamplingParams(temperature=0.5, top_k=3)]
    drafts_in, logits, metadata = batch(params, [[1, 2, 3], [4, 5]])
    together = lists(Rejection().verify(drafts_in, logits.clone(), metadata, SAMPLER))
    again = lists(Rejection().verify(drafts_in, logits.clone(), metadata, SAMPLER))
    alone = SamplingMetadata(
        params=metadata.params[4:],
        positions=metadata.positions[4:],
        seeds=metadata.seeds[4:],
        all_greedy=False,
    )
    second = DraftsToVerify(torch.tensor([[4, 5]]), torch.tensor([0]))
    assert together == again
    assert lists(Rejection().verify(second, logits[4:].clone(), alone, SAMPLER)) == together[1:]


def test_log_probabilities_are_those_of_the_raw_distribution() -> None:
    params = [SamplingParams(temperature=0.7, top_k=2, logprobs=2), SamplingParams(temperature=1.0)]
    for seed in range(5):
        drafts_in, logits, metadata = batch(params, [[1, 2, 3], [4]], seed)
        accepted = Rejection().verify(drafts_in, logits.clone(), metadata, SAMPLER)
        assert accepted.logprobs is not None
        scores = torch.log_softmax(logits, -1)
        for row, token in enumerate(lists(accepted)[0]):
            entry = accepted.logprobs[row]
            assert entry is not None and entry.token_id == token
            assert entry.logprob == pytest.approx(float(scores[row, token]), abs=1e-5)
            assert len(entry.top) == 2
        assert accepted.logprobs[4:] == [None, None]


def test_penalties_follow_the_drafts_before_each_row() -> None:
    """20,000 verifications of one chain: the law of the second token given an accepted first."""
    count, context = 20_000, [0]
    params = SamplingParams(temperature=1.0, presence_penalty=1.5, repetition_penalty=1.3)
    logits = torch.tensor([1.0, 2.0, 0.5, -1.0])
    contexts = [torch.tensor(context), torch.tensor([*context, 1])]
    metadata = SamplingMetadata(
        params=[params] * (2 * count),
        positions=torch.tensor([1, 2]).repeat(count),
        seeds=torch.arange(count).repeat_interleave(2),
        all_greedy=False,
        any_penalties=True,
        contexts=contexts * count,
        num_prompt_tokens=[1] * (2 * count),
    )
    drafts = DraftsToVerify(torch.ones(count, 1, dtype=torch.int64), torch.arange(count) * 2)
    kept = Rejection().verify(drafts, logits.repeat(2 * count, 1), metadata, SAMPLER).token_ids
    expected_first = torch.softmax(torch.tensor([1.0 / 1.3, 2.0, 0.5, -1.0]), 0)
    expected_second = torch.softmax(torch.tensor([1.0 / 1.3, 2.0 / 1.3 - 1.5, 0.5, -1.0]), 0)
    for tokens, expected in (
        (kept[:, 0], expected_first),
        (kept[kept[:, 1] >= 0, 1], expected_second),
    ):
        size = len(tokens)
        found = torch.bincount(tokens, minlength=4) / size
        bound = 0.5 * math.sqrt(4 / size) + math.sqrt(math.log(1e6) / (2 * size))
        assert size > count / 4
        assert float((found - expected).abs().sum() / 2) < bound


class Drawing(Drafter):
    """Draws drafts from distributions of its own for even requests, and is certain for odd ones."""

    num_lookahead_tokens = NUM_DRAFTS

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.given: dict[tuple[int, ...], torch.Tensor | None] = {}

    def propose(self, context: DraftContext) -> DraftTokens:
        drafts, probs = [], []
        for name, limit in zip(context.request_ids, context.max_draft_tokens, strict=True):
            count = min(limit, NUM_DRAFTS)
            drawn_from = torch.rand(NUM_DRAFTS, VOCAB_SIZE, generator=self.generator)
            drawn_from /= drawn_from.sum(-1, keepdim=True)
            draft = torch.multinomial(drawn_from, 1, generator=self.generator)[:count, 0].tolist()
            is_even = int(name[-1]) % 2 == 0
            drafts.append(draft)
            probs.append(drawn_from if is_even else None)
            self.given[tuple(draft)] = drawn_from if is_even else None
        return DraftTokens(drafts, probs)

    def finish(self, request_id: str) -> None: ...


def test_probabilities_reach_the_verifier_with_their_drafts() -> None:
    engine = tiny_engine(
        f"engine.drafter.num_draft_tokens={NUM_DRAFTS}",
        techniques=("rejection_sampling",),
        max_num_seqs=3,
    )
    runner = engine.parts.executor.runner  # type: ignore[attr-defined]
    drafter, verifier = Drawing(), runner.parts.verifier
    runner.drafting = Drafting(drafter, VOCAB_SIZE)
    seen = []

    def spy(drafts: DraftsToVerify, *rest: object) -> Accepted:
        for b, row in enumerate(drafts.token_ids.tolist()):
            draft = [t for t in row if t >= 0]
            if draft:
                assert drafts.probs is not None or drafter.given[tuple(draft)] is None
            if draft and drafts.probs is not None:
                seen.append((draft, drafts.probs[b, : len(draft)].clone()))
        return verify(drafts, *rest)  # type: ignore[arg-type]

    verify, verifier.verify = verifier.verify, spy
    params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, seed=1)
    for i in range(5):
        engine.add_request([10 + i, 11, 12], params, f"r{i}")
    while engine.has_unfinished():
        engine.step()
    assert engine.counters()["drafter.failures"] == 0
    kinds = set()
    for draft, probs in seen:
        given = drafter.given[tuple(draft)]
        kinds.add(given is not None)
        if given is None:
            assert torch.equal(probs, torch.nn.functional.one_hot(torch.tensor(draft), VOCAB_SIZE))
        else:
            assert torch.equal(probs, given[: len(draft)])
    assert kinds == {True, False}
    check_idle(engine)


def test_probabilities_of_another_shape_are_a_failure() -> None:
    class Narrow(Drawing):
        def propose(self, context: DraftContext) -> DraftTokens:
            return DraftTokens([[1, 2]], torch.ones(1, 2, VOCAB_SIZE - 1))

    drafting = Drafting(Narrow(), VOCAB_SIZE)
    context = DraftContext(["r0"], [torch.arange(4).numpy()], [3], [4])
    assert drafting.propose(context).token_ids == [[]]
    assert drafting.take_num_failures() == 1
