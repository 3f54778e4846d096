"""Drafters under the overlapped loop: steps are planned ahead while none may draft, and the tokens
are those of the plain loop."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests.helpers.comings import NowAndThen, Traffic, make_traffic
from tests.helpers.eagle_heads import eagle_head
from tests.helpers.engines import check_idle, tiny_engine
from tests.helpers.heads import untrained_heads
from tests.helpers.prepared import MIXED_PREPARED
from tests.helpers.tiny_models import tiny_model
from workbench.core.errors import ConfigError
from workbench.engine.engine import Engine
from workbench.engine.request_table import RequestTable

MODEL = tiny_model("llama", num_hidden_layers=6)
PAGED = ("engine/kv_cache=paged", "engine/scheduler=continuous", "engine.kv_cache.block_size=4")
TIGHT = ("engine/admission=optimistic", "engine.admission.headroom_tokens=0")
CACHED = ("engine/prefix_cache=radix", "engine/eviction=lru")
CHUNKED = ("engine/prefill=chunked", "engine.prefill.chunk_tokens=16")
OVERLAPPED = "engine/loop=overlapped"
DRAFTERS: dict[str, tuple[str, ...]] = {
    "ngram": ("engine/drafter=ngram", "engine.drafter.min_ngram=1"),
    "eagle": ("engine/drafter=eagle", f"engine.drafter.head={eagle_head(MODEL)}"),
    "medusa": ("engine/drafter=medusa", f"engine.drafter.head={untrained_heads(MODEL)}"),
    "draft_model": ("engine/drafter=draft_model", f"engine.drafter.model={MODEL}"),
}
SETTINGS: dict[str, tuple[tuple[str, ...], int]] = {
    "paged": (PAGED, 0),
    "cached, chunked": ((*PAGED, *CACHED, *CHUNKED), 400),
    "pre-empted": ((*PAGED, *TIGHT), 144),
    "prepared": ((*PAGED, *MIXED_PREPARED), 0),
}


def engine_of(drafter: str, settings: tuple[str, ...], pool: int, *more: str, seed: int) -> Engine:
    engine = tiny_engine(
        *DRAFTERS[drafter],
        "engine/verifier=exact_match",
        "engine.drafter.num_draft_tokens=3",
        "engine/draft_length=adaptive",
        *settings,
        *more,
        model=MODEL,
        max_num_seqs=4,
        max_model_len=144,
        kv_pool_tokens=pool,
    )
    drafting(engine).draft_length = NowAndThen(seed)
    return engine


def drafting(engine: Engine) -> Any:
    runner: Any = engine.parts.executor.runner  # type: ignore[attr-defined]
    return runner.drafting


def set_apart(engine: Engine) -> None:
    """Give the host's books memory of their own, as beside a GPU."""
    table: RequestTable = engine.parts.executor.runner.table  # type: ignore[attr-defined]
    table._shares_memory, table._has_mirror = False, True
    table.host_token_ids = np.full_like(table.host_token_ids, -7)
    table.host_block_table = table.host_block_table.copy()


def plain_tokens(traffic: Traffic) -> dict[int, tuple[list[int], str | None]]:
    return traffic.serve(
        tiny_engine(*PAGED, model=MODEL, max_num_seqs=4, max_model_len=144, kv_pool_tokens=0)
    )


@pytest.mark.parametrize("is_apart", [False, True], ids=["", "apart"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_tokens_are_those_without_drafts(drafter: str, name: str, is_apart: bool) -> None:
    traffic = make_traffic(3, greedy=True)
    free = plain_tokens(traffic)
    rng = random.Random(5)
    stops = {i: (rng.choice(t),) for i, (t, _) in free.items() if t and rng.random() < 0.5}
    traffic = make_traffic(3, stops, greedy=True)
    wanted = plain_tokens(traffic)
    engine = engine_of(drafter, *SETTINGS[name], OVERLAPPED, seed=2)
    if is_apart:
        set_apart(engine)
    served = traffic.serve(engine)
    for i, (tokens, reason) in wanted.items():
        if i in traffic.aborted and "abort" in (reason, served[i][1]):
            shorter, longer = sorted([tokens, served[i][0]], key=len)
            assert longer[: len(shorter)] == shorter
        else:
            assert served[i] == (tokens, reason), i
    counters = engine.counters()
    assert counters["loop.steps_ahead"] > 5
    assert counters["drafter.drafted_tokens"] > 5
    assert counters["drafter.failures"] == 0
    chosen = drafting(engine).draft_length.seen
    assert any(sum(step.num_drafts) for step in chosen)
    assert any(step.num_drafts and not sum(step.num_drafts) for step in chosen)
    check_idle(engine)


@pytest.mark.parametrize("seed", range(6, 12))
def test_what_the_drafter_is_shown_is_what_was_written(seed: int) -> None:
    """Also of tokens that were counted before anybody knew them, and in rows of requests that ended
    unforeseen while a step ran."""
    engine = engine_of("ngram", PAGED, 0, OVERLAPPED, seed=seed)
    set_apart(engine)
    inner, propose = drafting(engine).drafter, drafting(engine).drafter.propose
    texts: dict[str, list[list[int]]] = {}

    def spy(context: Any) -> Any:
        for request_id, tokens in zip(context.request_ids, context.token_ids, strict=True):
            texts.setdefault(request_id, []).append(tokens.tolist())
        return propose(context)

    inner.propose = spy
    free = plain_tokens(make_traffic(seed, greedy=True))
    stops = {i: (t[len(t) // 2],) for i, (t, _) in free.items() if len(t) > 3}
    traffic = make_traffic(seed, stops, greedy=True)
    served = traffic.serve(engine)
    assert len(texts) > 5
    for name, seen in texts.items():
        i = int(name[1:].partition("-")[0])
        whole = traffic.prompts[i] + served[i][0]
        for tokens in seen:
            common = min(len(tokens), len(whole))
            assert tokens[:common] == whole[:common]


def test_without_a_switch_a_drafter_is_refused() -> None:
    with pytest.raises(ConfigError, match="engine/draft_length=adaptive"):
        tiny_engine(OVERLAPPED, *DRAFTERS["ngram"], "engine/verifier=exact_match")
