"""Small data for the tests of workloads, and where the real data may lie."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

REPO = Path(__file__).resolve().parents[2]
CONF = REPO / "conf"
DATA = Path(os.environ.get("WORKBENCH_DATA", REPO.parent / "shared" / "data"))
VOCAB_SIZE = 1000
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MOONCAKE_ROWS: list[dict[str, Any]] = [
    {"timestamp": 0, "input_length": 1500, "output_length": 40, "hash_ids": [7, 8, 9]},
    {"timestamp": 250, "input_length": 1024, "output_length": 3, "hash_ids": [7, 8]},
    {"timestamp": 250, "input_length": 513, "output_length": 900, "hash_ids": [8, 7]},
]
AZURE_LINES = [
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:17:03.9799600,48,10",
    "2023-11-16 18:17:05.4799600,300,1",
    "2023-11-16 18:18:03.9799600,7,200",
]


def data_file(*parts: str) -> Path:
    """Return a file of the real data, or skip the test."""
    path = DATA.joinpath(*parts)
    if not path.is_file():
        pytest.skip(f"no {path}; set WORKBENCH_DATA to the folder with the data sets")
    return path


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Write a file of lines: strings as they are, anything else as JSON."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, special tokens for the chat, and a BOS before plain text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tiny = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tiny.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tiny.decoder = decoders.ByteLevel()
    tiny.add_special_tokens(["<s>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>"])
    tiny.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tiny.token_to_id("<s>"))]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tiny, bos_token="<s>")
    wrapped.chat_template = TEMPLATE
    return wrapped
