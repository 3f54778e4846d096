"""What a spec predicts, against Transformers and against what is in memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.tiny_models import FAMILIES, hf_model, tiny_config, tiny_model
from workbench.core.errors import UnsupportedError
from workbench.models.families import family_of, spec_from_hf
from workbench.models.loader import load_model
from workbench.models.parameters import checkpoint_parameters
from workbench.models.rope import ROPE_TYPES, RopeSpec, rope_from_hf
from workbench.slots.kv_pool import ModelDtypePool
from workbench.slots.linear import DenseLinear

CONTEXT = 12


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_count_equals_transformers(family: str) -> None:
    spec = spec_from_hf(tiny_config(family))
    assert spec.num_parameters == hf_model(tiny_model(family)).num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_by_name_equal_transformers(family: str) -> None:
    config = tiny_config(family)
    spec = spec_from_hf(config)
    ours = {p.name: p.shape for p in checkpoint_parameters(spec, family_of(config).names)}
    theirs = {n: tuple(p.shape) for n, p in hf_model(tiny_model(family)).named_parameters()}
    assert ours == theirs
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == spec.num_parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_weight_bytes_are_those_in_memory(family: str, dtype: torch.dtype) -> None:
    decoder = load_model(tiny_model(family), linear=DenseLinear(), dtype=dtype, device="cpu")
    state = decoder.lm_head.state
    # A packed head is a second copy of a tied embedding; an unpacked one is the embedding itself.
    copied = bool(getattr(state, "is_packed", False))
    assert decoder.weight_bytes_actual == decoder.spec.weight_bytes(
        dtype, tied_head_is_copied=copied
    )
    assert decoder.rope_bytes == decoder.spec.rope_bytes()


def test_weight_bytes_count_a_copied_head_only_where_it_is_tied() -> None:
    tied, untied = (spec_from_hf(tiny_config(name)) for name in ("llama_tied", "llama"))
    table = tied.vocab_size * tied.hidden_size * torch.float32.itemsize
    plain = tied.weight_bytes(torch.float32)
    assert tied.weight_bytes(torch.float32, tied_head_is_copied=True) == plain + table
    assert untied.weight_bytes(torch.float32) == plain + table
    assert untied.weight_bytes(torch.float32, tied_head_is_copied=True) == plain + table


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_equal_what_transformers_multiplies(family: str) -> None:
    """Count the products of one token over a cache of ``CONTEXT - 1`` others."""
    model = hf_model(tiny_model(family))
    spec = spec_from_hf(tiny_config(family))
    with torch.inference_mode():
        cache = model(torch.ones(1, CONTEXT - 1, dtype=torch.long)).past_key_values
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    rope = 2 * sum(
        layer.rope.rotary_dim // 2 for layer in {la.rope: la for la in spec.layers}.values()
    )
    counted = counter.get_total_flops()
    expected = spec.flops_per_token(CONTEXT)
    assert counted in (expected, expected + rope)  # some versions rotate through a product


def test_flops_stop_growing_at_the_window_and_leave_out_the_head() -> None:
    spec = spec_from_hf(tiny_config("mistral"))
    window = spec.layers[0].attention.sliding_window
    assert window is not None
    assert spec.flops_per_token(window - 1) < spec.flops_per_token(window)
    assert spec.flops_per_token(window) == spec.flops_per_token(window + 1)
    head = 2 * spec.vocab_size * spec.hidden_size
    assert spec.flops_per_token(5) - spec.flops_per_token(5, with_logits=False) == head


def test_kv_shape_is_that_of_the_cache_in_transformers() -> None:
    model = hf_model(tiny_model("qwen3"))
    spec = spec_from_hf(tiny_config("qwen3"))
    with torch.inference_mode():
        cache = model(torch.ones(1, CONTEXT, dtype=torch.long)).past_key_values
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    num_bytes = sum(t.numel() * t.element_size() for pair in layers for t in pair)
    shape = spec.kv_shape(torch.float32)
    assert shape.num_layers == len(layers)
    assert ModelDtypePool.bytes_per_token(shape) * CONTEXT == num_bytes
    assert (shape.num_kv_heads[0], shape.head_dim[0]) == (
        layers[0][0].shape[1],
        layers[0][0].shape[3],
    )


def test_specs_are_equal_values() -> None:
    assert spec_from_hf(tiny_config("gemma3")) == spec_from_hf(tiny_config("gemma3").to_dict())
    assert spec_from_hf(tiny_config("llama")) != spec_from_hf(tiny_config("llama_tied"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec_from_hf(tiny_config("llama")).vocab_size = 1  # type: ignore[misc]


# -- rotary embeddings ----------------------------------------------------------------------------

ROPE = {
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "dynamic": {"factor": 4.0},
}
YARN_OPTIONS = [
    {},
    {"attention_factor": 0.7},
    {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    {"mscale": 0.8, "mscale_all_dim": 0.5},
]
ROPE_CASES = [(name, fields) for name, fields in ROPE.items()] + [
    ("yarn", {**ROPE["yarn"], **options}) for options in YARN_OPTIONS[1:]
]


@pytest.mark.parametrize(("rope_type", "fields"), ROPE_CASES)
def test_rope_table_equals_transformers(rope_type: str, fields: dict[str, float]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **fields}
    config = tiny_config(
        "llama", head_dim=64, max_position_embeddings=2048, rope_parameters=parameters
    )
    positions = torch.arange(config.max_position_embeddings)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    half = config.head_dim // 2
    expected = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
    rope = spec_from_hf(config).layers[0].rope
    table = rope.table(len(positions), torch.device("cpu"))
    # Angles reach 2048 radians, where one unit in the last place is 1.2e-4.
    torch.testing.assert_close(table, expected, atol=5e-4, rtol=0)
    plain = RopeSpec(theta=rope.theta, rotary_dim=rope.rotary_dim)
    unscaled = plain.table(len(positions), torch.device("cpu"))
    assert torch.equal(table, unscaled) == (rope_type == "dynamic")


def test_default_rope_covers_every_type_that_is_listed() -> None:
    assert {name for name, _ in ROPE_CASES} | {"default"} == set(ROPE_TYPES)


def test_rope_type_that_is_unknown_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match=r"'longrope'.*default, dynamic, linear, llama3"):
        rope_from_hf({"rope_type": "longrope", "rope_theta": 1e4}, head_dim=16)


def test_rope_parameters_that_are_incomplete_name_what_is_missing() -> None:
    with pytest.raises(UnsupportedError, match="factor"):
        rope_from_hf({"rope_type": "linear", "rope_theta": 1e4}, head_dim=16)


def test_partial_rotary_makes_the_table_narrower() -> None:
    rope = rope_from_hf(
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}, head_dim=64
    )
    table = rope.table(9, torch.device("cpu"))
    assert table.shape == (9, 16)
    assert rope.table_bytes(9) == table.numel() * table.element_size()
