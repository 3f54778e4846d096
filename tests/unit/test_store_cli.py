"""The `fetch` command: exit statuses, one JSON document on stdout, progress on stderr."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.helpers.tiny_models import tiny_model
from workbench.models.store import cli, fetch_command
from workbench.models.store.catalog import CATALOG
from workbench.models.store.errors import NoDiskSpaceError, SourceUnavailableError
from workbench.models.store.hub import HubSource
from workbench.models.store.progress import RichProgress, watch_folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(self: HubSource) -> Any:
        raise SourceUnavailableError("it cannot be reached (no network in tests)")

    monkeypatch.setattr(HubSource, "_probe", probe)
    monkeypatch.setattr(HubSource, "_cached_snapshot", lambda self: None)


@pytest.fixture
def folder() -> Path:
    return tiny_model("llama")


def test_a_fetch_prints_the_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    arguments = ["my-model", "--from", str(folder), "--models-dir", str(store)]
    assert fetch_command(arguments) == cli.OK
    captured = capsys.readouterr()
    assert captured.out.startswith(str(store / "my-model"))
    assert "copying" in captured.err


def test_json_is_one_document_and_all_of_stdout(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["my-model", f"from={folder}", f"models_dir={tmp_path}", "output=json"]
    assert fetch_command([*arguments, "verify=true", "force=false"]) == cli.OK
    document = json.loads(capsys.readouterr().out)
    assert document["path"] == str(tmp_path / "my-model")
    assert document["source"] == {"kind": "folder", "id": f"folder:{folder}"}
    assert document["weight_bytes"] == (folder / "model.safetensors").stat().st_size
    assert len(document["sha256"]) == len(document["weights_sha256"]) == 64


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["smollm3"], cli.WRONG_COMMAND, "smollm2"),
        ([], cli.WRONG_COMMAND, "--list"),
        (["smollm2", "--from", "elsewhere"], cli.WRONG_COMMAND, "hub, pypi"),
        (["some/model"], cli.FAILED, "no network in tests"),
    ],
)
def test_failures_have_a_status_and_a_message(
    arguments: list[str],
    status: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fetch_command([*arguments, f"models_dir={tmp_path}", "output=json"]) == status
    captured = capsys.readouterr()
    assert words in json.loads(captured.out)["error"] and words in captured.err


def test_a_broken_model_and_its_remedy(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    arguments = ["m", "--from", str(copy), "--models-dir", str(tmp_path / "store"), "--quiet"]
    assert fetch_command(arguments) == cli.OK
    (tmp_path / "store" / "m" / "model.safetensors").write_bytes(b"")
    assert fetch_command(arguments) == cli.WRONG_COMMAND
    assert "fetch m --force" in capsys.readouterr().err
    assert fetch_command([*arguments, "--force", "--verify"]) == cli.OK


@pytest.mark.parametrize(
    ("error", "status"),
    [(NoDiskSpaceError("full"), cli.FAILED), (KeyboardInterrupt(), cli.INTERRUPTED)],
)
def test_a_full_disk_and_an_interruption(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(cli, "fetch", fail)
    assert fetch_command(["smollm2"]) == status


def test_unknown_options_are_a_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_command(["smollm2", "--frce"]) == cli.WRONG_COMMAND
    assert fetch_command(["smollm2", "forse=true"]) == cli.WRONG_COMMAND
    assert fetch_command(["--help"]) == cli.OK


def test_the_list_names_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_command(["--list"]) == cli.OK
    text = capsys.readouterr().out
    assert all(entry.name in text and entry.license_id in text for entry in CATALOG)
    assert fetch_command(["list=true", "output=json"]) == cli.OK
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [entry.name for entry in CATALOG]


def test_a_terminal_gets_a_bar_and_a_log_a_line() -> None:
    for terminal in (True, False):
        written = io.StringIO()
        console = Console(file=written, force_terminal=terminal, width=120)
        progress = RichProgress(console)
        progress.start("downloading weights", 2_000_000)
        progress.advance(1_000_000)
        progress.note("a note [with brackets]")
        progress.finish()
        progress.finish()
        assert "downloading weights" in written.getvalue()
        assert "a note [with brackets]" in written.getvalue()
        assert ("1.0/2.0 MB" in written.getvalue()) is terminal


def test_a_growing_folder_is_progress(tmp_path: Path) -> None:
    import time

    class Count(RichProgress):
        total = 0

        def advance(self, num_bytes: int) -> None:
            self.total += num_bytes

    progress = Count(Console(file=io.StringIO()))
    (tmp_path / "before").write_bytes(b"x" * 7)
    with watch_folder(tmp_path, progress):
        (tmp_path / "during").write_bytes(b"x" * 5000)
        deadline = time.monotonic() + 30
        while progress.total < 5000 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert progress.total == 5000
