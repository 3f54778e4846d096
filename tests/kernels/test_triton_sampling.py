"""Draws of ``kernels.triton`` beside those of the torch sampler, at the same seeds."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from techniques.fused_kernels.sampler import FusedSampler, pack
from tests.contract.test_sampler import expected_probs, is_off
from tests.helpers.interpreted import (
    DEVICE,
    needs_kernels,
    run_in_interpreter,
    starts_interpreter,
)
from workbench.core.sampling import SamplingParams
from workbench.slots.sampler import Sampler, SamplingMetadata, TorchSampler, uniform_from_seed

INF, NAN = float("inf"), float("nan")


@starts_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated holds a number that is no token until it is written."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(-7))


def metadata(params: Sequence[SamplingParams], positions: Sequence[int]) -> SamplingMetadata:
    index: dict[str, Any] = {"dtype": torch.int64, "device": DEVICE}
    return SamplingMetadata(
        params=list(params),
        positions=torch.tensor(list(positions), **index),
        seeds=torch.tensor([p.seed or 0 for p in params], **index),
        all_greedy=all(p.is_greedy for p in params),
    )


def draw(sampler: Sampler, logits: Tensor, params: Sequence[SamplingParams]) -> list[int]:
    positions = [7 * i + 3 for i in range(len(params))]
    drawn = sampler.sample(logits.clone(), metadata(params, positions)).token_ids
    assert drawn.dtype == torch.int64
    tokens: list[int] = drawn.tolist()
    assert all(0 <= token < logits.shape[1] for token in tokens)
    return tokens


def check(logits: Tensor, params: Sequence[SamplingParams]) -> None:
    """The very tokens of the torch sampler.

    Both add up in another order, so a draw could fall on the other side of a boundary: at a chance
    of about 1e-6, which these fixed seeds do not hit.
    """
    logits = logits.to(DEVICE)
    assert draw(FusedSampler(), logits, params) == draw(TorchSampler(), logits, params)


def values(rows: int, vocab: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    return torch.randn(rows, vocab, generator=generator) * scale


def grid(vocab: int) -> list[SamplingParams]:
    each = itertools.product([0, 1, 5, vocab], [1.0, 0.9, 0.1], [0.0, 0.02, 1.0])
    temperatures = itertools.cycle([1.0, 5.0, 0.0, 1e-3, 0.7])
    return [
        SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, seed=i)
        for i, ((k, p, m), t) in enumerate(zip(each, temperatures, strict=False))
    ]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 17, 300, 1024])
def test_draws_what_torch_draws(vocab: int, dtype: torch.dtype) -> None:
    params = grid(vocab)
    check(values(len(params), vocab).to(dtype), params)


@needs_kernels
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0, 5.0])
@pytest.mark.parametrize("vocab", [17, 1000])
def test_every_truncation_at_every_temperature(vocab: int, temperature: float) -> None:
    params = [dataclasses.replace(p, temperature=temperature) for p in grid(vocab)]
    check(values(len(params), vocab), params)


@needs_kernels
@pytest.mark.parametrize("vocab", [8193, 32000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_one_block(vocab: int, dtype: torch.dtype) -> None:
    params = [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=5.0, seed=2),
        SamplingParams(temperature=0.0, seed=3),
        SamplingParams(temperature=1.0, top_k=5, seed=4),
        SamplingParams(temperature=1.0, top_p=0.9, seed=5),
        SamplingParams(temperature=5.0, top_p=0.1, seed=6),
        SamplingParams(temperature=2.0, top_k=400, top_p=0.9, min_p=0.01, seed=7),
        SamplingParams(temperature=1e-3, top_k=vocab, top_p=0.9, seed=8),
    ]
    check(values(len(params), vocab).to(dtype), params)


@needs_kernels
@pytest.mark.parametrize("value", [0.0, -3.5, 1e-30, 100.0])
@pytest.mark.parametrize("vocab", [17, 9000])
def test_of_equal_logits_the_first_ones_fill_the_nucleus(vocab: int, value: float) -> None:
    params = [
        SamplingParams(temperature=1.0, top_p=p, top_k=k, seed=s)
        for p in (1.0, 0.45, 0.1)
        for k, s in ((0, 3), (5, 4))
    ]
    logits = torch.full((len(params), vocab), value)
    # Torch adds up thousands of equal numbers in fp32, so only a few are compared with it.
    if vocab < 100:
        check(logits, params)
    for _ in range(2):
        tokens = draw(FusedSampler(), logits.to(DEVICE), params)
        for token, p in zip(tokens, params, strict=True):
            assert token <= math.ceil(p.top_p * vocab) or token == vocab // 2
        logits[:, vocab // 2] += 1e-3 * abs(value)


@needs_kernels
def test_ties_at_the_edge_of_the_nucleus() -> None:
    """Three values, each several times: the nucleus ends within the second."""
    line = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    params = [
        SamplingParams(temperature=1.0, top_p=p, seed=s)
        for p in (0.3, 0.5, 0.6, 0.7, 0.8, 0.95)
        for s in range(8)
    ]
    check(line.expand(len(params), -1), params)


@needs_kernels
def test_logits_of_minus_infinity_are_never_drawn() -> None:
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p, seed=s)
        for t in (1.0, 5.0)
        for k in (0, 2, 9, 30)
        for p in (1.0, 0.9)
        for s in range(2)
    ]
    logits = values(len(params), 40)
    logits[:, ::2] = -INF
    logits[0] = -INF
    logits[0, 11] = -5.0
    check(logits, params)
    tokens = draw(FusedSampler(), logits.to(DEVICE), params)
    assert all(token % 2 for token in tokens) and tokens[0] == 11


@needs_kernels
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_distribution_gives_its_argmax_and_leaves_the_others(
    temperature: float,
) -> None:
    params = [SamplingParams(temperature=temperature, top_p=0.9, top_k=3, seed=s) for s in range(5)]
    logits = values(5, 500).to(DEVICE)
    expected = draw(TorchSampler(), logits, params)
    logits[0, [30, 400]], logits[2, 77], logits[3] = NAN, INF, -INF
    expected[0], expected[2], expected[3] = 30, 77, 0
    assert draw(FusedSampler(), logits, params) == expected


@needs_kernels
def test_values_far_apart() -> None:
    logits = values(12, 50) * 10.0 ** torch.linspace(-3, 30, 12).unsqueeze(1)
    logits[:, 3] = -3e38
    for p, k in ((0.9, 0), (1.0, 5), (0.5, 7)):
        params = [SamplingParams(temperature=1.0, top_p=p, top_k=k, seed=s) for s in range(12)]
        check(logits, params)


@needs_kernels
def test_strided_rows_are_read_and_not_written() -> None:
    wide = values(12, 700).to(DEVICE)
    before = wide.clone()
    params = [SamplingParams(temperature=1.0, top_p=0.9, top_k=40, seed=s) for s in range(6)]
    for view in (wide[::2, 5:305], wide[:6, 100:], wide[:1, :400].expand(6, -1)):
        fused = FusedSampler().sample(view, metadata(params, range(6))).token_ids
        torch_s = TorchSampler().sample(view.clone(), metadata(params, range(6))).token_ids
        assert fused.tolist() == torch_s.tolist()
    assert torch.equal(wide, before)


@needs_kernels
def test_no_rows_and_no_vocabulary() -> None:
    from kernels.triton.sampling import sample

    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    params = torch.zeros(4, 0, device=DEVICE)
    assert sample(torch.zeros(0, 9, device=DEVICE), params, nothing, nothing).tolist() == []
    with pytest.raises(ValueError, match="without a value"):
        sample(torch.zeros(0, 0, device=DEVICE), params, nothing, nothing)


@needs_kernels
def test_the_uniform_number_is_that_of_the_torch_sampler() -> None:
    """Among 4096 equal logits the token says the number's first 12 bits."""
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345], device=DEVICE)
    positions = torch.tensor([0, 5, 7, 2**40, 3, 99], device=DEVICE)
    from kernels.triton.sampling import sample

    params = pack([SamplingParams(temperature=1.0)] * 6, DEVICE)
    drawn = sample(torch.zeros(6, 4096, device=DEVICE), params, seeds, positions)
    expected = (uniform_from_seed(seeds, positions) * 4096).floor().long()
    assert drawn.tolist() == expected.tolist()


DISTRIBUTIONS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=2.0, top_k=3),
    SamplingParams(temperature=2.0, top_p=0.7),
    SamplingParams(temperature=3.0, top_k=4, top_p=0.9, min_p=0.3),
]


@needs_kernels
@pytest.mark.parametrize("params", DISTRIBUTIONS, ids=["plain", "top_k", "top_p", "all"])
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    line = torch.tensor([1.0, -2.0, 2.5, 0.0, 2.0, -1.0])
    count = 20_000 if DEVICE.type == "cuda" else 250
    each = [dataclasses.replace(params, seed=s) for s in range(count)]
    draws = np.array(draw(FusedSampler(), line.expand(count, -1).to(DEVICE), each))
    assert not is_off(draws, expected_probs(line.numpy(), params))
    # And the same draws are told from those of another temperature or without truncation.
    plain = SamplingParams(temperature=0.1 * params.temperature)
    assert is_off(draws, expected_probs(line.numpy(), plain))


@needs_kernels
def test_penalties_and_logprobs_go_through_torch_and_are_counted() -> None:
    logits = values(3, 60).to(DEVICE)
    params = [
        SamplingParams(temperature=t, presence_penalty=2.0, logprobs=2, seed=1)
        for t in (0.0, 1.0, 2.0)
    ]
    meta = metadata(params, range(3))
    meta.any_penalties = meta.any_logprobs = True
    meta.contexts = [torch.arange(20, device=DEVICE)] * 3
    meta.num_prompt_tokens = [4] * 3
    sampler = FusedSampler()
    fused, plain = sampler.sample(logits.clone(), meta), TorchSampler().sample(logits.clone(), meta)
    assert fused.token_ids.tolist() == plain.token_ids.tolist()
    assert fused.logprobs == plain.logprobs
    assert set(sampler.counters().values()) == {1}
    sampler.reset_counters()
    sampler.sample(logits, metadata([SamplingParams()] * 3, range(3)))
    assert [*sampler.counters().values()] == [1, 0, 0]


def test_parameters_are_packed_exactly() -> None:
    params = [SamplingParams(0, 0.5, 2**40, 0.25, 0.125), SamplingParams(0, 2.0, 262143)]
    packed = pack(params, torch.device("cpu"))
    assert packed.tolist() == [[0.5, 2.0], [2**24, 262143], [0.25, 1.0], [0.125, 0.0]]
