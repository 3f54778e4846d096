"""Which rows a run has: the rungs of other engines, the engine's base, the base with techniques."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from workbench.assemble import EngineConfig, Limits, build_engine, check_engine, load_class
from workbench.bench.run import Variant
from workbench.configuration import (
    Composed,
    Marker,
    check_requirements,
    compose_config,
    engine_config,
    load_markers,
    suggested_groups,
    technique_names,
)
from workbench.core.backend import Backend
from workbench.core.errors import ConfigError, unknown_name
from workbench.engine.backend import EngineBackend

ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class Plan:
    """A run's compositions.

    Attributes
    ----------
    treatment
        With every technique asked for; its workload, load and limits hold for all rows.
    base
        The same without them, but with what they require; None where nothing was asked for.
    supplied
        Required techniques that were added to both.
    """

    treatment: Composed
    base: Composed | None
    supplied: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)


def plan_run(overrides: Sequence[str]) -> Plan:
    """Compose the treatment and, where techniques are asked for, its base.

    A technique is compared on the core and what it requires, so that the technique is the only
    difference between the two rows.
    """
    asked = technique_names(overrides)
    markers = load_markers()
    rest = [text for text in overrides if not _is_technique(text)]
    supplied = tuple(_required_by(asked, markers))
    rest += suggested_groups(rest, [markers[name] for name in asked])
    treatment = compose_config([*rest, *_technique_override([*supplied, *asked])])
    check_requirements(treatment)
    measured = [name for name in treatment.techniques if name not in supplied]
    if not measured:
        return Plan(treatment, None)
    # Options of what a required technique put there already are both rows', a trained head's folder
    # for one.
    slots = {
        slot
        for name in measured
        for slot, option in treatment.techniques[name].slots.items()
        if not any(markers[other].slots.get(slot) == option for other in supplied)
    }
    kept = [text for text in rest if not _touches(text, slots) and not text.startswith("preset=")]
    platform = treatment.choices["engine/platform"]  # a preset's own, too: one machine for both
    if not any(text.lstrip("+").startswith("engine/platform=") for text in kept):
        kept.append(f"engine/platform={platform}")
    base = compose_config([*kept, *_technique_override(list(supplied))])
    return Plan(treatment, base, supplied)


def _is_technique(text: str) -> bool:
    return re.match(r"\+?\+?technique=", text) is not None


def _technique_override(names: list[str]) -> list[str]:
    return [f"+technique=[{','.join(names)}]"] if names else []


def _required_by(asked: Sequence[str], markers: dict[str, Marker]) -> list[str]:
    """Requirements of ``asked``, and theirs, that were not asked for; the deepest first."""
    supplied: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name not in markers:
            raise unknown_name("technique", name, markers)
        if name in path:
            raise ConfigError(
                f"technique {name!r} requires itself: {' -> '.join([*path, name])}. Correct "
                "`requires` in these files of conf/technique."
            )
        while lacking := markers[name].lacking([*asked, *supplied]):
            visit(lacking[0], (*path, name))
            supplied.append(lacking[0])

    for name in asked:
        visit(name, ())
    return supplied


def _touches(text: str, slots: set[str]) -> bool:
    """Whether an override configures one of the slots, as in ``engine/drafter=none``."""
    match = re.match(r"[+~]*engine[/.](\w+)", text)
    return match is not None and match[1] in slots


@dataclass(frozen=True, slots=True)
class ModelForBaselines:
    """What another engine loads: a folder with the very weights that ours runs."""

    folder: Path
    dtype: str
    device: str


def engine_rows(plan: Plan) -> list[tuple[str, Composed]]:
    """Name and composition of the engine's rows, base first."""
    base_name = " + ".join([ENGINE, *plan.supplied])
    if plan.base is None:
        return [(base_name, plan.treatment)]
    measured = [n for n in plan.treatment.techniques if n not in plan.supplied]
    preset = plan.treatment.cfg.preset_name
    name = " + ".join([base_name, *measured]) if preset == "core" else f"{ENGINE} ({preset})"
    return [(base_name, plan.base), (name, plan.treatment)]


def engine_variants(plan: Plan, limits: Limits, progress: Any = None) -> list[Variant]:
    """The engine's rows, base first."""
    variants = []
    rows = engine_rows(plan)
    for index, (name, composed) in enumerate(rows):
        config = row_config(plan, composed, limits, progress)
        check_engine(config)  # a wrong command is told before the baselines take their time
        classes = [m.losslessness for m in composed.techniques.values()]
        weakest = next((c for c in ("lossy", "distributional") if c in classes), "exact")
        variants.append(
            Variant(
                name=name,
                build=_engine_factory(
                    name, config, plan.treatment.cfg.bench.prefix_cache == "warm"
                ),
                baseline=rows[0][0] if index else None,
                losslessness=weakest,
                quality_bound=_quality_bound(composed.techniques.values()),
                techniques={
                    m.name: {
                        "slots": m.slots,
                        "evidence": list(m.evidence),
                        "losslessness": m.losslessness,
                        "paper": m.paper,
                    }
                    for m in composed.techniques.values()
                },
                kind="engine",
                resolved_config=_resolved(plan.treatment.cfg, composed, limits),
                has_prefix_cache=composed.choices.get("engine/prefix_cache", "none") != "none",
            )
        )
    return variants


def _quality_bound(markers: Iterable[Marker]) -> float | None:
    """What lossy techniques promise together; None where one of them promises nothing."""
    bounds = [m.quality_bound for m in markers if m.losslessness == "lossy"]
    known = [bound for bound in bounds if bound is not None]
    return sum(known) if known and len(known) == len(bounds) else None


def row_config(
    plan: Plan, composed: Composed, limits: Limits, progress: Any = None
) -> EngineConfig:
    """The treatment's model, precision, seed and limits with this row's components."""
    config = engine_config(plan.treatment, limits, progress=progress)
    return dataclasses.replace(config, components=composed.components)


def _engine_factory(name: str, config: EngineConfig, keeps_cache: bool) -> Callable[[], Backend]:
    def build() -> Backend:
        engine = build_engine(config)
        return EngineBackend(name, engine, engine.parts.info, keeps_cache=keeps_cache)

    return build


def _resolved(cfg: DictConfig, composed: Composed, limits: Limits) -> dict[str, Any]:
    """The whole configuration of a row, every ``auto`` of the limits resolved."""
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    for key in ("baseline", "engine", "techniques"):
        resolved.pop(key, None)
    resolved["engine"] = composed.components
    resolved["choices"] = {k: v for k, v in composed.choices.items() if k.startswith("engine/")}
    resolved["limits"] = dataclasses.asdict(limits)
    return {str(k): v for k, v in resolved.items()}


def baseline_variants(cfg: DictConfig, model: ModelForBaselines) -> list[Variant]:
    """The rows of other engines, in the order of ``baselines``; the first is what the rest is
    compared with."""
    names = [str(name) for name in cfg.baselines]
    variants = []
    for name in names:
        if name not in cfg.baseline:
            raise unknown_name("baseline", name, [str(k) for k in cfg.baseline])
        node = OmegaConf.to_container(cfg.baseline[name], resolve=True)
        assert isinstance(node, dict)
        options = {str(k): v for k, v in node.items() if not str(k).startswith("_")}
        variants.append(
            Variant(
                name=name,
                build=_baseline_factory(str(node["_target_"]), options, model, int(cfg.seed)),
                baseline=names[0] if name != names[0] else None,
                kind="baseline",
                resolved_config={"_target_": node["_target_"], **options, "dtype": model.dtype},
            )
        )
    return variants


def _baseline_factory(
    target: str, options: dict[str, Any], model: ModelForBaselines, seed: int
) -> Callable[[], Backend]:
    cls = load_class(target)

    def build() -> Backend:
        backend: Backend = cls(
            model_path=model.folder,
            dtype=model.dtype,
            device=model.device,
            weights="checkpoint",
            seed=seed,
            **options,
        )
        return backend

    return build


def with_first_baseline(variants: list[Variant]) -> list[Variant]:
    """Compare the engine's base with the first baseline, where there is one."""
    first = next((v.name for v in variants if v.kind == "baseline"), None)
    return [
        dataclasses.replace(v, baseline=first)
        if v.kind == "engine" and v.baseline is None and first is not None
        else v
        for v in variants
    ]


def check_load(cfg: DictConfig) -> None:
    """Refuse a load that no workload could be sent with, before a model is fetched."""
    settings = {str(k): v for k, v in cfg.load.items() if not str(k).startswith("_")}
    load_class(cfg.load["_target_"]).check_settings(**settings)
