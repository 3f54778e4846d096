"""Loading: what is read, what it costs, and what is said when it cannot work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_models import hf_model, tiny_config, tiny_model
from workbench.core.errors import ConfigError, UnsupportedError, WorkbenchError
from workbench.models.decoder import Decoder
from workbench.models.loader import load_model
from workbench.slots.linear import DenseLinear, LinearLayer, LinearMethod
from workbench.slots.parallel import SingleDevice

Tensors = dict[str, torch.Tensor]


def load(folder: Path, **options: object) -> Decoder:
    options = {"linear": DenseLinear(), "dtype": torch.float32, "device": "cpu", **options}
    return load_model(folder, **options)  # type: ignore[arg-type]


def changed_copy(source: Path, target: Path, change: Callable[[Tensors], object]) -> Path:
    """Copy a model folder with other tensors."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def dense_weight(decoder: Decoder, name: str) -> torch.Tensor:
    (layer,) = [layer for layer in decoder.linear_layers() if layer.name == name]
    return layer.state.dense_weight()


def test_projections_are_stacked_in_the_order_of_the_shards() -> None:
    folder = tiny_model("qwen2")
    decoder = load(folder)
    attention = hf_model(folder).model.layers[1].self_attn
    stacked = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(dense_weight(decoder, "layers.1.qkv_proj"), stacked)
    mlp = hf_model(folder).model.layers[1].mlp
    stacked = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    assert torch.equal(dense_weight(decoder, "layers.1.gate_up_proj"), stacked)


def test_weights_are_cast_to_the_dtype_asked_for() -> None:
    decoder = load(tiny_model("llama"), dtype=torch.bfloat16)
    weight = hf_model(tiny_model("llama")).model.layers[0].self_attn.o_proj.weight
    assert torch.equal(dense_weight(decoder, "layers.0.o_proj"), weight.to(torch.bfloat16))
    assert decoder.embedding.dtype is decoder.final_norm.dtype is torch.bfloat16


def test_a_checkpoint_in_several_files_loads_the_same(tmp_path: Path) -> None:
    whole = tiny_model("llama")
    hf_model(whole).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    one, several = load(whole), load(tmp_path)
    for layer in one.linear_layers():
        assert torch.equal(dense_weight(one, layer.name), dense_weight(several, layer.name))
    assert torch.equal(one.embedding, several.embedding)


def test_no_mapping_of_the_file_is_left(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    decoder = load(folder)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    assert str(folder) not in maps.read_text()
    os.truncate(folder / "model.safetensors", 0)  # would end in SIGBUS if a page were still mapped
    assert decoder.embedding.isfinite().all()


class _Spy(DenseLinear):
    """Remembers how many layers had unprocessed weights in memory at once."""

    def __init__(self) -> None:
        super().__init__()
        self.open: set[str] = set()
        self.most_open = 0
        self.order: list[str] = []

    def create_weights(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> None:
        super().create_weights(layer, dtype, device)
        if device.type != "meta":
            self.open.add(layer.name)
            self.most_open = max(self.most_open, len(self.open))

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        super().process_weights_after_loading(layer, expected_tokens)
        assert expected_tokens == 5
        self.open.discard(layer.name)
        self.order.append(layer.name)


def test_layers_are_processed_one_at_a_time() -> None:
    spy = _Spy()
    decoder = load(tiny_model("llama"), linear=spy, expected_tokens=5)
    assert spy.most_open == 1 and not spy.open
    assert sorted(spy.order) == sorted(layer.name for layer in decoder.linear_layers())


class _Transposed(LinearMethod):
    """A format that stores ``weight_t [in, out]``: shards stack along the last dimension."""

    def create_weights(self, layer: LinearLayer, dtype: torch.dtype, device: torch.device) -> None:
        shape = (layer.in_features, layer.out_features)
        layer.params["weight_t"] = torch.empty(shape, dtype=dtype, device=device)

    def process_weights_after_loading(self, layer: LinearLayer, expected_tokens: int) -> None:
        layer.state = layer.params.pop("weight_t")

    def apply(self, layer: LinearLayer, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.state


def test_a_linear_method_decides_what_its_checkpoints_hold(tmp_path: Path) -> None:
    source = tiny_model("llama")

    def transpose(tensors: Tensors) -> None:
        for name in list(tensors):
            if "_proj" in name or "lm_head" in name:
                tensors[f"{name}_t"] = tensors.pop(name).T.contiguous()

    folder = changed_copy(source, tmp_path / "model", transpose)
    decoder, dense = load(folder, linear=_Transposed()), load(source)
    for layer in decoder.linear_layers():
        assert torch.equal(layer.state.T, dense_weight(dense, layer.name))
    with pytest.raises(WorkbenchError, match=r"Missing: .*weight_t.* Unexpected: .*weight"):
        load(source, linear=_Transposed())


def test_rope_tables_are_as_long_as_asked_and_shared() -> None:
    decoder = load(tiny_model("gemma3"), max_model_len=32)
    tables = {id(layer.rope.cos_sin): layer.rope.cos_sin for layer in decoder.layers}
    assert [table.shape[0] for table in tables.values()] == [32, 32]  # local and global
    assert decoder.rope_bytes == decoder.spec.rope_bytes(32)


@pytest.mark.parametrize("length", [0, 257])
def test_context_outside_the_models_own_is_refused(length: int) -> None:
    with pytest.raises(WorkbenchError, match=f"max_model_len={length} .* 256"):
        load(tiny_model("llama"), max_model_len=length)


# -- what does not fit ----------------------------------------------------------------------------


def test_every_missing_and_unexpected_tensor_is_named(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.router.weight"] = torch.zeros(2)

    folder = changed_copy(tiny_model("llama"), tmp_path / "model", change)
    with pytest.raises(WorkbenchError) as error:
        load(folder)
    message = str(error.value)
    assert "Missing: model.layers.1.self_attn.k_proj.weight, model.norm.weight." in message
    assert "Unexpected: model.layers.0.mlp.router.weight." in message


def test_a_missing_bias_is_not_taken_for_zero(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["model.layers.0.self_attn.v_proj.bias"]

    folder = changed_copy(tiny_model("qwen2"), tmp_path / "model", change)
    with pytest.raises(WorkbenchError, match=r"Missing: .*v_proj\.bias"):
        load(folder)


def test_wrong_shapes_are_named_with_both_shapes(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 63)
        tensors["model.norm.weight"] = torch.zeros(65)

    folder = changed_copy(tiny_model("llama"), tmp_path / "model", change)
    with pytest.raises(WorkbenchError) as error:
        load(folder)
    message = str(error.value)
    assert "model.layers.0.mlp.up_proj.weight has [96, 63], expected [96, 64]" in message
    assert "model.norm.weight has [65], expected [64]" in message


def test_relics_and_a_second_tied_head_are_harmless(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    source = tiny_model("llama_tied")
    folder = changed_copy(source, tmp_path / "model", change)
    assert torch.equal(dense_weight(load(folder), "lm_head"), load(source).embedding)


def test_an_untied_head_is_not_optional(tmp_path: Path) -> None:
    folder = changed_copy(
        tiny_model("llama"), tmp_path / "model", lambda t: t.pop("lm_head.weight")
    )
    with pytest.raises(WorkbenchError, match=r"Missing: lm_head\.weight"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, keep: float) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    file = folder / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, int(keep if keep >= 1 else size * keep))
    with pytest.raises(WorkbenchError, match=r"model\.safetensors is truncated"):
        load(folder)


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(WorkbenchError, match=r"model\.safetensors does not exist"):
        load(tmp_path)


def test_an_index_that_promises_too_much_is_told(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.bias": "model.safetensors"}}))
    with pytest.raises(WorkbenchError, match=r"lacks tensors .*: model\.norm\.bias"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "other.safetensors"}}))
    with pytest.raises(WorkbenchError, match=r"other\.safetensors does not exist"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(WorkbenchError, match=r"is not a safetensors index"):
        load(folder)


def test_kind_of_weights_that_is_unknown_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="Valid: checkpoint, random"):
        load(tiny_model("llama"), weights="dummy")


def test_checkpoint_weights_need_a_folder() -> None:
    with pytest.raises(WorkbenchError, match="weights=random"):
        load(tiny_config("llama"))


def test_a_split_over_devices_is_refused() -> None:
    class Two(SingleDevice):
        axes = {"tp": 2}  # noqa: RUF012

    with pytest.raises(UnsupportedError, match="'tp': 2"):
        load(tiny_model("llama"), parallel=Two())
