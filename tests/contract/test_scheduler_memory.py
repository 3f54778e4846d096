"""Every policy, admission, prefill, block size, prefix cache and host tier together, in a pool that
runs dry: nothing leaks, nobody reads another's KV, everybody ends."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.helpers.engines import component
from tests.helpers.fake_runner import Choice, FakeRunner, make_request, make_scheduler
from tests.helpers.traffic import Traffic
from workbench.configuration import options_of
from workbench.core.errors import ConfigError
from workbench.core.request import FinishReason

MAX_LEN = 32
CACHES = [name for name in options_of("engine/prefix_cache") if name != "none"]
POLICIES = options_of("engine/policy")
#: Option, and what becomes of a pre-empted request's KV.
ADMISSIONS = [("reserve_full", ""), ("optimistic", "recompute"), ("optimistic", "swap")]
#: KV manager, block size, prefix cache and host tier.
MEMORIES = [
    ("contiguous", 0, "none", "none"),
    *itertools.product(["paged"], [1, 4, 16], ["none", *CACHES], ["none", "host"]),
]


def memory_choice(
    policy: str,
    admission: tuple[str, str],
    prefill: str,
    memory: tuple[str, int, str, str],
    pool_tokens: int = 3 * MAX_LEN // 2,
    **fields: int | str,
) -> Choice | None:
    """A scheduler whose pool is short; None where the parts do not go together."""
    kv_cache, block_size, cache, tier = memory
    option, preemption = admission
    if preemption == "swap" and tier == "none":
        return None
    if tier == "host" and cache == "none" and preemption != "swap":
        return None  # nobody would use the tier
    if component("policy", policy).needs_prefix_cache and cache == "none":
        return None
    settings: dict[str, dict[str, object]] = {
        "scheduler": {"max_num_batched_tokens": 24},
        "kv_offload": {"num_blocks": pool_tokens // max(1, block_size)} if tier == "host" else {},
        "prefill": {"chunk_tokens": 12} if prefill == "chunked" else {},
        "kv_cache": {"block_size": block_size} if block_size else {},
        "policy": {"steps_between_prompts": 1} if policy == "decode_first" else {},
        "admission": {"preemption": preemption, "headroom_tokens": 0} if preemption else {},
    }
    return Choice(
        policy=policy,
        admission=option,
        prefill=prefill,
        kv_cache=kv_cache,
        prefix_cache=cache,
        eviction="none" if cache == "none" else "lru",
        kv_offload=tier,
        max_model_len=MAX_LEN,
        pool_tokens=pool_tokens,
        settings=settings,
        **fields,  # type: ignore[arg-type]
    )


def combinations() -> list[object]:
    """All that go together, by name, under ``fcfs``.

    A policy only orders who waits and who gives way: the others meet each admission, prefill and
    cache at one block size, with a host tier where something swaps. Not crossed with them: the
    other block sizes, contiguous memory, and a host tier that only a cache fills.
    """
    found = []
    for policy, admission, prefill, memory in itertools.product(
        POLICIES, ADMISSIONS, options_of("engine/prefill"), MEMORIES
    ):
        tier = "host" if admission[1] == "swap" else "none"
        is_crossed = policy == "fcfs" or (memory[1] == 4 and memory[3] == tier)
        made = memory_choice(policy, admission, prefill, memory)
        if made is not None and is_crossed:
            name = "-".join([policy, admission[1] or "reserve", prefill, *map(str, memory)])
            found.append(pytest.param(made, id=name))
    return found


def run_traffic(traffic: Traffic, num_steps: int) -> None:
    """Arrivals, aborts and failing steps."""
    rng = traffic.rng
    for _ in range(num_steps):
        roll = rng.random()
        if roll < 0.4:
            traffic.arrive()
        elif roll < 0.5:
            traffic.abort()
        fail = rng.choice(["before", "during"]) if rng.random() < 0.04 else None
        traffic.step(fail, abort_meanwhile=rng.random() < 0.05)


@pytest.mark.parametrize("choice", combinations())
def test_traffic_in_a_pool_that_runs_dry(choice: Choice) -> None:
    seed = sum(map(ord, repr(choice)))
    traffic = Traffic(make_scheduler(choice), seed, max_drafts=3 * (seed % 2))
    traffic.runner.eos_rate = 0.02
    counters = traffic.scheduler.counters
    runs_dry = choice.admission == "optimistic" and choice.kv_cache == "paged"
    swaps = runs_dry and choice.settings["admission"]["preemption"] == "swap"
    for _ in range(20):  # a few are enough; random traffic may need more to run the pool dry
        run_traffic(traffic, 45)
        has_run_dry = counters()["preemptions"] > 0 or not runs_dry
        has_swapped = counters()["swaps_in"] > 0 or not swaps
        if traffic.num_failures and has_run_dry and has_swapped:
            break
    assert traffic.num_failures > 0
    traffic.drain()
    assert (counters()["preemptions"] > 0) == runs_dry
    assert (counters()["overcommitted_starts"] > 0) == runs_dry
    assert (counters()["swaps_out"] > 0) == (counters()["swaps_in"] > 0) == swaps


@pytest.mark.parametrize("cache", ["none", *CACHES])
def test_requests_are_aborted_in_every_state(cache: str) -> None:
    states: set[str] = set()
    for seed in range(30):
        choice = memory_choice(
            "fcfs", ("optimistic", "swap"), "chunked", ("paged", 4, cache, "host")
        )
        assert choice is not None
        # Few host blocks are too few for all that is pre-empted.
        choice.settings["kv_offload"]["num_blocks"] = (4, 24)[seed % 2]
        traffic = Traffic(make_scheduler(choice), seed, max_drafts=3)
        run_traffic(traffic, 60)
        traffic.drain()
        states |= traffic.aborted_states
    assert states == {
        "waiting", "half-prefilled", "decoding", "drafting", "swapped", "pre-empted",
    }  # fmt: skip


@pytest.mark.parametrize("cache", ["none", *CACHES])
def test_swapped_requests_come_back_with_their_kv(cache: str) -> None:
    choice = memory_choice(
        "fcfs", ("optimistic", "swap"), "whole_prompt", ("paged", 4, cache, "host")
    )
    assert choice is not None
    traffic = Traffic(make_scheduler(choice), 1, 0)
    for _ in range(40):
        traffic.arrive()
    traffic.drain()
    counters = traffic.scheduler.counters()
    assert counters["swaps_out"] == counters["swaps_in"] > 0
    assert traffic.runner.num_copies_in > 0


# -- progress and fairness ------------------------------------------------------------------------


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("prefill", options_of("engine/prefill"))
@pytest.mark.parametrize("policy", POLICIES)
def test_no_livelock_where_the_pool_barely_fits_one(
    policy: str, prefill: str, preemption: str
) -> None:
    """Each pre-emption is paid by a token: a request that grew past its promise has produced one,
    and takes from all others at most. So their number is bounded, whatever the order."""
    cache = "radix" if component("policy", policy).needs_prefix_cache else "none"
    choice = memory_choice(
        policy,
        ("optimistic", preemption),
        prefill,
        ("paged", 4, cache, "host" if preemption == "swap" else "none"),
        pool_tokens=MAX_LEN,
    )
    assert choice is not None
    traffic = Traffic(make_scheduler(choice), 5, 0)
    traffic.runner.eos_rate = 0.0
    for index in range(25):
        traffic.arrive(
            make_request(
                f"r{index}", prompt_len=1 + index % 7, max_tokens=25 - index % 5, ignore_eos=True
            )
        )
    traffic.drain()
    requests = traffic.done.values()
    num_tokens = sum(len(r.output_token_ids) for r in requests)
    most = choice.max_num_seqs * num_tokens
    preemptions = traffic.scheduler.counters()["preemptions"]
    assert 0 < preemptions == sum(r.num_preemptions for r in requests) < most


@pytest.mark.parametrize("policy", ["fcfs", "priority", "sjf"])
def test_the_last_in_the_policy_s_order_gives_way(policy: str) -> None:
    """Also where it stands before the one that grows in the batch, and ran longer."""
    choice = Choice(
        policy=policy,
        admission="optimistic",
        max_num_seqs=3,
        max_model_len=64,
        pool_tokens=24,
        settings={"kv_cache": {"block_size": 4}, "admission": {"headroom_tokens": 0}},
    )
    scheduler = make_scheduler(choice)
    runner = FakeRunner(scheduler)
    runner.eos_rate = 0.0
    # 4 + 1 tokens are in 2 blocks each: 6 of 6 blocks after the first decode, dry at 9 tokens.
    lengths = {"first": 20, "second": 12, "third": 10}
    priorities = {"first": 0, "second": 2, "third": 1}
    for name, length in lengths.items():
        scheduler.add(
            make_request(
                name,
                prompt=[3 + len(name), 4, 5, 6],
                max_tokens=length,
                ignore_eos=True,
                priority=priorities[name],
            )
        )
    while not scheduler.counters()["preemptions"]:
        runner.step()
    (victim,) = [r.request_id for r in scheduler.requests.values() if r.num_preemptions]
    assert victim == {"fcfs": "third", "priority": "first", "sjf": "first"}[policy]


@pytest.mark.parametrize("policy", POLICIES)
def test_nobody_is_overtaken_more_often_than_the_policy_allows(policy: str) -> None:
    """Adversarial arrivals: a few unattractive requests, and a stream of attractive ones."""
    needs_cache = component("policy", policy).needs_prefix_cache
    choice = Choice(
        policy=policy,
        prefix_cache="radix" if needs_cache else "none",
        eviction="lru" if needs_cache else "none",
        max_num_seqs=2,
        max_model_len=64,
        pool_tokens=256,
        settings={"kv_cache": {"block_size": 4}},
    )
    scheduler = make_scheduler(choice)
    bound = 5
    scheduler.parts.policy.max_overtakes = bound
    if policy == "priority":
        assert scheduler.parts.policy.config.requests_per_level > 3 * bound
    runner = FakeRunner(scheduler)
    runner.eos_rate = 0.0
    rng = random.Random(0)
    shared = [7] * 24
    unattractive = [f"u{i}" for i in range(3)]
    started: list[str] = []

    def arrive(name: str) -> None:
        is_dull = name in unattractive
        own = rng.choices(range(10, 90), k=30 if is_dull else 1)
        scheduler.add(
            make_request(
                name,
                prompt=own if is_dull else [*shared, *own],
                max_tokens=30 if is_dull else 1,
                ignore_eos=True,
                priority=-5 if is_dull else 5,
            )
        )

    arrive("opener")  # so that the stream's prefix is cached
    runner.step()
    for name in unattractive:
        arrive(name)
    for index in range(80):
        arrive(f"a{index}")
        arrive(f"b{index}")
        plan, _ = runner.step()
        started += [new.request_id for new in plan.new_requests] if plan else []
    for ahead, name in enumerate(unattractive):
        assert name in started, f"{name} starved"
        assert started.index(name) <= (ahead + 1) * (bound + 1)
    overtakes = scheduler.parts.policy.counters()["overtakes"]
    orders_by_arrival = policy in ("fcfs", "decode_first")
    assert (overtakes == 0) == orders_by_arrival


def test_a_request_that_was_preempted_often_is_left_alone() -> None:
    """Requests of higher priority come one after the other, and each would take its room."""
    choice = Choice(
        policy="priority",
        admission="optimistic",
        max_num_seqs=2,
        max_model_len=64,
        pool_tokens=48,
        settings={"kv_cache": {"block_size": 4}, "admission": {"headroom_tokens": 0}},
    )
    scheduler = make_scheduler(choice)
    scheduler.parts.policy.max_preemptions = limit = 3
    runner = FakeRunner(scheduler)
    runner.eos_rate = 0.0
    low = make_request("low", prompt_len=20, max_tokens=28, ignore_eos=True, priority=-9)
    scheduler.add(low)
    for index in range(400):
        if low.is_finished:
            break
        if "low" in scheduler.running and len(scheduler.requests) == 1:
            scheduler.add(
                make_request(
                    f"high{index}",
                    prompt=[index % 90 + 3] * 12,
                    max_tokens=30,
                    ignore_eos=True,
                    priority=9,
                )
            )
        runner.step()
    assert low.is_finished
    assert low.num_preemptions == limit
    assert low.is_overdue


# -- where parts meet -----------------------------------------------------------------------------


def test_drafts_go_before_anybody_is_preempted() -> None:
    choice = Choice(
        admission="optimistic",
        max_num_seqs=2,
        max_model_len=64,
        pool_tokens=16,
        settings={"kv_cache": {"block_size": 4}, "admission": {"headroom_tokens": 0}},
    )
    scheduler = make_scheduler(choice)
    runner = FakeRunner(scheduler, max_drafts=0)
    runner.eos_rate = 0.0
    for name in ("a", "b"):
        scheduler.add(make_request(name, prompt_len=5, max_tokens=9, ignore_eos=True))
    runner.step()  # 2 blocks each: the pool is full, with room for 3 tokens in each
    for name in ("a", "b"):
        request = scheduler.requests[name]
        scheduler._running.take_drafts(request, [5] * 6, scheduler._step)
        runner.rows[name].drafts = [5] * 6
    plan, _ = runner.step()
    assert plan is not None
    assert plan.num_draft_tokens == [0, 0]
    assert scheduler.counters()["preemptions"] == 0


def test_a_stop_inside_accepted_drafts_publishes_only_what_is_known() -> None:
    """The KV of drafts past the end is written, but the request has no such tokens."""
    choice = Choice(
        prefix_cache="radix",
        eviction="lru",
        max_model_len=64,
        pool_tokens=64,
        settings={"kv_cache": {"block_size": 1}},
    )
    scheduler = make_scheduler(choice)
    scheduler.add(make_request("r", prompt_len=4, max_tokens=20))
    runner = FakeRunner(scheduler)
    runner.eos_rate = 0.0
    runner.step()
    request = scheduler.requests["r"]
    eos = next(iter(request.eos_token_ids))
    scheduler._running.take_drafts(request, [5, eos, 6, 7], scheduler._step)
    runner.rows["r"].drafts = [5, eos, 6, 7]
    runner.rng = _AcceptAll()  # type: ignore[assignment]
    runner.step()
    assert request.finish_reason is FinishReason.STOP
    assert request.output_token_ids[1:] == [5, eos]
    assert scheduler.parts.prefix_cache.num_blocks == request.num_tokens
    scheduler.check_integrity()


class _AcceptAll(random.Random):
    def randint(self, a: int, b: int) -> int:
        return b


@pytest.mark.parametrize("cache", CACHES)
def test_pieces_of_a_prompt_are_of_use_before_its_end(cache: str) -> None:
    choice = Choice(
        prefill="chunked",
        prefix_cache=cache,
        eviction="lru",
        max_num_seqs=2,
        max_model_len=64,
        pool_tokens=128,
        settings={"kv_cache": {"block_size": 4}, "prefill": {"chunk_tokens": 8}},
    )
    scheduler = make_scheduler(choice)
    runner = FakeRunner(scheduler)
    prompt = list(range(3, 43))
    scheduler.add(make_request("first", prompt=prompt))
    runner.step()
    runner.step()
    scheduler.add(make_request("second", prompt=prompt))
    assert scheduler.requests["first"].num_computed_tokens == 16
    assert scheduler.space.find(scheduler.requests["second"]).num_tokens == 16


def test_a_lone_request_that_must_give_way_starts_again_at_once() -> None:
    """It may hold blocks twice, its own and the cache's of the same tokens; giving way frees one
    of them. A step without anybody would look as if nothing could run."""
    scheduler = make_scheduler(
        Choice(admission="optimistic", settings={"kv_cache": {"block_size": 1}})
    )
    runner = FakeRunner(scheduler)
    scheduler.add(make_request("r", max_tokens=9, ignore_eos=True))
    runner.step()
    grow, refusals = scheduler.space.grow, iter([None])
    scheduler.space.grow = lambda *args: next(refusals, grow(*args))  # type: ignore[method-assign]
    plan, _ = runner.step()
    assert plan is not None
    assert plan.finished_request_ids == ["r"]
    assert [new.num_computed_tokens for new in plan.new_requests] == [0]
    assert scheduler.counters()["preemptions"] == 1


def test_the_next_starts_as_soon_as_a_head_without_room_is_aborted() -> None:
    scheduler = make_scheduler(Choice(max_num_seqs=3, max_model_len=64, pool_tokens=64))
    runner = FakeRunner(scheduler)
    runner.eos_rate = 0.0
    scheduler.add(make_request("runs", max_tokens=40, ignore_eos=True))
    scheduler.add(make_request("too big for now", prompt_len=40, max_tokens=20))
    scheduler.add(make_request("small", max_tokens=4))
    for _ in range(5):
        runner.step()
    assert list(scheduler.running) == ["runs"], "somebody passed the head of the queue"
    scheduler.finish("too big for now", FinishReason.ABORT)
    runner.step()
    assert list(scheduler.running) == ["runs", "small"]


@pytest.mark.parametrize("admission", ["reserve_full", "optimistic"])
@pytest.mark.parametrize("cache", CACHES)
def test_shared_tokens_overcommit_nothing(cache: str, admission: str) -> None:
    """Summed by request they may come to more than the pool, though all of it is promised."""
    choice = Choice(
        prefix_cache=cache,
        eviction="lru",
        admission=admission,
        max_num_seqs=8,
        max_model_len=64,
        pool_tokens=96,
        settings={"kv_cache": {"block_size": 4}},
    )
    scheduler = make_scheduler(choice)
    runner = FakeRunner(scheduler)
    runner.eos_rate = 0.0
    stem = list(range(3, 35))
    scheduler.add(make_request("first", prompt=stem, max_tokens=24, ignore_eos=True))
    runner.step()
    for index in range(7):
        prompt = [*stem, 40 + index]
        max_tokens = 7 if admission == "reserve_full" else 30
        scheduler.add(make_request(f"r{index}", prompt=prompt, max_tokens=max_tokens))
    possible = 0
    while scheduler.has_unfinished():
        runner.step()
        possible = max(possible, sum(r.max_total_tokens for r in scheduler.running.values()))
    assert possible > 1.5 * choice.pool_tokens
    assert (scheduler.counters()["overcommitted_starts"] > 0) == (admission == "optimistic")


@pytest.mark.parametrize("cache", CACHES)
def test_a_start_that_is_repeated_after_a_failed_step_is_cached_once(cache: str) -> None:
    """What a request computed itself, and finds again after a step that failed, is no hit."""
    choice = Choice(
        prefix_cache=cache,
        eviction="lru",
        max_model_len=64,
        pool_tokens=128,
        settings={"kv_cache": {"block_size": 4}, "prefix_cache": {"share_in_flight": False}},
    )
    scheduler = make_scheduler(choice)
    runner = FakeRunner(scheduler)
    runner.eos_rate = 0.0
    prompt = list(range(3, 20))
    scheduler.add(make_request("first", prompt=prompt, max_tokens=2, ignore_eos=True))
    while scheduler.has_unfinished():
        runner.step()
    request = make_request("r", prompt=[*prompt[:8], *range(30, 39)], max_tokens=9, ignore_eos=True)
    scheduler.add(request)
    counted = 0
    for fail in ("before", None, "during", None, "before", None):
        plan, _ = runner.step(fail)
        counted += plan.num_cached_tokens if plan is not None else 0
    assert scheduler.space.find(request).num_tokens == 16, "it finds its own"
    assert request.num_cached_tokens == counted == 8


def test_swaps_that_the_host_has_no_room_for_are_counted() -> None:
    choice = memory_choice(
        "fcfs", ("optimistic", "swap"), "whole_prompt", ("paged", 4, "none", "host")
    )
    assert choice is not None
    choice.settings["kv_offload"]["num_blocks"] = 1
    traffic = Traffic(make_scheduler(choice), 1, 0)
    for index in range(40):
        traffic.arrive(make_request(f"r{index}", prompt_len=9, max_tokens=20, ignore_eos=True))
    traffic.drain()
    counters = traffic.scheduler.counters()
    assert counters["swaps_out"] == counters["swaps_in"] == 0
    assert counters["swaps_refused"] == counters["preemptions"] > 0


def test_a_failed_step_is_no_preemption() -> None:
    scheduler = make_scheduler(Choice())
    runner = FakeRunner(scheduler)
    for name in "ab":
        scheduler.add(make_request(name, ignore_eos=True))
    runner.step()
    runner.step("during")
    assert not scheduler.running
    assert len(scheduler.waiting) == 2
    assert scheduler.counters()["preemptions"] == 0
    assert [r.num_preemptions for r in scheduler.requests.values()] == [0, 0]
    plan, _ = runner.step()
    assert plan is not None
    assert plan.request_ids == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"headroom_tokens": -1}, "headroom_tokens=-1 must be 0 or more"),
        ({"preemption": "discard"}, r"'discard'.*recompute, swap"),
        ({"preemption": "swap"}, "needs a host tier.*engine/kv_offload=host"),
    ],
)
def test_admission_that_cannot_work_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_scheduler(Choice(admission="optimistic", settings={"admission": settings}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_offload": "host"}, "nothing to hold.*engine/prefix_cache=block_hash"),
        ({"kv_offload": "host", "admission": "optimistic"}, "preemption=swap, or engine/kv_off"),
        *(
            ({"eviction": name}, "orders a prefix cache, and there is none.*engine/eviction=none")
            for name in options_of("engine/eviction")
            if name != "none"
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_scheduler(Choice(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        ("lpm", {}, "engine/prefix_cache=radix"),
        ("lpm", {"window": 1}, "window=1 must be 2 or more"),
        ("priority", {"requests_per_level": 0}, "requests_per_level=0 must be 1 or more"),
        ("decode_first", {"steps_between_prompts": -1}, "steps_between_prompts=-1 must be 0"),
    ],
)
def test_policy_that_cannot_work_is_refused(
    policy: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_scheduler(Choice(policy=policy, settings={"policy": settings}))
