"""``build_engine``: components are instantiated here alone, in a fixed order.

platform -> model (linear, ops, adapters, parallel) -> memory plan -> KV manager, pool and host
tier -> attention -> graph runner -> drafter, verifier, sampler -> runner -> scheduler -> engine.
Each constructor gets its own config and the runtime objects it names; none gets the whole config.
``build_scheduler`` makes the part of it that needs no model, and ``build_component`` one component.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import kernels
from workbench.core.errors import ConfigError, UnsupportedError, unknown_name
from workbench.core.step import StepRecord
from workbench.engine.decode_step import DecodeStep
from workbench.engine.engine import Engine, EngineParts
from workbench.engine.host_pool import HostPool
from workbench.engine.ledger import Ledger
from workbench.engine.model_runner import ModelRunner, RunnerParts
from workbench.engine.request_table import RequestTable
from workbench.models.decoder import Decoder
from workbench.models.families import read_config, spec_from_hf
from workbench.models.loader import load_model
from workbench.models.source import ModelSource
from workbench.models.spec import ModelSpec
from workbench.slots.component import Component
from workbench.slots.drafter import Drafter
from workbench.slots.graph_runner import GraphRunner
from workbench.slots.kv_cache import KVCacheManager
from workbench.slots.kv_offload import KVOffload
from workbench.slots.kv_pool import KVPool
from workbench.slots.linear import LinearMethod
from workbench.slots.ops import Ops
from workbench.slots.platform import Platform
from workbench.slots.sampler import Sampler
from workbench.slots.scheduler import Scheduler, SchedulerParts
from workbench.slots.verifier import Verifier

#: Every slot of the engine; ``conf/engine/<slot>/`` holds its options.
SLOTS = (
    "platform",
    "linear",
    "ops",
    "adapters",
    "parallel",
    "kv_cache",
    "kv_pool",
    "attention",
    "graph_runner",
    "sampler",
    "drafter",
    "verifier",
    "executor",
    "policy",
    "admission",
    "eviction",
    "prefill",
    "prefix_cache",
    "kv_offload",
    "scheduler",
    "loop",
)
#: Those that a scheduler without a model has.
SCHEDULER_SLOTS = (
    "kv_cache",
    "policy",
    "admission",
    "eviction",
    "prefill",
    "prefix_cache",
    "kv_offload",
    "scheduler",
)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: What an option's annotation lets through.
_OPTION_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of an engine.

    Attributes
    ----------
    max_num_seqs
        Requests at once.
    max_model_len
        Tokens a request, prompt and output; 0 takes the model's context.
    kv_pool_tokens
        Tokens of KV in all; 0 takes ``max_num_seqs * max_model_len``, within what the platform
        gives unasked (``Platform.auto_pool_bytes``).
    """

    max_num_seqs: int = 32
    max_model_len: int = 0
    kv_pool_tokens: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_num_seqs", 1), ("max_model_len", 0), ("kv_pool_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"limits.{name}={value!r} must be an integer of at least {least}."
                )


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
        ``auto`` (the platform's choice) or a name in ``DTYPES``.
    """

    components: dict[str, dict[str, Any]]
    source: ModelSource
    weights: str = "checkpoint"
    dtype: str = "auto"
    seed: int = 0
    limits: Limits = dataclasses.field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Bytes and FLOPs that a step cannot do without: what the roofline is held against."""

    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: int

    def bytes_of(self, step: StepRecord) -> int:
        """Weights once, the KV of every context read once, new KV written once."""
        kv = step.num_context_tokens + step.num_scheduled_tokens
        return self.weight_bytes + kv * self.kv_bytes_per_token

    def flops_of(self, step: StepRecord) -> int:
        """Two per weight and token."""
        return step.num_scheduled_tokens * self.flops_per_token


def load_class(target: str) -> type[Any]:
    """Import ``package.module.Class``.

    Raises
    ------
    ConfigError
        The module or class does not exist, or a library that it needs is missing.
    """
    module_name, _, class_name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), class_name)  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{target} needs the module {error.name!r}, which is not installed. "
            "`python -m workbench doctor` says what this machine can run."
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{target} does not exist in {module_name}.") from error


def build_config(cls: type[Any], slot: str, options: Mapping[str, Any]) -> Any:
    """Make a component's frozen config, checking names and types of its options.

    Raises
    ------
    ConfigError
        An option that the component does not have, or a value of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls.Config)}
    for name, value in options.items():
        if name not in fields:
            raise unknown_name(f"option of engine.{slot} ({cls.__name__})", name, fields)
        expected = fields[name].type
        kinds = _OPTION_TYPES.get(str(expected), (object,))
        wrong = not isinstance(value, kinds)
        if wrong or (expected == "int" and isinstance(value, bool)):
            raise ConfigError(f"engine.{slot}.{name}={value!r} must be of type {expected}.")
    return cls.Config(**options)


def build_component(slot: str, node: Mapping[str, Any], **runtime: Any) -> Any:
    """Instantiate one component.

    Parameters
    ----------
    node
        ``_target_`` and the component's own options.
    runtime
        The runtime objects that the slot's components take.

    Raises
    ------
    ConfigError
        As :func:`load_class` and :func:`build_config`.
    """
    options = {str(key): value for key, value in node.items()}
    cls = load_class(options.pop("_target_"))
    return cls(build_config(cls, slot, options), **runtime)


class _Builder:
    """Builds components by slot and remembers them."""

    def __init__(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        for slot in nodes:
            if slot not in SLOTS:
                raise unknown_name("slot", slot, SLOTS)
        missing = [slot for slot in SLOTS if slot not in nodes]
        if missing:
            raise ConfigError(f"no component is configured for: {', '.join(missing)}.")
        self._nodes = {slot: dict(node) for slot, node in nodes.items()}
        self.built: dict[str, Component] = {}

    def cls(self, slot: str) -> type[Any]:
        """The class that fills a slot."""
        return load_class(self._nodes[slot]["_target_"])

    def config(self, slot: str) -> Any:
        """The config of the component that fills a slot."""
        options = {k: v for k, v in self._nodes[slot].items() if k != "_target_"}
        return build_config(self.cls(slot), slot, options)

    def build(self, slot: str, **runtime: Any) -> Any:
        """Instantiate the component of a slot."""
        self.built[slot] = component = build_component(slot, self._nodes[slot], **runtime)
        return component


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
    builder = _Builder(config.components)
    platform: Platform = builder.build("platform")
    _require(platform.unsupported_reasons(), f"platform {platform.name}")
    dtype = _resolve_dtype(config.dtype, platform)
    _load_libraries(platform.device, dtype)
    probe = platform.memory_probe()
    probe.trim()
    base_bytes = probe.current_bytes()
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
    max_model_len = _resolve_model_len(config.limits, decoder.spec)
    runner = _build_runner(builder, config, decoder, platform, dtype, max_model_len)
    scheduler = _build_scheduler(builder, config.limits, max_model_len)
    probe.trim()
    ledger = Ledger(
        probe,
        _predict(decoder, runner, scheduler.token_budget, config.limits.max_num_seqs),
        base_bytes,
        probe.current_bytes(),
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
    builder = _Builder(components)
    block_size = builder.cls("kv_cache").choose_block_size(
        builder.config("kv_cache"), limits.max_model_len
    )
    num_blocks = _num_blocks(limits.kv_pool_tokens, block_size)
    builder.build("kv_cache", num_blocks=num_blocks, block_size=block_size)
    builder.build("kv_offload", bytes_per_block=0, num_device_blocks=num_blocks)
    return _build_scheduler(builder, limits, limits.max_model_len)


def check_engine(config: EngineConfig) -> None:
    """Raise what :func:`build_engine` would raise of a configuration, before a model is loaded.

    Builds everything but the model and what holds its KV, and drops it.
    """
    builder = _Builder(config.components)
    for slot in SLOTS:
        builder.config(slot)
    platform: Platform = builder.build("platform")
    _require(platform.unsupported_reasons(), f"platform {platform.name}")
    dtype = _resolve_dtype(config.dtype, platform)
    spec = spec_from_hf(read_config(config.source.config))
    max_model_len = _resolve_model_len(config.limits, spec)
    _build_ops(builder, platform, dtype)
    _build_sampler(builder, platform, dtype)
    _build_speculation(builder)
    kv_cache = _build_kv_cache(builder, spec, config.limits, platform, dtype, max_model_len)
    bytes_per_token = builder.cls("kv_pool").bytes_per_token(spec.kv_shape(dtype))
    builder.build(
        "kv_offload",
        bytes_per_block=kv_cache.block_size * bytes_per_token,
        num_device_blocks=kv_cache.num_blocks,
    )
    _build_scheduler(builder, config.limits, max_model_len)


def _build_linear(builder: _Builder, platform: Platform, dtype: torch.dtype) -> LinearMethod:
    linear: LinearMethod = builder.build("linear")
    reasons = linear.unsupported_reasons(platform.device, dtype)
    _require(reasons, f"linear {type(linear).__name__}")
    return linear


def _build_ops(builder: _Builder, platform: Platform, dtype: torch.dtype) -> Ops:
    ops: Ops = builder.build("ops")
    _require(ops.unsupported_reasons(platform.device, dtype), f"ops {type(ops).__name__}")
    return ops


def _build_sampler(builder: _Builder, platform: Platform, dtype: torch.dtype) -> Sampler:
    sampler: Sampler = builder.build("sampler")
    reasons = sampler.unsupported_reasons(platform.device, dtype)
    _require(reasons, f"sampler {type(sampler).__name__}")
    return sampler


def _build_speculation(builder: _Builder) -> tuple[Drafter, Verifier]:
    drafter, verifier = builder.build("drafter"), builder.build("verifier")
    loop = builder.cls("loop")
    if drafter.num_lookahead_tokens and loop.plans_ahead:
        raise ConfigError(
            f"drafter {type(drafter).__name__} has to see a step's tokens before the next one is "
            f"planned, and loop {loop.__name__} plans it before. Choose engine/loop=sync, or "
            "engine/drafter=none."
        )
    if drafter.num_lookahead_tokens and not verifier.accepts_drafts:
        raise ConfigError(
            f"drafter {type(drafter).__name__} proposes drafts, but verifier "
            f"{type(verifier).__name__} takes none. Choose a verifier with engine/verifier=..."
        )
    return drafter, verifier


def _build_runner(
    builder: _Builder,
    config: EngineConfig,
    decoder: Decoder,
    platform: Platform,
    dtype: torch.dtype,
    max_model_len: int,
) -> ModelRunner:
    limits = config.limits
    drafter, verifier = _build_speculation(builder)
    kv_cache = _build_kv_cache(builder, decoder.spec, limits, platform, dtype, max_model_len)
    pool: KVPool = builder.build(
        "kv_pool",
        shape=decoder.spec.kv_shape(dtype),
        num_blocks=kv_cache.num_blocks,
        block_size=kv_cache.block_size,
        device=platform.device,
    )
    offload: KVOffload = builder.build(
        "kv_offload",
        bytes_per_block=pool.num_bytes // (pool.num_blocks + 1),
        num_device_blocks=pool.num_blocks,
    )
    attention = builder.build("attention")
    _require(
        attention.unsupported_reasons(decoder.spec.attention_layers, pool),
        f"attention {type(attention).__name__}",
    )
    table = RequestTable(
        max_num_seqs=limits.max_num_seqs,
        max_model_len=max_model_len,
        num_lookahead_tokens=drafter.num_lookahead_tokens,
        num_block_columns=-(-max_model_len // pool.block_size),
        device=platform.device,
    )
    sampler: Sampler = _build_sampler(builder, platform, dtype)
    graph_runner: GraphRunner = builder.build("graph_runner")
    _require(
        graph_runner.unsupported_reasons(platform, attention),
        f"graph runner {type(graph_runner).__name__}",
    )
    driven = {
        slot: builder.built[slot] for slot in ("linear", "ops", "attention", "sampler", "kv_pool")
    }
    step = DecodeStep(decoder, table, pool, attention, sampler, driven)
    with torch.inference_mode():
        graph_runner.capture(step)
    for component in driven.values():
        component.reset_counters()
    return ModelRunner(
        RunnerParts(
            model=decoder,
            table=table,
            pool=pool,
            host_pool=HostPool(pool, offload.num_host_blocks),
            attention=attention,
            graph_runner=graph_runner,
            sampler=sampler,
            drafter=drafter,
            verifier=verifier,
            decode_step=step,
        )
    )


def _build_kv_cache(
    builder: _Builder,
    spec: ModelSpec,
    limits: Limits,
    platform: Platform,
    dtype: torch.dtype,
    max_model_len: int,
) -> KVCacheManager:
    """The manager of as many blocks as the limits ask for and the memory holds."""
    bytes_per_token = builder.cls("kv_pool").bytes_per_token(spec.kv_shape(dtype))
    block_size = builder.cls("kv_cache").choose_block_size(
        builder.config("kv_cache"), max_model_len
    )
    free = platform.free_memory_bytes()
    tokens = limits.kv_pool_tokens
    if not tokens:
        wanted = limits.max_num_seqs * -(-max_model_len // block_size) * block_size
        tokens = min(wanted, platform.auto_pool_bytes() // bytes_per_token)
    num_blocks = _num_blocks(tokens, block_size)
    needed = (num_blocks + 1) * block_size * bytes_per_token
    if needed > free:
        raise ConfigError(
            f"the KV pool needs {needed / 2**30:.2f} GiB for {num_blocks * block_size} tokens, "
            f"but {free / 2**30:.2f} GiB are free. Lower limits.kv_pool_tokens, max_num_seqs or "
            "max_model_len."
        )
    manager: KVCacheManager = builder.build(
        "kv_cache", num_blocks=num_blocks, block_size=block_size
    )
    return manager


def _num_blocks(tokens: int, block_size: int) -> int:
    """Whole blocks of a pool; an error where it holds none."""
    if tokens < block_size:
        raise ConfigError(
            f"a KV pool of {tokens} tokens holds no block of {block_size} tokens. Raise "
            "limits.kv_pool_tokens or lower limits.max_model_len."
        )
    return tokens // block_size


def _build_scheduler(builder: _Builder, limits: Limits, max_model_len: int) -> Scheduler:
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
    )
    scheduler: Scheduler = builder.build("scheduler", parts=parts)
    return scheduler


def _load_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Make math libraries and compiled kernels load now, so that ``base_bytes`` counts them."""
    x = torch.ones(64, 64, dtype=dtype, device=device)
    kernels.apply_linear(kernels.pack_linear(x.clone(), None, 1), x)
    kernels.rms_norm(x, x[0], 1e-6)
    kernels.argmax(x)


def _require(reasons: list[str], what: str) -> None:
    if reasons:
        raise UnsupportedError(f"{what} cannot be used: " + "; ".join(reasons) + ".")


def _resolve_dtype(name: str, platform: Platform) -> torch.dtype:
    if name == "auto":
        return platform.default_dtype()
    if name not in DTYPES:
        raise unknown_name("dtype", name, ["auto", *DTYPES])
    return DTYPES[name]


def _resolve_model_len(limits: Limits, spec: ModelSpec) -> int:
    context = spec.max_position_embeddings
    if limits.max_model_len > context:
        raise ConfigError(
            f"limits.max_model_len={limits.max_model_len} is over the model's context of "
            f"{context} tokens."
        )
    return limits.max_model_len or context


def _predict(
    decoder: Decoder, runner: ModelRunner, token_budget: int, max_num_seqs: int
) -> dict[str, int]:
    """Bytes by use. Activations are those of the largest step that the scheduler may plan."""
    spec = decoder.spec
    item = decoder.dtype.itemsize
    parts = runner.parts
    most_tokens = min(token_budget, parts.pool.num_blocks * parts.pool.block_size)
    most_logits = max_num_seqs * (1 + parts.drafter.num_lookahead_tokens)
    return {
        "weights": decoder.weight_bytes_actual,
        "rope_tables": decoder.rope_bytes,
        "kv_pool": parts.pool.num_bytes,
        "kv_host": parts.host_pool.num_device_bytes,
        "request_table": parts.table.num_bytes,
        "activations": (most_tokens * _activation_width(spec) + most_logits * spec.vocab_size)
        * item,
        "graphs": parts.graph_runner.num_bytes,
    }


def _activation_width(spec: ModelSpec) -> int:
    """Values a token at the widest point of a layer, the residual stream included."""
    attention = max(2 * layer.q_size + 2 * layer.kv_size + layer.q_size for layer in spec.layers)
    return 2 * spec.hidden_size + max(3 * spec.intermediate_size, attention)


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
            weight_bytes=spec.streamed_bytes(dtype),
            kv_bytes_per_token=type(pool).bytes_per_token(spec.kv_shape(dtype)),
            flops_per_token=spec.flops_per_token(0),
        ),
    }
