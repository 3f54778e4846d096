"""Random arrivals, aborts and lulls on real tiny engines: every request gets its own tokens.

What is kept from step to step (rows, block tables, positions) must survive any change of who runs.
Every technique runs alone, and every two that go together run in at least one of a few groups, each
as large as can be: that each pair serves as a pair is what test_pairs is for.
"""

from __future__ import annotations

import functools
import itertools
import random

import pytest

from tests.helpers.engines import (
    TECHNIQUES,
    check_idle,
    declared_conflict,
    mixed_prompts,
    shared_engine,
    weakest_class,
    with_requirements,
)
from tests.helpers.tiny_models import hf_greedy, tiny_model
from tests.pairs.test_pairs import COMPATIBLE, build
from workbench.core.sampling import SamplingParams

NUM_PROMPTS = 12
PROMPTS = mixed_prompts(NUM_PROMPTS, seed=4, longest=30)
MAX_NEW = 20


PAIRS = {frozenset(names) for names in COMPATIBLE if len(names) == 2}


def pairs_in(names: tuple[str, ...]) -> set[frozenset[str]]:
    return {frozenset(pair) for pair in itertools.combinations(with_requirements(names), 2)}


def groups() -> list[tuple[str, ...]]:
    """Groups that nothing can join which promises as much of its tokens, chosen so that few of them
    have every pair."""
    singles = [names for names in COMPATIBLE if len(names) == 1]
    left, found = set(PAIRS), []
    while left:

        def num_new(names: tuple[str, ...]) -> int:
            return len(pairs_in(names) & left)  # noqa: B023 - called at once

        group = max(sorted(tuple(sorted(pair)) for pair in left), key=num_new)
        while True:
            wider = [(*group, *single) for single in singles if single[0] not in group]
            wider = [
                names
                for names in wider
                if not declared_conflict(names) and weakest_class(names) == weakest_class(group)
            ]
            if not wider:
                break
            group = max(wider, key=num_new)
        left -= pairs_in(group)
        found.append(tuple(name for name in TECHNIQUES if name in group))
    return found


SINGLES_AND_GROUPS = [*(names for names in COMPATIBLE if len(names) == 1), *groups()]


def test_every_pair_is_in_a_group() -> None:
    together = set().union(*map(pairs_in, SINGLES_AND_GROUPS))
    assert together >= PAIRS
    assert len(PAIRS) > 5 * len(SINGLES_AND_GROUPS) / 2


@functools.cache
def expected(index: int, is_drawn: bool) -> tuple[int, ...]:
    """HF's greedy tokens, or the bare engine's draws, of one prompt."""
    if not is_drawn:
        return tuple(hf_greedy(tiny_model("llama"), PROMPTS[index], MAX_NEW))
    (output,) = shared_engine(max_num_seqs=3).generate(
        [PROMPTS[index]], params(index, True, MAX_NEW)
    )
    return tuple(output.token_ids)


def params(index: int, is_drawn: bool, max_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.1 if is_drawn else 0.0,
        seed=index,
        ignore_eos=True,
    )


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("names", SINGLES_AND_GROUPS, ids="+".join)
def test_every_request_gets_its_own_tokens(names: tuple[str, ...], seed: int) -> None:
    rng = random.Random(seed)
    for index in range(NUM_PROMPTS):  # on the same engine where it is shared: before it is busy
        expected(index, True)
    engine = build(names)
    asked: dict[str, tuple[int, bool, int]] = {}
    got: dict[str, list[int]] = {}
    aborted: set[str] = set()
    for step in range(220):
        crowd = rng.choice([0, 0, 0, 1, 3]) if step < 180 else 0
        for _ in range(crowd if len(engine.unfinished_ids()) < 8 else 0):
            choice = (rng.randrange(NUM_PROMPTS), rng.random() < 0.3, rng.randint(1, MAX_NEW))
            name = engine.add_request(PROMPTS[choice[0]], params(*choice), f"{seed}-{len(asked)}")
            asked[name] = choice
        if rng.random() < 0.06 and engine.unfinished_ids():
            name = rng.choice(engine.unfinished_ids())
            engine.abort(name)
            aborted.add(name)
        for output in engine.step():
            got.setdefault(output.request_id, []).extend(output.new_token_ids)
        engine.check_integrity()
    while engine.has_unfinished():
        for output in engine.step():
            got.setdefault(output.request_id, []).extend(output.new_token_ids)
    check_idle(engine)
    assert len(asked) > 30
    assert 2 <= len(aborted) < len(asked) / 2
    promise = weakest_class(names)
    for name, (index, is_drawn, max_tokens) in asked.items():
        if promise == "lossy" or (promise == "distributional" and is_drawn):
            assert name in aborted or len(got[name]) == max_tokens
            continue
        full = list(expected(index, is_drawn)[:max_tokens])
        if name in aborted:
            assert got.get(name, []) == full[: len(got.get(name, []))]
        else:
            assert got[name] == full, f"{name}: prompt {index}, drawn {is_drawn}"
