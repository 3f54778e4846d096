"""Reading the tensors of a safetensors folder, one at a time, holding no file open for long."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from workbench.core.errors import WorkbenchError
from workbench.models.families import Family
from workbench.models.parameters import Parameter

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

#: Ending of tensors that old checkpoints carry and that are computed instead.
_HARMLESS = ".rotary_emb.inv_freq"


class WeightSource(Protocol):
    """Where weights come from."""

    def has(self, parameter: Parameter) -> bool:
        """Whether there is a tensor of that name."""
        ...

    def shape(self, parameter: Parameter) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def read(self, parameter: Parameter) -> torch.Tensor:
        """A tensor, in whatever dtype and on whatever device the source has it."""
        ...

    def release(self) -> None:
        """Let go of what earlier reads held."""
        ...

    def check_names(self, expected: Iterable[str], optional: Iterable[str]) -> None:
        """Raise where ``expected`` and what the source has differ."""
        ...


class Checkpoint:
    """A folder of safetensors files: one, or several with an index.

    Files are mapped into memory while they are read. :meth:`release` drops the mappings, so that
    the pages of the file do not stay in the resident set beside the weights made from them.

    Parameters
    ----------
    folder
        Holds ``model.safetensors``, or ``model.safetensors.index.json`` and the files it names.
    family
        Tells how names are to be read and which tensors are not for us.
    passed_over
        Beginnings of names, after renaming, of further tensors that are not.

    Raises
    ------
    WorkbenchError
        A file is missing, truncated or broken; it is named.
    """

    def __init__(
        self, folder: Path, family: Family, passed_over: re.Pattern[str] | None = None
    ) -> None:
        self.folder = folder
        self.ignored = family.ignored
        self.passed_over = passed_over
        self._open_files: dict[Path, Any] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        for stored, path in self._stored_names():
            name = _rename(stored, family.renames)
            if name in self._where:
                raise WorkbenchError(
                    f"{path} holds {stored!r}, which stands for {name!r}, and "
                    f"{self._where[name][0]} holds that already."
                )
            self._where[name] = (path, stored)
        self.release()

    def _stored_names(self) -> list[tuple[str, Path]]:
        index = self.folder / _INDEX
        if not index.exists():
            single = self.folder / _SINGLE
            return [(name, single) for name in self._open(single).keys()]  # noqa: SIM118
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            listed = [(name, self.folder / file) for name, file in weight_map.items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WorkbenchError(f"{index} is not a safetensors index: {error!r}") from error
        for path in {path for _, path in listed}:
            held = set(self._open(path).keys())
            absent = [name for name, file in listed if file == path and name not in held]
            if absent:
                raise WorkbenchError(f"{path} lacks tensors that {index} promises: {_some(absent)}")
        return listed

    def _open(self, path: Path) -> Any:
        if path not in self._open_files:
            if not path.exists():
                raise WorkbenchError(
                    f"{path} does not exist. Weights are read from {_SINGLE} or from the files "
                    f"that {_INDEX} names; convert other formats first, or use weights=random."
                )
            try:
                self._open_files[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise WorkbenchError(
                    f"{path} is truncated or not a safetensors file ({error}). Fetch it again."
                ) from error
        return self._open_files[path]

    @property
    def names(self) -> frozenset[str]:
        """Of all tensors, after renaming."""
        return frozenset(self._where)

    def stored_name(self, name: str) -> str:
        """What the files call a tensor."""
        return self._where[name][1]

    def has(self, parameter: Parameter) -> bool:
        return parameter.name in self._where

    def shape(self, parameter: Parameter) -> tuple[int, ...]:
        path, stored = self._where[parameter.name]
        return tuple(self._open(path).get_slice(stored).get_shape())

    def read(self, parameter: Parameter) -> torch.Tensor:
        path, stored = self._where[parameter.name]
        try:
            tensor: torch.Tensor = self._open(path).get_tensor(stored)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise WorkbenchError(f"{path} cannot be read at {stored!r}: {error}") from error
        return tensor

    def release(self) -> None:
        self._open_files.clear()

    def check_names(self, expected: Iterable[str], optional: Iterable[str]) -> None:
        wanted, allowed = set(expected), set(optional)
        missing = sorted(wanted - self._where.keys())
        unexpected = sorted(
            name
            for name in self._where.keys() - wanted - allowed
            if not name.endswith(_HARMLESS)
            and not name.startswith(self.ignored or ("\0",))
            and not (self.passed_over and self.passed_over.match(name))
        )
        if missing or unexpected:
            raise WorkbenchError(
                f"the weights in {self.folder} do not fit its config.json."
                + (f" Missing: {_some(missing)}." if missing else "")
                + (f" Unexpected: {_some(unexpected)}." if unexpected else "")
            )


def _rename(name: str, renames: Iterable[tuple[str, str]]) -> str:
    for prefix, replacement in renames:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


def _some(names: list[str], limit: int = 12) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of a checkpoint that is split over several files."""
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
