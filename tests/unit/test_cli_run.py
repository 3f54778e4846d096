"""The main job on a tiny model: documents, tables, records, gates, exit status, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.helpers.engines import why_not_here
from tests.helpers.tiny_models import tiny_model
from workbench.cli.main import main
from workbench.cli.variants import plan_run
from workbench.configuration import CONF_DIR, load_markers, options_of

REPO = CONF_DIR.parent


def job(tmp_path: Path, *overrides: str, requests: int = 4) -> list[str]:
    return [
        f"model={tiny_model('llama')}",
        "workload=fixed",
        f"workload.num_requests={requests}",
        "workload.input_len=24",
        "workload.output_len=16",
        "load=offline",
        "baselines=[]",
        "bench.rounds=3",
        f"results_dir={tmp_path / 'results'}",
        *overrides,
    ]


def mixed_job(tmp_path: Path, *overrides: str) -> list[str]:
    """More requests than rows, of mixed lengths, so that they join and leave while others run."""
    return [
        f"model={tiny_model('llama')}",
        "workload=mixed",
        "workload.num_requests=6",
        "workload.min_input_len=8",
        "workload.max_input_len=40",
        "workload.min_output_len=4",
        "workload.max_output_len=24",
        "load=offline",
        "limits.max_num_seqs=2",
        "baselines=[]",
        "bench.rounds=1",
        f"results_dir={tmp_path / 'results'}",
        *overrides,
    ]


def records(tmp_path: Path) -> list[dict[str, Any]]:
    files = sorted((tmp_path / "results").rglob("*.jsonl"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def document_of(capsys: pytest.CaptureFixture[str]) -> Any:
    """The one JSON document on stdout; anything else there is an error."""
    return json.loads(capsys.readouterr().out)


def test_run_prints_one_document_with_the_promised_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = job(tmp_path, "+technique=spec_decode", "baselines=[hf_naive]", "output=json")
    assert main(["engine.drafter.min_ngram=1", *arguments]) == 0
    document = document_of(capsys)
    assert document["schema"] == 1
    assert document["exit_status"] == 0
    names = [v["name"] for v in document["variants"]]
    assert names == ["hf_naive", "engine", "engine + spec_decode"]
    for variant in document["variants"]:
        assert variant["verdict"] == "exact"
        assert variant["output_tok_s"] > 0
        assert variant["peak_memory_bytes"] > 0
        for metric in ("ttft_ms", "tpot_ms"):
            assert 0 < variant[metric]["p50"] <= variant[metric]["p99"]
    first, base, treated = document["variants"]
    assert first["baseline"] is None
    assert base["baseline"] == "hf_naive"
    assert treated["baseline"] == "engine"
    low, high = treated["ci95"]
    assert low <= treated["speedup"] <= high
    assert set(load_markers()["spec_decode"].evidence) == set(treated["evidence"])
    assert all(value > 0 for value in treated["evidence"].values())
    assert treated["counters"]["step.num_output_tokens"] == 4 * 16
    assert Path(document["figure"]).is_file()
    # One record a variant, each with its resolved configuration.
    written = records(tmp_path)
    assert [r["variant"] for r in written] == names
    assert {r["run_id"] for r in written} == {document["run_id"]}
    assert written[2]["resolved_config"]["choices"]["engine/drafter"] == "ngram"
    assert written[1]["resolved_config"]["choices"]["engine/drafter"] == "none"


def test_table_goes_to_stdout_and_records_are_appended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = job(tmp_path, "+technique=paged_attention", "bench.rounds=1")
    for run in (1, 2):
        assert main(arguments) == 0
        captured = capsys.readouterr()
        assert "paged_attention" in captured.out
        assert "blocks_alloc" in captured.out  # the column is narrow
        assert "exact" in captured.out
        written = records(tmp_path)
        assert [r["variant"] for r in written] == ["engine", "engine + paged_attention"] * run
    assert len({r["run_id"] for r in written}) == 2


def test_required_technique_stands_on_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = mixed_job(
        tmp_path, "+technique=chunked_prefill", "engine.prefill.chunk_tokens=8", "output=json"
    )
    assert main(arguments) == 0
    captured = capsys.readouterr()
    base, treated = json.loads(captured.out)["variants"]
    assert base["name"] == "engine + continuous_batching"
    assert treated["name"] == "engine + continuous_batching + chunked_prefill"
    assert treated["evidence"]["scheduler.partial_prompts"] > 0
    assert "continuous_batching" in captured.err


def test_technique_without_evidence_is_invalid_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts shorter than the chunk are never cut: the technique did not run, however fast."""
    arguments = mixed_job(tmp_path, "+technique=chunked_prefill", "output=json")
    assert main(arguments) == 1
    document = document_of(capsys)
    assert document["exit_status"] == 1
    base, treated = document["variants"]
    assert base["verdict"] == "exact"
    assert treated["verdict"] == "INVALID"
    assert treated["output_tok_s"] is None
    assert treated["speedup"] is None
    assert "partial_prompts" in treated["error"]
    assert [r["status"] for r in records(tmp_path)] == ["OK", "INVALID_EVIDENCE"]


def test_wrong_tokens_are_a_failed_gate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verifier that keeps every draft is fast, has evidence, and is wrong."""
    import torch

    from techniques.spec_decode.exact_match import ExactMatch

    verify = ExactMatch.verify

    def keeps_all(self: Any, drafts: Any, logits: Any, metadata: Any, sampler: Any) -> Any:
        accepted = verify(self, drafts, logits, metadata, sampler)
        width = drafts.token_ids.shape[1]
        if width == 0:
            return accepted
        tokens = accepted.token_ids.clone()
        kept = torch.cat([drafts.token_ids, tokens.new_full((len(tokens), 1), -1)], dim=1)
        has = (drafts.token_ids >= 0).any(1, keepdim=True)
        return type(accepted)(torch.where(has, kept, tokens), accepted.logprobs)

    monkeypatch.setattr(ExactMatch, "verify", keeps_all)
    arguments = job(tmp_path, "+technique=spec_decode", "output=json", "bench.rounds=1")
    assert main(["engine.drafter.min_ngram=1", *arguments]) == 1
    base, treated = document_of(capsys)["variants"]
    assert base["verdict"] == "exact"
    assert treated["verdict"] == "FAILED"
    assert treated["output_tok_s"] is None


@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_engine_alone_and_random_weights(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = job(tmp_path, f"weights={weights}", "output=json", "bench.rounds=1")
    assert main(arguments) == 0
    (variant,) = document_of(capsys)["variants"]
    assert variant["name"] == "engine"
    assert variant["verdict"] == "exact"


def techniques_of_preset(name: str) -> list[str]:
    node = OmegaConf.load(CONF_DIR / "preset" / f"{name}.yaml")
    return list(node.defaults[0]["/technique"])


def test_every_technique_at_once_through_the_preset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        f"model={tiny_model('llama')}",
        "preset=full",
        "workload=shared_prefix_small",
        "workload.num_groups=2",
        "workload.requests_per_group=4",
        "workload.shared_len=24",
        "workload.own_len=8",
        "load=offline",
        "limits.max_num_seqs=2",
        "baselines=[]",
        "bench.rounds=1",
        "engine.prefill.chunk_tokens=16",
        "engine.drafter.min_ngram=1",
        "engine.kv_cache.block_size=4",
        f"results_dir={tmp_path / 'results'}",
        "output=json",
    ]
    assert main(arguments) == 0
    base, treated = document_of(capsys)["variants"]
    assert treated["techniques"] == sorted(techniques_of_preset("full"))
    assert base["techniques"] == []
    assert treated["verdict"] == "exact"


# -- other commands -------------------------------------------------------------------------------


def test_both_rows_run_on_one_machine() -> None:
    """Also where a preset, which the base does without, chooses the machine."""
    plan = plan_run(["preset=gpu"])
    assert plan.base is not None
    assert plan.treatment.choices["engine/platform"] == "cuda"
    assert plan.base.choices["engine/platform"] == "cuda"
    assert plan.base.choices["engine/attention"] == "sdpa"
    chosen = plan_run(["preset=gpu", "engine/platform=cpu"])
    assert chosen.base is not None and chosen.base.choices["engine/platform"] == "cpu"


def test_options_of_a_required_technique_hold_for_both_rows() -> None:
    """What the measured technique alone brings does not."""
    plan = plan_run(["+technique=eagle_tree", "engine.drafter.head=/a/head"])
    assert plan.base is not None and plan.supplied == ("eagle",)
    assert plan.base.components["drafter"]["head"] == "/a/head"
    assert plan.base.components["drafter"]["tree"] is False
    assert plan.treatment.components["drafter"]["tree"] is True
    alone = plan_run(["+technique=eagle", "engine.drafter.head=/a/head"])
    assert alone.base is not None and "head" not in alone.base.components["drafter"]


def test_list_shows_every_technique(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "output=json"]) == 0
    document = document_of(capsys)
    assert [entry["name"] for entry in document] == options_of("technique")
    for entry in document:
        marker = load_markers()[entry["name"]]
        assert entry["slots"] == list(marker.slots)
        assert entry["requires"] == list(marker.requires)
        assert entry["conflicts"] == list(marker.conflicts)
        assert entry["losslessness"] in ("exact", "distributional", "lossy")
        assert entry["paper"]
    assert main(["list"]) == 0
    table = capsys.readouterr().out
    for name in options_of("technique"):
        assert name in table


def test_doctor_says_what_runs_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "output=json"]) == 0
    document = document_of(capsys)
    assert document["schema"] == 1
    assert document["platforms"]["cpu"] == []
    assert set(document["platforms"]) == set(options_of("engine/platform"))
    assert all(isinstance(r, str) and r for rs in document["platforms"].values() for r in rs)
    assert list(document["techniques"]) == options_of("technique")
    if not torch.cuda.is_available():
        # In the words of an engine that refuses, which may have more to say of its own precision.
        for name, reasons in document["techniques"].items():
            refused = why_not_here(name)
            assert bool(reasons) == bool(refused), name
            parts = [part for reason in reasons for part in reason.rstrip(".").split("; ")]
            assert all(part in (refused or "") for part in parts), name
    assert document["ceilings"]["copy_bytes_s"] > 0
    assert all(rate > 0 for rate in document["ceilings"]["matmul_flops"].values())
    assert document["environment"]
    assert main(["doctor"]) == 0
    assert "platform cpu" in capsys.readouterr().out


def test_cfg_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cfg", "+technique=spec_decode", "output=json"]) == 0
    document = document_of(capsys)
    assert document["engine"]["drafter"]["_target_"] == "techniques.spec_decode.Ngram"
    assert main(["--cfg"]) == 0
    assert "workbench.slots.drafter.NoDrafter" in capsys.readouterr().out


def test_report_draws_recorded_runs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(job(tmp_path, "bench.rounds=1")) == 0
    capsys.readouterr()
    (file,) = (tmp_path / "results").rglob("*.jsonl")
    assert main(["report", str(file), "output=json"]) == 0
    assert Path(document_of(capsys)["figure"]).is_file()


# -- as a process ---------------------------------------------------------------------------------


@contextlib.contextmanager
def process(arguments: list[str], cache_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """The command as a process with a live progress line; gone at the end whatever happens."""
    env = {"OMP_NUM_THREADS": "1", "FORCE_COLOR": "1", "XDG_CACHE_HOME": str(cache_dir)}
    started = subprocess.Popen(
        [sys.executable, "-m", "workbench", *arguments],
        cwd=REPO,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def test_process_exits_with_the_status_and_keeps_stdout_clean(
    tmp_path: Path, cache_dir: Path
) -> None:
    with process([*job(tmp_path, "output=json"), "+technique=nope"], cache_dir) as run:
        out, err = run.communicate(timeout=300)
    assert run.returncode == 2
    assert json.loads(out)["exit_status"] == 2
    assert "nope" in err
    assert "Traceback" not in err


def test_ctrl_c_leaves_readable_records(tmp_path: Path, cache_dir: Path) -> None:
    """Interrupted while measuring: what was measured stands in whole lines, the rest says so."""
    assert main(job(tmp_path, "bench.rounds=1")) == 0
    before = records(tmp_path)
    arguments = job(tmp_path, "+technique=paged_attention", "bench.rounds=100000", "output=json")
    with process(arguments, cache_dir) as run:
        assert run.stderr is not None
        seen = ""
        while "round 3/100000" not in seen:
            character = run.stderr.read(1)
            assert character, f"ended before its third round: {seen[-2000:]}"
            seen += character
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=300)
    assert run.returncode == 130, err[-2000:]
    assert "Traceback" not in err
    assert "interrupted" in err
    assert json.loads(out)["exit_status"] == 130
    (file,) = (tmp_path / "results").rglob("*.jsonl")
    assert file.read_text().endswith("\n")
    written = records(tmp_path)
    assert written[: len(before)] == before
    new = written[len(before) :]
    assert [r["variant"] for r in new] == ["engine", "engine + paged_attention"]
    assert {r["status"] for r in new} == {"INTERRUPTED"}
    assert all(r["num_rounds"] >= 1 for r in new)
