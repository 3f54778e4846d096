"""Contract of slot ``sampler``: greedy, truncation, distribution, seeds, penalties, logprobs.

The distribution test bounds the total variation distance ``d`` between the expected distribution
and ``n`` draws: ``E[d] <= sum(sqrt(p (1 - p) / n)) / 2``, and by McDiarmid's inequality
``P(d > E[d] + t) <= exp(-2 n t^2)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.engines import component
from workbench.configuration import options_of
from workbench.core.sampling import SamplingParams
from workbench.slots.sampler import Sampler, SamplerOutput, SamplingMetadata

OPTIONS = options_of("engine/sampler")
VOCAB = 40
#: Chance of a false alarm of one distribution test.
FALSE_ALARM = 1e-9

every_sampler = pytest.mark.parametrize("option", OPTIONS)


class OnGpu(Sampler):
    """A sampler of a GPU, called with tensors of the CPU."""

    def __init__(self, wrapped: Sampler) -> None:
        super().__init__()
        self.wrapped = wrapped

    def sample(self, logits: torch.Tensor, meta: SamplingMetadata) -> SamplerOutput:
        moved = dataclasses.replace(
            meta,
            positions=meta.positions.cuda(),
            seeds=meta.seeds.cuda(),
            contexts=[c.cuda() for c in meta.contexts],
        )
        output = self.wrapped.sample(logits.cuda(), moved)
        return SamplerOutput(output.token_ids.cpu(), output.logprobs)


def sampler_of(option: str) -> Sampler:
    """An option, where this machine can run it; ``tests/kernels`` has kernels interpreted."""
    sampler: Sampler = component("sampler", option)
    if not sampler.unsupported_reasons(torch.device("cpu"), torch.float32):
        return sampler
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reasons = sampler.unsupported_reasons(device, torch.float32)
    if reasons:
        pytest.skip("; ".join(reasons))
    return OnGpu(sampler)


def metadata(
    params: Sequence[SamplingParams],
    positions: Sequence[int] | torch.Tensor | None = None,
    contexts: Sequence[Sequence[int]] = (),
    num_prompt_tokens: Sequence[int] = (),
) -> SamplingMetadata:
    if positions is None:
        positions = range(len(params))
    return SamplingMetadata(
        params=list(params),
        positions=torch.as_tensor(list(positions), dtype=torch.int64),
        seeds=torch.tensor([p.seed or 0 for p in params], dtype=torch.int64),
        all_greedy=all(p.is_greedy for p in params),
        any_penalties=any(p.has_penalties for p in params),
        any_logprobs=any(p.logprobs is not None for p in params),
        contexts=[torch.tensor(c, dtype=torch.int64) for c in contexts],
        num_prompt_tokens=list(num_prompt_tokens),
    )


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB, generator=generator) * scale


def expected_probs(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """The distribution asked for, in plain numpy: temperature, top-k, top-p, min-p."""
    scaled = logits.astype(np.float64) / p.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    keep = np.ones(len(probs), dtype=bool)
    if p.top_k:
        keep[order[p.top_k :]] = False
    probs = np.where(keep, probs, 0.0)
    probs /= probs.sum()
    total, kept = 0.0, []
    for token in order:
        if total >= p.top_p:
            break
        kept.append(token)
        total += probs[token]
    nucleus = np.zeros_like(probs)
    nucleus[kept] = probs[kept]
    nucleus[nucleus < p.min_p * nucleus.max()] = 0.0
    result: np.ndarray = nucleus / nucleus.sum()
    return result


def tv_distance(draws: np.ndarray, probs: np.ndarray) -> float:
    frequencies = np.bincount(draws, minlength=len(probs)) / len(draws)
    return float(np.abs(frequencies - probs).sum() / 2)


def tv_bound(probs: np.ndarray, num_draws: int) -> float:
    mean = np.sqrt(probs * (1 - probs) / num_draws).sum() / 2
    return float(mean + math.sqrt(math.log(1 / FALSE_ALARM) / (2 * num_draws)))


def is_off(draws: np.ndarray, probs: np.ndarray) -> bool:
    """Whether draws do not follow a distribution: outside its support, or too far from it."""
    outside = bool((probs[draws] == 0).any())
    return outside or tv_distance(draws, probs) > tv_bound(probs, len(draws))


def draw_many(
    sampler: Sampler, line: torch.Tensor, params: SamplingParams, num_draws: int, vary: str
) -> np.ndarray:
    """Draws of one row of logits, over positions of one seed or over seeds at one position."""
    if vary == "positions":
        meta = metadata([params] * num_draws)
    else:
        each = [dataclasses.replace(params, seed=s) for s in range(num_draws)]
        meta = metadata(each, positions=[7] * num_draws)
    return sampler.sample(line.expand(num_draws, -1).clone(), meta).token_ids.numpy()


DISTRIBUTIONS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=3.0),
    SamplingParams(temperature=1.0, top_k=3),
    SamplingParams(temperature=2.0, top_k=1),
    SamplingParams(temperature=1.0, top_k=10 * VOCAB),
    SamplingParams(temperature=1.5, top_p=0.6),
    SamplingParams(temperature=1.5, top_p=1e-6),
    SamplingParams(temperature=2.0, min_p=0.1),
    SamplingParams(temperature=2.0, min_p=1.0),
    SamplingParams(temperature=2.0, top_k=8, top_p=0.8, min_p=0.05),
]


@every_sampler
@pytest.mark.parametrize("params", DISTRIBUTIONS, ids=lambda p: repr(p).partition("temp")[2][:60])
@pytest.mark.parametrize("vary", ["positions", "seeds"])
def test_draws_follow_the_distribution(option: str, params: SamplingParams, vary: str) -> None:
    sampler = sampler_of(option)
    (line,) = random_logits(1, seed=3)
    probs = expected_probs(line.numpy(), params)
    draws = draw_many(sampler, line, dataclasses.replace(params, seed=5), 20_000, vary)
    assert not is_off(draws, probs)


class TooWarm(Sampler):
    """Deliberately wrong: draws at 1.25 times the temperature."""

    def __init__(self, right: Sampler) -> None:
        super().__init__()
        self.right = right

    def sample(self, logits: torch.Tensor, meta: SamplingMetadata) -> SamplerOutput:
        meta.params = [
            dataclasses.replace(p, temperature=1.25 * p.temperature) for p in meta.params
        ]
        return self.right.sample(logits, meta)


class OneTooMany(TooWarm):
    """Deliberately wrong: keeps one token more than the nucleus."""

    def sample(self, logits: torch.Tensor, meta: SamplingMetadata) -> SamplerOutput:
        (line,) = logits[:1].numpy()
        kept = int((expected_probs(line, meta.params[0]) > 0).sum())
        meta.params = [dataclasses.replace(p, top_p=1.0, top_k=kept + 1) for p in meta.params]
        return self.right.sample(logits, meta)


class Repeats(TooWarm):
    """Deliberately wrong: the draw ignores the position."""

    def sample(self, logits: torch.Tensor, meta: SamplingMetadata) -> SamplerOutput:
        meta.positions = meta.positions * 0
        return self.right.sample(logits, meta)


@every_sampler
@pytest.mark.parametrize("wrong", [TooWarm, OneTooMany, Repeats])
def test_distribution_test_catches_a_wrong_sampler(option: str, wrong: type[TooWarm]) -> None:
    params = SamplingParams(temperature=2.0, top_p=0.9, seed=5)
    (line,) = random_logits(1, seed=3)
    probs = expected_probs(line.numpy(), params)
    sampler = wrong(sampler_of(option))
    assert is_off(draw_many(sampler, line, params, 20_000, "positions"), probs)


@every_sampler
def test_neighbouring_seeds_and_positions_are_independent(option: str) -> None:
    """Pairs of draws that differ by one in seed or position follow the product distribution."""
    sampler = sampler_of(option)
    count, width = 20_000, 4
    line = torch.zeros(width)
    probs = np.full(width * width, 1 / (width * width))
    by_position = draw_many(sampler, line, SamplingParams(temperature=1.0), count + 1, "positions")
    by_seed = draw_many(sampler, line, SamplingParams(temperature=1.0), count + 1, "seeds")
    for draws in (by_position, by_seed):
        for lag in (1, 2):
            pairs = draws[:-lag] * width + draws[lag:]
            assert not is_off(pairs, probs)


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_is_the_argmax_and_ties_go_to_the_lowest_id(option: str, dtype: torch.dtype) -> None:
    sampler = sampler_of(option)
    logits = random_logits(16).to(dtype)
    logits[3] = 0.0
    logits[4, [9, 30]] = 50.0
    expected = logits.float().argmax(-1)
    expected[3], expected[4] = 0, 9
    plain = sampler.sample(logits.clone(), metadata([SamplingParams()] * 16)).token_ids
    assert plain.dtype == torch.int64
    assert torch.equal(plain, expected)
    # Greedy rows beside drawn ones, and without per-row parameters, as the runner sends them.
    mixed = [SamplingParams(temperature=float(i % 2), seed=i) for i in range(16)]
    beside = sampler.sample(logits.clone(), metadata(mixed)).token_ids
    assert torch.equal(beside[::2], expected[::2])
    nothing = torch.empty(0, dtype=torch.int64)
    bare = sampler.sample(logits.clone(), SamplingMetadata([], nothing, nothing)).token_ids
    assert torch.equal(bare, expected)


@every_sampler
def test_seed_fixes_the_draw_whatever_the_batch(option: str) -> None:
    sampler = sampler_of(option)
    logits = random_logits(24)
    params = [
        SamplingParams(
            temperature=0.5 + i / 8,
            top_k=[0, 5, 12][i % 3],
            top_p=[1.0, 0.7][i % 2],
            min_p=[0.0, 0.0, 0.0, 0.02][i % 4],
            seed=100 + i,
        )
        for i in range(24)
    ]
    positions = [3 * i for i in range(24)]
    together = sampler.sample(logits.clone(), metadata(params, positions)).token_ids.tolist()
    alone = [
        int(
            sampler.sample(
                logits[i : i + 1].clone(), metadata([params[i]], [positions[i]])
            ).token_ids
        )
        for i in range(24)
    ]
    order = list(reversed(range(24)))
    reordered = sampler.sample(
        logits[order].clone(), metadata([params[i] for i in order], [positions[i] for i in order])
    ).token_ids.tolist()
    assert together == alone
    assert together == reordered[::-1]
    other = [dataclasses.replace(p, seed=(p.seed or 0) + 1000) for p in params]
    assert together != sampler.sample(logits.clone(), metadata(other, positions)).token_ids.tolist()


@every_sampler
@pytest.mark.parametrize("seed", [0, 1, 2**62, 2**63 - 1])
def test_any_seed_is_legal(option: str, seed: int) -> None:
    sampler = sampler_of(option)
    probs = expected_probs(random_logits(1)[0].numpy(), SamplingParams(temperature=1.0))
    params = SamplingParams(temperature=1.0, seed=seed)
    assert not is_off(draw_many(sampler, random_logits(1)[0], params, 5000, "positions"), probs)


@every_sampler
@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-6, 1e30])
def test_extreme_temperatures_stay_in_the_distribution(option: str, temperature: float) -> None:
    sampler = sampler_of(option)
    logits = random_logits(32, scale=30.0)
    drawn = sampler.sample(
        logits.clone(), metadata([SamplingParams(temperature=temperature, seed=1)] * 32)
    ).token_ids
    assert bool(((drawn >= 0) & (drawn < VOCAB)).all())
    if temperature < 1e-3:
        assert torch.equal(drawn, logits.argmax(-1)), "cold draws are greedy"
    else:
        assert len(set(drawn.tolist())) > 8, "hot draws spread"


@every_sampler
def test_forbidden_tokens_are_never_drawn(option: str) -> None:
    sampler = sampler_of(option)
    logits = torch.full((64, VOCAB), -torch.inf)
    logits[:, [7, 11]] = 1.0
    drawn = sampler.sample(
        logits, metadata([SamplingParams(temperature=5.0, top_p=0.99, seed=2)] * 64)
    ).token_ids
    assert set(drawn.tolist()) == {7, 11}


def numpy_penalties(
    line: np.ndarray, p: SamplingParams, context: Sequence[int], num_prompt: int
) -> np.ndarray:
    out = line.astype(np.float64).copy()
    for token in set(context):
        out[token] = (
            out[token] * p.repetition_penalty
            if out[token] < 0
            else out[token] / p.repetition_penalty
        )
    for token in set(context[num_prompt:]):
        count = list(context[num_prompt:]).count(token)
        out[token] -= p.presence_penalty + p.frequency_penalty * count
    return out


PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8},
    {"frequency_penalty": -0.8},
    {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.4},
]


@every_sampler
@pytest.mark.parametrize("fields", PENALTIES, ids=lambda f: ",".join(f))
def test_penalties(option: str, fields: dict[str, Any]) -> None:
    sampler = sampler_of(option)
    rng = np.random.default_rng(0)
    rows = 32
    logits = random_logits(rows, scale=1.0)
    lengths = [int(rng.integers(1, 30)) for _ in range(rows)]
    contexts = [rng.integers(0, VOCAB, n).tolist() for n in lengths]
    prompts = [int(rng.integers(1, n + 1)) for n in lengths]
    params = [SamplingParams(**fields) if i % 4 else SamplingParams() for i in range(rows)]
    expected = [
        int(numpy_penalties(logits[i].numpy(), params[i], contexts[i], prompts[i]).argmax())
        for i in range(rows)
    ]
    meta = metadata(params, contexts=contexts, num_prompt_tokens=prompts)
    assert sampler.sample(logits.clone(), meta).token_ids.tolist() == expected
    assert expected != logits.argmax(-1).tolist(), "the penalty changed nothing"


@every_sampler
def test_repetition_penalty_is_transformers_own(option: str) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    sampler = sampler_of(option)
    logits = random_logits(16, scale=1.0)
    contexts = [[(7 * i + j) % VOCAB for j in range(6)] for i in range(16)]
    oracle = RepetitionPenaltyLogitsProcessor(penalty=1.7)(torch.tensor(contexts), logits.clone())
    params = [SamplingParams(repetition_penalty=1.7)] * 16
    meta = metadata(params, contexts=contexts, num_prompt_tokens=[3] * 16)
    assert torch.equal(sampler.sample(logits.clone(), meta).token_ids, oracle.argmax(-1))


@every_sampler
def test_penalties_shape_the_drawn_distribution(option: str) -> None:
    sampler = sampler_of(option)
    (line,) = random_logits(1, scale=1.0)
    params = SamplingParams(temperature=1.0, presence_penalty=2.0, repetition_penalty=1.5, seed=1)
    likely = line.argsort(descending=True)[:8].tolist()
    context = [*likely, *likely[:3]]
    penalised = numpy_penalties(line.numpy(), params, context, 2)
    probs = expected_probs(penalised, params)
    count = 5000
    meta = metadata([params] * count, contexts=[context] * count, num_prompt_tokens=[2] * count)
    draws = sampler.sample(line.expand(count, -1).clone(), meta).token_ids.numpy()
    assert not is_off(draws, probs)
    assert is_off(draws, expected_probs(line.numpy(), params))


@every_sampler
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_logprobs_are_those_of_the_raw_distribution(option: str, temperature: float) -> None:
    sampler = sampler_of(option)
    logits = random_logits(12, scale=2.0)
    wanted = [None, 0, 1, 5, 3 * VOCAB] * 2 + [2, 2]
    params = [
        SamplingParams(temperature=temperature, logprobs=k, seed=i, frequency_penalty=0.5)
        for i, k in enumerate(wanted)
    ]
    contexts = [[i % VOCAB, 3, 3] for i in range(12)]
    meta = metadata(params, contexts=contexts, num_prompt_tokens=[1] * 12)
    output = sampler.sample(logits.clone(), meta)
    assert output.logprobs is not None
    raw = torch.log_softmax(logits.double(), dim=-1)
    for i, k in enumerate(wanted):
        entry = output.logprobs[i]
        if k is None:
            assert entry is None
            continue
        assert entry is not None
        assert entry.token_id == int(output.token_ids[i])
        assert entry.logprob == pytest.approx(float(raw[i, entry.token_id]), abs=1e-4)
        values, ids = raw[i].topk(min(k, VOCAB))
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


@every_sampler
def test_no_logprobs_where_nobody_asked(option: str) -> None:
    output = sampler_of(option).sample(random_logits(2), metadata([SamplingParams()] * 2))
    assert output.logprobs is None
