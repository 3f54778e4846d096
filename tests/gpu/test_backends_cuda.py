"""Every attention backend in an engine on a CUDA device, in bf16, held to Transformers' choices."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.engines import mixed_prompts, tiny_engine
from tests.helpers.tiny_models import tiny_model
from workbench.baselines.reference import ReferenceModel
from workbench.bench.gates import check_exact
from workbench.configuration import options_of
from workbench.core.errors import ConfigError, UnsupportedError
from workbench.core.sampling import SamplingParams

NEW_TOKENS = 24
#: In logits, which are a few units wide and rounded to bf16.
EPSILON = 0.125

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("option", options_of("engine/attention"))
def test_greedy_tokens_pass_the_gate(option: str) -> None:
    folder = tiny_model("llama", head_dim=64)
    prompts = {str(i): p for i, p in enumerate(mixed_prompts(8, seed=2, longest=60))}
    try:
        engine = tiny_engine(
            "dtype=bfloat16",
            "engine/platform=cuda",
            f"engine/attention={option}",
            "engine/kv_cache=paged",
            "engine.kv_cache.block_size=64",
            model=folder,
            max_model_len=256,
        )
    except (UnsupportedError, ConfigError) as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))
    outputs = engine.generate(
        list(prompts.values()), SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    )
    with ReferenceModel(folder, "bfloat16", "cuda") as model:
        reference = {name: model.generate(p, NEW_TOKENS).token_ids for name, p in prompts.items()}
        result = check_exact(
            dict(zip(prompts, (output.token_ids for output in outputs), strict=True)),
            reference,
            dtype="bfloat16",
            device="cuda",
            margin_fn=lambda name, tokens: model.margins_of(prompts[name], tokens),
            epsilon=EPSILON,
            fixed_length=set(prompts),
        )
    assert result.is_passed, result.message
    assert len(result.ties) < len(prompts) / 2, "more ties than rounding makes"


def test_a_block_size_that_a_backend_cannot_take_is_told() -> None:
    overrides = ["engine/attention=flex", "engine/kv_cache=paged", "engine.kv_cache.block_size=24"]
    with pytest.raises(
        (UnsupportedError, ConfigError), match="block size 24 is not a power of two"
    ):
        tiny_engine("dtype=bfloat16", "engine/platform=cuda", *overrides)
