"""Contract of slot ``verifier``: what is kept equals what brute force would have kept."""

from __future__ import annotations

import random

import pytest
import torch

from tests.helpers.engines import component
from workbench.configuration import options_of
from workbench.core.sampling import SamplingParams
from workbench.slots.sampler import SamplingMetadata
from workbench.slots.verifier import Accepted, DraftsToVerify, Verifier

VOCAB = 6
OPTIONS = options_of("engine/verifier")
every_verifier = pytest.mark.parametrize("option", OPTIONS)


def takes_drafts(option: str) -> bool:
    return bool(component("verifier", option).accepts_drafts)


TAKING = [option for option in OPTIONS if takes_drafts(option)]
EXACT = [o for o in TAKING if component("verifier", o).losslessness == "exact"]


class Case:
    """Drafts of several requests, logits for all their rows, and how they are sampled."""

    def __init__(self, seed: int, num_requests: int, max_drafts: int, temperature: float) -> None:
        rng = random.Random(seed)
        self.drafts = [
            [rng.randrange(VOCAB) for _ in range(rng.randint(0, max_drafts))]
            for _ in range(num_requests)
        ]
        rows = sum(len(d) + 1 for d in self.drafts)
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(rows, VOCAB, generator=generator) * 2
        self.params = [
            SamplingParams(temperature=temperature, seed=seed + i, logprobs=2 if i % 2 else None)
            for i in range(num_requests)
        ]
        self.positions = [rng.randrange(50) for _ in range(num_requests)]

    @property
    def first_rows(self) -> list[int]:
        firsts, row = [], 0
        for draft in self.drafts:
            firsts.append(row)
            row += len(draft) + 1
        return firsts

    def metadata(self) -> SamplingMetadata:
        params, positions = [], []
        for p, first, draft in zip(self.params, self.positions, self.drafts, strict=True):
            params += [p] * (len(draft) + 1)
            positions += list(range(first, first + len(draft) + 1))
        return SamplingMetadata(
            params=params,
            positions=torch.tensor(positions),
            seeds=torch.tensor([p.seed or 0 for p in params]),
            all_greedy=all(p.is_greedy for p in params),
            any_logprobs=any(p.logprobs is not None for p in params),
        )

    def packed(self) -> DraftsToVerify:
        width = max(len(d) for d in self.drafts)
        padded = [d + [-1] * (width - len(d)) for d in self.drafts]
        return DraftsToVerify(
            torch.tensor(padded, dtype=torch.int64).reshape(len(self.drafts), width),
            torch.tensor(self.first_rows),
        )

    def verify(self, verifier: Verifier) -> Accepted:
        sampler = component("sampler", "torch")
        return verifier.verify(self.packed(), self.logits.clone(), self.metadata(), sampler)

    def drawn(self) -> list[int]:
        """The target's own token at every row, one row at a time."""
        sampler, meta = component("sampler", "torch"), self.metadata()
        tokens = []
        for row in range(len(self.logits)):
            one = SamplingMetadata(
                params=[meta.params[row]],
                positions=meta.positions[row : row + 1],
                seeds=meta.seeds[row : row + 1],
                all_greedy=meta.params[row].is_greedy,
            )
            tokens += sampler.sample(self.logits[row : row + 1].clone(), one).token_ids.tolist()
        return tokens

    def brute_force(self) -> list[list[int]]:
        """Append the target's tokens one by one for as long as the draft said the same."""
        drawn, expected = self.drawn(), []
        for first, draft in zip(self.first_rows, self.drafts, strict=True):
            kept = [drawn[first]]
            for offset, token in enumerate(draft):
                if kept[-1] != token:
                    break
                kept.append(drawn[first + offset + 1])
            expected.append(kept)
        return expected


def tokens_of(accepted: Accepted) -> list[list[int]]:
    rows = accepted.token_ids.tolist()
    for row in rows:
        kept = [t for t in row if t >= 0]
        assert row == kept + [-1] * (len(row) - len(kept)), "a hole before the last token"
    return [[t for t in row if t >= 0] for row in rows]


@pytest.mark.parametrize("option", EXACT)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_exact_verification_equals_brute_force(option: str, temperature: float, seed: int) -> None:
    case = Case(seed, num_requests=5, max_drafts=4, temperature=temperature)
    verifier = component("verifier", option)
    accepted = case.verify(verifier)
    assert tokens_of(accepted) == case.brute_force()
    assert accepted.logprobs is not None
    for first, params, kept in zip(case.first_rows, case.params, tokens_of(accepted), strict=True):
        entries = accepted.logprobs[first : first + len(kept)]
        if params.logprobs is None:
            assert entries == [None] * len(kept)
        else:
            assert [e.token_id for e in entries if e is not None] == kept


@pytest.mark.parametrize("option", EXACT)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_right_drafts_are_all_kept_and_wrong_ones_all_dropped(
    option: str, temperature: float
) -> None:
    case = Case(3, num_requests=4, max_drafts=3, temperature=temperature)
    case.drafts = [[0, 0, 0]] * 4
    case.logits = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    drawn = case.drawn()
    for i in (0, 2):
        case.drafts[i] = drawn[4 * i : 4 * i + 3]
    for i in (1, 3):
        case.drafts[i] = [(t + 1) % VOCAB for t in drawn[4 * i : 4 * i + 3]]
    verifier = component("verifier", option)
    kept = tokens_of(case.verify(verifier))
    assert kept == [drawn[0:4], drawn[4:5], drawn[8:12], drawn[12:13]]
    counters = verifier.counters()
    assert counters["verified_tokens"] == 12
    assert counters["accepted_tokens"] == 6
    assert counters["verifications"] == 4
    assert counters["acceptance_rate"] == 6 / 12
    assert counters["mean_accepted_length"] == 1 + 6 / 4
    verifier.reset_counters()
    assert verifier.counters()["accepted_tokens"] == 0


@every_verifier
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_drafts_it_is_the_sampler(option: str, temperature: float) -> None:
    case = Case(7, num_requests=6, max_drafts=0, temperature=temperature)
    accepted = case.verify(component("verifier", option))
    assert accepted.token_ids.shape == (6, 1)
    assert accepted.token_ids.flatten().tolist() == case.drawn()


@pytest.mark.parametrize("option", TAKING)
def test_never_more_than_the_drafts_and_one(option: str) -> None:
    for seed in range(20):
        case = Case(seed, num_requests=4, max_drafts=5, temperature=1.0)
        for draft, kept in zip(
            case.drafts, tokens_of(case.verify(component("verifier", option))), strict=True
        ):
            assert 1 <= len(kept) <= len(draft) + 1
            assert kept[:-1] == draft[: len(kept) - 1]
            assert all(0 <= t < VOCAB for t in kept)


@pytest.mark.parametrize("option", sorted(set(OPTIONS) - set(TAKING)))
def test_a_verifier_that_takes_no_drafts_does_not_pretend(option: str) -> None:
    case = Case(0, num_requests=2, max_drafts=3, temperature=0.0)
    case.drafts = [[1, 2], [3]]
    case.logits = torch.zeros(5, VOCAB)
    with pytest.raises(AssertionError):
        case.verify(component("verifier", option))


@every_verifier
def test_declares_its_losslessness(option: str) -> None:
    assert component("verifier", option).losslessness in ("exact", "distributional", "lossy")
