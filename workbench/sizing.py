"""How large things are: the blocks of the KV pool, and the bytes of everything by use."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.core.errors import ConfigError
from workbench.core.step import StepRecord
from workbench.engine.ledger import Prediction
from workbench.engine.model_runner import ModelRunner
from workbench.engine.profile import Profile
from workbench.models.decoder import Decoder
from workbench.models.spec import ModelSpec
from workbench.slots.platform import Platform
from workbench.slots.prefill import Prefill

#: ``limits.kv_pool_tokens`` that takes all the memory that may be used.
FILL = "fill"


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
        Tokens of KV in all; 0 takes ``max_num_seqs * max_model_len``, within the memory that may be
        used; ``"fill"`` takes all of that memory.
    memory_fraction
        Share of a device with memory of its own that may be used in all, by others too. A host's
        memory has its own bound (``Platform.auto_pool_bytes``).
    """

    max_num_seqs: int = 32
    max_model_len: int = 0
    kv_pool_tokens: int | str = 0
    memory_fraction: float = 0.9

    def __post_init__(self) -> None:
        for name, least in (("max_num_seqs", 1), ("max_model_len", 0), ("kv_pool_tokens", 0)):
            value = getattr(self, name)
            may_fill = name == "kv_pool_tokens"
            if may_fill and value == FILL:
                continue
            if not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"limits.{name}={value!r} must be an integer of at least {least}"
                    + (f", or {FILL}." if may_fill else ".")
                )
        fraction = self.memory_fraction
        if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ConfigError(
                f"limits.memory_fraction={fraction!r} must be a number over 0 and up to 1."
            )


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


@dataclass(frozen=True, slots=True)
class PoolWish:
    """The KV pool that is asked for.

    Attributes
    ----------
    request_tokens
        Tokens of the longest request.
    block_size, bytes_per_token
        Tokens a block, and bytes a token.
    staging_bytes
        Of the device's memory that a host tier needs for its copies.
    """

    limits: Limits
    request_tokens: int
    block_size: int
    bytes_per_token: int
    staging_bytes: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes a block."""
        return self.block_size * self.bytes_per_token


def resolve_model_len(limits: Limits, spec: ModelSpec) -> int:
    """Tokens that a request may have, within the model's context."""
    context = spec.max_position_embeddings
    if limits.max_model_len > context:
        raise ConfigError(
            f"limits.max_model_len={limits.max_model_len} is over the model's context of "
            f"{context} tokens."
        )
    return limits.max_model_len or context


def pool_blocks(wish: PoolWish, platform: Platform, profile: Profile | None) -> int:
    """Blocks of the KV pool, the trash block not counted.

    Parameters
    ----------
    profile
        Of the device with the weights on it; None before they are, and where the memory is the
        host's.

    Raises
    ------
    ConfigError
        The memory does not hold what is asked for, or not one request.
    """
    memory, limits = platform.device_memory(), wish.limits
    if limits.kv_pool_tokens == FILL and memory is None:
        raise ConfigError(
            f"limits.kv_pool_tokens={FILL} is for devices with memory of their own; that of "
            f"{platform.name} is the host's, which others need too. Give a number of tokens, or "
            "auto."
        )
    if isinstance(limits.kv_pool_tokens, int) and limits.kv_pool_tokens:
        num_blocks = whole_blocks(limits.kv_pool_tokens, wish.block_size)
        _check_fits(wish, num_blocks, platform, profile)
        return num_blocks
    if profile is not None:
        usable = profile.kv_bytes(limits.memory_fraction) - wish.staging_bytes
    else:
        usable = platform.auto_pool_bytes(limits.memory_fraction)
    blocks_each = -(-wish.request_tokens // wish.block_size)
    if memory is None:
        wanted = limits.max_num_seqs * blocks_each * wish.block_size
        num_blocks = whole_blocks(min(wanted, usable // wish.bytes_per_token), wish.block_size)
        _check_fits(wish, num_blocks, platform, profile)
        return num_blocks
    num_blocks = max(0, usable) // wish.block_bytes - 1  # one is the trash block
    if num_blocks < blocks_each:
        raise ConfigError(_too_small(wish, usable, profile))
    if limits.kv_pool_tokens == FILL:
        return num_blocks
    return min(num_blocks, limits.max_num_seqs * blocks_each)


def whole_blocks(tokens: int, block_size: int) -> int:
    """Whole blocks of a pool; an error where it holds none."""
    if tokens < block_size:
        raise ConfigError(
            f"a KV pool of {tokens} tokens holds no block of {block_size} tokens. Raise "
            "limits.kv_pool_tokens or lower limits.max_model_len."
        )
    return tokens // block_size


def _check_fits(
    wish: PoolWish, num_blocks: int, platform: Platform, profile: Profile | None
) -> None:
    """Refuse a pool beside which steps would find no memory."""
    needed = (num_blocks + 1) * wish.block_bytes
    free = platform.free_memory_bytes()
    beside = ""
    if profile is not None:
        free = profile.kv_bytes(1.0) - wish.staging_bytes
        beside = f" beside what steps need ({_gib(profile.activation_bytes + profile.graph_bytes)})"
    if needed > free:
        raise ConfigError(
            f"the KV pool needs {_gib(needed)} for {num_blocks * wish.block_size} tokens, but "
            f"{_gib(max(0, free))} are free{beside}. Lower limits.kv_pool_tokens, max_num_seqs or "
            "max_model_len."
        )


def _too_small(wish: PoolWish, usable: int, profile: Profile | None) -> str:
    """Where the memory went that one request would have needed."""
    limits = wish.limits
    request = (-(-wish.request_tokens // wish.block_size) + 1) * wish.block_bytes
    text = (
        f"limits.memory_fraction={limits.memory_fraction:g} leaves {_gib(max(0, usable))} for KV, "
        f"but one request of limits.max_model_len={wish.request_tokens} tokens needs "
        f"{_gib(request)}."
    )
    if profile is not None:
        sizes = profile.sizes
        text += (
            f" Of {_gib(profile.total_bytes)} the weights and others' use take "
            f"{_gib(profile.used_bytes)}, a step of {sizes.num_tokens} tokens "
            f"{_gib(profile.activation_bytes)}, prepared steps {_gib(profile.graph_bytes)}."
        )
    return text + (
        " Lower limits.max_model_len (long prompts also make the largest step), "
        "limits.max_num_seqs or engine.scheduler.max_num_batched_tokens, end what else runs on the "
        "device, or raise limits.memory_fraction, up to 1."
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def largest_step_tokens(
    prefill: Prefill, token_budget: int, max_model_len: int, max_num_seqs: int
) -> int:
    """Most tokens of one step: the budget, or a prompt that runs whole where it may not be split.

    Parameters
    ----------
    token_budget
        Of the prefill itself.
    """
    alone = prefill.num_tokens(max(1, max_model_len - 1), token_budget, True)
    return min(max(token_budget, alone), max_num_seqs * max_model_len)


def predict(
    decoder: Decoder, runner: ModelRunner, step_tokens: int, profile: Profile | None
) -> Prediction:
    """Bytes by use before the first request.

    Activations are those of the largest step that the scheduler may plan: measured where there is
    a profile, else from the widths of the model.
    """
    spec, parts = decoder.spec, runner.parts
    most_tokens = min(step_tokens, parts.pool.num_blocks * parts.pool.block_size)
    most_logits = parts.table.padding_row * (1 + parts.drafter.num_lookahead_tokens)
    values = most_tokens * _activation_width(spec) + most_logits * spec.vocab_size
    trash = parts.pool.num_bytes // (parts.pool.num_blocks + 1)
    held = {
        "weights": decoder.weight_bytes_actual,
        "drafter_weights": parts.drafter.weight_bytes,
        "rope_tables": decoder.rope_bytes,
        "kv_pool": parts.pool.num_bytes - trash,
        "kv_trash_block": trash,
        "kv_host": parts.host_pool.num_device_bytes,
        "request_table": parts.table.num_bytes,
        "decode_step": 0 if parts.decode_step is None else parts.decode_step.num_bytes,
        "verify_step": 0 if parts.verify_step is None else parts.verify_step.num_bytes,
        "mixed_step": 0 if parts.mixed_step is None else parts.mixed_step.num_bytes,
    }
    if profile is None:
        activations = values * decoder.dtype.itemsize
        basis = f"{most_tokens} tokens and {most_logits} rows of logits, by the model's widths"
        graphs = parts.graph_runner.num_bytes
    else:
        activations, graphs = profile.activation_bytes, profile.graph_bytes
        sizes = profile.sizes
        basis = f"measured in steps of {sizes.num_tokens} tokens and {sizes.num_requests} requests"
        held["scratch"] = profile.scratch_bytes
    return Prediction(held=held, activations=activations, graphs=graphs, activation_basis=basis)


def _activation_width(spec: ModelSpec) -> int:
    """Values a token at the widest point of a layer, the residual stream included."""
    attention = max(2 * layer.q_size + 2 * layer.kv_size + layer.q_size for layer in spec.layers)
    return 2 * spec.hidden_size + max(3 * spec.intermediate_size, attention)
