"""Slot ``linear``: weights that are rounded as they are loaded."""

from __future__ import annotations

import pytest

from tests.helpers.engines import mixed_prompts, tiny_engine
from workbench.core.errors import ConfigError, UnsupportedError
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine
from workbench.models.spec import ModelSpec

WEIGHT_ONLY = "engine/linear=weight_only"
NUM_LINEARS = 4  # of a layer: qkv_proj, o_proj, gate_up_proj, down_proj


def engine(*settings: str) -> Engine:
    return tiny_engine(WEIGHT_ONLY, *(f"engine.linear.{text}" for text in settings))


def spec_of(built: Engine) -> ModelSpec:
    spec: ModelSpec = built.parts.executor.runner.parts.model.spec  # type: ignore[attr-defined]
    return spec


@pytest.mark.parametrize("scheme", ["w8", "w4g32", "w4g32z"])
def test_counts_and_bytes(scheme: str) -> None:
    built = engine(f"scheme={scheme}")
    counts = built.counters()
    spec = spec_of(built)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    built.reset_counters()
    outputs = built.generate(mixed_prompts(3), params)
    assert [len(o.token_ids) for o in outputs] == [8] * 3
    assert counts["linear.quantized_layers"] == NUM_LINEARS * spec.num_layers + 1
    assert counts["linear.dense_layers"] == 0
    count = spec.num_linear_parameters + spec.vocab_size * spec.hidden_size
    least = count * (1 if scheme == "w8" else 0.5)
    # Scales: one bf16 an output, or two a group of 32.
    assert least < counts["linear.packed_bytes"] <= least * 1.04 + count // 8 * (scheme != "w8")
    assert built.counters()["linear.quantized_calls"] > 0


@pytest.mark.parametrize("scheme", [None, "w8", "w4g32"])
def test_bytes_that_a_pass_reads(scheme: str | None) -> None:
    """What the share of the bandwidth is counted from: weights as they lie in memory."""
    built = tiny_engine() if scheme is None else engine(f"scheme={scheme}")
    spec, cost = spec_of(built), built.parts.info["cost"]
    small = 4 * spec.num_small_parameters
    count = spec.num_linear_parameters + spec.vocab_size * spec.hidden_size
    if scheme is None:
        assert cost.weight_bytes == 4 * count + small
    else:
        assert cost.weight_bytes == built.counters()["linear.packed_bytes"] + small


def test_exceptions_by_pattern() -> None:
    built = engine("scheme=w4g32", "layers=['lm_head:dense','layers.0.*:w8','*.down_proj:dense']")
    counts, num_layers = built.counters(), spec_of(built).num_layers
    assert counts["linear.dense_layers"] == 1 + num_layers - 1
    assert counts["linear.quantized_layers"] == NUM_LINEARS * num_layers - (num_layers - 1)


def test_eight_bits_say_almost_what_the_model_says() -> None:
    prompts = mixed_prompts(6, seed=2)
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    wanted = [o.token_ids for o in tiny_engine().generate(prompts, params)]
    found = [o.token_ids for o in engine().generate(prompts, params)]
    same = sum(
        a == b for x, y in zip(wanted, found, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert same > 0.6 * 6 * 16


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["scheme=w5"], "unknown scheme of weights 'w5'"),
        (
            ["scheme=w4g48"],
            r"layer lm_head cannot be served in scheme w4g48 here: groups of",
        ),
        (
            ["scheme=w8g32"],
            "scheme w8g32 here: 8 bits need one scale an output.*lm_head:dense",
        ),
        (["layers=['*.experts:w8']"], r"'\*.experts', which fits no layer"),
        (["layers=['lm_head']"], "'lm_head'; an entry is a pattern of names, a colon"),
        (["layers=['lm_head:w5']"], "unknown scheme of weights 'w5'"),
    ],
)
def test_schemes_that_cannot_be(settings: list[str], words: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError), match=words):
        engine(*settings)
