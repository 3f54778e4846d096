"""Workloads of text: prompts that ship, the chat template, files by path, and bad rows."""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.helpers.workload_data import (
    VOCAB_SIZE,
    data_file,
    tiny_tokenizer,
    write_rows,
)
from workbench.bench import workloads as package
from workbench.bench.workloads import (
    AzureWorkload,
    Gsm8kWorkload,
    HumanEvalWorkload,
    JsonlWorkload,
    MooncakeWorkload,
    MtBenchWorkload,
    SpecBenchWorkload,
    TextWorkload,
    WorkloadFileError,
    shipped_categories,
)
from workbench.bench.workloads.prompts import Prompt
from workbench.bench.workloads.shipped import read_category


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


# -- prompts that ship with the project -------------------------------------------------------


def shipped_rows() -> list[Prompt]:
    return [prompt for name in shipped_categories() for prompt in read_category(name)]


def test_shipped_prompts_are_enough_and_all_different() -> None:
    rows = shipped_rows()
    assert len(rows) >= 40
    assert set(shipped_categories()) == {"chat", "summarize", "code_edit"}
    assert len({json.dumps(row.messages) for row in rows}) == len(rows)
    assert len({row.request_id for row in rows}) == len(rows)
    for row in rows:
        assert row.category == row.row.path.stem
        assert row.request_id.startswith(f"{row.category}-")
        assert set(row.row.values) <= {"id", "category", "messages", "max_tokens", "note"}


def test_shipped_data_travel_as_valid_utf8_lines_without_blanks() -> None:
    for name in shipped_categories():
        lines = (Path(package.__file__).parent / "data" / f"{name}.jsonl").read_text("utf-8")
        assert lines.endswith("\n") and all(lines.splitlines())


def code_block(prompt: Prompt) -> tuple[str, str]:
    """The language and the text of the only fenced block of a prompt."""
    content = "\n".join(message["content"] for message in prompt.messages)
    blocks: list[tuple[str, str]] = re.findall(r"```(\w+)\n(.*?)```", content, flags=re.DOTALL)
    assert len(blocks) == 1, prompt.request_id
    return blocks[0]


def test_code_edit_prompts_hold_a_whole_file_to_copy() -> None:
    languages: Counter[str] = Counter()
    for prompt in read_category("code_edit"):
        language, code = code_block(prompt)
        languages[language] += 1
        assert 25 <= len(code.splitlines()) <= 60, prompt.request_id
        # Most of the prompt must be what the answer copies.
        assert len(code) > 0.7 * sum(len(message["content"]) for message in prompt.messages)
        if language == "python":
            ast.parse(code)
    assert languages["python"] > sum(languages.values()) / 2 and len(languages) >= 5


def test_code_edit_names_what_it_edits() -> None:
    """Each name that the edit is about is in the file, unless the edit brings it in."""
    for prompt in read_category("code_edit"):
        _, code = code_block(prompt)
        instruction = prompt.messages[-1]["content"].replace(code, "")
        names = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", instruction)
        assert names, prompt.request_id
        assert any(name in code for name in names), prompt.request_id


def test_categories_take_turns_and_file_order_is_the_default(tokenizer: Any) -> None:
    requests = TextWorkload(categories=("chat", "summarize")).requests(0, tokenizer, VOCAB_SIZE)
    chat = [p.request_id for p in read_category("chat")]
    other = [p.request_id for p in read_category("summarize")]
    assert len(chat) != len(other)
    ids = [request.request_id for request in requests]
    assert ids[:4] == [chat[0], other[0], chat[1], other[1]]
    assert sorted(ids) == sorted(chat + other)
    first = TextWorkload(categories="chat", num_requests=3).requests(9, tokenizer, VOCAB_SIZE)
    assert [request.request_id for request in first] == chat[:3]


def test_text_name_options_and_max_tokens(tokenizer: Any) -> None:
    assert TextWorkload(categories="summarize").name == "summarize"
    assert TextWorkload(categories="chat,summarize").name == "chat+summarize"
    asked = [prompt.max_tokens for prompt in read_category("code_edit")]
    own = TextWorkload(categories="code_edit").requests(0, tokenizer, VOCAB_SIZE)
    assert [request.max_tokens for request in own] == asked
    assert not any(request.ignore_eos for request in own)
    forced = TextWorkload(categories="code_edit", max_tokens=9, ignore_eos=True)
    for request in forced.requests(0, tokenizer, VOCAB_SIZE):
        assert (request.max_tokens, request.ignore_eos) == (9, True)


def test_asking_for_more_prompts_than_there_are(tokenizer: Any) -> None:
    available = len(list(read_category("chat")))
    workload = TextWorkload(categories="chat", num_requests=available + 1)
    with pytest.raises(ValueError, match=rf"has {available} prompts.*1\.\.{available}"):
        workload.requests(0, tokenizer, VOCAB_SIZE)


# -- chat template ----------------------------------------------------------------------------


def test_chat_template_is_applied_once_and_opens_the_answer(tokenizer: Any) -> None:
    (request,) = TextWorkload(categories="chat", num_requests=1).requests(0, tokenizer, VOCAB_SIZE)
    content = next(iter(read_category("chat"))).messages[0]["content"]
    assert request.prompt_text == f"<|user|>{content}<|end|><|assistant|>"
    user, end, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>", "<|assistant|>"])
    ids = request.prompt_token_ids
    assert (ids[0], ids[-2], ids[-1]) == (user, end, assistant)
    assert tokenizer.decode(ids[1:-2]) == content
    assert list(ids) == list(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
        )
    )


def test_plain_text_without_the_template(tokenizer: Any) -> None:
    workload = TextWorkload(categories="chat", num_requests=1, apply_chat_template=False)
    (request,) = workload.requests(0, tokenizer, VOCAB_SIZE)
    assert request.prompt_text == next(iter(read_category("chat"))).messages[0]["content"]
    assert request.prompt_token_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(request.prompt_token_ids[1:]) == request.prompt_text


def test_no_tokenizer_and_no_template_are_errors(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        TextWorkload().requests(0, None, VOCAB_SIZE)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"no chat template.*apply_chat_template=false"):
        TextWorkload().requests(0, bare, VOCAB_SIZE)
    assert TextWorkload(apply_chat_template=False).requests(0, bare, VOCAB_SIZE)


# -- JSONL ------------------------------------------------------------------------------------


def test_jsonl_takes_every_kind_of_prompt(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "one", "max_tokens": 1},
        {"text": "two", "output_len": 2, "id": "second", "category": "poem"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "three"}]},
        {"turns": ["four", "more"], "arrival_s": 1.5},
        {"prompt_token_ids": [5, 5, 5], "arrival_s": 1.5, "max_tokens": 5, "output_len": 5},
    ]
    for row in rows:
        if not {"max_tokens", "output_len"} & row.keys():
            row["max_tokens"] = 8
    path = write_rows(tmp_path / "mine.jsonl", [*rows[:2], "", *rows[2:]])
    workload = JsonlWorkload(path=str(path))
    requests = workload.requests(0, tokenizer, VOCAB_SIZE)
    assert [request.prompt_text for request in requests] == [
        "<|user|>one<|end|><|assistant|>",
        "<|user|>two<|end|><|assistant|>",
        "<|system|>s<|end|><|user|>three<|end|><|assistant|>",
        "<|user|>four<|end|><|assistant|>",
        None,
    ]
    assert requests[4].prompt_token_ids == (5, 5, 5)
    assert [request.max_tokens for request in requests] == [1, 2, 8, 8, 5]
    assert [request.arrival_s for request in requests] == [0, 0, 0, 1.5, 1.5]
    assert [r.request_id for r in requests[:3]] == ["mine-0001", "second", "mine-0004"]
    assert [request.category for request in requests[:2]] == ["jsonl", "poem"]
    assert workload.describe()["built"]["num_turns_left_out"] == 1
    assert workload.describe()["config"]["path"] == str(path)


def test_jsonl_max_tokens_for_all_instruction_and_gzip(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"prompt": "hi"}\n{"prompt": "yo"}\n'))
    workload = JsonlWorkload(path=path, max_tokens=6, instruction="Say more.")
    requests = workload.requests(0, tokenizer, VOCAB_SIZE)
    assert [request.max_tokens for request in requests] == [6, 6]
    assert requests[1].prompt_text == "<|user|>Say more.\n\nyo<|end|><|assistant|>"


def test_jsonl_shuffle_moves_prompts_and_not_arrivals(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"id": f"r{i}", "prompt": f"p{i}", "arrival_s": float(i)} for i in range(20)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    workload = JsonlWorkload(path=path, max_tokens=2, shuffle=True)
    requests = workload.requests(0, tokenizer, VOCAB_SIZE)
    assert [request.arrival_s for request in requests] == [row["arrival_s"] for row in rows]
    ids = [request.request_id for request in requests]
    assert ids != [row["id"] for row in rows] and sorted(ids) == sorted(r["id"] for r in rows)


GOOD = {"prompt": "fine", "max_tokens": 4}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "no JSON object"),
        ({"max_tokens": 4}, "'prompt' is missing; valid: one of prompt, messages, turns"),
        ({"prompt": "", "max_tokens": 4}, "'prompt' is ''; valid: a string that is not empty"),
        ({"prompt": 7, "max_tokens": 4}, "'prompt' is 7; valid: a string"),
        ({"prompt": "a", "text": "b", "max_tokens": 4}, "beside 'prompt'.*prompt_field=prompt"),
        ({"prompt": "a"}, "'max_tokens' is missing; valid: .*workload.max_tokens=N"),
        ({"prompt": "a", "max_tokens": 0}, "'max_tokens' is 0; valid: a whole number of at least"),
        ({"prompt": "a", "max_tokens": True}, "'max_tokens' is True; valid: a whole number"),
        ({"prompt": "a", "max_tokens": "9"}, "'max_tokens' is '9'; valid: a whole number"),
        ({"prompt": "a", "max_tokens": 1, "output_len": 2}, "'output_len' differs"),
        ({"turns": [], "max_tokens": 4}, r"'turns' is \[\]; valid: a list of strings"),
        ({"turns": ["a", 3], "max_tokens": 4}, "'turns' holds 3; valid: a list of strings"),
        ({"messages": [{"role": "user"}], "max_tokens": 4}, "'messages' holds .*valid: a list of"),
        ({"messages": "hi", "max_tokens": 4}, "'messages' is 'hi'; valid: a list of"),
        ({"prompt_token_ids": [1, -1], "max_tokens": 4}, "'prompt_token_ids' holds -1; valid"),
        ({"prompt_token_ids": [VOCAB_SIZE], "max_tokens": 4}, f"holds token id {VOCAB_SIZE}; val"),
        ({"prompt_token_ids": [], "max_tokens": 4}, "'prompt_token_ids' is .*with at least one"),
        ({**GOOD, "category": ""}, "'category' is ''; valid: a string"),
        ({**GOOD, "arrival_s": -1}, "'arrival_s' is -1; valid: a number of at least 0"),
        ({**GOOD, "arrival_s": float("nan")}, "'arrival_s' is nan; valid: a number"),
        ({**GOOD, "arrival_s": 1.0}, "'arrival_s' is 1, before the row above; valid: at least 2"),
        ({**GOOD, "arrival_s": 2, "id": "first"}, "'id' gives 'first', as line 1 does; valid"),
    ],
)
def test_a_bad_row_names_file_line_field_and_what_is_valid(
    tmp_path: Path, tokenizer: Any, row: Any, message: str
) -> None:
    first = {**GOOD, "id": "first", "arrival_s": 2.0 if "arrival_s" in row else 0.0}
    path = write_rows(tmp_path / "rows.jsonl", [first, "", row])
    with pytest.raises(ValueError, match=message) as caught:
        JsonlWorkload(path=path).requests(0, tokenizer, VOCAB_SIZE)
    assert f"{path}, line 3: " in str(caught.value)


def test_prompt_field_settles_which_field_is_meant(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "text": "b", "max_tokens": 4}])
    workload = JsonlWorkload(path=path, prompt_field="text")
    (request,) = workload.requests(0, tokenizer, VOCAB_SIZE)
    assert request.prompt_text == "<|user|>b<|end|><|assistant|>"
    with pytest.raises(ValueError, match=r"unknown prompt_field 'txt'.*Did you mean 'text'"):
        JsonlWorkload(path=path, prompt_field="txt")


def test_files_that_cannot_be_read_whole(tmp_path: Path, tokenizer: Any) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "été", "max_tokens": 1}\n'.encode("latin-1"))
    packed = gzip.compress(os.urandom(4000))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"prompt": "a", "max_tokens": 1}\n' * 1000)[:-20])
    fake = tmp_path / "fake.jsonl.gz"
    fake.write_bytes(packed[4:])
    empty = write_rows(tmp_path / "empty.jsonl", ["", ""])
    for path, message in [
        (latin, "not UTF-8"),
        (cut, "not a whole gzip file"),
        (fake, "not a whole gzip file"),
        (empty, "has no rows"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            JsonlWorkload(path=path).requests(0, tokenizer, VOCAB_SIZE)
        assert str(path) in str(caught.value)


# -- files by path ----------------------------------------------------------------------------

FROM_FILES = (
    JsonlWorkload,
    SpecBenchWorkload,
    MtBenchWorkload,
    HumanEvalWorkload,
    Gsm8kWorkload,
    MooncakeWorkload,
    AzureWorkload,
)


@pytest.mark.parametrize("kind", FROM_FILES)
def test_a_missing_file_says_what_is_expected_and_where_it_is(kind: Any, tmp_path: Path) -> None:
    for path, message in [
        (None, r"set workload\.path=FILE"),
        ("", r"set workload\.path=FILE"),
        (tmp_path / "absent.jsonl", r"there is no file .*absent\.jsonl"),
        (tmp_path, "is a folder"),
    ]:
        with pytest.raises(WorkloadFileError, match=f"{message}.*Expected: .*Source: ") as caught:
            kind(path=path)
        assert isinstance(caught.value, ValueError) and isinstance(caught.value, FileNotFoundError)


QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Write again."]},
    {"question_id": 82, "category": "math", "turns": ["Add."]},
    {"question_id": "x", "category": "writing", "turns": ["Draw.", "Again.", "Once more."]},
]


def test_spec_bench_takes_first_turns_by_category(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "question.jsonl", QUESTIONS)
    workload = SpecBenchWorkload(path=path)
    requests = workload.requests(0, tokenizer, VOCAB_SIZE)
    assert [r.request_id for r in requests] == ["spec_bench-81", "spec_bench-82", "spec_bench-x"]
    assert [r.category for r in requests] == ["writing", "math", "writing"]
    assert requests[0].prompt_text == "<|user|>Write.<|end|><|assistant|>"
    assert workload.describe()["built"]["num_turns_left_out"] == 3
    some = SpecBenchWorkload(path=path, categories="math").requests(0, tokenizer, VOCAB_SIZE)
    assert [request.request_id for request in some] == ["spec_bench-82"]
    with pytest.raises(ValueError, match=r"unknown category .*'maths'.*'math'.*math, writing"):
        SpecBenchWorkload(path=path, categories=["maths"]).requests(0, tokenizer, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (SpecBenchWorkload, {"category": "a", "turns": ["b"]}, "'question_id' is missing"),
        (SpecBenchWorkload, {**QUESTIONS[1], "question_id": [1]}, r"'question_id' is \[1\]"),
        (SpecBenchWorkload, {"question_id": 1, "turns": ["b"]}, "'category' is missing"),
        (MtBenchWorkload, {"question_id": 1, "category": "a", "turns": "b"}, "'turns' is 'b'"),
        (HumanEvalWorkload, {"task_id": "a"}, "'prompt' is missing"),
        (HumanEvalWorkload, {"prompt": "a"}, "'task_id' is missing"),
        (Gsm8kWorkload, {"answer": "a"}, "'question' is missing"),
    ],
)
def test_bad_rows_of_known_formats(
    kind: Any, row: Any, message: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=f"line 1: {message}.*; valid: "):
        kind(path=path).requests(0, tokenizer, VOCAB_SIZE)


def test_humaneval_is_sent_as_it_is_and_gsm8k_as_a_chat(tmp_path: Path, tokenizer: Any) -> None:
    code = "def f(x):\n    "
    path = write_rows(
        tmp_path / "rows.jsonl", [{"task_id": "T/0", "prompt": code, "question": "q"}]
    )
    (request,) = HumanEvalWorkload(path=path).requests(0, tokenizer, VOCAB_SIZE)
    assert (request.prompt_text, request.request_id) == (code, "T/0")
    (request,) = Gsm8kWorkload(path=path).requests(0, tokenizer, VOCAB_SIZE)
    assert request.prompt_text == "<|user|>q<|end|><|assistant|>"


# -- real data, where it is -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "parts", "num_rows"),
    [
        (MtBenchWorkload, ("mt_bench", "question.jsonl"), 80),
        (SpecBenchWorkload, ("spec_bench_subset", "question.jsonl"), 320),
        (HumanEvalWorkload, ("humaneval", "HumanEval.jsonl.gz"), 164),
        (Gsm8kWorkload, ("gsm8k", "test.jsonl"), 1319),
    ],
)
def test_public_prompts_load_whole(
    kind: Any, parts: tuple[str, ...], num_rows: int, tokenizer: Any
) -> None:
    requests = kind(path=data_file(*parts)).requests(0, tokenizer, VOCAB_SIZE)
    assert len(requests) == num_rows
    assert len({request.prompt_text for request in requests}) >= 0.99 * num_rows
