"""Checks of workload settings: each error names the key, the value and what is valid."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from workbench.core.errors import ConfigError, unknown_name


def require_int(key: str, value: Any, minimum: int) -> None:
    """Refuse anything but a whole number of at least ``minimum``.

    Raises
    ------
    ConfigError
        With the key, the value and the valid range.
    """
    # bool is an int in Python, but `num_requests: true` is surely a mistake.
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{key} is {value!r}; valid: a whole number of at least {minimum}.")


def require_optional_int(key: str, value: Any, minimum: int) -> None:
    """Refuse anything but ``None`` or a whole number of at least ``minimum``."""
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int) or value < minimum
    ):
        raise ConfigError(
            f"{key} is {value!r}; valid: null, or a whole number of at least {minimum}."
        )


def require_bounds(low_key: str, low: Any, high_key: str, high: Any, minimum: int) -> None:
    """Refuse two bounds unless ``minimum <= low <= high``."""
    require_int(low_key, low, minimum)
    require_int(high_key, high, minimum)
    if low > high:
        raise ConfigError(f"{low_key} is {low}, above {high_key} ({high}); valid: at most {high}.")


def require_bool(key: str, value: Any) -> None:
    """Refuse anything but true or false; a quoted "false" would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}; valid: true, false.")


def require_positive(key: str, value: Any) -> None:
    """Refuse anything but a finite number above zero."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise ConfigError(f"{key} is {value!r}; valid: a finite number above 0.")


def require_share(key: str, value: Any) -> None:
    """Refuse anything but a number from 0 up to below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"{key} is {value!r}; valid: a number from 0 up to below 1.")


def require_choice(key: str, value: Any, valid: Iterable[str]) -> None:
    """Refuse anything but one of the ``valid`` names."""
    names = tuple(valid)
    if value not in names:
        raise unknown_name(key, str(value), names)


def as_names(key: str, value: Any) -> tuple[str, ...]:
    """Return one name or a list of names (also a Hydra list) as a tuple, without repeats.

    Raises
    ------
    ConfigError
        If it is neither, or empty, or names something twice.
    """
    if isinstance(value, str):
        names = tuple(part.strip() for part in value.split(","))
    elif isinstance(value, Iterable):
        names = tuple(value)
    else:
        names = ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{key} is {value!r}; valid: one name, or a list of names.")
    if len(set(names)) != len(names):
        raise ConfigError(f"{key} names something twice: {', '.join(names)}.")
    return names
