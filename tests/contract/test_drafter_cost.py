"""Drafting costs the same however long the context is: counted, not timed.

``tests/benchmarks/test_drafter_speed.py`` times the same work.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.drafting import CountedTokens, context, num_opcodes, text_like
from tests.helpers.engines import component, drafters_by_tokens
from workbench.slots.drafter import Drafter

#: Settings under which a longer context brings no more candidates, up to the most there may be.
AS_MANY = {"lookahead": {"max_candidates": 1}}
every_drafter = pytest.mark.parametrize("option", drafters_by_tokens())
LENGTHS = (200, 4000)
TOKENS = np.asarray(text_like(4200), dtype=np.int32)


def cost(drafter: Drafter, length: int) -> tuple[int, int]:
    """Python instructions and tokens read of the dearest of 40 steps of one to nine tokens."""
    drafter.propose(context(TOKENS[:length]))
    dearest, most_read = 0, 0
    end = length
    for step in range(40):
        end += 1 + step % 9
        ahead = context(TOKENS[:end])
        ahead.token_ids[0] = ahead.token_ids[0].view(CountedTokens)
        CountedTokens.num_read = 0
        dearest = max(dearest, num_opcodes(lambda ahead=ahead: drafter.propose(ahead)))  # type: ignore[misc]
        most_read = max(most_read, CountedTokens.num_read)
    return dearest, most_read


@every_drafter
def test_a_step_does_not_cost_more_in_a_long_context(option: str) -> None:
    short, long = (
        cost(component("drafter", option, settings=AS_MANY.get(option)), length)
        for length in LENGTHS
    )
    assert long[0] <= 1.25 * short[0], "instructions grow with the context"
    assert long[1] <= short[1] + 32, "tokens read grow with the context"
    assert long[0] <= 2000
    assert long[1] <= 100


@every_drafter
def test_indexing_a_prompt_runs_no_python_a_token(option: str) -> None:
    def first(length: int) -> int:
        drafter = component("drafter", option, settings=AS_MANY.get(option))
        return num_opcodes(lambda: drafter.propose(context(TOKENS[:length])))

    assert first(4000) <= first(200) + 200


def test_the_counts_can_tell() -> None:
    short, long = (num_opcodes(lambda n=n: [i for i in range(n)]) for n in LENGTHS)  # type: ignore[misc]
    assert long > 10 * short
    CountedTokens.num_read = 0
    TOKENS[:50].view(CountedTokens)[10:30].tolist()
    assert CountedTokens.num_read == 20
