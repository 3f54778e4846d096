"""Workloads of text that the user has: JSONL, Spec-Bench, MT-bench, HumanEval, GSM8K."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from workbench.bench.workloads.checks import as_names, require_choice
from workbench.bench.workloads.prompts import Prompt, PromptWorkload
from workbench.bench.workloads.readers import Row, find_file, read_jsonl
from workbench.core.errors import ConfigError, unknown_name

PROMPT_FIELDS = ("prompt", "messages", "turns", "text", "prompt_token_ids")


def user_message(*parts: str) -> tuple[dict[str, str], ...]:
    """Return a chat of one user turn; parts that are not empty stand one below the other."""
    return ({"role": "user", "content": "\n\n".join(part for part in parts if part)},)


@dataclass(frozen=True, kw_only=True)
class FileWorkload(PromptWorkload):
    """Prompts from a file.

    Parameters
    ----------
    path
        The file; gzipped if its name ends in ``.gz``.
    instruction
        Text to put before each prompt, with an empty line between.
    """

    path: str | PathLike[str] | None = None
    instruction: str = ""

    _expects: ClassVar[str]
    _source: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.instruction, str):
            raise ConfigError(f"instruction is {self.instruction!r}; valid: a string.")
        self._file()

    def _file(self) -> Path:
        return find_file(self.path, self.name, self._expects, self._source)


@dataclass(frozen=True, kw_only=True)
class JsonlWorkload(FileWorkload):
    """Rows of any JSONL file that has prompts.

    A row has one of ``prompt`` or ``text`` (a string), ``messages`` (a chat), ``turns`` (user
    turns, of which the first is sent), or ``prompt_token_ids``; ``max_tokens`` or ``output_len``,
    unless the setting ``max_tokens`` gives it for all; and may have ``id``, ``category`` and
    ``arrival_s`` (seconds, not decreasing).

    Parameters
    ----------
    prompt_field
        Which of the fields holds the prompt; ``None`` if each row has only one of them.
    """

    prompt_field: str | None = None

    _name: ClassVar[str] = "jsonl"
    _expects: ClassVar[str] = f"JSONL, each row with one of {', '.join(PROMPT_FIELDS)}"
    _source: ClassVar[str] = "a file of your own"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_field is not None:
            require_choice("prompt_field", self.prompt_field, PROMPT_FIELDS)

    def _prompts(self) -> Iterator[Prompt]:
        path = self._file()
        last_s = 0.0
        self._notes["num_turns_left_out"] = 0
        for row in read_jsonl(path):
            arrival_s = row.number("arrival_s") if "arrival_s" in row.values else 0.0
            if arrival_s < last_s:
                raise row.error(
                    "arrival_s", f"is {arrival_s:g}, before the row above", f"at least {last_s:g}"
                )
            last_s = arrival_s
            yield self._prompt(row, arrival_s)

    def _prompt(self, row: Row, arrival_s: float) -> Prompt:
        field = self._which_field(row)
        messages: Iterable[dict[str, str]] = ()
        token_ids: tuple[int, ...] = ()
        if field == "prompt_token_ids":
            token_ids = tuple(row.integers(field))
        elif field == "messages":
            messages = row.messages(field)
            if self.instruction:
                raise row.error(field, "is a whole chat", "no instruction beside messages")
        elif field == "turns":
            turns = row.texts(field)
            self._notes["num_turns_left_out"] += len(turns) - 1
            messages = user_message(self.instruction, turns[0])
        else:
            messages = user_message(self.instruction, row.text(field))
        return Prompt(
            request_id=str(row.values.get("id", f"{row.path.stem}-{row.line:04d}")),
            category=row.text("category") if "category" in row.values else self.name,
            row=row,
            field=field,
            messages=tuple(messages),
            token_ids=token_ids,
            max_tokens=_row_max_tokens(row),
            arrival_s=arrival_s,
        )

    def _which_field(self, row: Row) -> str:
        if self.prompt_field is not None:
            return self.prompt_field
        found = [field for field in PROMPT_FIELDS if field in row.values]
        if len(found) == 1:
            return found[0]
        if not found:
            raise row.error("prompt", "is missing", f"one of {', '.join(PROMPT_FIELDS)}")
        raise row.error(
            found[1],
            f"stands beside {found[0]!r}",
            f"one prompt a row, or workload.prompt_field={found[0]}",
        )


def _row_max_tokens(row: Row) -> int | None:
    found = [field for field in ("max_tokens", "output_len") if field in row.values]
    if len(found) == 2 and row.values["max_tokens"] != row.values["output_len"]:
        raise row.error("output_len", "differs from 'max_tokens'", "one of the two")
    return row.integer(found[0], 1) if found else None


@dataclass(frozen=True, kw_only=True)
class SpecBenchWorkload(FileWorkload):
    """Questions in the format of Spec-Bench and MT-bench: first turns only.

    A later turn stands on the model's own answer to the one before, so it is no prompt by itself;
    :meth:`describe` counts the turns left out. Spec-Bench's protocol is greedy decoding at batch
    1 with at most 1,024 new tokens (Xia et al., https://arxiv.org/abs/2401.07851).

    Parameters
    ----------
    categories
        Take only these categories; ``None`` takes all.
    """

    categories: str | Iterable[str] | None = None
    max_tokens: int | None = 1024

    _name: ClassVar[str] = "spec_bench"
    _expects: ClassVar[str] = "Spec-Bench's question.jsonl with question_id, category, turns"
    _source: ClassVar[str] = (
        "https://github.com/hemingkx/Spec-Bench, data/spec_bench/question.jsonl"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.categories is not None:
            object.__setattr__(self, "categories", as_names("categories", self.categories))

    def _prompts(self) -> list[Prompt]:
        prompts = []
        seen: set[str] = set()
        num_left_out = 0
        for row in read_jsonl(self._file()):
            category = row.text("category")
            turns = row.texts("turns")
            seen.add(category)
            if self.categories is not None and category not in self.categories:
                continue
            num_left_out += len(turns) - 1
            prompts.append(
                Prompt(
                    request_id=f"{self.name}-{_question_id(row)}",
                    category=category,
                    row=row,
                    field="turns",
                    messages=user_message(self.instruction, turns[0]),
                    id_field="question_id",
                )
            )
        for name in self.categories or ():
            if name not in seen:
                raise unknown_name(f"category of {self.path}", name, seen)
        self._notes["num_turns_left_out"] = num_left_out
        return prompts


def _question_id(row: Row) -> str:
    value: Any = row.values.get("question_id")
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        problem = "is missing" if "question_id" not in row.values else f"is {value!r}"
        raise row.error("question_id", problem, "a number or a string, different in each row")
    return str(value)


@dataclass(frozen=True, kw_only=True)
class MtBenchWorkload(SpecBenchWorkload):
    """MT-bench's 80 questions (Zheng et al., https://arxiv.org/abs/2306.05685): first turns."""

    _name: ClassVar[str] = "mt_bench"
    _expects: ClassVar[str] = "MT-bench's question.jsonl with question_id, category, turns"
    _source: ClassVar[str] = (
        "https://github.com/lm-sys/FastChat, fastchat/llm_judge/data/mt_bench/question.jsonl"
    )


@dataclass(frozen=True, kw_only=True)
class HumanEvalWorkload(FileWorkload):
    """HumanEval's 164 functions to complete (Chen et al., https://arxiv.org/abs/2107.03374).

    The prompt is the start of a file, so it goes to the model as it is unless
    ``apply_chat_template`` asks for a chat; then an ``instruction`` should say what to do.
    """

    max_tokens: int | None = 512
    apply_chat_template: bool = False

    _name: ClassVar[str] = "humaneval"
    _expects: ClassVar[str] = "HumanEval.jsonl or HumanEval.jsonl.gz with task_id, prompt"
    _source: ClassVar[str] = "https://github.com/openai/human-eval, data/HumanEval.jsonl.gz"

    def _prompts(self) -> Iterator[Prompt]:
        for row in read_jsonl(self._file()):
            yield Prompt(
                request_id=row.text("task_id"),
                category=self.name,
                row=row,
                field="prompt",
                messages=user_message(self.instruction, row.text("prompt")),
                id_field="task_id",
            )


@dataclass(frozen=True, kw_only=True)
class Gsm8kWorkload(FileWorkload):
    """GSM8K's word problems (Cobbe et al., https://arxiv.org/abs/2110.14168)."""

    max_tokens: int | None = 512

    _name: ClassVar[str] = "gsm8k"
    _expects: ClassVar[str] = "GSM8K's test.jsonl or train.jsonl with question"
    _source: ClassVar[str] = (
        "https://github.com/openai/grade-school-math, grade_school_math/data/test.jsonl"
    )

    def _prompts(self) -> Iterator[Prompt]:
        for row in read_jsonl(self._file()):
            yield Prompt(
                request_id=f"gsm8k-{row.line:04d}",
                category=self.name,
                row=row,
                field="question",
                messages=user_message(self.instruction, row.text("question")),
            )
