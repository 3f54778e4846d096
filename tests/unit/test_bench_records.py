"""Records hold the rules of evidence, and their files survive interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from workbench.bench import records as records_module
from workbench.bench.metrics import RequestSample, RoundSample
from workbench.bench.records import STATUSES, Record, ResultStore, defer_interrupt

ROUND = RoundSample(2.0, (RequestSample("a", "", 3, 2, 0.0, 0.0, 1.0, 2.0, (1, 1), (1.0,)),))


def make_record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        "run_id": "run1",
        "variant": "engine",
        "kind": "engine",
        "status": "OK",
        "verdict": "exact",
        "workload": {"name": "chat", "digest": "d1"},
        "environment": {"hardware_slug": "cpu_2c"},
        "load": {"settings": {"name": "closed", "concurrency": 1}},
    }
    return Record(**{**values, **changes})


@pytest.mark.parametrize("verdict", ["FAILED", "INVALID"])
@pytest.mark.parametrize(
    "speed",
    [
        {"metrics": {"output_tok_s": {"value": 1.0}}},
        {"speedup": 1.2, "baseline": "base"},
        {"ci95": (1.0, 2.0)},
        {"p_value": 0.01},
        {"compared": {"hf": {"speedup": 2.0}}},
        {"roofline": {"mbu": 0.5}},
        {"samples": (ROUND,)},
    ],
)
def test_a_failed_record_cannot_carry_speed(verdict: str, speed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="speed is void"):
        make_record(status="ERROR", verdict=verdict, **speed)
    assert make_record(status="ERROR", verdict=verdict).speedup is None


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="OK"):
        make_record(status="OK", verdict="FAILED")
    with pytest.raises(ValueError, match="cannot go with"):
        make_record(status="ERROR", verdict="exact")
    with pytest.raises(ValueError, match="Valid: OK"):
        make_record(status="GOOD")
    with pytest.raises(ValueError, match="verdict"):
        make_record(verdict="fine")
    with pytest.raises(ValueError, match="name its baseline"):
        make_record(speedup=1.5)
    make_record(status="INTERRUPTED", verdict="exact", metrics={})


def test_append_and_read_again(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results", "cpu_2c")
    first = make_record(
        metrics={"output_tok_s": {"value": 3.5}}, samples=(ROUND,), baseline="hf", speedup=1.5,
        ci95=(1.1, 2.0), memory={"peak_memory_bytes": 5}, counters={"bad": float("nan")},
    )  # fmt: skip
    path = store.append(first)
    store.append(make_record(variant="two"))
    assert path.name.startswith("cpu_2c_") and path.suffix == ".jsonl"
    assert time.strftime("%Y-%m-%d") in path.name
    lines = path.read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["counters"] == {"bad": None}
    records, problems = store.read()
    assert problems == [] and [r.variant for r in records] == ["engine", "two"]
    assert records[0] == replace(first, counters={"bad": None})


def test_bad_lines_hide_no_record(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, "x")
    path = store.append(make_record(variant="one"))
    with path.open("ab") as file:
        file.write(b"[1]\n\xff\xfe\n{}\n")
        newer = {**make_record().to_dict(), "schema": 2}
        file.write(json.dumps(newer).encode() + b"\n" + b'{"schema": 1, "run_id": "br')
    store.append(make_record(variant="two"))
    with path.open("ab") as file:
        file.write(b'{"schema": 1, "tail')
    records, problems = store.read()
    assert [r.variant for r in records] == ["one", "two"]
    assert len(problems) == 6
    assert all(str(path) in problem for problem in problems)


def test_a_line_is_one_write_and_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    synced: list[int] = []
    real_write, real_sync = os.write, os.fsync

    def write(fd: int, data: bytes) -> int:
        writes.append(data)
        return real_write(fd, data)

    def sync(fd: int) -> None:
        synced.append(fd)
        real_sync(fd)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "fsync", sync)
    ResultStore(tmp_path).append(make_record())
    assert len(writes) == 1 and len(synced) == 1
    assert writes[0].endswith(b"\n") and writes[0].count(b"\n") == 1


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ResultStore(tmp_path)
    path = store.append(make_record())
    before = path.read_bytes()
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[: len(data) // 2]))
    with pytest.raises(OSError, match="could be written"):
        store.append(make_record(variant="two"))
    assert path.read_bytes() == before


def test_interrupt_waits_for_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write

    def interrupted_write(fd: int, data: bytes) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return real_write(fd, data)

    monkeypatch.setattr(records_module.os, "write", interrupted_write)
    store = ResultStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.append(make_record())
    monkeypatch.undo()
    records, problems = store.read()
    assert len(records) == 1 and problems == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_deferring_nests_and_works_in_threads() -> None:
    with pytest.raises(KeyboardInterrupt), defer_interrupt():
        with defer_interrupt():
            signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached
    done = threading.Event()

    def work() -> None:
        with defer_interrupt():
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done.is_set()


def test_killed_writers_leave_whole_lines(tmp_path: Path) -> None:
    """Several processes append and are interrupted at some moment; every line is a record."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from tests.unit.test_bench_records import make_record\n"
        "from workbench.bench.records import ResultStore\n"
        "store = ResultStore(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "while True: store.append(make_record(resolved_config={'pad': 'x' * 20000}))\n"
    )
    root = str(Path(__file__).parents[2])
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), root],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=root,
        )
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        while sum(f.read_bytes().count(b"\n") for f in tmp_path.iterdir()) < 6:
            assert time.monotonic() < deadline, "the writers write nothing"
            time.sleep(0.02)
        for writer in writers:
            writer.send_signal(signal.SIGINT)
        for writer in writers:
            writer.wait(timeout=30)
            assert writer.stdout is not None
            writer.stdout.close()
    finally:
        for writer in writers:  # none is left behind, whatever failed
            writer.kill()
    records, problems = ResultStore(tmp_path).read()
    assert problems == [] and len(records) >= 6


def test_query_and_baseline(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    other_load = {"settings": {"name": "offline"}}
    for record in (
        make_record(variant="hf", run_id="old"),
        make_record(variant="hf", run_id="mid", load=other_load),
        make_record(variant="hf", run_id="new", workload={"name": "chat", "digest": "d2"}),
        make_record(variant="hf", run_id="bad", status="OOM", verdict="INVALID"),
    ):
        store.append(record)
    assert [r.run_id for r in store.query(variant="hf", digest="d1", status="OK")] == ["old", "mid"]
    assert [r.run_id for r in store.query(workload="chat", hardware="cpu_2c")][-1] == "bad"
    mine = make_record(baseline="hf")
    found = store.baseline_for(mine)
    assert found is not None and found.run_id == "old"
    found = store.baseline_for(replace(mine, baseline_id="mid/hf"))
    assert found is not None and found.run_id == "mid"
    assert store.baseline_for(make_record()) is None
    assert store.baseline_for(make_record(baseline="vllm")) is None
    with pytest.raises(ValueError, match="unknown record field 'colour'"):
        store.query(colour="red")


def test_every_status_has_a_meaning() -> None:
    assert all(STATUSES.values()) and "OK" in STATUSES
