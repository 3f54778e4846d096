"""Prompts as token ids, what a target is asked to go on from: from files of several shapes, or
written by the target itself."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from workbench.bench.workloads.prompts import render_chat
from workbench.bench.workloads.shipped import read_category, shipped_categories
from workbench.core.errors import ConfigError
from workbench.core.request import FinishReason
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine

#: Fields of a row that hold a question.
_QUESTIONS = ("prompt", "question", "text")
#: Words of a passage of plain text.
_PASSAGE_WORDS = 60
#: Stands for a question while a chat template is taken apart; in no template.
_MARK = "\ue000question\ue000"
#: Tokens that a target has for a question of its own; what has no end by then is left out.
_QUESTION_TOKENS = 192


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


def write_own_prompts(
    engine: Engine,
    *,
    longest: int,
    count: int,
    seed: int,
    chunk_size: int = 1024,
    may_go_on: Callable[[], bool] = lambda: True,
) -> list[list[int]]:
    """Token ids of prompts that the target makes up itself, all different.

    It is given its chat template as far as the user's question, and goes on from there at
    temperature 1 (Magpie, Xu et al. 2024, arXiv:2406.08464). So prompts are of the kind that it was
    aligned on, without any data.

    Parameters
    ----------
    longest
        Tokens that a prompt may have; longer ones are left out.
    count
        How many to write. As many are tried as are needed, up to three times that.
    chunk_size
        Tried between two looks at the clock.
    may_go_on
        Asked before each chunk but the first; once it says no, those that are there are all.

    Raises
    ------
    ConfigError
        The model has no chat template, or hardly ever ends a question.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the model has no chat template, so it cannot write prompts itself: name files of "
            "prompts in data=..., and set num_own_prompts=0."
        )
    text, _ = render_chat(tokenizer, [{"role": "user", "content": _MARK}], True)
    opening = list(tokenizer.encode(text.partition(_MARK)[0], add_special_tokens=False))
    found: dict[tuple[int, ...], None] = {}
    tried = 0
    in_time = True
    while in_time and len(found) < count and tried < 3 * count + 100:
        size = min(chunk_size, count - len(found) + 50)
        params = [
            SamplingParams(max_tokens=_QUESTION_TOKENS, temperature=1.0, seed=seed + tried + i)
            for i in range(size)
        ]
        tried += size
        for output in engine.generate([opening] * size, params):
            question = tokenizer.decode(output.token_ids, skip_special_tokens=True).strip()
            is_whole = output.outputs and output.outputs[0].finish_reason is FinishReason.STOP
            if not is_whole or not question:
                continue
            _, ids = render_chat(tokenizer, [{"role": "user", "content": question}], True)
            if len(ids) <= longest:
                found[ids] = None
        in_time = may_go_on()
    if in_time and len(found) < count:
        raise ConfigError(
            f"of {tried} questions that the model wrote itself, {len(found)} have an end within "
            f"{_QUESTION_TOKENS} tokens and fit, and num_own_prompts={count} are asked for. Lower "
            "it, or name files of prompts in data=..."
        )
    return [list(ids) for ids in found][:count]


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
