"""Workloads: the same requests everywhere, the published shapes, and errors that help."""

from __future__ import annotations

import hashlib
import inspect
import json
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import PreTrainedTokenizerFast

from tests.helpers.workload_data import (
    AZURE_LINES,
    CONF,
    MOONCAKE_ROWS,
    VOCAB_SIZE,
    tiny_tokenizer,
    write_rows,
)
from workbench.bench import workloads as package
from workbench.bench.workloads import (
    AzureWorkload,
    FixedWorkload,
    MixedWorkload,
    MooncakeWorkload,
    MultiTurnWorkload,
    Nano256Workload,
    PrefixHitsWorkload,
    SharedPrefixWorkload,
    TextWorkload,
    Workload,
    WorkloadRequest,
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


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
    "prefix_hits": PrefixHitsWorkload(
        num_requests=8, num_groups=1, input_len=32, output_len=4, granularity=4
    ),
    "multi_turn": MultiTurnWorkload(num_conversations=2, num_turns=3, system_len=24),
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
        if request.after is not None:
            names = [other.request_id for other in requests]
            parts.append(b"after" + names.index(request.after).to_bytes(8, "little"))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_digest_is_the_documented_bytes_whatever_the_machine(
    workload: Workload, tokenizer: Any
) -> None:
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
    groups = {
        order: [str(request.prefix_group) for request in requests]
        for order, requests in by_order.items()
    }
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
        (
            lambda: FixedWorkload(output_len=2.0),  # type: ignore[arg-type]
            "output_len is 2.0; valid",
        ),
        (partial(MixedWorkload, min_input_len=9, max_input_len=8), "min_input_len is 9, above"),
        (partial(Nano256Workload, max_token_id=-1), "max_token_id is -1; valid"),
        (partial(SharedPrefixWorkload, order="group"), "Did you mean 'grouped'.*interleaved"),
        (partial(FixedWorkload, overlong="cut"), "unknown overlong 'cut'.*drop, error, keep"),
        (partial(TextWorkload, categories="chats"), "unknown category 'chats'.*'chat'.*code_edit"),
        (partial(TextWorkload, categories=[]), "categories is .*; valid: one name, or a list"),
        (partial(TextWorkload, categories=["chat", "chat"]), "names something twice"),
        (
            lambda: TextWorkload(shuffle="false"),  # type: ignore[arg-type]
            "shuffle is 'false'; valid: true, false",
        ),
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
