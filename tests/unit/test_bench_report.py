"""The table, the figure and the progress line say what the records say, and no more."""

from __future__ import annotations

import dataclasses
import io
from functools import partial
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from tests.helpers.fake_backend import FakeBackend, FakeClock, make_requests, reference
from workbench.bench import figure
from workbench.bench.load import Closed
from workbench.bench.notes import footnotes
from workbench.bench.progress import LiveProgress
from workbench.bench.records import ResultStore
from workbench.bench.report import byte_size, print_table, quantity
from workbench.bench.roofline import Ceilings
from workbench.bench.run import Variant, VariantResult, run_bench
from workbench.core.backend import TokenEvent

TECHNIQUE = {"spec_decode": {"evidence": ["accepted_tokens"]}}
HOST = {
    "host_us_per_step": 212.0,
    "host_us_median_step": 190.0,
    "us_per_step.schedule": 80.0,
    "us_per_step.sample": 60.0,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ResultStore:
    return ResultStore(tmp_path_factory.mktemp("results"), "fake_1c")


@pytest.fixture(scope="module")
def results(store: ResultStore) -> list[VariantResult]:
    clock = FakeClock()

    def variant(name: str, baseline: str | None = None, **options: object) -> Variant:
        own = {k: options.pop(k) for k in ("techniques", "kind") if k in options}
        return Variant(name, lambda: FakeBackend(clock, name=name, **options), baseline, **own)  # type: ignore[arg-type]

    def wrong(request: object) -> tuple[int, ...]:
        return (1,) * 12

    return run_bench(
        [
            variant("hf_naive", kind="baseline", step_s=0.02, noise=0.05, max_num_seqs=1),
            variant("engine", "hf_naive", noise=0.05, seed=1, counts={"bytes_moved": 2e9, **HOST}),
            variant(
                "engine + spec_decode",
                "engine",
                noise=0.05,
                seed=2,
                tokens_per_step=2,
                techniques=TECHNIQUE,
                counts={"accepted_tokens": 1234.0},
            ),
            variant("same", "engine", noise=0.05, seed=3),
            variant("broken", "engine", tokens=wrong),
            variant("idle", "engine", techniques=TECHNIQUE),
        ],
        make_requests(12, max_tokens=12),
        partial(Closed, concurrency=4),
        reference=reference,
        clock=clock,
        store=store,
        workload={"name": "code_edit", "digest": "d"},
        ceilings=Ceilings("cpu", "x", "2", 1, 8e9, 10e9, {"float32": 1e12}),
    )


def text_of(results: list[VariantResult], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_table_fits_and_hides_no_row(results: list[VariantResult], width: int) -> None:
    text = text_of(results, width)
    assert max(len(line) for line in text.splitlines()) <= width
    squeezed = "".join(text.split())
    for number, result in enumerate(results, start=1):
        assert f"{number}{result.record.variant[:6].strip()}" in squeezed
    assert text.count("FAILED") >= 1 and text.count("INVALID") >= 1
    # As a column, whose cell may fold between name and value, or as a footnote.
    assert "accepted_tokens" in squeezed and "1,234" in squeezed


def row_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line)


def test_table_at_120_columns(results: list[VariantResult]) -> None:
    text = text_of(results, 120)
    by_name = {result.record.variant: result.record for result in results}
    engine = by_name["engine"]
    assert engine.metrics is not None and engine.ci95 is not None and engine.roofline is not None
    row = row_of(text, "2 engine")
    assert quantity(engine.metrics["output_tok_s"]["value"]) in row
    assert f"{engine.speedup:.2f}x [{engine.ci95[0]:.2f}, {engine.ci95[1]:.2f}]" in row
    assert f" {100 * engine.roofline['mbu']:.0f} " in row
    assert "exact" in row
    for name in ("broken", "idle"):
        assert "x [" not in row_of(text, name) and "tok/s" not in row_of(text, name)
        assert row_of(text, name).split()[2:5] == ["-"] * 3
    assert "no difference shown" in text
    flat = " ".join(text.split())
    assert "host 212 µs a step, median 190; mean of parts: schedule 80, sample 60" in flat
    assert "KV waste 25.0 % at its fullest" in flat
    assert "max num seqs 1;" in flat and "attention formula" in flat
    assert "'spec_decode': counter 'accepted_tokens' was not reported" in flat
    assert "3 rounds" in flat


def test_the_notes_say_what_a_verdict_stands_on(results: list[VariantResult]) -> None:
    passed, broken = results[1].record, results[4].record
    ties = {**passed.gate, "num_ties": 5, "num_requests": 12, "epsilon": 0.25}
    ((_, note), *_) = footnotes([dataclasses.replace(passed, gate=ties)])
    assert "5 of 12 outputs part from the reference at near-ties within 0.25 logits" in note

    alone = "checked against the engine's own base row alone"
    assert not any(alone in text for _, text in footnotes([passed, broken]))
    unscored = dataclasses.replace(passed, resolved_config={"bench": {"reference": "base"}})
    notes = dict(footnotes([results[0].record, unscored, broken])[:3])
    assert alone in notes["1"] and alone in notes["2"] and alone not in notes["3"]


def test_the_notes_say_what_the_host_had_no_room_for(results: list[VariantResult]) -> None:
    record = results[1].record
    counters = {"scheduler.swaps_refused": 3.0, "scheduler.preemptions": 4.0}
    refusing = dataclasses.replace(record, counters={**record.counters, **counters})
    notes = dict(footnotes([record, refusing])[:2])
    assert "no room for the KV of 3 of 4 pre-empted requests" in notes["2"]
    assert "no room" not in notes["1"]


def test_quantities() -> None:
    assert [quantity(v) for v in (None, 0.1234, 12.34, 123.4, 12345.6)] == [
        "-", "0.12", "12.3", "123", "12,346",
    ]  # fmt: skip
    assert [byte_size(v) for v in (None, 1000, 2**20, 1.5 * 2**30)] == [
        "-", "1000 B", "1 MiB", "1.50 GiB",
    ]  # fmt: skip


def test_empty_table() -> None:
    assert "no variants" in text_of([], 80)


def test_figure_shows_no_bar_for_void_speed(results: list[VariantResult]) -> None:
    drawn = figure._figure([result.record for result in results])
    bars, ttft, tpot = drawn.axes
    assert len(bars.patches) == 4
    widths = sorted(patch.get_width() for patch in bars.patches)
    speeds = sorted(r.record.metrics["output_tok_s"]["value"] for r in results if r.record.metrics)
    assert widths == pytest.approx(speeds)
    texts = " ".join(text.get_text() for text in bars.texts)
    assert "FAILED" in texts and "INVALID" in texts and "accepted_tokens 1,234" in texts
    # The median line and one step a valid variant.
    assert len(ttft.lines) == len(tpot.lines) == 5


def test_ceiling_by_hand(results: list[VariantResult]) -> None:
    record = results[1].record
    # 2 GB at 10 GB/s take 0.2 s; 144 tokens came of it.
    assert figure._ceiling(record) == pytest.approx(144 / 0.2)
    assert figure._ceiling(results[0].record) is None


def test_figure_is_written_and_drawn_again(
    results: list[VariantResult], store: ResultStore, tmp_path: Path
) -> None:
    path = figure.draw(results, tmp_path / "sub" / "a.png")
    image = imread(path)
    assert image.shape[0] > 400 and image.shape[1] > 1000 and image.std() > 0.05
    assert [f.name for f in path.parent.iterdir()] == ["a.png"], "no temporary file is left"
    again = figure.report(store.path)
    assert again.parent == store.results_dir and results[0].record.run_id in again.name
    assert imread(again).shape == image.shape
    with pytest.raises(ValueError, match=f"Valid: {results[0].record.run_id}"):
        figure.report(store.path, run_id="nope")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("{broken\n")
    with pytest.raises(ValueError, match="no readable record"):
        figure.report(empty)
    with pytest.raises(ValueError, match="no records"):
        figure.draw([], tmp_path / "b.png")


def test_figure_of_failures_only(results: list[VariantResult], tmp_path: Path) -> None:
    assert figure.draw(results[4:], tmp_path / "a.png").exists()


def test_progress_on_no_terminal_is_seldom_and_plain() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    progress = LiveProgress(console)
    progress.begin("engine · round 1/3", 2, 0.0)
    for i in range(700):
        progress.on_event(TokenEvent("a", i * 0.1, (1, 2), finished=i == 350))
    progress.note("broken: ERROR")
    progress.close()
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 3, "two in 70 s, and the note"
    assert lines[1].startswith("engine · round 1/3 · 1/2 requests · 20.0 tok/s")
    assert "\x1b" not in console.file.getvalue()


def test_progress_on_a_terminal_leaves_nothing_behind() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    progress = LiveProgress(console)
    progress.begin("engine · round 1/3", 2, 0.0)
    for i in range(100):
        progress.on_event(TokenEvent("a", i * 0.01, (1,)))
    progress.close()
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert 2 <= written.count("engine · round 1/3") <= 6, "four times a second at most"
    assert "\x1b[?25h" in written, "the cursor is shown again"
