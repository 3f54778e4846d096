"""Configs of every shape become specs, or an error that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_models import tiny_config, tiny_model
from workbench.core.errors import UnsupportedError, WorkbenchError
from workbench.models.families import FAMILIES, read_config, spec_from_hf


def test_unknown_architecture_lists_the_supported_ones() -> None:
    with pytest.raises(UnsupportedError) as error:
        spec_from_hf({"architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    assert "MambaForCausalLM" in str(error.value)
    for family in FAMILIES:
        for name in family.architectures:
            assert name in str(error.value)


@pytest.mark.parametrize("config", [{}, {"model_type": "mamba"}])
def test_config_without_architecture_says_so(config: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match="none; model_type is"):
        spec_from_hf(config)


def test_a_head_of_another_kind_is_not_a_decoder() -> None:
    with pytest.raises(UnsupportedError, match="LlamaForSequenceClassification"):
        spec_from_hf({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_architecture_follows_from_the_model_type_and_back(family) -> None:  # type: ignore[no-untyped-def]
    for architecture, model_type in zip(family.architectures, family.model_types, strict=True):
        assert spec_from_hf({"model_type": model_type}).architecture == architecture
        assert spec_from_hf({"architectures": [architecture]}).architecture == architecture


def test_layer_types_decide_window_and_rope_of_each_gemma_layer() -> None:
    config = tiny_config("gemma3")
    spec = spec_from_hf(config)
    for kind, layer in zip(config.layer_types, spec.layers, strict=True):
        is_local = kind == "sliding_attention"
        assert layer.attention.sliding_window == (config.sliding_window if is_local else None)
        assert layer.rope.theta == config.rope_parameters[kind]["rope_theta"]
    assert len({layer.rope for layer in spec.layers}) == 2


def test_old_configs_with_flat_rope_fields_are_understood() -> None:
    """Files from before Transformers 5 keep theta and scaling outside ``rope_parameters``."""
    new = tiny_config("llama3_rope")
    old = new.to_dict()
    parameters = dict(old.pop("rope_parameters"))
    old["rope_theta"] = parameters.pop("rope_theta")
    old["rope_scaling"] = parameters
    assert spec_from_hf(old).layers == spec_from_hf(new).layers


def test_activation_that_is_unknown_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"'relu'.*gelu_pytorch_tanh, silu"):
        spec_from_hf(tiny_config("llama", hidden_act="relu"))


def test_bidirectional_gemma_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="use_bidirectional_attention"):
        spec_from_hf(tiny_config("gemma3", use_bidirectional_attention=True))


def test_eos_ids_of_the_generation_config_win(tmp_path: Path) -> None:
    values = tiny_config("llama").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert spec_from_hf(read_config(tmp_path)).eos_token_ids == (values["eos_token_id"],)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert spec_from_hf(read_config(tmp_path)).eos_token_ids == (7, 9)
    assert spec_from_hf(tiny_config("llama", eos_token_id=None)).eos_token_ids == ()


def test_dtype_of_the_checkpoint_is_kept() -> None:
    assert spec_from_hf(read_config(tiny_model("llama"))).dtype is torch.float32
    assert spec_from_hf({"model_type": "llama", "dtype": "bfloat16"}).dtype is torch.bfloat16
    assert spec_from_hf({"model_type": "llama"}).dtype is None


def test_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match=r"config\.json does not exist"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\x00"])
def test_broken_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WorkbenchError, match=r"config\.json"):
        read_config(tmp_path)


def test_config_value_of_the_wrong_type_is_named() -> None:
    with pytest.raises(WorkbenchError, match="hidden_size"):
        spec_from_hf({"model_type": "llama", "hidden_size": "wide"})
