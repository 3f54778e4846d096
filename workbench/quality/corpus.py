"""Texts to evaluate on, and the one stream of tokens that a text becomes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.core.errors import ConfigError

#: Original English prose, some dialogue and some code, written for the project.
SHIPPED = Path(__file__).parent / "data" / "corpus.txt"


@dataclass(frozen=True, slots=True)
class Text:
    """A text as it was read.

    Attributes
    ----------
    name
        For tables and records.
    """

    name: str
    content: str

    @property
    def digest(self) -> str:
        """SHA-256 of the content in UTF-8: two runs compare only where digests are equal."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class TokenStream:
    """A text as tokens.

    Attributes
    ----------
    token_ids
        The first tokens of the text, without special tokens, as many as may be used.
    bos_id
        What the tokenizer puts before a text by default; None where it puts nothing.
    tokens_per_byte
        Of the whole text in UTF-8.
    """

    token_ids: list[int]
    bos_id: int | None
    tokens_per_byte: float


def read_text(file: str | None) -> Text:
    """Read a text.

    Parameters
    ----------
    file
        A ``.txt`` file, taken whole, or a ``.jsonl`` file whose rows have a field ``text``, joined
        by blank lines; None takes the text that ships with the project.

    Raises
    ------
    ConfigError
        The file is of another kind, cannot be read, or holds no text.
    """
    path = SHIPPED if file is None else Path(file)
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(
            f"text={file} must be a .txt file, or a .jsonl file with a field text in each row."
        )
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text={file} cannot be read: {error}") from error
    if path.suffix == ".jsonl":
        rows = enumerate(content.splitlines(), 1)
        content = "\n\n".join(_field(path, number, row) for number, row in rows if row.strip())
    if not content.strip():
        raise ConfigError(f"text={path} holds no text: name a file with some.")
    return Text("shipped" if file is None else path.name, content)


def tokenize(text: Text, tokenizer: Any, max_tokens: int | None = None) -> TokenStream:
    """Tokenise a text whole, without a chat template.

    Parameters
    ----------
    tokenizer
        Of Transformers.
    max_tokens
        How many of the first tokens to keep; None keeps all.
    """
    ids: list[int] = tokenizer.encode(text.content, add_special_tokens=False, verbose=False)
    if not ids:
        raise ConfigError(f"the tokenizer makes no token of text {text.name}.")
    density = len(ids) / len(text.content.encode())
    return TokenStream(ids[:max_tokens], default_bos(tokenizer), density)


def default_bos(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before a text by default; None where it puts none."""
    bos: int | None = tokenizer.bos_token_id
    plain = tokenizer.encode("a", add_special_tokens=False)
    ids = tokenizer.encode("a")
    return bos if bos is not None and len(ids) > len(plain) and ids[0] == bos else None


def _field(path: Path, number: int, row: str) -> str:
    try:
        text = json.loads(row)["text"]
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ConfigError(f'{path}:{number} is no JSON object with a field "text".') from error
    if not isinstance(text, str):
        raise ConfigError(f'{path}:{number}: the field "text" must be a string.')
    return text
