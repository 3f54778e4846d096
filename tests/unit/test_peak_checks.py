"""``experiments.peak``: what changes the model is judged by the model as it was."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import peak
from tests.helpers.tiny_models import tiny_model
from workbench.engine.engine import Engine

LOSSY = ["+technique=[int8_w8a8]"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "MAX_MODEL_LEN", 512)
    prompts = peak.probe_prompts(128, 6)
    monkeypatch.setattr(peak, "probe_prompts", lambda vocab: prompts)


def engine_of(*overrides: str) -> Engine:
    model = str(tiny_model("llama", max_position_embeddings=1024))
    return peak.make_engine(
        model, ["dtype=float32", *overrides, "engine/scheduler=continuous"], 4096, 8
    )[0]


def check(engine: Any) -> peak.Check:
    model = str(tiny_model("llama", max_position_embeddings=1024))
    return peak.check_lossy(engine, model, LOSSY, platform="cpu")


def test_the_same_format_passes_and_says_what_it_costs() -> None:
    found = check(engine_of(*LOSSY))
    assert found.passed and found.requests == 6
    assert found.excess_nats == pytest.approx(found.eager_excess_nats, abs=0.02)
    assert "excess_nats" in dataclasses.asdict(found)


def test_outputs_of_another_model_fail() -> None:
    engine = engine_of(*LOSSY)

    def wrong(prompts: list[list[int]], params: Any) -> list[Any]:
        outputs = engine.generate(prompts, params)
        return [SimpleNamespace(token_ids=[(t + 1) % 128 for t in o.token_ids]) for o in outputs]

    broken = SimpleNamespace(parts=engine.parts, generate=wrong)
    found = check(broken)
    assert not found.passed
    assert found.excess_nats > 2 * (found.eager_excess_nats or 0) + 0.1


def test_the_model_itself_has_no_excess() -> None:
    engine = engine_of()
    prompts = peak.probe_prompts(128)
    outputs = engine.generate(prompts, peak.SamplingParams(max_tokens=8, ignore_eos=True))
    assert peak.excess_nats(engine, prompts, [o.token_ids for o in outputs]) < 1e-4


def test_the_eager_engine_has_the_format_that_a_preset_chose() -> None:
    lossy = peak.lossy_part("llama-3.1-8b", ["preset=gpu_int4"])
    assert lossy[0] == "+technique=[int4_weights]"
    composed = peak.compose_config(["model=llama-3.1-8b", "weights=random", *lossy])
    assert composed.cfg.engine.linear.scheme == "w4g128"
    assert list(composed.cfg.engine.linear.layers) == []
    assert peak.lossy_part("llama-3.1-8b", ["preset=gpu"]) == []
