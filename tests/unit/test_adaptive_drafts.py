"""The controller against a simulated machine: near the best fixed length, never far below none."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from techniques.adaptive_drafts import Adaptive, AdaptiveConfig
from techniques.adaptive_drafts.costs import Acceptance, StepCosts, bucket_of, interpolate
from tests.helpers.engines import check_idle, tiny_engine
from tests.helpers.tiny_models import hf_greedy, tiny_model
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.slots.draft_length import VerifiedStep

NUM_DRAFTS = 6
NUM_STEPS = 3000
#: Steps in which the controller may still learn, where it is held against the best fixed length.
LEARNING = 600


def roofline(num_requests: int, num_drafts: int) -> float:
    """A GPU: weights are read once a step; many tokens take longer than that; drafting costs."""
    tokens = num_requests + num_drafts
    drafting = 0.3e-3 + 0.02e-3 * num_drafts / num_requests if num_drafts else 0.0
    return 0.4e-3 + max(6e-3, 0.05e-3 * tokens) + 1e-6 * tokens + drafting


def linear(num_requests: int, num_drafts: int) -> float:
    """A CPU: every token costs a good part of a step."""
    return 8e-3 + 2.5e-3 * (num_requests + num_drafts)


def eager(num_requests: int, num_drafts: int) -> float:
    """Steps with drafts are launched one op at a time, those without as one graph."""
    return roofline(num_requests, num_drafts) + (4e-3 if num_drafts else 0.0)


MACHINES: dict[str, Callable[[int, int], float]] = {
    "roofline": roofline,
    "linear": linear,
    "eager": eager,
}


@dataclass
class Machine:
    """Steps of requests whose drafts hold with one probability, drafted with another."""

    cost: Callable[[int, int], float]
    accepts: float
    drafts: float = 1.0
    noise: float = 0.04
    seed: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def step(self, num_requests: int, length: int) -> VerifiedStep:
        drafts = [length if self.rng.random() < self.drafts else 0 for _ in range(num_requests)]
        accepted = []
        for count in drafts:
            held = 0
            while held < count and self.rng.random() < self.accepts:
                held += 1
            accepted.append(held)
        seconds = self.cost(num_requests, sum(drafts)) * self.rng.gauss(1.0, self.noise)
        if self.rng.random() < 0.005:
            seconds *= 10  # something held it up
        return VerifiedStep(drafts, accepted, length, seconds)

    def true_seconds(self, step: VerifiedStep) -> float:
        return self.cost(len(step.num_drafts), sum(step.num_drafts))


def run(
    controller: Adaptive, machine: Machine, loads: list[int]
) -> tuple[float, float, list[float], list[float]]:
    """Seconds with the controller, seconds without drafts for the same tokens; both by step."""
    with_drafts, without = [], []
    for num_requests in loads:
        step = machine.step(num_requests, controller.choose(num_requests))
        controller.observe(step)
        tokens = num_requests + sum(step.num_accepted)
        with_drafts.append(machine.true_seconds(step))
        without.append(machine.cost(num_requests, 0) * tokens / num_requests)
    return sum(with_drafts), sum(without), with_drafts, without


def fixed_speed(machine: Machine, num_requests: int, length: int) -> float:
    """Tokens a second over those without drafts, of one fixed length."""
    other = Machine(machine.cost, machine.accepts, machine.drafts, 0.0, seed=99)
    seconds = tokens = 0.0
    for _ in range(max(60, 6000 // num_requests)):
        step = other.step(num_requests, length)
        seconds += other.true_seconds(step)
        tokens += num_requests + sum(step.num_accepted)
    return tokens / seconds * machine.cost(num_requests, 0) / num_requests


@pytest.mark.parametrize("accepts", [0.0, 0.3, 0.6, 0.85])
@pytest.mark.parametrize("num_requests", [1, 4, 16, 64, 256])
@pytest.mark.parametrize("name", MACHINES)
def test_near_the_best_fixed_length_and_never_far_below_none(
    name: str, num_requests: int, accepts: float
) -> None:
    machine = Machine(MACHINES[name], accepts)
    controller = Adaptive(num_lookahead_tokens=NUM_DRAFTS)
    num_steps = NUM_STEPS if num_requests < 64 else NUM_STEPS // 2
    spent, plain, by_step, plain_by_step = run(controller, machine, [num_requests] * num_steps)
    assert plain / spent >= 0.97
    best = max(fixed_speed(machine, num_requests, k) for k in range(NUM_DRAFTS + 1))
    speed = sum(plain_by_step[LEARNING:]) / sum(by_step[LEARNING:])
    assert speed >= 0.95 * best


@pytest.mark.parametrize("num_requests", [1, 8])
@pytest.mark.parametrize("name", MACHINES)
def test_where_only_some_steps_find_drafts(name: str, num_requests: int) -> None:
    machine = Machine(MACHINES[name], 0.7, drafts=0.3)
    spent, plain, by_step, plain_by_step = run(
        Adaptive(num_lookahead_tokens=NUM_DRAFTS), machine, [num_requests] * NUM_STEPS
    )
    assert plain / spent >= 0.97
    best = max(fixed_speed(machine, num_requests, k) for k in range(NUM_DRAFTS + 1))
    assert sum(plain_by_step[LEARNING:]) / sum(by_step[LEARNING:]) >= 0.95 * best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("accepts", [0.2, 0.75])
def test_a_load_that_comes_and_goes(name: str, accepts: float, seed: int) -> None:
    rng = random.Random(seed)
    loads, now = [], 1
    while len(loads) < NUM_STEPS:
        if rng.random() < 0.02:
            now = rng.choice([1, 2, 8, 30, 120, 250])
        now = min(256, max(1, now + rng.choice([-1, 0, 0, 1])))
        loads.append(now)
    spent, plain, _, _ = run(
        Adaptive(num_lookahead_tokens=NUM_DRAFTS),
        Machine(MACHINES[name], accepts, seed=seed),
        loads,
    )
    assert plain / spent >= 0.97


def test_texts_that_change_are_followed() -> None:
    """What is worth it at first is not later, and the other way round."""
    controller = Adaptive(num_lookahead_tokens=NUM_DRAFTS)
    speeds = []
    for accepts in (0.85, 0.0, 0.85):
        _, _, spent, plain = run(controller, Machine(eager, accepts), [4] * 1500)
        speeds.append(sum(plain[-500:]) / sum(spent[-500:]))
    best = max(fixed_speed(Machine(eager, 0.85), 4, k) for k in range(NUM_DRAFTS + 1))
    assert speeds[0] >= 0.95 * best
    assert speeds[1] >= 0.97
    assert speeds[2] >= 0.95 * best


def test_the_bound_can_fail() -> None:
    """A controller that always drafts loses far more than the bound at a high load."""

    class Always(Adaptive):
        def choose(self, num_requests: int) -> int:
            return NUM_DRAFTS

    spent, plain, _, _ = run(
        Always(num_lookahead_tokens=NUM_DRAFTS), Machine(roofline, 0.3), [256] * 300
    )
    assert plain / spent < 0.5


def test_trials_stay_rare_where_drafts_never_pay() -> None:
    controller = Adaptive(num_lookahead_tokens=NUM_DRAFTS)
    run(controller, Machine(roofline, 0.0), [1] * NUM_STEPS)
    counters = controller.counters()
    assert counters["decided_steps"] == NUM_STEPS
    assert counters["trials"] >= 4
    assert counters["steps_off"] >= 0.95 * NUM_STEPS
    controller.reset_counters()
    assert sum(controller.counters().values()) == 0


def test_costs_are_interpolated_and_borrowed_from_the_nearest_load() -> None:
    costs = StepCosts()
    assert costs.curve(4) is None and costs.plain(4) is None
    for seconds in (1.0, 1.1, 9.0):
        costs.add(4, 0, seconds)
    costs.add(4, 16, 2.2)
    assert costs.plain(4) == pytest.approx(1.1)
    curve = costs.curve(5)
    assert curve is not None
    assert [interpolate(curve, d) for d in (0, 2, 4, 8)] == pytest.approx([1.0, 1.5, 2.0, 3.0])
    assert costs.plain(5) is None
    buckets = [bucket_of(n) for n in range(1, 300)]
    assert buckets == sorted(buckets) and len(set(buckets)) < 60


def test_acceptance_by_position() -> None:
    acceptance = Acceptance(3)
    for _ in range(400):
        acceptance.add([2, 2, 0, 0], [2, 0, 0, 0], 2)
    (d0, t0), (d1, t1), (d2, t2), (d3, _) = acceptance.expected()
    assert (d0, t0) == (0.0, 1.0)
    assert (d1, t1) == pytest.approx((0.5, 1.25), abs=0.02)
    assert (d2, t2) == pytest.approx((1.0, 1.5), abs=0.04)
    assert d3 == pytest.approx(1.5, abs=0.05), "like the position before it"


def test_in_an_engine_the_tokens_stay_and_steps_are_told() -> None:
    prompts = [[9, 9, 9], [80] * 12, [40, 41, 42] * 6]
    engine = tiny_engine(
        "engine.drafter.min_ngram=1",
        "engine.draft_length.allowance=1000",
        "engine.draft_length.max_gap_steps=1",
        techniques=("spec_decode", "adaptive_drafts"),
    )
    told: list[VerifiedStep] = []
    controller = engine.parts.components["draft_length"]
    assert isinstance(controller, Adaptive)
    observe = controller.observe
    controller.observe = lambda step: (told.append(step), observe(step))[1]  # type: ignore[method-assign,func-returns-value]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=60, ignore_eos=True))
    folder = tiny_model("llama")
    assert [o.token_ids for o in outputs] == [hf_greedy(folder, p, 60) for p in prompts]
    steps = list(engine.steps)
    assert len(told) == len(steps)
    for step, record in zip(told, steps, strict=True):
        assert sum(step.num_drafts) == record.num_draft_tokens
        assert sum(step.num_accepted) == record.num_accepted_tokens
        assert max(step.num_drafts) <= step.num_allowed
        assert (step.seconds is None) == (record.num_prompt_tokens > 0 or record is steps[0])
    counters = engine.counters()
    assert counters["draft_length.decided_steps"] == len(steps)
    assert counters["verifier.accepted_tokens"] > 0
    between = [s.seconds for s in told if s.seconds is not None]
    assert sum(between) < 1e-6 * sum(s.host_us + s.device_us for s in steps) * 3
    check_idle(engine)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("engine/draft_length=adaptive",), ["engine/drafter", "engine/draft_length=full"]),
        (("engine.draft_length.max_loss=0.0",), ["max_loss=0.0", "at most 1"]),
        (("engine.draft_length.max_gap_steps=0",), ["max_gap_steps=0", "1 or more"]),
    ],
)
def test_what_is_impossible_is_named(overrides: tuple[str, ...], words: list[str]) -> None:
    techniques = () if "engine/draft_length=adaptive" in overrides else ("adaptive_drafts",)
    with pytest.raises(ConfigError) as raised:
        tiny_engine(*overrides, techniques=[*(("spec_decode",) if techniques else ()), *techniques])
    assert all(word in str(raised.value) for word in words), raised.value


def test_options_are_those_of_the_config() -> None:
    assert AdaptiveConfig().max_loss == 0.02
