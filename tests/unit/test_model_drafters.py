"""Drafters that run a model: their drafts are those of the model alone, whatever was scheduled."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.engines import (
    FIRST_ORDINARY_ID,
    VOCAB_SIZE,
    check_idle,
    mixed_prompts,
    run_to_end,
    shared_engine,
    tiny_engine,
)
from tests.helpers.tiny_models import tiny_model
from workbench.core.errors import ConfigError, WorkbenchError
from workbench.core.sampling import SamplingParams
from workbench.core.step import NewRequest, SchedulerOutput
from workbench.engine.draft_runner import FilledBlocks
from workbench.engine.engine import Engine

NEW = 20
#: A smaller model of the same vocabulary, with heads of another size.
OTHER = {"num_hidden_layers": 1, "hidden_size": 32, "num_key_value_heads": 1, "head_dim": 16}
PAGED = ("continuous_batching", "paged_attention")
SMALL_BLOCKS = ("engine.kv_cache.block_size=4",)


def other_model() -> Path:
    return tiny_model("llama", **OTHER)


def greedy(count: int, max_tokens: int = NEW) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=max_tokens, ignore_eos=True)] * count


def tokens_of(engine: Engine, prompts: list[list[int]], sampling: Any = None) -> list[list[int]]:
    outputs = engine.generate(prompts, sampling or greedy(len(prompts)))
    check_idle(engine)
    return [o.token_ids for o in outputs]


def drafting(*settings: str, techniques: tuple[str, ...] = (), draft: Path | None = None) -> Engine:
    named = (f"engine.drafter.model={draft}",) if draft else ()
    engine = shared_engine(
        *settings, *named, techniques=["draft_model", *techniques], max_num_seqs=3
    )
    engine.clear_cached()
    return engine


def test_the_target_itself_as_draft_is_always_right() -> None:
    """Every draft holds only if its KV is right at every position: after acceptance, over block
    borders, for prompts in pieces."""
    prompts = mixed_prompts(7, seed=3)
    for techniques, settings in (
        ((), ()),
        (PAGED, SMALL_BLOCKS),
        ((*PAGED, "chunked_prefill"), (*SMALL_BLOCKS, "engine.prefill.chunk_tokens=17")),
        ((*PAGED, "radix_cache"), SMALL_BLOCKS),
    ):
        engine = drafting(*settings, techniques=techniques)
        assert tokens_of(engine, prompts) == tokens_of(shared_engine(max_num_seqs=3), prompts)
        counts = engine.counters()
        assert counts["verifier.acceptance_rate"] == 1.0
        assert counts["verifier.mean_accepted_length"] > 4
        assert counts["drafter.draft_passes"] > 0


def test_another_models_drafts_are_its_own_greedy_tokens() -> None:
    """What is proposed first for a prompt is what the draft model alone would write."""
    prompts = mixed_prompts(5, seed=5)
    alone = tiny_engine(model=other_model())
    engine = drafting(draft=other_model())
    proposed: dict[str, list[int]] = {}
    propose = engine.parts.components["drafter"].propose  # type: ignore[attr-defined]

    def noted(context: Any) -> Any:
        drafts = propose(context)
        for request_id, draft in zip(context.request_ids, drafts.token_ids, strict=True):
            proposed.setdefault(request_id, list(draft))
        return drafts

    engine.parts.components["drafter"].propose = noted  # type: ignore[attr-defined]
    try:
        for prompt in prompts:
            proposed.clear()
            (written,) = tokens_of(engine, [prompt])
            (drafted,) = proposed.values()
            assert len(drafted) == 5
            assert drafted == tokens_of(alone, [prompt + written[:1]], greedy(1, 5))[0]
    finally:
        engine.parts.components["drafter"].propose = propose  # type: ignore[attr-defined]
    assert tokens_of(engine, prompts) == tokens_of(shared_engine(max_num_seqs=3), prompts)


@pytest.mark.parametrize("way", ["draft_model", "other", "layer_skip"])
def test_sampled_tokens_are_those_without_speculation(way: str) -> None:
    """Exact match keeps seeded draws; drafts are drawn with the same numbers, so most hold where
    the distributions are alike."""
    prompts = mixed_prompts(6, seed=9)
    sampling = [
        SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=1.0, top_p=0.9, seed=11 + i)
        if i % 3
        else SamplingParams(max_tokens=NEW, ignore_eos=True, repetition_penalty=1.3)
        for i in range(len(prompts))
    ]
    if way == "layer_skip":
        engine = shared_engine(techniques=["layer_skip"], max_num_seqs=3)
    else:
        engine = drafting(draft=other_model() if way == "other" else None)
    assert tokens_of(engine, prompts, sampling) == tokens_of(
        shared_engine(max_num_seqs=3), prompts, sampling
    )
    if way == "draft_model":
        engine.reset_counters()
        tokens_of(engine, prompts[1:3], sampling[1:3])
        assert engine.counters()["verifier.acceptance_rate"] == 1.0


def test_rejection_is_given_what_drafts_were_drawn_from() -> None:
    """The same distribution on both sides: all drafts hold, although drawn by other numbers."""
    chosen = ("engine/drafter=draft_model", "engine/verifier=rejection")
    itself = f"engine.drafter.model={tiny_model('llama')}"
    engine = tiny_engine(*chosen, itself, *SMALL_BLOCKS, techniques=PAGED)
    prompts = mixed_prompts(4, seed=2)
    sampling = [
        SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=1.0, seed=i) for i in range(4)
    ]
    found = tokens_of(engine, prompts, sampling)
    counts = engine.counters()
    assert counts["verifier.acceptance_rate"] > 0.999 and counts["verifier.accepted_tokens"] > 40
    assert found != tokens_of(shared_engine(max_num_seqs=3), prompts, sampling)
    other = tiny_engine(*chosen, f"engine.drafter.model={other_model()}")
    tokens_of(other, prompts, sampling)
    assert 0 < other.counters()["verifier.acceptance_rate"] < 0.9


def test_a_shared_prefix_is_run_once_for_drafts_too() -> None:
    rng = random.Random(4)
    prefix = [rng.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(40)]
    prompts = [prefix + [10 + i] for i in range(3)]
    engine = drafting(*SMALL_BLOCKS, techniques=(*PAGED, "radix_cache"))
    first = tokens_of(engine, prompts[:1])
    before = engine.counters()["drafter.draft_run_tokens"]
    rest = [tokens_of(engine, [prompt])[0] for prompt in prompts[1:]]
    own = engine.counters()["drafter.draft_run_tokens"] - before
    assert own < 2 * before - 60, "the prefix was run again"
    expected = [tokens_of(shared_engine(max_num_seqs=3), [prompt])[0] for prompt in prompts]
    assert [*first, *rest] == expected
    assert engine.counters()["verifier.acceptance_rate"] == 1.0


def test_a_cached_prefix_without_drafts_is_made_up_for() -> None:
    """A request of one token leaves its prefix in the cache, and no drafts were asked for."""
    prompt = mixed_prompts(1, seed=8)[0] * 3 + [9] * 24
    engine = drafting(*SMALL_BLOCKS, techniques=(*PAGED, "radix_cache"))
    tokens_of(engine, [prompt], greedy(1, 1))
    assert engine.counters()["drafter.draft_run_tokens"] == 0
    longer = [prompt + [7, 8]]
    assert tokens_of(engine, longer) == tokens_of(shared_engine(max_num_seqs=3), longer)
    assert engine.counters()["verifier.acceptance_rate"] == 1.0


def test_what_was_missed_is_made_up_for_step_by_step() -> None:
    """No pass of the draft model is larger than a step may be."""
    engine = tiny_engine(
        *SMALL_BLOCKS,
        "engine.prefill.chunk_tokens=16",
        techniques=["draft_model", *PAGED, "chunked_prefill"],
    )
    drafter: Any = engine.parts.components["drafter"]
    sizes: list[int] = []
    forward = drafter._runner.forward

    def noted(batch: Any) -> Any:
        sizes.append(batch.num_tokens)
        return forward(batch)

    drafter._runner.forward = noted
    prompts = [[5 + i] * 60 for i in range(3)]
    assert tokens_of(engine, prompts) == tokens_of(shared_engine(max_num_seqs=3), prompts)
    assert 1 < max(sizes) <= 16
    assert engine.counters()["verifier.acceptance_rate"] == 1.0


def test_a_pool_that_runs_dry_costs_drafts_and_nothing_else() -> None:
    engine = tiny_engine(
        *SMALL_BLOCKS,
        "engine.admission.headroom_tokens=2",
        techniques=["draft_model", *PAGED, "optimistic_admission"],
        kv_pool_tokens=128,
    )
    prompts = mixed_prompts(8, seed=6)
    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, greedy(1)[0], str(index))
    found = run_to_end(engine)
    expected = tokens_of(shared_engine(max_num_seqs=3), prompts)
    assert [found[str(i)] for i in range(len(prompts))] == expected
    assert engine.counters()["scheduler.preemptions"] > 0


def test_first_layers_draft_what_they_would_write() -> None:
    """All layers but none missing: as many as there are would be right always; fewer are not."""
    model = tiny_model("llama", num_hidden_layers=3)
    prompts = mixed_prompts(6, seed=12)
    engine = tiny_engine(techniques=["layer_skip"], model=model)
    drafter: Any = engine.parts.components["drafter"]
    assert len(drafter._model.layers) == 1
    assert tokens_of(engine, prompts) == tokens_of(tiny_engine(model=model), prompts)
    drafter._model.layers = engine.parts.executor.runner.parts.model.layers  # as no option would
    engine.reset_counters()
    assert tokens_of(engine, prompts) == tokens_of(tiny_engine(model=model), prompts)
    assert engine.counters()["verifier.acceptance_rate"] == 1.0


def test_the_ledger_knows_the_drafters_weights_and_kv() -> None:
    plain, engine = shared_engine(max_num_seqs=3), drafting(draft=other_model())
    held, without = engine.parts.ledger.predicted, plain.parts.ledger.predicted
    assert held["drafter"] > 0 == without["drafter"]
    assert held["kv_pool"] == without["kv_pool"] * (2 * 2 * 16 + 16) // (2 * 2 * 16)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["engine.drafter.model=null"], r"engine.drafter.model names no model"),
        (["engine.drafter.num_draft_tokens=0"], r"num_draft_tokens=0 must be 1 or more"),
    ],
)
def test_bad_options_are_named(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_engine(*settings, techniques=["draft_model"])


def test_another_vocabulary_is_refused() -> None:
    other = tiny_model("llama", vocab_size=96)
    with pytest.raises(ConfigError, match=r"vocabularies differ.*engine/drafter=ngram"):
        tiny_engine(f"engine.drafter.model={other}", techniques=["draft_model"])


def test_a_missing_draft_model_is_named() -> None:
    with pytest.raises(WorkbenchError, match="nowhere"):
        tiny_engine("engine.drafter.model=/nowhere/at/all", techniques=["draft_model"])


@pytest.mark.parametrize("layers", [2, 7, -1])
def test_layers_that_are_not_there_are_refused(layers: int) -> None:
    with pytest.raises(ConfigError, match=rf"num_layers={layers} must be 1 to 1"):
        tiny_engine(f"engine.drafter.num_layers={layers}", techniques=["layer_skip"])


def test_filled_blocks() -> None:
    filled = FilledBlocks(8, 4)
    blocks = np.array([3, 1, 6])
    assert filled.length(blocks, 10) == 0
    filled.fill(blocks, 0, 9)
    assert [filled.length(blocks, end) for end in (3, 4, 8, 9, 10, 12)] == [3, 4, 8, 9, 9, 9]
    filled.fill(blocks, 9, 11)
    assert filled.length(blocks, 12) == 11
    plan = SchedulerOutput(
        0, [], [], [], [], [_new([3, 5], num_computed=4)], {"x": [6]}, [], copies_in=[(0, 2)]
    )
    filled.note_plan(plan)
    assert filled.length(blocks, 12) == 8  # what is shared stays, and a block given out does not
    filled.note_plan(SchedulerOutput(0, [], [], [], [], [], {}, [], copies_in=[(0, 1)]))
    assert filled.length(blocks, 12) == 4


def _new(blocks: list[int], num_computed: int) -> NewRequest:
    return NewRequest("a", [1] * 8, 8, num_computed, blocks, SamplingParams(max_tokens=1), 0)


def test_random_weights_need_no_folder() -> None:
    from workbench.assemble import Limits, build_engine
    from workbench.configuration import compose_config, engine_config

    shape = (
        "{model_type: llama, architectures: [LlamaForCausalLM], vocab_size: 64, hidden_size: 32, "
    )
    shape += "intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 2, "
    shape += "num_key_value_heads: 1, max_position_embeddings: 128}"
    composed = compose_config(
        [
            "weights=random",
            "dtype=float32",
            "model.name=x",
            f"model.hf_config={shape}",
            "+technique=draft_model",
            f"engine.drafter.hf_config={shape}",
        ]
    )
    engine = build_engine(engine_config(composed, Limits(2, 64, 0), download=False))
    with torch.inference_mode():
        engine.generate([[1, 2, 3]], greedy(1))
    assert engine.counters()["verifier.acceptance_rate"] == 1.0
