"""Contracts of slots ``linear``, ``adapters``, ``parallel``, ``graph_runner`` and ``platform``."""

from __future__ import annotations

import contextlib
from typing import ClassVar

import pytest
import torch

from techniques.cuda_graphs import CudaGraphConfig, CudaGraphRunner
from techniques.cuda_graphs.runner import capture_sizes
from tests.contract.test_kv_pool_and_attention import make_batch
from tests.helpers.engines import component
from tests.helpers.interpreted import DEVICE
from workbench.configuration import options_of
from workbench.core.errors import ConfigError
from workbench.slots.graph_runner import DECODE, MIXED, VERIFY
from workbench.slots.linear import LinearLayer
from workbench.slots.platform import Platform

CPU = torch.device("cpu")


def make_layer(has_bias: bool) -> LinearLayer:
    return LinearLayer("layers.0.qkv_proj", 64, 96, (("q", 64), ("k", 16), ("v", 16)), has_bias)


@pytest.mark.parametrize("option", options_of("engine/linear"))
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("expected_tokens", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_a_product_within_its_bound(
    option: str, has_bias: bool, expected_tokens: int, dtype: torch.dtype
) -> None:
    method, layer = component("linear", option), make_layer(has_bias)
    if reasons := method.unsupported_reasons(DEVICE, dtype):
        pytest.skip("; ".join(reasons))
    method.create_weights(layer, dtype, DEVICE)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.params.items():
        assert name in ("weight", "bias") or method.error_bound > 0
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    dense = layer.params["weight"].double().clone()
    bias = layer.params["bias"].double().clone() if has_bias else torch.zeros(96).to(DEVICE)
    assert ("bias" in layer.params) == has_bias
    method.process_weights_after_loading(layer, expected_tokens)
    assert not layer.params, "weights that are no longer needed are kept"
    bound = max(method.error_bound, 8 * torch.finfo(dtype).eps)
    for rows in (1, 3, 64):
        x = torch.randn(rows, 64, generator=generator).to(DEVICE, dtype)
        expected = x.double() @ dense.T + bias
        y = method.apply(layer, x)
        assert y.shape == (rows, 96)
        assert y.dtype == dtype
        error = (y.double() - expected).norm() / expected.norm()
        assert float(error) <= bound


@pytest.mark.parametrize("option", options_of("engine/adapters"))
def test_adapters_leave_alone_who_has_none_and_name_what_they_do_not_know(option: str) -> None:
    adapters = component("adapters", option)
    batch = make_batch(torch.zeros(2, 1, dtype=torch.int32), [3, 4], [1, 1], 8)
    assert adapters.slots_for(batch) is None
    x, y = torch.ones(2, 64), torch.arange(192.0).reshape(2, 96)
    assert torch.equal(adapters.apply(make_layer(False), x, y.clone()), y)
    with pytest.raises(ValueError, match="no-such-adapter"):
        adapters.load("no-such-adapter")


def test_null_adapters_may_be_left_out_of_the_model() -> None:
    assert component("adapters", "none").active is False


@pytest.mark.parametrize("option", options_of("engine/parallel"))
def test_parallel_on_one_process_sums_nothing(option: str) -> None:
    parallel = component("parallel", option)
    for axis in ("tp", "pp", "dp", "ep"):
        assert 0 <= parallel.rank(axis) < parallel.axes.get(axis, 1)
        if parallel.axes.get(axis, 1) == 1:
            x = torch.randn(3, 4)
            assert torch.equal(parallel.all_reduce(x.clone(), axis), x)


class CountingStep:
    """A step that counts its runs."""

    forms = ()

    def __init__(self, kind: str = DECODE, tokens_each: int = 1, max_size: int = 20) -> None:
        self.kind, self.tokens_each, self.max_size = kind, tokens_each, max_size
        self.sizes: list[int] = []

    def run(self, size: int, form: str = "") -> None:
        self.sizes.append(size)

    def counters(self) -> dict[str, float]:
        return {"attention.decode_calls": 2 * len(self.sizes)}


@pytest.mark.parametrize("option", options_of("engine/graph_runner"))
def test_graph_runner_has_room_for_whom_it_takes(option: str) -> None:
    runner = component("graph_runner", option)
    platform: Platform = component("platform", "cuda" if torch.cuda.is_available() else "cpu")
    if option != "eager" and runner.unsupported_reasons(platform, component("attention", "triton")):
        pytest.skip("it cannot run here")
    step = CountingStep()
    assert runner.dispatch(DECODE, 1) is None, "nothing is prepared yet"
    assert runner.trial_bytes([step]) >= 0
    assert runner.dispatch(DECODE, 1) is None, "a trial leaves nothing behind"
    step.sizes.clear()
    runner.capture([step])
    sizes = [runner.dispatch(DECODE, n) for n in range(1, 22)]
    assert sizes[20] is None, "more than the step holds"
    taken = [(n, size) for n, size in enumerate(sizes, start=1) if size is not None]
    assert all(n <= size <= 20 for n, size in taken)
    step.sizes.clear()
    runner.reset_counters()
    for _, size in taken:
        runner.run(DECODE, size)
    counted = runner.replayed_counters().get("attention.decode_calls", 0)
    assert counted + 2 * len(step.sizes) == 2 * len(taken), "a step is counted, run or replayed"


class RecordedGraph:
    """In place of a CUDA graph: which they are, in the order of their captures, and replays."""

    made: ClassVar[list[RecordedGraph]] = []

    def __init__(self) -> None:
        self.num_replays = 0
        self.made.append(self)

    def capture_begin(self, pool: object) -> None: ...

    def capture_end(self) -> None: ...

    def replay(self) -> None:
        self.num_replays += 1


def test_kinds_of_steps_are_captured_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of most tokens first, each kind in sizes of its own, and told apart in the counters."""
    monkeypatch.setattr(RecordedGraph, "made", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr("techniques.cuda_graphs.runner._used_bytes", lambda: 0)
    monkeypatch.setattr(CudaGraphRunner, "_capturing", lambda _: contextlib.nullcontext())
    runner = CudaGraphRunner(CudaGraphConfig(verify_granularity=4))
    single, drafts = CountingStep(), CountingStep(VERIFY, tokens_each=5)
    mixed = CountingStep(MIXED, max_size=80)
    assert runner.trial_bytes([single, drafts, mixed]) == 0
    assert len(RecordedGraph.made) == 3 + 3, "the largest of each kind, and three of the others"
    for step, largest in ((single, 20), (drafts, 20), (mixed, 80)):
        assert step.sizes.count(largest) == 4, "compiled, run, warmed up and captured"
        step.sizes.clear()
    runner.capture([single, drafts, mixed])
    of_single, of_drafts = [1, 2, 4, 8, 16, 20], [1, 2, 4, 8, 12, 16, 20]
    of_mixed = [32, 64, 80]
    assert [runner.dispatch(DECODE, n) for n in of_single] == of_single
    assert [runner.dispatch(VERIFY, n) for n in (1, 3, 9, 20, 21)] == [1, 4, 12, 20, None]
    assert [runner.dispatch(MIXED, n) for n in (2, 32, 33, 80, 81)] == [32, 32, 64, 80, None]
    # Each compiles, warms up and is captured.
    assert sorted(single.sizes) == sorted(3 * of_single)
    assert sorted(drafts.sizes) == sorted(3 * of_drafts)
    assert sorted(mixed.sizes) == sorted(3 * of_mixed)
    tokens = sorted([*of_single, *of_mixed, *(5 * size for size in of_drafts)], reverse=True)
    by_graph = {id(g): key for key, g in runner._graphs.items()}
    captured = [by_graph[id(g)] for g in RecordedGraph.made[-len(by_graph) :]]
    assert [k.size * (5 if k.kind == VERIFY else 1) for k in captured] == tokens
    runner.run(DECODE, 16)
    for _ in range(2):
        runner.run(VERIFY, 16)
    for _ in range(4):
        runner.run(MIXED, 32)
    replayed = {by_graph[id(g)][:2]: g.num_replays for g in RecordedGraph.made if g.num_replays}
    assert replayed == {(DECODE, 16): 1, (VERIFY, 16): 2, (MIXED, 32): 4}
    counters = runner.counters()
    assert counters == {
        "graphs": 16, "replays": 7, "decode_replays": 1, "verify_replays": 2, "mixed_replays": 4,
        "draft_replays": 0,
    }  # fmt: skip
    runner.reset_counters()
    assert runner.counters()["replays"] == 0


def test_drafts_are_captured_where_attention_takes_them() -> None:
    runner = CudaGraphRunner(CudaGraphConfig(max_verify_tokens=100))
    assert runner.largest_verify(component("attention", "triton"), 9) == 11
    assert runner.largest_verify(component("attention", "cascade"), 9) == 0
    assert runner.largest_verify(component("attention", "triton"), 101) == 0
    with pytest.raises(ConfigError, match=r"engine\.graph_runner\.max_verify_tokens=-1"):
        CudaGraphRunner(CudaGraphConfig(max_verify_tokens=-1))


def test_mixed_steps_are_captured_where_attention_takes_any_batch() -> None:
    triton, cascade = component("attention", "triton"), component("attention", "cascade")
    runner = CudaGraphRunner(CudaGraphConfig(max_mixed_tokens=100))
    assert runner.largest_mixed(triton, step_tokens=8192) == 100
    assert runner.largest_mixed(triton, step_tokens=70) == 70, "no step is larger"
    assert runner.largest_mixed(triton, step_tokens=4) == 32, "none is too small for its kernels"
    assert runner.largest_mixed(cascade, step_tokens=8192) == 0
    none = CudaGraphRunner(CudaGraphConfig(max_mixed_tokens=0))
    assert none.largest_mixed(triton, step_tokens=8192) == 0
    for wrong in (-1, 31):
        with pytest.raises(ConfigError, match=rf"engine\.graph_runner\.max_mixed_tokens={wrong}"):
            CudaGraphRunner(CudaGraphConfig(max_mixed_tokens=wrong))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_cannot_be_captured_is_told(device: str) -> None:
    runner, platform = component("graph_runner", "cuda_graph"), component("platform", device)
    reasons = runner.unsupported_reasons(platform, component("attention", "sdpa"))
    assert any("SdpaAttention" in reason for reason in reasons)
    assert any("CUDA device" in reason for reason in reasons) == (device == "cpu")
    assert component("graph_runner", "eager").unsupported_reasons(platform, None) == []


def test_sizes_grow_by_powers_and_then_evenly() -> None:
    assert capture_sizes(30, 8) == [1, 2, 4, 8, 16, 24, 30]
    assert capture_sizes(3, 8) == [1, 2, 3]
    assert capture_sizes(1, 8) == [1]
    assert capture_sizes(6, 1) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match=r"engine\.graph_runner\.granularity=0"):
        CudaGraphRunner(CudaGraphConfig(granularity=0))


@pytest.mark.parametrize("option", options_of("engine/platform"))
def test_platform_says_what_it_is(option: str) -> None:
    platform: Platform = component("platform", option)
    assert platform.name == option
    assert isinstance(platform.device, torch.device)
    assert platform.default_dtype() in (torch.float32, torch.bfloat16, torch.float16)
    reasons = platform.unsupported_reasons()
    assert all(isinstance(r, str) and r for r in reasons)
    if reasons:
        return
    assert platform.free_memory_bytes() > 0
    platform.synchronize()
    probe = platform.memory_probe()
    probe.reset_peak()
    before = probe.current_bytes()
    # 64 MiB: malloc may find less than 32 MiB in what the process holds already.
    held = torch.ones(16 << 20, device=platform.device)
    assert probe.peak_bytes() - before >= held.numel() * 4 * 0.9
    del held


def test_cpu_is_always_there() -> None:
    assert component("platform", "cpu").unsupported_reasons() == []


def test_cpu_sets_threads_only_when_asked_and_refuses_a_negative_number() -> None:
    before = torch.get_num_threads()
    component("platform", "cpu", settings={"num_threads": 0})
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match="num_threads"):
        component("platform", "cpu", settings={"num_threads": -1})


def test_cuda_without_a_gpu_says_so() -> None:
    platform = component("platform", "cuda", settings={"index": 99})
    assert platform.unsupported_reasons()
