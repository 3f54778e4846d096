"""From overrides to a resolved configuration: Hydra composition, technique markers, checks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from workbench.assemble import EngineConfig, Limits, load_class
from workbench.core.errors import ConfigError, unknown_name
from workbench.models.source import open_source
from workbench.sizing import FILL

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
_MARKER_KEYS = {
    "summary",
    "slots",
    "requires",
    "conflicts",
    "losslessness",
    "evidence",
    "paper",
    "measure",
}
_OPTIONAL_KEYS = {"yields", "quality_bound", "reconciles"}
_LOSSLESSNESS = ("exact", "distributional", "lossy")


@dataclass(frozen=True, slots=True)
class Marker:
    """What a technique says of itself, in its file under ``conf/technique``.

    Attributes
    ----------
    slots
        Option that it puts into each slot.
    yields
        Those of the slots that it leaves to another technique which fills them too.
    requires
        Other techniques that must be there; ``a|b`` asks for either, of which ``a`` is taken where
        neither was asked for.
    conflicts
        Other techniques that must not be there.
    reconciles
        Techniques that may be there in spite of a conflict with others, where this one is too.
    losslessness
        ``exact``, ``distributional`` or ``lossy``: the gate that its outputs must pass.
    evidence
        Counters that must be above zero after a run, or it did not happen.
    measure
        Groups (``workload``, ``load``) that show what the technique is for; they hold where
        neither the command line nor an experiment chooses.
    quality_bound
        Of a lossy technique: how much less likely, in nats a token on average, its greedy outputs
        may be than the reference's choices; None where nothing is promised.
    """

    name: str
    summary: str
    slots: dict[str, str]
    requires: tuple[str, ...]
    conflicts: tuple[str, ...]
    losslessness: str
    evidence: tuple[str, ...]
    paper: str
    measure: dict[str, str]
    yields: tuple[str, ...] = ()
    quality_bound: float | None = None
    reconciles: tuple[str, ...] = ()

    def lacking(self, names: Sequence[str]) -> list[str]:
        """Techniques to add to ``names`` so that all that is required is there."""
        entries = (entry.split("|") for entry in self.requires)
        return [options[0] for options in entries if not set(options) & set(names)]

    @classmethod
    def parse(cls, name: str, node: dict[str, Any]) -> Marker:
        """Check a marker's keys and make one."""
        for key in node:
            if key not in _MARKER_KEYS | _OPTIONAL_KEYS:
                raise unknown_name(
                    f"key of technique {name}", key, sorted(_MARKER_KEYS | _OPTIONAL_KEYS)
                )
        missing = _MARKER_KEYS - node.keys()
        if missing:
            raise ConfigError(f"technique {name} lacks {', '.join(sorted(missing))}.")
        if node["losslessness"] not in _LOSSLESSNESS:
            raise unknown_name(
                f"losslessness of technique {name}", node["losslessness"], _LOSSLESSNESS
            )
        bound = node.get("quality_bound")
        if bound is not None and (node["losslessness"] != "lossy" or not bound > 0):
            raise ConfigError(
                f"technique {name} has quality_bound={bound}: it is a number of nats over 0, of a "
                "technique with losslessness: lossy."
            )
        for slot in node.get("yields", []):
            if slot not in node["slots"]:
                raise unknown_name(f"slot that technique {name} yields", slot, node["slots"])
        return cls(
            name=name,
            summary=node["summary"],
            slots=dict(node["slots"]),
            requires=tuple(node["requires"]),
            conflicts=tuple(node["conflicts"]),
            losslessness=node["losslessness"],
            evidence=tuple(node["evidence"]),
            paper=node["paper"],
            measure=dict(node["measure"]),
            yields=tuple(node.get("yields", [])),
            quality_bound=None if bound is None else float(bound),
            reconciles=tuple(node.get("reconciles", [])),
        )


@dataclass(frozen=True, slots=True)
class Composed:
    """A composition: the configuration, which option fills each slot, and the techniques."""

    cfg: DictConfig
    choices: dict[str, str]
    techniques: dict[str, Marker]

    @property
    def components(self) -> dict[str, dict[str, Any]]:
        """Each slot's ``_target_`` and options."""
        engine = OmegaConf.to_container(self.cfg.engine, resolve=True)
        assert isinstance(engine, dict)
        return {str(slot): dict(node) for slot, node in engine.items()}


def options_of(group: str) -> list[str]:
    """Names of the options of a configuration group."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def load_markers() -> dict[str, Marker]:
    """Every technique's marker, by name."""
    return {name: _load_marker(name) for name in options_of("technique")}


def _load_marker(name: str) -> Marker:
    node = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "technique" / f"{name}.yaml"))
    assert isinstance(node, dict)
    found = node.get("techniques", {})
    if list(found) != [name]:
        raise ConfigError(f"conf/technique/{name}.yaml must mark exactly itself.")
    return Marker.parse(name, found[name])


def parse_markers(nodes: Any) -> dict[str, Marker]:
    """Markers of a configuration's ``techniques`` node."""
    return {str(name): Marker.parse(str(name), node) for name, node in dict(nodes).items()}


def compose_config(overrides: Sequence[str]) -> Composed:
    """Compose the configuration from ``conf/`` and Hydra overrides, and check it.

    Raises
    ------
    ConfigError
        An unknown group, option or key, with the valid ones; techniques that cannot run together.
    """
    overrides = [as_model_name(_as_override(text)) for text in overrides]
    _check_technique_names(overrides)
    asked = {text.lstrip("+").partition("=")[0] for text in overrides}

    def leave(techniques: Iterable[Marker], choices: Mapping[str, str]) -> list[str]:
        """The last technique of a list has its way; but one that yields has not."""
        owned = {f"engine/{slot}": option for slot, option in _owned_slots(techniques).items()}
        return [f"{k}={v}" for k, v in owned.items() if k not in asked and choices.get(k) != v]

    names = technique_names(overrides)
    if len(names) > 1:  # before keys of the one that has its way are looked for in another
        overrides += leave([_load_marker(name) for name in names], {})
    composed = _compose(overrides)
    others = leave(composed.techniques.values(), composed.choices)
    if others:
        composed = _compose([*overrides, *others])
    _check_clashes(composed)
    return composed


def _owned_slots(markers: Iterable[Marker]) -> dict[str, str]:
    """What techniques put into slots that others yield."""
    markers = list(markers)
    yielded = {slot for marker in markers for slot in marker.yields}
    return {
        slot: option
        for marker in markers
        for slot, option in marker.slots.items()
        if slot in yielded and slot not in marker.yields
    }


def _compose(overrides: Sequence[str]) -> Composed:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3", job_name="workbench"):
            cfg = compose("config", list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise _translate(error, overrides) from error
    choices = {str(k): str(v) for k, v in cfg.hydra.runtime.choices.items()}
    techniques = parse_markers(OmegaConf.to_container(cfg.techniques, resolve=True))
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    OmegaConf.set_struct(cfg, True)
    return Composed(cfg, choices, techniques)


def suggested_groups(overrides: Sequence[str], techniques: Sequence[Marker]) -> list[str]:
    """Overrides that the first technique, or else the preset, suggests and nobody else chooses."""
    chosen = dict(text.lstrip("+").partition("=")[::2] for text in overrides)
    if "experiment" in chosen:
        return []
    suggested: Any = {}
    if techniques:
        suggested = techniques[0].measure
    elif chosen.get("preset") in options_of("preset"):
        suggested = OmegaConf.load(CONF_DIR / "preset" / f"{chosen['preset']}.yaml")
        suggested = suggested.get("preset_measure", {})
    # An option of a group is suggested for the option of the group that is suggested with it.
    return [
        f"{k}={v}"
        for k, v in suggested.items()
        if k not in chosen and k.partition(".")[0] not in chosen
    ]


def check_requirements(composed: Composed) -> None:
    """Check that every technique has what it requires.

    Raises
    ------
    ConfigError
        Which requirement is missing, and the command that has it.
    """
    for marker in composed.techniques.values():
        missing = marker.lacking(list(composed.techniques))
        if missing:
            together = ",".join([*missing, *composed.techniques])
            raise ConfigError(
                f"technique {marker.name!r} requires {', '.join(missing)}. "
                f"Use +technique=[{together}]."
            )
    _check_verifier(composed)


def _check_verifier(composed: Composed) -> None:
    """Drafts need a verifier that takes them."""
    drafter, verifier = (
        load_class(composed.components[slot]["_target_"]) for slot in ("drafter", "verifier")
    )
    if drafter.proposes and not verifier.accepts_drafts:
        nodes = {
            o: OmegaConf.load(CONF_DIR / f"engine/verifier/{o}.yaml")
            for o in options_of("engine/verifier")
        }
        valid = [o for o, node in nodes.items() if load_class(node["_target_"]).accepts_drafts]
        raise ConfigError(
            f"engine/drafter={composed.choices['engine/drafter']} proposes drafts, but "
            f"engine/verifier={composed.choices['engine/verifier']} takes none. Choose "
            f"engine/verifier= one of {', '.join(valid)}, or engine/drafter=none."
        )


def technique_names(overrides: Sequence[str]) -> list[str]:
    """Names that ``+technique=`` overrides ask for, in order."""
    names: list[str] = []
    for text in overrides:
        match = re.fullmatch(r"\+?\+?technique=(.*)", text)
        if match:
            inner = match[1].strip().removeprefix("[").removesuffix("]")
            names += [part.strip().strip("'\"") for part in inner.split(",") if part.strip()]
    return names


def _check_technique_names(overrides: Sequence[str]) -> None:
    valid = options_of("technique")
    names = technique_names(overrides)
    for name in names:
        if name not in valid:
            raise unknown_name("technique", name, valid)
    if sum(bool(re.match(r"\+?\+?technique=", text)) for text in overrides) > 1:
        raise ConfigError(
            f"several techniques are one list: +technique=[{','.join(names)}], not several "
            "+technique= arguments."
        )


def _as_override(text: str) -> str:
    """Let ``+`` add groups only: a key that is added to a node would be read by nobody."""
    key = text.lstrip("+").partition("=")[0]
    is_group = (CONF_DIR / key.partition("@")[0]).is_dir()
    return text if is_group or not key else text.lstrip("+")


def as_model_name(text: str) -> str:
    """Take ``model=<name or path>`` that is no option of the group as the model's name."""
    key, _, value = text.partition("=")
    if key == "model" and "," not in value and value not in options_of("model"):
        return f"model.name='{value}'"
    return text


def _check_clashes(composed: Composed) -> None:
    filled: dict[str, Marker] = {}
    owned = _owned_slots(composed.techniques.values())
    for marker in composed.techniques.values():
        for slot, option in marker.slots.items():
            if slot in marker.yields and slot in owned:
                continue
            other = filled.setdefault(slot, marker)
            # One may set options of what the one that it requires fills the slot with.
            builds_on = other.name in marker.requires or marker.name in other.requires
            builds_on |= slot in marker.yields and slot in other.yields
            if other is not marker and not (builds_on and other.slots[slot] == option):
                raise ConfigError(
                    f"techniques {other.name!r} and {marker.name!r} both fill slot {slot!r}: "
                    "take one of them out of +technique=[...]."
                )
    reconciled = {name for marker in composed.techniques.values() for name in marker.reconciles}
    for marker in composed.techniques.values():
        for slot, option in marker.slots.items():
            chosen = composed.choices.get(f"engine/{slot}")
            if slot in marker.yields:
                option = owned.get(slot, option)
            if chosen != option:
                raise ConfigError(
                    f"technique {marker.name!r} fills slot {slot!r} with {option!r}, but "
                    f"engine/{slot}={chosen} was asked for: drop one of the two."
                )
        for name in marker.conflicts:
            if name in composed.techniques and reconciled.isdisjoint((name, marker.name)):
                raise ConfigError(
                    f"techniques {marker.name!r} and {name!r} cannot run together: take one of "
                    f"them out of +technique=[...]{_reconcilers(name, marker.name)}."
                )


def _reconcilers(*names: str) -> str:
    """Who would let these techniques run together, for a message."""
    known = [m.name for m in load_markers().values() if set(names) & set(m.reconciles)]
    return f", or add {' or '.join(known)}" if known else ""


def _translate(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """Say Hydra's errors in the words of this command."""
    text = str(error)
    if "Error parsing override" in text:
        culprit = re.search(r"override '([^']*)'", text)
        return ConfigError(
            f"{culprit[1] if culprit else overrides!r} is not of the form key=value, +key=value or "
            "~key."
        )
    missing = re.search(r"[Cc]ould not (?:find|load) '([\w./@-]+)'", text)
    if missing:
        group, _, option = missing[1].rpartition("/")
        if group:
            valid = options_of(group)
            return unknown_name(f"option of group {group}", option, valid)
    key = re.search(r"Could not override '([\w./@-]+)'", text) or re.search(
        r"Key '([\w.]+)' is not in struct", text
    )
    if key:
        name = key[1]
        parent, _, last = name.replace("/", ".").rpartition(".")
        return unknown_name(
            "key" + (f" of {parent}" if parent else ""), last, _keys_of(parent, overrides)
        )
    return ConfigError(f"{' '.join(text.split())} (in: {' '.join(overrides)})")


def _keys_of(parent: str, overrides: Sequence[str]) -> list[str]:
    """Valid keys below a node, with the groups that were chosen, and the groups at the top."""
    names = [text.lstrip("+").partition("=")[0].partition("@")[0] for text in overrides]
    groups = [t for t, name in zip(overrides, names, strict=True) if (CONF_DIR / name).is_dir()]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        try:
            cfg = compose("config", groups)
        except (HydraException, OmegaConfBaseException):
            cfg = compose("config")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    keys = [str(k) for k in node] if isinstance(node, DictConfig) else []
    return keys if parent else [*keys, "preset", "experiment", "technique"]


def engine_config(
    composed: Composed, limits: Limits, *, download: bool = True, progress: Any = None
) -> EngineConfig:
    """Resolve a composition into what an engine is built from, getting the model if need be."""
    cfg = composed.cfg
    check_requirements(composed)
    hf_config = cfg.model.hf_config
    if hf_config is not None:
        hf_config = OmegaConf.to_container(hf_config, resolve=True)
    source = open_source(
        cfg.model.name,
        weights=cfg.weights,
        hf_config=hf_config,
        models_dir=cfg.models_dir,
        download=download,
        progress=progress,
    )
    return EngineConfig(
        components=composed.components,
        source=source,
        weights=cfg.weights,
        dtype=cfg.dtype,
        seed=cfg.seed,
        models_dir=cfg.models_dir,
        limits=limits,
    )


def limits_of(cfg: DictConfig, *, max_num_seqs: int, max_model_len: int) -> Limits:
    """The limits of a configuration, with the given values for ``auto``."""

    def value(name: str, auto: int) -> int:
        given = cfg.limits[name]
        if given == "auto":
            return auto
        if not isinstance(given, int) or isinstance(given, bool):
            more = f", {FILL}" if name == "kv_pool_tokens" else ""
            raise ConfigError(f"limits.{name}={given!r} must be auto{more} or an integer.")
        return given

    pool = cfg.limits.kv_pool_tokens

    return Limits(
        max_num_seqs=value("max_num_seqs", max_num_seqs),
        max_model_len=value("max_model_len", max_model_len),
        kv_pool_tokens=FILL if pool == FILL else value("kv_pool_tokens", 0),
        memory_fraction=cfg.limits.memory_fraction,
    )
