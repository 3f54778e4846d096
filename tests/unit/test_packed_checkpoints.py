"""Checkpoints of GPTQ, AWQ, AutoRound and compressed-tensors, packed here by their documentation,
and read as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.triton import is_interpreted
from techniques.quantization import PackedCheckpoint
from techniques.quantization.packed_formats import read_packed_config
from tests.helpers.tiny_models import tiny_model
from tests.helpers.whole_models import whole_logits
from workbench.core.errors import UnsupportedError, WorkbenchError
from workbench.models.loader import load_model
from workbench.slots.linear import DenseLinear, LinearLayer

TEXTS = [[5, 9, 30, 41, 7, 66, 12], [80, 3, 11]]
Tensors = dict[str, Tensor]


# -- packing, one code at a time, as the formats have it ------------------------------------------


def words_of(codes: list[int], bits: int) -> int:
    """One int32 of codes, the first lowest."""
    word = sum(code << bits * place for place, code in enumerate(codes))
    return word - (1 << 32) if word >= 1 << 31 else word


def packed_rows(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """``[R, C]`` to ``[R, C / n]``; ``order`` has the column of each place of a word."""
    n = 32 // bits
    order = order or tuple(range(n))
    rows = [
        [words_of([row[first + i] for i in order], bits) for first in range(0, len(row), n)]
        for row in codes.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


class Rounded:
    """A weight in codes of 0 to ``2 ** bits - 1`` with zero points, by min and max of groups."""

    def __init__(
        self, weight: Tensor, bits: int, size: int, order_seed: int | None = None, sym: bool = False
    ) -> None:
        columns = weight.shape[1]
        size = columns if size == -1 else size
        self.index = torch.arange(columns, dtype=torch.int32) // size
        if order_seed is not None:
            generator = torch.Generator().manual_seed(order_seed)
            self.index = self.index[torch.randperm(columns, generator=generator)]
        top = (1 << bits) - 1
        groups = [weight[:, self.index == g] for g in range(columns // size)]
        low = torch.stack([g.amin(1).clamp(max=-1e-3) for g in groups], 1)
        high = torch.stack([g.amax(1).clamp(min=1e-3) for g in groups], 1)
        # Files hold scales in 16 bits.
        self.scales = ((high - low) / top).half().float()
        self.zeros = (-low / self.scales).round().clamp(1, top).int()
        if sym:
            half = torch.full_like(self.zeros, 1 << bits - 1)
            self.zeros, size_of = half, torch.maximum(-low, high)
            self.scales = (size_of / (half[0, 0] - 1)).half().float()
        of = self.index.long()
        codes = (weight / self.scales[:, of] + self.zeros[:, of]).round().clamp(0, top)
        self.codes, self.bits = codes.int(), bits
        self.values = (codes - self.zeros[:, of]) * self.scales[:, of]

    def gptq(self, *, v2: bool = False, index: bool = True, bias: bool = False) -> Tensors:
        less = 0 if v2 else 1
        found = {
            "qweight": packed_rows(self.codes, self.bits).T.contiguous(),
            "qzeros": packed_rows((self.zeros - less).T, self.bits),
            "scales": self.scales.T.half().contiguous(),
        }
        if index:
            found["g_idx"] = self.index
        if bias:
            found["bias"] = torch.zeros(len(self.codes), dtype=torch.float16)
        return found

    def awq(self) -> Tensors:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            "qweight": packed_rows(self.codes.T, 4, order),
            "qzeros": packed_rows(self.zeros.T, 4, order),
            "scales": self.scales.T.half().contiguous(),
        }

    def compressed(self) -> Tensors:
        return {
            "weight_packed": packed_rows(self.codes, self.bits),
            "weight_scale": self.scales.half(),
            "weight_zero_point": packed_rows(self.zeros.T, self.bits).T.contiguous(),
            "weight_shape": torch.tensor(self.codes.shape),
            "weight_g_idx": self.index,
        }


Pack = Callable[[str, Tensor], tuple[Tensors, Tensor] | None]


def written(out: Path, config: dict[str, Any], pack: Pack, model: str = "llama") -> Path:
    """A tiny model of which ``pack`` makes tensors and the values they stand for (None: the layer
    stays), in ``out``; the dense model of the values is in ``out.parent / "dense"``."""
    source = tiny_model(model, hidden_size=64, intermediate_size=128)
    dense = out.parent / "dense"
    for folder in (out, dense):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
    state = load_file(source / "model.safetensors")
    packed, values = {}, {}
    for name, tensor in state.items():
        found = None
        if name.endswith("proj.weight") or name == "lm_head.weight":
            found = pack(name.removesuffix(".weight"), tensor.float())
        if found is None:
            packed[name] = values[name] = tensor
            continue
        values[name] = found[1]
        packed |= {f"{name.removesuffix('weight')}{k}": v for k, v in found[0].items()}
    save_file(packed, out / "model.safetensors", metadata={"format": "pt"})
    save_file(values, dense / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**stated, "quantization_config": config}))
    return out


def logits_of(folder: Path, linear: Any) -> Tensor:
    decoder = load_model(folder, linear=linear, dtype=torch.float32, device="cpu")
    return whole_logits(decoder, TEXTS)


def check(folder: Path, exact: bool) -> PackedCheckpoint:
    """Logits are those of the dequantised weights."""
    method = PackedCheckpoint()
    found = logits_of(folder, method)
    wanted = logits_of(folder.parent / "dense", DenseLinear())
    # Where kernels serve a layer they round activations and scales to bf16.
    bound = 1e-5 if exact and not is_interpreted() else 0.02
    assert float((found - wanted).norm() / wanted.norm()) < bound
    return method


def seed_of(name: str) -> int:
    return sum(map(ord, name))


#: Layers that share an input are reordered alike, as all writers have it.
def shared_seed(name: str) -> int:
    part = name.rpartition(".")[2]
    return {"q_proj": 1, "k_proj": 1, "v_proj": 1, "gate_proj": 2, "up_proj": 2}.get(part, 3)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize(
    ("bits", "size", "sym"),
    [(4, 16, False), (4, 32, False), (4, 64, True), (4, -1, False), (8, 32, False), (8, -1, True)],
)
def test_gptq(bits: int, size: int, sym: bool, v2: bool, tmp_path: Path) -> None:
    form = {"checkpoint_format": "gptq_v2"} if v2 else {}
    config = {**GPTQ, "bits": bits, "group_size": size, "sym": sym, **form}

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor] | None:
        if name == "lm_head":
            return None
        found = Rounded(weight, bits, size, sym=sym)
        # Some writers leave the index out where it says nothing, others add a bias of zeros.
        return found.gptq(v2=v2, index="mlp" in name, bias="down" in name), found.values

    served = (bits == 4 and size in (32, 64)) or (bits == 8 and size == -1)
    counts = check(written(tmp_path / "q", config, pack), not served).counters()
    assert counts["quantized_layers"] == 8 and counts["dense_layers.lm_head"] == 1
    if not is_interpreted():
        assert counts["native_calls" if served else "reference_calls"] > 0
    assert counts["ordered_layers"] == counts["split_layers"] == 0


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("model", ["llama", "llama_biases"])
def test_gptq_in_the_order_of_activations(size: int, model: str, tmp_path: Path) -> None:
    """Stacked layers of one order are one product; of several, as many."""
    config = {**GPTQ, "group_size": size, "desc_act": True, "lm_head": True}
    for seed, num_split in ((shared_seed, 0), (seed_of, 4)):

        def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
            order = 4 if name == "lm_head" else seed(name)  # noqa: B023
            found = Rounded(weight, 4, size, order_seed=order)
            return found.gptq(), found.values

        counts = check(written(tmp_path / "q", config, pack, model), size == 16).counters()
        assert counts["quantized_layers"] == counts["ordered_layers"] == 9
        assert counts["split_layers"] == num_split and counts["dense_layers"] == 0


def test_rules_of_gptq_for_single_layers(tmp_path: Path) -> None:
    config = {**GPTQ, "dynamic": {"-:.*\\.0\\.self_attn": {}, "+:.*down": {"bits": 8}}}

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor] | None:
        if name == "lm_head" or ".0.self_attn" in name:
            return None
        found = Rounded(weight, 8 if "down" in name else 4, 16)
        return found.gptq(), found.values

    counts = check(written(tmp_path / "q", config, pack), True).counters()
    assert counts["quantized_layers"] == 6 and counts["dense_layers"] == 3
    assert counts["dense_layers.layers.0.qkv_proj"] == 1
    inside = {**GPTQ, "modules_in_block_to_quantize": [["mlp.up_proj", "mlp.gate_proj"]]}
    scheme_of = read_packed_config(inside).scheme_of
    assert scheme_of("model.layers.0.mlp.up_proj") and not scheme_of("model.layers.0.mlp.down_proj")


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


@pytest.mark.parametrize("size", [16, 32, -1])
def test_awq(size: int, tmp_path: Path) -> None:
    kept = ["layers.1.mlp"]
    config = {**AWQ, "group_size": size, "modules_to_not_convert": kept}

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor] | None:
        if name == "lm_head" or kept[0] in name:
            return None
        found = Rounded(weight, 4, size)
        return found.awq(), found.values

    counts = check(written(tmp_path / "q", config, pack), size != 32).counters()
    assert counts["quantized_layers"] == 6 and counts["dense_layers"] == 3
    assert counts["dense_layers.layers.1.gate_up_proj"] == 1


@pytest.mark.parametrize("packing", ["auto_gptq", "auto_awq", None])
def test_auto_round(packing: str | None, tmp_path: Path) -> None:
    config: dict[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 16,
                              "sym": False, "data_type": "int"}  # fmt: skip
    if packing:
        config["packing_format"] = f"auto_round:{packing}"
    config["extra_config"] = {
        "model.layers.0.mlp.down_proj": {"bits": 16, "data_type": "fp"},
        ".*1\\.self_attn\\.o_proj": {"bits": 4, "group_size": 64},
        ".*layers\\.1\\.mlp\\.(gate|up)_proj": {"bits": 16},
    }

    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor] | None:
        if name in ("lm_head", "model.layers.0.mlp.down_proj"):
            return None
        if "layers.1.mlp" in name and "down" not in name:
            return None
        found = Rounded(weight, 4, 64 if "1.self_attn.o_proj" in name else 16)
        return found.awq() if packing == "auto_awq" else found.gptq(index=False), found.values

    counts = check(written(tmp_path / "q", config, pack), False).counters()
    assert counts["quantized_layers"] == 6 and counts["dense_layers"] == 3
    with pytest.raises(UnsupportedError, match=r"in different schemes \(.*q_proj 8 bits in groups"):
        wrong = {**config, "extra_config": {"model.layers.0.self_attn.q_proj": {"bits": 8}}}
        wrong.pop("packing_format", None)
        logits_of(written(tmp_path / "q", wrong, pack), PackedCheckpoint())
    scheme_of = read_packed_config({**config, "block_name_to_quantize": "a.layers"}).scheme_of
    assert scheme_of("a.layers.0.mlp.up_proj") and not scheme_of("b.layers.0.mlp.up_proj")


def compressed_config(order: str | None) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group",
               "group_size": 16, "actorder": order}  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": group}, "ignore": ["lm_head"]}  # fmt: skip


@pytest.mark.parametrize("order", ["group", "weight", "static", None])
def test_compressed_tensors_in_another_order(order: str | None, tmp_path: Path) -> None:
    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor] | None:
        if name == "lm_head":
            return None
        seed = shared_seed(name) if order == "group" and "down" not in name else None
        found = Rounded(weight, 4, 16, order_seed=seed)
        tensors = found.compressed()
        if order != "group":
            del tensors["weight_g_idx"]
        elif "down" in name:  # as it is created: not reordered
            tensors["weight_g_idx"] = torch.full_like(found.index, -1)
        return tensors, found.values

    counts = check(written(tmp_path / "q", compressed_config(order), pack), True).counters()
    assert counts["ordered_layers"] == (6 if order == "group" else 0)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "bitsandbytes"},
         "by 'bitsandbytes'; 'compressed-tensors', 'gptq', 'awq', 'auto-round' are read"),
        ({**GPTQ, "bits": 3}, "weights of 3 bits; 4, 8 bits are read"),
        ({**GPTQ, "group_size": 0}, "group_size 0; -1"),
        ({**GPTQ, "group_size": "all"}, "group_size 'all'"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "'marlin'; 'gptq' and 'gptq_v2' are read"),
        ({**GPTQ, "is_marlin_format": True}, "'marlin'; 'gptq'"),
        ({**GPTQ, "pack_dtype": "int64"}, "codes in int64; words of int32"),
        ({**GPTQ, "dynamic": {"+:x": {"bits": 2}}}, r"rule '\+:x' has weights of 2 bits"),
        ({**AWQ, "bits": 8}, "weights of 8 bits; 4 bits are read"),
        ({**AWQ, "version": "gemv"}, "version 'gemv'; 'gemm' is read"),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:"
          "fp8"}, "'auto_round:fp8'; 'auto_round:auto_gptq' and"),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_fp"},
         "data_type 'mx_fp'; 'int' is read"),
        (compressed_config("random"), "actorder group, weight, dynamic, static or none"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        read_packed_config(config)


def test_broken_checkpoints_are_named(tmp_path: Path) -> None:
    def pack(name: str, weight: Tensor) -> tuple[Tensors, Tensor] | None:
        found = Rounded(weight, 4, 16, order_seed=shared_seed(name))
        return None if name == "lm_head" else (found.gptq(), found.values)

    folder = written(tmp_path / "q", {**GPTQ, "desc_act": True}, pack)
    path, name = folder / "model.safetensors", "model.layers.1.mlp.down_proj"
    state = load_file(path)

    def load(**changes: Tensor | None) -> None:
        kept = {k: v for k, v in {**state, **changes}.items() if v is not None}
        save_file(kept, path, metadata={"format": "pt"})
        load_model(folder, linear=PackedCheckpoint(), dtype=torch.float32, device="cpu")

    load()
    for part in ("scales", "qzeros", "g_idx"):
        with pytest.raises(WorkbenchError, match=f"Missing: {name}.{part}"):
            load(**{f"{name}.{part}": None})
    with pytest.raises(UnsupportedError, match="down_proj has scales that are no finite"):
        load(**{f"{name}.scales": state[f"{name}.scales"] * float("inf")})
    with pytest.raises(WorkbenchError, match=r"scales has \[3, 64\], expected what 64 of 64"):
        load(**{f"{name}.scales": torch.ones(3, 64)})
    index = state[f"{name}.g_idx"]
    for wrong, words in (
        (index + 1, "a group index from 1 to 8, and groups 0 to 7"),
        (index.where(index > 0, 1), "groups of 0 to 32 inputs; all must have 16"),
    ):
        with pytest.raises(UnsupportedError, match=f"down_proj has {words}"):
            load(**{f"{name}.g_idx": wrong.to(torch.int32)})
    with pytest.raises(UnsupportedError, match="down_proj has zero points of 0, which"):
        load(**{f"{name}.qzeros": torch.full_like(state[f"{name}.qzeros"], -1)})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 48
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"qkv_proj of the checkpoint: groups of 48 do not"):
        load()


def test_widths_that_words_do_not_divide() -> None:
    method = PackedCheckpoint()
    method.read_checkpoint(GPTQ)
    for layer, words in (
        (LinearLayer("x", 64, 44, (("a", 40), ("b", 4))), "outputs that 8 does not divide"),
        (LinearLayer("x", 20, 40, (("a", 40),)), "groups of 16 do not divide 20"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            method.create_weights(layer, torch.float32, torch.device("cpu"))
    method.read_checkpoint({**GPTQ, "group_size": -1})
    with pytest.raises(UnsupportedError, match="20 inputs, which 8 does not divide"):
        layer = LinearLayer("x", 20, 40, (("a", 40),))
        method.create_weights(layer, torch.float32, torch.device("cpu"))


def test_a_bias_that_no_layer_should_have_is_added_all_the_same() -> None:
    method = PackedCheckpoint()
    method.read_checkpoint(GPTQ)
    weight, bias = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8.0)
    found = Rounded(weight, 4, 16)
    layer = LinearLayer("x", 32, 8, (("a", 8),))
    method.create_weights(layer, torch.float32, torch.device("cpu"))
    assert layer.optional == {"bias", "g_idx"}
    for name, tensor in found.gptq(index=False).items():
        layer.params[name].copy_(tensor)
    layer.params["bias"].copy_(bias)
    method.process_weights_after_loading(layer, 1)
    x = torch.randn(3, 32)
    torch.testing.assert_close(method.apply(layer, x), x @ found.values.T + bias)
