"""The counted experiments, on small loads: what they claim to check, and what they write."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments import command, kv_waste, policy_comparison, trace_cache
from experiments.dry import count
from experiments.traces import HASH_BLOCK_TOKENS, Trace, TraceRequest, find_traces, read_trace
from tests.helpers.workload_data import AZURE_LINES, DATA, data_file, write_rows
from workbench.assemble import SCHEDULER_SLOTS
from workbench.bench.records import Record, ResultStore
from workbench.configuration import options_of
from workbench.core.errors import ConfigError

PNG = b"\x89PNG"


def run(
    main: Callable[[Sequence[str]], int], folder: Path, *arguments: str
) -> tuple[list[Record], list[Path]]:
    """Run an experiment; its records and figures."""
    assert main([*arguments, f"results_dir={folder}"]) == 0
    records, problems = ResultStore(folder).read()
    assert not problems
    figures = sorted(folder.glob("*.png"))
    assert all(path.read_bytes().startswith(PNG) for path in figures)
    for record in records:
        assert (record.status, record.verdict, record.kind) == ("OK", "counted", "dry_run")
        assert record.metrics is None and record.speedup is None and not record.samples
        assert "python -m experiments." in record.command
    return records, figures


def without_times(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    return {
        r.variant: {k: v for k, v in r.counters.items() if "_us_" not in k and "host_us" not in k}
        for r in records
    }


def mooncake_rows(num_rows: int, seed: int) -> list[dict[str, Any]]:
    """Rows that extend earlier ones now and then, some by whole blocks, some arriving together."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    fresh = iter(range(10_000))
    time = 0
    for _ in range(num_rows):
        time += rng.choice((0, 0, 40, 300))
        start = rng.choice(rows)["hash_ids"] if rows and rng.random() < 0.7 else []
        ids = [
            *start[: rng.randint(0, len(start))],
            *(next(fresh) for _ in range(rng.randint(1, 4))),
        ]
        tail = rng.choice((1, 100, HASH_BLOCK_TOKENS))
        rows.append(
            {
                "timestamp": time,
                "input_length": (len(ids) - 1) * HASH_BLOCK_TOKENS + tail,
                "output_length": rng.randint(1, 30),
                "hash_ids": ids,
            }
        )
    return rows


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    write_rows(folder / "conversation_trace.jsonl", mooncake_rows(60, seed=1))
    write_rows(folder / "synthetic_trace.jsonl", mooncake_rows(40, seed=2))
    write_rows(folder / "AzureLLMInferenceTrace_code.csv", AZURE_LINES)
    write_rows(folder / "AzureLLMInferenceTrace_conv.csv", AZURE_LINES)
    return tmp_path / "data"


# -- traces -------------------------------------------------------------------------------------


def brute_force_hits(trace: Trace) -> int:
    """Blocks found one request after the other, by comparing token lists."""
    seen: set[tuple[int, ...]] = set()
    hits = 0
    for row in trace.requests:
        ids, size = row.prompt(), row.block_tokens
        prefixes = [tuple(ids[: end * size]) for end in range(1, len(ids) // size + 1)]
        for prefix in prefixes:
            if prefix not in seen or len(prefix) >= len(ids):
                break
            hits += 1
        seen.update(prefixes)
    return hits


@pytest.mark.parametrize("seed", range(5))
def test_hits_of_a_trace_are_those_of_its_token_ids(seed: int, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "conversation_trace.jsonl", mooncake_rows(30, seed))
    trace = read_trace("mooncake_conversation", path)
    hits, _ = trace.whole_block_hits()
    assert hits == brute_force_hits(trace) > 0
    assert [len(row.prompt()) for row in trace.requests] == [r.input_len for r in trace.requests]


def test_a_prompt_of_known_blocks_leaves_one_to_run() -> None:
    row = TraceRequest(0.0, 2 * HASH_BLOCK_TOKENS, 1, (4, 5), HASH_BLOCK_TOKENS)
    again = Trace("t", (row, row), shares_prefixes=True)
    assert again.whole_block_hits() == (1, 2)
    assert again.recorded_hits() == (2, 4)


@pytest.mark.parametrize(
    ("name", "blocks_percent"), [("mooncake_conversation", 36.6), ("mooncake_synthetic", 64.0)]
)
def test_recorded_hits_are_the_published_ones(name: str, blocks_percent: float) -> None:
    data_file("mooncake_fast25", "README.md")
    trace = read_trace(name, find_traces(str(DATA), [name])[name])
    hits, total = trace.recorded_hits()
    assert round(100 * hits / total, 1) == blocks_percent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestamp": -1}, "'timestamp' is -1; valid: a number of at least 0"),
        ({"hash_ids": [1]}, "has 1 ids for"),
        ({"output_length": 0}, "output_length"),
    ],
)
def test_a_bad_mooncake_row_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}
    path = write_rows(tmp_path / "conversation_trace.jsonl", [{**row, **change}])
    with pytest.raises(ConfigError, match=message):
        read_trace("mooncake_conversation", path)


def test_unsorted_times_are_refused(tmp_path: Path) -> None:
    rows = mooncake_rows(3, seed=0)
    rows[0]["timestamp"] = 10_000
    path = write_rows(tmp_path / "conversation_trace.jsonl", rows)
    with pytest.raises(ConfigError, match=r"line 2.*before the row above"):
        read_trace("mooncake_conversation", path)
    lines = [AZURE_LINES[0], AZURE_LINES[3], AZURE_LINES[1]]
    with pytest.raises(ConfigError, match=r"line 3.*TIMESTAMP"):
        read_trace("azure_code", write_rows(tmp_path / "a.csv", lines))


def test_missing_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data_dir=\(not given\).*github.com/kvcache-ai"):
        trace_cache.main([])
    with pytest.raises(ConfigError, match=r"no conversation_trace\.jsonl below"):
        trace_cache.main([f"data_dir={tmp_path}"])
    with pytest.raises(ConfigError, match="unknown trace 'azure'"):
        trace_cache.main([f"data_dir={tmp_path}", "traces=azure"])


def test_trace_cache_finds_exactly_what_is_there(data_dir: Path, tmp_path: Path) -> None:
    base = (f"data_dir={data_dir}", "check_every=1", "pools=0.3,inf", "evictions=lru,fifo")
    arguments = (*base, "traces=mooncake_conversation,azure_code", "pool_factors=1.5")
    records, figures = run(trace_cache.main, tmp_path / "out", *arguments)
    assert len(figures) == 2
    shared = [r for r in records if r.workload["name"].startswith("mooncake")]
    assert len(shared) == 2 * (2 + 1)  # caches, orders of eviction and one unbounded
    for record in shared:
        found = count(record, "cached_tokens") / HASH_BLOCK_TOKENS
        if record.variant.endswith("unbounded"):
            assert found == count(record, "infinite_hit_blocks") > 0
        else:
            assert found <= count(record, "infinite_hit_blocks")
            assert record.counters["prefix_cache.evicted_blocks"] > 0
    timed = [r for r in records if r.workload["name"].startswith("azure")]
    assert timed and all(count(r, "cached_tokens") == 0 for r in timed)
    some = (*base, "traces=mooncake_conversation", "caches=radix")
    again, _ = run(trace_cache.main, tmp_path / "again", *some)
    assert without_times(again).items() <= without_times(records).items()


def test_a_cache_that_misses_is_noticed(data_dir: Path, tmp_path: Path) -> None:
    arguments = (f"data_dir={data_dir}", "traces=mooncake_conversation", "pools=inf")
    records, _ = run(trace_cache.main, tmp_path / "out", *arguments)
    findable = int(count(records[0], "infinite_hit_blocks"))
    trace_cache.check_endless(records[0], findable, HASH_BLOCK_TOKENS)
    with pytest.raises(AssertionError, match=f"has {findable + 1} to find"):
        trace_cache.check_endless(records[0], findable + 1, HASH_BLOCK_TOKENS)


def test_the_real_traces_head_is_found_whole(tmp_path: Path) -> None:
    data_file("mooncake_fast25", "conversation_trace.jsonl")
    arguments = ("traces=mooncake_conversation,mooncake_synthetic", "limit=60", "pools=inf")
    records, _ = run(trace_cache.main, tmp_path, f"data_dir={DATA}", *arguments)
    assert len(records) == 4


# -- memory and order ---------------------------------------------------------------------------


def test_kv_waste_grows_with_the_block(tmp_path: Path) -> None:
    records, figures = run(
        kv_waste.main, tmp_path, "workload.num_requests=24", "block_sizes=1,16,64", "check_every=25"
    )
    waste = [count(record, "mean_kv_waste") for record in records]
    assert len(figures) == 1
    assert [r.resolved_config["choices"]["engine/kv_cache"] for r in records] == [
        "contiguous",
        "paged",
        "paged",
        "paged",
    ]
    for record in records:  # what was built, and no more
        built = set(record.resolved_config["engine"])
        assert built == set(SCHEDULER_SLOTS)
        assert set(record.resolved_config["choices"]) == {f"engine/{slot}" for slot in built}
    contiguous, *paged = waste
    assert paged[0] == 0
    assert paged == sorted(paged)
    assert contiguous > 4 * paged[-1] > 0


def test_policies_do_what_they_are_for(tmp_path: Path) -> None:
    sizes = ("num_groups=6", "requests_per_group=10", "shared_len=512", "num_requests=80")
    records, figures = run(policy_comparison.main, tmp_path / "a", *sizes, "check_every=10")
    assert len(figures) == 1
    by_name = {record.variant: record for record in records}
    policies = options_of("engine/policy")
    assert set(by_name) == {f"{load}: {p}" for load in ("shared", "mixed") for p in policies}
    total = {r.counters["dry_run.prompt_tokens"] for r in records if r.variant.startswith("mixed")}
    assert len(total) == 1, "policies served different requests"

    def of(policy: str, name: str, load: str = "mixed") -> float:
        return count(by_name[f"{load}: {policy}"], name)

    assert all(of(p, "hit_rate") == 0 for p in policies)
    # Requests that share what is locked already need less room, so more run together.
    assert of("lpm", "steps", "shared") < 0.8 * of("fcfs", "steps", "shared")
    assert of("sjf", "mean_turnaround_steps") < of("fcfs", "mean_turnaround_steps")
    high, low = (f"mean_waited_steps_priority_{level}" for level in (1, 0))
    assert of("priority", high) < of("priority", low)
    assert of("priority", high) < of("fcfs", high)
    again, _ = run(policy_comparison.main, tmp_path / "b", *sizes)
    assert without_times(again) == without_times(records)


# -- the command line ---------------------------------------------------------------------------


def test_own_options_are_told_from_hydra_s() -> None:
    options, rest = command.parse(
        trace_cache.Options,
        ["limit=5", "pools=[0.1, inf]", "caches=radix", "seed=3", "engine.kv_cache.block_size=4"],
    )
    assert (options.limit, options.pools, options.caches) == (5, (0.1, float("inf")), ("radix",))
    assert rest == ["seed=3", "engine.kv_cache.block_size=4"]


@pytest.mark.parametrize(
    ("main", "argument", "message"),
    [
        (trace_cache.main, "limit=many", "limit=many must be of type int"),
        (trace_cache.main, "pools=0", "numbers over 0"),
        (kv_waste.main, "block_sizes=0", "must be 1 or more"),
        (kv_waste.main, "block_size=16", "block_size"),
        (policy_comparison.main, "policies=lifo", "unknown policy 'lifo'"),
        # What nothing would look at.
        (
            kv_waste.main,
            "load=poisson",
            r"'load'.*Valid: .*block_sizes.*engine\.kv_cache.*workload",
        ),
        (kv_waste.main, "load.concurrency=3", r"'load\.concurrency'"),
        (kv_waste.main, "dtype=float32", "'dtype'"),
        (policy_comparison.main, "engine/attention=sdpa", r"'engine\.attention'.*engine\.policy"),
        (policy_comparison.main, "engine.drafter.max_ngram=3", r"'engine\.drafter'"),
        (policy_comparison.main, "+technique=spec_decode", "fills drafter, verifier.*policy"),
        (trace_cache.main, "workload=mixed", "'workload'"),
        (trace_cache.main, "limits.kv_pool_tokens=64", r"limits\.max_num_seqs"),
        # What the experiment sets itself.
        (kv_waste.main, "engine/kv_cache=paged", "use block_sizes="),
        (policy_comparison.main, "+technique=shortest_job_first", "use policies="),
        (trace_cache.main, "engine/prefix_cache=radix", "use caches="),
    ],
)
def test_wrong_options_are_told(
    main: Callable[[Sequence[str]], int], argument: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        main([argument])


def test_every_experiment_s_configuration_has_its_program() -> None:
    programs = {path.stem for path in Path(kv_waste.__file__).parent.glob("*.py")}
    readme = (Path(kv_waste.__file__).parent / "README.md").read_text()
    for name in ("trace_cache", "kv_waste", "policy_comparison", "prefix_hit_rate", "multi_turn"):
        assert name in programs & set(options_of("experiment"))
        assert f"python -m experiments.{name}" in readme


def test_a_counted_record_has_no_speed() -> None:
    fields: dict[str, Any] = {"run_id": "r", "variant": "v", "kind": "dry_run", "status": "OK"}
    record = Record(verdict="counted", **fields)
    assert record.is_passed
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))).verdict == "counted"
    with pytest.raises(ValueError, match="must not carry metrics"):
        Record(verdict="counted", metrics={"output_tok_s": {"value": 1.0}}, **fields)
