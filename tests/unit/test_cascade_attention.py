"""Cascade attention: which requests share a prefix, and that reading it once changes nothing."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from techniques.cascade_attention.backend import CascadeAttention, CascadeConfig
from techniques.cascade_attention.groups import PrefixGroup, find_groups
from techniques.cascade_attention.plan import PlanBuffers, group_tensors
from tests.helpers.engines import FIRST_ORDINARY_ID, VOCAB_SIZE, run_to_end, tiny_engine
from tests.helpers.prepared import CALLED, CallingRunner
from tests.helpers.tiny_models import hf_greedy, tiny_model
from workbench.configuration import load_markers, options_of
from workbench.core.errors import ConfigError, UnsupportedError
from workbench.core.sampling import SamplingParams
from workbench.core.step import ForwardBatch
from workbench.engine.engine import Engine
from workbench.slots.attention import AttentionLayer, SdpaAttention
from workbench.slots.kv_pool import KVShape, ModelDtypePool

CACHES = [name for name in options_of("engine/prefix_cache") if name != "none"]

# -- groups ---------------------------------------------------------------------------------------


def table_of(rows: Sequence[Sequence[int]], width: int = 12) -> np.ndarray:
    """Block tables whose unused entries all hold the same, as if they were shared."""
    table = np.full((len(rows), width), 7777, np.int32)
    for row, blocks in zip(table, rows, strict=True):
        row[: len(blocks)] = blocks
    return table


def groups_of(
    rows: Sequence[Sequence[int]], min_requests: int = 2, min_blocks: int = 1
) -> list[tuple[tuple[int, ...], int]]:
    found = find_groups(
        table_of(rows), [len(r) for r in rows], min_requests=min_requests, min_blocks=min_blocks
    )
    return [(group.members, group.num_blocks) for group in found]


def test_requests_with_the_same_first_blocks_are_a_group() -> None:
    assert groups_of([[1, 2, 3], [9, 8], [1, 2, 5], [1, 2]]) == [((0, 2, 3), 2)]
    assert groups_of([[1, 2], [3, 4], [1, 5], [3, 4, 6]]) == [((0, 2), 1), ((1, 3), 2)]
    assert groups_of([[1], [2], [3]]) == []
    assert groups_of([[], [], []]) == [], "entries past the end are not shared"
    assert groups_of([[1, 2], [3, 2]]) == [], "a block counts only behind the same blocks"
    assert groups_of([]) == []


def test_limits_are_kept() -> None:
    rows = [[1, 2, 3], [1, 2, 4], [1, 2, 5], [6, 7, 8], [6, 7, 9]]
    assert groups_of(rows, min_requests=3) == [((0, 1, 2), 2)]
    assert groups_of(rows, min_blocks=3) == []
    assert groups_of(rows, min_requests=4) == []


def test_nested_prefixes_are_cut_where_it_saves_most() -> None:
    # Five share one block, three of them three more: (3 - 1) * 4 saves more than (5 - 1) * 1.
    rows = [[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 9], [1, 2, 3, 4, 6], [1, 8]]
    assert groups_of(rows) == [((0, 1, 3), 4), ((2, 4), 1)]
    assert groups_of(rows, min_requests=3) == [((0, 1, 3), 4)]
    # Here one group of all saves more than any cut.
    assert groups_of([[1, 2, 3], [1, 2, 3], [1, 2, 4], [1, 2, 5]]) == [((0, 1, 2, 3), 2)]


def best_saving(rows: list[list[int]], min_requests: int, min_blocks: int) -> int:
    """The most that any partition into groups saves, by trying all of them."""

    def value(part: tuple[int, ...]) -> int:
        if len(part) < min_requests:
            return 0
        columns = zip(*(rows[b] for b in part), strict=False)
        shared = len(list(itertools.takewhile(lambda c: len(set(c)) == 1, columns)))
        return (len(part) - 1) * shared if shared >= min_blocks else 0

    @functools.cache
    def best(left: tuple[int, ...]) -> int:
        if not left:
            return 0
        first, others = left[0], left[1:]
        choices = []
        for size in range(len(others) + 1):
            for more in itertools.combinations(others, size):
                rest = tuple(b for b in others if b not in more)
                choices.append(value((first, *more)) + best(rest))
        return max(choices)

    return best(tuple(range(len(rows))))


def chosen_saving(rows: list[tuple[int, list[int]]], min_requests: int) -> tuple[int, int]:
    """The rule of :func:`find_groups` on the tree of prefixes, from the top down.

    What is saved, and how many are in no group.
    """
    columns = zip(*(blocks for _, blocks in rows), strict=False)
    shared = len(list(itertools.takewhile(lambda c: len(set(c)) == 1, columns)))
    branches: dict[int, list[tuple[int, list[int]]]] = {}
    for row, (name, blocks) in enumerate(rows):
        key = blocks[shared] if len(blocks) > shared else -1 - row  # ends here: on its own
        branches.setdefault(key, []).append((name, blocks))
    saved = left = 0
    for branch in branches.values():
        within = chosen_saving(branch, min_requests) if len(branch) > 1 else (0, 1)
        saved, left = saved + within[0], left + within[1]
    rest = (left - 1) * shared if left >= min_requests else 0
    together = (len(rows) - 1) * shared if len(rows) >= min_requests else 0
    if together and together >= saved + rest:
        return together, 0
    return saved + rest, 0 if rest else left


@pytest.mark.parametrize("seed", range(100))
def test_groups_of_random_trees_are_valid_and_save_what_the_rule_says(seed: int) -> None:
    rng = random.Random(seed)
    tree: list[list[int]] = [[]]
    for block in range(10):  # a random tree: a block has one parent
        tree.append([*rng.choice(tree), block])
    rows = [
        [*rng.choice(tree), *([100 + i] if rng.random() < 0.5 else [])]
        for i in range(rng.randint(1, 7))
    ]
    min_requests, min_blocks = rng.choice([2, 2, 3]), rng.choice([1, 1, 2])
    found = groups_of(rows, min_requests, min_blocks)
    members = [b for group, _ in found for b in group]
    assert len(set(members)) == len(members), "a request is in two groups"
    for group, num_blocks in found:
        assert len(group) >= min_requests and num_blocks >= min_blocks
        assert len({tuple(rows[b][:num_blocks]) for b in group}) == 1
        assert all(len(rows[b]) >= num_blocks for b in group)
    saved = sum(PrefixGroup(*group).saved_blocks for group in found)
    assert saved <= best_saving(rows, min_requests, min_blocks)
    if min_blocks == 1:
        assert saved == chosen_saving(list(enumerate(rows)), min_requests)[0]


# -- one layer ------------------------------------------------------------------------------------

SIZE = 4
LAYER = AttentionLayer(0, 4, 2, 16, scale=0.25)


def batch_of(rows: Sequence[Sequence[int]], lengths: list[int], queries: list[int]) -> ForwardBatch:
    """Requests with these blocks: ``lengths`` tokens each, of which the last ``queries`` run."""
    table = table_of(rows)
    return ForwardBatch(
        input_ids=torch.zeros(sum(queries), dtype=torch.int64),
        positions=torch.cat(
            [torch.arange(n - q, n) for n, q in zip(lengths, queries, strict=True)]
        ),
        query_start_loc=torch.tensor([0, *queries]).cumsum(0).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=torch.from_numpy(table),
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64),
        logits_indices=torch.zeros(0, dtype=torch.int64),
        rows=torch.arange(len(rows)),
        query_lens_host=queries,
        seq_lens_host=lengths,
        block_size=SIZE,
    )


def make_pool(num_blocks: int = 20, dtype: torch.dtype = torch.float32) -> ModelDtypePool:
    shape = KVShape((LAYER.num_kv_heads,), (LAYER.head_dim,), dtype)
    pool = ModelDtypePool(
        shape=shape, num_blocks=num_blocks, block_size=SIZE, device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(0)
    for cache in pool.layer(0):
        cache.copy_(torch.randn(cache.shape, generator=generator))
    return pool


def backend(**fields: int) -> CascadeAttention:
    return CascadeAttention(CascadeConfig(**{"min_requests": 2, "min_shared_tokens": 4, **fields}))


SHARED = [[1, 2, 3, 4], [1, 2, 5, 6], [7, 8, 9], [1, 2, 3, 10], [7, 8, 11, 12]]
BATCHES: dict[str, tuple[list[int], list[int]]] = {
    "decodes": ([13, 16, 9, 15, 14], [1, 1, 1, 1, 1]),
    "drafts": ([13, 16, 12, 15, 14], [4, 1, 3, 2, 1]),
    "pieces of prompts": ([16, 16, 12, 13, 16], [7, 8, 4, 1, 3]),
    "some share nothing yet": ([13, 16, 9, 15, 14], [13, 1, 1, 1, 9]),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_of_the_plain_backend(
    name: str, soft_cap: float | None, dtype: torch.dtype
) -> None:
    lengths, queries = BATCHES[name]
    batch, pool = batch_of(SHARED, lengths, queries), make_pool(dtype=dtype)
    layer = dataclasses.replace(LAYER, soft_cap=soft_cap)
    q = torch.randn(sum(queries), 4, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))
    cascade, plain = backend(), SdpaAttention()
    metadata = cascade.build_metadata(batch)
    assert metadata.groups
    out = cascade.forward(q.clone(), layer, metadata, pool)
    expected = plain.forward(q.clone(), layer, plain.build_metadata(batch), pool)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


def test_the_prefix_is_read_from_the_group_s_blocks() -> None:
    """Not from each request's: what one changes there, all of its group see."""
    batch, pool = batch_of(SHARED, *BATCHES["decodes"]), make_pool()
    q = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(1))
    cascade = backend()
    metadata = cascade.build_metadata(batch)
    before = cascade.forward(q, LAYER, metadata, pool)
    batch.block_table[[1, 3], :2] = 15  # the plain pass no longer looks there
    assert torch.equal(cascade.forward(q, LAYER, metadata, pool), before)


def test_layers_with_a_window_take_the_plain_kernel() -> None:
    batch, pool = batch_of(SHARED, *BATCHES["decodes"]), make_pool()
    layer = dataclasses.replace(LAYER, sliding_window=3)
    q = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(1))
    cascade, plain = backend(), SdpaAttention()
    out = cascade.forward(q, layer, cascade.build_metadata(batch), pool)
    torch.testing.assert_close(out, plain.forward(q, layer, batch, pool))


def test_tokens_that_this_step_writes_are_shared_by_nobody() -> None:
    """Request 0 is still computing what the others share: one block of it is complete."""
    cascade = backend()
    groups = cascade.build_metadata(batch_of(SHARED, [13, 16, 9, 15, 14], [9, 1, 1, 1, 1])).groups
    assert [(g.members, g.num_blocks) for g in groups] == [((0, 1, 3), 1), ((2, 4), 2)]
    groups = cascade.build_metadata(batch_of(SHARED, [13, 16, 9, 15, 14], [13, 1, 1, 1, 1])).groups
    assert [(g.members, g.num_blocks) for g in groups] == [((1, 3), 2), ((2, 4), 2)]


def test_tensors_say_what_the_groups_are() -> None:
    batch = batch_of(SHARED, [13, 16, 9, 15, 14], [2, 1, 3, 1, 1])
    groups = [PrefixGroup((0, 3), 3), PrefixGroup((2, 4), 2)]
    tensors = group_tensors(batch, groups)
    assert tensors.group_block_table.tolist() == [[1, 2, 3], [7, 8, 0]]
    assert tensors.prefix_lens.tolist() == [12, 8]
    assert tensors.token_index.tolist() == [0, 1, 6, 3, 4, 5, 7]
    assert tensors.group_start_loc.tolist() == [0, 3, 7]
    assert tensors.key_start.tolist() == [12, 0, 8, 12, 8]
    for field in dataclasses.fields(tensors):
        tensor = getattr(tensors, field.name)
        assert tensor.dtype == torch.int32
        assert tensor.storage_offset() % 4 == 0, "kernels are compiled anew for odd addresses"


def test_a_piece_of_a_prompt_is_in_no_group() -> None:
    lengths, queries = [16, 40, 12, 15, 14], [1, 20, 1, 1, 1]
    rows = [[*row, *range(12 + 6 * i, 18 + 6 * i)] for i, row in enumerate(SHARED)]
    batch, pool = batch_of(rows, lengths, queries), make_pool(50)
    cascade, plain = backend(), SdpaAttention()
    metadata = cascade.build_metadata(batch)
    assert [g.members for g in metadata.groups] == [(0, 3), (2, 4)]
    q = torch.randn(sum(queries), 4, 16, generator=torch.Generator().manual_seed(1))
    out = cascade.forward(q.clone(), LAYER, metadata, pool)
    torch.testing.assert_close(out, plain.forward(q, LAYER, batch, pool), atol=1e-5, rtol=1e-5)


def test_a_prepared_step_reads_the_groups_that_were_chosen_last() -> None:
    """Its metadata is made once, and is good for whatever batch comes."""
    pool, cascade, plain = make_pool(), backend(max_groups=3), SdpaAttention()
    (form,) = cascade.step_forms(batch_of(SHARED, *BATCHES["decodes"]))
    assert (form.name, form.granularity) == ("cascade", CascadeConfig().step_granularity)
    assert backend(min_requests=6).step_forms(batch_of(SHARED, *BATCHES["decodes"])) == ()
    batch = batch_of(SHARED, *BATCHES["decodes"])
    metadata = cascade.prepared_metadata(batch, form.name)
    assert metadata.tensors is not None
    batch.seq_lens_host, batch.query_lens_host = [-1] * 5, [-1] * 5
    q = torch.randn(5, 4, 16, generator=torch.Generator().manual_seed(1))

    def check() -> None:
        out = cascade.forward(q.clone(), LAYER, metadata, pool)
        expected = plain.forward(q.clone(), LAYER, now, pool)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)

    now = batch_of(SHARED, *BATCHES["decodes"])
    check()  # nothing was chosen: there are no groups
    other = [SHARED[0], *SHARED[2:], [13, 14, 15, 16]]
    cases = [SHARED, [SHARED[i] for i in (1, 4, 3, 2, 0)], other]
    lengths = [[13, 16, 9, 15, 14], [16, 14, 15, 9, 13], [13, 9, 15, 14, 13]]
    chosen = []
    for rows, lens in zip(cases, lengths, strict=True):
        now = batch_of(rows, lens, [1] * 5)
        batch.block_table.copy_(now.block_table)
        batch.seq_lens.copy_(now.seq_lens)
        assert cascade.choose_form(now) == form.name
        chosen.append(metadata.tensors.key_start.tolist())
        check()
    assert chosen == [[8, 8, 8, 8, 8], [8, 8, 8, 8, 8], [12, 8, 12, 8, 0]]
    before = [t.clone() for t in dataclasses.astuple(metadata.tensors)]
    alone = batch_of([[i, i + 1, i + 2] for i in range(0, 15, 3)], [11] * 5, [1] * 5)
    assert cascade.choose_form(alone) == "", "nobody shares: the plain form"
    assert all(map(torch.equal, before, dataclasses.astuple(metadata.tensors)))


def test_of_more_groups_than_fit_those_that_save_most_are_kept() -> None:
    cascade = backend(max_groups=1)
    batch = batch_of(SHARED, *BATCHES["decodes"])
    (form,) = cascade.step_forms(batch)
    assert cascade.choose_form(batch) == form.name
    tensors = cascade.prepared_metadata(batch, form.name).tensors
    assert tensors is not None
    assert tensors.prefix_lens.tolist() == [8] and tensors.key_start.tolist() == [8, 8, 0, 8, 0]
    assert tensors.token_index.tolist()[:3] == [0, 1, 3]
    assert tensors.group_start_loc.tolist() == [0, 3]
    cascade.note_prepared("")
    assert not any(cascade.counters().values())
    cascade.note_prepared(form.name)
    assert cascade.counters()["prefix_tokens_saved"] == 16


def test_buffers_stay_where_they_are() -> None:
    batch = batch_of(SHARED, *BATCHES["decodes"])
    buffers = PlanBuffers(8, 12, 3, torch.device("cpu"))
    views = buffers.tensors(6)
    assert [tuple(t.shape) for t in dataclasses.astuple(views)] == [(3, 12), (3,), (6,), (4,), (6,)]
    for field in dataclasses.fields(views):
        assert getattr(views, field.name).storage_offset() % 4 == 0
    buffers.write(batch, [PrefixGroup((0, 3), 3), PrefixGroup((2, 4), 2)])
    assert views.group_block_table[:, :4].tolist() == [[1, 2, 3, 0], [7, 8, 0, 0], [0] * 4]
    assert views.prefix_lens.tolist() == [12, 8, 0]
    assert views.token_index.tolist() == [0, 3, 2, 4, 0, 0]
    assert views.group_start_loc.tolist() == [0, 2, 4, 4]
    assert views.key_start.tolist() == [12, 0, 8, 12, 8, 0]
    buffers.write(batch, [PrefixGroup((1, 2), 1)])
    assert views.group_block_table[:, :2].tolist() == [[1, 0], [0, 0], [0, 0]]
    assert views.group_start_loc.tolist() == [0, 2, 2, 2]
    assert views.key_start.tolist() == [0, 4, 4, 0, 0, 0]


def test_a_batch_that_goes_on_is_looked_at_once_and_counted_every_step() -> None:
    cascade = backend()
    batch = batch_of(SHARED, *BATCHES["decodes"])
    first = cascade.build_metadata(batch)
    assert cascade.build_metadata(batch) is first
    assert cascade.build_metadata(batch_of(SHARED, *BATCHES["decodes"])) is not first
    counters = cascade.counters()
    assert counters == {
        "steps_with_groups": 3,
        "prefix_groups": 6,
        "grouped_requests": 15,
        "prefix_tokens_read": 3 * 16,
        "prefix_tokens_saved": 3 * (2 * 8 + 8),
    }
    cascade.reset_counters()
    assert set(cascade.counters().values()) == {0}


def test_what_cannot_be_done_is_said() -> None:
    pool, windowed = make_pool(), dataclasses.replace(LAYER, sliding_window=8)
    assert backend().unsupported_reasons([LAYER, windowed], pool) == []
    (reason,) = backend().unsupported_reasons([windowed], pool)
    assert "sliding window" in reason and "engine/attention" in reason
    (reason,) = backend().unsupported_reasons([LAYER], make_pool(dtype=torch.int8))
    assert "reads no scales" in reason
    with pytest.raises(UnsupportedError, match="sliding window"):
        tiny_engine("engine/attention=cascade", model=tiny_model("mistral"))
    for fields in ({"min_requests": 1}, {"min_shared_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(fields))):
            backend(**fields)


# -- engines --------------------------------------------------------------------------------------

PAGED = ("engine/scheduler=continuous", "engine/kv_cache=paged", "engine.kv_cache.block_size=4")
CASCADE = (
    "engine/attention=cascade",
    "engine.attention.min_requests=2",
    "engine.attention.min_shared_tokens=8",
)
NEW_TOKENS = 10


@functools.cache
def prompts() -> list[list[int]]:
    rng = random.Random(3)

    def draw(count: int) -> list[int]:
        return [rng.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(count)]

    system = draw(12)
    stems = [system + draw(9), system + draw(14), system]
    return [rng.choice(stems) + draw(rng.randint(1, 9)) for _ in range(18)]


def serve(engine: Engine, **fields: Any) -> list[list[int]]:
    """The first request comes alone and ends, so that those after it find its prefix."""
    tokens: dict[str, list[int]] = {}
    names = []
    for start, stop in ((0, 1), (1, len(prompts()))):
        for i in range(start, stop):
            params = SamplingParams(
                max_tokens=NEW_TOKENS + i % 3, seed=i, ignore_eos=True, **fields
            )
            names.append(engine.add_request(prompts()[i], params))
        tokens |= run_to_end(engine)
    return [tokens[name] for name in names]


@functools.cache
def hf_tokens(family: str) -> list[list[int]]:
    return [
        hf_greedy(tiny_model(family), prompt, NEW_TOKENS + i % 3)
        for i, prompt in enumerate(prompts())
    ]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    "others",
    [
        (),
        ("engine/prefill=chunked", "engine.prefill.chunk_tokens=9"),
        ("engine/drafter=ngram", "engine.drafter.min_ngram=1", "engine/verifier=exact_match"),
    ],
    ids=["plain", "chunked", "drafts"],
)
def test_greedy_tokens_are_those_of_transformers(cache: str, others: tuple[str, ...]) -> None:
    chosen = (f"engine/prefix_cache={cache}", "engine/eviction=lru")
    engine = tiny_engine(*PAGED, *chosen, *CASCADE, *others, max_num_seqs=5)
    assert serve(engine) == hf_tokens("llama")
    (marker,) = [m for m in load_markers().values() if m.slots == {"attention": "cascade"}]
    counters = engine.counters()
    for name in marker.evidence:
        assert counters[name] > 0


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("loop", ["sync", "overlapped"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prepared_steps_have_the_same_tokens_and_the_same_groups(
    cache: str, loop: str, family: str
) -> None:
    chosen = (f"engine/prefix_cache={cache}", "engine/eviction=lru", f"engine/loop={loop}")
    model = tiny_model(family)
    one_by_one = tiny_engine(*PAGED, *chosen, *CASCADE, model=model, max_num_seqs=5)
    prepared = tiny_engine(*PAGED, *chosen, *CASCADE, *CALLED, model=model, max_num_seqs=5)
    assert serve(prepared) == serve(one_by_one) == hf_tokens(family)
    runner = prepared.parts.graph_runner
    assert isinstance(runner, CallingRunner)
    assert set(runner.forms) == {"", "cascade"}, "some batches have groups, and some have none"
    mine, theirs = prepared.counters(), one_by_one.counters()
    assert mine["scheduler.in_flight_tokens"] == theirs["scheduler.in_flight_tokens"] > 0
    for name in theirs:
        if name.startswith("attention."):
            assert mine[name] == theirs[name] > 0, name


def test_a_model_with_windows_in_some_layers_has_its_own_tokens() -> None:
    chosen = ("engine/prefix_cache=block_hash", "engine/eviction=lru")
    engine = tiny_engine(*PAGED, *chosen, *CASCADE, model=tiny_model("gemma3"), max_num_seqs=5)
    assert serve(engine) == hf_tokens("gemma3")
    assert engine.counters()["attention.prefix_groups"] > 0


def test_drawn_tokens_are_those_of_the_plain_backend() -> None:
    chosen = ("engine/prefix_cache=radix", "engine/eviction=lru")
    plain = tiny_engine(*PAGED, *chosen, max_num_seqs=5)
    engine = tiny_engine(*PAGED, *chosen, *CASCADE, max_num_seqs=5)
    assert serve(engine, temperature=1.0) == serve(plain, temperature=1.0)


def test_without_a_cache_nobody_shares() -> None:
    engine = tiny_engine(*PAGED, *CASCADE, max_num_seqs=5)
    assert serve(engine) == hf_tokens("llama")
    assert engine.counters()["attention.prefix_groups"] == 0


def test_the_host_s_block_tables_are_the_device_s() -> None:
    """In every step, steady ones too, for the blocks that a request has."""
    engine = tiny_engine(
        *PAGED, "engine/prefix_cache=radix", "engine/eviction=lru", *CASCADE, max_num_seqs=5
    )
    attention = engine.parts.components["attention"]
    assert isinstance(attention, CascadeAttention)
    build, seen = attention.build_metadata, []

    def checked(batch: ForwardBatch) -> Any:
        host = batch.host_block_table()
        for row, own, length in zip(host, batch.block_table, batch.seq_lens_host, strict=True):
            blocks = -(-length // SIZE)
            assert row[:blocks].tolist() == own[:blocks].tolist()
        seen.append(batch)
        return build(batch)

    attention.build_metadata = checked  # type: ignore[method-assign]
    serve(engine)
    assert len({id(b) for b in seen}) < len(seen) - 10, "no step was steady"
