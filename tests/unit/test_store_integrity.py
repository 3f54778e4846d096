"""Opening a model folder: whole ones open, and whatever is wrong with the others is named."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_models import tiny_model
from workbench.models.store import BrokenModelError, ChecksumError, open_model_folder
from workbench.models.store.integrity import (
    INDEX_NAME,
    MANIFEST_NAME,
    folder_digest,
    write_manifest,
)

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


@pytest.fixture
def manifested(folder: Path) -> Path:
    write_manifest(folder, "tiny", {"kind": "folder", "id": "folder:somewhere"}, "MIT")
    return folder


def shard(folder: Path) -> dict[str, str]:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(weights)
    weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: weights[n] for n in names if weight_map[n] == file}, folder / file)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_a_whole_folder_opens(folder: Path) -> None:
    model = open_model_folder(folder)
    assert (model.path, model.name, model.source) == (folder, "model", f"folder:{folder}")
    assert model.weight_files == (folder / WEIGHTS,)
    assert model.num_bytes() == (folder / WEIGHTS).stat().st_size
    assert model.sha256 is None and not model.manifest


def test_the_manifest_says_what_it_is(manifested: Path) -> None:
    model = open_model_folder(manifested, verify=True)
    assert (model.name, model.source) == ("tiny", "folder:somewhere")
    assert model.manifest["license"] == "MIT"
    assert model.sha256 == folder_digest(manifested)
    assert model.weights_sha256 == folder_digest(manifested, "*.safetensors") != model.sha256
    listed = set(model.manifest["files"])
    assert listed == {file.name for file in manifested.iterdir()} - {MANIFEST_NAME}


def test_digests_follow_the_bytes_and_the_names(folder: Path, tmp_path: Path) -> None:
    before, weights_before = folder_digest(folder), folder_digest(folder, "*.safetensors")
    assert folder_digest(shutil.copytree(folder, tmp_path / "copy")) == before
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert folder_digest(folder) != before
    assert folder_digest(folder, "*.safetensors") == weights_before
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    assert folder_digest(folder, "*.safetensors") != weights_before


def test_weights_in_another_layout_beside_them_are_left_alone(folder: Path) -> None:
    (folder / "consolidated.safetensors").write_bytes(b"never read")
    assert open_model_folder(folder).weight_files == (folder / WEIGHTS,)


def truncate(folder: Path) -> str:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    return "truncated"


def truncate_to_nothing(folder: Path) -> str:
    (folder / WEIGHTS).write_bytes(b"")
    return "truncated"


def truncate_in_the_header(folder: Path) -> str:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:40])
    return "truncated"


def spoil_the_header(folder: Path) -> str:
    path = folder / WEIGHTS
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    path.write_bytes(content[:8] + b"x" * length + content[8 + length :])
    return "unreadable safetensors header"


def lengthen(folder: Path) -> str:
    with (folder / WEIGHTS).open("ab") as stream:
        stream.write(b"\0")
    return "its header describes"


@pytest.mark.parametrize(
    "damage",
    [truncate, truncate_to_nothing, truncate_in_the_header, spoil_the_header, lengthen],
)
def test_damaged_weights_are_named(folder: Path, damage: Callable[[Path], str]) -> None:
    words = damage(folder)
    with pytest.raises(BrokenModelError, match=words) as caught:
        open_model_folder(folder)
    assert str(folder / WEIGHTS) in str(caught.value)
    assert "fetch" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_manifest_makes_the_remedy_exact(manifested: Path) -> None:
    truncate(manifested)
    with pytest.raises(BrokenModelError, match="fetch tiny --force"):
        open_model_folder(manifested)


def test_shards_are_those_that_the_index_names(folder: Path) -> None:
    weight_map = shard(folder)
    save_file({"unused": torch.zeros(1)}, folder / "elsewhere.safetensors")
    model = open_model_folder(folder)
    assert {file.name for file in model.weight_files} == set(weight_map.values())

    (folder / "part-1.safetensors").unlink()
    with pytest.raises(BrokenModelError, match=r"part-1.safetensors: missing"):
        open_model_folder(folder)


@pytest.mark.parametrize("content", ["{}", "[]", "{broken", '{"weight_map": []}'])
def test_a_bad_index_is_named(folder: Path, content: str) -> None:
    shard(folder)
    (folder / INDEX_NAME).write_text(content)
    with pytest.raises(BrokenModelError, match=INDEX_NAME):
        open_model_folder(folder)


@pytest.mark.parametrize("content", [None, "{broken", "[]", "{}"])
def test_a_bad_config_is_named(folder: Path, content: str | None) -> None:
    path = folder / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(BrokenModelError, match=r"config\.json"):
        open_model_folder(folder)


def test_what_is_not_required_may_be_absent(folder: Path) -> None:
    for name in ("tokenizer.json", WEIGHTS):
        (folder / name).unlink()
    with pytest.raises(BrokenModelError, match=r"no \*\.safetensors"):
        open_model_folder(folder, require_tokenizer=False)
    with pytest.raises(BrokenModelError, match="no tokenizer"):
        open_model_folder(folder, require_weights=False)
    model = open_model_folder(folder, require_weights=False, require_tokenizer=False)
    assert model.weight_files == ()


def test_a_file_that_the_manifest_lists_must_be_there(manifested: Path) -> None:
    (manifested / "tokenizer_config.json").unlink()
    with pytest.raises(BrokenModelError, match=r"tokenizer_config.json: missing"):
        open_model_folder(manifested)


def test_a_file_must_have_its_size(manifested: Path) -> None:
    path = manifested / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(BrokenModelError, match=r"tokenizer.json: \d+ bytes"):
        open_model_folder(manifested)


def test_verify_finds_a_changed_byte(manifested: Path) -> None:
    path = manifested / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    open_model_folder(manifested)
    with pytest.raises(ChecksumError, match=WEIGHTS):
        open_model_folder(manifested, verify=True)


def test_verify_needs_a_manifest(folder: Path) -> None:
    with pytest.raises(BrokenModelError, match=MANIFEST_NAME):
        open_model_folder(folder, verify=True)


@pytest.mark.parametrize("content", ["{broken", "{}", '{"schema": 1}', '{"schema": 99}'])
def test_a_bad_manifest_is_named(manifested: Path, content: str) -> None:
    (manifested / MANIFEST_NAME).write_text(content)
    with pytest.raises(BrokenModelError, match=MANIFEST_NAME):
        open_model_folder(manifested)


def test_an_absent_folder_is_said_to_be_absent(tmp_path: Path) -> None:
    with pytest.raises(BrokenModelError, match="no such model folder"):
        open_model_folder(tmp_path / "nowhere")
