"""EAGLE heads in the engine: their drafts are those of the trained module, in every step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from techniques.draft_heads import EagleModule, Target
from tests.helpers.comings import NowAndThen
from tests.helpers.drafting import read_drafts
from tests.helpers.eagle_heads import eagle_head, eagle_module, loaded
from tests.helpers.engines import check_idle, mixed_prompts, shared_engine, tiny_engine
from tests.helpers.heads import untrained_heads
from tests.helpers.prepared import MIXED_PREPARED, MixedRunner
from tests.helpers.tiny_models import tiny_model
from workbench.core.errors import ConfigError, WorkbenchError
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine
from workbench.engine.trees import depths_of, path_to
from workbench.models.store import ModelStoreError, resolve_model
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


def target() -> Path:
    return tiny_model("llama", num_hidden_layers=6)


def engine_with(kind: str, *settings: str, draft_vocab_size: int = 0, **more: Any) -> Engine:
    head = eagle_head(target(), kind, draft_vocab_size)
    chosen = ("engine/drafter=eagle", "engine/verifier=exact_match", f"engine.drafter.head={head}")
    return tiny_engine(*chosen, *settings, model=target(), max_num_seqs=3, **more)


@torch.no_grad()
def chain(module: EagleModule, known: list[int], count: int) -> list[int]:
    """What the module drafts after known tokens, by itself."""
    decoder = loaded(target())
    states = Target(decoder).hidden_states([known[:-1]], module.spec.aux_layers)
    hidden = states.kept if module.spec.kind == "eagle3" else states.final
    drafts: list[int] = []
    for step in range(count):
        ids = torch.tensor([[*known, *drafts]])
        features = module(hidden, ids, step + 1)[-1][0, -1]
        drafts.append(int(module.draft_ids[module.logits(features).argmax()]))
    return drafts


@torch.no_grad()
def tree(
    module: EagleModule, known: list[int], limit: int, depth: int, width: int
) -> set[tuple[int, ...]]:
    """Paths of the tree that the module grows after known tokens by itself, each run from its
    beginning."""
    decoder = loaded(target())
    states = Target(decoder).hidden_states([known[:-1]], module.spec.aux_layers)
    hidden = states.kept if module.spec.kind == "eagle3" else states.final

    def behind(path: tuple[int, ...]) -> torch.Tensor:
        features = module(hidden, torch.tensor([[*known, *path]]), len(path) + 1)[-1][0, -1]
        return module.logits(features).log_softmax(-1)

    confidence: dict[tuple[int, ...], float] = {(): 0.0}
    newest: list[tuple[int, ...]] = [()]
    for _ in range(depth):
        newest, run = [], sorted(newest, key=lambda path: -confidence[path])[:width]
        for path in run:
            best, places = behind(path).topk(width)
            for logprob, place in zip(best.tolist(), places.tolist(), strict=True):
                newest.append((*path, int(module.draft_ids[place])))
                confidence[newest[-1]] = confidence[path] + logprob
    ranked = sorted(confidence, key=lambda path: (-confidence[path], len(path)))
    return set(ranked[1 : limit + 1])


def check_every_tree(
    engine: Engine, module: EagleModule, depth: int, width: int
) -> tuple[list[int], set[int]]:
    """As :func:`check_every_draft`, of trees; and their depths."""
    drafter: Any = engine.parts.components["drafter"]
    propose: Callable[[DraftContext], DraftTokens] = drafter.propose
    lengths: list[int] = []
    depths: set[int] = set()

    def checked(context: DraftContext) -> DraftTokens:
        drafts = propose(context)
        assert drafts.parents is not None or not any(drafts.token_ids)
        for i, (known, found) in enumerate(zip(context.token_ids, drafts.token_ids, strict=True)):
            parents = [] if drafts.parents is None else drafts.parents[i] or []
            paths = [tuple(found[n] for n in path_to(parents, at)) for at in range(len(found))]
            # Nodes that are run need slots, behind those of the pairs of known tokens.
            room = (drafter._room(context.rows[i]) - len(known) + 1) // width
            wanted = tree(module, known.tolist(), len(found), min(depth, 1 + room), width)
            assert set(paths) == wanted
            depths.update(map(len, paths))
            lengths.append(len(found))
        return drafts

    drafter.propose = checked
    return lengths, depths


def check_every_draft(engine: Engine, module: EagleModule) -> list[int]:
    """From now on hold each proposal against the module; the list gets their lengths."""
    drafter: Any = engine.parts.components["drafter"]
    propose: Callable[[DraftContext], DraftTokens] = drafter.propose
    lengths: list[int] = []

    def checked(context: DraftContext) -> DraftTokens:
        drafts = propose(context)
        proposed = read_drafts(drafter, context, drafts)
        for known, found in zip(context.token_ids, proposed, strict=True):
            assert found == chain(module, known.tolist(), len(found))
            lengths.append(len(found))
        return drafts

    drafter.propose = checked
    return lengths


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_drafts_are_the_modules_in_every_step(kind: str, kv: str) -> None:
    """Behind prompts in pieces, cached prefixes, drafts that held and drafts that did not."""
    prompts = mixed_prompts(6, longest=40, seed=4)
    params = [SamplingParams(max_tokens=NEW - i, ignore_eos=True) for i in range(len(prompts))]
    plain = tiny_engine(*KV[kv], model=target(), max_num_seqs=3)
    wanted = [o.token_ids for o in plain.generate(prompts, params)]
    engine = engine_with(kind, *KV[kv])
    lengths = check_every_draft(engine, eagle_module(target(), kind))
    for _ in range(2):
        assert [o.token_ids for o in engine.generate(prompts, params)] == wanted
        check_idle(engine)
    counts = engine.counters()
    assert counts["drafter.failures"] == 0
    assert counts["verifier.accepted_tokens"] > 0
    assert lengths.count(5) > 20


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_drafts_are_the_modules_behind_prepared_steps(kind: str) -> None:
    prompts = mixed_prompts(7, longest=60, seed=6)
    params = [SamplingParams(max_tokens=NEW - i, ignore_eos=True) for i in range(len(prompts))]
    wanted = tiny_engine(*PAGED, model=target()).generate(prompts, params)
    engine = engine_with(kind, *PAGED, *MIXED_PREPARED)
    lengths = check_every_draft(engine, eagle_module(target(), kind))
    found = engine.generate(prompts, params)
    assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
    counts = engine.counters()
    assert counts["drafter.failures"] == 0 and lengths.count(5) > 20
    if kind == "eagle":  # whose random head is right now and then
        assert counts["verifier.accepted_tokens"] > 0
    runner = engine.parts.graph_runner
    assert isinstance(runner, MixedRunner)
    assert {VERIFY, MIXED, DRAFT} <= set(runner.kinds)
    assert counts["drafter.draft_passes"] >= 5 * runner.kinds.count(DRAFT)
    assert any(s.graph_mode == "eager" for s in engine.steps), "prompts too long for a mixed step"


@pytest.mark.parametrize("settings", [(), MIXED_PREPARED], ids=["eager", "prepared"])
def test_drafts_are_the_modules_behind_steps_that_were_planned_ahead(
    settings: tuple[str, ...],
) -> None:
    overlapped = ("engine/loop=overlapped", "engine/draft_length=adaptive")
    engine = engine_with("eagle3", *PAGED, *overlapped, *settings)
    runner: Any = engine.parts.executor.runner  # type: ignore[attr-defined]
    runner.drafting.draft_length = NowAndThen(1, num_lookahead_tokens=5)
    lengths = check_every_draft(engine, eagle_module(target(), "eagle3"))
    params = [SamplingParams(max_tokens=3 * NEW - i, ignore_eos=True) for i in range(7)]
    engine.generate(mixed_prompts(7, longest=40, seed=6), params)
    counts = engine.counters()
    assert counts["drafter.failures"] == 0 and sum(map(bool, lengths)) > 10
    assert counts["loop.steps_ahead"] > 20


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_drafts_are_the_modules_where_products_take_their_neighbours(kind: str) -> None:
    """Norms and additions within the products, as the kernels for small steps have them."""
    fusing = "engine.linear._target_=tests.helpers.fusing.FusingLinear"
    engine = engine_with(kind, *PAGED, *MIXED_PREPARED, fusing)
    lengths = check_every_draft(engine, eagle_module(target(), kind))
    params = [SamplingParams(max_tokens=NEW, ignore_eos=True)] * 4
    engine.generate(mixed_prompts(4, longest=40, seed=4), params)
    assert engine.counters()["drafter.failures"] == 0 and lengths.count(5) > 10


TREE = (
    "engine.drafter.tree=true",
    "engine.drafter.num_draft_tokens=14",
    "engine.drafter.tree_depth=3",
    "engine.drafter.tree_width=8",
)


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_trees_are_the_modules_in_every_step(kind: str, kv: str) -> None:
    prompts = mixed_prompts(5, longest=40, seed=4)
    params = [SamplingParams(max_tokens=NEW - i, ignore_eos=True) for i in range(len(prompts))]
    plain = tiny_engine(*KV[kv], model=target(), max_num_seqs=3)
    wanted = [o.token_ids for o in plain.generate(prompts, params)]
    engine = engine_with(kind, *KV[kv], *TREE, draft_vocab_size=96 if kind == "eagle3" else 0)
    module = eagle_module(target(), kind, 96 if kind == "eagle3" else 0)
    lengths, depths = check_every_tree(engine, module, 3, 8)
    assert [o.token_ids for o in engine.generate(prompts, params)] == wanted
    check_idle(engine)
    counts = engine.counters()
    assert counts["drafter.failures"] == 0
    assert depths == {1, 2, 3}
    assert counts["drafter.branching_trees"] > 0 and sum(n > 7 for n in lengths) > 15


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_trees_are_the_modules_behind_branches_that_held(kind: str) -> None:
    """So wide that a random head is right now and then, with a draft that is not its first."""
    wide = ("num_draft_tokens=30", "tree_depth=2", "tree_width=24")
    settings = (*PAGED, *TREE, *(f"engine.drafter.{option}" for option in wide))
    prompts = mixed_prompts(6, longest=30, seed=4)
    params = [SamplingParams(max_tokens=40, ignore_eos=True)] * len(prompts)
    wanted = tiny_engine(*PAGED, model=target()).generate(prompts, params)
    engine = engine_with(kind, *settings)
    check_every_tree(engine, eagle_module(target(), kind), 2, 24)
    moved = count_moves(engine)
    found = engine.generate(prompts, params)
    assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
    assert engine.counters()["drafter.failures"] == 0
    assert len(moved) > 3, "no branch but the first held"


def count_moves(engine: Engine) -> list[int]:
    """From now on how many KV entries every move takes elsewhere."""
    pool: Any = engine.parts.components["kv_pool"]
    move, moved = pool.move, list[int]()
    pool.move = lambda a, b: (moved.append(int((a != b).sum())), move(a, b))[1]
    return moved


def test_a_tree_near_the_end_of_what_its_request_may_be() -> None:
    """Where no room is left for the nodes that the head runs, the tree is less deep."""
    prompts = [list(range(1, 20)), list(range(5, 40))]
    engine = engine_with("eagle", *PAGED, *TREE, max_model_len=52)
    params = [SamplingParams(max_tokens=52 - len(p), ignore_eos=True) for p in prompts]
    plain = tiny_engine(*PAGED, model=target(), max_model_len=52)
    wanted = [o.token_ids for o in plain.generate(prompts, params)]
    depths: list[int] = []
    drafter: Any = engine.parts.components["drafter"]
    propose = drafter.propose

    def noted(context: DraftContext) -> DraftTokens:
        drafts = propose(context)
        depths.extend(max(depths_of(p or [-1])) for p in drafts.parents or [])
        return drafts

    drafter.propose = noted
    assert [o.token_ids for o in engine.generate(prompts, params)] == wanted
    assert engine.counters()["drafter.failures"] == 0
    assert {1, 3} <= set(depths)


def test_drafts_begin_behind_steps_that_are_queued() -> None:
    """One run of the drafting step for each that verified, and none more in between; some requests
    end meanwhile."""
    prompts = mixed_prompts(7, longest=40, seed=6)
    params = [SamplingParams(max_tokens=NEW - 2 * i, ignore_eos=True) for i in range(7)]
    wanted = tiny_engine(*PAGED, model=target()).generate(prompts, params)
    engine = engine_with("eagle3", *PAGED, *MIXED_PREPARED)
    lengths = check_every_draft(engine, eagle_module(target(), "eagle3"))
    drafter: Any = engine.parts.components["drafter"]
    taken, propose = list[bool](), drafter.propose

    def noted(context: DraftContext) -> DraftTokens:
        drafts: DraftTokens = propose(context)
        taken.append(drafts.on_device is not None and all(drafts.on_device))
        return drafts

    drafter.propose = noted
    found = engine.generate(prompts, params)
    assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
    assert lengths.count(5) > 10 and engine.counters()["drafter.failures"] == 0
    kinds: list[str] = engine.parts.graph_runner.kinds  # type: ignore[attr-defined]
    after = [b for a, b in itertools.pairwise(kinds) if a == VERIFY]
    assert set(after) == {DRAFT}
    assert taken.count(True) >= kinds.count(VERIFY) / 2
    assert not drafter._begun


def test_sampled_requests_beside_greedy_ones_behind_prepared_steps() -> None:
    """What such a step wrote for itself is not what came out: keys are written once more."""
    prompts = mixed_prompts(6, longest=60, seed=6)
    params = [
        SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.7 * (i % 2), seed=i)
        for i in range(len(prompts))
    ]
    wanted = tiny_engine(*PAGED, model=target()).generate(prompts, params)
    found, drafts = [], []
    for more in ((), MIXED_PREPARED):
        engine = engine_with("eagle", *PAGED, *more)
        drafter: Any = engine.parts.components["drafter"]
        propose, own = drafter.propose, list[list[list[int]]]()

        def noted(
            context: DraftContext, drafter: Any = drafter, propose: Any = propose, own: Any = own
        ) -> DraftTokens:
            proposed: DraftTokens = propose(context)
            own.append(read_drafts(drafter, context, proposed))
            return proposed

        drafter.propose = noted
        found.append([o.token_ids for o in engine.generate(prompts, params)])
        drafts.append(own)
    assert found[0] == found[1] == [o.token_ids for o in wanted]
    assert drafts[0] == drafts[1] and len(drafts[0]) > 10


def test_medusa_drafts_are_those_behind_other_steps() -> None:
    prompts = mixed_prompts(6, longest=50, seed=6)
    params = [SamplingParams(max_tokens=NEW, ignore_eos=True)] * 6
    heads = f"engine.drafter.head={untrained_heads(target())}"
    chosen = ("engine/drafter=medusa", "engine/verifier=exact_match", heads, *PAGED)
    found = []
    for more in ((), MIXED_PREPARED):
        engine = tiny_engine(*chosen, *more, model=target(), max_num_seqs=3)
        tokens = [o.token_ids for o in engine.generate(prompts, params)]
        counts = engine.counters()
        found.append((tokens, counts["drafter.drafted_tokens"], counts["verifier.accepted_tokens"]))
    assert found[0] == found[1] and found[0][1] > 0


@pytest.mark.parametrize("tree", ["confidence", "static"])
@pytest.mark.parametrize("kv", KV)
def test_medusa_trees_are_those_of_the_heads(tree: str, kv: str) -> None:
    """Each proposal against the heads on the last hidden state of the whole text by itself."""
    limit, width = 7, 3
    engine = tiny_engine(
        "engine/drafter=medusa",
        "engine/verifier=exact_match",
        f"engine.drafter.head={untrained_heads(target())}",
        f"engine.drafter.tree={tree}",
        f"engine.drafter.num_draft_tokens={limit}",
        f"engine.drafter.tree_width={width}",
        "engine.drafter.rank_accuracies=[0.5,0.3,0.2]",
        *KV[kv],
        model=target(),
        max_num_seqs=3,
    )
    drafter: Any = engine.parts.components["drafter"]
    propose, whole, checked = drafter.propose, Target(loaded(target())), list[int]()

    def check(context: DraftContext) -> DraftTokens:
        drafts: DraftTokens = propose(context)
        assert drafts.parents is not None
        for i, known in enumerate(context.token_ids):
            found, parents = drafts.token_ids[i], drafts.parents[i] or []
            final = whole.hidden_states([known[:-1].tolist()], ()).final[0, -1:]
            ids, logprobs = drafter._heads.top(final, width)
            if tree == "static":
                logprobs = torch.tensor([0.5, 0.3, 0.2]).log().expand(1, 3, 3)
            paths = {
                tuple(int(ids[0, depth, rank]) for depth, rank in enumerate(ranks)): float(
                    sum(logprobs[0, depth, rank] for depth, rank in enumerate(ranks))
                )
                for length in (1, 2, 3)
                for ranks in itertools.product(range(width), repeat=length)
            }
            own = {tuple(found[n] for n in path_to(parents, at)) for at in range(len(found))}
            assert len(own) == len(found) == min(limit, context.max_draft_tokens[i])
            least = sorted(paths.values(), reverse=True)[: len(found)]
            assert sorted((paths[path] for path in own), reverse=True) == pytest.approx(least)
            checked.append(len(found))
        return drafts

    drafter.propose = check
    prompts = mixed_prompts(6, longest=50, seed=6)
    params = [SamplingParams(max_tokens=NEW, ignore_eos=True)] * 6
    wanted = [o.token_ids for o in tiny_engine(model=target()).generate(prompts, params)]
    assert [o.token_ids for o in engine.generate(prompts, params)] == wanted
    counts = engine.counters()
    assert counts["drafter.failures"] == 0 and len(checked) > 30
    assert counts["drafter.branching_trees"] > 30 and counts["verifier.accepted_tokens"] > 0
    assert counts["drafter.drafted_tokens"] == sum(checked)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("tree=always", "tree 'always'. Valid: confidence, none, static"),
        ("tree_width=0", "tree_width=0 must be 1 or more"),
        ("rank_accuracies=[0.5,1.5]", r"rank_accuracies=\[0.5, 1.5\] must be shares"),
        ("random_heads=-1", "random_heads=-1 must be 0 or more"),
        ("tree_width=129", "tree_width=129 is over the 128 ids"),
    ],
)
def test_medusa_settings_that_cannot_be(setting: str, words: str) -> None:
    heads = f"engine.drafter.head={untrained_heads(target())}"
    chosen = ("engine/drafter=medusa", "engine/verifier=exact_match", heads)
    with pytest.raises(ConfigError, match=words):
        tiny_engine(*chosen, f"engine.drafter.{setting}", model=target())


def test_a_cached_prefix_that_goes_on_otherwise() -> None:
    """The last pair of the prefix has the other text's next token: a draft may be worse for it."""
    prompts = mixed_prompts(3, longest=40, seed=4)
    prompts += [prompt + [7, 9] for prompt in prompts]
    params = [SamplingParams(max_tokens=NEW, ignore_eos=True)] * 6
    wanted = [o.token_ids for o in tiny_engine(model=target()).generate(prompts, params)]
    engine = engine_with("eagle3", *KV["cached"])
    assert [o.token_ids for o in engine.generate(prompts, params)] == wanted
    assert engine.counters()["verifier.accepted_tokens"] > 0


def test_a_reduced_vocabulary() -> None:
    module = eagle_module(target(), "eagle3", 40)
    engine = engine_with("eagle3", *PAGED, draft_vocab_size=40)
    lengths = check_every_draft(engine, module)
    prompts = mixed_prompts(3, seed=1)
    params = [SamplingParams(max_tokens=NEW, ignore_eos=True)] * 3
    engine.generate(prompts, params)
    assert engine.counters()["drafter.failures"] == 0 and sum(lengths) > 30
    # Drawn drafts and what they were drawn from, of those ids alone.
    chosen = ("engine/drafter=eagle", "engine/verifier=rejection")
    head = f"engine.drafter.head={eagle_head(target(), 'eagle3', 40)}"
    drawing = tiny_engine(*chosen, head, model=target())
    sampled = [
        SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=1.0, seed=i) for i in (1, 2)
    ]
    drawing.generate(prompts[:2], sampled)
    assert drawing.counters()["drafter.failures"] == 0
    assert drawing.counters()["verifier.accepted_tokens"] > 0


def test_seeded_draws_are_those_without_it() -> None:
    prompts = mixed_prompts(4, seed=2)
    params = [
        SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.8, seed=i) for i in range(4)
    ]
    wanted = tiny_engine(*PAGED, model=target()).generate(prompts, params)
    found = engine_with("eagle3", *PAGED).generate(prompts, params)
    assert [o.token_ids for o in found] == [o.token_ids for o in wanted]


def test_the_ledger_knows_the_head() -> None:
    held = engine_with("eagle3").parts.ledger.predicted
    without = tiny_engine(model=target(), max_num_seqs=3).parts.ledger.predicted
    assert held["drafter"] > 0
    assert held["kv_pool"] == without["kv_pool"] * 7 // 6  # one layer more


def test_random_weights_draw_a_head() -> None:
    engine = tiny_engine(
        "weights=random", "engine.drafter.draft_vocab_size=50", techniques=["eagle"]
    )
    engine.generate(mixed_prompts(2), [SamplingParams(max_tokens=8, ignore_eos=True)] * 2)
    assert engine.counters()["drafter.drafted_tokens"] > 0


def test_a_failing_head_costs_drafts_alone() -> None:
    engine = engine_with("eagle3")
    drafter: Any = engine.parts.components["drafter"]

    def fails(*_: Any) -> None:
        raise RuntimeError("no such layer")

    drafter._model.fill = fails
    prompts = mixed_prompts(2)
    params = [SamplingParams(max_tokens=8, ignore_eos=True)] * 2
    found = [o.token_ids for o in engine.generate(prompts, params)]
    assert found == [o.token_ids for o in tiny_engine(model=target()).generate(prompts, params)]
    assert engine.counters()["drafter.failures"] == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["engine.drafter.head=null"],
            r"engine.drafter.head names no trained head, and none for this model comes with the "
            r"workbench \(those that come are for smollm2-135m-instruct.*train_head",
        ),
        (["engine.drafter.kind=eagle9"], r"eagle9"),
        (["engine.drafter.num_draft_tokens=0"], r"num_draft_tokens=0 must be 1 or more"),
    ],
)
def test_bad_options_are_named(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_engine("engine/drafter=eagle", "engine/verifier=exact_match", *settings)


def test_the_head_that_comes_for_the_default_model_drafts_what_it_writes() -> None:
    try:
        found = resolve_model("smollm2-135m-instruct", download=False)
    except ModelStoreError:
        pytest.skip("the default model is not in the store")
    question = {"role": "user", "content": "List five tips for learning to cook."}
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True)["input_ids"]
    texts: list[list[int]] = []
    for drafting in (
        [],
        ["engine/drafter=eagle"],
        ["engine/drafter=eagle", "engine.drafter.tree=true"],
    ):
        settings = [*drafting, "engine/verifier=exact_match"] if drafting else []
        engine = tiny_engine(*settings, model=found.path, max_num_seqs=1, max_model_len=160)
        (output,) = engine.generate([prompt], [SamplingParams(max_tokens=64)])
        texts.append(output.token_ids)
        if drafting:
            assert engine.counters()["verifier.mean_accepted_length"] > 1.8
    assert texts[0] == texts[1] == texts[2]


def test_a_head_for_another_model_is_refused() -> None:
    head = eagle_head(tiny_model("llama", hidden_size=32, head_dim=16, num_key_value_heads=1))
    with pytest.raises(WorkbenchError, match="hidden size of 32, and the target has 64"):
        tiny_engine(f"engine.drafter.head={head}", techniques=["eagle"])
    assert shared_engine(max_num_seqs=3)
