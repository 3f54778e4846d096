"""Reference outputs and their margins, against whole forwards of a tiny random Llama."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.helpers.baselines import (
    CONTEXT,
    VOCAB_SIZE,
    one_thread,
    plain_model,
    save_tiny_llama,
)
from workbench.baselines.hf_generate import HfNaive
from workbench.baselines.reference import ReferenceModel, reference_tokens
from workbench.core.errors import RequestError

PROMPTS = [[5, 9, 200, 31], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
MAX_TOKENS = [8, 12, 3]


_one_thread = pytest.fixture(one_thread, autouse=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")
    # Sampling defaults of a checkpoint must not reach the reference.
    GenerationConfig(do_sample=True, repetition_penalty=9.0).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def logits(folder: Path) -> Any:
    """The logits after a prefix, by a whole forward."""
    model = plain_model(folder)

    def after(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1]

    return after


def test_tokens_and_margins_are_those_of_whole_forwards(folder: Path, logits: Any) -> None:
    references = reference_tokens(folder, "float32", "cpu", PROMPTS, MAX_TOKENS)
    for prompt, most, reference in zip(PROMPTS, MAX_TOKENS, references, strict=True):
        assert len(reference.token_ids) == len(reference.margins) == most
        for index, (token_id, margin) in enumerate(
            zip(reference.token_ids, reference.margins, strict=True)
        ):
            scores = logits([*prompt, *reference.token_ids[:index]])
            top = scores.topk(2)
            assert token_id == int(top.indices[0])
            expected = float(top.values[0] - top.values[1])
            assert math.isclose(margin, expected, rel_tol=1e-3, abs_tol=1e-4)


def test_margin_at_is_that_of_the_position(folder: Path, logits: Any) -> None:
    with ReferenceModel(folder) as model:
        reference = model.generate(PROMPTS[0], MAX_TOKENS[0])
        for index in range(MAX_TOKENS[0]):
            prefix = reference.token_ids[:index]
            margin = model.margin_at(PROMPTS[0], prefix)
            assert math.isclose(margin, reference.margins[index], rel_tol=1e-3, abs_tol=1e-4)
            chosen = reference.token_ids[index]
            assert model.margin_at(PROMPTS[0], prefix, chosen) == 0.0
            scores = logits([*PROMPTS[0], *prefix])
            worst = int(scores.argmin())
            distance = model.margin_at(PROMPTS[0], prefix, worst)
            assert math.isclose(distance, float(scores.max() - scores.min()), rel_tol=1e-3)
            assert distance > margin


def test_margins_of_an_output_are_distances_to_the_best(folder: Path, logits: Any) -> None:
    output = [3, 250, 17]
    with ReferenceModel(folder) as model:
        margins = model.margins_of(PROMPTS[0], output)
        reference = model.generate(PROMPTS[0], MAX_TOKENS[0])
        assert model.margins_of(PROMPTS[0], reference.token_ids) == (0.0,) * MAX_TOKENS[0]
        assert model.margins_of(PROMPTS[0], []) == ()
    for index, token_id in enumerate(output):
        scores = logits([*PROMPTS[0], *output[:index]])
        expected = float(scores.max() - scores[token_id])
        assert math.isclose(margins[index], expected, rel_tol=1e-3, abs_tol=1e-4)


def test_end_of_sequence_ends_a_reference(folder: Path) -> None:
    with ReferenceModel(folder) as model:
        free = model.generate(PROMPTS[0], MAX_TOKENS[0])
        last = free.token_ids[-1]
        model._open_model.eos_token_ids = frozenset({last})
        end = free.token_ids.index(last) + 1
        assert (
            model.generate(PROMPTS[0], MAX_TOKENS[0], ignore_eos=False).token_ids
            == (free.token_ids[:end])
        )
        assert model.generate(PROMPTS[0], MAX_TOKENS[0]).token_ids == free.token_ids


def test_it_shares_the_model_of_the_baselines(folder: Path) -> None:
    backend = HfNaive(folder, attn_implementation="eager")
    try:
        with ReferenceModel(folder) as model:
            assert model._open_model is backend.shared
            model.generate(PROMPTS[1], 2)
            assert backend.shared.attention == "sdpa"
        assert backend.info().attention == "eager"
    finally:
        backend.close()


def test_prompts_that_cannot_be_served_are_named(folder: Path) -> None:
    with ReferenceModel(folder) as model:
        with pytest.raises(RequestError, match="prompt is empty"):
            model.generate([], 1)
        with pytest.raises(RequestError, match=f"context holds {CONTEXT}"):
            model.generate([1] * CONTEXT, 1)
        with pytest.raises(RequestError, match="outside the vocabulary"):
            model.margin_at([1], [VOCAB_SIZE])
        # The last position of the context still has a margin.
        assert model.margin_at([1] * (CONTEXT - 1), []) >= 0.0
    with pytest.raises(RuntimeError, match="closed"):
        model.generate([1], 1)
