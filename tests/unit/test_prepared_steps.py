"""Prepared steps of single tokens: padded, from device state alone, and with the same tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.helpers.engines import check_idle, mixed_prompts, tiny_engine
from tests.helpers.prepared import PREPARED, CallingRunner
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine

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


def runner_of(engine: Engine) -> CallingRunner:
    runner = engine.parts.graph_runner
    assert isinstance(runner, CallingRunner)
    return runner


def outputs(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    served = engine.generate(prompts, params)
    check_idle(engine)
    engine.check_integrity()
    return [(o.token_ids, o.outputs[0].logprobs) for o in served]


@pytest.mark.parametrize("kv", KV)
def test_tokens_are_those_of_steps_that_are_gathered_on_the_host(kv: str) -> None:
    rng = random.Random(0)
    prompts = mixed_prompts(13, longest=60)
    params = [SamplingParams(max_tokens=rng.randint(1, 30), ignore_eos=True) for _ in prompts]
    plain = tiny_engine(*KV[kv], max_num_seqs=5)
    prepared = tiny_engine(*KV[kv], *PREPARED, max_num_seqs=5)
    assert outputs(prepared, prompts, params) == outputs(plain, prompts, params)
    assert outputs(prepared, prompts, params) == outputs(plain, prompts, params), "and again"
    sizes = runner_of(prepared).sizes
    assert {3, 5} <= set(sizes), "padded, and full"
    records = [s for s in prepared.steps if s.graph_mode == "graph"]
    assert len(records) == len(sizes)
    assert [s.num_requests + s.num_padded_tokens for s in records] == sizes
    mine = [(s.num_requests, s.num_scheduled_tokens, s.num_context_tokens) for s in prepared.steps]
    assert mine == [
        (s.num_requests, s.num_scheduled_tokens, s.num_context_tokens) for s in plain.steps
    ]


def test_draws_penalties_and_logprobs_are_those_of_other_steps() -> None:
    prompts = mixed_prompts(6, longest=40)
    params = [
        SamplingParams(max_tokens=9, ignore_eos=True),
        SamplingParams(max_tokens=7, temperature=1.0, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.7, top_k=5, seed=4, ignore_eos=True),
        SamplingParams(max_tokens=12, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(max_tokens=8, logprobs=3, ignore_eos=True),
        SamplingParams(max_tokens=5, ignore_eos=True),
    ]
    plain, prepared = tiny_engine(*KV["paged"]), tiny_engine(*KV["paged"], *PREPARED)
    theirs, ours = outputs(plain, prompts, params), outputs(prepared, prompts, params)
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine[1] is None) == (other[1] is None)
        for a, b in zip(mine[1] or [], other[1] or [], strict=True):
            assert a.token_id == b.token_id and a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert runner_of(prepared).sizes


def test_padding_writes_to_the_trash_block_and_to_no_row() -> None:
    engine = tiny_engine(*KV["paged"], *PREPARED, max_num_seqs=5)
    runner = engine.parts.executor.runner  # type: ignore[attr-defined]
    step, table, pool = runner.parts.decode_step, runner.table, runner.parts.pool
    engine.generate(mixed_prompts(4, longest=30), SamplingParams(max_tokens=4, ignore_eos=True))
    tensors = [table.token_ids, table.num_computed_tokens, table.block_table]
    blocks = [t[: pool.num_blocks] for t in pool.block_tensors()]
    before = [t.clone() for t in (*tensors, *blocks)]
    step.rows.fill_(table.padding_row)
    with torch.inference_mode():
        step.run(step.max_size)
    for was, now in zip(before, (*tensors, *blocks), strict=True):
        assert torch.equal(was, now)
    assert step.batch(5).seq_lens.tolist() == [1] * 5
