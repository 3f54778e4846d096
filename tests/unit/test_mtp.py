"""Multi-token-prediction modules: their drafts are those of a plain reference, in every step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.drafting import read_drafts
from tests.helpers.engines import check_idle, mixed_prompts, tiny_engine
from tests.helpers.mtp_modules import (
    BASES,
    LAYERS,
    VOCAB_SIZE,
    Reference,
    base_model,
    folder_with,
    layout_of,
    module_tensors,
    mtp_model,
    mtp_module,
    prefix_of,
    reference,
)
from tests.helpers.prepared import MIXED_PREPARED, MixedRunner
from tests.helpers.tiny_models import FAMILIES, hf_greedy, tiny_model
from workbench.core.errors import ConfigError, WorkbenchError
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine
from workbench.engine.trees import path_to
from workbench.models.families import spec_from_hf
from workbench.slots.drafter import DraftContext, DraftTokens
from workbench.slots.graph_runner import DRAFT, MIXED, VERIFY

PAGED = ("engine/kv_cache=paged", "engine/scheduler=continuous", "engine.kv_cache.block_size=4")
KV = {
    "contiguous": (),
    "paged": PAGED,
    "cached": (
        *PAGED,
        "engine/prefix_cache=radix",
        "engine/eviction=lru",
        "engine/prefill=chunked",
        "engine.prefill.chunk_tokens=17",
    ),
}
NEW = 18
CHOSEN = ("engine/drafter=mtp", "engine/verifier=exact_match")


def engine_with(kind: str, *settings: str, num_modules: int = 1, **more: Any) -> Engine:
    chosen = (*CHOSEN, "engine.drafter.num_draft_tokens=4", *settings)
    return tiny_engine(*chosen, model=mtp_model(kind, num_modules), max_num_seqs=3, **more)


def prompts(count: int = 6, longest: int = 40, seed: int = 4) -> list[list[int]]:
    """Mixed ones, of the ids of the small vocabulary."""
    texts = mixed_prompts(count, seed, longest)
    return [[4 + i % (VOCAB_SIZE - 4) for i in ids] for ids in texts]


def greedy(count: int) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=NEW - i, ignore_eos=True) for i in range(count)]


def wanted(kind: str, texts: list[list[int]]) -> list[list[int]]:
    """What Transformers writes with the target alone."""
    return [hf_greedy(base_model(kind), ids, NEW - i) for i, ids in enumerate(texts)]


def check_every_draft(engine: Engine, module: Reference) -> list[int]:
    """From now on hold each proposal against the reference; the list gets their lengths."""
    drafter: Any = engine.parts.components["drafter"]
    propose: Callable[[DraftContext], DraftTokens] = drafter.propose
    lengths: list[int] = []

    def checked(context: DraftContext) -> DraftTokens:
        drafts = propose(context)
        proposed = read_drafts(drafter, context, drafts)
        for known, found in zip(context.token_ids, proposed, strict=True):
            assert found == module.chain(known.tolist(), len(found))
            lengths.append(len(found))
        return drafts

    drafter.propose = checked
    return lengths


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("kind", BASES)
def test_drafts_are_the_modules_in_every_step(kind: str, kv: str) -> None:
    """Behind prompts in pieces, cached prefixes, drafts that held and drafts that did not; and the
    target's layers are read as if there were no module."""
    texts = prompts()
    engine = engine_with(kind, *KV[kv])
    lengths = check_every_draft(engine, reference(kind))
    for _ in range(2):
        found = engine.generate(texts, greedy(len(texts)))
        assert [o.token_ids for o in found] == wanted(kind, texts)
        check_idle(engine)
    counts = engine.counters()
    assert counts["drafter.failures"] == 0
    assert counts["verifier.accepted_tokens"] > 5
    assert lengths.count(4) > 20


@pytest.mark.parametrize("fusing", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_drafts_are_the_modules_behind_prepared_steps(kind: str, fusing: bool) -> None:
    """Also with norms and additions within the products, as the kernels for small steps do."""
    more = ["engine.linear._target_=tests.helpers.fusing.FusingLinear"] if fusing else []
    texts = prompts(14, longest=24, seed=0)
    engine = engine_with(kind, *PAGED, *MIXED_PREPARED, *more)
    lengths = check_every_draft(engine, reference(kind))
    found = engine.generate(texts, greedy(len(texts)))
    assert [o.token_ids for o in found] == wanted(kind, texts)
    counts = engine.counters()
    assert counts["drafter.failures"] == 0 and lengths.count(4) > 20
    assert counts["verifier.accepted_tokens"] > 2
    runner = engine.parts.graph_runner
    assert isinstance(runner, MixedRunner)
    assert {VERIFY, MIXED, DRAFT} <= set(runner.kinds)


@pytest.mark.parametrize("kind", BASES)
def test_trees_follow_the_modules_likeliest_tokens(kind: str) -> None:
    """Of two depths: which nodes there are, and that each is among the likeliest behind its
    parent."""
    width = 3
    tree = ("tree=true", "tree_depth=2", f"tree_width={width}", "num_draft_tokens=9")
    engine = engine_with(kind, *PAGED, *(f"engine.drafter.{option}" for option in tree))
    module, drafter = reference(kind), engine.parts.components["drafter"]
    propose, sizes = drafter.propose, list[int]()  # type: ignore[attr-defined]

    def checked(context: DraftContext) -> DraftTokens:
        drafts: DraftTokens = propose(context)
        for i, (known, found) in enumerate(zip(context.token_ids, drafts.token_ids, strict=True)):
            parents = (drafts.parents or {})[i] or [] if found else []
            ids = known.tolist()
            for node, parent in enumerate(parents):
                before = [found[n] for n in path_to(parents, parent)] if parent >= 0 else []
                likeliest = module.logits(ids, before).topk(width).indices.tolist()
                assert found[node] in likeliest
            sizes.append(len(found))
        return drafts

    drafter.propose = checked  # type: ignore[attr-defined]
    texts = prompts(5)
    found = engine.generate(texts, greedy(len(texts)))
    assert [o.token_ids for o in found] == wanted(kind, texts)
    counts = engine.counters()
    assert counts["drafter.failures"] == 0 and counts["drafter.branching_trees"] > 10
    assert sizes.count(9) > 10


def test_of_several_modules_the_first_drafts() -> None:
    engine = engine_with("deepseek", num_modules=2)
    lengths = check_every_draft(engine, reference("deepseek"))
    texts = prompts(3)
    found = engine.generate(texts, greedy(3))
    assert [o.token_ids for o in found] == wanted("deepseek", texts)
    assert engine.counters()["drafter.failures"] == 0 and lengths.count(4) > 10


def test_a_module_apart_from_its_target() -> None:
    model = tiny_model("llama")
    engine = tiny_engine(*CHOSEN, f"engine.drafter.module={mtp_module(model)}", model=model)
    tensors = load_file(mtp_module(model) / "model.safetensors")
    lengths = check_every_draft(engine, Reference(model, tensors, "deepseek"))
    engine.generate(mixed_prompts(3), greedy(3))
    assert engine.counters()["drafter.failures"] == 0 and lengths.count(3) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_with_the_layer_of_every_family(family: str) -> None:
    model, texts = tiny_model(family), mixed_prompts(4, 4, longest=30)
    engine = tiny_engine(*CHOSEN, f"engine.drafter.module={mtp_module(model)}", model=model)
    found = engine.generate(texts, greedy(4))
    assert [o.token_ids for o in found] == [
        hf_greedy(model, ids, NEW - i) for i, ids in enumerate(texts)
    ]
    counts = engine.counters()
    assert counts["drafter.failures"] == 0 and counts["verifier.accepted_tokens"] > 0


def test_seeded_draws_are_those_without_it() -> None:
    texts = prompts(4)
    params = [
        SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.8, seed=i) for i in range(4)
    ]
    plain = tiny_engine(*PAGED, model=base_model("mimo")).generate(texts, params)
    engine = engine_with("mimo", *PAGED)
    found = engine.generate(texts, params)
    assert [o.token_ids for o in found] == [o.token_ids for o in plain]
    assert engine.counters()["verifier.accepted_tokens"] > 0


@pytest.mark.parametrize("kind", ["deepseek", "mimo"])
def test_drawn_drafts_are_tested_by_what_they_were_drawn_from(kind: str) -> None:
    settings = ("engine/drafter=mtp", "engine/verifier=rejection")
    engine = tiny_engine(*settings, model=mtp_model(kind))
    drafter: Any = engine.parts.components["drafter"]
    propose, checked, module = drafter.propose, list[int](), reference(kind)

    def noted(context: DraftContext) -> DraftTokens:
        drafts: DraftTokens = propose(context)
        for i, known in enumerate(context.token_ids):
            own = None if drafts.probs is None else drafts.probs[i]
            if own is not None and len(drafts.token_ids[i]) > 1:
                expected = module.logits(known.tolist(), drafts.token_ids[i][:1]).softmax(-1)
                torch.testing.assert_close(own[1], expected, atol=1e-4, rtol=1e-3)
                checked.append(i)
        return drafts

    drafter.propose = noted
    params = [
        SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=i) for i in (1, 2)
    ]
    engine.generate(prompts(2), params)
    assert engine.counters()["drafter.failures"] == 0
    assert len(checked) > 5 and engine.counters()["verifier.accepted_tokens"] > 0


def test_the_ledger_knows_the_module() -> None:
    held = engine_with("deepseek").parts.ledger.predicted
    without = tiny_engine(model=base_model("deepseek"), max_num_seqs=3).parts.ledger.predicted
    own = module_tensors(base_model("deepseek"), "deepseek", LAYERS, seed=0)
    size = sum(t.nbytes for n, t in own.items() if "embed_tokens" not in n and ".head." not in n)
    assert size <= held["drafter"] < size * 1.2
    assert held["kv_pool"] == without["kv_pool"] * (LAYERS + 1) // LAYERS  # one layer more


# -- random weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deepseek", "mimo"])
def test_random_weights_draw_the_module_that_the_config_has(kind: str) -> None:
    engine = tiny_engine(*CHOSEN, "weights=random", model=mtp_model(kind))
    engine.generate(prompts(2), [SamplingParams(max_tokens=8, ignore_eos=True)] * 2)
    counts = engine.counters()
    assert counts["drafter.drafted_tokens"] > 0 and counts["drafter.failures"] == 0


@pytest.mark.parametrize("weights", ["random", "checkpoint"])
def test_a_module_is_drawn_for_a_model_without_one_if_that_is_asked_for(weights: str) -> None:
    chosen = (*CHOSEN, f"weights={weights}", "engine.drafter.random_module=true")
    engine = tiny_engine(*chosen, techniques=["mtp"])
    engine.generate(mixed_prompts(2), [SamplingParams(max_tokens=8, ignore_eos=True)] * 2)
    assert engine.counters()["drafter.drafted_tokens"] > 0


@pytest.mark.parametrize("weights", ["random", "checkpoint"])
def test_a_model_without_a_module_is_refused(weights: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_engine(*CHOSEN, f"weights={weights}")
    words = ("no multi-token-prediction module", "MiMo", "engine/drafter=ngram", "layer_skip")
    assert all(word in str(error.value) for word in words)
    if weights == "random":
        assert "engine.drafter.random_module=true" in str(error.value)
    else:
        assert str(tiny_model("llama")) in str(error.value) and "eh_proj" in str(error.value)


# -- checkpoints -----------------------------------------------------------------------------------


def changed(kind: str, change: Callable[[dict[str, torch.Tensor], str], Any]) -> Path:
    """A folder whose module was changed."""
    weights = load_file(mtp_model(kind) / "model.safetensors")
    change(weights, prefix_of(layout_of(kind), 0 if kind == "mimo" else LAYERS))
    return folder_with(mtp_model(kind), weights)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (
            "deepseek",
            lambda w, p: w.pop(f"{p}hnorm.weight"),
            r"Missing: model.layers.3.hnorm.weight",
        ),
        (
            "deepseek",
            lambda w, p: w.update({f"{p}mlp.experts.0.up_proj.weight": torch.zeros(2, 2)}),
            r"Unexpected: model.layers.3.mlp.experts.0.up_proj.weight",
        ),
        (
            "mimo",
            lambda w, p: w.update({f"{p}input_proj.weight": torch.zeros(128, 64)}),
            r"input_proj.weight has \[128, 64\], expected \[64, 128\]",
        ),
        ("mimo", lambda w, p: w.pop(f"{p}self_attn.k_proj.bias"), r"Missing: .*k_proj.bias"),
    ],
)
def test_a_module_that_does_not_fit_is_named(kind: str, change: Any, words: str) -> None:
    with pytest.raises(WorkbenchError, match=words):
        tiny_engine(*CHOSEN, model=changed(kind, change))


def test_layers_that_the_config_does_not_tell_of_are_refused() -> None:
    folder = folder_with(
        mtp_model("deepseek"),
        load_file(mtp_model("deepseek") / "model.safetensors"),
        num_nextn_predict_layers=0,
    )
    with pytest.raises(WorkbenchError, match=r"Unexpected: .*model.layers.3.eh_proj.weight"):
        tiny_engine(model=folder)


def test_a_folder_without_a_module_is_named() -> None:
    with pytest.raises(ConfigError, match=r"hold no multi-token-prediction module"):
        tiny_engine(
            *CHOSEN, f"engine.drafter.module={base_model('mimo')}", model=base_model("mimo")
        )


def test_the_target_runs_without_its_module() -> None:
    for kind in ("deepseek", "mimo"):
        texts = prompts(2)
        found = tiny_engine(model=mtp_model(kind)).generate(texts, greedy(2))
        assert [o.token_ids for o in found] == wanted(kind, texts)
        assert (
            spec_from_hf(
                json.loads((mtp_model(kind) / "config.json").read_text())
            ).num_prediction_layers
            == 1
        )


@pytest.mark.parametrize("option", ["num_draft_tokens=0", "tree_depth=0"])
def test_bad_options_are_named(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} must be 1 or more"):
        engine_with("mimo", f"engine.drafter.{option}")
