"""Contract of slot ``drafter``: limits, valid ids, memory by request; against brute force."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests.helpers.engines import component, drafters_by_tokens
from workbench.slots.drafter import DraftContext, Drafter

VOCAB = 12
#: Settings without memory of finished requests, where a drafter has one by default.
FORGETFUL = {"suffix": {"shared_tokens": 0}}
every_drafter = pytest.mark.parametrize("option", drafters_by_tokens())


def propose(
    drafter: Drafter, tokens: dict[str, list[int]], limits: list[int] | None = None
) -> list[list[int]]:
    arrays = [np.asarray(ids, dtype=np.int32) for ids in tokens.values()]
    for array in arrays:
        array.flags.writeable = False
    limits = limits if limits is not None else [100] * len(tokens)
    prompts = [0] * len(tokens)
    return drafter.propose(DraftContext(list(tokens), arrays, limits, prompts)).token_ids


def brute_force(tokens: list[int], limit: int, config: Any) -> list[int]:
    """Prompt lookup as it is told: the longest suffix first, its latest earlier occurrence."""
    limit = min(limit, config.num_draft_tokens)
    for size in range(config.max_ngram, config.min_ngram - 1, -1):
        if limit < 1 or size >= len(tokens):
            continue
        suffix = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == suffix:
                return tokens[start + size : start + size + limit]
    return []


def grow(rng: random.Random, tokens: list[int]) -> None:
    """Append as an engine does: one token, or several that were accepted; often a repetition."""
    for _ in range(rng.randint(1, 4)):
        if len(tokens) > 6 and rng.random() < 0.6:
            tokens.append(tokens[-rng.randint(2, 5)])
        else:
            tokens.append(rng.randrange(VOCAB))


@every_drafter
@pytest.mark.parametrize("seed", range(5))
def test_never_over_its_limits_and_ids_are_valid(option: str, seed: int) -> None:
    drafter = component("drafter", option)
    rng = random.Random(seed)
    tokens = {f"r{i}": [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))] for i in range(5)}
    for step in range(60):
        limits = [rng.choice([0, 0, 1, 2, 50]) for _ in tokens]
        drafts = propose(drafter, tokens, limits)
        assert len(drafts) == len(tokens)
        for draft, limit in zip(drafts, limits, strict=True):
            assert len(draft) <= min(limit, drafter.num_lookahead_tokens)
            assert all(isinstance(t, int) and 0 <= t < VOCAB for t in draft)
        for ids in tokens.values():
            grow(rng, ids)
        if step % 10 == 9:  # one leaves, another takes its id
            drafter.finish("r2")
            tokens["r2"] = [rng.randrange(VOCAB) for _ in range(4)]
    for name in tokens:
        drafter.finish(name)
    drafter.finish("never seen")


@every_drafter
def test_what_a_request_gets_does_not_depend_on_others_or_on_earlier_requests(option: str) -> None:
    rng = random.Random(0)
    together, alone = (
        component("drafter", option, settings=FORGETFUL.get(option)),
        component("drafter", option, settings=FORGETFUL.get(option)),
    )
    tokens = {f"r{i}": [rng.randrange(3) for _ in range(15)] for i in range(4)}
    for _ in range(20):
        beside = propose(together, tokens)
        assert propose(alone, {"r0": tokens["r0"]}) == beside[:1]
        for ids in tokens.values():
            grow(rng, ids)
    together.finish("r0")
    fresh = {"r0": [rng.randrange(3) for _ in range(9)]}
    assert propose(together, fresh) == propose(
        component("drafter", option, settings=FORGETFUL.get(option)), fresh
    )


@every_drafter
def test_forgets_on_finish(option: str) -> None:
    """Nothing of a finished request is kept: the state is as large as before."""
    import pickle

    drafter = component("drafter", option, settings=FORGETFUL.get(option))
    empty = len(pickle.dumps(drafter.__dict__))
    for index in range(20):
        propose(drafter, {f"r{index}": [index % VOCAB] * 30 + list(range(VOCAB))})
        drafter.finish(f"r{index}")
    drafter.reset_counters()
    assert len(pickle.dumps(drafter.__dict__)) <= empty + 8


@every_drafter
def test_counts_what_it_drafts(option: str) -> None:
    drafter = component("drafter", option, settings=FORGETFUL.get(option))
    drafts = propose(drafter, {"a": [1, 2, 3, 4] * 4, "b": [5, 6, 7] * 5})
    total = sum(map(len, drafts))
    assert (total > 0) == (drafter.num_lookahead_tokens > 0)
    assert drafter.counters().get("drafted_tokens", 0) == total
    drafter.reset_counters()
    assert not sum(drafter.counters().values())


SETTINGS = [
    {"num_draft_tokens": 8, "max_ngram": 4, "min_ngram": 2},
    {"num_draft_tokens": 3, "max_ngram": 1, "min_ngram": 1},
    {"num_draft_tokens": 1, "max_ngram": 6, "min_ngram": 3},
    {"num_draft_tokens": 20, "max_ngram": 3, "min_ngram": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_ngram_equals_brute_force_prompt_lookup(settings: dict[str, int], seed: int) -> None:
    drafter = component("drafter", "ngram", settings=settings)
    rng = random.Random(seed)
    width = rng.choice([2, 3, VOCAB])
    tokens = {f"r{i}": [rng.randrange(width) for _ in range(rng.randint(1, 25))] for i in range(4)}
    found = 0
    for step in range(40):
        limits = [rng.choice([0, 1, 5, 50]) for _ in tokens]
        expected = [
            brute_force(ids, limit, drafter.config)
            for ids, limit in zip(tokens.values(), limits, strict=True)
        ]
        assert propose(drafter, tokens, limits) == expected
        found += sum(map(len, expected))
        for ids in tokens.values():
            grow(rng, ids)
        if step == 20:
            drafter.finish("r1")
            tokens["r1"] = [rng.randrange(width) for _ in range(3)]
    assert found >= 10, "the traffic repeats too little to test anything"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"min_ngram": 0}, "min_ngram"),
        ({"min_ngram": 3, "max_ngram": 2}, "max_ngram"),
        ({"num_draft_tokens": 0}, "num_draft_tokens"),
    ],
)
def test_ngram_refuses_impossible_settings(settings: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        component("drafter", "ngram", settings=settings)
