"""Plain, strictly valid JSON from what a run holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Return ``value`` as JSON's own types.

    NaN and infinities, which JSON lacks, become None; numpy scalars and arrays, dataclasses,
    tuples and sets become numbers, objects and lists; anything else becomes its text.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, AbstractSet):
        return sorted((plain(item) for item in value), key=str)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return str(value)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Serialise ``value`` as strictly valid JSON on one line (or indented)."""
    separators = (",", ":") if indent is None else None
    return json.dumps(plain(value), allow_nan=False, indent=indent, separators=separators)
