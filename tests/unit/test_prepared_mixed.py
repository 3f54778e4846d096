"""Prepared steps of prompts, their pieces and single tokens: padded, and with the same tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.helpers.engines import check_idle, mixed_prompts, tiny_engine
from tests.helpers.prepared import MIXED_CALLED, MIXED_PREPARED, MixedRunner
from tests.helpers.recalling import RECALLING, RecallingDrafter
from workbench.bench.timeline import kind_of
from workbench.core.sampling import SamplingParams
from workbench.core.step import NewRequest, SchedulerOutput
from workbench.engine.engine import Engine
from workbench.engine.mixed_step import ROW, START
from workbench.slots.graph_runner import DECODE, MIXED, VERIFY

PAGED = ("engine/kv_cache=paged", "engine/scheduler=continuous")
CACHED = (
    *PAGED,
    "engine/prefix_cache=radix",
    "engine/eviction=lru",
    "engine/prefill=chunked",
    "engine.prefill.chunk_tokens=24",
)
KV = {"contiguous": ("engine/kv_cache=contiguous",), "paged": PAGED, "cached": CACHED}
#: Blocks for some of the requests, so that others are taken out and begin again.
TIGHT = (*CACHED, "engine/admission=optimistic")
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


def runner_of(engine: Engine) -> MixedRunner:
    runner = engine.parts.graph_runner
    assert isinstance(runner, MixedRunner)
    return runner


def prepared_step_of(engine: Engine) -> tuple[Any, Any, Any]:
    runner = engine.parts.executor.runner  # type: ignore[attr-defined]
    return runner.parts.mixed_step, runner.table, runner.parts.pool


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
def test_tokens_and_records_are_those_of_other_steps(kv: str) -> None:
    rng = random.Random(0)
    prompts = mixed_prompts(13, longest=12 if kv == "contiguous" else 60)
    params = [SamplingParams(max_tokens=rng.randint(1, 30), ignore_eos=True) for _ in prompts]
    plain = tiny_engine(*KV[kv], max_num_seqs=5)
    prepared = tiny_engine(*KV[kv], *MIXED_PREPARED, max_num_seqs=5)
    for _ in range(2):
        wanted, got = plain.generate(prompts, params), prepared.generate(prompts, params)
        check_idle(prepared)
        assert [o.token_ids for o in got] == [o.token_ids for o in wanted]
    runner = runner_of(prepared)
    assert set(runner.kinds) == {DECODE, MIXED}
    records = [s for s in prepared.steps if s.graph_mode == "graph"]
    assert [s.num_padded_tokens for s in records] == [
        size - s.num_scheduled_tokens for size, s in zip(runner.sizes, records, strict=True)
    ]
    mixed = [s for s, kind in zip(records, runner.kinds, strict=True) if kind == MIXED]
    assert kv == "contiguous" or any(s.num_padded_tokens for s in mixed)
    for s in mixed:
        beside = "mixed" if s.num_single_tokens else "prefill"
        assert kind_of(s) == f"{beside} graph {s.num_scheduled_tokens + s.num_padded_tokens}"
    eager = [s for s in prepared.steps if s.graph_mode == "eager"]
    assert all(s.num_scheduled_tokens > 40 for s in eager), "what fits is prepared"
    fields = ("num_requests", "num_scheduled_tokens", "num_context_tokens", "num_output_tokens")
    ours, theirs = (
        [[getattr(s, name) for name in fields] for s in engine.steps]
        for engine in (prepared, plain)
    )
    assert ours == theirs


def test_draws_penalties_and_logprobs_are_those_of_other_steps() -> None:
    prompts, params = mixed_prompts(7, longest=40), elaborate_params()
    wanted = tiny_engine(*CACHED, max_num_seqs=4).generate(prompts, params)
    prepared = tiny_engine(*CACHED, *MIXED_PREPARED, max_num_seqs=4)
    got = prepared.generate(prompts, params)
    assert [o.token_ids for o in got] == [o.token_ids for o in wanted]
    for mine, other in zip(got, wanted, strict=True):
        a, b = mine.outputs[0].logprobs, other.outputs[0].logprobs
        assert (a is None) == (b is None)
        for x, y in zip(a or [], b or [], strict=True):
            assert x.token_id == y.token_id and x.logprob == pytest.approx(y.logprob, abs=1e-4)
    assert runner_of(prepared).kinds.count(MIXED) > 3


@pytest.mark.parametrize("extra", ["tight", "cached", "overlap"])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_under_traffic(extra: str, seed: int) -> None:
    """Arrivals, aborts, stops and pre-emption at random, with draws and penalties among them."""
    rng = random.Random(seed)
    is_tight = extra == "tight"
    prompts = mixed_prompts(24, seed=seed, longest=15 if is_tight else 50)
    least = 25 if is_tight else 2
    params = [
        SamplingParams(
            max_tokens=rng.randint(least, 35),
            ignore_eos=True,
            temperature=rng.choice([0.0, 0.0, 0.8]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            seed=index,
        )
        for index, _ in enumerate(prompts)
    ]
    answers = tiny_engine(*PAGED).generate(prompts, params)
    limits = {"max_model_len": 88, "kv_pool_tokens": 96} if is_tight else {}
    more = ("engine/loop=overlapped",) if extra == "overlap" else ()
    engine = tiny_engine(
        *(TIGHT if is_tight else CACHED), *more, *MIXED_PREPARED, max_num_seqs=7, **limits
    )
    wanted: dict[str, list[int]] = {}
    got: dict[str, list[int]] = {}
    waiting = list(range(len(prompts)))
    aborted: set[str] = set()
    while waiting or engine.has_unfinished():
        for _ in range(rng.randint(0, 3)):
            if waiting:
                i = waiting.pop(0)
                engine.add_request(prompts[i], params[i], f"r{i}")
                wanted[f"r{i}"] = answers[i].token_ids
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
    assert runner_of(engine).kinds.count(MIXED) > 10
    if is_tight:
        assert engine.counters()["scheduler.preemptions"] > 0
    if extra == "overlap":
        assert engine.counters()["loop.steps_ahead"] > 20
    check_idle(engine)


def test_steps_with_drafts_are_none_of_these_and_drafters_see_the_others() -> None:
    prompts = mixed_prompts(9, longest=40)
    wanted = tiny_engine(*PAGED).generate(prompts, GREEDY)
    engine = tiny_engine(*CACHED, *RECALLING, *MIXED_PREPARED, max_num_seqs=4)
    drafter = engine.parts.components["drafter"]
    assert isinstance(drafter, RecallingDrafter)
    drafter.answers = [p + o.token_ids for p, o in zip(prompts, wanted, strict=True)]
    got = engine.generate(prompts, GREEDY)
    assert [o.token_ids for o in got] == [o.token_ids for o in wanted]
    assert {MIXED, VERIFY} <= set(runner_of(engine).kinds)
    kinds = iter(runner_of(engine).kinds)
    for step in engine.steps:
        if step.graph_mode == "graph":
            assert not (next(kinds) == MIXED and step.num_draft_tokens)
    assert engine.counters()["verifier.accepted_tokens"] > 0


def test_a_prompt_that_is_not_through_moves_on() -> None:
    """A step in which nobody yields a token."""
    engine = tiny_engine(*CACHED, *MIXED_PREPARED)
    plain = tiny_engine(*CACHED)
    prompt = mixed_prompts(1, seed=3, longest=60)[0]
    prompt = (prompt * 60)[:60]
    assert engine.generate([prompt], GREEDY)[0].token_ids == (
        plain.generate([prompt], GREEDY)[0].token_ids
    )
    silent = [s for s in engine.steps if not s.num_output_tokens]
    assert len(silent) == 2 and all(s.graph_mode == "graph" for s in silent)


def test_requests_that_yield_tokens_may_stand_anywhere() -> None:
    """Between others whose prompts are not through, as no scheduler here plans it."""
    prompts = [list(range(4 + i, 16 + i)) for i in range(4)]
    samples = [False, True, False, True]
    found = []
    for overrides in ((), MIXED_PREPARED):
        engine = tiny_engine(*PAGED, "engine.kv_cache.block_size=16", *overrides)
        runner = engine.parts.executor.runner  # type: ignore[attr-defined]
        new = [
            NewRequest(f"r{i}", prompt, len(prompt), 0, [i], GREEDY, seed=0)
            for i, prompt in enumerate(prompts)
        ]
        plan = SchedulerOutput(
            step=0,
            request_ids=[f"r{i}" for i in range(4)],
            num_scheduled_tokens=[12 if yields else 5 for yields in samples],
            num_draft_tokens=[0] * 4,
            samples=samples,
            new_requests=new,
            new_block_ids={},
            finished_request_ids=[],
        )
        output = runner.execute(plan)
        assert output.graph_mode == ("graph" if overrides else "eager")
        assert [len(tokens) for tokens in output.token_ids] == [0, 1, 0, 1]
        table = runner.table
        rows = [table.row_of[f"r{i}"] for i in range(4)]
        assert table.num_computed_tokens[rows].tolist() == [5, 12, 5, 12]
        known = [table.token_ids[row, :13].tolist() for row in rows]
        found.append((output.token_ids, known))
    assert found[0] == found[1]


def test_padding_writes_to_the_trash_block_and_to_no_row() -> None:
    engine = tiny_engine(*PAGED, *MIXED_PREPARED, max_num_seqs=5)
    step, table, pool = prepared_step_of(engine)
    assert engine.parts.ledger.predicted["mixed_step"] == step.num_bytes > 0
    engine.generate(mixed_prompts(4, longest=30), SamplingParams(max_tokens=4, ignore_eos=True))
    tensors = [table.token_ids, table.num_computed_tokens, table.block_table]
    blocks = [t[: pool.num_blocks] for t in pool.block_tensors()]
    before = [t.clone() for t in (*tensors, *blocks)]
    step.places[:, ROW], step.places[:, START] = table.padding_row, 0
    with torch.inference_mode():
        step.run(step.max_size)
    for was, now in zip(before, (*tensors, *blocks), strict=True):
        assert torch.equal(was, now)


def test_padding_changes_no_hidden_state_and_no_key() -> None:
    """One split in several sizes: its own tokens' hidden states, and what the pool holds, are the
    same to the bit, whatever lies behind them in the buffers."""
    engine = tiny_engine(*PAGED, *MIXED_PREPARED, max_num_seqs=5)
    step, table, pool = prepared_step_of(engine)
    for index, prompt in enumerate(mixed_prompts(3, seed=4, longest=30)):
        engine.add_request(prompt, GREEDY, f"r{index}")
    for _ in range(6):
        engine.step()
    rows, lengths = [table.row_of[f"r{i}"] for i in range(3)], [1, 7, 4]
    for row, length in zip(rows, lengths, strict=True):
        table.num_computed_tokens[row] -= length - 1  # runs its last tokens once more
        assert table.num_computed_tokens[row] >= 0
    starts = [0, 1, 8]
    kept = [t.clone() for t in pool.block_tensors()]
    found = []
    for size in (12, 13, 40):
        for tensor, old in zip(pool.block_tensors(), kept, strict=True):
            tensor.copy_(old)
        step._whole.input_ids.fill_(5)
        step._whole.positions.fill_(3)
        step._whole.slot_mapping.fill_(1)
        step.places[:, ROW], step.places[:, START] = table.padding_row, sum(lengths)
        step.places[:3, ROW] = torch.tensor(rows)
        step.places[:3, START] = torch.tensor(starts)
        with torch.inference_mode():
            step.run(size)
        hidden = step.hidden[size, ""][: sum(lengths)].clone()
        assert hidden.isfinite().all()
        found.append([hidden, *(t[: pool.num_blocks].clone() for t in pool.block_tensors())])
    for other in found[1:]:
        for mine, theirs in zip(found[0][1:], other[1:], strict=True):
            assert torch.equal(mine, theirs)
        # Matrix products of other sizes may sum in another order.
        torch.testing.assert_close(found[0][0], other[0], atol=1e-5, rtol=1e-5)


def test_no_step_is_prepared_that_attention_cannot_take() -> None:
    engine = tiny_engine(*PAGED, *MIXED_CALLED)  # with a backend that never can
    assert prepared_step_of(engine)[0] is None
    assert engine.parts.ledger.predicted["mixed_step"] == 0
    engine.generate([[5, 6, 7]], GREEDY)
    assert MIXED not in runner_of(engine).kinds
