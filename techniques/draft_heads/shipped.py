"""Heads that come with the project, found by the model that they were trained for."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from techniques.draft_heads.spec import TRAINED_FOR, HeadSpec
from techniques.draft_heads.target import Target

#: A folder each: config.json, weights, and training.json, the record of its training.
_FOLDER = Path(__file__).parent / "shipped"


def shipped_head(target: Target, kinds: Collection[str]) -> Path | None:
    """Folder of the head of one of these kinds that was trained for exactly this target."""
    fingerprint = target.fingerprint()
    for folder, config in _configs():
        if config.get(TRAINED_FOR, {}).get("fingerprint") != fingerprint:
            continue
        if HeadSpec.from_config(config, target.spec.num_layers).kind in kinds:
            return folder
    return None


def targets_of_shipped() -> list[str]:
    """Names of the models that a head comes with, for messages."""
    return sorted({config[TRAINED_FOR]["name"] for _, config in _configs()})


def _configs() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(_FOLDER.glob("*/config.json")):
        yield path.parent, json.loads(path.read_text(encoding="utf-8"))
