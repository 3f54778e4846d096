"""Checkpoints whose weights and activations have 8 bits: written, and read as they are."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.scaled_linear import quantize_weight
from techniques.quantization.quantizers import FP8, InputStatistics, SmoothQuant, SmoothQuantOptions
from techniques.quantization.scaled_formats import (
    ScaledScheme,
    read_scaled_config,
    scaled_config,
    scaled_tensors,
)
from techniques.quantization.weights import FP8Scheme, WeightScheme, parse_scheme
from tests.helpers.engines import mixed_prompts, tiny_engine
from tests.helpers.tiny_models import tiny_model
from workbench.cli.main import main
from workbench.core.errors import ConfigError, UnsupportedError, WorkbenchError
from workbench.core.sampling import SamplingParams

READS = "engine/linear=scaled_checkpoint"
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
#: Quantiser, scheme and the format that is read of it.
WRITTEN = (("fp8", "fp8", "fp8"), ("fp8", "fp8_static", "fp8_tensor"), ("rtn", "w8a8", "int8"),
           ("smoothquant", "w8a8", "int8"))  # fmt: skip


def quantized(out: Path, quantizer: str, scheme: str, *more: str) -> Path:
    """A tiny model, quantised by the command."""
    folder = tiny_model("llama", vocab_size=256)
    text = out.parent / "text.jsonl"
    text.write_text(json.dumps({"text": "the cat sat on the mat and saw a bird. " * 20}) + "\n")
    arguments = [f"model={folder}", f"quantizer={quantizer}", f"scheme={scheme}", f"out={out}"]
    assert main(["quantize", *arguments, f"text={text}", "dtype=float32", "text_tokens=32",
                 *more]) == 0  # fmt: skip
    return out


def dense_of(folder: Path, out: Path) -> Path:
    """The same checkpoint with the values that its codes stand for."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    state = load_file(folder / "model.safetensors")
    dense = {}
    for name, tensor in state.items():
        stem, _, part = name.rpartition(".")
        if part == "weight" and f"{stem}.weight_scale" in state:
            dense[name] = tensor.float() * state[f"{stem}.weight_scale"]
        elif part == "weight" and f"{stem}.weight_scale_inv" in state:
            wide = state[f"{stem}.weight_scale_inv"].repeat_interleave(128, 0)
            wide = wide.repeat_interleave(128, 1)[: tensor.shape[0], : tensor.shape[1]]
            dense[name] = tensor.float() * wide
        elif "scale" not in part:
            dense[name] = tensor
    out.mkdir()
    save_file(dense, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def tokens_of(*settings: str, model: Path) -> list[list[int]]:
    engine = tiny_engine(*settings, model=model, max_model_len=64)
    return [o.token_ids for o in engine.generate(mixed_prompts(4, longest=20), PARAMS)]


def share_of_equal(a: list[list[int]], b: list[list[int]]) -> float:
    pairs = [x == y for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize(("quantizer", "scheme", "format"), WRITTEN)
def test_from_command_to_tokens(
    quantizer: str, scheme: str, format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine says of the checkpoint what it says of the weights that its codes stand for,
    rounded again to the same codes, with activations in the same format."""
    folder = quantized(tmp_path / "q", quantizer, scheme)
    assert "engine/linear=scaled_checkpoint" in capsys.readouterr().out
    record = json.loads((folder / "quantization.json").read_text())
    assert record["scheme"] == scheme and len(record["layers"]) > 8
    errors = [layer["output_error"] for layer in record["layers"] if layer["output_error"]]
    assert all(0 < error < 0.1 for error in errors)
    engine = tiny_engine(READS, model=folder, max_model_len=64)
    outputs = engine.generate(mixed_prompts(4, longest=20), PARAMS)
    counts = engine.counters()
    assert counts["linear.quantized_layers"] == 8 and counts["linear.dense_layers.lm_head"] == 1
    assert counts["linear.quantized_calls"] > 0
    found = [o.token_ids for o in outputs]
    dense = dense_of(folder, tmp_path / "d")
    if format != "fp8_tensor":  # whose activations have a scale that was measured
        again = tokens_of("engine/linear=scaled", f"engine.linear.format={format}", model=dense)
        assert share_of_equal(found, again) > 0.9
    assert share_of_equal(found, tokens_of(model=dense)) > 0.3


@pytest.mark.parametrize(("quantizer", "scheme", "format"), WRITTEN)
def test_transformers_loads_what_was_written(
    quantizer: str, scheme: str, format: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    folder = quantized(tmp_path / "q", quantizer, scheme)
    wanted = AutoModelForCausalLM.from_pretrained(dense_of(folder, tmp_path / "d"))
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 30, 41, 7]])
    with torch.no_grad():
        a, b = found(ids).logits.float(), wanted(ids).logits.float()
    # It rounds activations as well, where the dense one does not.
    assert float((a - b).norm() / b.norm()) < 0.15
    stored, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.down_proj"
    scales = stored[f"{name}.weight_scale"]
    torch.testing.assert_close(
        found.get_submodule(name).weight.float(),
        stored[f"{name}.weight"].float() * scales,
        rtol=1e-5, atol=1e-7,
    )  # fmt: skip


def in_blocks(out: Path, method: dict[str, Any]) -> Path:
    """A model of layers that 128 divides, in the format of DeepSeek-V3 or compressed-tensors."""
    folder = tiny_model("qwen3", vocab_size=128, hidden_size=128, intermediate_size=256,
                        head_dim=64)  # fmt: skip
    shutil.copytree(folder, out)
    state = load_file(folder / "model.safetensors")
    suffix = "weight_scale_inv" if method["quant_method"] == "fp8" else "weight_scale"
    stored = {}
    for name, tensor in state.items():
        if name.endswith("_proj.weight"):
            codes, scales = quantize_weight(tensor, "fp8_block")
            stored[name] = codes
            stored[f"{name.removesuffix('weight')}{suffix}"] = scales
        else:
            stored[name] = tensor
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = method
    (out / "config.json").write_text(json.dumps(config))
    return out


BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def block_config() -> dict[str, Any]:
    config = scaled_config(FP8Scheme(), ["lm_head"])
    group = config["config_groups"]["group_0"]
    group["weights"] |= {"strategy": "block", "block_structure": [128, 128]}
    group["input_activations"] |= {"strategy": "group", "group_size": 128}
    return config


@pytest.mark.parametrize("method", [BLOCKS, block_config()], ids=["deepseek", "compressed"])
def test_blocks_of_weights(method: dict[str, Any], tmp_path: Path) -> None:
    folder = in_blocks(tmp_path / "q", method)
    engine = tiny_engine(READS, model=folder, max_model_len=64)
    found = [o.token_ids for o in engine.generate(mixed_prompts(4, longest=20), PARAMS)]
    counts = engine.counters()
    assert counts["linear.quantized_layers"] == 8 and counts["linear.dense_layers.lm_head"] == 1
    if method is BLOCKS:
        dense = dense_of(folder, tmp_path / "d")
        again = tokens_of("engine/linear=scaled", "engine.linear.format=fp8_block", model=dense)
        assert share_of_equal(found, again) > 0.9


def test_layers_that_the_checkpoint_leaves_out(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "q", "fp8", "fp8", "quantizing.skip=*.0.self_attn.*")
    counts = tiny_engine(READS, model=folder).counters()
    assert counts["linear.quantized_layers"] == 6
    assert counts["linear.dense_layers.layers.0.qkv_proj"] == 1
    half = quantized(tmp_path / "h", "fp8", "fp8", "quantizing.skip=*.0.self_attn.q_proj")
    with pytest.raises(UnsupportedError, match=r"some parts of layer layers.0.qkv_proj"):
        tiny_engine(READS, model=half)


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "q", "fp8", "fp8_static")
    path = folder / "model.safetensors"
    state = load_file(path)

    def with_changes(**changes: torch.Tensor | None) -> None:
        kept = {k: v for k, v in {**state, **changes}.items() if v is not None}
        save_file(kept, path, metadata={"format": "pt"})

    name = "model.layers.1.mlp.down_proj"
    for part in ("weight_scale", "input_scale"):
        with_changes(**{f"{name}.{part}": None})
        with pytest.raises(WorkbenchError, match=f"Missing: {name}.{part}"):
            tiny_engine(READS, model=folder)
        for wrong in (float("nan"), 0.0, -1.0):
            with_changes(**{f"{name}.{part}": torch.full((1,), wrong)})
            with pytest.raises(UnsupportedError, match="down_proj has scales that are no positive"):
                tiny_engine(READS, model=folder)
        with_changes(**{f"{name}.{part}": torch.ones(7)})
        with pytest.raises(WorkbenchError, match=rf"{name}.{part} has \[7\]"):
            tiny_engine(READS, model=folder)
    codes = state[f"{name}.weight"].clone()
    codes.view(torch.uint8)[0, 0] = 0x7F
    with_changes(**{f"{name}.weight": codes})
    with pytest.raises(UnsupportedError, match="down_proj has weights that are no numbers"):
        tiny_engine(READS, model=folder)
    with pytest.raises(UnsupportedError, match="choose engine/linear=scaled to round it"):
        tiny_engine(READS)
    with pytest.raises(UnsupportedError, match="scaled_checkpoint where activations"):
        tiny_engine(model=folder)


def test_blocks_that_cannot_be_stacked_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "q"
    shutil.copytree(tiny_model("llama", vocab_size=256), folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = BLOCKS
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="128 does not divide all"):
        tiny_engine(READS, model=folder)


def changed(config: dict[str, Any], part: str, **fields: Any) -> dict[str, Any]:
    out = copy.deepcopy(config)
    out["config_groups"]["group_0"][part] |= fields
    return out


def test_what_is_read_of_configs() -> None:
    for name, expected in (
        ("fp8", ScaledScheme("fp8", kept=("lm_head",))),
        ("fp8_static", ScaledScheme("fp8_tensor", True, True, ("lm_head",))),
        ("w8a8", ScaledScheme("int8", kept=("lm_head",))),
    ):
        assert read_scaled_config(scaled_config(parse_scheme(name), ["lm_head"])) == expected
    found = read_scaled_config(BLOCKS | {"modules_to_not_convert": ["model.layers.0.mlp"]})
    assert found.format == "fp8_block" and found.scale == "weight_scale_inv"
    assert read_scaled_config(block_config()).scale == "weight_scale"
    good = scaled_config(FP8Scheme(), [])
    whole = scaled_config(WeightScheme(8, 0, rounds_inputs=True), [])
    for wrong, words in (
        ({"quant_method": "gptq"}, "quantised by 'gptq'"),
        ({**good, "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        ({**good, "config_groups": {}}, "0 groups of layers"),
        ({**good, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (changed(good, "weights", strategy="tensor_group"), "strategy channel or tensor"),
        (changed(good, "weights", num_bits=4), "'num_bits': 4"),
        (changed(good, "weights", strategy="block", block_structure=[64, 64]), r"\[64, 64\]"),
        (changed(good, "input_activations", strategy="group"), "'strategy': 'group'"),
        (changed(good, "input_activations", dynamic=False), "'dynamic': False"),
        (changed(whole, "input_activations", symmetric=False), "'symmetric': False"),
        (changed(whole, "input_activations", dynamic=False, strategy="tensor"), "of fp8 tensor"),
        ({**BLOCKS, "weight_block_size": [64, 128]}, r"blocks of \[64, 128\]"),
        ({**BLOCKS, "weight_block_size": None}, "blocks of None"),
        ({**BLOCKS, "activation_scheme": "static"}, "static activations"),
        ({**BLOCKS, "fmt": "e5m2"}, "'e5m2'"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            read_scaled_config(wrong)
    good["config_groups"]["group_0"]["input_activations"] = None
    with pytest.raises(UnsupportedError, match="activations in 16 bits"):
        read_scaled_config(good)


# -- quantisers -------------------------------------------------------------------------------


def statistics(x: torch.Tensor) -> InputStatistics:
    found = InputStatistics("layer", x.shape[1], keep_hessian=False)
    found.add(x)
    return found


def test_smoothing_keeps_the_product_and_evens_out_its_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 32, generator=generator), torch.randn(8, 32, generator=generator)
    x[:, 3] *= 100
    scheme = WeightScheme(8, 0, rounds_inputs=True)
    inputs = statistics(x)
    assert torch.equal(inputs.max_abs, x.abs().amax(0))
    for alpha in (0.0, 0.5, 1.0):
        scales = SmoothQuant(SmoothQuantOptions(alpha)).find_scales([weight], scheme, inputs)
        assert scales is not None
        torch.testing.assert_close(inputs.scaled(scales).max_abs, x.abs().amax(0) / scales)
        of_inputs = (x / scales).abs().amax(0)
        of_weights = (weight * scales).abs().amax(0)
        even = {0.0: of_weights, 0.5: of_inputs / of_weights, 1.0: of_inputs}[alpha]
        torch.testing.assert_close(even, even[:1].expand(32), rtol=1e-4, atol=0)


def test_fp8_measures_what_it_needs() -> None:
    weight, x = torch.randn(8, 32), torch.randn(16, 32)
    assert not FP8().needs_for(FP8Scheme()).any
    assert FP8().needs_for(FP8Scheme(is_static=True)).sizes
    found = FP8().quantize(weight, FP8Scheme(is_static=True), statistics(x), "layer")
    assert found.input_scale is not None
    torch.testing.assert_close(found.input_scale, x.abs().max().view(1) / 448)
    tensors = scaled_tensors("layer", found)
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {
        "layer.weight": (8, 32), "layer.weight_scale": (1,), "layer.input_scale": (1,),
    }  # fmt: skip
    torch.testing.assert_close(
        tensors["layer.weight"].float() * tensors["layer.weight_scale"], found.dequantize()
    )
    zeros = FP8().quantize(weight, FP8Scheme(is_static=True), statistics(torch.zeros(2, 32)))
    assert zeros.input_scale is not None and float(zeros.input_scale) > 0


def test_schemes_that_a_quantiser_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    model = f"model={tiny_model('llama', vocab_size=256)}"
    for quantizer, scheme, words in (
        ("fp8", "w4g64z", "not of w4g64z"),
        ("smoothquant", "fp8", "give scheme=w8a8"),
        ("smoothquant", "w8", "give scheme=w8a8"),
        ("rtn", "fp8", "take quantizer=fp8"),
        ("rtn", "w4a8", "unknown scheme of weights 'w4a8'"),
        ("fp8", "fp4", "With activations in 8 bits: w8a8, fp8, fp8_static"),
    ):
        assert main(["quantize", model, f"quantizer={quantizer}", f"scheme={scheme}",
                     "out=/nonexistent/q"]) == 2  # fmt: skip
        assert words in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"alpha=1.5 must be from 0 to 1"):
        SmoothQuantOptions(1.5)
    with pytest.raises(ConfigError, match="Valid: w8a8"):
        WeightScheme(4, 64, rounds_inputs=True)
    with pytest.raises(ConfigError, match="give calibration texts"):
        FP8().quantize(torch.ones(2, 2), FP8Scheme(is_static=True), None, "layer")
