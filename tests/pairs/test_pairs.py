"""Every technique, every pair and all at once: the bare engine's tokens, and HF's."""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
from collections.abc import Sequence

import pytest

from tests.helpers.engines import (
    FIRST_ORDINARY_ID,
    TECHNIQUES,
    VOCAB_SIZE,
    declared_conflict,
    markers_here,
    mixed_prompts,
    shared_engine,
    tiny_engine,
    together,
    weakest_class,
    why_not_here,
    with_requirements,
)
from tests.helpers.tiny_models import FAMILIES, hf_greedy, tiny_model
from workbench.configuration import compose_config
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine

NEW_TOKENS = 24
#: Settings under which a technique has something to do at the size of these prompts.
TIGHT = {
    "adaptive_drafts": (
        "engine.draft_length.allowance=1000",
        "engine.draft_length.max_gap_steps=1",
    ),
    "cascade_attention": (
        "engine.attention.min_requests=2",
        "engine.attention.min_shared_tokens=4",
    ),
    "chunked_prefill": ("engine.prefill.chunk_tokens=17",),
    "decode_first": ("engine.policy.steps_between_prompts=3",),
    # Requests that share in flight need the second tier less often than these few would show.
    "host_offload": ("engine.prefix_cache.share_in_flight=false",),
    "optimistic_admission": ("engine.admission.headroom_tokens=2",),
    "paged_attention": ("engine.kv_cache.block_size=4",),
    "rejection_sampling": ("engine.drafter.min_ngram=1",),
    "spec_decode": ("engine.drafter.min_ngram=1",),
    "suffix_tree": ("engine.drafter.draft_factor=8.0",),  # branches behind one token, too
    "typical_acceptance": ("engine.drafter.min_ngram=1",),
}
#: Pools that are too small for what runs at once, for techniques that live off that.
SMALL_POOL = {"optimistic_admission": 128, "host_offload": 96}


def prompts() -> list[list[int]]:
    """Mixed ones; most start with one of two passages, which others push out of a small pool."""
    rng = random.Random(7)
    passages = [[rng.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(14)] for _ in range(2)]
    starts = {"a": passages[0], "b": passages[1], "-": []}
    order = "aaa--bbb-aaab-bb"
    ends = mixed_prompts(len(order), seed=1, longest=20)
    return [starts[which] + end for which, end in zip(order, ends, strict=True)]


PROMPTS = prompts()
#: Mixed lengths, so that requests join and leave while others run.
LENGTHS = [NEW_TOKENS - 2 * (i % 5) for i in range(len(PROMPTS))]


#: What a machine without a GPU may leave out; tests/gpu runs these.
NEEDS_A_GPU = {
    "cuda_graphs",
    "flash_attention_cute",
    "flashinfer_attention",
    "fused_kernels",
    "skinny_gemm",
    "triton_attention",
    "tuned_gemm",
}
#: What a machine without a C++ compiler may leave out.
NEEDS_A_COMPILER = {"torch_compile"}


#: Ways to speculate that meet the rest of the engine as another one does: chains looked up in the
#: text as ``spec_decode``, trees as ``suffix_tree``, KV of drafts as ``draft_model``, hidden states
#: as ``eagle``; an attention backend that compiles for every shape, which meets the rest as the
#: others do; and weights that are rounded. Each runs with all that it may be combined with at once,
#: instead of in pairs.
ALIKE = (
    "flex_attention",
    "fp8_w8a8",
    "int4_weights",
    "int8_w8a8",
    "int8_weights",
    "suffix_decoding",
    "lookahead_decoding",
    "eagle_tree",
    "layer_skip",
    "medusa",
    "medusa_tree",
    "mtp",
    "rejection_sampling",
    "typical_acceptance",
    "synthetic_acceptance",
)

#: Pairs of which one leaves a slot to the other.
ONE_YIELDS = (("eagle", "rejection_sampling"), ("suffix_tree", "rejection_sampling"))


def sets_of_techniques() -> list[tuple[str, ...]]:
    singles = [(name,) for name in TECHNIQUES]
    others = [name for name in TECHNIQUES if name not in ALIKE]
    speculating = [together(name) for name in ALIKE if why_not_here(name) is None]
    of_two = [*itertools.combinations(others, 2), *ONE_YIELDS]
    return [*singles, *of_two, together(), *speculating]


def tight(names: Sequence[str]) -> list[str]:
    """Settings of ``TIGHT``, but none of a drafter that is left to another technique."""
    markers = markers_here()
    drafters = {n for n in names if "drafter" in set(markers[n].slots) - set(markers[n].yields)}
    ours = [n for n in names if not (drafters and "drafter" in markers[n].yields)]
    return [text for name in ours for text in TIGHT.get(name, ())]


def build(names: tuple[str, ...]) -> Engine:
    closed = with_requirements(names)
    settings = tight(closed)
    pool = min((size for name, size in SMALL_POOL.items() if name in closed), default=0)
    return shared_engine(*settings, techniques=tuple(closed), max_num_seqs=3, kv_pool_tokens=pool)


SETS = sets_of_techniques()
HERE = [names for names in SETS if not any(why_not_here(n) for n in with_requirements(names))]
COMPATIBLE = [names for names in HERE if not declared_conflict(names)]
compatible = pytest.mark.parametrize("names", COMPATIBLE, ids="+".join)


def test_no_technique_drops_out_unseen() -> None:
    has_compiler = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    allowed = NEEDS_A_GPU | (set() if has_compiler else NEEDS_A_COMPILER)
    assert {name for name in TECHNIQUES if why_not_here(name)} <= allowed


def test_conflicts_are_errors_that_name_both() -> None:
    for names in SETS:
        if declared_conflict(names):
            closed = with_requirements(names)
            with pytest.raises(ConfigError) as raised:
                compose_config([f"+technique=[{','.join(closed)}]"])
            assert sum(f"'{name}'" in str(raised.value) for name in closed) >= 2
    assert COMPATIBLE, "nothing is left to compare"


@functools.cache
def hf_tokens() -> list[list[int]]:
    folder = tiny_model("llama")
    return [hf_greedy(folder, p, n) for p, n in zip(PROMPTS, LENGTHS, strict=True)]


@compatible
def test_greedy_tokens_equal_hf_and_every_technique_really_ran(names: tuple[str, ...]) -> None:
    """With a cold prefix cache, and where there is one, again with what the first time left."""
    engine, markers = build(names), markers_here()
    engine.clear_cached()
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in LENGTHS]
    has_cache = any("prefix_cache" in markers[name].slots for name in with_requirements(names))
    for _ in range(1 + has_cache):
        outputs = engine.generate(PROMPTS, params)
        assert [o.error for o in outputs] == [None] * len(PROMPTS)
        if weakest_class(names) == "lossy":
            assert [len(o.token_ids) for o in outputs] == LENGTHS
        else:
            assert [o.token_ids for o in outputs] == hf_tokens()
    counters = engine.counters()
    for name in with_requirements(names):
        for key in markers[name].evidence:
            if key == "attention.decode_calls" and "synthetic_acceptance" in names:
                continue  # every step has drafts
            assert counters[key] > 0, f"{name} shows no {key}"


def drawing(fields: tuple[tuple[str, float], ...]) -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=n, seed=i, ignore_eos=True, **dict(fields))  # type: ignore[arg-type]
        for i, n in enumerate(LENGTHS)
    ]


@functools.cache
def bare_tokens(fields: tuple[tuple[str, float], ...]) -> list[list[int]]:
    """What the engine without techniques draws."""
    outputs = shared_engine(max_num_seqs=3).generate(PROMPTS, drawing(fields))
    return [o.token_ids for o in outputs]


@pytest.mark.parametrize("names", [names for names in COMPATIBLE if len(names) != 2], ids="+".join)
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.3, "frequency_penalty": 0.3},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_seeded_tokens_are_those_of_the_bare_engine(
    names: tuple[str, ...], fields: dict[str, float]
) -> None:
    if weakest_class(names) != "exact":
        pytest.skip("draws of the same distribution, not the same draws")
    drawn = tuple(fields.items())
    outputs = build(names).generate(PROMPTS, drawing(drawn))
    assert [o.token_ids for o in outputs] == bare_tokens(drawn)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_at_once_on_every_family(family: str) -> None:
    folder = tiny_model(family)
    engine = tiny_engine(*tight(together()), techniques=together(), model=folder, max_num_seqs=3)
    outputs = engine.generate(
        PROMPTS, [SamplingParams(max_tokens=n, ignore_eos=True) for n in LENGTHS]
    )
    for output, prompt, length in zip(outputs, PROMPTS, LENGTHS, strict=True):
        assert output.token_ids == hf_greedy(folder, prompt, length)
