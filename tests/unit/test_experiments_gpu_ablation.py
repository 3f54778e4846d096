"""``experiments.gpu_ablation``: which rows there are, and that none goes missing, on the CPU."""

from __future__ import annotations

import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from experiments import ablation_rungs, command, gpu_ablation
from experiments.ablation_report import result_tables, rung_table
from experiments.ablation_variants import Plan, Variant, plan_ablation
from tests.helpers.tiny_models import tiny_model
from workbench.assemble import SLOTS
from workbench.baselines.hf_model import versions
from workbench.configuration import compose_config, load_markers
from workbench.core.errors import ConfigError

BASE = ("continuous_batching", "paged_attention")
MAX_POSITIONS = 1024  # the probes are up to 600 tokens long


def plan(preset: str, *techniques: str, overrides: tuple[str, ...] = ()) -> Plan:
    return plan_ablation(preset, BASE, techniques, overrides, load_markers())


def by_name(found: Plan) -> dict[str, Variant]:
    rows = {v.name: v for v in found.variants}
    assert len(rows) == len(found.variants)
    return rows


# -- the rows -----------------------------------------------------------------------------------


def test_the_preset_s_techniques_are_each_added_and_left_out() -> None:
    found = plan("gpu", "preset", "skinny_gemm")
    rows = by_name(found)
    whole = compose_config(["preset=gpu"])
    full = set(whole.techniques)
    assert set(rows["gpu"].techniques) == full
    kinds: dict[str, set[str]] = {}
    for row in found.variants:
        kinds.setdefault(row.kind, set()).add(row.technique)
    assert kinds["add_one"] == (full | {"skinny_gemm"}) - set(BASE)
    assert kinds["leave_one_out"] == full
    assert kinds.get("add_to_full", set()) == {"skinny_gemm"} - full
    assert found.overrides == ("engine/platform=cuda",)


@pytest.mark.parametrize("preset", ["gpu", "full"])
def test_every_row_has_what_it_requires_and_one_that_differs_in_its_technique_alone(
    preset: str,
) -> None:
    found = plan(preset, "preset", "cuda_graphs", "longest_prefix_match", "skinny_gemm")
    rows = by_name(found)
    markers = load_markers()
    for row in found.variants:
        assert not [n for n in row.techniques if markers[n].lacking(row.techniques)]
        if row.technique:
            partner = rows[row.against]
            assert set(row.techniques) ^ set(partner.techniques) == {row.technique}
            changed = {row.technique, *row.along}
            assert set(row.techniques) ^ set(rows[row.end].techniques) == changed


def test_what_is_required_comes_along_and_what_requires_goes_along() -> None:
    rows = by_name(plan("gpu", "cuda_graphs", "triton_attention", "radix_cache"))
    graphs = rows["base + triton_attention + cuda_graphs"]
    assert (graphs.along, graphs.against) == (("triton_attention",), "base + triton_attention")
    attention = rows["gpu - cuda_graphs - triton_attention"]
    assert (attention.along, attention.against) == (("cuda_graphs",), "gpu - cuda_graphs")
    assert rows["gpu - radix_cache"].against == "gpu"


def test_a_row_to_compare_with_is_added_where_it_lacks() -> None:
    rows = by_name(plan("gpu", "cuda_graphs"))
    assert rows["base + triton_attention"].kind == "between"
    assert list(rows) == [
        "base", "base + triton_attention", "base + triton_attention + cuda_graphs",
        "gpu", "gpu - cuda_graphs",
    ]  # fmt: skip


def test_of_alternatives_the_preset_s_own_is_supplied() -> None:
    rows = by_name(plan("full", "cascade_attention"))
    assert rows["base + radix_cache + cascade_attention"].along == ("radix_cache",)


def test_rows_without_techniques_compose_to_the_preset() -> None:
    found = plan("gpu", "overlap", overrides=("engine/platform=cpu",))
    assert found.overrides == ("engine/platform=cpu",)
    full = by_name(found)["gpu"]
    whole = compose_config(["preset=gpu", "engine/platform=cpu"])
    assert compose_config([*found.overrides, *full.override]).components == whole.components


@pytest.mark.parametrize(
    ("techniques", "base", "overrides", "message"),
    [
        (("overlapp",), BASE, (), "unknown technique 'overlapp'. Did you mean 'overlap'"),
        (("overlap",), ("radix_cache",), (), "base=radix_cache requires paged_attention"),
        (("overlap",), BASE, ("+technique=overlap",), "base= and techniques=, not from"),
        (("overlap",), BASE, ("preset=full",), "base= and techniques=, not from"),
    ],
)
def test_wrong_names_are_told(
    techniques: tuple[str, ...], base: tuple[str, ...], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_ablation("gpu", base, techniques, overrides, load_markers())


# -- a run --------------------------------------------------------------------------------------


def run(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """A run on a tiny model; its exit status and records."""
    status = gpu_ablation.main(
        [
            f"model={tiny_model('llama', max_position_embeddings=MAX_POSITIONS)}",
            "engine/platform=cpu",
            "preset=full",
            "workloads=bs1",
            "output_len=3",
            "probes=3",
            "epsilon=0.0001",
            f"results_dir={folder}",
            *arguments,
        ]
    )
    (file,) = folder.glob("*_gpu_ablation.jsonl")
    return status, [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("ablation")
    tiny_model("llama", max_position_embeddings=MAX_POSITIONS)
    gc.freeze()  # what that imported; every engine and every run of a rung collects garbage
    return *run(folder, "techniques=radix_cache,triton_attention"), folder


def named(records: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    return {r.get("workload", "-"): r for r in records if r["name"] == name}


def test_every_row_and_load_is_in_one_set_of_records(
    measured: tuple[int, list[dict[str, Any]], Path],
) -> None:
    _, records, folder = measured
    rows = ["base", "base + radix_cache", "base + triton_attention", "full", "full - radix_cache"]
    rows += ["full + triton_attention", "base, again", "full, again", "hf_naive", "hf_compiled"]
    assert list(dict.fromkeys(r["name"] for r in records)) == rows
    assert len({r["run_id"] for r in records}) == 1
    assert {r["shortened_to"] for r in records} == {3}
    ok = [r for r in records if r["status"] == "ok"]
    for record in ok:
        assert record["check"]["passed"] and record["environment"]["hardware_slug"]
        short = record["workload"] == "bs1"
        assert record["output_tokens"] == (3 if short else 128)
        assert len(record["values"]) == 2
        rates = [record["output_tokens"] / wall for wall in record["wall_s"]]
        assert record["values"] == pytest.approx(rates, rel=0.05)
        if record["row"] == "engine":
            assert record["components"].keys() == set(SLOTS)
    base = named(records, "base")["bs1"]
    assert base["decode_step"]["steps"] == base["output_tokens"] - 1
    assert set(named(records, "full")) == {"bs1", "bs1, whole"}
    assert next(folder.glob("*.png")).read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_built_is_a_row_with_its_reason(
    measured: tuple[int, list[dict[str, Any]], Path],
) -> None:
    status, records, _ = measured
    for name in ("base + triton_attention", "full + triton_attention"):
        (record,) = named(records, name).values()
        assert record["status"] == "unsupported" and "CUDA" in record["reason"]
    (compiled,) = named(records, "hf_compiled").values()
    assert compiled["status"] == "unsupported" and "does not compile on cpu" in compiled["reason"]
    assert status == 1, "a rung that was asked for has no number"


def test_a_rung_runs_the_engine_s_weights(
    measured: tuple[int, list[dict[str, Any]], Path],
) -> None:
    (record,) = named(measured[1], "hf_naive").values()
    assert record["status"] == "ok", record.get("reason")
    assert record["backend"]["details"]["weights"] == "random"
    assert record["backend"]["version"] == versions()
    assert record["total_tokens"] == 256


def test_a_technique_without_evidence_is_told(
    measured: tuple[int, list[dict[str, Any]], Path],
) -> None:
    record = named(measured[1], "base + radix_cache")["bs1"]
    assert "radix_cache" in record["idle"] and "paged_attention" not in record["idle"]


def test_the_table_has_the_ratios_of_the_records(
    measured: tuple[int, list[dict[str, Any]], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    records = measured[1]
    command.show(*result_tables(records, records[0]), *rung_table(records, gpu_ablation.WHOLE))
    table = capsys.readouterr().out
    assert "bs1, random weights, greedy, cut to 3 output tokens a request" in table

    def rate(name: str, load: str) -> float:
        return float(statistics.median(named(records, name)[load]["values"]))

    assert f"{rate('base + radix_cache', 'bs1') / rate('base', 'bs1'):.2f}x" in table
    assert f"{rate('full - radix_cache', 'bs1') / rate('full', 'bs1'):.2f}x" in table
    whole = gpu_ablation.WHOLE
    assert f"{rate('full', whole) / rate('hf_naive', whole):.2f}x" in table
    assert "nothing to do" in table and "unsupported" in table


def test_only_complete_sets_are_complete(
    measured: tuple[int, list[dict[str, Any]], Path],
) -> None:
    records = [r for r in measured[1] if r["name"] != "hf_compiled"]
    assert gpu_ablation.all_measured(records), "rows of techniques that are not for this machine"
    for changed in ("base", "full", "full - radix_cache", "hf_naive"):
        for status in ("FAILED", "left"):
            broken = [{**r, "status": status} if r["name"] == changed else r for r in records]
            assert not gpu_ablation.all_measured(broken)
    ends = [{**r, "status": "unsupported"} if r["name"] == "full" else r for r in records]
    assert not gpu_ablation.all_measured(ends)


def test_rows_that_no_time_was_left_for_say_so(tmp_path: Path) -> None:
    status, records = run(tmp_path, "techniques=radix_cache", "baselines=", "seconds=0.001")
    assert status == 1
    assert {r["name"]: r["status"] for r in records} == dict.fromkeys(
        ["base", "base + radix_cache", "full", "full - radix_cache", "base, again", "full, again"],
        "left",
    )
    assert all("seconds=0.001" in r["reason"] for r in records)


@pytest.mark.parametrize("what", ["tokens", "crash"])
def test_a_row_that_is_wrong_or_crashes_has_no_number(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_model("llama", max_position_embeddings=MAX_POSITIONS))
    options = gpu_ablation.Options(
        model=model, workloads=("bs1",), output_len=2, probes=2, baselines=()
    )
    base = Variant("base", "base", BASE)
    task = gpu_ablation.prepare(compose_config([f"model={model}", "weights=random"]), options)
    if what == "tokens":
        task.expected[0].outputs[0].token_ids.pop()
    else:

        def crash(*arguments: Any) -> None:
            raise RuntimeError("out of luck")

        monkeypatch.setattr(gpu_ablation, "time_load", crash)
    written: list[dict[str, Any]] = []

    def write(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        written.extend(found)
        return found

    records = gpu_ablation.measure_all(Plan((base,), ()), task, options, write, time.perf_counter())
    assert records == written
    assert [r["name"] for r in records] == ["base", "base, again"]
    reason = "differ from the core's" if what == "tokens" else "RuntimeError: out of luck"
    for record in records:
        assert record["status"] == "FAILED" and reason in record["reason"]
        assert "values" not in record
    assert not gpu_ablation.all_measured(records)


def test_a_rung_that_is_none_of_transformers_here_is_refused() -> None:
    composed = compose_config([])
    with pytest.raises(ConfigError, match="unknown baseline 'hf_naiv'"):
        ablation_rungs.options_of_rung(composed, "hf_naiv")
    with pytest.raises(ConfigError, match=r"is not model\.generate in"):
        ablation_rungs.options_of_rung(composed, "vllm")
