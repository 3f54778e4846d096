"""The HF Hub as a source: asked once with a short timeout, then its files, each checked."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench.models.store.catalog import HubRepo
from workbench.models.store.disk import Stage, check_space, copy_or_link
from workbench.models.store.errors import (
    BrokenModelError,
    ChecksumError,
    ModelStoreError,
    SourceUnavailableError,
)
from workbench.models.store.integrity import (
    MANIFEST_NAME,
    file_sha256,
    open_model_folder,
)
from workbench.models.store.progress import FetchProgress, watch_folder

#: How long the Hub may take to answer the first question before the next source is asked.
PROBE_TIMEOUT_SECONDS = 5.0
_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors")
_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")


def is_model_file(name: str) -> bool:
    """Whether a repository's file belongs to the model folder: weights, config, tokenizer, licence.

    Other formats (``onnx/``, ``original/``, pickles) and code stay behind.
    """
    if name.startswith(".") or name == MANIFEST_NAME:
        return False
    if "/" in name:
        return name.endswith("/config.json") and name.count("/") == 1 and name[0].isdigit()
    if name.startswith(_NAMES):
        return True
    return name.endswith(_SUFFIXES) and not name.startswith("consolidated")


class HubSource:
    """A repository on the HF Hub, at a pinned commit where the catalog has one.

    Where the Hub does not answer (no network, ``HF_HUB_OFFLINE``), a whole copy in the Hub
    library's own cache on this machine is used.
    """

    def __init__(self, repo: HubRepo) -> None:
        self.repo = repo

    @property
    def identity(self) -> str:
        revision = f"@{self.repo.revision}" if self.repo.revision else ""
        return f"hub:{self.repo.repo_id}{revision}"

    def materialize(self, stage: Stage, progress: FetchProgress) -> dict[str, Any]:
        """Download the repository's model files, or link them from the Hub library's cache."""
        try:
            info = self._probe()
        except SourceUnavailableError as error:
            cached = self._cached_snapshot()
            if cached is None or not self._link_cached(stage, cached):
                raise
            progress.note(f"{self.identity}: {error}; using the copy in the local Hub cache")
            return self._entry(cached.name)
        return self._download(stage, info, progress)

    def _probe(self) -> Any:
        """The Hub's description of the repository; one request with a short timeout."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            info = _within(
                PROBE_TIMEOUT_SECONDS,
                lambda: HfApi().model_info(
                    self.repo.repo_id,
                    revision=self.repo.revision,
                    files_metadata=True,
                    timeout=PROBE_TIMEOUT_SECONDS,
                ),
            )
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else "?"
            raise SourceUnavailableError(
                f"the Hub answered with HTTP status {status} (no such model or revision, or it is "
                "gated or private: see `hf auth login`)"
            ) from error
        except Exception as error:  # its HTTP library, hence its error type, varies by version
            raise SourceUnavailableError(f"it cannot be reached ({_first_line(error)})") from error
        names = [file.rfilename for file in info.siblings or ()]
        if not any(is_model_file(name) and name.endswith(".safetensors") for name in names):
            raise SourceUnavailableError("the repository has no *.safetensors weights")
        return info

    def _download(self, stage: Stage, info: Any, progress: FetchProgress) -> dict[str, Any]:
        from huggingface_hub import snapshot_download

        files = [file for file in info.siblings if is_model_file(file.rfilename)]
        size = sum(file.size or 0 for file in files)
        check_space(stage.models_dir, size, self.repo.repo_id)
        progress.start(f"downloading {self.repo.repo_id}", size)
        try:
            with watch_folder(stage.model, progress):
                snapshot_download(
                    self.repo.repo_id,
                    revision=info.sha,
                    local_dir=stage.model,
                    allow_patterns=[file.rfilename for file in files],
                    etag_timeout=PROBE_TIMEOUT_SECONDS,
                    tqdm_class=_silent_tqdm(),
                )
        except OSError as error:
            if error.errno is not None:  # a disk's error, not the network's
                raise
            raise SourceUnavailableError(f"the download broke off ({error})") from error
        except ModelStoreError:
            raise
        except Exception as error:  # as in _probe
            raise SourceUnavailableError(
                f"the download broke off ({_first_line(error)})"
            ) from error
        finally:
            progress.finish()
        shutil.rmtree(stage.model / ".cache", ignore_errors=True)
        for file in files:
            self._check(stage.model / file.rfilename, file)
        return self._entry(info.sha)

    def _check(self, path: Path, file: Any) -> None:
        """Compare a downloaded file with the catalog's pin and with what the Hub says of it."""
        if not path.is_file():
            raise BrokenModelError(f"{self.identity}: {file.rfilename} was not downloaded")
        pinned = self.repo.sha256.get(file.rfilename)
        stated = file.lfs.sha256 if file.lfs else None
        for origin, expected in (("pinned", pinned), ("the Hub's", stated)):
            if expected and (actual := file_sha256(path)) != expected:
                raise ChecksumError(
                    f"{self.identity}: {file.rfilename} has sha256 {actual}, {origin} is {expected}"
                )
        if stated is None and file.blob_id and git_blob_sha1(path) != file.blob_id:
            raise ChecksumError(f"{self.identity}: {file.rfilename} differs from the Hub's copy")

    def _cached_snapshot(self) -> Path | None:
        """The repository's folder in the Hub library's cache, which may hold part of it."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(
                    self.repo.repo_id, revision=self.repo.revision, local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            return None

    def _link_cached(self, stage: Stage, folder: Path) -> bool:
        """Put the model files of a cached snapshot into the stage; False if they are not all."""
        for file in folder.rglob("*"):
            name = file.relative_to(folder).as_posix()
            if not file.is_file() or not is_model_file(name):
                continue
            copy_or_link(file, stage.model / name)
            pinned = self.repo.sha256.get(name)
            if pinned and file_sha256(file) != pinned:
                raise ChecksumError(f"{file}: not the pinned file; delete it from the Hub cache")
        try:
            open_model_folder(stage.model, require_tokenizer=False)
        except BrokenModelError:
            return False
        return True

    def _entry(self, commit: str) -> dict[str, Any]:
        return {
            "kind": "hub",
            "id": f"hub:{self.repo.repo_id}@{commit}",
            "requested_revision": self.repo.revision,
        }


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of `call`, or `TimeoutError`: a bound on the whole of it.

    An HTTP timeout bounds each read, and the Hub library may make requests of its own before ours.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = call()
        except Exception as error:
            outcome["error"] = error

    # A daemon, unlike a pool's thread, does not keep the process alive once it is given up.
    thread = threading.Thread(target=run, name="hub-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _silent_tqdm() -> Any:
    """The Hub library's progress bar, without a bar: the fetch has its own."""
    from huggingface_hub import utils

    base: Any = utils.tqdm  # type: ignore[attr-defined, unused-ignore]

    class SilentTqdm(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return SilentTqdm


def git_blob_sha1(path: Path) -> str:
    """Git's name for a file's content: what the Hub states for files that are not in LFS."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
