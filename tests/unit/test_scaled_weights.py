"""Slot ``linear``: weights and activations in 8 bits, rounded as they are loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from techniques.quantization import ScaledConfig, ScaledWeights
from tests.helpers.engines import mixed_prompts, tiny_engine
from tests.helpers.interpreted import needs_kernels, run_in_interpreter, starts_interpreter
from tests.helpers.tiny_models import tiny_model
from workbench.core.errors import ConfigError, UnsupportedError
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine
from workbench.slots.linear import LinearLayer

FORMATS = ("fp8", "fp8_tensor", "fp8_block", "int8")
NUM_LINEARS = 4  # of a layer: qkv_proj, o_proj, gate_up_proj, down_proj
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__, "-k", "kernels or interpreter")


def engine(*settings: str, **options: Any) -> Engine:
    chosen = (f"engine.linear.{text}" for text in settings)
    return tiny_engine("engine/linear=scaled", *chosen, **options)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("weights", ["checkpoint", "random"])
def test_counts_and_bytes(format: str, weights: str) -> None:
    built = tiny_engine("engine/linear=scaled", f"engine.linear.format={format}",
                        f"weights={weights}")  # fmt: skip
    counts = built.counters()
    spec = built.parts.executor.runner.parts.model.spec  # type: ignore[attr-defined]
    assert counts["linear.quantized_layers"] == NUM_LINEARS * spec.num_layers
    assert counts["linear.dense_layers"] == counts["linear.dense_layers.lm_head"] == 1
    assert 1 < counts["linear.packed_bytes"] / spec.num_linear_parameters < 1.15
    built.reset_counters()
    outputs = built.generate(mixed_prompts(3), PARAMS)
    assert [len(o.token_ids) for o in outputs] == [8] * 3
    counts = built.counters()
    ran = "int_mm" if format == "int8" else "reference"
    assert counts["linear.quantized_calls"] == counts[f"linear.{ran}_calls"] > 0
    assert counts["linear.skinny_calls"] == counts["linear.joined_inputs"] == 0


@pytest.mark.parametrize("format", FORMATS)
def test_tokens_are_almost_those_of_the_model(format: str) -> None:
    prompts = mixed_prompts(6, seed=2)
    wanted = [o.token_ids for o in tiny_engine().generate(prompts, PARAMS)]
    found = [o.token_ids for o in engine(f"format={format}").generate(prompts, PARAMS)]
    same = sum(
        a == b for x, y in zip(wanted, found, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert same > (0.6 if format == "int8" else 0.35) * 6 * 8


def test_skipped_layers_are_counted_by_name() -> None:
    counts = engine("skip=[lm_head,'*.down_proj','layers.0.*']").counters()
    kept = {k.partition("dense_layers.")[2] for k in counts if "dense_layers." in k}
    first = {f"layers.0.{n}" for n in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
    assert kept == {"lm_head", "layers.1.down_proj"} | first
    assert counts["linear.dense_layers"] == 6
    assert engine("skip=[]").counters()["linear.dense_layers"] == 0


def test_parts_of_a_stacked_layer_keep_their_own_scale() -> None:
    method = ScaledWeights(ScaledConfig(format="fp8_tensor"))
    layer = LinearLayer("layers.0.qkv_proj", 64, 96, (("q", 64), ("k", 16), ("v", 16)))
    method.create_weights(layer, torch.float32, torch.device("cpu"))
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    weight[80:] *= 100
    layer.params["weight"].copy_(weight)
    method.process_weights_after_loading(layer, 1)
    scales = layer.state.scales
    assert len(scales.unique()) == 3 and layer.state.whole_scale is None
    torch.testing.assert_close(scales[0], weight[:64].abs().max() / 448)
    torch.testing.assert_close(scales[95], weight[80:].abs().max() / 448)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["format=fp4"], "unknown engine.linear.format 'fp4'"),
        (["skip=['*.experts']"], r"engine.linear.skip has '\*.experts', which fits no layer"),
    ],
)
def test_options_that_cannot_be(settings: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        engine(*settings)


def test_weights_that_are_no_numbers_are_named() -> None:
    method = ScaledWeights()
    layer = LinearLayer("layers.3.o_proj", 16, 32, (("o", 32),))
    method.create_weights(layer, torch.float32, torch.device("cpu"))
    layer.params["weight"].fill_(1.0)[3, 4] = float("nan")
    with pytest.raises(ConfigError, match=r"layers.3.o_proj has weights that are no finite.*skip="):
        method.process_weights_after_loading(layer, 1)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    reasons = ScaledWeights().unsupported_reasons(torch.device("cuda"), torch.bfloat16)
    assert "format int8 works from 8.0 on" in "; ".join(reasons)
    reasons = ScaledWeights().unsupported_reasons(torch.device("cpu"), torch.float64)
    assert "float64 is none of float16, bfloat16, float32" in "; ".join(reasons)
    with pytest.raises(UnsupportedError, match="scaled_checkpoint where activations"):
        ScaledWeights().read_checkpoint({"quant_method": "compressed-tensors"})


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("format", FORMATS)
def test_kernels_join_norms_and_gates_where_ops_are_fused(family: str, format: str) -> None:
    """The tokens of the ops one by one; without fused ops inputs are put into 8 bits alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model(family)
    prompts, params = mixed_prompts(2, longest=6), SamplingParams(max_tokens=4, ignore_eos=True)
    tokens, counts = [], []
    for ops in ("fused", "dispatched"):
        built = engine(
            f"format={format}", model=model, **{"max_model_len": 32}
        ) if ops == "dispatched" else tiny_engine(
            "engine/linear=scaled", f"engine.linear.format={format}", "engine/ops=fused",
            f"engine/platform={device}", model=model, max_model_len=32,
        )  # fmt: skip
        tokens.append([o.token_ids for o in built.generate(prompts, params)])
        counts.append(built.counters())
    assert tokens[0] == tokens[1]
    joined = counts[0]["linear.joined_inputs"]
    assert joined == counts[0]["ops.joined_calls"] > 0
    assert joined == 0.75 * counts[0]["linear.quantized_calls"]  # of all but attention's output
    assert counts[1]["linear.joined_inputs"] == 0
