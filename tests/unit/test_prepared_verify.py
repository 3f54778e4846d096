"""Prepared steps that verify drafts: padded, from device state alone, and with the same tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.helpers.engines import check_idle, mixed_prompts, tiny_engine
from tests.helpers.prepared import PREPARED, CallingRunner
from tests.helpers.recalling import RECALLING, RecallingDrafter
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine
from workbench.slots.graph_runner import DECODE, VERIFY

KV = {
    "contiguous": ("engine/kv_cache=contiguous",),
    "paged": ("engine/kv_cache=paged", "engine/scheduler=continuous"),
    "cached": (
        "engine/kv_cache=paged",
        "engine/scheduler=continuous",
        "engine/prefix_cache=radix",
        "engine/eviction=lru",
        "engine/prefill=chunked",
        "engine.prefill.chunk_tokens=24",
    ),
}
#: Blocks for some of the requests, so that others are taken out and begin again.
TIGHT = (*KV["cached"], "engine/admission=optimistic")
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


def runner_of(engine: Engine) -> CallingRunner:
    runner = engine.parts.graph_runner
    assert isinstance(runner, CallingRunner)
    return runner


def teach(
    engine: Engine, prompts: list[list[int]], outputs: list[Any], is_sure: bool = False
) -> None:
    """Show the drafter what will be answered."""
    drafter = engine.parts.components["drafter"]
    assert isinstance(drafter, RecallingDrafter)
    drafter.is_sure = is_sure
    drafter.answers = [p + o.token_ids for p, o in zip(prompts, outputs, strict=True)]


def elaborate_params() -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=16, ignore_eos=True),
        SamplingParams(max_tokens=17, temperature=1.0, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=22, temperature=0.7, top_k=5, seed=4, ignore_eos=True),
        SamplingParams(max_tokens=22, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(max_tokens=18, frequency_penalty=0.8, ignore_eos=True),
        SamplingParams(max_tokens=18, logprobs=3, ignore_eos=True),
        SamplingParams(max_tokens=25, ignore_eos=True),
    ]


@pytest.mark.parametrize("kv", KV)
def test_tokens_and_counts_are_those_of_other_steps(kv: str) -> None:
    rng = random.Random(0)
    prompts = mixed_prompts(13, longest=60)
    params = [SamplingParams(max_tokens=rng.randint(1, 30), ignore_eos=True) for _ in prompts]
    plain = tiny_engine(*KV[kv], max_num_seqs=5)
    wanted = plain.generate(prompts, params)
    unprepared = tiny_engine(*KV[kv], *RECALLING, max_num_seqs=5)
    prepared = tiny_engine(*KV[kv], *RECALLING, *PREPARED, max_num_seqs=5)
    for engine in (unprepared, prepared):
        teach(engine, prompts, wanted)
        got = engine.generate(prompts, params)
        check_idle(engine)
        assert [o.token_ids for o in got] == [o.token_ids for o in wanted]
    theirs, ours = unprepared.counters(), prepared.counters()
    for name in ("verifications", "verified_tokens", "accepted_tokens"):
        assert ours[f"verifier.{name}"] == theirs[f"verifier.{name}"] > 0
    runner = runner_of(prepared)
    assert set(runner.kinds) == {DECODE, VERIFY}
    ran = list(zip(runner.sizes, runner.kinds, strict=True))
    of_verify = {size for size, kind in ran if kind == VERIFY}
    assert {3, 5} <= of_verify, "padded, and full"
    records = [s for s in prepared.steps if s.graph_mode == "graph"]
    each = {DECODE: 1, VERIFY: 6}
    assert [s.num_scheduled_tokens + s.num_padded_tokens for s in records] == [
        size * each[kind] for size, kind in ran
    ]
    assert [VERIFY if s.num_draft_tokens else DECODE for s in records] == runner.kinds


def test_single_tokens_are_replayed_where_a_drafter_finds_nothing() -> None:
    prompts = mixed_prompts(3)
    prepared = tiny_engine(*KV["paged"], *RECALLING, *PREPARED)
    plain = tiny_engine(*KV["paged"])
    wanted = [o.token_ids for o in plain.generate(prompts, GREEDY)]
    assert [o.token_ids for o in prepared.generate(prompts, GREEDY)] == wanted
    assert set(runner_of(prepared).kinds) == {DECODE}
    assert len(runner_of(prepared).kinds) == GREEDY.max_tokens - 1


def test_draws_penalties_and_logprobs_are_those_of_other_steps() -> None:
    prompts, params = mixed_prompts(7, longest=40), elaborate_params()
    plain = tiny_engine(*KV["paged"])
    wanted = plain.generate(prompts, params)
    prepared = tiny_engine(*KV["paged"], *RECALLING, *PREPARED)
    teach(prepared, prompts, wanted)
    got = prepared.generate(prompts, params)
    assert [o.token_ids for o in got] == [o.token_ids for o in wanted]
    for mine, other in zip(got, wanted, strict=True):
        a, b = mine.outputs[0].logprobs, other.outputs[0].logprobs
        assert (a is None) == (b is None)
        for x, y in zip(a or [], b or [], strict=True):
            assert x.token_id == y.token_id and x.logprob == pytest.approx(y.logprob, abs=1e-4)
    assert VERIFY in runner_of(prepared).kinds
    assert prepared.counters()["verifier.accepted_tokens"] > 0


def test_penalties_count_the_drafts_before_a_token() -> None:
    """Where the step's own choice was another one, and stood in their place for a moment."""
    prompts = mixed_prompts(6, longest=30)
    params = SamplingParams(
        max_tokens=40, frequency_penalty=2.0, repetition_penalty=2.0, ignore_eos=True
    )
    wanted = tiny_engine(*KV["paged"]).generate(prompts, params)
    prepared = tiny_engine(*KV["paged"], *RECALLING, *PREPARED)
    teach(prepared, prompts, wanted, is_sure=True)
    got = prepared.generate(prompts, params)
    assert [o.token_ids for o in got] == [o.token_ids for o in wanted]
    counters = prepared.counters()
    assert counters["verifier.acceptance_rate"] == 1.0
    assert VERIFY in runner_of(prepared).kinds


@pytest.mark.parametrize("elaborate", [False, True])
def test_another_verifier_is_asked_outside(elaborate: bool, monkeypatch: Any) -> None:
    """One that does not say that it keeps the likeliest tokens."""
    monkeypatch.setattr("techniques.spec_decode.ExactMatch.is_greedy_match", False)
    prompts, params = mixed_prompts(7, longest=40), [GREEDY] * 7
    if elaborate:
        params = elaborate_params()
    wanted = tiny_engine(*KV["paged"]).generate(prompts, params)
    prepared = tiny_engine(*KV["paged"], *RECALLING, *PREPARED)
    step = prepared.parts.executor.runner.parts.verify_step  # type: ignore[attr-defined]
    assert not step.writes_tokens
    teach(prepared, prompts, wanted)
    got = prepared.generate(prompts, params)
    assert [o.token_ids for o in got] == [o.token_ids for o in wanted]
    counters = prepared.counters()
    drafts = sum(s.num_draft_tokens for s in prepared.steps)
    assert counters["verifier.verified_tokens"] == drafts > 0


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_under_traffic(tight: bool, seed: int) -> None:
    """Arrivals, aborts, stops and ends inside of drafts, and pre-emption, at random."""
    rng = random.Random(seed)
    prompts = mixed_prompts(24, seed=seed, longest=15 if tight else 50)
    least = 25 if tight else 2
    params = [SamplingParams(max_tokens=rng.randint(least, 35), ignore_eos=True) for _ in prompts]
    answers = tiny_engine(*KV["paged"]).generate(prompts, params)
    limits = {"max_model_len": 88, "kv_pool_tokens": 96} if tight else {}
    engine = tiny_engine(
        *(TIGHT if tight else KV["cached"]), *RECALLING, *PREPARED, max_num_seqs=7, **limits
    )
    teach(engine, prompts, answers)
    wanted, got, waiting = {}, {}, list(range(len(prompts)))
    aborted: set[str] = set()
    while waiting or engine.has_unfinished():
        for _ in range(rng.randint(0, 3)):
            if waiting:
                i = waiting.pop(0)
                tokens, name = answers[i].token_ids, f"r{i}"
                stop = [rng.choice(tokens)] if rng.random() < 0.4 else []
                wanted[name] = tokens[: tokens.index(stop[0]) + 1] if stop else tokens
                one = SamplingParams(
                    max_tokens=params[i].max_tokens, ignore_eos=True, stop_token_ids=stop
                )
                engine.add_request(prompts[i], one, name)
        for output in engine.step():
            got.setdefault(output.request_id, []).extend(output.new_token_ids)
        if rng.random() < 0.05 and engine.unfinished_ids():
            victim = rng.choice(engine.unfinished_ids())
            engine.abort(victim)
            aborted.add(victim)
        engine.check_integrity()
    for name, tokens in wanted.items():
        mine = got.get(name, [])
        assert mine == (tokens[: len(mine)] if name in aborted else tokens), name
    assert VERIFY in runner_of(engine).kinds
    if tight:
        assert engine.counters()["scheduler.preemptions"] > 0
    check_idle(engine)


def prepared_step_of(engine: Engine) -> tuple[Any, Any, Any]:
    runner = engine.parts.executor.runner  # type: ignore[attr-defined]
    return runner.parts.verify_step, runner.table, runner.parts.pool


def test_padding_writes_to_the_trash_block_and_to_no_row() -> None:
    engine = tiny_engine(*KV["paged"], *RECALLING, *PREPARED, max_num_seqs=5)
    step, table, pool = prepared_step_of(engine)
    engine.generate(mixed_prompts(4, longest=30), SamplingParams(max_tokens=4, ignore_eos=True))
    tensors = [table.token_ids, table.num_computed_tokens, table.block_table]
    blocks = [t[: pool.num_blocks] for t in pool.block_tensors()]
    before = [t.clone() for t in (*tensors, *blocks)]
    step.places[:, 0], step.places[:, 1] = table.padding_row, 0
    with torch.inference_mode():
        step.run(step.max_size)
    for was, now in zip(before, (*tensors, *blocks), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize("num_drafts", range(6))
def test_padded_tokens_change_nothing(num_drafts: int) -> None:
    """A request with fewer drafts than there is room for writes the keys of its own tokens, and
    finds the tokens that it finds alone, whatever stands behind its drafts."""
    engine = tiny_engine(*KV["paged"], *RECALLING, *PREPARED, max_num_seqs=5)
    step, table, pool = prepared_step_of(engine)
    prompts = mixed_prompts(3, seed=4, longest=30)
    long = [p for p in prompts if len(p) > 6]
    answers = tiny_engine(*KV["paged"]).generate(long, GREEDY)
    for i, prompt in enumerate(long):
        engine.add_request(prompt, GREEDY, f"r{i}")
    for _ in range(3):
        engine.step()
    rows = [table.row_of[f"r{i}"] for i in range(len(long))]
    block_size = pool.block_size
    for row, prompt, answer in zip(rows, long, answers, strict=True):
        known, whole = int(table.num_tokens[row]), prompt + answer.token_ids
        assert table.token_ids[row, :known].tolist() == whole[:known]
        table.token_ids[row, known:] = 7  # left there by somebody else
        drafts = torch.tensor(whole[known : known + num_drafts], dtype=torch.int32)
        table.token_ids[row, known : known + num_drafts] = drafts
        own = torch.arange(known - 1, known + num_drafts)
        slots = table.block_table[row].long()[own // block_size] * block_size + own % block_size
        step.places[:, 0], step.places[:, 1] = table.padding_row, 0
        step.places[1, 0], step.places[1, 1] = row, num_drafts
        kept = [t.clone() for t in pool.block_tensors()]
        with torch.inference_mode():
            step.run(3)
        assert step.new_ids[1].tolist() == (
            whole[known : known + num_drafts + 1] + [-1] * (5 - num_drafts)
        )
        assert int(table.num_computed_tokens[row]) == known + num_drafts
        written = set()
        for was, now in zip(kept, pool.block_tensors(), strict=True):
            changed = (was != now)[: pool.num_blocks].flatten(4).any(-1)  # by block, .., token
            written |= {b * block_size + at for b, *_, at in changed.nonzero().tolist()}
        assert written <= set(slots.tolist())
        assert len(written) >= num_drafts, "keys of drafts were written"
