"""The main job with a backend that has no model and a clock that only it moves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.fake_backend import (
    FakeBackend,
    FakeClock,
    expected_tokens,
    make_requests,
    reference,
)
from workbench.bench.assess import combine_counters, is_timing
from workbench.bench.gates import GateResult
from workbench.bench.load import Closed, Offline
from workbench.bench.metrics import round_metrics
from workbench.bench.records import ResultStore
from workbench.bench.report import exit_status, to_document
from workbench.bench.roofline import Ceilings
from workbench.bench.run import BenchSettings, Variant, VariantResult, run_bench
from workbench.core.backend import TokenEvent
from workbench.core.errors import ConfigError, UnsupportedError
from workbench.core.workload import WorkloadRequest

REQUESTS = make_requests(8, max_tokens=10)
CLOSED = partial(Closed, concurrency=2)


class Bench:
    """A clock, and the backends that were built on it."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.built: list[FakeBackend] = []

    def build(self, **options: Any) -> Callable[[], FakeBackend]:
        def make() -> FakeBackend:
            self.built.append(FakeBackend(self.clock, **options))
            return self.built[-1]

        return make

    def variant(self, name: str, baseline: str | None = None, **options: Any) -> Variant:
        own = {
            k: options.pop(k)
            for k in ("techniques", "losslessness", "quality_bound", "kind")
            if k in options
        }
        return Variant(name, self.build(name=name, **options), baseline, **own)

    def run(self, *variants: Variant, **options: Any) -> list[VariantResult]:
        options = {"reference": reference, "load_factory": CLOSED, "requests": REQUESTS} | options
        return run_bench(variants, clock=self.clock, **options)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def wrong_tokens(request: WorkloadRequest) -> tuple[int, ...]:
    """Right but for the fourth token of request r3."""
    right = list(expected_tokens(request))
    if request.request_id == "r3":
        right[3] += 1
    return tuple(right)


def test_an_ab_run(bench: Bench, tmp_path: Path) -> None:
    technique = {"spec": {"evidence": ["accepted"]}}
    store = ResultStore(tmp_path, "fake_1c")
    base, fast = bench.run(
        bench.variant("base", noise=0.02, seed=1),
        bench.variant(
            "fast", "base", tokens_per_step=2, noise=0.02, seed=2, techniques=technique,
            counts={"accepted": 40.0},
        ),
        store=store, workload={"name": "chat", "digest": "abc"}, command="python -m workbench",
    )  # fmt: skip
    assert (base.record.status, fast.record.status) == ("OK", "OK")
    assert fast.record.verdict == "exact" and fast.record.evidence == {"accepted": 40.0}
    assert fast.outputs == reference(REQUESTS)
    # Two tokens a step instead of one: twice as fast, whatever the noise.
    assert fast.record.speedup == pytest.approx(2.0, rel=0.05)
    assert fast.record.ci95 is not None and fast.record.ci95[0] > 1
    assert fast.record.word == "faster" and (fast.record.p_value or 1) < 0.05
    assert base.record.speedup is None
    assert base.record.metrics is not None
    assert base.record.metrics["tpot_ms"]["p50"] == pytest.approx(10, rel=0.02)
    assert base.record.load["mean_in_flight"] == pytest.approx(2, rel=0.01)
    assert fast.record.baseline_id == base.record.record_id
    assert [r.variant for r in store.read()[0]] == ["base", "fast"]
    again = store.read()[0][1]
    assert again.speedup == fast.record.speedup and len(again.samples) == 3
    assert store.baseline_for(again) is not None
    assert all(backend.is_closed for backend in bench.built)
    assert exit_status([base, fast]) == 0


def test_rounds_alternate_and_warm_ups_come_first(bench: Bench) -> None:
    order: list[str] = []
    note: Callable[[FakeBackend, int], None] = lambda b, step: order.append(b.name)  # noqa: E731
    bench.run(
        bench.variant("A", on_step=note), bench.variant("B", on_step=note),
        settings=BenchSettings(rounds=3, warmup_tokens=2),
    )  # fmt: skip
    changes = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert "".join(changes) == "ABABAB"
    for backend in bench.built:
        assert len(backend.runs) == 4, "a warm-up and three rounds"
        assert backend.runs[0] == ["r0", "r1"], "as many as the load keeps in flight"
        assert backend.runs[1:] == [[r.request_id for r in REQUESTS]] * 3
    assert bench.built[0].batches[:2] == [2, 2] and len(bench.built[0].batches) == 2 + 3 * 40


@pytest.mark.parametrize(
    ("load", "max_num_seqs", "warmup", "expected"),
    [(Offline, 10**6, None, 8), (Offline, 3, None, 3), (CLOSED, 1, None, 1), (Offline, 9, 5, 5)],
)
def test_number_of_warm_ups(
    bench: Bench, load: Any, max_num_seqs: int, warmup: int | None, expected: int
) -> None:
    (result,) = bench.run(
        bench.variant("A", max_num_seqs=max_num_seqs),
        load_factory=load, settings=BenchSettings(rounds=1, warmup=warmup),
    )  # fmt: skip
    assert len(bench.built[0].runs[0]) == expected == result.record.load["num_warmups"]


def test_a_wrong_backend_fails_and_has_no_speed(bench: Bench, tmp_path: Path) -> None:
    results = bench.run(
        bench.variant("base"),
        bench.variant("wrong", "base", tokens_per_step=5, tokens=wrong_tokens),
        bench.variant("right", "base"),
        store=ResultStore(tmp_path),
    )
    wrong = results[1].record
    assert (wrong.status, wrong.verdict) == ("FAILED_CORRECTNESS", "FAILED")
    assert "'r3' position 3" in (wrong.error or "")
    assert wrong.metrics is None and wrong.speedup is None and wrong.ci95 is None
    assert wrong.samples == () and wrong.compared is None
    assert wrong.num_rounds == 1, "no second round after a failed gate"
    assert [r.record.status for r in results] == ["OK", "FAILED_CORRECTNESS", "OK"]
    document = to_document(results)
    assert document["variants"][1]["output_tok_s"] is None
    assert document["variants"][1]["tpot_ms"]["p50"] is None
    assert document["exit_status"] == 1
    assert [r.status for r in ResultStore(tmp_path).query(verdict="FAILED")] == [
        "FAILED_CORRECTNESS"
    ]


def test_a_backend_that_goes_wrong_in_its_last_round_fails(bench: Bench) -> None:
    def turn(backend: FakeBackend, step: int) -> None:
        if len(backend.runs) == 4:
            backend.tokens = wrong_tokens

    (result,) = bench.run(bench.variant("A", on_step=turn))
    assert result.record.verdict == "FAILED" and "round 3" in (result.record.error or "")
    assert result.record.metrics is None


def test_a_failed_baseline_voids_the_speed_up_only(bench: Bench) -> None:
    _, fast = bench.run(
        bench.variant("base", tokens=wrong_tokens), bench.variant("fast", "base")
    )  # fmt: skip
    assert fast.record.status == "OK" and fast.record.metrics is not None
    assert fast.record.speedup is None
    assert "base is FAILED" in (fast.record.speedup_note or "")


def test_an_idle_technique_is_invalid(bench: Bench) -> None:
    base, idle, silent = bench.run(
        bench.variant("base"),
        bench.variant("idle", "base", techniques={"spec": {"evidence": ["accepted"]}},
                      counts={"accepted": 0}),
        bench.variant("silent", "base", techniques={"spec": {"evidence": ["accepted"]}}),
    )  # fmt: skip
    for result in (idle, silent):
        assert (result.record.status, result.record.verdict) == ("INVALID_EVIDENCE", "INVALID")
        assert "'accepted'" in (result.record.error or "") and "'spec'" in result.record.error
        assert result.record.metrics is None
    assert base.record.status == "OK" and exit_status([base]) == 0
    assert exit_status([base, idle]) == 1


def raiser(error: BaseException, run: int = 2, step: int = 3) -> dict[str, Any]:
    def on_step(backend: FakeBackend, now: int) -> None:
        if len(backend.runs) == run and now == step:
            raise error

    return {"on_step": on_step}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("kernel went wrong"), "ERROR"),
        (MemoryError("no room"), "OOM"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OOM"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "OOM"),
        (UnsupportedError("needs compute capability 8.0"), "UNSUPPORTED"),
        (ModuleNotFoundError("No module named 'flashinfer'"), "UNSUPPORTED"),
        (ConfigError("unknown option"), "ERROR"),
    ],
)
@pytest.mark.parametrize("when", ["build", "warm-up", "round"])
def test_a_crash_takes_no_other_along(
    bench: Bench, error: Exception, status: str, when: str, tmp_path: Path
) -> None:
    def build() -> FakeBackend:
        raise error

    crash = bench.variant("crash", "base", **raiser(error, 1 if when == "warm-up" else 3))
    if when == "build":
        crash = Variant("crash", build, "base")
    store = ResultStore(tmp_path)
    base, broken, other = bench.run(
        bench.variant("base"), crash, bench.variant("other", "base"), store=store
    )
    assert (broken.record.status, broken.record.verdict) == (status, "INVALID")
    assert str(error) in (broken.record.error or "") and broken.record.metrics is None
    assert (base.record.status, other.record.status) == ("OK", "OK")
    assert other.record.speedup == pytest.approx(1.0)
    assert [r.status for r in store.read()[0]] == ["OK", status, "OK"]
    if status == "ERROR":
        assert "Traceback" in (broken.record.trace or "")
    assert all(backend.is_closed for backend in bench.built)


def test_a_refused_request_fails_the_row(bench: Bench) -> None:
    refuse = frozenset({"r5"})
    (surprise,) = bench.run(bench.variant("A", refuse=refuse))
    assert surprise.record.verdict == "FAILED"
    assert "longer than the context" in (surprise.record.error or "")


def test_timeout(bench: Bench) -> None:
    slow, quick = bench.run(
        bench.variant("slow", step_s=1.0), bench.variant("quick"),
        settings=BenchSettings(timeout_s=5.0),
    )  # fmt: skip
    assert slow.record.status == "TIMEOUT" and "5 s" in (slow.record.error or "")
    assert quick.record.status == "OK"


def test_a_lying_clock_is_invalid(bench: Bench) -> None:
    class Early(FakeBackend):
        def run(self, source: Any, on_event: Callable[[TokenEvent], None]) -> None:
            def shifted(e: TokenEvent) -> None:
                on_event(TokenEvent(e.request_id, e.time_s - 50, e.token_ids, e.finished))

            super().run(source, shifted)

    result, _ = bench.run(Variant("early", lambda: Early(bench.clock)), bench.variant("ok"))
    assert result.record.status == "INVALID_EVIDENCE"
    assert "before its release" in (result.record.error or "")


def test_interrupt_keeps_what_was_measured(bench: Bench, tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        bench.run(
            bench.variant("base"),
            bench.variant("stopped", "base", **raiser(KeyboardInterrupt(), run=3)),
            bench.variant("failed", "base", tokens=wrong_tokens),
            bench.variant("late", "base", **raiser(RuntimeError(), run=9)),
            store=store,
        )
    records, problems = store.read()
    assert problems == []
    found = {r.variant: (r.status, r.verdict, r.num_rounds) for r in records}
    assert found == {
        "base": ("INTERRUPTED", "exact", 2),
        "stopped": ("INTERRUPTED", "exact", 1),
        "failed": ("FAILED_CORRECTNESS", "FAILED", 1),
        "late": ("INTERRUPTED", "exact", 1),
    }
    base = records[0]
    assert base.metrics is not None and len(base.samples) == 2
    assert all(r.speedup is None for r in records)
    assert all(backend.is_closed for backend in bench.built)
    assert exit_status(records) == 1


def test_interrupt_before_anything_was_measured(bench: Bench, tmp_path: Path) -> None:
    def stop(requests: Sequence[WorkloadRequest]) -> Mapping[str, Sequence[int]]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(bench.variant("base"), reference=stop, store=ResultStore(tmp_path))
    (record,) = ResultStore(tmp_path).read()[0]
    assert (record.status, record.verdict, record.metrics) == ("INTERRUPTED", "INVALID", None)


def test_a_reference_that_fails_judges_nothing(bench: Bench) -> None:
    def broken(requests: Sequence[WorkloadRequest]) -> Mapping[str, Sequence[int]]:
        raise RuntimeError("no weights")

    (result,) = bench.run(bench.variant("A"), reference=broken)
    assert result.record.verdict == "INVALID" and "no weights" in (result.record.error or "")
    assert bench.built == [], "nothing is run that cannot be judged"


def test_losslessness_classes_need_their_check(bench: Bench) -> None:
    def check(outputs: Any, golden: Any, info: Any) -> GateResult:
        return GateResult("lossy", details={"kl": 0.01, "bound": 0.05})

    variants = [
        bench.variant("lossy", losslessness="lossy", tokens=wrong_tokens),
    ]
    (lossy,) = bench.run(*variants, checks={"lossy": check})
    assert (lossy.record.status, lossy.record.verdict) == ("OK", "lossy")
    (unchecked,) = bench.run(bench.variant("unchecked", losslessness="lossy"))
    assert unchecked.record.verdict == "INVALID"
    assert "'lossy'" in (unchecked.record.error or "")
    share = len(wrong_tokens(REQUESTS[3])) / sum(len(expected_tokens(r)) for r in REQUESTS)
    bounded = {"losslessness": "lossy", "quality_bound": 0.5 * share, "tokens": wrong_tokens}
    for margin, verdict in ((0.4, "lossy"), (0.6, "FAILED")):

        def margin_fn(_: str, ids: Sequence[int], margin: float = margin) -> Sequence[float]:
            return [margin] * len(ids)

        (judged,) = bench.run(bench.variant("bounded", **bounded), margin_fn=margin_fn)
        assert judged.record.verdict == verdict
        found = judged.record.gate["details"]["excess_nats_per_token"]
        assert found == pytest.approx(margin * share)


def test_a_kept_distribution_gives_greedy_requests_the_exact_tokens(bench: Bench) -> None:
    right, wrong = bench.run(
        bench.variant("right", losslessness="distributional"),
        bench.variant("wrong", losslessness="distributional", tokens=wrong_tokens),
    )
    assert (right.record.status, right.record.verdict) == ("OK", "distributional")
    assert wrong.record.verdict == "FAILED"


def test_ties_are_counted(bench: Bench) -> None:
    (result,) = bench.run(
        bench.variant("bf16", dtype="bfloat16", tokens=wrong_tokens),
        margin_fn=lambda request_id, output: [0.01] * len(output),
        settings=BenchSettings(epsilon=0.1),
    )
    assert result.record.verdict == "exact" and result.record.gate["num_ties"] == 1
    assert to_document([result])["variants"][0]["ties"] == 1


def test_rounds_for_slow_baselines(bench: Bench) -> None:
    settings = BenchSettings(rounds=3, rounds_for={"baseline": 1, "special": 2})
    hf, special, engine, over_special = bench.run(
        bench.variant("hf", kind="baseline"), bench.variant("special", kind="baseline"),
        bench.variant("engine", "hf", step_s=0.005), bench.variant("e2", "special"),
        settings=settings,
    )  # fmt: skip
    assert [r.record.num_rounds for r in (hf, special, engine)] == [1, 2, 3]
    assert engine.record.speedup == pytest.approx(2.0) and engine.record.ci95 is None
    assert engine.record.word == "no difference shown"
    assert "one paired round" in (engine.record.speedup_note or "")
    assert "2 paired rounds" in (over_special.record.speedup_note or "")
    assert engine.record.compared is not None and set(engine.record.compared) == {"hf", "special"}


def test_one_at_a_time_keeps_a_single_backend_alive(bench: Bench) -> None:
    def alone(backend: FakeBackend, step: int) -> None:
        assert sum(not b.is_closed for b in bench.built) == 1

    results = bench.run(
        bench.variant("A", on_step=alone), bench.variant("B", "A", on_step=alone),
        settings=BenchSettings(residency="one"),
    )  # fmt: skip
    assert [r.record.status for r in results] == ["OK", "OK"]
    assert len(bench.built) == 6


def test_counts_that_differ_between_rounds_are_reported(bench: Bench) -> None:
    def drift(backend: FakeBackend, step: int) -> None:
        backend.counts = {"blocks": float(len(backend.runs)), "us_per_step.plan": float(step)}

    (result,) = bench.run(bench.variant("A", on_step=drift))
    assert result.record.unstable_counters == {"blocks": [2.0, 3.0, 4.0]}
    assert result.record.counters["steps"] == 40


def test_counters_times_are_medians() -> None:
    rows = [{"host_us_per_step": v, "blocks": 7.0} for v in (3.0, 1.0, 2.0)]
    assert combine_counters(rows) == ({"host_us_per_step": 2.0, "blocks": 7.0}, {})
    assert is_timing("us_per_step.schedule") and is_timing("model_seconds")
    assert not is_timing("step.num_output_tokens") and not is_timing("steps")
    assert not is_timing("num_seqs_max")


def test_memory_is_the_highest_round_and_roofline_by_hand(bench: Bench) -> None:
    ceilings = Ceilings("cpu", "x", "2", 1, 8e9, 10e9, {"float32": 1e12})
    peaks = [500, 900, 700, 5000]
    (result,) = bench.run(
        bench.variant("A", peaks=list(peaks), counts={"bytes_moved": 2e9}), ceilings=ceilings
    )
    record = result.record
    assert record.memory is not None
    assert record.memory["peak_memory_bytes"] == max(peaks[: record.num_rounds])
    # 40 steps of 10 ms move 2 GB: 5 GB/s of 10.
    assert record.roofline is not None and record.roofline["mbu"] == pytest.approx(0.5)


def test_a_store_that_cannot_be_written_costs_only_the_record(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (result,) = bench.run(bench.variant("A"), store=ResultStore(tmp_path / "file"))
    assert result.record.status == "OK" and result.record_file is None
    assert "file" in (result.store_error or "") and exit_status([result]) == 1


def test_document_is_strict_json_with_the_promised_keys(bench: Bench, tmp_path: Path) -> None:
    results = bench.run(
        bench.variant("base", counts={"odd": math.inf}),
        bench.variant("wrong", "base", tokens=wrong_tokens),
        bench.variant("fast", "base", tokens_per_step=2),
        store=ResultStore(tmp_path),
    )

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    document = json.loads(json.dumps(to_document(results)), parse_constant=refuse)
    assert document["schema"] == 1
    promised = {
        "name", "output_tok_s", "ttft_ms", "tpot_ms", "peak_memory_bytes", "baseline", "speedup",
        "ci95", "verdict", "evidence",
    }  # fmt: skip
    for variant in document["variants"]:
        assert promised <= set(variant) and {"p50", "p99"} <= set(variant["ttft_ms"])
        assert Path(variant["record_file"]).exists()
    base, wrong, fast = document["variants"]
    assert base["ci95"] is None and len(fast["ci95"]) == 2
    measured = [round_metrics(s)["output_tok_s"] for s in results[2].record.samples]
    assert fast["output_tok_s"] == sorted(measured)[1]
    assert wrong["verdict"] == "FAILED" and wrong["speedup"] is None
    assert to_document([])["variants"] == [] and exit_status([]) == 1


@pytest.mark.parametrize(
    ("names", "baseline", "match"),
    [
        ([], None, "no variant"),
        (["a", "a"], None, "unique"),
        (["a", "b"], "hf", "Valid: a, b"),
        (["a"], "a", "its own baseline"),
    ],
)
def test_wrong_requests_for_a_run(
    bench: Bench, names: list[str], baseline: str | None, match: str
) -> None:
    variants = [bench.variant(name, baseline) for name in names]
    with pytest.raises(ValueError, match=match):
        bench.run(*variants)
    assert bench.built == []


@pytest.mark.parametrize(
    "wrong",
    [{"rounds": 0}, {"rounds_for": {"hf": 0}}, {"residency": "some"}, {"warmup": -1},
     {"warmup_tokens": 0}],
)  # fmt: skip
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        BenchSettings(**wrong)
