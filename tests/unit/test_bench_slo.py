"""Objectives: which requests meet them, goodput, the presets, and what a run shows of them."""

from __future__ import annotations

import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from rich.console import Console

from tests.helpers.fake_backend import FakeBackend, FakeClock, make_requests, reference
from workbench.bench.load import Constant, Poisson
from workbench.bench.metrics import RoundSample
from workbench.bench.records import Record, ResultStore
from workbench.bench.report import print_table, to_document
from workbench.bench.run import BenchSettings, Variant, VariantResult, run_bench
from workbench.bench.samples import RequestSample
from workbench.bench.slo import Slo, goodput, goodput_over_rounds
from workbench.bench.steady import steady_window
from workbench.configuration import CONF_DIR, compose_config, options_of


def request(
    name: str, release_s: float, first_s: float | None, last_s: float | None, num_tokens: int
) -> RequestSample:
    gaps = () if first_s is None or last_s is None or num_tokens == 1 else (last_s - first_s,)
    events = () if first_s is None else (1, num_tokens - 1)[: 1 + len(gaps)]
    error = "no room" if first_s is None else None
    return RequestSample(
        name, "", 4, num_tokens, release_s, release_s, first_s, last_s, events, gaps, error
    )


ROUND = RoundSample(
    8.0,
    (
        request("quick", 0.0, 0.1, 1.1, 11),  # TTFT 100 ms, TPOT 100 ms, E2E 1.1 s
        request("late", 0.0, 2.0, 3.0, 11),  # TTFT 2 s
        request("slow", 1.0, 1.1, 5.1, 11),  # TPOT 400 ms, E2E 4.1 s
        request("single", 7.5, 7.6, 7.6, 1),  # no TPOT
        request("refused", 0.0, None, None, 0),
    ),
)


@pytest.mark.parametrize(
    ("bounds", "met"),
    [
        ({"ttft_ms": 500}, {"quick", "slow", "single"}),
        ({"tpot_ms": 150}, {"quick", "late", "single"}),
        ({"e2e_ms": 3000.5}, {"quick", "late", "single"}),
        ({"ttft_ms": 500, "tpot_ms": 150}, {"quick", "single"}),
        ({"ttft_ms": 50}, set()),
        ({"ttft_ms": 1e9, "tpot_ms": 1e9, "e2e_ms": 1e9}, {"quick", "late", "slow", "single"}),
    ],
)
def test_goodput_by_hand(bounds: dict[str, float], met: set[str]) -> None:
    slo = Slo(**bounds)
    assert {r.request_id for r in ROUND.requests if all(slo.met_by(r).values())} == met
    found = goodput(ROUND, slo)
    assert found["goodput_request_s"] == pytest.approx(len(met) / 8)
    assert found["share_met"] == pytest.approx(len(met) / 5), "the refused one counts as not met"
    assert set(found["share_met_by"]) == set(bounds)


def test_shares_of_each_bound_are_alone() -> None:
    found = goodput(ROUND, Slo(ttft_ms=500, tpot_ms=150))
    assert found["share_met_by"] == {"ttft_ms": 3 / 5, "tpot_ms": 3 / 5}
    assert found["share_met"] == 2 / 5


def test_a_bound_is_met_at_the_bound() -> None:
    exact = RoundSample(2.0, (request("r", 0.0, 0.5, 1.5, 3),))
    assert goodput(exact, Slo(ttft_ms=500, tpot_ms=500, e2e_ms=1500))["share_met"] == 1
    assert goodput(exact, Slo(ttft_ms=499.9))["share_met"] == 0


def test_goodput_of_a_span_judges_what_ended_in_it() -> None:
    found = goodput(ROUND, Slo(tpot_ms=150), (2.0, 6.0))
    assert found["goodput_request_s"] == pytest.approx(1 / 4), "late met it, slow did not"
    assert found["share_met"] == 1 / 2
    assert goodput(ROUND, Slo(tpot_ms=150), (6.0, 7.0))["share_met"] is None


def test_rounds_are_summed_up_by_their_medians_whole_and_steady() -> None:
    slow = RoundSample(16.0, ROUND.requests)
    slower = RoundSample(32.0, ROUND.requests)
    slo = Slo(ttft_ms=500)
    found = goodput_over_rounds([slower, ROUND, slow], slo)
    assert found["goodput_request_s"] == pytest.approx(3 / 16)
    assert found["goodput_per_round"] == pytest.approx([3 / 32, 3 / 8, 3 / 16])
    assert found["bounds"] == {"ttft_ms": 500}
    window = steady_window(ROUND)
    assert window is not None
    alone = goodput_over_rounds([ROUND], slo)["steady"]
    assert alone == goodput(ROUND, slo, window.span)
    single = RoundSample(8.0, ROUND.requests[3:4])
    assert goodput_over_rounds([single], slo)["steady"] is None


@pytest.mark.parametrize("key", ["ttft_ms", "tpot_ms", "e2e_ms"])
@pytest.mark.parametrize("value", [0, -5, float("nan"), float("inf"), "fast", True])
def test_bad_bounds_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{key} is .*; valid: a finite number above 0"):
        Slo(**{key: value})


# -- a whole run ---------------------------------------------------------------------------------


def run(slo: Slo | None, load: Any, tmp_path: Path, step_s: float = 0.01) -> list[VariantResult]:
    clock = FakeClock()
    return run_bench(
        [
            Variant("base", lambda: FakeBackend(clock, "base", step_s)),
            Variant("fast", lambda: FakeBackend(clock, "fast", step_s / 5), "base"),
            Variant("wrong", lambda: FakeBackend(clock, "wrong", tokens=lambda r: [0])),
        ],
        make_requests(20, max_tokens=6),
        load,
        reference=reference,
        settings=BenchSettings(slo=slo),
        store=ResultStore(tmp_path, "fake_1c"),
        workload={"name": "fake", "digest": "d"},
        clock=clock,
    )


def text_of(results: list[VariantResult], width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_run_with_an_objective_shows_goodput_and_keeps_it(tmp_path: Path) -> None:
    load = partial(Poisson, rate=10.0, seed=2)
    slo = Slo(ttft_ms=25, tpot_ms=9)
    results = run(slo, load, tmp_path)
    base, fast, wrong = (result.record for result in results)
    assert base.slo is not None and fast.slo is not None and wrong.slo is None
    assert base.slo["share_met"] == 0, "10 ms a token"
    assert fast.slo["share_met"] == 1
    assert fast.slo["goodput_request_s"] == pytest.approx(fast.load["achieved_request_s"])
    for record in (base, fast):
        for key, sample in zip(record.slo["goodput_per_round"], record.samples, strict=True):  # type: ignore[index]
            assert key == goodput(sample, slo)["goodput_request_s"]
    assert Record.from_dict(json.loads(json.dumps(fast.to_dict()))).slo == fast.slo
    text = text_of(results)
    flat = " ".join(text.split())
    assert "goodput" in text and "100 %" in text and "0 %" in text
    assert "TTFT up to 25 ms met by 100.0 %, TPOT up to 9 ms met by 0.0 %" in flat
    document = to_document(results)
    assert document["variants"][1]["slo"] == fast.slo
    assert "slo" not in document["variants"][2]
    for width in (60, 80, 100):
        assert max(map(len, text_of(results, width).splitlines())) <= width


def test_a_run_without_an_objective_shows_nothing_of_it(tmp_path: Path) -> None:
    results = run(None, partial(Poisson, rate=10.0), tmp_path)
    assert all(result.record.slo is None for result in results)
    text = text_of(results)
    assert "goodput\n" not in text and "objective" not in text and "met by" not in text
    assert not re.search(r"goodput\s", text.splitlines()[1] + text.splitlines()[2])
    assert all("slo" not in variant for variant in to_document(results)["variants"])


def test_an_open_load_is_told_with_its_target_and_what_was_achieved(tmp_path: Path) -> None:
    results = run(None, partial(Constant, rate=40.0), tmp_path)
    base = results[0].record
    # A token a step of 10 ms, so an idle backend takes in time and a busy one between two steps.
    assert base.load["target_request_s"] == pytest.approx(40.0)
    assert base.load["sent_request_s"] == pytest.approx(40.0, rel=0.02)
    assert base.load["achieved_request_s"] == pytest.approx(20 / base.load["duration_s"])
    assert base.load["num_late_sends"] == 0 and 0 < base.load["max_taken_late_s"] <= 0.01
    assert base.load["mean_in_flight"] == pytest.approx(
        base.load["achieved_request_s"] * base.metrics["e2el_ms"]["mean"] / 1e3  # type: ignore[index]
    )
    assert "achieved_request_s" not in results[2].record.load, "a failed row keeps no rate"
    flat = " ".join(text_of(results).split())
    assert "load constant (requests 20, rate 40)" in flat
    assert "of 40 req/s" in flat and "in flight on average" in flat and "An open load" in flat
    slow = run(None, partial(Constant, rate=40.0), tmp_path, step_s=0.1)
    assert slow[0].record.load["num_late_sends"] > 0
    assert "more than 10 ms late (worst" in " ".join(text_of(slow).split())


def test_warm_ups_of_an_open_load_do_not_wait_for_the_clock() -> None:
    clock = FakeClock(0.0)
    begun: list[float] = []

    def on_step(backend: FakeBackend, step: int) -> None:
        if len(backend.runs) == 1:
            begun.append(clock())

    run_bench(
        [Variant("A", lambda: FakeBackend(clock, on_step=on_step))],
        make_requests(6),
        partial(Constant, rate=0.01),
        reference=reference,
        clock=clock,
        settings=BenchSettings(rounds=1),
    )
    assert 0 < len(begun) <= 8 and max(begun) < 1.0


def test_window_figures_stand_beside_those_of_whole_rounds(tmp_path: Path) -> None:
    results = run(None, partial(Constant, rate=40.0), tmp_path)
    base, _, wrong = (result.record for result in results)
    assert base.steady is not None and wrong.steady is None
    assert base.metrics is not None and set(base.steady["metrics"]) == set(base.metrics)
    assert "steady window" in text_of(results)
    assert "ramp and drain included unless a note says steady" in " ".join(text_of(results).split())
    assert to_document(results)["variants"][0]["steady"] == base.steady


# -- configuration -------------------------------------------------------------------------------


#: mlcommons/inference, loadgen/mlperf.conf: ``<model>.Server.{ttft,tpot}_latency``, in ms.
MLPERF_CONF = """
llama2-70b.Server.ttft_latency = 2000
llama2-70b.Server.tpot_latency = 200
llama2-70b-interactive.Server.ttft_latency = 450
llama2-70b-interactive.Server.tpot_latency = 40
llama3_1-8b.Server.ttft_latency = 2000
llama3_1-8b.Server.tpot_latency = 100
llama3_1-8b-interactive.Server.ttft_latency = 500
llama3_1-8b-interactive.Server.tpot_latency = 30
"""
MODELS = {"8b": "llama3_1-8b", "70b": "llama2-70b"}


@pytest.mark.parametrize("name", options_of("slo"))
def test_presets_are_those_of_their_source(name: str) -> None:
    slo = instantiate(compose_config([f"slo={name}"]).cfg.slo)
    assert isinstance(slo, Slo)
    if name == "none":
        assert slo.bounds == {}
        return
    _, size, scenario = name.split("_")
    model = MODELS[size] + ("-interactive" if scenario == "interactive" else "")
    found = re.findall(rf"^{model}\.Server\.(\w+)_latency = (\d+)$", MLPERF_CONF, re.MULTILINE)
    assert slo.bounds == {f"{key}_ms": float(value) for key, value in found}
    text = (CONF_DIR / "slo" / f"{name}.yaml").read_text()
    assert "mlperf.conf" in text and f"{model}.Server.ttft_latency" in text


def test_bounds_of_ones_own() -> None:
    cfg = compose_config(["slo.ttft_ms=300", "slo.e2e_ms=2500.5"]).cfg
    assert instantiate(cfg.slo).bounds == {"ttft_ms": 300, "e2e_ms": 2500.5}
    changed = instantiate(compose_config(["slo=mlperf_8b_server", "slo.tpot_ms=50"]).cfg.slo)
    assert changed.bounds["tpot_ms"] == 50


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"option of group slo 'mlperf'.*mlperf_8b_server, none"):
        compose_config(["slo=mlperf"])
    with pytest.raises(ValueError, match=r"key of slo 'ttft'.*Valid: .*e2e_ms.*tpot_ms.*ttft_ms"):
        compose_config(["slo.ttft=3"])
