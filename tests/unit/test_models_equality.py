"""The decoder against Transformers: logits and greedy tokens of every family in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.batches import BatchDriver, DrivenSequence
from tests.helpers.tiny_models import (
    FAMILIES,
    hf_greedy,
    hf_logits,
    hf_model,
    tiny_config,
    tiny_model,
)
from workbench.models.decoder import Decoder
from workbench.models.loader import load_model
from workbench.slots.adapters import Adapters, NoAdapters
from workbench.slots.linear import DenseLinear, LinearLayer
from workbench.slots.parallel import SingleDevice

PROMPT_LEN = 24
NEW_TOKENS = 16
MAX_TOKENS = PROMPT_LEN + NEW_TOKENS


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    return load_model(folder, linear=DenseLinear(), dtype=dtype, device="cpu", **options)


def prompt(length: int, seed: int = 0, vocab_size: int = 128) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocab_size, (length,), generator=generator).tolist()


def full_logits(decoder: Decoder, ids: list[int], block_size: int = 4) -> torch.Tensor:
    driver = BatchDriver(decoder, block_size=block_size, max_tokens=len(ids))
    (logits,) = driver.step([(driver.add(ids), len(ids))])
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_logits_equal_transformers(family: str) -> None:
    folder = tiny_model(family)
    ids = prompt(PROMPT_LEN)
    torch.testing.assert_close(
        full_logits(load(folder), ids), hf_logits(folder, ids), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("block_size", [4, MAX_TOKENS], ids=["paged", "contiguous"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_in_mixed_batches(family: str, block_size: int) -> None:
    """Three requests that join at different steps, one of them in pieces, decode together."""
    folder = tiny_model(family)
    driver = BatchDriver(load(folder), block_size=block_size, max_tokens=MAX_TOKENS)
    prompts = [prompt(length, seed) for seed, length in enumerate((PROMPT_LEN, 9, 1))]
    first, second, third = sequences = [driver.add(ids) for ids in prompts]

    driver.decode([first])
    piece = 4
    logits = driver.step([(first, 1), (second, piece)])  # one token beside a piece of a prompt
    first.token_ids.append(int(logits[0][-1].argmax()))
    assert second.num_computed == piece
    driver.decode([second, first])  # the rest of the prompt, in another order
    driver.decode([third, first, second])
    while pending := [s for s, ids in zip(sequences, prompts, strict=True) if more(s, ids)]:
        driver.decode(pending)

    for sequence, ids in zip(sequences, prompts, strict=True):
        assert sequence.token_ids[len(ids) :] == hf_greedy(folder, ids, NEW_TOKENS)


def more(sequence: DrivenSequence, prompt_ids: list[int]) -> bool:
    return len(sequence.token_ids) - len(prompt_ids) < NEW_TOKENS


def test_a_window_that_is_ignored_would_show() -> None:
    """The prompt is longer than the window, and leaving the window out changes the logits."""
    folder = tiny_model("mistral")
    ids = prompt(PROMPT_LEN)
    window = load(folder).spec.layers[0].attention.sliding_window
    assert window is not None and window < PROMPT_LEN
    without = full_logits(load(tiny_model("mistral", sliding_window=None)), ids)
    difference = (without - full_logits(load(folder), ids)).abs().amax(dim=-1)
    assert difference[:window].max() < 1e-4
    assert difference[window:].min() > 1e-2


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "qwen3", "gemma3"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(family: str) -> None:
    folder = tiny_model(family)
    ids = prompt(PROMPT_LEN)
    exact = hf_logits(folder, ids)
    with torch.inference_mode():
        theirs = hf_model(folder, torch.bfloat16)(torch.tensor([ids])).logits[0].float()
    ours = full_logits(load(folder, torch.bfloat16), ids).float()
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


def test_embedding_scale_is_rounded_as_transformers_rounds_it() -> None:
    """sqrt(48) is not a bfloat16 number, so the order of rounding decides about bits."""
    folder = tiny_model("gemma3", hidden_size=48)
    ids = torch.tensor(prompt(PROMPT_LEN))
    decoder = load(folder, torch.bfloat16)
    with torch.inference_mode():
        theirs = hf_model(folder, torch.bfloat16).model.embed_tokens(ids)
        assert torch.equal(decoder.embed(ids), theirs)
        unrounded = (decoder.embedding[ids].float() * 48**0.5).to(torch.bfloat16)
    assert not torch.equal(unrounded, theirs)


def test_gemma3_with_vision_loads_its_text_model(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    # Transformers leaves the cap on logits out in this class; the released models have none.
    text = tiny_config("gemma3", final_logit_softcapping=None).to_dict()
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    ).eval()
    model.save_pretrained(tmp_path)
    ids = prompt(PROMPT_LEN)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(full_logits(load(tmp_path), ids), expected, atol=1e-4, rtol=1e-4)


def test_logits_of_chosen_rows_equal_those_rows_of_all() -> None:
    decoder = load(tiny_model("gemma3"))
    hidden = torch.randn(5, decoder.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([3, 1])
    with torch.inference_mode():
        everything = decoder.compute_logits(hidden)
        torch.testing.assert_close(decoder.compute_logits(hidden[rows]), everything[rows])


class _Recorder(Adapters):
    """Adds one to every output of one layer, and remembers the layers it saw."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target
        self.active = True
        self.seen: list[str] = []

    load = NoAdapters.load
    slots_for = NoAdapters.slots_for

    def apply(self, layer: LinearLayer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == layer.in_features and y.shape[1] == layer.out_features
        self.seen.append(layer.name)
        return y + 1 if layer.name == self.target else y


def test_active_adapters_see_every_linear_layer_once_a_pass() -> None:
    folder = tiny_model("llama")
    ids = prompt(PROMPT_LEN)
    recorder = _Recorder("layers.1.down_proj")
    decoder = load(folder, adapters=recorder)
    changed = full_logits(decoder, ids)
    names = [layer.name for layer in decoder.linear_layers()]
    assert recorder.seen == names[:-1]  # the head has no adapter
    recorder.active = False
    unchanged = full_logits(decoder, ids)
    assert recorder.seen == names[:-1]
    assert not torch.allclose(changed, unchanged)
    torch.testing.assert_close(unchanged, hf_logits(folder, ids), atol=1e-4, rtol=1e-4)


def test_attention_and_feed_forward_outputs_are_reduced_over_tp() -> None:
    class Counting(SingleDevice):
        calls = 0

        def all_reduce(self, x: torch.Tensor, axis: str) -> torch.Tensor:
            assert axis == "tp"
            self.calls += 1
            return x

    parallel = Counting()
    decoder = load(tiny_model("llama"), parallel=parallel)
    full_logits(decoder, prompt(PROMPT_LEN))
    assert parallel.calls == 2 * decoder.spec.num_layers
