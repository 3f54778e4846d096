"""The rooms of the house: imports run downwards, techniques are named only in ``conf/``, every slot
has a null object and options whose files say what their classes say."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.engines import TECHNIQUES, node_of, options
from workbench.assemble import SLOTS, load_class
from workbench.configuration import CONF_DIR, compose_config, load_markers, options_of
from workbench.slots.component import Component

REPO = CONF_DIR.parent
SLOT_FILES = sorted(p.stem for p in (REPO / "workbench" / "slots").glob("[a-z]*.py"))
#: Files of ``workbench/slots`` that are no slot.
SHARED_FILES = {"component", "kv_space", "step_plan"}

ENGINE_ROOMS = {"kernels", "workbench.core", "workbench.slots", "workbench.models"}
ALL_BUT_BENCH = {
    *ENGINE_ROOMS,
    "workbench.engine",
    "workbench.platforms",
    "workbench.server",
    "workbench.simulate",
    "workbench.baselines",
    "techniques",
    "workbench",
}
#: What each room may import beside itself. Longest name wins: ``workbench.slots.x`` is in
#: ``workbench.slots``.
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "workbench": {"workbench.core", "workbench.api"},
    "workbench.core": {"workbench"},
    "workbench.slots": {"kernels", "workbench", "workbench.core"},
    "workbench.models": {"kernels", "workbench", "workbench.core", "workbench.slots"},
    "workbench.engine": {"kernels", "workbench", "workbench.core", "workbench.slots"},
    "workbench.platforms": {"kernels", "workbench", "workbench.core", "workbench.slots"},
    "techniques": {*ENGINE_ROOMS, "workbench", "workbench.engine"},
    "workbench.baselines": {"workbench", "workbench.core"},
    "workbench.bench": {"workbench", "workbench.core"},
    "workbench.server": {*ENGINE_ROOMS, "workbench", "workbench.engine"},
    "workbench.simulate": {*ENGINE_ROOMS, "workbench", "workbench.engine"},
    "workbench.quality": {"workbench", "workbench.core", "workbench.slots", "workbench.engine"},
    "workbench.components": {"workbench", "workbench.core", "workbench.slots"},
    "workbench.sizing": {*ENGINE_ROOMS, "workbench", "workbench.engine"},
    "workbench.speculation": {*ENGINE_ROOMS, "workbench.engine", "workbench.components"},
    "workbench.assemble": {
        *ALL_BUT_BENCH,
        "workbench.components",
        "workbench.sizing",
        "workbench.speculation",
    },
    "workbench.configuration": {*ALL_BUT_BENCH, "workbench.assemble", "workbench.sizing"},
    "workbench.api": {*ALL_BUT_BENCH, "workbench.assemble", "workbench.configuration"},
}
#: On top of everything.
TOP_ROOMS = {"workbench.cli", "workbench.__main__", "experiments"}


def source_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (REPO / folder).rglob("*.py"))


ALL_SOURCES = source_files("kernels", "workbench", "techniques", "experiments")


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    rooms = [*MAY_IMPORT, *TOP_ROOMS]
    matching = [r for r in rooms if module == r or module.startswith(r + ".")]
    assert matching, f"{module} is in no room: add it to MAY_IMPORT"
    room = max(matching, key=len)
    # A new room must be given its place; it does not inherit that of the package's own file.
    assert room != "workbench" or module == "workbench", f"{module} is in no room"
    return room


def is_ours(module: str) -> bool:
    return module.split(".")[0] in {"kernels", "workbench", "techniques", "experiments", "tests"}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import, those inside functions and type-checking blocks too."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                file = REPO.joinpath(*full.split("."))
                is_module = file.with_suffix(".py").is_file() or file.is_dir()
                yield node.lineno, full if is_module else node.module


@pytest.mark.parametrize("path", ALL_SOURCES, ids=lambda p: str(p.relative_to(REPO)))
def test_imports_run_downwards(path: Path) -> None:
    room = room_of(module_name(path))
    for line, imported in imports_of(path):
        if not is_ours(imported) or room in TOP_ROOMS:
            assert not imported.startswith("tests"), f"{path}:{line} imports tests"
            continue
        target = room_of(imported)
        allowed = {room, *MAY_IMPORT[room]}
        assert target in allowed, f"{path}:{line}: {room} must not import {imported}"


def test_the_import_test_can_fail() -> None:
    assert room_of("workbench.slots.kv_cache") == "workbench.slots"
    assert "workbench.engine" not in MAY_IMPORT["workbench.slots"]
    assert "workbench.bench" not in MAY_IMPORT["workbench.assemble"]
    with pytest.raises(AssertionError, match="no room"):
        room_of("workbench.a_room_of_its_own")
    modules = {m for path in ALL_SOURCES for _, m in imports_of(path)}
    assert {"workbench.slots.sampler", "kernels", "torch"} <= modules


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_no_technique_is_named_in_workbench(technique: str) -> None:
    pattern = re.compile(rf"(?<![a-z]){re.escape(technique)}(?![a-z])", re.IGNORECASE)
    package = re.compile(r"^\s*(from|import)\s+techniques\b", re.MULTILINE)
    for path in source_files("workbench"):
        text = path.read_text()
        assert not pattern.search(text), f"{path} names technique {technique}"
        assert not package.search(text), f"{path} imports techniques"


def test_every_slot_has_a_folder_of_options_and_the_other_way_round() -> None:
    assert set(SLOT_FILES) - SHARED_FILES == set(SLOTS)
    folders = {p.name for p in (CONF_DIR / "engine").iterdir() if p.is_dir()}
    assert folders == set(SLOTS)
    for slot in SLOTS:
        assert options_of(f"engine/{slot}"), f"conf/engine/{slot} is empty"


@pytest.mark.parametrize("slot", SLOTS)
def test_null_object_stands_in_the_slot_s_file_and_is_the_default(slot: str) -> None:
    module = importlib.import_module(f"workbench.slots.{slot}")
    concrete = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__
        and issubclass(cls, Component)
        and not inspect.isabstract(cls)
    ]
    assert concrete, f"workbench/slots/{slot}.py has no null object"
    assert all("null object" in (cls.__doc__ or "") for cls in concrete)
    default = compose_config([]).components[slot]["_target_"]
    assert load_class(default) in concrete, f"the default of {slot} is no null object"


@pytest.mark.parametrize("slot", SLOTS)
def test_interface_is_small_and_documented(slot: str) -> None:
    module = importlib.import_module(f"workbench.slots.{slot}")
    interfaces = [
        cls
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__
        and issubclass(cls, Component)
        and inspect.isabstract(cls)
    ]
    assert len(interfaces) == 1, f"{slot} has {len(interfaces)} interfaces"
    abstract = interfaces[0].__abstractmethods__
    assert 1 <= len(abstract) <= 8
    for name in abstract:
        assert inspect.getdoc(getattr(interfaces[0], name)), f"{slot}.{name} states no contract"


@pytest.mark.parametrize(("slot", "option"), options())
def test_option_s_file_says_what_its_class_says(slot: str, option: str) -> None:
    node = node_of(slot, option)
    cls = load_class(str(node.pop("_target_")))
    interface = importlib.import_module(f"workbench.slots.{slot}")
    assert issubclass(cls, Component)
    assert any(base.__module__ == interface.__name__ for base in cls.__mro__)
    assert not inspect.isabstract(cls)
    fields = dataclasses.fields(cls.Config)
    defaults = dataclasses.asdict(cls.Config())
    assert node == {f.name: defaults[f.name] for f in fields}
    assert cls.Config.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_technique_s_marker_matches_what_it_selects(technique: str) -> None:
    marker = load_markers()[technique]
    required = marker.lacking([])
    composed = compose_config([f"+technique=[{','.join([*required, technique])}]"])
    plain = compose_config([f"+technique=[{','.join(required)}]"] if required else [])
    changed = {
        key.removeprefix("engine/"): option
        for key, option in composed.choices.items()
        if key.startswith("engine/") and plain.choices[key] != option
    }
    # What it builds on may have filled a slot, of which it sets options.
    shared = {k: o for k, o in marker.slots.items() if plain.choices[f"engine/{k}"] == o}
    assert changed == {k: o for k, o in marker.slots.items() if k not in shared}
    assert all(composed.components[slot] != plain.components[slot] for slot in shared)
    assert marker.slots, "a technique fills at least one slot"
    named = {name for entry in marker.requires for name in entry.split("|")} | {*marker.conflicts}
    assert named <= set(TECHNIQUES)
    assert technique not in named
    assert marker.evidence, "a technique proves that it ran"
    assert marker.paper
    assert all(key.partition(".")[0] in SLOTS for key in marker.evidence)
    assert (REPO / "techniques" / technique / "__init__.py").is_file()
