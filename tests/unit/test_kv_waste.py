"""How much of the KV memory holds nothing, on the workload that nano-vllm made usual (nano256).

Waste is a count: it depends on lengths and scheduling, not on the model or the machine.
"""

from __future__ import annotations

from tests.helpers.fake_runner import Choice, FakeRunner, make_request, make_scheduler
from workbench.bench.workloads import Nano256Workload

MAX_MODEL_LEN = 2048
POOL_TOKENS = 64 * MAX_MODEL_LEN


def mean_waste(kv_cache: str) -> tuple[float, float]:
    """Waste of allocated KV by step: its mean, and at the fullest step."""
    scheduler = make_scheduler(
        Choice(
            kv_cache=kv_cache,
            max_num_seqs=256,
            max_model_len=MAX_MODEL_LEN,
            pool_tokens=POOL_TOKENS,
        )
    )
    for request in Nano256Workload().requests(seed=0, vocab_size=32_000):
        scheduler.add(
            make_request(
                request.request_id,
                prompt=request.prompt_token_ids,
                max_tokens=request.max_tokens,
                ignore_eos=True,
            )
        )
    runner = FakeRunner(scheduler, checks_content=False)
    seen = []
    fullest, waste_at_fullest = 0, 0.0
    while scheduler.has_unfinished():
        plan = scheduler.schedule()
        assert plan is not None, "requests wait but nothing runs"
        usage_before = scheduler.parts.kv_cache.allocated_tokens()
        scheduler.update_from_output(plan, runner.execute(plan))
        usage = scheduler.kv_usage()
        assert usage_before <= POOL_TOKENS
        if usage.allocated_tokens:
            seen.append(usage.waste)
        if usage.allocated_tokens > fullest:
            fullest, waste_at_fullest = usage.allocated_tokens, usage.waste
    scheduler.check_integrity()
    return sum(seen) / len(seen), waste_at_fullest


def test_paged_kv_wastes_under_four_percent_and_regions_waste_most_of_it() -> None:
    paged_mean, paged_fullest = mean_waste("paged")
    assert paged_mean < 0.04
    assert paged_fullest < 0.04
    contiguous_mean, contiguous_fullest = mean_waste("contiguous")
    assert contiguous_mean > 10 * paged_mean
    assert contiguous_fullest > 10 * paged_fullest
