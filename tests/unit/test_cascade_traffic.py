"""Prepared steps with groups under random traffic: arrivals, stops and aborts change the groups,
and the tokens are those of the engine without them."""

from __future__ import annotations

import random

import pytest

from tests.helpers.engines import FIRST_ORDINARY_ID, VOCAB_SIZE, check_idle, tiny_engine
from tests.helpers.prepared import CALLED, CallingRunner
from workbench.core.sampling import SamplingParams

SERVING = (
    "engine/scheduler=continuous",
    "engine/kv_cache=paged",
    "engine.kv_cache.block_size=4",
    "engine/eviction=lru",
)
GROUPS = (
    "engine/attention=cascade",
    "engine.attention.min_requests=2",
    "engine.attention.min_shared_tokens=8",
    "engine.attention.max_groups=2",
)


@pytest.mark.parametrize("cache", ["radix", "block_hash"])
@pytest.mark.parametrize("prefill", ["whole_prompt", "chunked"])
@pytest.mark.parametrize("loop", ["sync", "overlapped"])
def test_tokens_are_those_of_the_plain_engine(cache: str, prefill: str, loop: str) -> None:
    rng = random.Random(f"{cache} {prefill} {loop}")

    def draw(count: int) -> list[int]:
        return [rng.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(count)]

    stems = [draw(9), draw(17), draw(30), []]
    stems.append(stems[0] + draw(11))
    prompts = [rng.choice(stems) + draw(rng.randint(1, 24)) for _ in range(30)]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    served = tiny_engine(*SERVING, "engine/prefix_cache=none", "engine/eviction=none").generate(
        prompts, params
    )
    alone = [output.token_ids for output in served]
    pieces = ("engine.prefill.chunk_tokens=24",) if prefill == "chunked" else ()
    engine = tiny_engine(
        *SERVING,
        *GROUPS,
        *CALLED,
        f"engine/prefix_cache={cache}",
        f"engine/prefill={prefill}",
        f"engine/loop={loop}",
        *pieces,
        max_num_seqs=8,
    )
    stops: list[tuple[int, ...]] = [
        (rng.choice(tokens),) if rng.random() < 0.3 else () for tokens in alone
    ]
    waiting, aborted = list(range(len(prompts))), set()
    got: dict[str, list[int]] = {f"r{i}": [] for i in waiting}
    while waiting or engine.has_unfinished():
        for i in waiting[: 8 if len(waiting) == len(prompts) else rng.randint(0, 3)]:
            waiting.remove(i)
            stopped = SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=stops[i])
            engine.add_request(prompts[i], stopped, f"r{i}")
        for output in engine.step():
            got[output.request_id] += output.new_token_ids
        if rng.random() < 0.04 and engine.unfinished_ids():
            aborted.add(victim := rng.choice(engine.unfinished_ids()))
            engine.abort(victim)
        engine.check_integrity()
    check_idle(engine)
    for i, tokens in enumerate(alone):
        wanted = tokens[: tokens.index(stops[i][0]) + 1] if stops[i] else tokens
        mine = got[f"r{i}"]
        assert mine == (wanted[: len(mine)] if f"r{i}" in aborted else wanted), i
    runner = engine.parts.graph_runner
    assert isinstance(runner, CallingRunner)
    assert "cascade" in runner.forms
    counters = engine.counters()
    assert counters["attention.prefix_tokens_saved"] > 0
    if prefill == "whole_prompt":  # else the first prompt takes all that a step may run
        assert counters["scheduler.in_flight_tokens"] > 0
