"""The suffix automaton against counting by hand, and what is shared between requests."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from techniques.suffix_decoding.automaton import SEPARATOR, SuffixAutomaton
from techniques.suffix_decoding.drafter import Suffix, SuffixConfig
from tests.helpers.drafting import context
from tests.helpers.engines import check_idle, tiny_engine
from workbench.core.sampling import SamplingParams
from workbench.engine.trees import fault_of, is_chain, path_to

DEPTH = 9


def ids(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)


def occurrences(text: list[int], part: list[int]) -> list[int]:
    """Where a substring ends."""
    size = len(part)
    return [i + size for i in range(len(text) - size + 1) if text[i : i + size] == part]


def likeliest(text: list[int], part: list[int]) -> tuple[int, float] | None:
    """What followed a substring most often, the latest of equals, and its share."""
    followers = [text[end] for end in occurrences(text, part) if end < len(text)]
    counts = {token: followers.count(token) for token in followers if token >= 0}
    if not counts:
        return None
    best = max(counts, key=lambda t: (counts[t], occurrences(text, [*part, t])[-1]))
    return best, counts[best] / len(followers)


def brute_force(
    text: list[int], tail: list[int], limit: int, factor: float, min_probability: float
) -> tuple[list[int], float]:
    """The draft of the highest score over all suffixes, longest first."""
    best: list[int] = []
    best_score = 0.0
    for size in range(len(tail), 0, -1):
        part, draft, probability, score = tail[len(tail) - size :], [], 1.0, 0.0
        while len(draft) < min(limit, int(factor * size)):
            found = likeliest(text, [*part, *draft])
            if found is None or probability * found[1] < min_probability:
                break
            probability *= found[1]
            score += probability
            draft.append(found[0])
        if score > best_score + 1e-9:
            best, best_score = draft, score
    return best, best_score


def all_chances(
    text: list[int], part: list[int], depth: int, chance: float, least: float
) -> list[tuple[tuple[int, ...], float]]:
    """What may follow a substring, up to a depth, with the probability of each path."""
    followers = [text[end] for end in occurrences(text, part) if end < len(text)]
    found = []
    for token in {t for t in followers if t >= 0}:
        own = chance * followers.count(token) / len(followers)
        if own >= least and depth:
            below = all_chances(text, [*part, token], depth - 1, own, least)
            found += [((token,), own), *(((token, *path), c) for path, c in below)]
    return found


def random_text(rng: random.Random, width: int, length: int) -> list[int]:
    text: list[int] = []
    while len(text) < length:
        if len(text) > 8 and rng.random() < 0.4:
            start = rng.randrange(len(text) - 4)
            text += text[start : start + rng.randint(1, 9)]
        else:
            text.append(rng.randrange(width))
        if rng.random() < 0.03:
            text.append(SEPARATOR)
    return text[:length]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("width", [1, 2, 5, 40])
def test_counts_equal_counting_by_hand(width: int, seed: int) -> None:
    rng = random.Random(seed)
    text = random_text(rng, width, 120)
    automaton, done = SuffixAutomaton(DEPTH, capacity=4), 0
    while done < len(text):
        step = rng.randint(1, 30)
        automaton.extend(ids(text[done : done + step]))
        done = min(done + step, len(text))
        for _ in range(40):
            start = rng.randrange(done)
            part = text[start : start + rng.randint(1, DEPTH)][: done - start]
            assert automaton.count(ids(part)) == len(occurrences(text[:done], part))
        absent = [rng.randrange(width + 1) for _ in range(rng.randint(1, 4))]
        assert automaton.count(ids(absent)) == len(occurrences(text[:done], absent))
    assert automaton.num_tokens == len(text)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("width", [2, 3, 12])
def test_a_draft_is_the_likeliest_continuation(width: int, seed: int) -> None:
    rng = random.Random(seed)
    text = random_text(rng, width, 90)
    own = seed % 2 == 0
    automaton = SuffixAutomaton(DEPTH)
    buffers = np.empty((2, 5), np.int32)
    found = 0
    for end in range(3, len(text)):
        automaton.extend(ids(text[automaton.num_tokens : end]))
        source = text[:end] if own else [rng.randrange(width) for _ in range(6)]
        tail = [t for t in source if t != SEPARATOR][-4:]
        limit, factor, least = rng.randint(1, 5), rng.choice([0.5, 1.0, 2.0]), rng.choice([0, 0.3])
        draft, score = automaton.draft(
            ids(tail),
            limit,
            min_match=1,
            factor=factor,
            min_probability=least,
            to_beat=0.0,
            buffers=buffers,
        )
        while tail and not occurrences(text[:end], tail):
            tail = tail[1:]
        expected, expected_score = brute_force(text[:end], tail, limit, factor, least)
        assert score == pytest.approx(expected_score)
        assert draft == expected
        found += len(draft)
    assert found > 20, "the text repeats too little to test anything"


def test_the_longer_the_match_the_longer_the_draft() -> None:
    drafter = Suffix(SuffixConfig(shared_tokens=0, num_draft_tokens=6))
    passage = list(range(50, 70))
    lengths = []
    for match in (1, 2, 4, 6):
        drafter.finish("r")
        tokens = [*passage, 1, 2, 3, *passage[:match]]
        (draft,) = drafter.propose(context(tokens)).token_ids
        assert draft == passage[match : match + len(draft)]
        lengths.append(len(draft))
    assert lengths == [1, 2, 4, 6]


def test_frequency_decides_and_the_latest_of_equals() -> None:
    def draft(*parts: list[int]) -> list[int]:
        tokens = [t for part in parts for t in part]
        config = SuffixConfig(shared_tokens=0, min_probability=0.0)
        return Suffix(config).propose(context(tokens)).token_ids[0]

    assert draft([7, 8], [0], [7, 9], [1], [7, 8], [2], [7]) == [8]
    assert draft([7, 8], [0], [7, 9], [1], [7]) == [9]


def run(drafter: Suffix, name: str, prompt: list[int], output: list[int]) -> None:
    drafter.propose(context(prompt, name, num_prompt=len(prompt)))
    for end in range(1, len(output) + 1):
        drafter.propose(context(prompt + output[:end], name, num_prompt=len(prompt)))
    drafter.finish(name)


def test_outputs_of_finished_requests_are_shared_and_prompts_are_not() -> None:
    drafter = Suffix(SuffixConfig(shared_tokens=100))
    run(drafter, "a", [90, 91, 92], [10, 11, 12, 13, 14])
    assert drafter.propose(context([1, 10, 11, 12], "b")).token_ids == [[13, 14]]
    assert drafter.counters()["shared_drafted_tokens"] == 2
    assert drafter.propose(context([1, 90, 91], "c")).token_ids == [[]]
    assert drafter.propose(context([1, 13, 14], "d")).token_ids == [[]], "drafted past an end"
    drafter.clear_cached()
    assert drafter.propose(context([1, 10, 11, 12], "e")).token_ids == [[]]


def test_memory_is_bounded_and_the_oldest_goes() -> None:
    drafter = Suffix(SuffixConfig(shared_tokens=64))
    for k in range(30):
        run(drafter, f"r{k}", [1], list(range(100 * k + 100, 100 * k + 110)))
        assert drafter.num_shared_tokens <= 64
        (draft,) = drafter.propose(context([2, 100 * k + 100, 100 * k + 101], "x")).token_ids
        drafter.finish("x")
        assert draft == [100 * k + 102, 100 * k + 103]
    assert drafter.propose(context([2, 100, 101], "x")).token_ids == [[]]
    run(drafter, "long", [1], list(range(5000, 5500)))
    assert drafter.num_shared_tokens <= 64
    none = Suffix(SuffixConfig(shared_tokens=0))
    run(none, "r", [1], list(range(50)))
    assert none.num_shared_tokens == 0


def test_tokens_are_copied_since_their_row_is_used_again() -> None:
    drafter = Suffix(SuffixConfig())
    row = ids([5, 20, 21, 22, 23])
    for end in range(1, 6):
        ahead = context(row, "a", num_prompt=1)
        ahead.token_ids[0] = row[:end]
        drafter.propose(ahead)
    row[:] = 0
    drafter.finish("a")
    assert drafter.propose(context([1, 20, 21], "b")).token_ids == [[22, 23]]


def test_the_same_history_gives_the_same_steps_and_a_cold_start_forgets() -> None:
    prompts = [[9, 9, 9], [80] * 12, [40, 41, 42] * 6]
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    counts = []
    engine = tiny_engine(techniques=("suffix_decoding",))
    for _ in range(2):
        engine.clear_cached()
        for _ in range(2):
            engine.reset_counters()
            engine.generate(prompts, params)
            counts.append((len(engine.steps), engine.counters()["drafter.drafted_tokens"]))
    cold, warm, cold_again, warm_again = counts
    assert (cold, warm) == (cold_again, warm_again)
    assert warm[0] < cold[0], "what was written before is of no use"
    check_idle(engine)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_draft_tokens", 0),
        ("min_match", 0),
        ("max_match", 0),
        ("draft_factor", 0.0),
        ("min_probability", 1.5),
        ("shared_tokens", -1),
    ],
)
def test_refuses_impossible_settings(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Suffix(SuffixConfig(**{name: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("width", [2, 3, 6])
def test_trees_have_the_likeliest_nodes(width: int, seed: int) -> None:
    """Of each suffix the paths of most probability, and of all suffixes the best tree."""
    rng = random.Random(seed)
    text = random_text(rng, width, 80)
    automaton = SuffixAutomaton(16)
    automaton.extend(ids(text))
    buffers = np.empty((2, 2, 6), np.int32)
    num_branching = 0
    for _ in range(40):
        start = rng.randrange(len(text) - 6)
        tail = [t for t in text[start : start + rng.randint(1, 5)] if t >= 0] or [0]
        limit, factor, least = rng.randint(1, 6), rng.choice([1.0, 2.0, 4.0]), 0.07
        tokens, parents, score = automaton.draft_tree(
            ids(tail),
            limit,
            min_match=1,
            factor=factor,
            min_probability=least,
            to_beat=0.0,
            buffers=buffers,
        )
        assert fault_of(parents, tokens) is None and len(tokens) <= limit
        best = 0.0
        by_suffix = []
        for size in range(len(tail), 0, -1):
            part = tail[len(tail) - size :]
            if not occurrences(text, part):
                continue
            found = all_chances(text, part, limit, 1.0, least)
            chances = sorted((c for _, c in found), reverse=True)
            best = max(best, sum(chances[: min(limit, int(factor * size))]))
            by_suffix.append(dict(found))
        assert score == pytest.approx(best)
        if tokens:
            nodes = range(len(tokens))
            paths = [tuple(tokens[n] for n in path_to(parents, node)) for node in nodes]
            sums = [sum(known.get(path, -9.0) for path in paths) for known in by_suffix]
            assert any(value == pytest.approx(score) for value in sums)
            num_branching += not is_chain(parents)
    assert num_branching > 0 or width > 2
