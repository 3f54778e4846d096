"""``quantize`` from command to served checkpoint, and the format in between."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from techniques.quantization import WeightScheme, encode, find_grid
from techniques.quantization.compressed_tensors import (
    codes_of,
    config_of,
    is_kept,
    pack_words,
    read_config,
    tensors_of,
    unpack_words,
)
from tests.helpers.engines import mixed_prompts, tiny_engine
from tests.helpers.tiny_models import tiny_model
from workbench.cli.main import main
from workbench.core.errors import UnsupportedError, WorkbenchError
from workbench.core.sampling import SamplingParams

READS = "engine/linear=packed_checkpoint"
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


def quantized(out: Path, scheme: str, *more: str, model: str = "llama") -> Path:
    """A tiny model, quantised by the command."""
    folder = tiny_model(model, vocab_size=256)
    text = out.parent / "text.jsonl"
    text.write_text(json.dumps({"text": "the cat sat on the mat and saw a bird. " * 20}) + "\n")
    arguments = [f"model={folder}", f"scheme={scheme}", f"out={out}", f"text={text}"]
    assert main(["quantize", *arguments, "dtype=float32", "text_tokens=32", *more]) == 0
    return out


def written_as(folder: Path, out: Path) -> Path:
    """The same checkpoint with the values that its codes stand for, as a dense one."""
    config = json.loads((folder / "config.json").read_text())
    scheme, _ = read_config(config.pop("quantization_config"))
    state = load_file(folder / "model.safetensors")
    dense = {}
    for name, tensor in state.items():
        layer, _, part = name.rpartition(".")
        if part == "weight_packed":
            shape = state[f"{layer}.weight_shape"].tolist()
            zeros = state.get(f"{layer}.weight_zero_point")
            codes, zeros = codes_of(tensor, zeros, scheme, shape[1])
            scales = state[f"{layer}.weight_scale"].repeat_interleave(
                shape[1] // state[f"{layer}.weight_scale"].shape[1], 1
            )
            shift = 0 if zeros is None else zeros.repeat_interleave(shape[1] // zeros.shape[1], 1)
            dense[f"{layer}.weight"] = (codes - shift) * scales
        elif not part.startswith("weight_"):
            dense[name] = tensor
    out.mkdir()
    save_file(dense, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("bits", [4, 8])
def test_words(bits: int) -> None:
    """Against the format's own library, where it is installed; and back."""
    codes = torch.randint(0, 1 << bits, (6, 21), generator=torch.Generator().manual_seed(0))
    words = pack_words(codes, bits)
    assert torch.equal(unpack_words(words, bits, 21).long(), codes)
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    signed = (codes - (1 << bits - 1)).to(torch.int8)
    assert torch.equal(words, library.pack_to_int32(signed, bits))


@pytest.mark.parametrize("name", ["w4g32", "w4g32z", "w8", "w8g64z"])
def test_a_layer_and_back(name: str) -> None:
    scheme = WeightScheme.parse(name)
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    found = encode(weight, scheme, *find_grid(weight, scheme))
    tensors = tensors_of("x", found, torch.float32)
    codes, zeros = codes_of(
        tensors["x.weight_packed"], tensors.get("x.weight_zero_point"), scheme, 128
    )
    assert torch.equal(codes, found.codes)
    assert (zeros is None) == (found.zeros is None)
    assert zeros is None or found.zeros is None or torch.equal(zeros, found.zeros)
    assert tensors["x.weight_packed"].shape == (16, 128 * scheme.bits // 32)
    assert tensors["x.weight_shape"].tolist() == [16, 128]
    assert read_config(config_of(scheme, ["lm_head"])) == (scheme, ("lm_head",))


@pytest.mark.parametrize(
    ("quantizer", "scheme", "more"),
    [
        ("rtn", "w4g32z", ()),
        ("gptq", "w4g32", ("quantizing.skip=*.0.self_attn.*",)),
        ("awq", "w8", ()),
        ("hqq", "w4g32z", ()),
    ],
)
def test_from_command_to_tokens(
    quantizer: str, scheme: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    """The engine says of the checkpoint what it says of the values that the codes stand for."""
    folder = quantized(tmp_path / "q", scheme, f"quantizer={quantizer}", *more)
    record = json.loads((folder / "quantization.json").read_text())
    assert record["quantizer"] == quantizer and record["scheme"] == scheme
    assert len(record["layers"]) > 8 and record["kept"]
    engine = tiny_engine(READS, model=folder, max_model_len=64)
    dense = tiny_engine(model=written_as(folder, tmp_path / "d"), max_model_len=64)
    prompts = mixed_prompts(4, longest=20)
    found = [o.token_ids for o in engine.generate(prompts, PARAMS)]
    wanted = [o.token_ids for o in dense.generate(prompts, PARAMS)]
    same = sum(
        a == b for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True)
    )
    # Products multiply bf16 activations, so that near-ties may break another way.
    assert same > 0.7 * 4 * 12
    counts = engine.counters()
    assert counts["linear.quantized_layers"] > 4 and counts["linear.quantized_calls"] > 0
    assert (counts["linear.dense_layers"] > 1) == bool(more)


def test_a_head_that_is_the_embedding_is_left_out_by_its_name(tmp_path: Path) -> None:
    """Also where config.json leaves it to the family to say that they are one."""
    folder = tiny_model("gemma3", vocab_size=256)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    config = json.loads((bare / "config.json").read_text())
    assert config.pop("tie_word_embeddings", True)
    (bare / "config.json").write_text(json.dumps(config))
    out = tmp_path / "q"
    assert main(["quantize", f"model={bare}", "quantizer=rtn", "scheme=w8", f"out={out}",
                 "dtype=float32", "text_tokens=32"]) == 0  # fmt: skip
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    assert written["ignore"] == ["lm_head"]


def test_transformers_loads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    folder = quantized(tmp_path / "q", "w4g32", "quantizer=rtn")
    wanted = AutoModelForCausalLM.from_pretrained(written_as(folder, tmp_path / "d"))
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[5, 9, 30, 41, 7]])
    with torch.no_grad():
        torch.testing.assert_close(
            found(ids).logits.float(), wanted(ids).logits.float(), atol=1e-3, rtol=1e-3
        )


def test_wrong_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"model={tiny_model('llama', vocab_size=256)}"
    for arguments, words in (
        ([model], "needs one quantizer=: autoround, awq, "),
        ([model, "quantizer=magic"], "unknown quantizer 'magic'"),
        ([model, "quantizer=rtn", "scheme=w3"], "unknown scheme of weights 'w3'"),
        ([model, "quantizer=rtn", "scheme=w4g48"], "48"),
        ([model, "quantizer=gptq", "quantizer.damp=much"], "quantizer.damp='much' must be of type"),
        ([model, "quantizer=rtn", "weights=random"], "weights=random has nothing to keep"),
        ([model, "quantizer=rtn", "num_texts=0"], "num_texts=0 must be"),
    ):
        assert main(["quantize", *arguments, f"out={tmp_path / 'q'}"]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["quantize", model, "quantizer=rtn", f"out={tmp_path}"]) == 2
    assert "holds a model already" in capsys.readouterr().err


def test_who_reads_what_is_said(tmp_path: Path) -> None:
    folder = quantized(tmp_path / "q", "w4g32", "quantizer=rtn")
    with pytest.raises(UnsupportedError, match=r"quantised \('compressed-tensors'.*packed_check"):
        tiny_engine(model=folder)
    with pytest.raises(UnsupportedError, match="the model's checkpoint is not quantised"):
        tiny_engine(READS)
    path = folder / "model.safetensors"
    state = load_file(path)
    broken = next(name for name in state if name.endswith("down_proj.weight_scale"))
    lacking = {name: tensor for name, tensor in state.items() if name != broken}
    save_file(lacking, path, metadata={"format": "pt"})
    with pytest.raises(WorkbenchError, match=f"Missing: {broken}"):
        tiny_engine(READS, model=folder)
    save_file({**state, broken: state[broken] * float("nan")}, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="scales that are no finite numbers"):
        tiny_engine(READS, model=folder)


def test_checkpoints_of_other_methods() -> None:
    good: dict[str, Any] = config_of(WeightScheme(4, 64), [])
    weights = good["config_groups"]["group_0"]["weights"]
    for wrong, words in (
        ({"quant_method": "gptq"}, "quantised by 'gptq'"),
        ({**good, "format": "nvfp4-pack-quantized"}, "format nvfp4-pack-quantized"),
        ({**good, "config_groups": {}}, "0 groups of layers"),
        (_with(good, input_activations={"num_bits": 8}), "its activations"),
        (_with(good, weights={**weights, "actorder": "random"}), "actorder"),
        (_with(good, weights={**weights, "type": "float"}), "float"),
        (_with(good, weights={**weights, "num_bits": 3}), "3 bits"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            read_config(wrong)
    assert is_kept("model.layers.3.mlp.gate", ["re:.*gate$"]) and is_kept("lm_head", ["lm_head"])
    assert not is_kept("model.layers.3.mlp.gate_proj", ["re:.*gate$", "lm_head"])


def _with(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        **config,
        "config_groups": {"group_0": {**config["config_groups"]["group_0"], **fields}},
    }
