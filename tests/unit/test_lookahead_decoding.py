"""Lookahead decoding: the window is that of the paper, and the n-grams are the target's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from techniques.lookahead_decoding.drafter import Lookahead, LookaheadConfig
from tests.helpers.engines import FIRST_ORDINARY_ID, VOCAB_SIZE, check_idle, tiny_engine
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.engine.trees import depths_of, fault_of, path_to
from workbench.slots.drafter import DraftContext


def propose(
    drafter: Lookahead, tokens: list[int], drawn: list[int] | None, limit: int = 99
) -> tuple[list[int], list[int]]:
    found = drafter.propose(
        DraftContext(
            ["a"],
            [np.asarray(tokens, np.int32)],
            [limit],
            [len(tokens)],
            drawn=None if drawn is None else [drawn],
        )
    )
    assert found.parents is not None and found.parents[0] is not None
    return found.token_ids[0], found.parents[0]


def test_the_window_is_the_papers() -> None:
    """By a target whose next token is a function of the path, so that every line can be told."""
    drafter = Lookahead(LookaheadConfig(window=3, ngram=4, max_candidates=2, from_prompt=False))

    def target(path: list[int]) -> int:
        return 1000 + sum(path) % 97

    tokens = [5, 6, 7]
    ids, parents = propose(drafter, tokens, None)
    lines = [ids[:]]
    assert len(ids) == 3 and parents == [-1, 0, 1]
    for step in range(5):
        drawn = [target([])]
        drawn += [target([ids[n] for n in path_to(parents, node)]) for node in range(len(ids))]
        # What the paper's mask lets guess j of each line see: the oldest line up to j, then its
        # own column.
        columns = [[line[j] for line in lines] for j in range(3)]
        seen = [lines[0][:j] + columns[j] for j in range(3)]
        lines.append([target(path) for path in seen])
        whole = [tuple(line[j] for line in lines) for j in range(3)] if len(lines) == 4 else []
        if len(lines) == 4:
            del lines[0]
        tokens = [*tokens, 50 + step]
        ids, parents = propose(drafter, tokens, drawn)
        assert fault_of(parents, ids) is None
        # The candidates of token 50 + step, which no guess was: none. So the tree is the window.
        assert len(ids) == 3 * len(lines)
        assert drafter._requests["a"].levels == lines
        for ngram in whole:
            assert ngram[1:] in drafter._requests["a"].pool[ngram[0]]
        # Distances: guess j of line i stands j + i positions ahead.
        assert max(depths_of(parents)) == 3 + len(lines) - 1
    assert drafter.counters()["collected_ngrams"] == 9


def test_candidates_are_the_latest_of_the_pool() -> None:
    drafter = Lookahead(LookaheadConfig(window=1, ngram=3, max_candidates=2, pool_size=3))
    tokens = [1, 10, 11, 1, 20, 21, 1, 30, 31, 1, 40, 41, 1]
    ids, parents = propose(drafter, tokens, None)
    paths = {tuple(ids[n] for n in path_to(parents, node)) for node in range(len(ids))}
    assert {(40, 41), (30, 31)} <= paths and not {(20, 21), (10, 11)} & paths
    request = drafter._requests["a"]
    for start in range(50, 90, 10):
        drafter._note(request, [1, start, start + 1])
    assert list(request.pool[1]) == [(60, 61), (70, 71), (80, 81)], "three are kept"
    assert propose(drafter, tokens, None)[0][:4] == [80, 81, 70, 71]
    assert propose(drafter, tokens, None, limit=2)[0] == [80, 81]  # what does not fit is left out


def test_guesses_that_were_not_run_stay() -> None:
    drafter = Lookahead(LookaheadConfig(window=4, ngram=3, from_prompt=False))
    ids, _ = propose(drafter, [1, 2, 3], None)
    before = [line[:] for line in drafter._requests["a"].levels]
    propose(drafter, [1, 2, 3, 4], [9] * len(ids))  # one fewer than were proposed
    assert drafter._requests["a"].levels == before
    propose(drafter, [1, 2, 3, 4, 5], [9] * (1 + len(ids)))
    assert drafter._requests["a"].levels == [*before, [9] * 4]
    drafter.finish("a")
    assert not drafter._requests


@pytest.mark.parametrize("sampled", [False, True])
def test_tokens_are_those_of_the_engine_without_it(sampled: bool) -> None:
    rng = random.Random(1)
    prompts = [
        [rng.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(5 + i)] for i in range(5)
    ]
    params = [
        SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.7 * sampled, seed=i)
        for i in range(5)
    ]
    settings: dict[str, Any] = {"max_num_seqs": 3, "max_model_len": 128}
    engine = tiny_engine(
        "engine.drafter.from_prompt=false", techniques=["lookahead_decoding"], **settings
    )
    wanted = [o.token_ids for o in tiny_engine(**settings).generate(prompts, params)]
    assert [o.token_ids for o in engine.generate(prompts, params)] == wanted
    check_idle(engine)
    counts = engine.counters()
    assert counts["drafter.collected_ngrams"] > 0
    if not sampled:  # this model comes to repeat itself
        assert counts["verifier.mean_accepted_length"] > 1.2


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("engine.drafter.window=0", "window=0 must be 1 or more"),
        ("engine.drafter.ngram=1", "ngram=1 must be 2 or more"),
        ("engine.drafter.max_candidates=0", "max_candidates=0 must be 1 or more"),
        ("engine.drafter.pool_size=0", "pool_size=0 must be 1 or more"),
    ],
)
def test_impossible_settings_are_named(setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_engine(setting, techniques=["lookahead_decoding"])


def test_a_verifier_that_does_not_tell_is_named() -> None:
    with pytest.raises(ConfigError, match=r"learns from what the target draws.*exact_match"):
        tiny_engine("engine/drafter=lookahead", "engine/verifier=rejection")
