"""Workloads: the same requests everywhere, the published shapes, and errors that help."""

from __future__ import annotations

import ast
import csv
import gzip
import hashlib
import inspect
import json
import os
import random
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from workbench.bench import workloads as package
from workbench.bench.workloads import (
    AzureWorkload,
    FixedWorkload,
    Gsm8kWorkload,
    HumanEvalWorkload,
    JsonlWorkload,
    MixedWorkload,
    MooncakeWorkload,
    MtBenchWorkload,
    Nano256Workload,
    SharedPrefixWorkload,
    SpecBenchWorkload,
    TextWorkload,
    Workload,
    WorkloadFileError,
    WorkloadRequest,
    shipped_categories,
)
from workbench.bench.workloads.shipped import read_category

REPO = Path(__file__).resolve().parents[2]
CONF = REPO / "conf"
DATA = Path(os.environ.get("WORKBENCH_DATA", REPO.parent / "shared" / "data"))
VOCAB_SIZE = 1000
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def data_file(*parts: str) -> Path:
    path = DATA.joinpath(*parts)
    if not path.is_file():
        pytest.skip(f"no {path}; set WORKBENCH_DATA to the folder with the data sets")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
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


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


MOONCAKE_ROWS = [
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


@pytest.fixture
def mooncake(tmp_path: Path) -> Callable[..., MooncakeWorkload]:
    return partial(MooncakeWorkload, path=write_rows(tmp_path / "trace.jsonl", MOONCAKE_ROWS))


@pytest.fixture
def azure(tmp_path: Path) -> Callable[..., AzureWorkload]:
    return partial(AzureWorkload, path=write_rows(tmp_path / "trace.csv", AZURE_LINES))


# -- the contract, over every workload ------------------------------------------------------


SYNTHETIC: dict[str, Workload] = {
    "fixed": FixedWorkload(num_requests=5, input_len=20, output_len=4),
    "mixed": MixedWorkload(num_requests=5),
    "nano256": Nano256Workload(num_requests=4),
    "shared_prefix": SharedPrefixWorkload(num_groups=3, requests_per_group=2, shared_len=40),
    "text": TextWorkload(num_requests=6, shuffle=True),
}


@pytest.fixture(params=[*SYNTHETIC, "mooncake", "azure"])
def workload(request: pytest.FixtureRequest) -> Workload:
    if request.param in SYNTHETIC:
        return SYNTHETIC[request.param]
    made: Workload = request.getfixturevalue(request.param)()
    return made


def test_same_seed_same_requests_and_other_seed_other_content(
    workload: Workload, tokenizer: Any
) -> None:
    first = workload.requests(3, tokenizer, VOCAB_SIZE, None)
    again = workload.requests(3, tokenizer, VOCAB_SIZE, None)
    other = workload.requests(4, tokenizer, VOCAB_SIZE, None)
    assert first == again
    assert workload.digest(first) == workload.digest(again) != workload.digest(other)


def test_requests_are_well_formed(workload: Workload, tokenizer: Any) -> None:
    requests = workload.requests(0, tokenizer, VOCAB_SIZE, None)
    assert len({request.request_id for request in requests}) == len(requests)
    arrivals = [request.arrival_s for request in requests]
    assert arrivals == sorted(arrivals) and arrivals[0] >= 0
    for request in requests:
        assert request.max_tokens >= 1
        assert request.prompt_token_ids and request.category
        assert all(type(token) is int for token in request.prompt_token_ids)
        assert 0 <= min(request.prompt_token_ids) <= max(request.prompt_token_ids) < VOCAB_SIZE


def test_ids_stay_below_a_tiny_vocabulary(workload: Workload, tokenizer: Any) -> None:
    if isinstance(workload, TextWorkload):
        with pytest.raises(ValueError, match="vocabulary size 16"):
            workload.requests(0, tokenizer, 16, None)
        return
    requests = workload.requests(0, None, 16, None)
    assert {token for request in requests for token in request.prompt_token_ids} == set(range(16))


def test_describe_is_json_and_tells_what_was_built(workload: Workload, tokenizer: Any) -> None:
    requests = workload.requests(5, tokenizer, VOCAB_SIZE, None)
    told = json.loads(json.dumps(workload.describe()))
    assert told["name"] == workload.name
    assert told["built"]["seed"] == 5
    assert told["built"]["num_requests"] == len(requests)
    lengths = [len(request.prompt_token_ids) for request in requests]
    assert told["built"]["prompt_tokens"] == {
        "total": sum(lengths),
        "min": min(lengths),
        "max": max(lengths),
    }
    parameters = inspect.signature(type(workload)).parameters
    assert set(told["config"]) == set(parameters)
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_unknown_setting_and_changing_a_setting_are_refused(workload: Workload) -> None:
    with pytest.raises(TypeError, match="num_request"):
        type(workload)(num_request=3)  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        workload.overlong = "drop"  # type: ignore[misc]


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 1.5}, {"vocab_size": 0}])
def test_bad_arguments_of_a_build(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*; valid: a whole number"):
        FixedWorkload().requests(**{"seed": 0, "vocab_size": 10, **bad})


# -- digest -----------------------------------------------------------------------------------


def reference_digest(requests: list[WorkloadRequest]) -> str:
    parts = [b"workload 1\n"]
    for request in requests:
        ids = request.prompt_token_ids
        parts.append(len(ids).to_bytes(8, "little") + request.max_tokens.to_bytes(8, "little"))
        parts.append(struct.pack("<d", request.arrival_s) + bytes([request.ignore_eos]))
        parts += [token.to_bytes(8, "little") for token in ids]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_digest_is_the_documented_bytes_whatever_the_machine(workload: Workload, tokenizer: Any):
    requests = workload.requests(1, tokenizer, VOCAB_SIZE, None)
    assert workload.digest(requests) == reference_digest(requests)


def test_digest_sees_what_engines_do_and_nothing_else() -> None:
    first, second = FixedWorkload(num_requests=2, input_len=3).requests(0, None, 50, None)
    digest = Workload.digest([first, second])
    same = replace(first, request_id="x", category="y", prompt_text="z", prefix_group="g")
    assert Workload.digest([same, second]) == digest
    changes: list[dict[str, Any]] = [
        {"prompt_token_ids": first.prompt_token_ids[:-1]},
        {"max_tokens": first.max_tokens + 1},
        {"arrival_s": 0.5},
        {"ignore_eos": False},
    ]
    changed = [Workload.digest([replace(first, **change), second]) for change in changes]
    assert len({digest, Workload.digest([second, first]), *changed}) == len(changes) + 2


def test_digest_tells_where_one_prompt_ends() -> None:
    one = WorkloadRequest("a", (1, 2), 1)
    assert Workload.digest([one, replace(one, prompt_token_ids=(3,))]) != Workload.digest(
        [replace(one, prompt_token_ids=(1,)), replace(one, prompt_token_ids=(2, 3))]
    )


# -- synthetic workloads ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_nano256_is_the_published_shape(seed: int) -> None:
    rng = random.Random(seed)
    expected = []
    for _ in range(256):
        ids = [rng.randint(0, 10_000) for _ in range(rng.randint(100, 1024))]
        expected.append((tuple(ids), rng.randint(100, 1024)))
    requests = Nano256Workload().requests(seed, None, 128_256, None)
    assert [(request.prompt_token_ids, request.max_tokens) for request in requests] == expected


@pytest.mark.parametrize(("vocab_size", "clamped"), [(10_000, True), (10_001, False), (300, True)])
def test_nano256_says_when_the_vocabulary_narrows_the_ids(vocab_size: int, clamped: bool) -> None:
    workload = Nano256Workload(num_requests=8)
    requests = workload.requests(0, None, vocab_size, None)
    built = workload.describe()["built"]
    assert built["token_ids_clamped_to_vocab"] is clamped
    assert built["max_token_id"] == min(10_000, vocab_size - 1)
    assert max(max(request.prompt_token_ids) for request in requests) <= built["max_token_id"]


def test_fixed_lengths_and_prompts_that_share_nothing() -> None:
    requests = FixedWorkload(num_requests=7, input_len=33, output_len=5).requests(0, None, 9999)
    assert [(len(r.prompt_token_ids), r.max_tokens) for r in requests] == [(33, 5)] * 7
    assert len({request.prompt_token_ids[:4] for request in requests}) == 7
    assert all(request.ignore_eos for request in requests)


def test_mixed_lengths_fill_their_bounds() -> None:
    workload = MixedWorkload(
        num_requests=400, min_input_len=3, max_input_len=6, min_output_len=1, max_output_len=4
    )
    requests = workload.requests(0, None, 50)
    assert {len(request.prompt_token_ids) for request in requests} == {3, 4, 5, 6}
    assert {request.max_tokens for request in requests} == {1, 2, 3, 4}


def test_shared_prefix_shares_exactly_its_prefix() -> None:
    workload = SharedPrefixWorkload(
        num_groups=3, requests_per_group=4, shared_len=50, own_len=10, output_len=2
    )
    requests = workload.requests(0, None, 5000)
    prefixes: dict[str | None, set[tuple[int, ...]]] = {}
    for request in requests:
        assert len(request.prompt_token_ids) == 60
        prefixes.setdefault(request.prefix_group, set()).add(request.prompt_token_ids[:50])
    assert len(prefixes) == 3
    assert all(len(shared) == 1 for shared in prefixes.values())
    assert len({request.prompt_token_ids[:50] for request in requests}) == 3
    assert len({request.prompt_token_ids[50:53] for request in requests}) == 12


def test_orders_of_shared_prefix_differ_only_in_order() -> None:
    settings: dict[str, Any] = {"num_groups": 3, "requests_per_group": 3, "shared_len": 8}
    by_order = {
        order: SharedPrefixWorkload(order=order, **settings).requests(0, None, 100)
        for order in ("grouped", "interleaved", "shuffled")
    }
    groups = {order: [r.prefix_group for r in requests] for order, requests in by_order.items()}
    assert groups["grouped"] == sorted(groups["grouped"])
    assert groups["interleaved"] == 3 * sorted(set(groups["grouped"]))
    assert groups["shuffled"] not in (groups["grouped"], groups["interleaved"])
    same = {frozenset(requests) for requests in by_order.values()}
    assert len(same) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(FixedWorkload, input_len=0), "input_len is 0; valid: a whole number of at least"),
        (partial(FixedWorkload, num_requests=True), "num_requests is True; valid"),
        (partial(FixedWorkload, output_len=2.0), "output_len is 2.0; valid"),
        (partial(MixedWorkload, min_input_len=9, max_input_len=8), "min_input_len is 9, above"),
        (partial(Nano256Workload, max_token_id=-1), "max_token_id is -1; valid"),
        (partial(SharedPrefixWorkload, order="group"), "Did you mean 'grouped'.*interleaved"),
        (partial(FixedWorkload, overlong="cut"), "unknown overlong 'cut'.*drop, error, keep"),
        (partial(TextWorkload, categories="chats"), "unknown category 'chats'.*'chat'.*code_edit"),
        (partial(TextWorkload, categories=[]), "categories is .*; valid: one name, or a list"),
        (partial(TextWorkload, categories=["chat", "chat"]), "names something twice"),
        (partial(TextWorkload, shuffle="false"), "shuffle is 'false'; valid: true, false"),
        (partial(TextWorkload, num_requests=0), "num_requests is 0; valid: null, or"),
    ],
)
def test_bad_settings_name_the_key_and_what_is_valid(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- requests that exceed the context ---------------------------------------------------------


OVERLONG = MixedWorkload(
    num_requests=60, min_input_len=10, max_input_len=40, min_output_len=5, max_output_len=15
)
CONTEXT = 40


def split_by_context() -> tuple[list[WorkloadRequest], list[WorkloadRequest]]:
    """The requests that fit the context and those that do not."""
    everything = OVERLONG.requests(0, None, 99, None)
    fits = [r for r in everything if len(r.prompt_token_ids) + r.max_tokens <= CONTEXT]
    too_long = [request for request in everything if request not in fits]
    assert fits and too_long
    return fits, too_long


def test_overlong_requests_are_kept_by_default_and_counted() -> None:
    kept = OVERLONG.requests(0, None, 99, CONTEXT)
    assert kept == OVERLONG.requests(0, None, 99, None)
    assert "num_overlong" not in OVERLONG.describe()["built"]
    OVERLONG.requests(0, None, 99, CONTEXT)
    assert OVERLONG.describe()["built"]["num_overlong"] == len(split_by_context()[1])


def test_overlong_drop() -> None:
    workload = replace(OVERLONG, overlong="drop")
    fits, too_long = split_by_context()
    assert workload.requests(0, None, 99, CONTEXT) == fits
    assert workload.describe()["built"]["num_overlong"] == len(too_long)


def test_overlong_truncate_keeps_the_start() -> None:
    workload = replace(OVERLONG, overlong="truncate")
    fits, too_long = split_by_context()
    cut = {request.request_id: request for request in workload.requests(0, None, 99, CONTEXT)}
    assert all(cut[request.request_id] == request for request in fits)
    num_cut_tokens = 0
    for request in too_long:
        short = cut[request.request_id].prompt_token_ids
        assert len(short) + request.max_tokens == CONTEXT
        assert request.prompt_token_ids[: len(short)] == short
        num_cut_tokens += len(request.prompt_token_ids) - len(short)
    assert workload.describe()["built"]["num_truncated_tokens"] == num_cut_tokens


def test_overlong_truncate_of_text_keeps_the_end(tokenizer: Any) -> None:
    whole = TextWorkload(categories="chat", num_requests=1, max_tokens=4)
    (request,) = whole.requests(0, tokenizer, VOCAB_SIZE, None)
    (short,) = replace(whole, overlong="truncate").requests(0, tokenizer, VOCAB_SIZE, 20)
    assert short.prompt_token_ids == request.prompt_token_ids[-16:]
    assert short.prompt_text is None


def test_overlong_error_names_the_request_and_the_ways_out() -> None:
    _, too_long = split_by_context()
    with pytest.raises(ValueError, match=f"{too_long[0].request_id} .*{CONTEXT}.*truncate or drop"):
        replace(OVERLONG, overlong="error").requests(0, None, 99, CONTEXT)


def test_overlong_leaves_no_empty_workload_and_no_empty_prompt() -> None:
    with pytest.raises(ValueError, match="no request is left"):
        replace(OVERLONG, overlong="drop").requests(0, None, 99, 3)
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        replace(OVERLONG, overlong="truncate").requests(0, None, 99, 3)


# -- prompts that ship with the project -------------------------------------------------------


def shipped_rows() -> list[Any]:
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


def code_block(prompt: Any) -> tuple[str, str]:
    """The language and the text of the only fenced block of a prompt."""
    content = "\n".join(message["content"] for message in prompt.messages)
    blocks = re.findall(r"```(\w+)\n(.*?)```", content, flags=re.DOTALL)
    assert len(blocks) == 1, prompt.request_id
    return blocks[0]


def test_code_edit_prompts_hold_a_whole_file_to_copy() -> None:
    languages = Counter()
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
    requests = TextWorkload(categories=("chat", "code_edit")).requests(0, tokenizer, VOCAB_SIZE)
    chat = [p.request_id for p in read_category("chat")]
    code = [p.request_id for p in read_category("code_edit")]
    ids = [request.request_id for request in requests]
    assert ids[:4] == [chat[0], code[0], chat[1], code[1]]
    assert sorted(ids) == sorted(chat + code)
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
    with pytest.raises(ValueError, match="no chat template.*apply_chat_template=false"):
        TextWorkload().requests(0, bare, VOCAB_SIZE)
    assert TextWorkload(apply_chat_template=False).requests(0, bare, VOCAB_SIZE)


# -- JSONL ------------------------------------------------------------------------------------


def test_jsonl_takes_every_kind_of_prompt(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
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
    rows = [{"id": f"r{i}", "prompt": f"p{i}", "arrival_s": float(i)} for i in range(20)]
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
        ({**GOOD, "arrival_s": 2, "id": "first"}, "'id' is 'first', as in line 1; valid"),
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
    with pytest.raises(ValueError, match="unknown prompt_field 'txt'.*Did you mean 'text'"):
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


QUESTIONS = [
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
    with pytest.raises(ValueError, match="unknown category .*'maths'.*'math'.*math, writing"):
        SpecBenchWorkload(path=path, categories=["maths"]).requests(0, tokenizer, VOCAB_SIZE)


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        (SpecBenchWorkload, {"category": "a", "turns": ["b"]}, "'question_id' is missing"),
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
    path = write_rows(tmp_path / "rows.jsonl", [{"task_id": "T/0", "prompt": code, "question": "q"}])
    (request,) = HumanEvalWorkload(path=path).requests(0, tokenizer, VOCAB_SIZE)
    assert (request.prompt_text, request.request_id) == (code, "T/0")
    (request,) = Gsm8kWorkload(path=path).requests(0, tokenizer, VOCAB_SIZE)
    assert request.prompt_text == "<|user|>q<|end|><|assistant|>"


# -- Mooncake ---------------------------------------------------------------------------------


def test_mooncake_same_hash_same_tokens(mooncake: Any) -> None:
    first, second, third = mooncake().requests(0, None, 50_000)
    assert [len(r.prompt_token_ids) for r in (first, second, third)] == [1500, 1024, 513]
    assert first.prompt_token_ids[:1024] == second.prompt_token_ids
    assert third.prompt_token_ids[:512] == first.prompt_token_ids[512:1024]
    assert third.prompt_token_ids[512:] == first.prompt_token_ids[:1]
    blocks = {first.prompt_token_ids[i : i + 8] for i in (0, 512, 1024)}
    assert len(blocks) == 3
    assert [r.max_tokens for r in (first, second, third)] == [40, 3, 900]
    assert [r.arrival_s for r in (first, second, third)] == [0.0, 0.25, 0.25]
    assert first.prefix_group == second.prefix_group != third.prefix_group


def test_mooncake_ids_come_from_a_documented_hash(mooncake: Any) -> None:
    """Not from a generator whose stream may change with a library's version."""
    first = mooncake().requests(6, None, 50_000)[0]
    raw = hashlib.shake_128(b"6:block 7").digest(4 * 512)
    expected = [int.from_bytes(raw[i : i + 4], "little") % 50_000 for i in range(0, len(raw), 4)]
    assert list(first.prompt_token_ids[:512]) == expected


def test_mooncake_scaling_keeps_the_sharing(mooncake: Any) -> None:
    workload = mooncake(length_scale=1 / 32, time_scale=0.5)
    first, second, third = workload.requests(0, None, 50_000)
    assert [len(r.prompt_token_ids) for r in (first, second, third)] == [47, 32, 17]
    assert [r.max_tokens for r in (first, second, third)] == [2, 1, 29]
    assert first.prompt_token_ids[:32] == second.prompt_token_ids
    assert [r.arrival_s for r in (first, second, third)] == [0.0, 0.125, 0.125]
    assert workload.describe()["built"]["block_tokens"] == 16
    for scale in (0.3, 1 / 1024):
        with pytest.raises(ValueError, match="multiples of 1/512"):
            mooncake(length_scale=scale)


def test_traces_clip_and_tell(mooncake: Any) -> None:
    workload = mooncake(max_input_len=1000, max_output_len=30, max_requests=2)
    whole = mooncake().requests(0, None, 500)
    requests = workload.requests(0, None, 500)
    assert [r.prompt_token_ids for r in requests] == [r.prompt_token_ids[:1000] for r in whole[:2]]
    assert [r.max_tokens for r in requests] == [30, 3]
    built = workload.describe()["built"]
    assert (built["num_clipped_inputs"], built["clipped_input_tokens"]) == (2, 500 + 24)
    assert (built["num_clipped_outputs"], built["clipped_output_tokens"]) == (1, 10)
    assert built["num_requests"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestamp": -5}, "'timestamp' is -5; valid: a number of at least 0"),
        ({"timestamp": 100}, "'timestamp' is 0.15 s before the row above; valid: .*never decrease"),
        ({"input_length": 0}, "'input_length' is 0; valid: a whole number of at least 1"),
        ({"output_length": None}, "'output_length' is None; valid: a whole number"),
        ({"hash_ids": [1]}, "'hash_ids' has 1 ids for an input_length of 1500; valid: 3"),
        ({"hash_ids": [1, 2, "3"]}, "'hash_ids' holds '3'; valid: a list of whole numbers"),
        ({"hash_ids": 3}, "'hash_ids' is 3; valid: a list of whole numbers"),
    ],
)
def test_bad_mooncake_rows(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    row = {**MOONCAKE_ROWS[0], "timestamp": 300, **change}
    path = write_rows(tmp_path / "trace.jsonl", [*MOONCAKE_ROWS, row])
    with pytest.raises(ValueError, match=f"line 4: {message}"):
        MooncakeWorkload(path=path).requests(0, None, 100)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "2", True])
def test_bad_scales(value: Any, azure: Any) -> None:
    for key in ("time_scale", "length_scale"):
        with pytest.raises(ValueError, match=f"{key} is .*; valid: a finite number above 0"):
            azure(**{key: value})


# -- Azure ------------------------------------------------------------------------------------


def test_azure_arrivals_lengths_and_scaling(azure: Any) -> None:
    requests = azure().requests(0, None, 5000)
    assert [r.arrival_s for r in requests] == [0.0, 1.5, 60.0]
    assert [len(r.prompt_token_ids) for r in requests] == [48, 300, 7]
    assert [r.max_tokens for r in requests] == [10, 1, 200]
    assert len({r.prompt_token_ids[:4] for r in requests}) == 3
    small = azure(time_scale=2.0, length_scale=0.1).requests(0, None, 5000)
    assert [r.arrival_s for r in small] == [0.0, 3.0, 120.0]
    assert [len(r.prompt_token_ids) for r in small] == [5, 30, 1]
    assert [r.max_tokens for r in small] == [1, 1, 20]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("yesterday,3,4", "'TIMESTAMP' is 'yesterday'; valid: a time such as"),
        ("2023-11-16 18:17:04,3,4", "'TIMESTAMP' is 59.98 s before the row above; valid"),
        ("2023-11-16 18:17:04+00:00,3,4", "'TIMESTAMP' is .*valid: all with a zone, or none"),
        ("2023-11-16 18:19:00,0,4", "'ContextTokens' is '0'; valid: a whole number of at least 1"),
        ("2023-11-16 18:19:00,3,x", "'GeneratedTokens' is 'x'; valid: a whole number"),
        ("2023-11-16 18:19:00,3", "'GeneratedTokens' is missing; valid: 3 values a line"),
    ],
)
def test_bad_azure_rows(line: str, message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "trace.csv", [*AZURE_LINES, line])
    with pytest.raises(ValueError, match=f"line 5: {message}"):
        AzureWorkload(path=path).requests(0, None, 100)


def test_azure_needs_its_columns(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "trace.csv", ["TIMESTAMP,Tokens", "2023-11-16 18:19:00,3"])
    with pytest.raises(ValueError, match="line 1: no column ContextTokens, GeneratedTokens; valid"):
        AzureWorkload(path=path).requests(0, None, 100)
    path = write_rows(tmp_path / "header.csv", AZURE_LINES[:1])
    with pytest.raises(ValueError, match="no rows"):
        AzureWorkload(path=path).requests(0, None, 100)


# -- config files -----------------------------------------------------------------------------


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "workload").glob("*.yaml")))
def test_every_config_builds_its_workload_and_lists_all_settings(
    option: str, tmp_path: Path, mooncake: Any, tokenizer: Any
) -> None:
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(overrides=[f"+workload={option}"]).workload
    if "path" in config:
        with pytest.raises(Exception, match=r"set workload\.path=FILE"):
            instantiate(config)
        config.path = str(mooncake().path)
    workload = instantiate(config)
    assert isinstance(workload, Workload)
    told = json.loads(json.dumps(workload.describe()))
    assert set(config) - {"_target_"} == set(told["config"])
    fresh = type(workload)(**({"path": config.path} if "path" in config else {}))
    if not option.endswith("_small") and not isinstance(workload, TextWorkload):
        assert fresh == workload, "the file and the class disagree on a default"
        assert workload.name == option


def test_every_workload_has_a_config() -> None:
    targets = {
        line.split(":", 1)[1].strip().rsplit(".", 1)[1]
        for path in (CONF / "workload").glob("*.yaml")
        for line in path.read_text().splitlines()
        if line.startswith("_target_")
    }
    kinds = {
        name
        for name in package.__all__
        if inspect.isclass(kind := getattr(package, name))
        and issubclass(kind, Workload)
        and not inspect.isabstract(kind)
    }
    assert targets == kinds


# -- real data, where it is -------------------------------------------------------------------


def infinite_cache_hit_rate(prompts: Iterable[tuple[Any, ...]], block: int) -> Fraction:
    """Share of blocks that lie in a leading run of blocks already seen, by content."""
    nodes: dict[tuple[int, tuple[Any, ...]], int] = {}
    hits = total = 0
    for prompt in prompts:
        node = 0
        for start in range(0, len(prompt), block):
            key = (node, prompt[start : start + block])
            hits += key in nodes
            total += 1
            node = nodes.setdefault(key, len(nodes) + 1)
    return Fraction(hits, total)


@pytest.mark.parametrize(("trace", "published"), [("conversation", 36.6), ("synthetic", 64.0)])
def test_mooncake_hit_rate_from_the_generated_tokens(trace: str, published: float) -> None:
    """The ids share what the hash ids share; blocks of 32 tokens do for that."""
    path = data_file("mooncake_fast25", f"{trace}_trace.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    recorded = infinite_cache_hit_rate((tuple(row["hash_ids"]) for row in rows), 1)
    workload = MooncakeWorkload(path=path, length_scale=1 / 16)
    requests = workload.requests(0, None, 49_152)
    generated = infinite_cache_hit_rate(
        (request.prompt_token_ids for request in requests), workload.block_tokens
    )
    assert len(requests) == len(rows)
    assert generated == recorded
    assert round(float(generated) * 100, 1) == published


@pytest.mark.parametrize("trace", ["code", "conv"])
def test_azure_totals(trace: str) -> None:
    path = data_file("azure_llm_2023", f"AzureLLMInferenceTrace_{trace}.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    workload = AzureWorkload(path=path, max_requests=500)
    requests = workload.requests(0, None, 49_152)
    assert [len(r.prompt_token_ids) for r in requests] == [
        int(row["ContextTokens"]) for row in rows[:500]
    ]
    assert [r.max_tokens for r in requests] == [int(row["GeneratedTokens"]) for row in rows[:500]]


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
