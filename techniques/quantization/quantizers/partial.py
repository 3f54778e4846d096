"""What an interrupted run has quantised already, so that another begins behind it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from techniques.quantization.quantizers.report import LayerReport, QuantizedModel
from techniques.quantization.weights import QuantizedWeight, Scheme
from workbench.core.errors import ConfigError, WorkbenchError

#: Folder within that of the checkpoint, until that is written.
FOLDER = "partial"
_PARTS = ("codes", "scales", "zeros", "group_index", "input_scale")
_CHANGED, _BETWEEN = "changed", ":"


class PartialModel:
    """A folder with a file of each decoder layer that is done.

    Parameters
    ----------
    folder
        Of the checkpoint to be.
    identity
        Whatever the numbers depend on: model, texts, options.

    Raises
    ------
    ConfigError
        The folder has a run of another identity; what differs is named.
    """

    def __init__(self, folder: Path, scheme: Scheme, identity: Mapping[str, Any]) -> None:
        self.folder, self.scheme = folder / FOLDER, scheme
        self._identity = json.loads(json.dumps(identity))
        self._run = self.folder / "run.json"
        if not self._run.exists():
            return
        found = json.loads(self._run.read_text(encoding="utf-8"))
        both = {**found, **self._identity}
        differing = [key for key in both if found.get(key) != self._identity.get(key)]
        if differing:
            raise ConfigError(
                f"{self.folder} has layers of an interrupted run with another "
                f"{', '.join(differing)}. Repeat its command to go on with it, remove the folder "
                "to begin anew, or choose another out=."
            )

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05}.safetensors"

    def load(self, layer: int) -> QuantizedModel | None:
        """What a run before made of a decoder layer; None: nothing.

        Raises
        ------
        WorkbenchError
            Its file is broken.
        """
        path = self._file(layer)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                report = json.loads(file.metadata()["report"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise WorkbenchError(f"{path} cannot be read ({error}): remove it.") from error
        out = QuantizedModel(report=[LayerReport(**entry) for entry in report])
        by_name: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(_BETWEEN)
            if part == _CHANGED:
                out.changed[name] = tensor
            else:
                by_name.setdefault(name, {})[part] = tensor
        out.weights = {n: QuantizedWeight(self.scheme, **parts) for n, parts in by_name.items()}
        return out

    def save(self, layer: int, done: QuantizedModel) -> None:
        """Keep what was made of a decoder layer."""
        tensors = {f"{name}{_BETWEEN}{_CHANGED}": t for name, t in done.changed.items()}
        for name, weight in done.weights.items():
            for part in _PARTS:
                if (tensor := getattr(weight, part)) is not None:
                    tensors[f"{name}{_BETWEEN}{part}"] = tensor
        kept = {key: tensor.contiguous() for key, tensor in tensors.items()}
        about = {"report": json.dumps([asdict(entry) for entry in done.report])}
        if not self._run.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            stated = json.dumps(self._identity)
            _replace(self._run, lambda path: path.write_text(stated, encoding="utf-8"))
        _replace(self._file(layer), lambda path: save_file(kept, path, metadata=about))

    def remove(self) -> None:
        """The checkpoint is written: nothing is left to go on with."""
        shutil.rmtree(self.folder)


def _replace(file: Path, write: Any) -> None:
    """Write a file whole or not at all."""
    unfinished = file.with_suffix(".tmp")
    write(unfinished)
    unfinished.replace(file)
