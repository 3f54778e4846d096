"""The notebook on records: valid, without outputs, and it runs on the records of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.fake_backend import FakeBackend, FakeClock, make_requests, reference
from workbench.bench.load import Offline
from workbench.bench.metrics import METRICS
from workbench.bench.records import ResultStore
from workbench.bench.run import BenchSettings, Variant, run_bench
from workbench.configuration import CONF_DIR

NOTEBOOK = CONF_DIR.parent / "notebooks" / "records.ipynb"


def code_cells() -> list[tuple[str, str]]:
    notebook = json.loads(NOTEBOOK.read_text())
    cells = notebook["cells"]
    return [(c["id"], "".join(c["source"])) for c in cells if c["cell_type"] == "code"]


def test_notebook_is_valid_and_holds_no_output() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", cell["id"])
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"outputs", "execution_count"}
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
        assert set(cell) == keys
    for name, source in code_cells():
        compile(source, name, "exec")


def write_records(folder: Path) -> Path:
    """Records of two good rows and one whose output is wrong."""
    clock = FakeClock()

    def backend(name: str, step_s: float, **settings: Any) -> Any:
        return lambda: FakeBackend(clock, name, step_s, noise=0.05, **settings)

    variants = [
        Variant("base", backend("base", 0.02)),
        Variant("quick", backend("quick", 0.01, seed=1), baseline="base"),
        Variant("wrong", backend("wrong", 0.01, tokens=lambda r: [0] * r.max_tokens)),
    ]
    results = run_bench(
        variants,
        make_requests(8),
        Offline,
        reference=reference,
        settings=BenchSettings(seed=0),
        workload={"name": "fake", "digest": "0"},
        store=ResultStore(folder, "fake"),
        clock=clock,
    )
    assert [r.record.status for r in results] == ["OK", "OK", "FAILED_CORRECTNESS"]
    assert results[0].record_file is not None
    return results[0].record_file


def test_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    file = write_records(tmp_path)
    shown: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(len(plt.gcf().axes)))
    scope: dict[str, Any] = {"__name__": "__main__"}
    for name, source in code_cells():
        if "\nRECORDS = None\n" in source:
            source = source.replace("\nRECORDS = None\n", f"\nRECORDS = {str(file)!r}\n")
        exec(compile(source, name, "exec"), scope)
    plt.close("all")
    assert scope["RECORDS"] == file
    assert shown == [1, sum(metric.is_distribution for metric in METRICS.values())]
    records = {record.variant: record for record in ResultStore(tmp_path).read(file)[0]}
    table = scope["table"]
    assert list(table.index) == list(records)
    assert table.loc["wrong", ["output tok/s", "speed-up"]].isna().all()
    quick = records["quick"]
    assert quick.metrics is not None and quick.ci95 is not None
    assert table.loc["quick", "output tok/s"] == quick.metrics["output_tok_s"]["value"]
    (name, speedup, again, interval, interval_again) = scope["again"][0]
    assert (name, speedup, tuple(interval)) == ("quick", quick.speedup, quick.ci95)
    assert again == pytest.approx(speedup, rel=1e-4)
    assert interval_again == pytest.approx(interval, rel=1e-3)
