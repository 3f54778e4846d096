"""``experiments.break_even``: steps are those of whole batches, and lengths are what was asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import break_even
from experiments.break_even import Options
from tests.helpers.tiny_models import tiny_model
from workbench.core.errors import ConfigError

SMALL = (
    "dtype=float32",
    "batch_sizes=1,3",
    "draft_lengths=1,4",
    "acceptance_lengths=1.5,3.0",
    "input_len=8",
    "num_steps=30",
    "rounds=2",
)


def test_the_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    assert break_even.main([*SMALL, f"model={model}", f"results_dir={tmp_path}"]) == 0
    (file,) = tmp_path.glob("*_break_even.jsonl")
    record: dict[str, Any] = json.loads(file.read_text())
    entries = record["entries"]
    shapes = [(e["num_draft_tokens"], e["batch_size"]) for e in entries]
    assert shapes == [(1, 1), (1, 3), (4, 1), (4, 3)]
    for entry in entries:
        assert entry["break_even_length"] == pytest.approx(
            entry["step_ms"] / entry["plain_step_ms"]
        )
        asked = [1.5] if entry["num_draft_tokens"] == 1 else [1.5, 3.0]
        assert [p["asked_length"] for p in entry["measured"]] == asked
        for point in entry["measured"]:
            assert len(point["speedups"]) == 2
            assert point["accepted_length"] == pytest.approx(point["asked_length"], abs=0.6)
    long = entries[3]["measured"]
    assert long[0]["accepted_length"] < long[1]["accepted_length"]
    assert list(tmp_path.glob("*.png"))
    assert "break-even" in capsys.readouterr().out


def test_a_controller_that_learnt_chooses(tmp_path: Path) -> None:
    model = tiny_model("llama", max_position_embeddings=1024)
    options = ("adaptive=true", "learning_steps=20", "base_techniques=overlap", "draft_lengths=3")
    assert break_even.main([*SMALL, *options, f"model={model}", f"results_dir={tmp_path}"]) == 0
    (file,) = tmp_path.glob("*_break_even.jsonl")
    record: dict[str, Any] = json.loads(file.read_text())
    assert record["adaptive"] is True
    for entry in record["entries"]:
        for point in entry["measured"]:
            assert 1.0 <= point["accepted_length"] <= point["asked_length"] + 0.6


@pytest.mark.parametrize("text", ["batch_sizes=0", "num_steps=0", "acceptance_lengths=0.5"])
def test_impossible_options_are_named(text: str) -> None:
    name, _, value = text.partition("=")
    kind = float if name == "acceptance_lengths" else int
    given = kind(value) if name == "num_steps" else (kind(value),)
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        Options(**{name: given})  # type: ignore[arg-type]
