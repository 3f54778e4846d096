"""Assembles what speculates: drafter, verifier, draft length, and a drafter's own model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.components import Builder
from workbench.core.errors import ConfigError, UnsupportedError
from workbench.engine.pool_layers import PoolLayers
from workbench.engine.prepared_step import StepParts
from workbench.models.decoder import Decoder
from workbench.models.loader import load_model
from workbench.models.spec import ModelSpec
from workbench.slots.attention import AttentionBackend, AttentionLayer
from workbench.slots.drafter import Drafter, DrafterBinding, DrafterHost
from workbench.slots.graph_runner import GraphRunner
from workbench.slots.kv_pool import KVPool
from workbench.slots.verifier import Verifier


@dataclass(frozen=True, slots=True)
class Speculation:
    """The components of speculation."""

    drafter: Drafter
    verifier: Verifier


def build_speculation(builder: Builder) -> Speculation:
    """Drafter, verifier and draft length, which fit each other and the loop.

    Raises
    ------
    ConfigError
        They do not.
    """
    drafter, verifier = builder.build("drafter"), builder.build("verifier")
    loop, is_switched = builder.cls("loop"), builder.cls("draft_length").observes
    if drafter.num_lookahead_tokens and loop.plans_ahead and not is_switched:
        raise ConfigError(
            f"drafter {type(drafter).__name__} has to see a step's tokens before the next one is "
            f"planned, and loop {loop.__name__} plans it before. Choose engine/loop=sync, or "
            "engine/draft_length=adaptive, under which steps are planned ahead while drafts do not "
            "pay, or engine/drafter=none."
        )
    if drafter.num_lookahead_tokens and not verifier.accepts_drafts:
        raise ConfigError(
            f"drafter {type(drafter).__name__} proposes drafts, but verifier "
            f"{type(verifier).__name__} takes none. Choose a verifier with engine/verifier=..."
        )
    if drafter.num_lookahead_tokens:
        verifier.pair_with(drafter)
    if drafter.reads_drawn and not verifier.tells_drawn:
        raise ConfigError(
            f"drafter {type(drafter).__name__} learns from what the target draws behind every "
            f"draft, which verifier {type(verifier).__name__} does not tell. Choose "
            "engine/verifier=exact_match."
        )
    if drafter.proposes_trees:
        _check_trees(builder, drafter, verifier)
    builder.build("draft_length", num_lookahead_tokens=drafter.num_lookahead_tokens)
    return Speculation(drafter, verifier)


def _check_trees(builder: Builder, drafter: Drafter, verifier: Verifier) -> None:
    """All that meets drafts must know what to do with trees."""
    for slot, knows, instead in (
        ("verifier", verifier.verifies_trees, "exact_match or rejection"),
        ("attention", builder.cls("attention").supports_trees, "triton, auto, cascade or sdpa"),
        ("draft_length", not builder.cls("draft_length").observes, "full"),
    ):
        if not knows:
            raise ConfigError(
                f"drafter {type(drafter).__name__} proposes token trees, and {slot} "
                f"{builder.cls(slot).__name__} takes chains alone. Choose engine/{slot}={instead}, "
                "or let the drafter propose chains."
            )


@dataclass(frozen=True, slots=True)
class DrafterSource:
    """Where a drafter's weights come from, as of :class:`DrafterHost`."""

    target_folder: Path | None
    weights: str
    seed: int
    models_dir: str | None
    max_model_len: int


def load_drafter(
    builder: Builder, target: Decoder, source: DrafterSource, *, expected_tokens: int
) -> None:
    """Load what the drafter has of weights; a model of its own as the target was loaded.

    Raises
    ------
    WorkbenchError
        They are missing or do not fit the target.
    """

    def load_decoder(config: Any) -> Decoder:
        return load_model(
            config,
            linear=builder.make("linear"),
            ops=builder.make("ops"),
            dtype=target.dtype,
            device=target.device,
            weights=source.weights,
            seed=source.seed,
            expected_tokens=expected_tokens,
        )

    with torch.no_grad():
        _drafter(builder).load(
            DrafterHost(
                target=target,
                target_folder=source.target_folder,
                device=target.device,
                dtype=target.dtype,
                weights=source.weights,
                seed=source.seed,
                max_model_len=source.max_model_len,
                models_dir=source.models_dir,
                load_decoder=load_decoder,
            )
        )


def bind_drafter(
    builder: Builder,
    parts: StepParts,
    spec: ModelSpec,
    step_tokens: int,
) -> None:
    """Tell the drafter what it runs on.

    Parameters
    ----------
    parts
        Of the target's steps; its pool holds the target's layers, then the drafter's.
    spec
        Of the target.
    """
    drafter, verifier = _drafter(builder), builder.built["verifier"]
    graph_runner = builder.built["graph_runner"]
    assert isinstance(verifier, Verifier) and isinstance(graph_runner, GraphRunner)
    pool, first = parts.pool, spec.num_layers
    drafter.bind(
        DrafterBinding(
            table=parts.table,
            pool=PoolLayers(pool, first, pool.shape.num_layers - first),
            target_pool=pool,
            make_attention=_attention_maker(builder),
            step_tokens=step_tokens,
            reads_probs=verifier.reads_probs,
            vocab_size=spec.vocab_size,
            graph_runner=graph_runner,
            step_parts=parts,
        )
    )


def _drafter(builder: Builder) -> Drafter:
    drafter = builder.built["drafter"]
    assert isinstance(drafter, Drafter)
    return drafter


def _attention_maker(
    builder: Builder,
) -> Callable[[list[AttentionLayer], KVPool], AttentionBackend]:
    def make(layers: list[AttentionLayer], pool: KVPool) -> AttentionBackend:
        attention: AttentionBackend = builder.make("attention")
        reasons = attention.unsupported_reasons(layers, pool)
        if reasons:
            raise UnsupportedError(
                f"attention {type(attention).__name__} cannot serve the drafter's model: "
                + "; ".join(reasons)
                + "."
            )
        return attention

    return make
