"""Every technique, every pair and all at once: the bare engine's tokens, and HF's."""

from __future__ import annotations

import functools
import itertools

import pytest

from tests.helpers.engines import (
    TECHNIQUES,
    mixed_prompts,
    shared_engine,
    tiny_engine,
    with_requirements,
)
from tests.helpers.tiny_models import FAMILIES, hf_greedy, tiny_model
from workbench.configuration import compose_config, load_markers
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine

NEW_TOKENS = 24
#: Settings under which a technique has something to do at the size of these prompts.
TIGHT = {
    "chunked_prefill": ("engine.prefill.chunk_tokens=7",),
    "paged_attention": ("engine.kv_cache.block_size=4",),
    "spec_decode": ("engine.drafter.min_ngram=1",),
}
PROMPTS = mixed_prompts(10, seed=1)
#: Mixed lengths, so that requests join and leave while others run.
LENGTHS = [NEW_TOKENS - 2 * (i % 5) for i in range(len(PROMPTS))]


def sets_of_techniques() -> list[tuple[str, ...]]:
    singles = [(name,) for name in TECHNIQUES]
    return [*singles, *itertools.combinations(TECHNIQUES, 2), TECHNIQUES]


def declared_conflict(names: tuple[str, ...]) -> bool:
    markers = load_markers()
    closed = with_requirements(names)
    return any(
        b in markers[a].conflicts or set(markers[a].slots) & set(markers[b].slots)
        for a, b in itertools.permutations(closed, 2)
    )


def build(names: tuple[str, ...]) -> Engine:
    closed = with_requirements(names)
    settings = [text for name in closed for text in TIGHT.get(name, ())]
    return shared_engine(*settings, techniques=tuple(closed), max_num_seqs=3)


SETS = sets_of_techniques()
COMPATIBLE = [names for names in SETS if not declared_conflict(names)]
compatible = pytest.mark.parametrize("names", COMPATIBLE, ids="+".join)


def test_conflicts_are_errors_that_name_both() -> None:
    for names in SETS:
        if declared_conflict(names):
            with pytest.raises(ConfigError, match=names[0]):
                compose_config([f"+technique=[{','.join(with_requirements(names))}]"])
    assert COMPATIBLE, "nothing is left to compare"


@functools.cache
def hf_tokens() -> list[list[int]]:
    folder = tiny_model("llama")
    return [hf_greedy(folder, p, n) for p, n in zip(PROMPTS, LENGTHS, strict=True)]


@compatible
def test_greedy_tokens_equal_hf_and_every_technique_really_ran(names: tuple[str, ...]) -> None:
    engine = build(names)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in LENGTHS]
    outputs = engine.generate(PROMPTS, params)
    assert [o.error for o in outputs] == [None] * len(PROMPTS)
    assert [o.token_ids for o in outputs] == hf_tokens()
    markers, counters = load_markers(), engine.counters()
    for name in with_requirements(names):
        for key in markers[name].evidence:
            assert counters[key] > 0, f"{name} shows no {key}"


@compatible
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.3, "frequency_penalty": 0.3},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_seeded_tokens_are_those_of_the_bare_engine(
    names: tuple[str, ...], fields: dict[str, float]
) -> None:
    params = [
        SamplingParams(max_tokens=n, seed=i, ignore_eos=True, **fields)  # type: ignore[arg-type]
        for i, n in enumerate(LENGTHS)
    ]
    bare = shared_engine(max_num_seqs=3).generate(PROMPTS, params)
    exact = all(load_markers()[n].losslessness == "exact" for n in with_requirements(names))
    if not exact:
        pytest.skip("draws of the same distribution, not the same draws")
    outputs = build(names).generate(PROMPTS, params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in bare]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_at_once_on_every_family(family: str) -> None:
    folder = tiny_model(family)
    settings = [text for name in TECHNIQUES for text in TIGHT.get(name, ())]
    engine = tiny_engine(
        *settings, techniques=with_requirements(TECHNIQUES), model=folder, max_num_seqs=3
    )
    outputs = engine.generate(
        PROMPTS, [SamplingParams(max_tokens=n, ignore_eos=True) for n in LENGTHS]
    )
    for output, prompt, length in zip(outputs, PROMPTS, LENGTHS, strict=True):
        assert output.token_ids == hf_greedy(folder, prompt, length)
