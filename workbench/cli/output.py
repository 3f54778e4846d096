"""What goes to stdout."""

from __future__ import annotations

import json
import sys
from typing import Any


def print_document(document: Any) -> None:
    """Print one JSON document and nothing else."""
    json.dump(document, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def takes_json(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether ``output=json`` is among the arguments, and the others."""
    rest = [text for text in arguments if text not in ("output=json", "output=table")]
    return "output=json" in arguments, rest
