"""Where steps' time goes: parts stamped as they run, kinds, a bounded sample, trace and report."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.engines import mixed_prompts, tiny_engine
from tests.helpers.prepared import PREPARED
from tests.helpers.tiny_models import tiny_model
from workbench.bench.records import Record, ResultStore
from workbench.bench.timeline import MAX_SAMPLE_BYTES, chrome_trace, kind_of, summarize, timeline_of
from workbench.bench.timeline_report import read_timelines, timeline_table
from workbench.cli.main import main
from workbench.core.sampling import SamplingParams
from workbench.core.step import StepRecord

CONTINUOUS = ("engine/kv_cache=paged", "engine/scheduler=continuous", "engine/prefill=chunked")


def step_of(index: int = 0, **fields: Any) -> StepRecord:
    """A step of 100 us, 90 of them on the device, 100 us after the one before."""
    began = 10.0 + index * 1e-4
    counts = dict.fromkeys(
        (
            "num_prompt_tokens",
            "num_cached_tokens",
            "num_padded_tokens",
            "num_draft_tokens",
            "num_accepted_tokens",
            "num_idle_rows",
            "num_context_tokens",
        ),
        0,
    )
    values: dict[str, Any] = {
        **counts,
        "step": index,
        "num_requests": 2,
        "num_scheduled_tokens": 2,
        "num_output_tokens": 2,
        "num_single_tokens": 2,
        "graph_mode": "eager",
        "host_us": 10.0,
        "device_us": 90.0,
        "parts_us": {"schedule": 10.0, "model": 90.0},
        "starts_s": {"schedule": began, "model": began + 1e-5},
        "device_start_s": began + 1e-5,
    }
    return StepRecord(**{**values, **fields})


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "decode"),
        ({"graph_mode": "graph", "num_padded_tokens": 6}, "decode graph 8"),
        ({"num_scheduled_tokens": 9, "num_single_tokens": 1}, "mixed"),
        ({"num_scheduled_tokens": 9, "num_single_tokens": 0}, "prefill"),
        ({"num_scheduled_tokens": 6, "num_single_tokens": 0, "num_draft_tokens": 4}, "verify"),
        ({"num_scheduled_tokens": 6, "num_single_tokens": 1, "num_draft_tokens": 4}, "verify"),
    ],
)
def test_kind_of_a_step(fields: dict[str, Any], kind: str) -> None:
    assert kind_of(step_of(**fields)) == kind


def test_sums_are_those_of_the_steps() -> None:
    prefill = {"num_scheduled_tokens": 9, "num_single_tokens": 0}
    steps = [step_of(0, **prefill), *(step_of(i) for i in range(1, 5))]
    steps[3].parts_us["model"] = steps[3].device_us = 80.0
    found = summarize(steps)
    assert list(found) == ["decode", "prefill"], "what took longest comes first"
    decode = found["decode"]
    assert (decode["steps"], decode["tokens"], decode["requests"]) == (4, 8, 8)
    assert decode["total_us"] == {"host": 40.0, "device": 350.0, "schedule": 40.0, "model": 350.0}
    assert decode["median_us"]["model"] == 90.0
    # One step's end was 10 us earlier, and nobody had the time until the next one.
    assert decode["wall_us"] == pytest.approx(390.0, abs=0.2)
    assert sum(k["share"] for k in found.values()) == pytest.approx(1.0, abs=1e-3)
    assert timeline_of([]) is None


def test_overlapping_steps_do_not_count_a_moment_twice() -> None:
    steps = [step_of(i) for i in range(3)]
    for step in steps[1:]:  # planned 50 us before the step ahead is through
        step.starts_s["schedule"] -= 5e-5
    assert sum(k["wall_us"] for k in summarize(steps).values()) == pytest.approx(300.0, abs=0.2)


def test_a_sample_is_bounded_and_says_so() -> None:
    steps = [step_of(i) for i in range(5000)]
    timeline = timeline_of(steps)
    assert timeline is not None
    sample = timeline["sample"]
    assert timeline["num_steps"] == 5000 == timeline["kinds"]["decode"]["steps"]
    assert 100 < sample["num_steps"] == len(sample["rows"]) < 5000
    assert 0.8 * MAX_SAMPLE_BYTES < len(json.dumps(sample["rows"])) <= MAX_SAMPLE_BYTES
    numbers = [row[0] for row in sample["rows"]]
    assert numbers[0] == 0 and 2500 in numbers and numbers == sorted(set(numbers))
    whole = timeline_of(steps[:50])
    assert whole is not None and whole["sample"]["num_steps"] == 50


def test_trace_has_the_parts_where_they_were() -> None:
    timeline = timeline_of([step_of(i) for i in range(3)])
    assert timeline is not None
    events = chrome_trace({"engine": timeline})["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    host = [(e["name"], e["ts"], e["dur"]) for e in spans if e["tid"] == 1]
    assert host[:3] == [("schedule", 0.0, 10.0), ("model", 10.0, 90.0), ("schedule", 100.0, 10.0)]
    device = [(e["name"], e["ts"], e["dur"]) for e in spans if e["tid"] == 2]
    assert device == [("decode", 100.0 * i + 10, 90.0) for i in range(3)]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"engine"}


def spans_of(step: StepRecord) -> list[tuple[float, float, str]]:
    found = [
        (start, start + step.parts_us[part] * 1e-6, part) for part, start in step.starts_s.items()
    ]
    return sorted(found)


@pytest.mark.parametrize("loop", ["sync", "overlapped"])
@pytest.mark.parametrize("prepared", [False, True])
def test_stamps_of_an_engine_are_in_order(loop: str, prepared: bool) -> None:
    overrides = PREPARED if prepared else ()
    engine = tiny_engine(*CONTINUOUS, *overrides, f"engine/loop={loop}")
    engine.generate(mixed_prompts(6, longest=30), SamplingParams(max_tokens=9, ignore_eos=True))
    steps = list(engine.steps)
    assert len(steps) > 9
    all_spans = []
    for step in steps:
        spans = spans_of(step)
        names = [name for _, _, name in spans]
        expected = ["schedule", "prepare", "model", "sample", "queue", "wait", "draft", "collect"]
        if loop == "overlapped":
            expected.insert(expected.index("wait"), "assume")
        assert names == [*expected, "update", "output"]
        assert set(step.parts_us) == {*names, "other"}
        all_spans += spans
        until = step.starts_s["wait"] + step.parts_us["wait"] * 1e-6
        assert step.device_start_s + step.device_us * 1e-6 == pytest.approx(until, abs=1e-6)
        at_model = sum(step.parts_us[p] for p in ("model", "sample", "wait"))
        assert step.host_us == pytest.approx(sum(step.parts_us.values()) - at_model)
    # One host did all of it, so no two parts of whatever steps ran at once.
    for (_, end, _), (start, _, _) in pairwise(sorted(all_spans)):
        assert end <= start + 1e-6
    # A device runs one step after the other.
    for a, b in pairwise(steps):
        assert a.device_start_s + a.device_us * 1e-6 <= b.device_start_s + 1e-6
    if loop == "overlapped":
        ahead = [b.starts_s["model"] < a.starts_s["wait"] for a, b in pairwise(steps)]
        assert sum(ahead) > len(ahead) // 2, "the next step was queued before this one's tokens"
    kinds = summarize(steps)
    assert any(kind.startswith("decode graph") for kind in kinds) == prepared
    assert {"prefill"} <= set(kinds)
    first, last = all_spans[0][0], max(end for _, end, _ in all_spans)
    walls = sum(kind["wall_us"] for kind in kinds.values())
    assert 0.5 * (last - first) * 1e6 < walls <= (last - first) * 1e6 * 1.001


def test_drafted_steps_are_told_apart() -> None:
    engine = tiny_engine(techniques=["spec_decode"])
    engine.generate(mixed_prompts(4), SamplingParams(max_tokens=20, ignore_eos=True))
    assert "verify" in summarize(list(engine.steps))


# -- the report -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    arguments = [
        f"model={tiny_model('llama')}",
        "workload=fixed",
        "workload.num_requests=2",
        "workload.input_len=8",
        "workload.output_len=6",
        "bench.rounds=1",
        "bench.warmup=0",
        "baselines=[]",
        f"results_dir={folder}",
        "output=json",
    ]
    assert main(arguments) == 0
    (file,) = folder.glob("*.jsonl")
    return file


def test_a_run_s_record_holds_its_timeline(record_file: Path) -> None:
    (record,), problems = ResultStore(record_file.parent).read(record_file)
    assert not problems
    assert record.timeline is not None
    assert record.timeline["num_steps"] == record.counters["step.steps"]
    tokens = sum(kind["tokens"] for kind in record.timeline["kinds"].values())
    assert tokens == record.counters["step.num_scheduled_tokens"]
    failed = {**record.to_dict(), "verdict": "FAILED", "status": "FAILED_CORRECTNESS"}
    for name in ("metrics", "steady", "roofline", "speedup", "compared", "word"):
        failed[name] = None
    failed["samples"] = []
    with pytest.raises(ValueError, match="timeline"):
        Record.from_dict(failed)


def test_report_shows_the_timeline_and_writes_a_trace(
    record_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    trace = tmp_path / "trace.json"
    assert main(["report", "--timeline", str(record_file), "--trace", str(trace)]) == 0
    shown = capsys.readouterr().out
    assert "prefill" in shown and "decode" in shown and "device" in shown
    assert f"{record_file.stem}_timeline.png" in shown
    assert record_file.with_name(f"{record_file.stem}_timeline.png").stat().st_size > 10_000
    names = {e["name"] for e in json.loads(trace.read_text())["traceEvents"]}
    assert {"schedule", "model", "wait", "prefill", "decode"} <= names
    assert main(["report", "--timeline", str(record_file), "output=json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["timelines"]) == ["engine"] and document["trace"] is None


def test_report_shows_the_ledger(record_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["report", "--memory", str(record_file)]) == 0
    shown = capsys.readouterr().out
    for text in ("weights", "kv pool", "unexplained", "peak of the process", "rows of logits"):
        assert text in shown
    assert main(["report", "--memory", str(record_file), "output=json"]) == 0
    ledger = json.loads(capsys.readouterr().out)["ledgers"]["engine"]
    assert ledger["predicted"]["decode_step"] == 0 and ledger["device"] == {}


def test_latest_is_the_newest_file_of_the_results(
    record_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--timeline", "latest"]) == 2
    assert "there is no record in" in capsys.readouterr().err
    folder = tmp_path / "results" / "local"
    folder.mkdir(parents=True)
    (folder / "a_2026-01-01.jsonl").write_bytes(record_file.read_bytes())
    assert main(["report", "--timeline", "latest"]) == 0
    assert "a_2026-01-01_timeline.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timelin", "FILE"], "Did you mean '--timeline'"),
        (["--timeline", "--memory", "FILE"], "one of --timeline and --memory"),
        (["--timeline"], "needs one record file"),
        (["--memory", "FILE", "--trace", "x.json"], "--trace writes the steps of --timeline"),
        (["--timeline", "FILE", "--trace"], "--trace needs the file"),
    ],
)
def test_wrong_commands_are_told(
    record_file: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(record_file) if text == "FILE" else text for text in arguments]
    assert main(["report", *given]) == 2
    assert message in capsys.readouterr().err


def test_records_without_steps_are_told(tmp_path: Path) -> None:
    file = tmp_path / "old.jsonl"
    file.write_text('{"schema": 1}\nbroken')
    with pytest.raises(ValueError, match="holds no timeline"):
        read_timelines(file)
    kinds = summarize([step_of(i) for i in range(4)])
    peak = {"kind": "peak", "model": "m", "workload": "bs1", "steps": kinds}
    file.write_text(json.dumps(peak) + "\n")
    timelines = read_timelines(file)
    assert timelines == {"m bs1": {"kinds": kinds, "sample": None}}
    assert timeline_table(kinds, "m bs1").row_count == 1 + len(kinds["decode"]["total_us"])
    assert main(["report", "--timeline", str(file), "--trace", str(tmp_path / "t.json")]) == 2
