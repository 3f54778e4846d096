"""The memory of a CUDA device: how much of it the KV pool takes, and where every byte is.

python -m pytest tests/gpu/test_memory_cuda.py     # checks
PYTHONPATH=. python tests/gpu/test_memory_cuda.py  # the same without pytest; prints ledgers
"""

from __future__ import annotations

import dataclasses
import gc
import random
from typing import Any

import torch
from rich.console import Console

from tests.helpers.gpu_checks import run_as_program, run_under_pytest
from tests.helpers.tiny_models import tiny_model
from workbench.assemble import Limits, build_engine
from workbench.bench.memory_report import memory_table
from workbench.configuration import compose_config, engine_config
from workbench.core.errors import ConfigError
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine

#: Layers and heads enough that a pool of a whole card has some 100,000 blocks, not millions.
WIDE = {
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
MIB = 1 << 20


def tiny_engine(tokens: int | str, fraction: float = 0.9) -> Engine:
    composed = compose_config(
        [f"model={tiny_model('llama', **WIDE)}", "dtype=bfloat16", "preset=gpu"]
    )
    limits = Limits(24, 256, tokens, fraction)
    return build_engine(engine_config(composed, limits, download=False))


def larger_engine(tokens: int | str) -> Engine:
    composed = compose_config(["model=qwen3-0.6b", "weights=random", "preset=gpu"])
    return build_engine(engine_config(composed, Limits(256, 2304, tokens)))


def serve(engine: Engine, count: int, longest: int, params: SamplingParams) -> list[list[int]]:
    rng = random.Random(0)
    vocab = engine.parts.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(longest - i % 7)] for i in range(count)]
    return [output.token_ids for output in engine.generate(prompts, params)]


def used_share() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / total


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def check_ledger(engine: Engine, name: str) -> None:
    """Rows make the device, and hardly anything is unexplained."""
    ledger = engine.parts.ledger.read()
    rows, total = ledger.device, torch.cuda.mem_get_info()[1]
    Console(width=100).print(memory_table(dataclasses.asdict(ledger), name))
    assert sum(rows.values()) == total, "rows do not make the device"
    used = total - rows["free"]
    # The driver loads code as it is first run, after the profile too; of a tiny model it is much.
    unexplained = abs(rows["unexplained"])
    most = max(0.02 * used, 16 * MIB)
    assert unexplained <= most, f"{unexplained / MIB:.1f} MiB of what is used is unexplained"
    found, predicted = rows["activations"], ledger.predicted["activations"]
    assert found <= 1.25 * predicted + 64 * MIB, f"activations {found}, predicted {predicted}"
    found, predicted = rows["graphs"], ledger.predicted["graphs"]
    assert abs(found - predicted) <= 0.005 * total, f"graphs: {found} bytes, predicted {predicted}"


def check_a_filled_card() -> None:
    """`kv_pool_tokens=fill` takes the share that may be used, and steps fit beside it."""
    before = used_share()
    engine = tiny_engine("fill")
    serve(engine, 60, 200, SamplingParams(max_tokens=20, ignore_eos=True))
    share = used_share()
    assert 0.85 <= share <= 0.92, f"{100 * share:.1f} % of the card are used"
    check_ledger(engine, "tiny model, fill")
    del engine
    free_memory()
    assert used_share() <= before + 0.02, "an engine that is gone still holds memory"


def check_two_engines_in_sequence() -> None:
    """The second one finds the memory of the first, and serves the same tokens."""
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    served, pools = [], []
    for _ in range(2):
        engine = tiny_engine("fill")
        served.append(serve(engine, 30, 100, params))
        pools.append(engine.parts.info["kv_pool_tokens"])
        del engine  # the next one collects what is left of it
    assert served[0] == served[1]
    assert abs(pools[0] - pools[1]) <= 0.02 * pools[0], f"pools of {pools} tokens"
    free_memory()


def check_the_largest_steps_fit() -> None:
    """Prompts that fill a step, and costly draws of all requests, beside a pool that fills the
    card: nothing runs out, and the share is kept."""
    engine = larger_engine("fill")
    greedy = SamplingParams(max_tokens=8, ignore_eos=True)
    costly = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, top_p=0.9, seed=1)
    for params in (greedy, costly):
        serve(engine, 300, 2048, params)
    share = used_share()
    assert 0.85 <= share <= 0.92, f"{100 * share:.1f} % of the card are used"
    check_ledger(engine, "qwen3-0.6b, fill")
    del engine
    free_memory()


def check_auto_takes_what_requests_need() -> None:
    """`auto` takes no more than all requests could use at once."""
    engine = tiny_engine(0)
    assert engine.parts.info["kv_pool_tokens"] == 24 * 256
    serve(engine, 30, 100, SamplingParams(max_tokens=5, ignore_eos=True))
    check_ledger(engine, "tiny model, auto")
    del engine
    free_memory()


def check_room_for_nothing_is_told() -> None:
    """A share that holds no request is an error that says where the memory went."""
    try:
        tiny_engine("fill", fraction=0.001)
    except ConfigError as error:
        assert "limits.memory_fraction=0.001 leaves 0.00 GiB" in str(error), error
        assert "raise limits.memory_fraction" in str(error), error
    else:
        raise AssertionError("a pool was found where there is no room")
    free_memory()


CHECKS: dict[str, Any] = {
    "a filled card": check_a_filled_card,
    "two engines in sequence": check_two_engines_in_sequence,
    "the largest steps fit": check_the_largest_steps_fit,
    "auto": check_auto_takes_what_requests_need,
    "no room": check_room_for_nothing_is_told,
}


def test_memory_of_a_cuda_device() -> None:
    run_under_pytest(CHECKS)


if __name__ == "__main__":
    raise SystemExit(run_as_program(CHECKS))
