"""What every experiment's command has: its own options, overrides for Hydra, errors in words."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from workbench.core.errors import ConfigError, WorkbenchError

Options = TypeVar("Options")


def parse(cls: type[Options], arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Split a command line into an experiment's own options and overrides for Hydra.

    Parameters
    ----------
    cls
        Dataclass of the options. ``name=value`` sets field ``name``; a tuple takes values with
        commas between them, ``[`` and ``]`` around them or not.
    arguments
        Everything else goes to Hydra, which knows the names that are valid there.

    Raises
    ------
    ConfigError
        A value is not of its option's type.
    """
    defaults = cls()
    fields = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    rest: list[str] = []
    for text in arguments:
        name, found, value = text.partition("=")
        if not found or name not in fields:
            rest.append(text)
            continue
        values[name] = _value(name, value, getattr(defaults, name))
    return dataclasses.replace(defaults, **values), rest  # type: ignore[type-var]


def _value(name: str, text: str, default: Any) -> Any:
    if isinstance(default, tuple):
        parts = text.strip().removeprefix("[").removesuffix("]").split(",")
        kind = type(default[0])
        return tuple(_scalar(name, part.strip(), kind) for part in parts if part.strip())
    return _scalar(name, text, type(default))


def _scalar(name: str, text: str, kind: type[Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{name}={text} must be of type {kind.__name__}.") from None


def command_line(program: str, arguments: Sequence[str]) -> str:
    """The command of an experiment, for its records."""
    return f"python -m experiments.{program} {shlex.join(arguments)}".rstrip()


def new_table(title: str, *columns: str) -> Table:
    """The table that an experiment prints last; every column but the first holds numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def console() -> Console:
    """Where to print: stdout; a file or a pipe has no width of its own."""
    return Console(width=None if sys.stdout.isatty() else 120)


def show(*parts: Any) -> None:
    """Print tables and lines of text."""
    out = console()
    for part in parts:
        out.print(part, soft_wrap=isinstance(part, str))


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run an experiment's ``main`` over the command line; wrong input ends with status 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except WorkbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
