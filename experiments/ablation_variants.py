"""Which rows an ablation has: a base with each technique added, a preset with each left out.

What a technique requires comes with it, and what requires it goes with it. Such a row differs from
its end of the table in more than the technique, so it names a second row, ``against``, from which
it differs in the technique alone; that one is added where it is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from workbench.configuration import Composed, Marker, compose_config, technique_names
from workbench.core.errors import ConfigError, unknown_name

#: Stands for all techniques of the preset, in a list of names.
PRESET = "preset"


@dataclass(frozen=True, slots=True)
class Variant:
    """One row.

    Attributes
    ----------
    kind
        ``base``, ``add_one``, ``full``, ``leave_one_out``, ``add_to_full``, or ``between`` for a
        row that is there only for others to be held against.
    technique
        The one that the row is about; empty for ends and rows between.
    along
        What was added, or left out, because ``technique`` requires it, or is required by it.
    end
        The base's or the preset's row, whichever it starts from; empty for those two themselves.
    against
        The row that differs in ``technique`` alone; empty for ends and rows between.
    """

    name: str
    kind: str
    techniques: tuple[str, ...]
    technique: str = ""
    along: tuple[str, ...] = ()
    end: str = ""
    against: str = ""

    @property
    def override(self) -> list[str]:
        """What the row adds to the overrides of all rows."""
        return [f"+technique=[{','.join(self.techniques)}]"] if self.techniques else []


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows, and the overrides that all of them have: the preset's other choices, the user's."""

    variants: tuple[Variant, ...]
    overrides: tuple[str, ...]


def plan_ablation(
    preset: str,
    base: Sequence[str],
    techniques: Sequence[str],
    overrides: Sequence[str],
    markers: Mapping[str, Marker],
) -> Plan:
    """Compose the preset and list the rows.

    Parameters
    ----------
    base
        Techniques of the base; they need not be the preset's.
    techniques
        Those that get rows; ``preset`` stands for all of the preset's. One that the preset lacks
        is added to the base and to the preset.
    overrides
        For every row, without techniques and presets.

    Raises
    ------
    ConfigError
        A name is wrong, the base lacks what it requires, an override asks for techniques, or the
        preset consists of more than techniques and choices of slots.
    """
    for name in (*base, *(n for n in techniques if n != PRESET)):
        if name not in markers:
            raise unknown_name("technique", name, [*markers, PRESET])
    if technique_names(overrides) or any(text.startswith("preset=") for text in overrides):
        raise ConfigError(
            f"the rows' techniques come from preset=, base= and techniques=, not from "
            f"{' '.join(overrides)}."
        )
    if lacking := closed(base, markers, ())[len(base) :]:
        raise ConfigError(f"base={','.join(base)} requires {', '.join(lacking)}: add them.")
    whole = compose_config([f"preset={preset}", *overrides])
    full = tuple(whole.techniques)
    fixed = (*_other_choices(whole, overrides), *overrides)
    chosen = dict.fromkeys(
        name for text in techniques for name in (full if text == PRESET else (text,))
    )
    variants = _rows(preset, tuple(base), full, tuple(chosen), markers)
    again = compose_config([*fixed, *next(v for v in variants if v.kind == "full").override])
    if again.components != whole.components:
        raise ConfigError(
            f"preset={preset} sets options of components, which rows with fewer techniques would "
            "not have. Give them as overrides instead."
        )
    return Plan(tuple(variants), fixed)


def _other_choices(whole: Composed, overrides: Sequence[str]) -> list[str]:
    """What the preset chooses for slots that none of its techniques fills."""
    core = compose_config(overrides)
    filled = {f"engine/{slot}" for marker in whole.techniques.values() for slot in marker.slots}
    return [
        f"{group}={option}"
        for group, option in whole.choices.items()
        if group.startswith("engine/") and group not in filled and core.choices[group] != option
    ]


def closed(
    names: Sequence[str], markers: Mapping[str, Marker], preferred: Sequence[str]
) -> tuple[str, ...]:
    """``names``, then all that they require; of alternatives, the preferred one, else the first."""
    found = list(names)
    for name in found:  # grows while it is gone through
        for entry in markers[name].requires:
            options = entry.split("|")
            if not set(options) & set(found):
                found.append(next((o for o in options if o in preferred), options[0]))
    return tuple(found)


def _rows(
    preset: str,
    base: tuple[str, ...],
    full: tuple[str, ...],
    chosen: Sequence[str],
    markers: Mapping[str, Marker],
) -> list[Variant]:
    start, end = Variant("base", "base", base), Variant(preset, "full", full)
    added = [_added(start, "add_one", name, markers, full) for name in chosen if name not in base]
    left = [_left_out(end, name, markers) for name in chosen if name in full]
    more = [_added(end, "add_to_full", name, markers, full) for name in chosen if name not in full]
    rows = [start, *added, end, *left, *more]
    result: list[Variant] = []
    for row in rows:
        if not row.technique:
            result.append(row)
            continue
        wanted = frozenset(row.techniques) ^ {row.technique}
        partner = next((r for r in (*rows, *result) if frozenset(r.techniques) == wanted), None)
        if partner is None:
            partner = _between(row, wanted)
            result.append(partner)
        result.append(replace(row, against=partner.name))
    return result


def _added(
    start: Variant, kind: str, name: str, markers: Mapping[str, Marker], preferred: Sequence[str]
) -> Variant:
    techniques = closed((*start.techniques, name), markers, preferred)
    along = techniques[len(start.techniques) + 1 :]
    label = " + ".join([start.name, *along, name])
    return Variant(label, kind, techniques, name, along, start.name)


def _left_out(end: Variant, name: str, markers: Mapping[str, Marker]) -> Variant:
    """The preset without a technique and without what then lacks a requirement."""
    kept = [n for n in end.techniques if n != name]
    along: list[str] = []
    while unmet := [n for n in kept if markers[n].lacking(kept)]:
        along += unmet
        kept = [n for n in kept if n not in unmet]
    label = " - ".join([end.name, *along, name])
    return Variant(label, "leave_one_out", tuple(kept), name, tuple(along), end.name)


def _between(row: Variant, wanted: frozenset[str]) -> Variant:
    """The row that ``row`` differs from in its technique alone."""
    sign = " - " if row.kind == "leave_one_out" else " + "
    ordered = [*row.techniques, row.technique]
    return Variant(
        sign.join([row.end, *row.along]),
        "between",
        tuple(name for name in dict.fromkeys(ordered) if name in wanted),
    )
