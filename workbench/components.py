"""From a slot's node to its component: class, checked config, instance."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from workbench.core.errors import ConfigError, unknown_name
from workbench.slots.component import Component

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
    "draft_length",
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
#: What an option's annotation lets through.
_OPTION_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
}


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


class Builder:
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

    def make(self, slot: str, **runtime: Any) -> Any:
        """Instantiate the component of a slot, for a while."""
        return build_component(slot, self._nodes[slot], **runtime)

    def build(self, slot: str, **runtime: Any) -> Any:
        """Instantiate the component of a slot, for good."""
        self.built[slot] = component = self.make(slot, **runtime)
        return component

    def block_size(self, max_model_len: int) -> int:
        """Tokens a block of the KV cache."""
        size: int = self.cls("kv_cache").choose_block_size(self.config("kv_cache"), max_model_len)
        return size
