"""``build_engine``: components are instantiated here alone, in a fixed order.

platform -> model (linear, ops, adapters, parallel) -> drafter, verifier, attention, sampler, graph
runner -> profile, where the device has memory of its own -> KV manager, pool and host tier ->
runner -> scheduler -> engine.
Each constructor gets its own config and the runtime objects it names; none gets the whole config.
``build_scheduler`` makes the part of it that needs no model, and ``build_component`` one component.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from workbench.components import (
    SCHEDULER_SLOTS,
    SLOTS,
    Builder,
    build_component,
    build_config,
    load_class,
)
from workbench.core.errors import ConfigError, UnsupportedError
from workbench.core.memory import DeviceMemory, frozen_heap
from workbench.engine.engine import Engine, EngineParts
from workbench.engine.host_pool import HostPool, most_staging_bytes
from workbench.engine.ledger import DeviceBooks, Ledger, load_libraries
from workbench.engine.model_runner import ModelRunner, RunnerParts
from workbench.engine.prepared_step import StepParts
from workbench.engine.prepared_steps import make_steps
from workbench.engine.profile import Profile, StepSizes, profile_steps
from workbench.engine.request_table import RequestTable
from workbench.models.decoder import Decoder
from workbench.models.families import preload, read_config, spec_from_hf
from workbench.models.loader import load_model
from workbench.models.source import ModelSource
from workbench.sizing import (
    Limits,
    PoolWish,
    StepCost,
    largest_step_tokens,
    pool_blocks,
    predict,
    resolve_model_len,
    whole_blocks,
)
from workbench.slots.draft_length import FullLength
from workbench.slots.kv_cache import KVCacheManager
from workbench.slots.kv_offload import KVOffload
from workbench.slots.kv_pool import KVPool, KVShape
from workbench.slots.linear import LinearMethod
from workbench.slots.ops import Ops
from workbench.slots.platform import Platform, resolve_dtype
from workbench.slots.sampler import Sampler
from workbench.slots.scheduler import Scheduler, SchedulerParts
from workbench.speculation import DrafterSource, bind_drafter, build_speculation, load_drafter

__all__ = [
    "SCHEDULER_SLOTS",
    "SLOTS",
    "EngineConfig",
    "Limits",
    "StepCost",
    "build_component",
    "build_config",
    "build_engine",
    "build_scheduler",
    "check_engine",
    "load_class",
]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything that an engine is built from, resolved.

    Attributes
    ----------
    components
        By slot: ``_target_`` and the component's own options.
    source
        Where the model comes from.
    dtype
        ``auto`` (the platform's choice) or a name in ``slots.platform.DTYPES``.
    models_dir
        Folder of the model store, for models that components name; None: the default one.
    """

    components: dict[str, dict[str, Any]]
    source: ModelSource
    weights: str = "checkpoint"
    dtype: str = "auto"
    seed: int = 0
    models_dir: str | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)


@frozen_heap()
def build_engine(config: EngineConfig) -> Engine:
    """Assemble an engine.

    Raises
    ------
    ConfigError
        An unknown slot, option or type; limits that do not fit each other.
    UnsupportedError
        A component cannot run this model on this machine; all reasons are named.
    """
    began = time.perf_counter()
    builder = Builder(config.components)
    platform: Platform = builder.build("platform")
    _require(platform.unsupported_reasons(), f"platform {platform.name}")
    dtype = resolve_dtype(config.dtype, platform)
    preload()
    load_libraries(platform.device, dtype)
    probe = platform.memory_probe()
    probe.trim()
    base_bytes = probe.current_bytes()
    memory = platform.device_memory()
    base_allocated = 0 if memory is None else memory.allocated_bytes()
    decoder = load_model(
        config.source.config,
        linear=_build_linear(builder, platform, dtype),
        ops=_build_ops(builder, platform, dtype),
        adapters=builder.build("adapters"),
        parallel=builder.build("parallel"),
        dtype=dtype,
        device=platform.device,
        weights=config.weights,
        seed=config.seed,
        expected_tokens=config.limits.max_num_seqs,
    )
    probe.trim()
    max_model_len = resolve_model_len(config.limits, decoder.spec)
    runner, profile = _build_runner(builder, config, decoder, platform, dtype, max_model_len)
    books = None
    if memory is not None and profile is not None:
        books = DeviceBooks(memory, profile.outside_bytes, base_allocated)
    _prepare_steps(builder, runner)
    num_kv_lookahead = runner.parts.drafter.num_kv_lookahead
    scheduler = _build_scheduler(builder, config.limits, max_model_len, num_kv_lookahead)
    probe.trim()
    if books is not None:
        books.prepared(runner.parts.graph_runner.num_bytes)
    step_tokens = _step_tokens(builder, config.limits, max_model_len)
    ledger = Ledger(
        probe,
        predict(decoder, runner, step_tokens, profile),
        base_bytes,
        probe.current_bytes(),
        books,
    )
    info = _describe(config, decoder, runner, platform, dtype, max_model_len)
    info["build_s"] = time.perf_counter() - began
    return Engine(
        EngineParts(
            scheduler=scheduler,
            executor=builder.build("executor", runner=runner),
            loop=builder.build("loop"),
            components=builder.built,
            graph_runner=runner.parts.graph_runner,
            ledger=ledger,
            tokenizer=config.source.tokenizer(),
            eos_token_ids=frozenset(decoder.spec.eos_token_ids),
            vocab_size=decoder.spec.vocab_size,
            max_model_len=max_model_len,
            seed=config.seed,
            info=info,
        )
    )


def build_scheduler(components: Mapping[str, Mapping[str, Any]], limits: Limits) -> Scheduler:
    """Assemble a scheduler and what it drives as an engine would have them, without a model.

    Parameters
    ----------
    components
        By slot, as in :class:`EngineConfig`; those of ``SCHEDULER_SLOTS`` are built.
    limits
        All of them given; the pool is cut to whole blocks.

    Raises
    ------
    ConfigError
        As :func:`build_engine`; and a size in bytes, since blocks have none here.
    """
    builder = Builder(components)
    if not isinstance(limits.kv_pool_tokens, int):
        raise ConfigError(
            f"limits.kv_pool_tokens={limits.kv_pool_tokens} needs a device to fill, and without a "
            "model there is none: give a number of tokens."
        )
    block_size = builder.block_size(limits.max_model_len)
    num_blocks = whole_blocks(limits.kv_pool_tokens, block_size)
    builder.build("kv_cache", num_blocks=num_blocks, block_size=block_size)
    builder.build("kv_offload", bytes_per_block=0, num_device_blocks=num_blocks)
    return _build_scheduler(builder, limits, limits.max_model_len)


def check_engine(config: EngineConfig) -> None:
    """Raise what :func:`build_engine` would raise of a configuration, before a model is loaded.

    Builds everything but the model and what holds its KV, and drops it.
    """
    builder = Builder(config.components)
    for slot in SLOTS:
        builder.config(slot)
    platform: Platform = builder.build("platform")
    _require(platform.unsupported_reasons(), f"platform {platform.name}")
    dtype = resolve_dtype(config.dtype, platform)
    spec = spec_from_hf(read_config(config.source.config))
    max_model_len = resolve_model_len(config.limits, spec)
    _build_ops(builder, platform, dtype)
    _build_sampler(builder, platform, dtype)
    build_speculation(builder)
    shape = spec.kv_shape(dtype)
    kv_cache = _build_kv_cache(builder, shape, config.limits, platform, max_model_len, None)
    bytes_per_token = builder.cls("kv_pool").bytes_per_token(shape)
    builder.build(
        "kv_offload",
        bytes_per_block=kv_cache.block_size * bytes_per_token,
        num_device_blocks=kv_cache.num_blocks,
    )
    _build_scheduler(builder, config.limits, max_model_len)


def _build_linear(builder: Builder, platform: Platform, dtype: torch.dtype) -> LinearMethod:
    linear: LinearMethod = builder.build("linear")
    reasons = linear.unsupported_reasons(platform.device, dtype)
    _require(reasons, f"linear {type(linear).__name__}")
    return linear


def _build_ops(builder: Builder, platform: Platform, dtype: torch.dtype) -> Ops:
    ops: Ops = builder.build("ops")
    _require(ops.unsupported_reasons(platform.device, dtype), f"ops {type(ops).__name__}")
    return ops


def _build_sampler(builder: Builder, platform: Platform, dtype: torch.dtype) -> Sampler:
    sampler: Sampler = builder.build("sampler")
    reasons = sampler.unsupported_reasons(platform.device, dtype)
    _require(reasons, f"sampler {type(sampler).__name__}")
    return sampler


def _build_runner(
    builder: Builder,
    config: EngineConfig,
    decoder: Decoder,
    platform: Platform,
    dtype: torch.dtype,
    max_model_len: int,
) -> tuple[ModelRunner, Profile | None]:
    """The runner, without prepared steps; and what was measured to size its pool."""
    limits = config.limits
    drafter = build_speculation(builder).drafter
    load_drafter(
        builder,
        decoder,
        DrafterSource(
            config.source.folder, config.weights, config.seed, config.models_dir, max_model_len
        ),
        expected_tokens=limits.max_num_seqs,
    )
    builder.build("attention")
    _build_sampler(builder, platform, dtype)
    builder.build("graph_runner")
    shape = decoder.spec.kv_shape(dtype).followed_by(drafter.kv_shape())
    block_size = builder.block_size(max_model_len)
    size = {"shape": shape, "block_size": block_size, "device": platform.device}
    memory, profile = platform.device_memory(), None
    if memory is not None:
        pool = builder.make("kv_pool", num_blocks=0, **size)
        trial = _make_runner(builder, decoder, platform, limits, max_model_len, pool, 0)
        trial.drafting.draft_length = FullLength()  # nothing is to be learnt from its steps
        del pool
        profile = _profile(builder, trial, limits, max_model_len, memory)
        del trial
        memory.trim()
    kv_cache = _build_kv_cache(builder, shape, limits, platform, max_model_len, profile)
    pool = builder.build("kv_pool", num_blocks=kv_cache.num_blocks, **size)
    offload: KVOffload = builder.build(
        "kv_offload",
        bytes_per_block=pool.num_bytes // (pool.num_blocks + 1),
        num_device_blocks=pool.num_blocks,
    )
    return (
        _make_runner(
            builder, decoder, platform, limits, max_model_len, pool, offload.num_host_blocks
        ),
        profile,
    )


def _make_runner(
    builder: Builder,
    decoder: Decoder,
    platform: Platform,
    limits: Limits,
    max_model_len: int,
    pool: KVPool,
    num_host_blocks: int,
) -> ModelRunner:
    """A runner over a pool, with a request table of its own."""
    built: dict[str, Any] = builder.built
    attention, graph_runner = built["attention"], built["graph_runner"]
    _require(
        attention.unsupported_reasons(decoder.spec.attention_layers, pool),
        f"attention {type(attention).__name__}",
    )
    _require(
        graph_runner.unsupported_reasons(platform, attention),
        f"graph runner {type(graph_runner).__name__}",
    )
    table = RequestTable(
        max_num_seqs=limits.max_num_seqs,
        max_model_len=max_model_len,
        num_lookahead_tokens=built["drafter"].num_lookahead_tokens,
        num_block_columns=-(-max_model_len // pool.block_size),
        device=platform.device,
    )
    driven = {slot: built[slot] for slot in ("linear", "ops", "attention", "sampler")}
    step_parts = StepParts(
        decoder,
        table,
        pool,
        attention,
        built["sampler"],
        {**driven, "kv_pool": pool},
        kept_layers=built["drafter"].kept_layers,
        follow=built["drafter"].follow_prepared,
    )
    step_tokens = _step_tokens(builder, limits, max_model_len)
    bind_drafter(builder, step_parts, decoder.spec, step_tokens)
    steps = make_steps(
        step_parts,
        graph_runner,
        built["drafter"],
        built["verifier"],
        max_model_len,
        step_tokens,
    )
    return ModelRunner(
        RunnerParts(
            model=decoder,
            table=table,
            pool=pool,
            host_pool=HostPool(pool, num_host_blocks),
            attention=attention,
            graph_runner=graph_runner,
            sampler=built["sampler"],
            drafter=built["drafter"],
            verifier=built["verifier"],
            draft_length=built["draft_length"],
            vocab_size=decoder.spec.vocab_size,
            plans_ahead=builder.cls("loop").plans_ahead,
            decode_step=steps.decode,
            verify_step=steps.verify,
            mixed_step=steps.mixed,
        )
    )


def _profile(
    builder: Builder,
    trial: ModelRunner,
    limits: Limits,
    max_model_len: int,
    memory: DeviceMemory,
) -> Profile:
    """Measure what steps take, with the weights on the device and no pool."""
    pool = trial.parts.pool
    left = int(limits.memory_fraction * memory.total_bytes) - memory.used_bytes()
    sizes = StepSizes(
        num_tokens=_step_tokens(builder, limits, max_model_len),
        num_requests=limits.max_num_seqs,
        max_model_len=max_model_len,
        num_context_tokens=max(0, left) // (pool.num_bytes // pool.block_size),
    )
    try:
        return profile_steps(trial, sizes, memory)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of {sizes.num_tokens} tokens and {sizes.num_requests} requests does not fit "
            "into the device's memory beside the weights. Lower "
            "engine.scheduler.max_num_batched_tokens, limits.max_num_seqs or limits.max_model_len "
            f"(a prompt may run whole). What was asked for: {error}"
        ) from error


def _prepare_steps(builder: Builder, runner: ModelRunner) -> None:
    """Capture, and forget what was counted so far."""
    parts = runner.parts
    if parts.prepared_steps:
        with torch.inference_mode():
            parts.graph_runner.capture(parts.prepared_steps)
    for component in builder.built.values():
        component.clear_cached()
        component.reset_counters()


def _step_tokens(builder: Builder, limits: Limits, max_model_len: int) -> int:
    """Tokens of the largest step that may be planned."""
    prefill = builder.make("prefill")
    budget = prefill.token_budget(builder.config("scheduler").max_num_batched_tokens)
    return largest_step_tokens(prefill, budget, max_model_len, limits.max_num_seqs)


def _build_kv_cache(
    builder: Builder,
    shape: KVShape,
    limits: Limits,
    platform: Platform,
    max_model_len: int,
    profile: Profile | None,
) -> KVCacheManager:
    """The manager of as many blocks as the limits ask for and the memory holds."""
    bytes_per_token = builder.cls("kv_pool").bytes_per_token(shape)
    block_size = builder.block_size(max_model_len)
    has_host_tier = builder.cls("kv_offload").holds_blocks
    wish = PoolWish(
        limits=limits,
        request_tokens=max_model_len,
        block_size=block_size,
        bytes_per_token=bytes_per_token,
        staging_bytes=most_staging_bytes(block_size * bytes_per_token) if has_host_tier else 0,
    )
    manager: KVCacheManager = builder.build(
        "kv_cache", num_blocks=pool_blocks(wish, platform, profile), block_size=block_size
    )
    return manager


def _build_scheduler(
    builder: Builder, limits: Limits, max_model_len: int, num_kv_lookahead: int = 0
) -> Scheduler:
    kv_cache: KVCacheManager = builder.built["kv_cache"]  # type: ignore[assignment]
    offload: KVOffload = builder.built["kv_offload"]  # type: ignore[assignment]
    eviction = builder.build("eviction")
    parts = SchedulerParts(
        kv_cache=kv_cache,
        prefix_cache=builder.build(
            "prefix_cache", block_size=kv_cache.block_size, eviction=eviction
        ),
        offload=offload,
        policy=builder.build("policy"),
        admission=builder.build("admission"),
        prefill=builder.build("prefill"),
        max_num_seqs=limits.max_num_seqs,
        max_model_len=max_model_len,
        num_kv_lookahead=num_kv_lookahead,
    )
    scheduler: Scheduler = builder.build("scheduler", parts=parts)
    return scheduler


def _require(reasons: list[str], what: str) -> None:
    if reasons:
        raise UnsupportedError(f"{what} cannot be used: " + "; ".join(reasons) + ".")


def _describe(
    config: EngineConfig,
    decoder: Decoder,
    runner: ModelRunner,
    platform: Platform,
    dtype: torch.dtype,
    max_model_len: int,
) -> dict[str, Any]:
    spec, pool = decoder.spec, runner.parts.pool
    return {
        "model": config.source.name,
        "weights": config.weights,
        "weights_origin": config.source.origin,
        "attention": runner.parts.attention.describe(),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(platform.device),
        "max_num_seqs": config.limits.max_num_seqs,
        "max_model_len": max_model_len,
        "kv_pool_tokens": pool.num_blocks * pool.block_size,
        "kv_host_bytes": runner.parts.host_pool.num_bytes,
        "block_size": pool.block_size,
        "cost": StepCost(
            weight_bytes=decoder.streamed_bytes,
            kv_bytes_per_token=type(pool).bytes_per_token(spec.kv_shape(dtype)),
            flops_per_token=spec.flops_per_token(0),
        ),
    }
