"""Host time of drafting at 4,000 tokens of context: a request a step, and a fresh prompt.

``make bench`` runs them. ``tests/contract/test_drafter_cost.py`` counts the same work without a
clock.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.helpers.drafting import context, text_like
from tests.helpers.engines import component

CONTEXT_TOKENS = 4000
LIMIT_S = 20e-6
#: A prompt is indexed once; it took at least as long to compute.
PROMPT_LIMIT_S = 10e-3
TOKENS = np.asarray(text_like(CONTEXT_TOKENS + 3000), dtype=np.int32)
MODEL_FREE = ("ngram", "suffix")


@pytest.mark.parametrize("new_tokens", [1, 4])
@pytest.mark.parametrize("option", MODEL_FREE)
def test_step(benchmark: Any, option: str, new_tokens: int) -> None:
    """Every step brings so many tokens, and a draft is asked for."""
    drafter = component("drafter", option)
    drafter.propose(context(TOKENS[:CONTEXT_TOKENS]))
    ends = itertools.count(CONTEXT_TOKENS + new_tokens, new_tokens)

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        return (context(TOKENS[: next(ends)]),), {}

    benchmark.pedantic(drafter.propose, setup=setup, rounds=700)
    benchmark.extra_info["median_us"] = benchmark.stats.stats.median * 1e6
    assert drafter.counters()["drafted_tokens"] > 0
    assert benchmark.stats.stats.median < LIMIT_S


@pytest.mark.parametrize("option", MODEL_FREE)
def test_fresh_prompt(benchmark: Any, option: str) -> None:
    """The first call of a request indexes its prompt."""
    drafter = component("drafter", option)
    names = itertools.count()

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        return (context(TOKENS[:CONTEXT_TOKENS], f"r{next(names)}"),), {}

    benchmark.pedantic(drafter.propose, setup=setup, rounds=50)
    benchmark.extra_info["median_us"] = benchmark.stats.stats.median * 1e6
    assert benchmark.stats.stats.median < PROMPT_LIMIT_S
