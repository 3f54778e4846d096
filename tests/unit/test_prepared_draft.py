"""Drafting with a model in prepared steps: the drafts and counts of steps that are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.engines import check_idle, mixed_prompts, tiny_engine
from tests.helpers.prepared import PREPARED, CallingRunner
from tests.helpers.tiny_models import tiny_model
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine
from workbench.slots.graph_runner import DECODE, DRAFT, VERIFY

PAGED = ("engine/kv_cache=paged", "engine/scheduler=continuous", "engine.kv_cache.block_size=4")
CACHED = (*PAGED, "engine/prefix_cache=radix", "engine/eviction=lru", "engine/prefill=chunked")
OTHER = {"num_hidden_layers": 1, "hidden_size": 32, "num_key_value_heads": 1, "head_dim": 16}


def runner_of(engine: Engine) -> CallingRunner:
    runner = engine.parts.graph_runner
    assert isinstance(runner, CallingRunner)
    return runner


def drafters() -> dict[str, tuple[str, ...]]:
    other = tiny_model("llama", **OTHER)
    return {
        "itself": (
            "engine/drafter=draft_model",
            f"engine.drafter.model={tiny_model('llama')}",
        ),
        "other": ("engine/drafter=draft_model", f"engine.drafter.model={other}"),
        "layers": ("engine/drafter=layer_skip",),
    }


@pytest.mark.parametrize("kv", [(), PAGED, CACHED], ids=["contiguous", "paged", "cached"])
@pytest.mark.parametrize("which", ["itself", "other", "layers"])
def test_tokens_and_acceptance_are_those_of_other_steps(which: str, kv: tuple[str, ...]) -> None:
    prompts = mixed_prompts(9, longest=50, seed=2)
    params = [SamplingParams(max_tokens=4 + 3 * i, ignore_eos=True) for i in range(len(prompts))]
    chosen = (*kv, *drafters()[which], "engine/verifier=exact_match")
    plain = tiny_engine(*kv, max_num_seqs=5)
    wanted = [o.token_ids for o in plain.generate(prompts, params)]
    unprepared = tiny_engine(*chosen, max_num_seqs=5)
    prepared = tiny_engine(*chosen, *PREPARED, max_num_seqs=5)
    for engine in (unprepared, prepared):
        assert [o.token_ids for o in engine.generate(prompts, params)] == wanted
        check_idle(engine)
    runner = runner_of(prepared)
    assert {DRAFT, VERIFY} <= set(runner.kinds) <= {DRAFT, VERIFY, DECODE}
    sizes = {s for s, k in zip(runner.sizes, runner.kinds, strict=True) if k == DRAFT}
    assert {3, 5} <= sizes, "padded, and full"
    theirs, ours = unprepared.counters(), prepared.counters()
    for name in ("verifier.verified_tokens", "verifier.accepted_tokens", "drafter.drafted_tokens"):
        assert ours[name] == theirs[name] > 0
    if which == "itself":
        assert ours["verifier.acceptance_rate"] == 1.0
    # The first step of a request brings its prompt; nearly all others are prepared.
    num_draft_steps = runner.kinds.count(DRAFT)
    assert num_draft_steps >= 0.5 * sum(s.num_draft_tokens > 0 for s in prepared.steps)


def test_requests_that_draw_are_drafted_for_otherwise() -> None:
    prompts = mixed_prompts(4, seed=4)
    params = [
        SamplingParams(max_tokens=20, ignore_eos=True, temperature=0.8 * (i % 2), seed=i)
        for i in range(4)
    ]
    chosen = (*PAGED, *drafters()["other"], "engine/verifier=exact_match")
    wanted = [o.token_ids for o in tiny_engine(*PAGED).generate(prompts, params)]
    prepared = tiny_engine(*chosen, *PREPARED)
    assert [o.token_ids for o in prepared.generate(prompts, params)] == wanted
    assert DRAFT not in runner_of(prepared).kinds
    greedy_ones = [SamplingParams(max_tokens=12, ignore_eos=True)] * 4
    prepared.generate(prompts, greedy_ones)
    assert DRAFT in runner_of(prepared).kinds


def test_padding_and_strangers_are_left_alone() -> None:
    """A step writes the KV of its own requests and of the trash block, and nothing else."""
    engine = tiny_engine(*PAGED, *drafters()["itself"], "engine/verifier=exact_match", *PREPARED)
    runner: Any = engine.parts.executor.runner
    pool, drafter = runner.parts.pool, runner.parts.drafter
    engine.generate(mixed_prompts(3), [SamplingParams(max_tokens=9, ignore_eos=True)] * 3)
    step = drafter._step
    before = [tensor.clone() for tensor in pool.block_tensors()]
    tokens = runner.table.token_ids.clone()
    step.fill([], [], 3)
    with torch.inference_mode():
        step.run(3)
    assert torch.equal(tokens, runner.table.token_ids)
    for old, new in zip(before, pool.block_tensors(), strict=True):
        assert torch.equal(old[:-1], new[:-1])


def test_the_ledger_counts_the_steps_buffers() -> None:
    engine = tiny_engine(*PAGED, *drafters()["layers"], "engine/verifier=exact_match", *PREPARED)
    runner: Any = engine.parts.executor.runner
    (step,) = runner.parts.drafter.prepared_steps()
    assert engine.parts.ledger.predicted["draft_step"] == step.num_bytes > 0
