"""The model store: models by name, fetched once, checked, kept as plain HF folders."""

from __future__ import annotations

from workbench.models.store.cli import fetch_command
from workbench.models.store.errors import (
    BrokenModelError,
    ChecksumError,
    ModelStoreError,
    ModelsUnavailableError,
    NoDiskSpaceError,
    UnknownModelError,
    UnsupportedModelError,
)
from workbench.models.store.integrity import (
    ModelFolder,
    folder_digest,
    open_model_folder,
)
from workbench.models.store.obtain import fetch, resolve_model

__all__ = [
    "BrokenModelError",
    "ChecksumError",
    "ModelFolder",
    "ModelStoreError",
    "ModelsUnavailableError",
    "NoDiskSpaceError",
    "UnknownModelError",
    "UnsupportedModelError",
    "fetch",
    "fetch_command",
    "folder_digest",
    "open_model_folder",
    "resolve_model",
]
