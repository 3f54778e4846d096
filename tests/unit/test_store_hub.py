"""The Hub as a source, against a stand-in server: what is taken, checked, and given up on."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_hub import COMMIT, FakeHub, fake_hub
from tests.helpers.tiny_models import tiny_model
from workbench.models.store import ChecksumError, ModelsUnavailableError, fetch, hub
from workbench.models.store.catalog import HubRepo
from workbench.models.store.disk import staging
from workbench.models.store.errors import SourceUnavailableError
from workbench.models.store.hub import HubSource, is_model_file
from workbench.models.store.progress import SilentProgress

NOT_WANTED = {
    "README.md": b"text",
    ".gitattributes": b"text",
    "modeling.py": b"raise SystemExit",
    "onnx/model.onnx": b"other format",
    "onnx/config.json": b"{}",
    "original/consolidated.safetensors": b"other format",
    "consolidated.safetensors": b"other format",
    "pytorch_model.bin": b"pickle",
}


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub.constants as constants

    cache = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"), raising=False)
    return cache


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "served")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "LICENSE").write_text("MIT")
    for name, content in NOT_WANTED.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    with fake_hub(folder, "org/tiny", monkeypatch) as server:
        yield server


def test_model_files_are_taken_and_the_rest_left(served: FakeHub, tmp_path: Path) -> None:
    model = fetch("org/tiny", models_dir=tmp_path / "store")
    assert model.path == tmp_path / "store" / "org--tiny"
    assert model.source == f"hub:org/tiny@{COMMIT}"
    assert set(model.manifest["files"]) == set(served.files) - set(NOT_WANTED)
    for name in model.manifest["files"]:
        assert (model.path / name).read_bytes() == served.files[name]

    asked = len(served.requests)
    assert fetch("org/tiny", models_dir=tmp_path / "store") == model
    assert len(served.requests) == asked


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_bytes_that_differ_from_the_hubs_hash_are_refused(
    name: str, served: FakeHub, tmp_path: Path
) -> None:
    served.corrupt.add(name)
    with pytest.raises(ChecksumError, match=name):
        fetch("org/tiny", models_dir=tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_the_catalogs_pin_counts_above_the_hubs_own_hash(served: FakeHub, tmp_path: Path) -> None:
    pinned = HubSource(HubRepo("org/tiny", sha256={"model.safetensors": "0" * 64}))
    with staging(tmp_path) as stage, pytest.raises(ChecksumError, match="pinned"):
        pinned.materialize(stage, SilentProgress())


def test_a_repository_that_is_not_there(served: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelsUnavailableError, match="HTTP status 404"):
        fetch("org/absent", models_dir=tmp_path / "store")


def test_a_repository_without_safetensors(served: FakeHub, tmp_path: Path) -> None:
    del served.files["model.safetensors"]
    with pytest.raises(ModelsUnavailableError, match=r"no \*\.safetensors"):
        fetch("org/tiny", models_dir=tmp_path / "store")


def test_a_server_that_never_answers_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    limit = 0.5
    monkeypatch.setattr(hub, "PROBE_TIMEOUT_SECONDS", limit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        HubSource(HubRepo("org/tiny"))  # import the library outside of the measured time
        began = time.monotonic()
        with pytest.raises(SourceUnavailableError, match="cannot be reached"):
            HubSource(HubRepo("org/tiny"))._probe()
        assert time.monotonic() - began < 20 * limit


def test_the_limit_is_on_the_whole_call() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        hub._within(0.1, lambda: time.sleep(5))
    assert time.monotonic() - began < 5
    assert hub._within(5, lambda: "answer") == "answer"
    with pytest.raises(ZeroDivisionError):
        hub._within(5, lambda: 1 // 0)


def test_offline_mode_is_respected(
    served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelsUnavailableError, match="offline"):
        fetch("org/tiny", models_dir=tmp_path / "store")
    assert not served.requests


def put_into_hub_cache(cache: Path, files: dict[str, bytes]) -> None:
    """Lay files out as the Hub library does: blobs, and a snapshot of links to them."""
    root = cache / "models--org--tiny"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (root / part).mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for number, (name, content) in enumerate(files.items()):
        (root / "blobs" / str(number)).write_bytes(content)
        link = root / "snapshots" / COMMIT / name
        link.parent.mkdir(exist_ok=True, parents=True)
        link.symlink_to(root / "blobs" / str(number))


def test_the_local_hub_cache_serves_when_the_hub_does_not(
    served: FakeHub, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(self: HubSource) -> Any:
        raise SourceUnavailableError("it cannot be reached")

    monkeypatch.setattr(HubSource, "_probe", probe)
    put_into_hub_cache(hub_cache, served.files)
    model = fetch("org/tiny", models_dir=tmp_path / "store")
    assert model.source == f"hub:org/tiny@{COMMIT}"
    assert set(model.manifest["files"]) == set(served.files) - set(NOT_WANTED)
    shutil.rmtree(hub_cache)  # what is in the store does not depend on the cache
    weights = model.path / "model.safetensors"
    assert not weights.is_symlink()
    assert weights.read_bytes() == served.files["model.safetensors"]


def test_half_a_copy_in_the_hub_cache_is_not_used(
    served: FakeHub, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(self: HubSource) -> Any:
        raise SourceUnavailableError("it cannot be reached")

    monkeypatch.setattr(HubSource, "_probe", probe)
    put_into_hub_cache(hub_cache, {"config.json": served.files["config.json"]})
    with pytest.raises(ModelsUnavailableError, match="cannot be reached"):
        fetch("org/tiny", models_dir=tmp_path / "store")


@pytest.mark.parametrize("name", ["model.safetensors", "1_Pooling/config.json", "tokenizer.model"])
def test_which_names_are_model_files(name: str) -> None:
    assert is_model_file(name)
    assert not any(is_model_file(other) for other in NOT_WANTED)
