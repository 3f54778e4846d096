"""The KV pool's size from a profile, the steps that are profiled, and where all bytes are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import own_memory
from tests.helpers.engines import (
    check_idle,
    markers_here,
    mixed_prompts,
    tiny_engine,
    why_not_here,
    with_requirements,
)
from tests.helpers.own_memory import OWN_MEMORY, ScriptedMemory
from tests.helpers.prepared import PREPARED
from tests.helpers.tiny_models import tiny_model
from workbench.assemble import Limits, build_engine
from workbench.bench import notes
from workbench.bench.memory_report import memory_table
from workbench.configuration import compose_config, engine_config, limits_of
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine
from workbench.engine.profile import StepSizes, largest_lengths, longest_contexts, run_largest_steps
from workbench.engine.request_table import RequestTable
from workbench.sizing import FILL, largest_step_tokens
from workbench.slots.prefill import WholePrompt

PAGED = ("engine/kv_cache=paged", "engine.kv_cache.block_size=16", "engine/scheduler=continuous")
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedMemory]:
    scripted = ScriptedMemory()
    monkeypatch.setattr(own_memory, "DEVICE", scripted)
    yield scripted


def engine_on_device(*overrides: str, fraction: float = 0.9, **limits: object) -> Engine:
    model = [f"model={tiny_model('llama')}", "dtype=float32"]
    composed = compose_config([*model, *OWN_MEMORY, *PAGED, *overrides])
    sizes = {"max_num_seqs": 4, "max_model_len": 128, **limits}
    chosen = Limits(**sizes, memory_fraction=fraction)  # type: ignore[arg-type]
    return build_engine(engine_config(composed, chosen, download=False))


def block_bytes(engine: Engine) -> int:
    pool = engine.parts.executor.runner.parts.pool  # type: ignore[attr-defined]
    return int(pool.num_bytes // (pool.num_blocks + 1))


def pool_blocks(engine: Engine) -> int:
    return int(engine.parts.info["kv_pool_tokens"] // engine.parts.info["block_size"])


@pytest.mark.parametrize("fraction", [0.5, 0.9, 1.0])
def test_fill_takes_what_weights_steps_and_others_leave(
    device: ScriptedMemory, fraction: float
) -> None:
    engine = engine_on_device(kv_pool_tokens=FILL, fraction=fraction)
    each = block_bytes(engine)
    # The trial's pool was one block, and what is used without it is what counts.
    left = int(fraction * device.total_bytes) - (device.used_bytes() - each) - device.step
    assert pool_blocks(engine) == left // each - 1
    engine.generate(mixed_prompts(3), GREEDY)
    check_idle(engine)


def test_auto_takes_what_requests_may_need_and_no_more(device: ScriptedMemory) -> None:
    engine = engine_on_device()
    assert pool_blocks(engine) == 4 * 128 // 16
    room = 20 * block_bytes(engine)
    device.outside = device.total_bytes - device.reserved - device.step - room
    assert pool_blocks(engine_on_device(fraction=1.0)) == 20  # and the trial's own block is back


def test_room_for_not_one_request_is_told(device: ScriptedMemory) -> None:
    for tokens in (0, FILL):
        with pytest.raises(ConfigError) as told:
            engine_on_device(kv_pool_tokens=tokens, fraction=0.2)
        for part in (
            "limits.memory_fraction=0.2 leaves 0.00 GiB",
            "limits.max_model_len=128",
            "a step of 512 tokens",
            "Lower limits.max_model_len",
            "raise limits.memory_fraction",
        ):
            assert part in str(told.value)


def test_a_given_size_must_leave_room_for_steps(device: ScriptedMemory) -> None:
    fits = engine_on_device(kv_pool_tokens=1024, fraction=0.1)  # may go beyond the fraction
    assert pool_blocks(fits) == 64
    device.outside = device.total_bytes - device.reserved - device.step
    with pytest.raises(ConfigError, match=r"1024 tokens.*beside what steps need"):
        engine_on_device(kv_pool_tokens=1024)


def test_fill_without_memory_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fill is for devices with memory of their own"):
        tiny_engine(kv_pool_tokens=FILL)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_pool_tokens": "all"}, r"kv_pool_tokens='all'.*or fill"),
        ({"kv_pool_tokens": -1}, r"kv_pool_tokens=-1"),
        ({"memory_fraction": 0}, r"memory_fraction=0 "),
        ({"memory_fraction": 1.1}, r"memory_fraction=1.1"),
        ({"memory_fraction": "much"}, r"memory_fraction='much'"),
    ],
)
def test_wrong_limits_are_told(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Limits(**given)  # type: ignore[arg-type]


def test_limits_of_the_command_line() -> None:
    cfg = compose_config([]).cfg
    assert limits_of(cfg, max_num_seqs=2, max_model_len=8) == Limits(2, 8)
    cfg = compose_config(["limits.kv_pool_tokens=fill", "limits.memory_fraction=0.5"]).cfg
    assert limits_of(cfg, max_num_seqs=2, max_model_len=8) == Limits(2, 8, FILL, 0.5)


def test_only_a_device_with_memory_of_its_own_is_profiled(device: ScriptedMemory) -> None:
    plain = tiny_engine(*PAGED)
    assert not device.calls
    ledger = plain.parts.ledger.read()
    assert not ledger.device and "model's widths" in ledger.activation_basis
    engine = engine_on_device()
    assert {"reset_peak", "peak"} <= set(device.calls)
    assert engine.parts.ledger.predicted["activations"] == device.step
    assert "measured in steps of 512 tokens" in engine.parts.ledger.read().activation_basis


#: Slots whose components a profile runs.
PROFILED = {"attention", "graph_runner", "linear", "ops", "sampler", "drafter", "verifier"}


@pytest.mark.parametrize(
    "technique", ["", *(n for n, m in markers_here().items() if PROFILED & set(m.slots))]
)
def test_a_profile_leaves_nothing_behind(device: ScriptedMemory, technique: str) -> None:
    """Tokens and counters are those of an engine that was not profiled."""
    if technique and why_not_here(technique):
        pytest.skip("it cannot run here")
    device.total_bytes = 1 << 30
    names = with_requirements([technique]) if technique else []
    sizes = {"max_num_seqs": 3, "max_model_len": 64}
    profiled = tiny_engine(*OWN_MEMORY, techniques=names, **sizes)
    plain = tiny_engine(techniques=names, **sizes)
    assert profiled.counters() == plain.counters()
    prompts = mixed_prompts(6, longest=40)
    outputs = [[o.token_ids for o in e.generate(prompts, GREEDY)] for e in (profiled, plain)]
    assert outputs[0] == outputs[1]
    assert profiled.counters() == plain.counters()
    check_idle(profiled)


def runner_of(engine: Engine) -> object:
    return engine.parts.executor.runner  # type: ignore[attr-defined]


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("num_tokens", [1, 7, 40, 100, 508, 5000])
def test_the_largest_steps_are_as_large_as_may_be(drafts: int, num_tokens: int) -> None:
    overrides = (*PAGED, "engine/drafter=ngram", "engine/verifier=exact_match") if drafts else PAGED
    settings = (f"engine.drafter.num_draft_tokens={drafts}",) if drafts else ()
    engine = tiny_engine(*overrides, *settings)
    runner = runner_of(engine)
    sizes = StepSizes(num_tokens, 4, 128, 200)
    lengths = largest_lengths(runner, sizes)  # type: ignore[arg-type]
    assert sum(now for _, now in lengths) == min(max(num_tokens, min(1 + drafts, 127)), 4 * 127)
    assert len(lengths) == max(1, min(4, num_tokens // (1 + drafts)))
    contexts = longest_contexts(runner, sizes)  # type: ignore[arg-type]
    assert all(now == 1 + drafts for _, now in contexts)
    assert sum(computed + now for computed, now in contexts) <= max(
        200, len(contexts) * (1 + drafts)
    )
    plans = run_largest_steps(runner, sizes, "test")  # type: ignore[arg-type]
    assert [p.total_num_scheduled_tokens for p in plans] == [
        sum(now for _, now in lengths),
        sum(now for _, now in contexts),
    ]
    table: RequestTable = runner.table  # type: ignore[attr-defined]
    assert not table.row_of and sorted(table._free_rows) == [0, 1, 2, 3]


def test_largest_step_is_the_budget_or_a_prompt_that_runs_whole() -> None:
    assert largest_step_tokens(WholePrompt(), 64, 1000, 4) == 999
    assert largest_step_tokens(WholePrompt(), 8192, 1000, 4) == 4000
    assert largest_step_tokens(WholePrompt(), 2048, 1000, 4) == 2048


def test_rows_of_the_device_add_up_to_it(device: ScriptedMemory) -> None:
    engine = engine_on_device(*PREPARED)
    engine.generate(mixed_prompts(3), GREEDY)
    device.reserved += 5 << 20  # 2 MiB kept for activations, and
    device.allocated += 3 << 20  # somebody else's tensors
    device.outside += 1 << 20  # nobody knows what for
    ledger = engine.parts.ledger.read()
    rows = ledger.device
    assert sum(rows.values()) == device.total_bytes
    assert rows["activations"] == 2 << 20
    assert rows["others_in_process"] == (4 + 3) << 20
    assert rows["allocator_slack"] == 1 << 20
    assert rows["free"] == device.total_bytes - device.used_bytes()
    known = sum(v for k, v in rows.items() if k not in ("unexplained", "free"))
    assert rows["unexplained"] == device.used_bytes() - known
    assert rows["decode_step"] > 0 and rows["kv_trash_block"] == block_bytes(engine)
    assert set(ledger.predicted) <= set(rows)
    memory = {"peak_memory_bytes": ledger.measured_peak_bytes, **dataclasses.asdict(ledger)}
    note = notes._kv(SimpleNamespace(metrics={}, memory=memory))[-1]  # type: ignore[arg-type]
    assert note.startswith(f"{100 * device.used_bytes() / device.total_bytes:.0f} % of the device")
    table = memory_table(memory, "engine")
    assert table.row_count == sum(1 for k, v in rows.items() if v or ledger.predicted.get(k)) + 1


def test_only_runners_that_prepare_steps_have_a_step() -> None:
    for overrides, has_step in ((PAGED, False), ((*PAGED, *PREPARED), True)):
        engine = tiny_engine(*overrides)
        step = runner_of(engine).parts.decode_step  # type: ignore[attr-defined]
        assert (step is not None) == has_step
        held = engine.parts.ledger.predicted["decode_step"]
        assert held == (step.num_bytes if has_step else 0)


def test_a_step_too_large_for_the_device_is_told(
    device: ScriptedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("workbench.engine.profile.run_largest_steps", fails)
    with pytest.raises(ConfigError, match=r"a step of 512 tokens and 4 requests does not fit"):
        engine_on_device()
