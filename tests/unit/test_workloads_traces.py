"""Workloads of recorded traffic: sharing, arrivals, scaling, clipping, and bad rows."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.workload_data import (
    AZURE_LINES,
    MOONCAKE_ROWS,
    data_file,
    write_rows,
)
from workbench.bench.workloads import (
    AzureWorkload,
    MooncakeWorkload,
)


@pytest.fixture
def mooncake(tmp_path: Path) -> Callable[..., MooncakeWorkload]:
    return partial(MooncakeWorkload, path=write_rows(tmp_path / "trace.jsonl", MOONCAKE_ROWS))


@pytest.fixture
def azure(tmp_path: Path) -> Callable[..., AzureWorkload]:
    return partial(AzureWorkload, path=write_rows(tmp_path / "trace.csv", AZURE_LINES))


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


def test_mooncake_tells_what_a_cache_of_endless_size_would_find(mooncake: Any) -> None:
    """Row 2 starts as row 1 does; row 3 has the same blocks the other way round."""
    for scale, block in ((1.0, 512), (1 / 32, 16)):
        workload = mooncake(length_scale=scale)
        requests = workload.requests(0, None, 50_000)
        total = sum(len(r.prompt_token_ids) for r in requests)
        told = workload.describe()["built"]["infinite_cache_hit_rate"]
        assert told == {"blocks": pytest.approx(2 / 7), "tokens": pytest.approx(2 * block / total)}
    clipped = mooncake(max_input_len=600, max_requests=2)
    clipped.requests(0, None, 50_000)
    assert clipped.describe()["built"]["infinite_cache_hit_rate"]["blocks"] == 2 / 4
    dropped = mooncake(overlong="drop")
    assert len(dropped.requests(0, None, 50_000, 1450)) == 2
    assert dropped.describe()["built"]["infinite_cache_hit_rate"]["blocks"] == 0


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
    """The ids share what the hash ids share; blocks of 16 tokens do for that."""
    path = data_file("mooncake_fast25", f"{trace}_trace.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    recorded = infinite_cache_hit_rate((tuple(row["hash_ids"]) for row in rows), 1)
    workload = MooncakeWorkload(path=path, length_scale=1 / 32)
    # With few ids, the one-token ends of short prompts would now and then be equal by chance.
    requests = workload.requests(0, None, 2**20)
    generated = infinite_cache_hit_rate(
        (request.prompt_token_ids for request in requests), workload.block_tokens
    )
    assert len(requests) == len(rows)
    assert generated == recorded
    assert round(float(generated) * 100, 1) == published
    told = workload.describe()["built"]["infinite_cache_hit_rate"]
    assert told["blocks"] == float(recorded)


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
