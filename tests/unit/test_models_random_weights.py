"""Random weights: reproducible by name, and the same for another engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.batches import BatchDriver
from tests.helpers.tiny_models import hf_logits, tiny_config, tiny_model
from workbench.core.errors import WorkbenchError
from workbench.models.decoder import Decoder
from workbench.models.loader import load_model
from workbench.models.random_weights import random_tensors, save_random_checkpoint
from workbench.slots.linear import DenseLinear

IDS = [5, 9, 77, 30, 5, 9, 12, 100, 64, 33, 21]


def load_random(config: object, seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_model(
        config,  # type: ignore[arg-type]
        linear=DenseLinear(),
        dtype=dtype,
        device="cpu",
        weights="random",
        seed=seed,
    )


def logits(decoder: Decoder) -> torch.Tensor:
    driver = BatchDriver(decoder)
    (rows,) = driver.step([(driver.add(IDS), len(IDS))])
    return rows


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma3"])
def test_exported_weights_give_transformers_the_same_logits(family: str, tmp_path: Path) -> None:
    config = tiny_config(family, initializer_range=0.2)
    folder = save_random_checkpoint(config, tmp_path / "model", seed=3)
    expected = hf_logits(folder, IDS)
    torch.testing.assert_close(logits(load_random(config, 3)), expected, atol=1e-4, rtol=1e-4)
    checkpoint = load_model(folder, linear=DenseLinear(), dtype=torch.float32, device="cpu")
    torch.testing.assert_close(logits(checkpoint), expected, atol=1e-4, rtol=1e-4)
    assert (logits(load_random(config, 4)) - expected).abs().max() > 1e-2


def test_same_seed_same_weights_and_other_seed_others() -> None:
    config = tiny_config("qwen2")
    first, again, other = (dict(random_tensors(config, s, torch.float32)) for s in (0, 0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if "norm" not in name:
            assert not torch.equal(tensor, other[name])


def test_a_weight_depends_on_its_name_alone() -> None:
    """A model with one layer more, or a tied head, has the same weights where names agree."""
    small = dict(random_tensors(tiny_config("llama"), 0, torch.float32))
    deep = dict(random_tensors(tiny_config("llama", num_hidden_layers=3), 0, torch.float32))
    assert small.keys() < deep.keys()
    for name, tensor in small.items():
        assert torch.equal(tensor, deep[name])
    assert not torch.equal(
        small["model.layers.0.mlp.gate_proj.weight"], small["model.layers.0.mlp.up_proj.weight"]
    )


def test_stacked_layers_hold_the_tensors_of_the_checkpoint() -> None:
    config = tiny_config("llama")
    decoder = load_random(config)
    tensors = dict(random_tensors(config, 0, torch.float32))
    prefix = "model.layers.1.self_attn."
    stacked = torch.cat([tensors[f"{prefix}{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(decoder.layers[1].qkv_proj.state.dense_weight(), stacked)


@pytest.mark.parametrize(("family", "identity"), [("llama", 1.0), ("gemma3", 0.0)])
def test_norms_are_the_identity_and_the_rest_has_the_configs_width(
    family: str, identity: float
) -> None:
    config = tiny_config(family, initializer_range=0.05, hidden_size=128, attention_bias=True)
    for name, tensor in random_tensors(config, 0, torch.bfloat16):
        assert tensor.dtype is torch.bfloat16
        if "norm" in name:
            assert (tensor == identity).all()
        else:
            # The deviation of n draws is off by about std / sqrt(2 n); five times that is rare.
            allowed = 5 * config.initializer_range / (2 * tensor.numel()) ** 0.5
            assert abs(tensor.float().std() - config.initializer_range) < allowed + 1e-4


def test_no_weight_file_is_read(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert torch.equal(logits(load_random(tmp_path)), logits(load_random(tiny_config("llama"))))


def test_export_is_split_over_files_and_whole_or_absent(tmp_path: Path) -> None:
    config = tiny_config("llama")
    folder = save_random_checkpoint(config, tmp_path / "many", max_file_bytes=50_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    split = load_model(folder, linear=DenseLinear(), dtype=torch.float32, device="cpu")
    assert torch.equal(logits(split), logits(load_random(config)))
    with pytest.raises(WorkbenchError, match="exists already"):
        save_random_checkpoint(config, folder)


def test_an_export_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("workbench.models.random_weights.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_random_checkpoint(tiny_config("llama"), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_config_given_stays_as_it_was(tmp_path: Path) -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    save_random_checkpoint(config, tmp_path / "model", dtype=torch.bfloat16)
    assert config.to_dict() == before


def test_tiny_models_differ_by_weight_seed() -> None:
    assert tiny_model("llama") == tiny_model("llama")
    assert tiny_model("llama") != tiny_model("llama", weight_seed=1)
