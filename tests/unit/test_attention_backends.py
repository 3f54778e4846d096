"""Backends of the attention slot: what they refuse and why, what they pass on, what they count.

That they compute the right thing is the contract's suite, ``tests/contract``.
"""

from __future__ import annotations

import sys
import tomllib
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.triton import HAS_TRITON, is_interpreted
from techniques.auto_attention import backend as auto_backend
from techniques.auto_attention.measured import CLASSES, RANKINGS, ranking
from tests.contract.test_kv_pool_and_attention import LAYER, fill_pool, make_batch, make_pool
from tests.helpers.engines import component, mixed_prompts, tiny_engine
from tests.helpers.tiny_models import hf_greedy, tiny_model
from workbench.configuration import CONF_DIR
from workbench.core.errors import ConfigError, UnsupportedError
from workbench.core.sampling import SamplingParams
from workbench.slots.attention import AttentionBackend, AttentionLayer

LAYERS = [LAYER]


def stub_pool(
    dtype: torch.dtype = torch.bfloat16, device: str = "cuda", block_size: int = 16
) -> Any:
    """What a backend looks at before it runs, as if it were on some device."""
    cache = SimpleNamespace(
        dtype=dtype, device=torch.device(device), is_cuda=device == "cuda", shape=(1, block_size)
    )
    return SimpleNamespace(layer=lambda index: (cache, cache), num_blocks=8, block_size=block_size)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_to(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    set_to(9, 0)
    return set_to


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries seem to be installed."""
    for name in ("flash_attn", "flash_attn.cute", "flashinfer"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)


def layer(**fields: Any) -> AttentionLayer:
    return AttentionLayer(
        0, **{"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "scale": 1.0} | fields
    )


# -- reasons --------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["flex", "auto", "sdpa"])
def test_what_serves_a_cpu_serves_this_one(option: str) -> None:
    """The contract's suite skips what has reasons: none of these may have any."""
    pool = make_pool("model_dtype")
    assert component("attention", option).unsupported_reasons(LAYERS, pool) == []


@pytest.mark.skipif(is_interpreted(), reason="Triton interprets: then it serves a CPU")
def test_triton_on_a_cpu_says_how_it_would_run() -> None:
    reasons = component("attention", "triton").unsupported_reasons(LAYERS, make_pool("model_dtype"))
    assert len(reasons) == 1
    assert ("TRITON_INTERPRET" if HAS_TRITON else "pip install triton") in reasons[0]


@pytest.mark.parametrize(
    ("option", "package", "extra"),
    [("flash_attn", "flash-attn-4", "flash"), ("flashinfer", "flashinfer-python", "flashinfer")],
)
def test_a_missing_library_names_its_package_and_extra(
    option: str, package: str, extra: str, capability: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = component("attention", option).unsupported_reasons([layer()], stub_pool())
    assert len(reasons) == 1
    assert f"pip install {package}" in reasons[0]
    assert f"[{extra}]" in reasons[0]
    declared = tomllib.loads((CONF_DIR.parent / "pyproject.toml").read_text())["project"]
    assert any(line.startswith(package) for line in declared["optional-dependencies"][extra])


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("option", "fields", "pool", "expected"),
    [
        ("flash_attn", {}, {}, []),
        ("flash_attn", {"head_dim": 260}, {}, ["head size 260"]),
        ("flash_attn", {"head_dim": 60}, {}, ["multiple of 8"]),
        ("flash_attn", {}, {"dtype": torch.float32}, ["bfloat16, float16, not float32"]),
        ("flash_attn", {}, {"dtype": torch.int8}, ["reads no scales"]),
        ("flash_attn", {}, {"device": "cpu"}, ["CUDA"]),
        ("flashinfer", {}, {}, []),
        ("flashinfer", {"head_dim": 80}, {}, ["head size 80 is not one of 64, 128, 256"]),
        ("flashinfer", {}, {"dtype": torch.float8_e4m3fn}, ["reads no scales"]),
        ("triton", {"head_dim": 80}, {"block_size": 1}, []),
        ("triton", {"head_dim": 288}, {}, ["head size 288"]),
        ("triton", {}, {"dtype": torch.float64}, ["not float64"]),
        ("triton", {}, {"dtype": torch.int8}, ["reads no scales"]),
        ("flex", {}, {}, []),
        ("flex", {}, {"block_size": 8}, ["block size 8"]),
        ("flex", {}, {"block_size": 48}, ["power of two"]),
        ("flex", {}, {"dtype": torch.int8}, ["reads no scales"]),
        ("flash_attn", {"head_dim": 60}, {"dtype": torch.float32}, ["not float32", "head size"]),
    ],
)
def test_every_reason_is_named(
    option: str, fields: dict[str, Any], pool: dict[str, Any], expected: list[str], capability: Any
) -> None:
    if option == "triton" and not HAS_TRITON:
        pytest.skip("Triton is not installed")
    attention = component("attention", option)
    reasons = attention.unsupported_reasons([layer(**fields)], stub_pool(**pool))
    assert len(reasons) == len(expected), reasons
    for reason, text in zip(reasons, expected, strict=True):
        assert text in reason


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("option", "least"), [("flash_attn", "9.0"), ("flashinfer", "8.0"), ("flex", "8.0")]
)
def test_an_old_card_is_named(option: str, least: str, capability: Any) -> None:
    capability(7, 5)
    reasons = component("attention", option).unsupported_reasons([layer()], stub_pool())
    assert reasons == [f"compute capability 7.5 is under {least}"]


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(("version", "count"), [((9, 0), 1), ((10, 0), 0)])
def test_pieces_need_a_newer_card(version: tuple[int, int], count: int, capability: Any) -> None:
    capability(*version)
    attention = component("attention", "flash_attn", settings={"num_splits": 0})
    assert len(attention.unsupported_reasons([layer()], stub_pool())) == count


@pytest.mark.parametrize(
    ("option", "settings"),
    [("flash_attn", {"num_splits": -1}), ("flashinfer", {"workspace_mb": 0})],
)
def test_options_out_of_range_are_refused(option: str, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        component("attention", option, settings=settings)


@pytest.mark.skipif(is_interpreted(), reason="Triton interprets: then it serves a CPU")
def test_an_engine_with_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(UnsupportedError, match="TritonAttention cannot be used: Triton"):
        tiny_engine("engine/attention=triton")


# -- what the libraries are given -----------------------------------------------------------------


def batch_and_pool(lengths: list[int], queries: list[int], block_size: int = 4) -> Any:
    import random

    pool = make_pool("model_dtype", num_blocks=40, block_size=block_size)
    table, _ = fill_pool(pool, lengths, random.Random(0))
    return make_batch(table, lengths, queries, block_size), pool, table


@pytest.mark.usefixtures("libraries")
def test_flash_attn_gets_pages_lengths_window_and_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def attend(q: torch.Tensor, k: Any, v: Any, **options: Any) -> tuple[torch.Tensor, None]:
        given.update(options, k=k, v=v)
        return q + 1, None

    sys.modules["flash_attn.cute"].flash_attn_varlen_func = attend  # type: ignore[attr-defined]
    attention = component("attention", "flash_attn")
    batch, pool, _ = batch_and_pool([9, 5], [3, 1])
    windowed = layer(head_dim=16, sliding_window=6, soft_cap=2.0, scale=0.3)
    q = torch.zeros(4, 4, 16)
    out = attention.forward(q, windowed, attention.build_metadata(batch), pool)
    assert torch.equal(out, q + 1)
    assert given["k"] is pool.layer(0)[0]
    assert given["page_table"] is batch.block_table
    assert given["cu_seqlens_q"] is batch.query_start_loc
    assert given["seqused_k"] is batch.seq_lens
    assert (given["max_seqlen_q"], given["causal"]) == (3, True)
    # The library counts the tokens before a query, the slot the query as well.
    assert given["window_size"] == (5, 0)
    assert (given["softcap"], given["softmax_scale"]) == (2.0, 0.3)
    attention.forward(q, layer(head_dim=16), attention.build_metadata(batch), pool)
    assert given["window_size"] == (None, None)
    assert given["softcap"] == 0.0


class FakeWrapper:
    """Remembers its plan; running it adds the plan's window to the queries."""

    def __init__(self, workspace: torch.Tensor, layout: str, **options: Any) -> None:
        self.options, self.plans = options, []

    def plan(self, *args: Any, **options: Any) -> None:
        self.plans.append((args, options))

    def run(self, q: torch.Tensor, caches: Any) -> torch.Tensor:
        return q + self.plans[-1][1]["window_left"]


@pytest.mark.usefixtures("libraries")
def test_flashinfer_plans_once_a_step_for_each_kind_of_layer() -> None:
    module: Any = sys.modules["flashinfer"]
    module.BatchDecodeWithPagedKVCacheWrapper = type("Decode", (FakeWrapper,), {})
    module.BatchPrefillWithPagedKVCacheWrapper = type("Prefill", (FakeWrapper,), {})
    attention = component("attention", "flashinfer", settings={"workspace_mb": 1})
    batch, pool, table = batch_and_pool([9, 4, 1], [3, 1, 1])
    layers = [layer(head_dim=16), layer(head_dim=16, sliding_window=6), layer(head_dim=16)]
    attention.unsupported_reasons(layers, pool)
    metadata = attention.build_metadata(batch)
    q = torch.zeros(5, 4, 16)
    windows = [float(attention.forward(q, one, metadata, pool)[0, 0, 0]) for one in layers]
    assert windows == [-1.0, 5.0, -1.0]
    assert attention.counters() == {"decode_calls": 0, "prefill_calls": 3, "plans": 2}
    (args, options), *more = next(iter(metadata.wrappers.values())).plans
    assert not more
    starts, indptr, indices, last_page_len, *heads = args
    assert starts.tolist() == [0, 3, 4, 5]
    assert indptr.tolist() == [0, 3, 4, 5]
    assert indices.tolist() == [*table[0, :3].tolist(), int(table[1, 0]), int(table[2, 0])]
    assert last_page_len.tolist() == [1, 4, 1]
    assert heads == [4, 2, 16]
    assert (options["page_size"], options["causal"]) == (4, True)
    decode, pool, _ = batch_and_pool([9, 4], [1, 1])
    planned = attention.build_metadata(decode).wrappers
    assert {type(wrapper).__name__ for wrapper in planned.values()} == {"Decode"}
    assert all(wrapper.options == {"use_tensor_cores": True} for wrapper in planned.values())


@pytest.mark.usefixtures("libraries")
def test_flashinfer_follows_block_tables_that_change_in_place() -> None:
    module: Any = sys.modules["flashinfer"]
    module.BatchDecodeWithPagedKVCacheWrapper = FakeWrapper
    attention = component("attention", "flashinfer", settings={"workspace_mb": 1})
    batch, pool, table = batch_and_pool([9, 4], [1, 1])
    attention.unsupported_reasons([LAYER], pool)
    for _ in range(2):
        wrapper = next(iter(attention.build_metadata(batch).wrappers.values()))
        indices = wrapper.plans[-1][0][1].tolist()
        assert indices == [*batch.block_table[0, :3].tolist(), int(batch.block_table[1, 0])]
        batch.block_table = table.flip(1).roll(1, 1).contiguous()


# -- auto -----------------------------------------------------------------------------------------


class Fake(AttentionBackend):
    """Serves where it is told to; what it puts out names it."""

    reasons: tuple[str, ...] = ()
    value = 0.0

    def build_metadata(self, batch: Any) -> Any:
        return type(self)

    def forward(self, q: Any, layer: Any, metadata: Any, pool: Any) -> torch.Tensor:
        assert metadata is type(self), "metadata of another backend"
        return torch.full_like(q, self.value)

    def unsupported_reasons(self, layers: Any, pool: Any) -> list[str]:
        return list(self.reasons)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Fake]]:
    """Three backends in place of the real ones, ranked a, b, c to decode and c, b, a else."""
    classes = {name: type(name, (Fake,), {"value": float(i)}) for i, name in enumerate("abc")}
    monkeypatch.setattr(auto_backend, "_build", lambda name: classes[name]())
    orders = {"decode": ("a", "b", "c"), "prefill": ("c", "b", "a")}
    monkeypatch.setattr(auto_backend, "ranking", lambda capability, phase: orders[phase])
    return classes


def run_auto(attention: Any, queries: list[int]) -> float:
    batch, pool, _ = batch_and_pool([20, 5], queries)
    q = torch.zeros(sum(queries), 4, 16)
    return float(attention.forward(q, LAYER, attention.build_metadata(batch), pool)[0, 0, 0])


def test_auto_delegates_by_kind_of_step_and_says_so(fakes: dict[str, type[Fake]]) -> None:
    attention = component("attention", "auto")
    assert attention.unsupported_reasons(LAYERS, make_pool("model_dtype")) == []
    assert attention.picks == {"decode": "a", "prefill": "c"}
    assert attention.describe() == "AutoAttention (decode a, prefill c)"
    # Drafts of a few tokens are served as single tokens are.
    assert [run_auto(attention, q) for q in ([1, 1], [17, 1], [3, 1])] == [0.0, 2.0, 0.0]
    assert attention.counters() == {
        "decode_calls": 2,
        "prefill_calls": 1,
        "a_calls": 2,
        "c_calls": 1,
    }
    attention.reset_counters()
    assert set(attention.counters().values()) == {0}


def test_auto_passes_over_what_cannot_run_and_keeps_the_reasons(
    fakes: dict[str, type[Fake]],
) -> None:
    fakes["a"].reasons = ("no library", "old card")
    fakes["c"].reasons = ("no library",)
    attention = component("attention", "auto")
    assert attention.unsupported_reasons(LAYERS, make_pool("model_dtype")) == []
    assert attention.picks == {"decode": "b", "prefill": "b"}
    assert attention.passed_over == {"a": ["no library", "old card"], "c": ["no library"]}
    assert run_auto(attention, [1, 1]) == run_auto(attention, [2, 1]) == 1.0
    fakes["b"].reasons = ("no memory",)
    reasons = attention.unsupported_reasons(LAYERS, make_pool("model_dtype"))
    assert len(reasons) == 2
    assert all(text in reasons[0] for text in ("old card", "no memory", "decode"))


def test_rankings_name_backends_and_end_with_one_that_always_serves() -> None:
    for capability in (*RANKINGS, (12, 0), (8, 6)):
        for phase in auto_backend.PHASES:
            names = ranking(capability, phase)
            assert set(names) <= set(CLASSES)
            assert len(set(names)) == len(names)
            assert names[-1] == "sdpa"
    assert ranking((9, 0), "decode") != ranking(None, "decode") == ("sdpa",)


def test_every_backend_that_auto_may_pick_can_be_built() -> None:
    for name in CLASSES:
        assert isinstance(auto_backend._build(name), AttentionBackend)


# -- in an engine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["flex", "auto"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tokens_are_those_of_transformers(option: str, family: str) -> None:
    prompts = [*mixed_prompts(2, longest=20), list(range(3, 33))]  # and one no draft is as long as
    overrides = [f"engine/attention={option}", "engine/kv_cache=paged"]
    engine = tiny_engine(*overrides, model=tiny_model(family), max_model_len=64)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.token_ids == hf_greedy(tiny_model(family), prompt, 6)
    counters = engine.counters()
    assert counters["attention.decode_calls"] > 0
    assert counters["attention.prefill_calls"] > 0
