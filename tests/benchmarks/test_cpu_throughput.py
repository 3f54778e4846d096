"""Engine on the default model in bf16 on a CPU against the best static batch of Transformers.

``make bench`` runs them; ``make test`` does not, since they measure time. The full comparison, with
every rung, intervals and records, is ``python -m experiments.cpu_throughput``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench.assemble import build_engine
from workbench.baselines.hf_best import HfStaticBatchBest
from workbench.bench.load import Offline
from workbench.configuration import compose_config, engine_config, limits_of
from workbench.core.errors import WorkbenchError
from workbench.core.sampling import SamplingParams
from workbench.core.workload import WorkloadRequest
from workbench.engine.engine import Engine
from workbench.models.store import resolve_model

pytestmark = pytest.mark.benchmark_model
MODEL = "smollm2-135m-instruct"
NUM_TOKENS = 128
#: Output tok/s over Transformers' best static batch, by batch size.
TARGETS = {1: 1.6, 8: 1.8, 32: 2.2}


@pytest.fixture(scope="module")
def folder() -> Path:
    """The default model, which `python -m workbench fetch` gets."""
    try:
        return resolve_model(MODEL).path
    except WorkbenchError as error:
        pytest.skip(str(error))


def _prompts(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(10_000) for _ in range(NUM_TOKENS)] for _ in range(count)]


def _engine(batch_size: int) -> Engine:
    composed = compose_config(
        ["engine/scheduler=continuous", "engine/kv_cache=paged", "dtype=bfloat16"]
    )
    limits = limits_of(composed.cfg, max_num_seqs=batch_size, max_model_len=2 * NUM_TOKENS)
    return build_engine(engine_config(composed, limits))


@pytest.fixture
def hf(folder: Path) -> Iterator[HfStaticBatchBest]:
    """The best static batch of Transformers."""
    backend = HfStaticBatchBest(folder, name="hf_static_batch_best", dtype="bfloat16")
    yield backend
    backend.close()


def _hf_tokens_per_second(backend: HfStaticBatchBest, prompts: list[list[int]]) -> float:
    requests = [WorkloadRequest(str(i), tuple(ids), NUM_TOKENS) for i, ids in enumerate(prompts)]
    backend.run(Offline(requests), lambda event: None)  # calibrates and warms up
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        backend.run(Offline(requests), lambda event: None)
        rates.append(len(prompts) * NUM_TOKENS / (time.perf_counter() - began))
    return sorted(rates)[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the targets are those of a CPU")
@pytest.mark.parametrize("batch_size", TARGETS)
def test_output_rate_against_transformers(
    benchmark: Any, hf: HfStaticBatchBest, batch_size: int
) -> None:
    prompts = _prompts(batch_size)
    engine = _engine(batch_size)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    benchmark.pedantic(
        lambda: engine.generate(prompts, sampling), rounds=3, warmup_rounds=1, iterations=1
    )
    rate = batch_size * NUM_TOKENS / benchmark.stats.stats.median
    baseline = _hf_tokens_per_second(hf, prompts)
    benchmark.extra_info |= {"tok_s": rate, "hf_tok_s": baseline, "ratio": rate / baseline}
    assert rate >= TARGETS[batch_size] * baseline


def test_host_work_of_a_step(benchmark: Any, folder: Path) -> None:
    """Everything but the model takes under 300 us a step at 32 running requests."""
    engine = _engine(32)
    prompts = _prompts(32)
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True))
    while len(engine.steps) < 8:
        engine.step()
    engine.steps.clear()
    benchmark.pedantic(engine.step, rounds=100, iterations=1)
    host_us = sorted(s.host_us for s in engine.steps if s.num_requests == 32)
    benchmark.extra_info["host_us_median"] = host_us[len(host_us) // 2]
    assert host_us[len(host_us) // 2] < 300
