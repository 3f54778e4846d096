"""AutoRound: against round to nearest on tiny models, and the layer that gradients pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from techniques.quantization import WeightScheme
from techniques.quantization.quantizers import (
    RTN,
    AutoRound,
    AutoRoundOptions,
    InputStatistics,
    PipelineOptions,
    PlainLinear,
    quantize_decoder,
)
from techniques.quantization.quantizers.base import output_error
from techniques.quantization.quantizers.calibration import CalibrationRun
from techniques.quantization.quantizers.differentiable import DecoderLayerProblem
from tests.helpers.tiny_models import tiny_model
from tests.helpers.whole_models import whole_logits
from workbench.cli.main import main
from workbench.core.errors import ConfigError, WorkbenchError
from workbench.models.decoder import Decoder
from workbench.models.loader import load_model


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def loaded(family: str = "llama", **overrides: Any) -> Decoder:
    folder = tiny_model(family, **overrides)
    return load_model(folder, linear=PlainLinear(), dtype=torch.float32, device="cpu")


def some_texts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(4, 128, (20 + 7 * i % 30,), generator=generator).tolist()
        for i in range(count)
    ]


TEXTS, UNSEEN = some_texts(48), some_texts(8, seed=9)


@pytest.mark.parametrize("family", ["llama_biases", "llama3_rope", "mistral", "qwen3", "gemma3"])
def test_a_layer_that_gradients_pass_says_what_the_decoder_says(family: str) -> None:
    decoder = loaded(family)
    with torch.no_grad():
        run = CalibrationRun(decoder, TEXTS[:6], 60, keep_originals=True)
        for layer in decoder.layers:
            names = [name for linear in layer.linears for name, _ in linear.shards]
            run.advance_originals(layer)
            problem = DecoderLayerProblem(run, layer, names, 0)
            assert len(problem.weights) == 7 and problem.num_texts == 6
            for text, found in zip((4, 1), problem.outputs(problem.weights, [4, 1]), strict=True):
                torch.testing.assert_close(found, problem.wanted(text), atol=1e-4, rtol=1e-4)
            run.advance(layer)
    weights = {name: w.clone().requires_grad_() for name, w in problem.weights.items()}
    problem.outputs(weights, [0])[0].square().sum().backward()
    assert all(w.grad is not None and bool(w.grad.any()) for w in weights.values())


def loss(decoder: Decoder, original: torch.Tensor) -> float:
    """Mean KL of the original's next tokens from the decoder's on texts that it was not fitted to,
    in nats."""
    found, wanted = whole_logits(decoder, UNSEEN).log_softmax(1), original.log_softmax(1)
    return float((wanted.exp() * (wanted - found)).sum(1).mean())


@pytest.mark.parametrize("name", ["w4g32", "w4g32z"])
def test_models_lose_less_than_by_rounding_to_nearest(name: str) -> None:
    scheme, original = WeightScheme.parse(name), whole_logits(loaded(), UNSEEN)
    losses = {}
    for quantizer in (RTN(), AutoRound(AutoRoundOptions(iterations=60, batch_texts=16))):
        decoder = loaded()
        found = quantize_decoder(decoder, quantizer, scheme, TEXTS)
        losses[type(quantizer).__name__] = loss(decoder, original)
        for weight in found.weights.values():
            assert weight.codes.min() >= scheme.least and weight.codes.max() <= scheme.greatest
            assert (weight.zeros is not None) == scheme.has_zeros and bool(
                (weight.scales > 0).all()
            )
        assert len(found.report) == 14 and all(entry.seconds > 0 for entry in found.report)
    assert losses["AutoRound"] < 0.8 * losses["RTN"]


def test_layers_that_are_kept_and_the_head() -> None:
    decoder = loaded(num_hidden_layers=1)
    kept = [shard for shard, _ in decoder.layers[0].qkv_proj.shards]
    before = decoder.layers[0].qkv_proj.state.weight.clone()
    found = quantize_decoder(
        decoder,
        AutoRound(AutoRoundOptions(iterations=4)),
        WeightScheme(4, 32),
        TEXTS[:8],
        PipelineOptions(skip=("*.self_attn.[qkv]_proj",), head=True),
    )
    assert set(kept) == set(found.kept) and len(found.weights) == 5 and "lm_head" in found.weights
    assert torch.equal(decoder.layers[0].qkv_proj.state.weight, before)


def test_a_linear_layer_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator) @ torch.randn(16, 64, generator=generator)
    weight = torch.randn(32, 64, generator=generator)
    inputs = InputStatistics("x", 64, num_rows=256, keep_hessian=False)
    inputs.add(x)
    scheme = WeightScheme(4, 32)
    errors = {}
    for fixed in (False, True):
        quantizer = AutoRound(AutoRoundOptions(iterations=100, tune_range=not fixed))
        found = quantizer.quantize(weight, scheme, inputs, "x")
        errors[fixed] = output_error(weight, found.dequantize(), x)
        again = quantizer.quantize(weight, scheme, inputs, "x")
        assert torch.equal(found.codes, again.codes)
    nearest = RTN().quantize(weight, scheme, None)
    base = output_error(weight, nearest.dequantize(), x)
    assert errors[False] < 0.7 * base and errors[True] < 0.85 * base
    assert torch.equal(found.scales, nearest.scales)  # where ranges are not tuned
    # Offsets come to a half at most, however long the way: no code is further than one step off.
    far = AutoRound(AutoRoundOptions(iterations=100, step=0.1, tune_range=False))
    found = far.quantize(weight, scheme, inputs, "x")
    assert int((found.codes - nearest.codes).abs().max()) == 1
    with pytest.raises(ConfigError, match="x: AutoRound needs a sample of inputs"):
        AutoRound().quantize(weight, scheme, None, "x")


def test_the_best_step_is_kept() -> None:
    """Steps that go astray leave rounding to nearest."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 32, generator=generator), torch.eye(32)
    inputs = InputStatistics("x", 32, num_rows=32, keep_hessian=False)
    inputs.add(x)  # the nearest codes are the best ones
    quantizer = AutoRound(AutoRoundOptions(iterations=5, step=0.9, tune_range=False))
    found = quantizer.quantize(weight, WeightScheme(4, 32), inputs, "x")
    assert torch.equal(found.codes, RTN().quantize(weight, WeightScheme(4, 32), None).codes)


def test_wrong_options_and_inputs() -> None:
    for options, words in (
        ({"iterations": 0}, "iterations=0 must be 1 or more"),
        ({"batch_texts": 0}, "batch_texts=0 must be 1"),
        ({"step": -1.0}, r"step=-1.0 must be over 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            AutoRoundOptions(**options)
    with pytest.raises(ConfigError, match="AutoRound needs calibration texts"):
        quantize_decoder(loaded(), AutoRound(), WeightScheme(4, 32), [])
    inputs = InputStatistics("x", 32, num_rows=8, keep_hessian=False)
    inputs.add(torch.ones(8, 32))
    with pytest.raises(WorkbenchError, match="no finite number at step 0"):
        AutoRound().quantize(torch.full((4, 32), float("nan")), WeightScheme(4, 32), inputs, "x")


def test_by_the_command(tmp_path: Path) -> None:
    model, text = tiny_model("llama", vocab_size=256), tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "the cat sat on the mat and saw a bird. " * 20}) + "\n")
    arguments = [f"model={model}", "quantizer=autoround", "quantizer.iterations=3", "scheme=w4g32z"]
    out = tmp_path / "q"
    assert main(["quantize", *arguments, f"out={out}", f"text={text}", "dtype=float32",
                 "text_tokens=32"]) == 0  # fmt: skip
    record = json.loads((out / "quantization.json").read_text())
    assert record["quantizer"] == "autoround" and record["reader"] == "packed_checkpoint"
    assert all(0 < layer["output_error"] < 0.5 for layer in record["layers"])
