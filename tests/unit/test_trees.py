"""Token trees: how they are drawn up, who sees whom, and tokens as without them."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from tests.helpers.branching import BRANCHING, BranchingDrafter
from tests.helpers.engines import check_idle, mixed_prompts, run_to_end, tiny_engine
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tree_cases import random_parents
from workbench.core.errors import ConfigError
from workbench.core.outputs import RequestOutput
from workbench.core.request import FinishReason
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine
from workbench.engine.trees import (
    chain_parents,
    depths_of,
    fault_of,
    is_chain,
    likeliest_paths,
    path_to,
    select_tree,
    static_tree,
)
from workbench.slots.verifier import DraftsToVerify, TreeShape

PAGED = ("engine/kv_cache=paged", "engine/scheduler=continuous", "engine.kv_cache.block_size=4")
KV = {
    "contiguous": (),
    "paged": PAGED,
    "cached": (
        *PAGED,
        "engine/prefix_cache=radix",
        "engine/eviction=lru",
        "engine/prefill=chunked",
        "engine.prefill.chunk_tokens=24",
    ),
}


# -- trees ----------------------------------------------------------------------------------------


def test_what_a_tree_is() -> None:
    assert chain_parents(3) == [-1, 0, 1] and is_chain([-1, 0, 1]) and is_chain([])
    assert not is_chain([-1, -1])
    parents = [-1, -1, 0, 2, 1]
    assert depths_of(parents) == [1, 1, 2, 3, 2]
    assert [path_to(parents, node) for node in range(5)] == [[0], [1], [0, 2], [0, 2, 3], [1, 4]]
    assert fault_of(parents, [1, 2, 3, 4, 5]) is None
    for bad, tokens, words in (
        ([-1, 1], [1, 2], "node 1 follows node 1"),
        ([-2], [1], "node 0 follows node -2"),
        ([-1, -1], [7, 7], "token 7 follows node -1 twice"),
        ([-1], [1, 2], "2 tokens and 1 parents"),
    ):
        assert words in str(fault_of(bad, tokens))


def test_a_tree_of_fixed_shape() -> None:
    top = [[10, 11, 12], [20, 21], [30]]
    paths = [(0,), (1,), (0, 0), (0, 1), (0, 1, 0), (2,), (2, 5), (1, 0, 0), (0, 0, 0, 0)]
    tokens, parents = static_tree(top, paths, 20)
    assert tokens == [
        10,
        11,
        20,
        21,
        30,
        12,
    ]  # what has no rank or no parent is left out
    assert parents == [-1, -1, 0, 0, 3, -1]
    assert static_tree(top, paths, 4) == (tokens[:4], parents[:4])


@pytest.mark.parametrize("seed", range(10))
def test_the_likeliest_paths(seed: int) -> None:
    """Against all paths there are, ranked by their probability."""
    rng = random.Random(seed)
    depths, width = rng.randint(1, 4), rng.randint(1, 4)
    logprobs = [
        sorted((rng.uniform(-4, 0) for _ in range(width)), reverse=True) for _ in range(depths)
    ]
    every = [
        path
        for length in range(1, depths + 1)
        for path in itertools.product(range(width), repeat=length)
    ]

    def likelihood(path: tuple[int, ...]) -> float:
        return sum(own[rank] for own, rank in zip(logprobs, path, strict=False))

    ranked = sorted(every, key=likelihood, reverse=True)
    for limit in (0, 1, 5, len(every), len(every) + 3):
        assert likeliest_paths(logprobs, limit) == ranked[:limit]


@pytest.mark.parametrize("seed", range(20))
def test_the_best_nodes_that_hang_together(seed: int) -> None:
    """Against all subtrees."""
    rng = random.Random(seed)
    count, limit = rng.randint(1, 9), rng.randint(1, 6)
    parents = random_parents(rng, count)
    own = [rng.uniform(0.1, 1.0) for _ in range(count)]
    confidence: list[float] = []
    for node, parent in enumerate(parents):
        confidence.append(own[node] * (confidence[parent] if parent >= 0 else 1.0))
    nodes, among = select_tree(confidence, parents, limit)
    assert fault_of(among, list(range(len(nodes)))) is None
    assert [parents[n] for n in nodes] == [nodes[p] if p >= 0 else -1 for p in among]
    best = 0.0
    for bits in range(1 << count):
        chosen = {n for n in range(count) if bits >> n & 1}
        if len(chosen) <= limit and all(parents[n] in chosen | {-1} for n in chosen):
            best = max(best, sum(confidence[n] for n in chosen))
    assert sum(confidence[n] for n in nodes) == pytest.approx(best)


# -- verification ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_the_path_that_agrees(seed: int) -> None:
    """Against a walk from the root, for requests of unequal trees, chains and none."""
    rng = random.Random(seed)
    vocab = 3
    trees = []
    for size in (rng.randint(0, 7), rng.randint(1, 7), 0, 4):
        tokens: list[int] = []
        parents: list[int] = []
        while len(tokens) < size:
            parent, token = rng.randint(-1, len(tokens) - 1), rng.randrange(vocab)
            if (parent, token) not in set(zip(parents, tokens, strict=True)):
                tokens.append(token)
                parents.append(parent)
        trees.append((tokens, parents))
    width = max(len(tokens) for tokens, _ in trees)
    ids = torch.full((len(trees), width), -1)
    shape = torch.zeros(2, len(trees), width, dtype=torch.int64)
    first, num_rows = [], 0
    for b, (tokens, parents) in enumerate(trees):
        ids[b, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        shape[0, b, : len(tokens)] = torch.tensor(parents, dtype=torch.int64) + 1
        shape[1, b, : len(tokens)] = torch.tensor(depths_of(parents), dtype=torch.int64)
        first.append(num_rows)
        num_rows += 1 + len(tokens)
    drawn = torch.tensor([rng.randrange(vocab) for _ in range(num_rows)])
    tree = TreeShape(shape[0], shape[1], int(shape[1].max()))
    drafts = DraftsToVerify(ids, torch.tensor(first), tree=tree)
    place, last = drafts.match_tree(drawn)
    path = drafts.path(place)
    kept = drafts.keep_path(path, last)
    by_row = drafts.by_row(kept, num_rows, path)
    rows = []
    for b, (tokens, parents) in enumerate(trees):
        at, walked, wanted = -1, [], []
        while True:
            token = int(drawn[first[b] + at + 1])
            wanted.append(token)
            rows.append((first[b] + at + 1, token))
            below = [n for n, p in enumerate(parents) if p == at and tokens[n] == token]
            if not below:
                break
            (at,) = below
            walked.append(at + 1)
        assert [n for n in path[b].tolist() if n >= 0] == walked
        assert [t for t in kept[b].tolist() if t >= 0] == wanted
    assert {row: t for row, t in rows if t} == {i: t for i, t in enumerate(by_row.tolist()) if t}


# -- the engine -----------------------------------------------------------------------------------


def drafter_of(engine: Engine) -> BranchingDrafter:
    drafter = engine.parts.components["drafter"]
    assert isinstance(drafter, BranchingDrafter)
    return drafter


def same(found: list[RequestOutput], wanted: list[RequestOutput]) -> None:
    for mine, other in zip(found, wanted, strict=True):
        for a, b in zip(mine.outputs, other.outputs, strict=True):
            assert (a.token_ids, a.finish_reason, a.text) == (b.token_ids, b.finish_reason, b.text)
            assert (a.logprobs is None) == (b.logprobs is None)
            for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
                assert x.token_id == y.token_id
                assert [t for t, _ in x.top] == [t for t, _ in y.top]
                assert x.logprob == pytest.approx(y.logprob, abs=1e-4)


def compare(params: list[SamplingParams], *settings: str, **more: Any) -> Engine:
    """The same requests with trees and without; the engine with trees."""
    prompts = mixed_prompts(len(params), longest=30, seed=3)
    plain = tiny_engine(*settings, max_num_seqs=3, **more)
    wanted = plain.generate(prompts, params)
    engine = tiny_engine(*settings, *BRANCHING, max_num_seqs=3, **more)
    drafter = drafter_of(engine)
    drafter.answers = [p + o.token_ids for p, o in zip(prompts, wanted, strict=True)]
    for seed in range(3):
        drafter.rng.seed(seed)
        same(engine.generate(prompts, params), wanted)
        check_idle(engine)
    assert drafter.num_branches > 0
    counts = engine.counters()
    assert counts["verifier.accepted_tokens"] > 0 == counts["drafter.failures"]
    return engine


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen3"])
def test_greedy_tokens_are_those_without_trees(family: str, kv: str) -> None:
    params = [SamplingParams(max_tokens=8 + 4 * i, ignore_eos=True) for i in range(6)]
    engine = compare(params, *KV[kv], model=tiny_model(family))
    assert engine.counters()["verifier.accepted_at_2"] > 0


def test_draws_penalties_and_logprobs_are_those_without_trees() -> None:
    params = [
        SamplingParams(max_tokens=16, ignore_eos=True, logprobs=2),
        SamplingParams(max_tokens=17, temperature=1.0, seed=3, ignore_eos=True, logprobs=0),
        SamplingParams(max_tokens=22, temperature=0.7, top_k=5, seed=4, ignore_eos=True),
        SamplingParams(max_tokens=22, repetition_penalty=1.3, ignore_eos=True, logprobs=1),
        SamplingParams(max_tokens=18, frequency_penalty=0.8, temperature=0.9, seed=8),
        SamplingParams(max_tokens=25, presence_penalty=0.5, ignore_eos=True),
    ]
    compare(params, *PAGED)


def test_trees_whose_drafts_are_tested_at_random() -> None:
    """Greedy requests get their own tokens, others some that they may get, with what they are
    worth."""
    prompts = mixed_prompts(6, longest=30, seed=3)
    params = [
        SamplingParams(
            max_tokens=20, ignore_eos=True, logprobs=1, temperature=0.9 * (i % 2), seed=i
        )
        for i in range(6)
    ]
    plain = tiny_engine(*PAGED)
    wanted = plain.generate(prompts, params)
    engine = tiny_engine(*PAGED, *BRANCHING[:1], "engine/verifier=rejection")
    drafter_of(engine).answers = [p + o.token_ids for p, o in zip(prompts, wanted, strict=True)]
    found = engine.generate(prompts, params)
    same(found[::2], wanted[::2])
    assert [len(o.token_ids) for o in found] == [20] * 6
    for output in found[1::2]:  # held against the model: each token's worth behind those before it
        entries = output.outputs[0].logprobs or []
        assert [e.token_id for e in entries] == output.token_ids
    index = 1
    told = [e.logprob for e in found[index].outputs[0].logprobs or []]
    for count in (3, 9, 15):
        before = prompts[index] + found[index].token_ids[:count]
        greedy = SamplingParams(max_tokens=1, ignore_eos=True, logprobs=128)
        (entry,) = plain.generate([before], [greedy])[0].outputs[0].logprobs or []
        by_token = dict(entry.top)
        assert told[count] == pytest.approx(by_token[found[index].token_ids[count]], abs=1e-4)
    assert engine.counters()["verifier.accepted_at_2"] > 0


def test_ends_inside_a_tree() -> None:
    prompts = mixed_prompts(4, longest=20, seed=5)
    plain, engine = tiny_engine(), tiny_engine(*BRANCHING)
    long = [SamplingParams(max_tokens=24, ignore_eos=True)] * 4
    wanted = plain.generate(prompts, long)
    drafter = drafter_of(engine)
    drafter.answers = [p + o.token_ids for p, o in zip(prompts, wanted, strict=True)]
    for index, output in enumerate(wanted):
        for stop in sorted(set(output.token_ids)):
            params = SamplingParams(max_tokens=24, stop_token_ids=(stop,), ignore_eos=True)
            (found,) = engine.generate([prompts[index]], params)
            assert found.token_ids == output.token_ids[: output.token_ids.index(stop) + 1]
            assert found.outputs[0].finish_reason is FinishReason.STOP
        for count in (1, 2, 3, 7):
            params = SamplingParams(max_tokens=count, ignore_eos=True)
            (found,) = engine.generate([prompts[index]], params)
            assert found.token_ids == output.token_ids[:count]
    check_idle(engine)


def test_a_small_pool_and_requests_that_begin_again() -> None:
    settings = (*KV["cached"], "engine/admission=optimistic", "engine.admission.headroom_tokens=2")
    prompts = mixed_prompts(8, longest=40, seed=6)
    params = [SamplingParams(max_tokens=20, ignore_eos=True)] * 8
    wanted = tiny_engine().generate(prompts, params)
    engine = tiny_engine(*settings, *BRANCHING, kv_pool_tokens=80)
    drafter_of(engine).answers = [p + o.token_ids for p, o in zip(prompts, wanted, strict=True)]
    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, params[index], str(index))
    found = run_to_end(engine)
    assert [found[str(i)] for i in range(8)] == [o.token_ids for o in wanted]
    assert engine.counters()["scheduler.preemptions"] > 0


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("engine/verifier=typical", "verifier Typical takes chains alone.*exact_match"),
        ("engine/attention=flex", "attention .* takes chains alone.*sdpa"),
        ("engine/draft_length=adaptive", "draft_length Adaptive takes chains alone.*full"),
    ],
)
def test_what_takes_chains_alone_is_named(setting: str, words: str) -> None:
    drafter = BRANCHING[:1] if "verifier" in setting else BRANCHING
    with pytest.raises(ConfigError, match=words):
        tiny_engine(*drafter, setting)


def test_a_tree_that_is_none_costs_its_request_the_drafts() -> None:
    engine = tiny_engine(*BRANCHING)
    drafter = drafter_of(engine)
    drafter._tree = lambda right, limit: ([5, 5], [-1, -1])  # type: ignore[method-assign]
    prompts = mixed_prompts(2)
    params = [SamplingParams(max_tokens=9, ignore_eos=True)] * 2
    found = engine.generate(prompts, params)
    same(found, tiny_engine().generate(prompts, params))
    assert engine.counters()["drafter.failures"] == 2
