"""Errors that speak to users: what was wrong, what is valid, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WorkbenchError(ValueError):
    """The command, the configuration or the input was wrong (exit status 2)."""


class ConfigError(WorkbenchError):
    """An unknown name, an unmet requirement, or two techniques that cannot run together."""


class RequestError(WorkbenchError):
    """One request cannot be served; the others go on."""


class UnsupportedError(WorkbenchError):
    """A component cannot do what was asked of it on this machine or model."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> ConfigError:
    """Build the error for an unknown name, with the valid ones and the nearest match.

    Parameters
    ----------
    kind
        What the name stands for, such as ``"technique"``.
    name
        The name as the user gave it.
    valid
        Every name that would have been accepted.
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown {kind} {name!r}.{hint} Valid: {', '.join(names) or '(none)'}.")
