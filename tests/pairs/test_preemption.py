"""Pre-emption on real tiny engines: a request's tokens are its own, however often it had to give
way, and whether its KV was computed again, found in a cache or copied back."""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import pytest

from tests.helpers.engines import check_idle, mixed_prompts, run_to_end, shared_engine, tiny_engine
from tests.helpers.tiny_models import hf_greedy, tiny_model
from workbench.configuration import options_of
from workbench.core.errors import RequestError
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine

CACHES = options_of("engine/prefix_cache")
PREEMPTIONS = ["recompute", "swap"]
PROMPTS = mixed_prompts(8, seed=3, longest=30)
LENGTHS = [16 + 3 * (i % 4) for i in range(len(PROMPTS))]
BLOCK_SIZE = 4
#: One request and a half: several start, and the pool runs dry as they grow.
POOL_TOKENS = 96


def short_of_memory(
    preemption: str, cache: str, chunked: bool, speculative: bool, policy: str = "fcfs"
) -> Engine:
    """An engine that has to pre-empt."""
    overrides = [
        "engine.admission.headroom_tokens=0",
        f"engine.admission.preemption={preemption}",
        f"engine.kv_cache.block_size={BLOCK_SIZE}",
        f"engine/prefix_cache={cache}",
        f"engine/eviction={'none' if cache == 'none' else 'lru'}",
        f"engine/policy={policy}",
    ]
    techniques = ["continuous_batching", "paged_attention", "optimistic_admission"]
    if preemption == "swap":
        overrides.append("engine/kv_offload=host")
    if chunked:
        techniques.append("chunked_prefill")
        overrides.append("engine.prefill.chunk_tokens=9")
    if speculative:
        techniques.append("spec_decode")
        overrides.append("engine.drafter.min_ngram=1")
    engine = shared_engine(
        *overrides, techniques=tuple(techniques), max_num_seqs=4, kv_pool_tokens=POOL_TOKENS
    )
    engine.clear_cached()
    return engine


def check_preempted(engine: Engine, preemption: str) -> None:
    counters = engine.counters()
    assert counters["scheduler.preemptions"] > 0, "nobody was pre-empted"
    assert (counters["scheduler.swaps_in"] > 0) == (preemption == "swap")
    engine.clear_cached()
    check_idle(engine)


combinations = pytest.mark.parametrize(
    ("preemption", "cache", "chunked", "speculative"),
    list(itertools.product(PREEMPTIONS, CACHES, [False, True], [False, True])),
)


@functools.cache
def hf_tokens() -> list[list[int]]:
    folder = tiny_model("llama")
    return [hf_greedy(folder, p, n) for p, n in zip(PROMPTS, LENGTHS, strict=True)]


@combinations
def test_greedy_tokens_are_hf_s(
    preemption: str, cache: str, chunked: bool, speculative: bool
) -> None:
    engine = short_of_memory(preemption, cache, chunked, speculative)
    outputs = engine.generate(
        PROMPTS, [SamplingParams(max_tokens=n, ignore_eos=True) for n in LENGTHS]
    )
    assert [o.token_ids for o in outputs] == hf_tokens()
    check_preempted(engine, preemption)


@pytest.mark.parametrize("preemption", PREEMPTIONS)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("chunked", "speculative"), [(False, False), (True, True)])
def test_draws_penalties_and_logprobs_survive(
    preemption: str, cache: str, chunked: bool, speculative: bool
) -> None:
    params = [
        SamplingParams(
            max_tokens=n,
            seed=i,
            ignore_eos=True,
            temperature=(1.1, 0.0)[i % 2],
            repetition_penalty=1.3,
            frequency_penalty=0.4,
            logprobs=2,
        )
        for i, n in enumerate(LENGTHS)
    ]
    expected = shared_engine(max_num_seqs=4).generate(PROMPTS, params)
    engine = short_of_memory(preemption, cache, chunked, speculative)
    outputs = engine.generate(PROMPTS, params)
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.token_ids == wanted.token_ids
        logprobs = output.outputs[0].logprobs
        wanted_logprobs = wanted.outputs[0].logprobs
        assert logprobs is not None
        assert wanted_logprobs is not None
        assert len(logprobs) == len(wanted.token_ids)
        for entry, other in zip(logprobs, wanted_logprobs, strict=True):
            assert entry.token_id == other.token_id
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)
    check_preempted(engine, preemption)


@pytest.mark.parametrize("policy", options_of("engine/policy"))
@pytest.mark.parametrize("preemption", PREEMPTIONS)
def test_aborts_and_arrivals_under_every_policy(policy: str, preemption: str) -> None:
    engine = short_of_memory(preemption, "radix", chunked=True, speculative=True, policy=policy)
    rng = random.Random(policy)
    asked: dict[str, int] = {}
    aborted: set[str] = set()
    got: dict[str, list[int]] = {}
    for step in range(260):
        if step < 200 and len(engine.unfinished_ids()) < 7 and rng.random() < 0.4:
            index = rng.randrange(len(PROMPTS))
            name = engine.add_request(
                PROMPTS[index],
                SamplingParams(max_tokens=LENGTHS[index], ignore_eos=True),
                priority=rng.randint(-1, 1) if policy == "priority" else 0,
                cache_salt=rng.choice([None, "a", "b"]),
            )
            asked[name] = index
        if rng.random() < 0.05 and engine.unfinished_ids():
            name = rng.choice(engine.unfinished_ids())
            engine.abort(name)
            aborted.add(name)
        for output in engine.step():
            got.setdefault(output.request_id, []).extend(output.new_token_ids)
        engine.check_integrity()
    got |= {name: tokens for name, tokens in run_to_end(engine).items() if name not in aborted}
    assert len(asked) > 20
    assert aborted
    for name, index in asked.items():
        tokens, wanted = got.get(name, []), hf_tokens()[index]
        assert tokens == (wanted[: len(tokens)] if name in aborted else wanted), name
    assert engine.counters()["scheduler.preemptions"] > 0
    engine.clear_cached()
    check_idle(engine)


@pytest.mark.parametrize("preemption", PREEMPTIONS)
def test_a_step_that_fails_loses_no_token(preemption: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = short_of_memory(preemption, "radix", chunked=True, speculative=False)
    runner = engine.parts.executor.runner  # type: ignore[attr-defined]
    execute, rng = runner._submit, random.Random(1)
    num_failed = 0

    def fail_sometimes(plan: object) -> object:
        nonlocal num_failed
        kind = rng.random()
        if kind < 0.1:
            num_failed += 1
            raise InterruptedError("before the step")
        result = execute(plan)
        if kind < 0.2:
            num_failed += 1
            raise InterruptedError("after the step")
        return result

    monkeypatch.setattr(runner, "_submit", fail_sometimes)
    names = [
        engine.add_request(prompt, SamplingParams(max_tokens=n, ignore_eos=True))
        for prompt, n in zip(PROMPTS, LENGTHS, strict=True)
    ]
    got: dict[str, list[int]] = {}
    for _ in range(3000):
        if not engine.has_unfinished():
            break
        try:
            outputs = engine.step()
        except InterruptedError:
            engine.check_integrity()
            continue
        for output in outputs:
            got.setdefault(output.request_id, []).extend(output.new_token_ids)
    assert num_failed > 5
    assert [got[name] for name in names] == hf_tokens()
    engine.clear_cached()
    check_idle(engine)


# -- priority and salt ----------------------------------------------------------------------------


def test_salts_keep_tenants_apart() -> None:
    engine = short_of_memory("recompute", "radix", chunked=False, speculative=False)
    prompt = list(range(10, 34))
    for salt, cached in ((None, 0), ("a", 0), ("a", 20), ("b", 0), (None, 20)):
        engine.reset_counters()
        engine.generate(prompt, SamplingParams(max_tokens=1), cache_salt=salt)
        assert engine.counters()["prefix_cache.hit_tokens"] == cached, salt
    engine.clear_cached()


def test_priority_decides_who_starts() -> None:
    engine = tiny_engine(
        "engine/policy=priority", techniques=["continuous_batching"], max_num_seqs=1
    )
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    for name, priority in (("low", -1), ("usual", 0), ("high", 2)):
        engine.add_request([5, 6, 7], params, name, priority=priority)
    ended = []
    while engine.has_unfinished():
        ended += [output.request_id for output in engine.step() if output.finished]
    assert ended == ["high", "usual", "low"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"priority": 1.5}, "priority=1.5 is not valid"),
        ({"priority": True}, "priority=True is not valid"),
        ({"priority": 3}, "engine/policy=priority"),
        ({"cache_salt": ""}, "cache_salt='' is not valid"),
        ({"cache_salt": 7}, "cache_salt=7 is not valid"),
    ],
)
def test_wrong_priority_or_salt_is_told(fields: dict[str, Any], message: str) -> None:
    engine = shared_engine()
    with pytest.raises(RequestError, match=message):
        engine.add_request([5], **fields)
    assert message.split("=")[0] in str(engine.generate([5], **fields)[0].error)
    assert not engine.has_unfinished()
