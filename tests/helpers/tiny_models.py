"""Tiny random models of every family, saved as Hugging Face folders with a tokenizer.

    path = tiny_model("llama")                          # two layers, hidden 64, vocabulary 128
    path = tiny_model("mistral", sliding_window=4)      # any config field can be overridden
    ids = hf_greedy(path, [5, 6, 7], max_new_tokens=8)  # what Transformers generates in fp32

Weights are drawn wide enough that greedy tokens vary and depend on the context; norm weights and
biases are drawn too, so that a forgotten one shows.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
}

#: ``model_type`` and config fields by the name that tests use.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_head_dim": ("llama", {"head_dim": 32, "num_key_value_heads": 4}),
    "llama3_rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama_linear_rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}},
    ),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral_full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2_yarn": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 6,
            "layer_types": [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            },
            "tie_word_embeddings": True,
            "final_logit_softcapping": 20.0,
        },
    ),
}


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="tiny-models-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def tiny_config(family: str, **overrides: Any) -> Any:
    """A fresh Transformers config of a tiny model; ``family`` is a key of ``FAMILIES``."""
    from transformers import AutoConfig

    model_type, fields = FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**_COMMON, **fields, **overrides})


def tiny_model(family: str, **overrides: Any) -> Path:
    """Folder of a tiny model: config, fp32 safetensors, tokenizer. Made once a session.

    Parameters
    ----------
    family
        A key of ``FAMILIES``.
    overrides
        Fields of the config, and ``weight_seed`` (default 0).
    """
    return _tiny_model(family, tuple(sorted((k, _Frozen(v)) for k, v in overrides.items())))


class _Frozen:
    """Makes any config value usable as part of a cache key."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(repr(self.value))

    def __lt__(self, other: _Frozen) -> bool:
        return repr(self.value) < repr(other.value)


@functools.cache
def _tiny_model(family: str, overrides: tuple[tuple[str, _Frozen], ...]) -> Path:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    fields = {key: frozen.value for key, frozen in overrides}
    seed = fields.pop("weight_seed", 0)
    config = tiny_config(family, **fields)
    folder = Path(tempfile.mkdtemp(prefix=f"{family}-", dir=_root()))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                # Embeddings small beside what the layers add, so that a token does not just
                # predict itself and attention decides what comes next.
                width = 0.05 if "embed" in name else parameter.shape[1] ** -0.5
                parameter.copy_(noise * width)
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.3)
            else:  # norms vary around the identity that the family starts from
                parameter.add_(noise * 0.2)
    model.save_pretrained(folder)
    tiny_tokenizer(config.vocab_size).save_pretrained(folder)
    return folder


def tiny_tokenizer(vocab_size: int) -> Any:
    """A tokenizer with one token a printable ASCII character, filled up to ``vocab_size``.

    Ids 0 to 3 are ``<unk>``, ``<s>``, ``</s>`` and ``<pad>``; text of printable ASCII survives the
    round trip. It has a chat template.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<pad>", *string.printable[:95], "\n"]
    words = words[:vocab_size] + [f"<extra_{i}>" for i in range(vocab_size - len(words))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        chat_template=(
            "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
            "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    )


@functools.cache
def hf_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The folder's model in Transformers, eager attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval()


@torch.inference_mode()
def hf_logits(folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """Transformers' logits ``[len(ids), V]`` of a whole sequence in one pass, fp32."""
    logits: torch.Tensor = hf_model(folder)(torch.tensor([list(ids)])).logits[0]
    return logits


@torch.inference_mode()
def hf_greedy(folder: Path, ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Tokens that Transformers generates greedily in fp32, end-of-sequence ids ignored."""
    output = hf_model(folder).generate(
        torch.tensor([list(ids)]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    new_ids: list[int] = output[0, len(ids) :].tolist()
    return new_ids
