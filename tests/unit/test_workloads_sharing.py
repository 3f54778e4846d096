"""Workloads that share prefixes: the exact hit rate, and the turns of conversations."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.fake_backend import FakeBackend, FakeClock
from workbench.bench.load import Closed, Offline
from workbench.bench.workloads import MultiTurnWorkload, PrefixHitsWorkload
from workbench.bench.workloads.sharing import hits_of_requests
from workbench.configuration import compose_config
from workbench.core.errors import ConfigError
from workbench.core.workload import WorkloadRequest

VOCAB_SIZE = 49_152
SMALL = partial(
    PrefixHitsWorkload,
    num_requests=16,
    num_groups=2,
    input_len=256,
    output_len=16,
    granularity=32,
)


def longest_shared(requests: list[WorkloadRequest]) -> list[int]:
    """By request, the longest start that it shares with any before it: the plain way."""
    found = []
    for index, request in enumerate(requests):
        best = 0
        for other in requests[:index]:
            pairs = zip(request.prompt_token_ids, other.prompt_token_ids, strict=False)
            length = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if length is None:
                length = min(len(request.prompt_token_ids), len(other.prompt_token_ids))
            best = max(best, length)
        found.append(best)
    return found


# -- prefix_hits ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("workload", ["prefix_hits", "prefix_hits_small"])
def test_the_rate_is_exact_in_blocks_of_any_size_that_divides(
    workload: str, rate: float, seed: int
) -> None:
    node = compose_config([f"workload={workload}", f"workload.hit_rate={rate}"]).cfg.workload
    made = PrefixHitsWorkload(**{k: v for k, v in node.items() if k != "_target_"})
    requests = made.requests(seed, None, VOCAB_SIZE)
    total = sum(len(r.prompt_token_ids) for r in requests)
    assert total == made.num_requests * made.input_len
    sizes = [size for size in (1, 16, 32, 64) if made.granularity % size == 0]
    assert len(sizes) >= 3
    for size in sizes:
        assert hits_of_requests(requests, size).hit_tokens == rate * total
    assert made.declared_hit_rate == made.describe()["declared_hit_rate"] == rate
    assert made.describe()["built"]["infinite_cache_hit_rate"] == {"blocks": rate, "tokens": rate}


def test_token_by_token_nothing_is_shared_by_chance() -> None:
    """With few ids, random tokens alone would often agree with a prefix one step further."""
    workload = SMALL(hit_rate=0.5)
    requests = workload.requests(3, None, 40)
    shared = longest_shared(requests)
    assert shared[:2] == [0, 0] and sum(shared) == 0.5 * 16 * 256
    assert all(length % 32 == 0 for length in shared)
    with pytest.raises(ValueError, match="vocabulary of 3 has ids"):
        workload.requests(0, None, 3)


def test_lengths_order_and_output_are_the_same_at_every_rate() -> None:
    shapes = []
    for rate in (0.0, 0.25, 0.75):
        requests = SMALL(hit_rate=rate).requests(0, None, VOCAB_SIZE)
        shapes.append([(r.request_id, len(r.prompt_token_ids), r.max_tokens, r.after)
                       for r in requests])  # fmt: skip
    assert shapes[0] == shapes[1] == shapes[2]
    firsts = [shape for shape in shapes[0] if shape[3] is None]
    assert [max_tokens for _, _, max_tokens, _ in firsts] == [1, 1]
    assert Counter(after for *_, after in shapes[0] if after) == {
        name: 7 for name, *_ in firsts
    }  # fmt: skip


def test_what_is_shared_was_served_before_it_is_sent() -> None:
    """Whatever the load: in the order in which a backend takes them, the rate is reached."""
    requests = SMALL(hit_rate=0.75).requests(0, None, VOCAB_SIZE)
    by_id = {request.request_id: request for request in requests}
    for load in (Offline(requests), Closed(requests, 3), Closed(requests, 16)):
        clock = FakeClock()
        backend = FakeBackend(clock, max_num_seqs=5)
        ended: set[str] = set()
        waits: list[bool] = []
        watched = load.watch(lambda e, ended=ended: ended.add(e.request_id))  # type: ignore[misc]
        real_poll = load.poll

        def poll(
            now_s: float, num: int, real: Any = real_poll, e: set[str] = ended, w: Any = waits
        ) -> Any:
            due = real(now_s, num)
            w += [r.after in e for r in due if r.after is not None]
            return due

        load.poll = poll  # type: ignore[method-assign]
        backend.run(load, watched)
        assert len(waits) == 14 and all(waits)
        taken = [by_id[name] for name in backend.runs[0]]
        assert hits_of_requests(taken, 32).hit_tokens == 0.75 * 16 * 256


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 24),
    groups=st.integers(1, 5),
    units=st.integers(2, 8),
    granularity=st.sampled_from([1, 4, 16]),
    eighths=st.integers(0, 7),
)
def test_a_rate_is_exact_or_refused(
    num: int, groups: int, units: int, granularity: int, eighths: int
) -> None:
    rate = eighths / 8
    settings_ = {"num_requests": num, "num_groups": groups, "input_len": units * granularity}
    try:
        workload = PrefixHitsWorkload(hit_rate=rate, granularity=granularity, **settings_)  # type: ignore[arg-type]
    except ConfigError as error:
        cached = rate * num * units * granularity
        most = max(0, num - groups) * (units - 1) * granularity
        assert cached % granularity or cached > most, str(error)
        return
    requests = workload.requests(0, None, 1000)
    assert len(requests) == num
    assert sum(longest_shared(requests)) == rate * num * units * granularity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hit_rate": 1.0}, "hit_rate is 1.0; valid: a number from 0 up to below 1"),
        ({"hit_rate": -0.1}, "hit_rate is -0.1; valid"),
        ({"hit_rate": "half"}, "hit_rate is 'half'; valid"),
        ({"hit_rate": 0.3}, "no multiple of granularity .32."),
        ({"hit_rate": 0.875}, "valid here: at most 0.766, .*first of each of 2 groups"),
        ({"num_groups": 16}, "valid here: at most 0.000"),
        ({"num_groups": 0}, "num_groups is 0; valid"),
    ],
)
def test_bad_settings_of_prefix_hits(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMALL(**change)


def test_a_context_that_cuts_prompts_cannot_keep_the_promise() -> None:
    for overlong in ("truncate", "drop"):
        with pytest.raises(ValueError, match=r"would not hit 0\.5 of their tokens"):
            SMALL(overlong=overlong).requests(0, None, VOCAB_SIZE, 260)
    assert len(SMALL().requests(0, None, VOCAB_SIZE, 272)) == 16


# -- multi_turn -------------------------------------------------------------------------------


def talk(**changes: Any) -> MultiTurnWorkload:
    options = {"num_conversations": 3, "num_turns": 4, "system_len": 32, "user_len": 8}
    return MultiTurnWorkload(**{**options, "answer_len": 16, **changes})


def test_each_turn_goes_on_where_the_last_one_ended() -> None:
    requests = talk().requests(0, None, VOCAB_SIZE)
    assert len(requests) == 12
    talks = [list(turns) for _, turns in groupby(requests, key=lambda r: r.prefix_group)]
    assert [len(turns) for turns in talks] == [4, 4, 4]
    systems = {turns[0].prompt_token_ids[:32] for turns in talks}
    assert len(systems) == 1
    for turns in talks:
        assert [r.after for r in turns] == [None, *(r.request_id for r in turns[:-1])]
        for number, request in enumerate(turns):
            assert len(request.prompt_token_ids) == 32 + 8 + number * (8 + 16)
            assert request.max_tokens == 16
            if number:
                before = turns[number - 1].prompt_token_ids
                assert request.prompt_token_ids[: len(before)] == before
    assert len({turns[0].prompt_token_ids for turns in talks}) == 3


def test_orders_and_their_reuse() -> None:
    grouped = talk().requests(0, None, VOCAB_SIZE)
    interleaved = talk(order="interleaved").requests(0, None, VOCAB_SIZE)
    assert sorted(r.request_id for r in grouped) == sorted(r.request_id for r in interleaved)
    assert [r.request_id[-2:] for r in interleaved] == [f"0{t}" for t in range(4) for _ in range(3)]
    assert talk().digest(grouped) != talk().digest(interleaved)


def test_the_digest_covers_who_waits_for_whom() -> None:
    requests = talk().requests(0, None, VOCAB_SIZE)
    free = [WorkloadRequest(r.request_id, r.prompt_token_ids, r.max_tokens) for r in requests]
    assert talk().digest(requests) != talk().digest(free)


def test_a_cache_finds_the_turns_before() -> None:
    workload = talk(user_len=16)
    requests = workload.requests(0, None, VOCAB_SIZE)
    # In whole blocks of 16: of each turn but the first the prompt before it, else the system's.
    shared = [32 if r.after is None else len(r.prompt_token_ids) - 32 for r in requests]
    shared[0] = 0
    total = sum(len(r.prompt_token_ids) for r in requests)
    told = workload.describe()["built"]["infinite_cache_hit_rate"]
    assert told["tokens"] == pytest.approx(sum(shared) / total)
    assert workload.declared_hit_rate is None


def test_one_client_a_conversation() -> None:
    requests = talk().requests(0, None, VOCAB_SIZE)
    clock = FakeClock()
    backend = FakeBackend(clock)
    load = Closed(requests, 2)
    backend.run(load, load.watch(lambda event: None))
    open_talks = [name.rpartition("-")[0] for name in backend.runs[0]]
    # Two conversations run side by side, the third one takes the place of the first to end.
    assert set(open_talks[:8]) == {"multi_turn-000", "multi_turn-001"}
    assert set(open_talks[8:]) == {"multi_turn-002"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_turns": 0}, "num_turns is 0; valid"),
        ({"system_len": -1}, "system_len is -1; valid: a whole number of at least 0"),
        ({"order": "shuffled"}, "unknown order 'shuffled'.*grouped, interleaved"),
    ],
)
def test_bad_settings_of_multi_turn(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        talk(**change)
