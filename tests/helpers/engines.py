"""Tiny engines, assembled as the command line assembles them: compose, resolve, build.

engine = tiny_engine(techniques=["spec_decode"])              # a fresh one
engine = shared_engine("engine/kv_cache=paged", max_num_seqs=2)  # one a session, idle
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tests.helpers.collector import spare_the_collector
from tests.helpers.eagle_heads import eagle_head
from tests.helpers.heads import untrained_heads
from tests.helpers.mtp_modules import mtp_module
from tests.helpers.tiny_models import tiny_model
from workbench import configuration
from workbench.assemble import SLOTS, Limits, build_config, build_engine, load_class
from workbench.configuration import Marker, compose_config, engine_config, options_of
from workbench.core.errors import ConfigError, UnsupportedError
from workbench.engine.engine import Engine
from workbench.slots.drafter import Drafter

VOCAB_SIZE = 128
#: Ids below are ``<unk>``, ``<s>``, ``</s>`` and ``<pad>``.
FIRST_ORDINARY_ID = 4
TECHNIQUES = tuple(options_of("technique"))


def options() -> Iterator[tuple[str, str]]:
    """Every (slot, option) that ``conf/engine`` holds."""
    for slot in SLOTS:
        for name in options_of(f"engine/{slot}"):
            yield slot, name


def node_of(slot: str, option: str) -> dict[str, Any]:
    """Content of an option's file."""
    file = configuration.CONF_DIR / "engine" / slot / f"{option}.yaml"
    node = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def takes_weights(drafter: type[Drafter]) -> bool:
    """Whether it runs a model or heads of its own."""
    return drafter.load is not Drafter.load


def drafters_by_tokens() -> list[str]:
    """Options of ``drafter`` that read tokens alone; the others need an engine around them."""
    return [
        option
        for option in options_of("engine/drafter")
        if not takes_weights(load_class(node_of("drafter", option)["_target_"]))
    ]


def component(
    slot: str, option: str, *, settings: dict[str, Any] | None = None, **runtime: Any
) -> Any:
    """Build one component as the assembly does: class, checked config, runtime objects."""
    node = {**node_of(slot, option), **(settings or {})}
    cls = load_class(node.pop("_target_"))
    return cls(build_config(cls, slot, node), **runtime)


@functools.cache
def _markers_of(conf_dir: Path) -> dict[str, Marker]:
    return configuration.load_markers()


def markers_here() -> dict[str, Marker]:
    """Every technique's marker; the files are read once for each ``conf/`` that is in use."""
    return _markers_of(configuration.CONF_DIR)


def with_requirements(techniques: Sequence[str]) -> list[str]:
    """Techniques and all that they require, each once, what is required first.

    Of a requirement with alternatives, the first, unless another is there already.
    """
    return list(_with_requirements(configuration.CONF_DIR, tuple(techniques)))


@functools.cache
def _with_requirements(conf_dir: Path, techniques: tuple[str, ...]) -> tuple[str, ...]:
    markers = markers_here()
    closed: list[str] = []

    def visit(name: str) -> None:
        for required in markers[name].lacking([*closed, *techniques]):
            visit(required)
        if name not in closed:
            closed.append(name)

    for name in techniques:
        visit(name)
    return tuple(closed)


def declared_conflict(techniques: Sequence[str]) -> bool:
    """Whether two of the techniques, or of what they require, fill one slot or exclude each
    other."""
    markers = markers_here()

    def share_a_slot(a: str, b: str) -> bool:
        """One that builds on another may set options of what that one fills its slot with; one
        that yields leaves the slot to the other."""
        one, other = markers[a], markers[b]
        for slot in set(one.slots) & set(other.slots):
            yielding = (slot in one.yields) + (slot in other.yields)
            builds_on = a in other.requires or b in one.requires or yielding == 2
            if yielding != 1 and not (builds_on and one.slots[slot] == other.slots[slot]):
                return True
        return False

    closed = with_requirements(techniques)
    reconciled = {name for technique in closed for name in markers[technique].reconciles}
    return any(
        (b in markers[a].conflicts and reconciled.isdisjoint((a, b))) or share_a_slot(a, b)
        for a, b in itertools.permutations(closed, 2)
    )


def weakest_class(techniques: Sequence[str]) -> str:
    """What the techniques, and all that they require, promise together of their tokens."""
    classes = {markers_here()[name].losslessness for name in with_requirements(techniques)}
    return next((c for c in ("lossy", "distributional") if c in classes), "exact")


@functools.cache
def why_not_here(technique: str) -> str | None:
    """Why a technique cannot run on this machine's CPU, in the engine's words; None if it can."""
    try:
        tiny_engine(techniques=with_requirements([technique]))
    except (UnsupportedError, ConfigError) as error:
        return str(error)
    finally:
        spare_the_collector()
    return None


@functools.cache
def together(*first: str) -> tuple[str, ...]:
    """As many techniques as can run here at once, and what they require, required ones first.

    ``first`` are among them, and none promises less of its tokens than they do.
    """
    chosen: list[str] = [*first]
    for name in TECHNIQUES:
        clashes = name in chosen or declared_conflict([*chosen, name])
        weaker = weakest_class([*chosen, name]) != weakest_class(first)
        if why_not_here(name) is None and not clashes and not weaker:
            chosen.append(name)
    return tuple(with_requirements(chosen))


def needed_settings(techniques: Sequence[str], model: Path) -> list[str]:
    """Overrides without which a technique cannot be built: weights of its own."""
    needed = []
    if "draft_model" in techniques:  # of all models, the one whose drafts hold
        needed.append(f"engine.drafter.model={model}")
    if {"eagle", "eagle_tree"} & {*techniques}:
        needed.append(f"engine.drafter.head={eagle_head(model)}")
    if "mtp" in techniques:
        needed.append(f"engine.drafter.module={mtp_module(model)}")
    if {"medusa", "medusa_tree"} & {*techniques}:
        needed.append(f"engine.drafter.head={untrained_heads(model)}")
    return needed


def tiny_engine(
    *overrides: str,
    techniques: Sequence[str] = (),
    model: Path | None = None,
    max_num_seqs: int = 4,
    max_model_len: int = 128,
    kv_pool_tokens: int = 0,
) -> Engine:
    """Build an engine over a tiny model in fp32.

    Parameters
    ----------
    overrides
        As on the command line.
    techniques
        Names, with all that they require.
    model
        Folder; the tiny Llama by default.
    """
    chosen = [f"+technique=[{','.join(techniques)}]"] if techniques else []
    folder = model or tiny_model("llama")
    # Random weights need no folder of heads; another model that drafts they do.
    needed = needed_settings(techniques, folder)
    if "weights=random" in overrides:
        needed = [text for text in needed if "head=" not in text and "module=" not in text]
    composed = compose_config([f"model={folder}", "dtype=float32", *needed, *overrides, *chosen])
    limits = Limits(max_num_seqs, max_model_len, kv_pool_tokens)
    return build_engine(engine_config(composed, limits, download=False))


@functools.cache
def _shared(overrides: tuple[str, ...], settings: tuple[tuple[str, Any], ...]) -> Engine:
    engine = tiny_engine(*overrides, **dict(settings))
    spare_the_collector()
    return engine


def shared_engine(*overrides: str, **settings: Any) -> Engine:
    """An engine that tests share; it must be left idle."""
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    engine = _shared(overrides, tuple(sorted(frozen.items())))
    check_idle(engine)
    engine.reset_counters()
    return engine


def check_idle(engine: Engine) -> None:
    """Nothing runs, waits or is held."""
    scheduler = engine.parts.scheduler
    assert not engine.has_unfinished(), "a request was left behind"
    assert not scheduler.has_unfinished(), "the scheduler still knows a request"
    usage = scheduler.kv_usage()
    assert (usage.allocated_tokens, usage.used_tokens) == (0, 0), "KV was left behind"
    engine.check_integrity()


def run_to_end(engine: Engine, max_steps: int = 2000) -> dict[str, list[int]]:
    """Step until nothing is left, checking the books after every step; tokens by request id."""
    tokens: dict[str, list[int]] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished():
            return tokens
        for output in engine.step():
            tokens[output.request_id] = list(output.token_ids)
        engine.check_integrity()
    raise AssertionError(f"not finished after {max_steps} steps")


def mixed_prompts(count: int = 6, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Random prompts of mixed lengths; every other one repeats itself, so that drafts are found."""
    rng = random.Random(seed)
    prompts = []
    for index in range(count):
        length = rng.randint(1, longest)
        ids = [rng.randrange(FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(length)]
        if index % 2:
            period = ids[: rng.randint(2, 5)]
            ids = (period * longest)[: max(length, 3 * len(period))]
        prompts.append(ids)
    return prompts
