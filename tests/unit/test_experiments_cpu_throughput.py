"""``experiments.cpu_throughput``: a case, a row or a name that is wrong is never passed over."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experiments import cpu_throughput
from tests.helpers.fake_backend import FakeBackend, FakeClock, make_requests, reference
from workbench.bench.load import Closed
from workbench.bench.records import ResultStore
from workbench.bench.run import Variant, VariantResult, run_bench
from workbench.core.errors import ConfigError


def wrong(request: object) -> tuple[int, ...]:
    return (1,) * 8


def fake_measure(folder: Path, seen: list[Sequence[str]], **of_rung: Any) -> Any:
    """What a case measures: two rungs, the faster one with ``of_rung``, and an engine."""

    def measure(overrides: Sequence[str], command: str) -> list[VariantResult]:
        seen.append(overrides)
        clock = FakeClock()

        def variant(name: str, baseline: str | None, kind: Any, **options: Any) -> Variant:
            return Variant(name, lambda: FakeBackend(clock, **options), baseline, kind=kind)

        return run_bench(
            [
                variant("hf_naive", None, "baseline", step_s=0.04),
                variant("hf_other", "hf_naive", "baseline", **{"step_s": 0.02, **of_rung}),
                variant("engine", "hf_naive", "engine", step_s=0.005),
            ],
            make_requests(4),
            partial(Closed, concurrency=2),
            reference=reference,
            clock=clock,
            store=ResultStore(folder, "fake"),
            command=command,
        )

    return measure


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str, **of_rung: Any) -> Any:
    seen: list[Sequence[str]] = []
    monkeypatch.setattr(cpu_throughput, "measure", fake_measure(folder, seen, **of_rung))
    return cpu_throughput.main(arguments), seen


def test_every_case_is_measured_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, seen = run(tmp_path, monkeypatch, "seed=3")
    assert status == 0
    assert [tuple(overrides[:-1]) for overrides in seen] == [
        case.overrides for case in cpu_throughput.CASES
    ]
    assert all(overrides[-1] == "seed=3" for overrides in seen)
    records, _ = ResultStore(tmp_path).read()
    assert {r.command for r in records} == {"python -m experiments.cpu_throughput seed=3"}
    assert len(list(tmp_path.glob("*.png"))) == len(seen)
    table = capsys.readouterr().out.partition("best rung of Transformers")[2]
    assert "hf_other" in table and "4.00x" in table


def test_only_some_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, seen = run(tmp_path, monkeypatch, "only=batch 8,batch 1")
    assert status == 0 and len(seen) == 2
    with pytest.raises(ConfigError, match=r"unknown case 'batch8'\. Did you mean 'batch 8'"):
        run(tmp_path, monkeypatch, "only=batch8")


@pytest.mark.parametrize("of_rung", [{"tokens": wrong}, {"step_s": 0.005}])
def test_a_row_that_failed_or_a_target_that_is_missed_makes_the_status_1(
    of_rung: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, _ = run(tmp_path, monkeypatch, "only=batch 8", **{"step_s": 0.02, **of_rung})
    assert status == 1
    table = capsys.readouterr().out.partition("best rung of Transformers")[2]
    assert ("hf_other: FAILED" in table) == ("tokens" in of_rung)
