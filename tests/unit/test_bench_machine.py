"""Environment and ceilings."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from workbench.bench import roofline
from workbench.bench.environment import (
    collect_environment,
    git_state,
    hardware_slug,
    package_versions,
)
from workbench.bench.jsonsafe import to_json
from workbench.bench.roofline import Ceilings, measure_ceilings, utilisation

CEILINGS = Ceilings("cpu", "x", "2", 1, 8e9, 10e9, {"bfloat16": 1e12})


def test_environment_says_what_ran(tmp_path: Path) -> None:
    found = collect_environment("cpu", tmp_path)
    assert found.num_cpus >= 1 and found.ram_bytes > 2**28
    assert found.packages["torch"] == torch.__version__ and "numpy" in package_versions()
    assert found.num_threads == torch.get_num_threads()
    assert (found.git_commit, found.git_dirty) == (None, None), "outside a checkout"
    json.loads(to_json(found.to_dict()))


def test_slug_fits_a_file_name() -> None:
    slug = hardware_slug("cpu")
    assert slug == slug.lower() and not set(slug) & set("/ \\:()@")


def test_git_state(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        name = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    assert git_state(tmp_path) == (None, None), "no commit yet"
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    commit, is_dirty = git_state(tmp_path)
    assert commit is not None and len(commit) >= 40 and is_dirty is False
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "r.jsonl").write_text("{}")
    assert git_state(tmp_path)[1] is False, "records are no change of the code"
    (tmp_path / "sub").mkdir()
    (tmp_path / "new.py").write_text("x")
    assert git_state(tmp_path / "sub") == (commit, True)


def test_a_copy_may_name_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_state(tmp_path) == (None, None)
    monkeypatch.setenv("WORKBENCH_COMMIT", "c0ffee")
    for folder in (tmp_path, Path(__file__).parent):  # the second may lie in a checkout
        assert git_state(folder) == ("c0ffee", None), "its changes are unknown, not absent"


def test_ceilings_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(*arguments: object) -> Ceilings:
        calls.append(arguments)
        return replace(CEILINGS, copy_bytes_s=float(len(calls)))

    monkeypatch.setattr(roofline, "_measure", fake)
    first = measure_ceilings("cpu", cache_dir=tmp_path)
    assert measure_ceilings("cpu", cache_dir=tmp_path) == first and len(calls) == 1
    assert measure_ceilings("cpu", quick=False, cache_dir=tmp_path).copy_bytes_s == 2
    assert measure_ceilings("cpu", refresh=True, cache_dir=tmp_path).copy_bytes_s == 3
    assert measure_ceilings("cpu", cache_dir=tmp_path).copy_bytes_s == 3
    for file in tmp_path.iterdir():
        file.write_text("{broken")
    assert measure_ceilings("cpu", cache_dir=tmp_path).copy_bytes_s == 4
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert measure_ceilings("cpu", cache_dir=blocked).copy_bytes_s == 5, "no cache is no error"


def test_real_ceilings_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    copy, read = roofline._bandwidth(torch.device("cpu"), 2**24, 0.02)
    assert 1e8 < copy < 1e13 and 1e8 < read < 1e13


def test_utilisation_by_hand() -> None:
    counters = {"bytes_moved": 20e9, "flops": 1e12, "model_seconds": 4.0}
    found = utilisation(counters, 5.0, CEILINGS, "torch.bfloat16")
    assert found is not None
    assert found["mbu"] == pytest.approx(0.5) and found["mfu"] == pytest.approx(0.25)
    assert found["basis"] == "model time"
    del counters["model_seconds"], counters["flops"]
    found = utilisation(counters, 5.0, CEILINGS, "float32")
    assert found is not None and found["mbu"] == pytest.approx(0.4) and found["mfu"] is None
    assert found["basis"] == "wall time"
    assert utilisation({}, 5.0, CEILINGS, "float32") is None
    no_ceiling = utilisation(counters, 5.0, None, "float32")
    assert no_ceiling is not None and no_ceiling["mbu"] is None and no_ceiling["bytes_s"] == 4e9
