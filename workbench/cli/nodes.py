"""Nodes of the configuration that name a class with an ``Options`` dataclass, for commands that
take one of a group."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from workbench.assemble import load_class
from workbench.configuration import Composed, compose_config, options_of
from workbench.core.errors import ConfigError, unknown_name

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "tuple[str, ...]": (list,),
}


def compose_with_one(
    command: str, arguments: Sequence[str], key: str, group: str, base: str
) -> tuple[Composed, str]:
    """The configuration of a command that needs one ``key=NAME``, an option of ``group``, on top of
    ``base``; and the name.

    Raises
    ------
    ConfigError
        None was given, several were, or there is no such option.
    """
    chosen = [text for text in arguments if text.startswith(f"{key}=")]
    valid = options_of(group)
    if len(chosen) != 1:
        raise ConfigError(f"{command} needs one {key}=: {', '.join(valid)}.")
    name = chosen[0].partition("=")[2]
    if name not in valid:
        raise unknown_name(key, name, valid)
    rest = [text for text in arguments if text not in chosen]
    return compose_config([base, f"+{group}={name}", *rest]), name


def build_node(cfg: DictConfig, name: str) -> Any:
    """The class that a node names, with its options checked by name and type."""
    found = OmegaConf.to_container(cfg[name], resolve=True)
    assert isinstance(found, dict)
    node = {str(key): value for key, value in found.items()}
    cls = load_class(node.pop("_target_"))
    fields = {f.name: str(f.type) for f in dataclasses.fields(cls.Options)}
    for key, value in node.items():
        if key not in fields:
            raise unknown_name(f"option of {name} ({cls.__name__})", key, fields)
        kinds = _TYPES[fields[key]]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{name}.{key}={value!r} must be of type {fields[key]}.")
        if isinstance(value, list):
            node[key] = tuple(value)
    return cls(cls.Options(**node))
