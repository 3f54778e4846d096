"""Verifiers that claim it keep the target's distribution: 200,000 chains a sampler setting.

A toy target draws each of three tokens by the one before it. Two are drafted, by a drafter of other
habits; the verifier keeps what it keeps, and a chain that it leaves short goes on with the target's
own draws. The joint law of the three must then be the target's. For ``C`` possible chains and ``N``
draws of the right law, the total variation from it is at most ``sqrt(C / N) / 2`` on average
(Cauchy-Schwarz over the cells' deviations), and exceeds that by ``sqrt(ln(1 / d) / (2 N))`` with
probability ``d`` at most (McDiarmid: one draw moves it by ``1 / N``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.engines import component
from workbench.configuration import options_of
from workbench.core.sampling import SamplingParams
from workbench.engine.trees import depths_of
from workbench.slots.sampler import SamplingMetadata, invert_cdf, target_probs, uniform_from_seed
from workbench.slots.verifier import Accepted, DraftsToVerify, TreeShape, Verifier

VOCAB, NUM_TOKENS, NUM_DRAFTS, FIRST = 5, 3, 2, 0
NUM_DRAWS = 200_000
FAILURE_RATE = 1e-6
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "cold": {"temperature": 0.6},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_p": {"temperature": 1.2, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.3},
    "all of them": {"temperature": 0.8, "top_k": 4, "top_p": 0.9, "min_p": 0.1},
}
LOGITS = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(5)) * 1.2
#: By the token before, as the target's, but of another mind.
DRAFTER = torch.softmax(
    0.5 * LOGITS + torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(6)), -1
)


def takes_drafts(option: str) -> bool:
    return bool(component("verifier", option).accepts_drafts)


KEEPING = [
    option
    for option in options_of("engine/verifier")
    if takes_drafts(option) and component("verifier", option).losslessness != "lossy"
]

TREE_KEEPING = [option for option in KEEPING if component("verifier", option).verifies_trees]


def law(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Temperature, top-k, top-p, min-p, told plainly for one row."""
    weights = np.exp((logits - logits.max()) / p.temperature)
    order = np.argsort(-weights, kind="stable")
    if p.top_k:
        weights[order[p.top_k :]] = 0
    weights /= weights.sum()
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= p.top_p]] = 0
    weights[weights < p.min_p * weights.max()] = 0
    return weights / weights.sum()


def laws(params: SamplingParams) -> torch.Tensor:
    """Law of the next token by the one before, ``[V, V]``."""
    return torch.tensor(np.stack([law(row.double().numpy(), params) for row in LOGITS]))


def true_joint(params: SamplingParams) -> torch.Tensor:
    step = laws(params)
    joint = step[FIRST]
    for _ in range(NUM_TOKENS - 1):
        joint = joint.unsqueeze(-1) * step
    return joint


def draw(probs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def verified_chains(
    verifier: Verifier, params: SamplingParams, count: int, *, with_probs: bool
) -> torch.Tensor:
    """Chains ``[N, 3]`` that a verifier and, where it stops short, the target's draws give."""
    generator = torch.Generator().manual_seed(1)
    drafts = torch.empty(count, NUM_DRAFTS, dtype=torch.int64)
    before = torch.full((count,), FIRST)
    contexts = [before]
    for place in range(NUM_DRAFTS):
        before = drafts[:, place] = draw(DRAFTER[before], generator)
        contexts.append(before)
    behind = torch.stack(contexts, 1)  # the token behind each row of logits
    accepted = verifier.verify(
        DraftsToVerify(
            drafts,
            torch.arange(count) * (NUM_DRAFTS + 1),
            DRAFTER[behind[:, :-1]] if with_probs else None,
        ),
        LOGITS[behind.flatten()],
        SamplingMetadata(
            params=[params] * behind.numel(),
            positions=torch.arange(7, 7 + NUM_TOKENS).repeat(count),
            seeds=torch.arange(count).repeat_interleave(NUM_TOKENS),
            all_greedy=params.is_greedy,
        ),
        component("sampler", "torch"),
    )
    chains, step = accepted.token_ids.clone(), laws(params).float()
    for place in range(1, NUM_TOKENS):
        short = chains[:, place] < 0
        chains[short, place] = draw(step[chains[short, place - 1]], generator)
    return chains


#: Six drafts: two that may come first, and two behind each.
TREE = [-1, -1, 0, 0, 1, 1]


def verified_tree_chains(
    verifier: Verifier, params: SamplingParams, count: int, *, with_probs: bool
) -> torch.Tensor:
    """As :func:`verified_chains`, of trees whose siblings are drawn without replacement."""
    generator = torch.Generator().manual_seed(2)
    drafts = torch.empty(count, len(TREE), dtype=torch.int64)
    probs = torch.empty(count, len(TREE), VOCAB)
    for node, parent in enumerate(TREE):
        before = torch.full((count,), FIRST) if parent < 0 else drafts[:, parent]
        left = DRAFTER[before].clone()
        for sibling in range(node):
            if TREE[sibling] == parent:
                left.scatter_(1, drafts[:, sibling : sibling + 1], 0.0)
        probs[:, node] = left / left.sum(-1, keepdim=True)
        drafts[:, node] = draw(left, generator)
    behind = torch.cat([torch.full((count, 1), FIRST), drafts], 1)
    depths = torch.tensor(depths_of(TREE))
    shape = TreeShape(
        (torch.tensor(TREE) + 1).expand(count, -1), depths.expand(count, -1), int(depths.max())
    )
    width = len(TREE) + 1
    accepted = verifier.verify(
        DraftsToVerify(
            drafts, torch.arange(count) * width, probs if with_probs else None, tree=shape
        ),
        LOGITS[behind.flatten()],
        SamplingMetadata(
            params=[params] * behind.numel(),
            positions=(torch.cat([torch.zeros(1, dtype=torch.int64), depths]) + 7).repeat(count),
            seeds=torch.arange(count).repeat_interleave(width),
            all_greedy=params.is_greedy,
        ),
        component("sampler", "torch"),
    )
    chains, step = accepted.token_ids.clone(), laws(params).float()
    for place in range(1, NUM_TOKENS):
        short = chains[:, place] < 0
        chains[short, place] = draw(step[chains[short, place - 1]], generator)
    return chains


def distance(chains: torch.Tensor, joint: torch.Tensor) -> float:
    """Total variation between the chains' frequencies and their law."""
    flat = (chains[:, 0] * VOCAB + chains[:, 1]) * VOCAB + chains[:, 2]
    counts = torch.bincount(flat, minlength=VOCAB**NUM_TOKENS).double()
    return float((counts / len(chains) - joint.flatten()).abs().sum() / 2)


def bound(count: int) -> float:
    cells = VOCAB**NUM_TOKENS
    return 0.5 * math.sqrt(cells / count) + math.sqrt(math.log(1 / FAILURE_RATE) / (2 * count))


@pytest.mark.parametrize("with_probs", [False, True], ids=["one-hot", "probabilistic"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("option", KEEPING)
def test_total_variation_is_within_the_bound(option: str, setting: str, with_probs: bool) -> None:
    params = SamplingParams(**SETTINGS[setting])
    verifier = component("verifier", option)
    chains = verified_chains(verifier, params, NUM_DRAWS, with_probs=with_probs)
    assert distance(chains, true_joint(params)) < bound(NUM_DRAWS)
    rate = verifier.counters()["acceptance_rate"]
    assert 0.02 < rate < 0.98, "too few or too many drafts are accepted to test anything"


@pytest.mark.parametrize("with_probs", [False, True], ids=["one-hot", "probabilistic"])
@pytest.mark.parametrize("setting", ["temperature", "top_p", "all of them"])
@pytest.mark.parametrize("option", TREE_KEEPING)
def test_total_variation_of_trees_is_within_the_bound(
    option: str, setting: str, with_probs: bool
) -> None:
    params = SamplingParams(**SETTINGS[setting])
    verifier = component("verifier", option)
    chains = verified_tree_chains(verifier, params, NUM_DRAWS, with_probs=with_probs)
    assert distance(chains, true_joint(params)) < bound(NUM_DRAWS)
    counts = verifier.counters()
    assert 0.1 < counts["accepted_at_2"] / counts["accepted_at_1"] < 0.98
    assert 0.02 < counts["acceptance_rate"] < 0.98


class ForgetsSiblings(Verifier):
    """Wrong on purpose: a draft is tested as if none before it had been rejected."""

    def verify(
        self, drafts: DraftsToVerify, logits: torch.Tensor, metadata: SamplingMetadata, sampler: Any
    ) -> Accepted:
        assert drafts.tree is not None
        probs = target_probs(logits, metadata)
        probs /= probs.sum(-1, keepdim=True)
        rows = drafts.rows(len(logits))
        at = torch.zeros_like(rows[:, 0])
        for place, ids in enumerate(drafts.token_ids.unbind(1), start=1):
            row = rows.gather(1, at.unsqueeze(1)).squeeze(1)
            p = probs[row].gather(1, ids.unsqueeze(1)).squeeze(1)
            test = uniform_from_seed(metadata.seeds[row] * 77 + place, metadata.positions[row])
            passes = (test < p) & (drafts.tree.parents[:, place - 1] == at)
            at = torch.where(passes, place, at)
        row = rows.gather(1, at.unsqueeze(1)).squeeze(1)
        uniform = uniform_from_seed(metadata.seeds[row], metadata.positions[row])
        path = drafts.path(at)
        return Accepted(drafts.keep_path(path, invert_cdf(probs[row], uniform)), path=path)


def test_a_wrong_verifier_of_trees_is_found_out() -> None:
    params = SamplingParams(temperature=1.0)
    chains = verified_tree_chains(ForgetsSiblings(), params, NUM_DRAWS, with_probs=False)
    assert distance(chains, true_joint(params)) > 2 * bound(NUM_DRAWS)


class Redraws(Verifier):
    """Wrong on purpose: where a draft is rejected, it draws from the whole distribution."""

    def verify(
        self, drafts: DraftsToVerify, logits: torch.Tensor, metadata: SamplingMetadata, sampler: Any
    ) -> Accepted:
        probs = target_probs(logits, metadata)
        probs /= probs.sum(-1, keepdim=True)
        rows = drafts.rows(len(logits))
        p = probs[rows[:, :-1], drafts.token_ids].double()
        q = torch.ones_like(p)
        if drafts.probs is not None:
            q = drafts.probs.gather(-1, drafts.token_ids.unsqueeze(-1)).squeeze(-1).double()
        test = uniform_from_seed(metadata.seeds * 77 + 5, metadata.positions)[rows[:, :-1]]
        num_accepted = (test * q < p).long().cumprod(1).sum(1)
        row = rows.gather(1, num_accepted.unsqueeze(1)).squeeze(1)
        uniform = uniform_from_seed(metadata.seeds[row], metadata.positions[row])
        return Accepted(drafts.keep(num_accepted, invert_cdf(probs[row], uniform)))


class SameNumber(Verifier):
    """Wrong on purpose: the number that rejected a draft draws the token that takes its place."""

    def verify(
        self, drafts: DraftsToVerify, logits: torch.Tensor, metadata: SamplingMetadata, sampler: Any
    ) -> Accepted:
        probs = target_probs(logits, metadata)
        probs /= probs.sum(-1, keepdim=True)
        rows = drafts.rows(len(logits))
        uniform = uniform_from_seed(metadata.seeds, metadata.positions)
        p = probs[rows[:, :-1], drafts.token_ids]
        num_accepted = (uniform[rows[:, :-1]] < p).long().cumprod(1).sum(1)
        row = rows.gather(1, num_accepted.unsqueeze(1)).squeeze(1)
        ids = torch.nn.functional.pad(drafts.token_ids, (0, 1), value=-1)
        at = ids.gather(1, num_accepted.unsqueeze(1))
        final = probs[row].scatter(1, at.clamp(min=0), 0.0)
        final = torch.where(at >= 0, final, probs[row])
        return Accepted(drafts.keep(num_accepted, invert_cdf(final, uniform[row])))


@pytest.mark.parametrize("with_probs", [False, True], ids=["one-hot", "probabilistic"])
@pytest.mark.parametrize("wrong", [Redraws, SameNumber])
def test_a_wrong_verifier_is_found_out(wrong: type[Verifier], with_probs: bool) -> None:
    params = SamplingParams(temperature=1.0)
    chains = verified_chains(wrong(), params, NUM_DRAWS, with_probs=with_probs)
    assert distance(chains, true_joint(params)) > 2 * bound(NUM_DRAWS)


def test_the_target_s_own_draws_are_within_the_bound() -> None:
    params, generator = SamplingParams(temperature=1.0), torch.Generator().manual_seed(3)
    step = laws(params).float()
    chain = [torch.full((NUM_DRAWS,), FIRST)]
    for _ in range(NUM_TOKENS):
        chain.append(draw(step[chain[-1]], generator))
    assert distance(torch.stack(chain[1:], 1), true_joint(params)) < bound(NUM_DRAWS)


@pytest.mark.parametrize("option", KEEPING)
def test_probabilistic_drafts_are_accepted_as_often_as_the_laws_overlap(option: str) -> None:
    """The acceptance rate of the first draft, of which exact matching is a lower bound."""
    params = SamplingParams(temperature=1.0)
    verifier = component("verifier", option)
    verified_chains(verifier, params, NUM_DRAWS, with_probs=True)
    rate = verifier.counters()["accepted_at_1"] / verifier.counters()["verified_at_1"]
    p, q = laws(params)[FIRST], DRAFTER[FIRST].double()
    overlap, match = float(torch.minimum(p, q).sum()), float((p * q).sum())
    expected = match if verifier.losslessness == "exact" else overlap
    assert match < overlap - 0.1
    assert rate == pytest.approx(expected, abs=5 * math.sqrt(0.25 / NUM_DRAWS))
