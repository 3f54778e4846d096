"""The measured experiments on a tiny model: rows, gates, tables and figures, not speeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from experiments import chunked_prefill_tradeoff, drafting, multi_turn, prefix_hit_rate, rows
from tests.helpers.tiny_models import tiny_model
from workbench.bench.records import Record, ResultStore
from workbench.cli import run as cli_run
from workbench.cli.run import measure
from workbench.core.errors import ConfigError

SMALL = ("dtype=float32", "bench.rounds=1", "bench.reference=base")
HITS = (
    "workload.num_requests=8",
    "workload.num_groups=2",
    "workload.input_len=64",
    "workload.granularity=16",
    "workload.output_len=3",
)
TALKS = (
    "workload.num_conversations=2",
    "workload.num_turns=3",
    "workload.system_len=16",
    "workload.user_len=16",
    "workload.answer_len=3",
)


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine takes longer than these runs."""
    monkeypatch.setattr(cli_run, "measure_ceilings", lambda device: None)


def run(
    main: Callable[[Sequence[str]], int], folder: Path, *arguments: str
) -> tuple[int, list[Record]]:
    model = f"model.name={tiny_model('llama')}"
    status = main([model, *SMALL, f"results_dir={folder}", *arguments])
    records, problems = ResultStore(folder).read()
    assert not problems
    return status, records


def is_drawn(folder: Path, name: str) -> bool:
    found = list(folder.glob(f"*_{name}_*.png"))
    return len(found) == 1 and found[0].read_bytes().startswith(b"\x89PNG")


def test_prefix_hit_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, records = run(prefix_hit_rate.main, tmp_path, "rates=0,0.5", *HITS)
    assert status == 0
    *served, alone = records
    assert all(r.command.startswith("python -m experiments.prefix_hit_rate") for r in records)
    assert alone.workload["config"]["output_len"] == 1  # the prefill's share
    assert [r.verdict for r in records] == ["exact"] * 7
    for rate, group in ((0.0, served[:3]), (0.5, served[3:])):
        base, *cached = group
        assert [r.variant for r in cached] == list(prefix_hit_rate.CACHES)
        assert all(r.baseline == base.variant and r.run_id == base.run_id for r in cached)
        assert all(r.workload["declared_hit_rate"] == rate for r in group)
        assert [rows.hit_rate(r) for r in group] == [0.0, rate, rate]
    assert is_drawn(tmp_path, "prefix_hit_rate")
    assert "50.0" in capsys.readouterr().out


def test_the_ideal_is_amdahl_s() -> None:
    assert prefix_hit_rate.ideal(0.0, 0.8) == 1.0
    assert prefix_hit_rate.ideal(0.75, 1.0) == pytest.approx(4.0)
    assert prefix_hit_rate.ideal(0.5, 0.5) == pytest.approx(4 / 3)


def test_a_rate_that_is_not_reached_voids_the_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Blocks of 64 find nothing of prefixes that end within the first one.
    size = "engine.kv_cache.block_size=64"
    status, records = run(prefix_hit_rate.main, tmp_path, "rates=0.5", *HITS, size)
    assert status == 1
    assert [r.verdict for r in records[:3]] == ["exact", "INVALID", "INVALID"]
    assert all(r.metrics is None for r in records[1:3])
    assert "INVALID" in capsys.readouterr().out


def test_multi_turn(tmp_path: Path) -> None:
    status, records = run(multi_turn.main, tmp_path, *TALKS)
    assert status == 0
    base, *cached = records
    assert [r.variant for r in cached] == list(prefix_hit_rate.CACHES)
    by_turn = multi_turn.ttft_by_turn(base)
    assert list(by_turn) == [1, 2, 3]
    assert all(len(values) == 2 for values in by_turn.values())  # conversations
    assert multi_turn.prompt_tokens_by_turn(base) == {1: 32, 2: 51, 3: 70}
    assert rows.hit_rate(base) == 0
    assert all(rows.hit_rate(r) > 0.4 for r in cached)
    assert is_drawn(tmp_path, "multi_turn")


def test_chunked_prefill_tradeoff(tmp_path: Path) -> None:
    status, records = run(
        chunked_prefill_tradeoff.main,
        tmp_path,
        "chunks=16,32",
        "prefill_heavy=6,32,64,2,6",
        "decode_heavy=6,16,64,6,12",
        "load.concurrency=2",
        "limits.max_num_seqs=2",
    )
    assert status == 0
    assert [r.variant for r in records[1:3]] == ["chunks of 16", "chunks of 32"]
    assert len(records) == 6
    sizes = [r.resolved_config["engine"]["prefill"].get("chunk_tokens") for r in records[:3]]
    assert sizes == [None, 16, 32]
    assert all(r.evidence["scheduler.partial_prompts"] > 0 for r in (*records[1:3], *records[4:]))
    assert records[1].counters["scheduler.steps"] > records[0].counters["scheduler.steps"]
    assert is_drawn(tmp_path, "chunked_prefill_tradeoff")


@pytest.mark.parametrize(
    ("main", "argument", "message"),
    [
        (prefix_hit_rate.main, "rates=1", "up to below 1"),
        (chunked_prefill_tradeoff.main, "chunks=0", "must be 1 or more"),
        (chunked_prefill_tradeoff.main, "decode_heavy=1,2", "five numbers"),
        (multi_turn.main, "workload.num_turn=1", "num_turns"),
    ],
)
def test_wrong_options_are_told(
    main: Callable[[Sequence[str]], int], argument: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(main, tmp_path, argument)


def test_alternatives_need_one_base() -> None:
    with pytest.raises(ConfigError, match="'b' asks for no technique"):
        measure([], {"a": ["+technique=paged_attention"], "b": ["seed=1"]})
    with pytest.raises(ConfigError, match="'b' has another base than row 'a'"):
        measure([], {"a": ["+technique=block_hash_cache"], "b": ["+technique=paged_attention"]})


def test_drafting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("workload.num_requests=2", "workload.max_tokens=40", "workload.ignore_eos=true")
    status, records = run(drafting.main, tmp_path, "texts=text:chat", "eagle=none", *sizes)
    assert status == 0
    base, *drafted = records
    assert [r.variant for r in drafted] == list(drafting.DRAFTERS)
    assert all(r.baseline == base.variant for r in drafted)
    for record in drafted:
        shares = drafting.acceptance_by_position(record)
        assert shares and all(0 <= share <= 1 for share in shares)
    assert is_drawn(tmp_path, "drafting")
    assert "chat, suffix" in capsys.readouterr().out


def test_a_text_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match="workload 'prose'"):
        drafting.Options(texts=("prose:chat",))
