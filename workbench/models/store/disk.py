"""Files put in place whole or not at all: staging, publishing, and a full disk said plainly."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from workbench.models.store.errors import ModelStoreError, NoDiskSpaceError

STAGE_PREFIX = ".fetch-"
#: A stage that nothing has touched for so long was left by a killed process.
STALE_STAGE_SECONDS = 24 * 3600
_FULL = (errno.ENOSPC, errno.EDQUOT)


def default_models_dir() -> Path:
    """``$XDG_CACHE_HOME/workbench/models``, or ``~/.cache/workbench/models``."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "workbench" / "models"


@dataclass(frozen=True, slots=True)
class Stage:
    """Temporary sibling of the final folder, on the same file system.

    Attributes
    ----------
    model
        What is going to be published.
    work
        Downloads and other things to throw away.
    retired
        Where a replaced folder goes before it is deleted.
    """

    root: Path

    @property
    def models_dir(self) -> Path:
        """The store that this stage is in."""
        return self.root.parent

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def retired(self) -> Path:
        return self.root / "retired"

    def reset(self) -> None:
        """Empty the stage."""
        for folder in (self.model, self.work):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()


@contextmanager
def staging(models_dir: Path) -> Iterator[Stage]:
    """A stage that is gone afterwards, however the body ends (Ctrl-C included).

    Raises
    ------
    NoDiskSpaceError
        If the disk fills up in the body.
    ModelStoreError
        If `models_dir` cannot be made or written to.
    """
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        _remove_stale_stages(models_dir)
        root = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=models_dir))
    except OSError as error:
        _raise_if_full(error, models_dir)
        raise ModelStoreError(
            f"{models_dir}: cannot be written ({error.strerror or error}); "
            "choose another folder with models_dir=..."
        ) from error
    try:
        stage = Stage(root)
        stage.reset()
        yield stage
    except Exception as error:
        _raise_if_full(error, models_dir)
        raise
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _raise_if_full(error: Exception, models_dir: Path) -> None:
    """Raise `NoDiskSpaceError` if `error` comes from a full disk, in whichever library's words."""
    numbers = [f"(os error {number})" for number in _FULL]
    full = (isinstance(error, OSError) and error.errno in _FULL) or any(
        number in str(error) for number in numbers
    )
    if full:
        raise NoDiskSpaceError(
            f"{models_dir}: the disk is full; nothing was left behind. Free some space, or choose "
            "another folder with models_dir=..."
        ) from error


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise `NoDiskSpaceError` unless the disk under `folder` has `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise NoDiskSpaceError(
            f"{folder}: {what} needs {needed_bytes / 1e6:.0f} MB of disk, {free / 1e6:.0f} MB are "
            "free. Free some space, or choose another folder with models_dir=..."
        )


def publish(stage: Stage, final: Path, *, replace: bool, is_usable: Callable[[Path], bool]) -> None:
    """Rename ``stage.model`` to `final`: readers see the old folder or the new one, whole.

    Parameters
    ----------
    stage
        The stage that holds the new folder; all of it has been written.
    final
        Where it goes.
    replace
        True to put it in place of any folder there. False where another process may have
        published the same model meanwhile: if that one `is_usable`, it stays.
    """
    _sync_tree(stage.model)
    final.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            stage.model.rename(final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if not replace and is_usable(final):
                return
            # Another process may be doing the same: whoever renames last wins.
            stage.retired.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                final.rename(stage.retired / str(time.monotonic_ns()))
        else:
            _sync_folder(final.parent)
            return


def _sync_tree(folder: Path) -> None:
    """Flush a folder's files to the disk, with the permissions that new files get here."""
    reference = folder / ".permissions"
    reference.touch()
    mode = reference.stat().st_mode
    reference.unlink()
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_folder(path)
            continue
        if path.stat().st_nlink > 1:  # a link to a file that belongs to another cache
            continue
        path.chmod(mode)  # some writers make private files
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries; some systems cannot open a folder, and need not."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_stale_stages(models_dir: Path) -> None:
    for stage in models_dir.glob(f"{STAGE_PREFIX}*"):
        try:
            newest = max(path.lstat().st_mtime for path in (stage, *stage.rglob("*")))
        except OSError:  # its owner is at work on it, or has just finished
            continue
        if time.time() - newest > STALE_STAGE_SECONDS:
            shutil.rmtree(stage, ignore_errors=True)


def copy_or_link(source: Path, target: Path) -> None:
    """Hard-link `source` (symlinks followed), or copy it where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
