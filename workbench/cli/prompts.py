"""Prompts from files of several shapes, as token ids: what a target is asked to go on from."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from workbench.bench.workloads.prompts import render_chat
from workbench.bench.workloads.shipped import read_category, shipped_categories
from workbench.core.errors import ConfigError

#: Fields of a row that hold a question.
_QUESTIONS = ("prompt", "question", "text")
#: Words of a passage of plain text.
_PASSAGE_WORDS = 60


def read_prompts(
    data: Sequence[str], tokenizer: Any, *, longest: int, count: int | None, seed: int
) -> list[list[int]]:
    """Token ids of prompts, those of all files mixed by the seed, the same ones once.

    Parameters
    ----------
    data
        Files: ``.jsonl`` with ``messages`` (a chat), ``turns`` (the first is asked), ``prompt``,
        ``question`` or ``text`` a row, or ``.txt``, of which passages are continued. None takes the
        prompts that ship with the project.
    longest
        Tokens that a prompt may have; longer ones are left out.
    count
        How many to take; None takes all.

    Raises
    ------
    ConfigError
        A file cannot be read, a row has none of the fields, or too few prompts are short enough.
    """
    if tokenizer is None:
        raise ConfigError("prompts are text, and the model has no tokenizer.")
    found: dict[tuple[int, ...], None] = {}
    too_long = 0
    for messages in _shipped() if not data else _from_files(data):
        is_chat = isinstance(messages, list) and getattr(tokenizer, "chat_template", None)
        if isinstance(messages, str):
            ids = tuple(tokenizer.encode(messages))
        else:
            _, ids = render_chat(tokenizer, messages, bool(is_chat))
        if len(ids) > longest:
            too_long += 1
        elif ids:
            found[ids] = None
    prompts = [list(ids) for ids in found]
    random.Random(seed).shuffle(prompts)
    if not prompts or (count is not None and count > len(prompts)):
        raise ConfigError(
            f"{'the shipped prompts' if not data else ', '.join(data)} hold {len(prompts)} prompts "
            f"of {longest} tokens or less ({too_long} are longer), and num_prompts is {count}. "
            "Lower num_prompts, raise limits.max_model_len, or name more files in data=[a,b]."
        )
    return prompts if count is None else prompts[:count]


def _shipped() -> Iterator[list[dict[str, str]]]:
    for category in shipped_categories():
        yield from (list(prompt.messages) for prompt in read_category(category))


def _from_files(files: Iterable[str]) -> Iterator[list[dict[str, str]] | str]:
    for name in files:
        path = Path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data: {path} cannot be read: {error}") from error
        if path.suffix == ".jsonl":
            for number, line in enumerate(text.splitlines(), start=1):
                if line.strip():
                    yield _row(line, f"{path}:{number}")
        elif path.suffix == ".txt":
            words = text.split()
            for start in range(0, len(words), _PASSAGE_WORDS):
                yield " ".join(words[start : start + _PASSAGE_WORDS])
        else:
            raise ConfigError(f"data: {path} is neither .jsonl nor .txt.")


def _row(line: str, where: str) -> list[dict[str, str]]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"data: {where} is not JSON: {error}") from error
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list) and row["messages"]:
            return list(row["messages"])
        if isinstance(row.get("turns"), list) and row["turns"]:
            return [{"role": "user", "content": str(row["turns"][0])}]
        for field in _QUESTIONS:
            if isinstance(row.get(field), str) and row[field]:
                return [{"role": "user", "content": row[field]}]
    raise ConfigError(
        f"data: {where} has none of messages (a chat), turns (a list), {', '.join(_QUESTIONS)}."
    )
