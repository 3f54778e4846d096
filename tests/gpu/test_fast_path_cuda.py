"""The captured step and the overlapped loop on a CUDA device.

python -m pytest tests/gpu/test_fast_path_cuda.py     # checks
PYTHONPATH=. python tests/gpu/test_fast_path_cuda.py  # the same, where there is no pytest
PYTHONPATH=. python tests/gpu/test_fast_path_cuda.py "drafts, never waits"  # some, by their names
"""

from __future__ import annotations

import random
from typing import Any

import torch

from tests.helpers.gpu_checks import run_as_program, run_under_pytest
from tests.helpers.recalling import RecallingDrafter
from tests.helpers.tiny_models import tiny_model
from workbench.assemble import Limits, build_engine
from workbench.configuration import compose_config, engine_config
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine
from workbench.engine.mixed_step import ROW, START
from workbench.slots.graph_runner import DECODE, MIXED, VERIFY

FAST = ("preset=gpu",)
UNOVERLAPPED = (
    "engine/platform=cuda",
    "+technique=[continuous_batching,paged_attention,radix_cache,triton_attention,cuda_graphs,"
    "fused_kernels,skinny_gemm]",
)
PLAIN = (
    "engine/platform=cuda",
    "+technique=[continuous_batching,paged_attention,radix_cache,triton_attention]",
)
CASCADE = (
    "engine.attention.min_requests=2",
    "engine.attention.min_shared_tokens=16",
    "engine.attention.step_granularity=4",
)
SHARING = ("preset=gpu_cascade", *CASCADE)
UNOVERLAPPED_SHARING = (
    "engine/platform=cuda",
    "+technique=[continuous_batching,paged_attention,radix_cache,cascade_attention,cuda_graphs,"
    "fused_kernels]",
    *CASCADE,
)
SPECULATING = (
    "engine/platform=cuda",
    "+technique=[continuous_batching,paged_attention,radix_cache,triton_attention,cuda_graphs,"
    "fused_kernels,skinny_gemm,spec_decode]",
)
RECALLED = (
    *SPECULATING,
    "engine.drafter._target_=tests.helpers.recalling.RecallingDrafter",
    "engine.drafter.num_draft_tokens=5",
)
CHUNKED = (
    "engine/platform=cuda",
    "+technique=[continuous_batching,paged_attention,radix_cache,triton_attention,cuda_graphs,"
    "fused_kernels,skinny_gemm,chunked_prefill,optimistic_admission,overlap]",
    "engine.prefill.chunk_tokens=24",
)
FORMS = ("", "cascade")
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


def engine_of(*overrides: str, dtype: str = "float32", **limits: int) -> Engine:
    composed = compose_config([f"model={tiny_model('llama')}", f"dtype={dtype}", *overrides])
    sizes = {"max_num_seqs": 12, "max_model_len": 128, "kv_pool_tokens": 2048, **limits}
    return build_engine(engine_config(composed, Limits(**sizes), download=False))


def prompts_of(engine: Engine, count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    vocab = engine.parts.vocab_size
    return [[rng.randrange(vocab) for _ in range(rng.randint(1, 60))] for _ in range(count)]


def sharing_prompts_of(engine: Engine, count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of which most begin with one of three stems."""
    rng = random.Random(seed)
    vocab = engine.parts.vocab_size

    def draw(count: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(count)]

    stems = [draw(16), draw(40), draw(66), []]
    return [rng.choice(stems) + draw(rng.randint(1, 30)) for _ in range(count)]


def repeating_prompts_of(engine: Engine, count: int, seed: int = 0) -> list[list[int]]:
    """Prompts that say a few tokens over and over, so that look-ups find drafts."""
    rng = random.Random(seed)
    vocab = engine.parts.vocab_size
    return [
        [rng.randrange(vocab) for _ in range(rng.randint(1, 6))] * rng.randint(4, 9)
        for _ in range(count)
    ]


def check_a_replay_is_the_step_bit_for_bit(dtype: str, form: str = "") -> None:
    """From the same tables, launched op by op and replayed: ids, logits, KV and tables agree."""
    engine = engine_of(*(UNOVERLAPPED_SHARING if form else UNOVERLAPPED), dtype=dtype)
    prompts = sharing_prompts_of(engine, 6, seed=5) if form else prompts_of(engine, 6)
    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, SamplingParams(max_tokens=30, ignore_eos=True), f"r{index}")
    for _ in range(7):
        engine.step()
    runner = engine.parts.executor.runner  # type: ignore[attr-defined]
    step, table, pool = runner.parts.decode_step, runner.table, runner.parts.pool
    state = [table.token_ids, table.num_computed_tokens, *pool.block_tensors()]
    before = [t.clone() for t in state]
    captured = dict(step.logits)  # a run op by op keeps its own from then on
    found = []
    for is_replay in (False, True):
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        with torch.inference_mode():
            if is_replay:
                runner.parts.graph_runner.run(DECODE, 8, form)
            else:
                step.run(8, form)
        torch.cuda.synchronize()
        found.append(
            [
                step.new_ids[:8].clone(),
                (captured if is_replay else step.logits)[8, form].clone(),
                *(t.clone() for t in state),
            ]
        )
    # The trash block takes what padding writes, in any order.
    for place, (eager, replayed) in enumerate(zip(*found, strict=True)):
        if place >= 4:
            eager, replayed = eager[: pool.num_blocks], replayed[: pool.num_blocks]
        assert torch.equal(eager, replayed), f"tensor {place} differs ({dtype})"
    assert not torch.equal(found[0][3], before[1]), "the step did nothing"
    if form:
        assert engine.counters()["attention.prefix_groups"] > 0, "the form was never chosen"


def check_a_replay_verifies_bit_for_bit(dtype: str) -> None:
    """The same of a step of drafts, of which there are from none to as many as may be."""
    engine = engine_of(*SPECULATING, dtype=dtype)
    runner = engine.parts.executor.runner  # type: ignore[attr-defined]
    step, table, pool = runner.parts.verify_step, runner.table, runner.parts.pool
    prompts = [prompt * 3 + [5] * 9 for prompt in repeating_prompts_of(engine, 6, seed=6)]
    engine.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
    prompts = [prompt[:40] for prompt in prompts]
    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, SamplingParams(max_tokens=30, ignore_eos=True), f"r{index}")
    for _ in range(3):
        engine.step()
    most = step.tokens_each - 1
    counts = [0, 1, 2, most // 2, most - 1, most]
    rng = random.Random(2)
    for index, count in enumerate(counts):
        row = table.row_of[f"r{index}"]
        known = int(table.num_computed_tokens[row]) + 1
        drafts = [rng.randrange(engine.parts.vocab_size) for _ in range(count)]
        table.token_ids[row, known : known + count] = torch.tensor(drafts, dtype=torch.int32)
        step.places[index] = torch.tensor([row, count])
    step.places[len(counts) : 8] = torch.tensor([table.padding_row, 0])
    state = [table.token_ids, table.num_computed_tokens, *pool.block_tensors()]
    before = [t.clone() for t in state]
    captured = dict(step.logits)  # a run op by op keeps its own from then on

    def run(is_replay: bool) -> list[torch.Tensor]:
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        with torch.inference_mode():
            if is_replay:
                runner.parts.graph_runner.run(VERIFY, 8)
            else:
                step.run(8)
        torch.cuda.synchronize()
        # Padding reads the trash block, which takes what all places write, in any order; and so do
        # tokens that a place runs over again, so that only its last ones mean anything.
        pools = [t[: pool.num_blocks].clone() for t in state[2:]]
        logits = (captured if is_replay else step.logits)[8, ""].view(8, most + 1, -1)
        read = torch.cat([logits[i, most - n :] for i, n in enumerate(counts)])
        new_ids = step.new_ids[: len(counts)].clone()
        return [new_ids, read, *(t.clone() for t in state[:2]), *pools]

    # With the drafts at random, and then with what was drawn in their place: one more holds.
    for _ in range(most + 1):
        found = [run(is_replay) for is_replay in (False, True)]
        for place, (eager, replayed) in enumerate(zip(*found, strict=True)):
            where = (eager != replayed).nonzero()[:8].tolist()
            assert torch.equal(eager, replayed), f"tensor {place} differs at {where} ({dtype})"
        assert not torch.equal(found[0][3], before[1]), "the step did nothing"
        assert torch.equal(found[0][2][table.padding_row], before[0][table.padding_row])
        for index, count in enumerate(counts):
            row = table.row_of[f"r{index}"]
            known = int(before[1][row]) + 1
            new = [t for t in found[0][0][index].tolist() if t >= 0][:count]
            before[0][row, known : known + len(new)] = torch.tensor(new, dtype=torch.int32)
    accepted = [(found[1][0][i] >= 0).sum().item() - 1 for i in range(len(counts))]
    assert accepted == counts, f"accepted {accepted} of {counts} right drafts ({dtype})"


def check_a_replay_of_any_split_is_the_step_bit_for_bit(dtype: str) -> None:
    """Of pieces of prompts and single tokens in several splits, padded and full: hidden states of
    their tokens and KV agree between the step launched op by op and replayed."""
    engine = engine_of(*UNOVERLAPPED, dtype=dtype)
    runner = engine.parts.executor.runner  # type: ignore[attr-defined]
    step, table, pool = runner.parts.mixed_step, runner.table, runner.parts.pool
    for index in range(8):
        prompt = [(index + 7 * i) % engine.parts.vocab_size for i in range(60)]
        engine.add_request(prompt, SamplingParams(max_tokens=60, ignore_eos=True), f"r{index}")
    for _ in range(4):
        engine.step()
    captured = dict(step.hidden)  # a run op by op keeps its own from then on
    rows = [table.row_of[f"r{index}"] for index in range(8)]
    known = table.num_computed_tokens.clone()
    blocks = pool.block_tensors()
    before = [t.clone() for t in blocks]
    for split in ([1] * 7 + [23], [60], [1, 9, 1, 17], [60, 1, 1, 2], [20] * 6 + [7, 1], [2]):
        num_tokens, places = sum(split), step.places
        size = runner.parts.graph_runner.dispatch(MIXED, num_tokens)
        starts = [sum(split[:i]) for i in range(len(split))]
        places[:, ROW], places[:, START] = table.padding_row, num_tokens
        places[: len(split), ROW] = torch.tensor(rows[: len(split)])
        places[: len(split), START] = torch.tensor(starts)
        table.num_computed_tokens.copy_(known)
        # Tokens that the pool has already run over again.
        ran = torch.tensor(split, device=known.device)
        table.num_computed_tokens[rows[: len(split)]] -= ran - 1
        found = []
        for is_replay in (False, True):
            for tensor, old in zip(blocks, before, strict=True):
                tensor.copy_(old)
            for row, length in zip(rows, split, strict=False):
                at = int(known[row]) + 1 - length
                for tensor in blocks:  # what the step has to write
                    tensor[table.block_table[row, at // pool.block_size].item()].zero_()
            start = [t.clone() for t in blocks]
            with torch.inference_mode():
                if is_replay:
                    runner.parts.graph_runner.run(MIXED, size)
                else:
                    step.run(size)
            torch.cuda.synchronize()
            kept = captured if is_replay else step.hidden
            hidden = kept[size, ""][:num_tokens].clone()
            found.append([hidden, *(t[: pool.num_blocks].clone() for t in blocks)])
        for place, (eager, replayed) in enumerate(zip(*found, strict=True)):
            assert torch.equal(eager, replayed), f"tensor {place} differs ({split}, {dtype})"
        assert found[0][0].isfinite().all()
        assert any(
            not torch.equal(mine, old[: pool.num_blocks])
            for mine, old in zip(found[0][1:], start, strict=True)
        ), "the step did nothing"
    table.num_computed_tokens.copy_(known)


def check_tokens_under_traffic(
    shares: bool = False, drafter: tuple[str, ...] = (), chunked: bool = False
) -> None:
    """Arrivals, stops and aborts at random: the fast engine's tokens are the plain one's, fp32."""
    plain = engine_of(*PLAIN)
    prompts = sharing_prompts_of(plain, 60, seed=3) if shares else prompts_of(plain, 30, seed=3)
    if drafter:
        prompts[::2] = repeating_prompts_of(plain, len(prompts[::2]), seed=3)
    alone = [o.token_ids for o in plain.generate(prompts, GREEDY)]
    if chunked:  # with too few blocks, so that some are taken out and begin again
        fast = engine_of(*CHUNKED, kv_pool_tokens=512)
    else:
        fast = engine_of(*(drafter or (SHARING if shares else FAST)))
    if isinstance(fast.parts.components["drafter"], RecallingDrafter):
        answers = [prompt + tokens for prompt, tokens in zip(prompts, alone, strict=True)]
        fast.parts.components["drafter"].answers = answers
    rng = random.Random(5)
    stops = [rng.choice(tokens) if rng.random() < 0.4 else None for tokens in alone]
    got: dict[str, list[int]] = {}
    waiting = list(range(len(prompts)))
    aborted: set[str] = set()
    fewest = -12 if drafter else 0  # requests that speculate end soon: steps without a prompt
    while waiting or fast.has_unfinished():
        for _ in range(12 if len(waiting) == len(prompts) else rng.randint(fewest, 4)):
            if waiting:
                i = waiting.pop(0)
                stop = [] if stops[i] is None else [stops[i]]
                params = SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=stop)
                fast.add_request(prompts[i], params, f"r{i}")
        for output in fast.step():
            got.setdefault(output.request_id, []).extend(output.new_token_ids)
        if rng.random() < 0.05 and fast.unfinished_ids():
            victim = rng.choice(fast.unfinished_ids())
            fast.abort(victim)
            aborted.add(victim)
        fast.check_integrity()
    ties = 0
    for i, tokens in enumerate(alone):
        wanted = tokens if stops[i] is None else tokens[: tokens.index(stops[i]) + 1]
        mine = got.get(f"r{i}", [])
        if f"r{i}" in aborted:
            wanted = wanted[: len(mine)]
        ties += mine != wanted
    assert ties <= 1, f"{ties} of {len(alone)} requests differ; near-ties of fp32 are rare"
    counters = fast.counters()
    assert counters["graph_runner.replays"] > 20
    if chunked:
        assert counters["graph_runner.mixed_replays"] > 20
        assert counters["scheduler.preemptions"] > 0
        assert {s.graph_mode for s in fast.steps} == {"graph"}, "every step was small enough"
    assert drafter or counters["loop.steps_ahead"] > 20
    if drafter:
        assert counters["graph_runner.verify_replays"] > 5
        assert counters["verifier.accepted_tokens"] > 20
        # But for steps with somebody who has fewer tokens than a place.
        modes = [s.graph_mode for s in fast.steps if not s.num_prompt_tokens]
        assert modes.count("graph") > 2 * modes.count("eager"), f"replayed: {modes}"
    if shares:
        replayed = fast.parts.graph_runner._replays  # type: ignore[attr-defined]
        by_form = {
            form: sum(n for key, n in replayed.items() if key.form == form) for form in FORMS
        }
        assert min(by_form.values()) > 0, f"replays by form: {by_form}"
        assert counters["attention.prefix_tokens_saved"] > 0
        assert counters["scheduler.in_flight_tokens"] > 0
    else:
        assert counters["attention.decode_calls"] > 0


def check_the_steady_path_never_waits() -> None:
    """No operation that waits for the device: tokens are read through an event alone."""
    for overrides in (UNOVERLAPPED, FAST, SHARING):
        never_waits(overrides)


def never_waits(overrides: tuple[str, ...]) -> None:
    """Of an engine with these overrides."""
    engine = engine_of(*overrides, max_model_len=192)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    prompts = sharing_prompts_of(engine, 9) if overrides is SHARING else prompts_of(engine, 9)
    if overrides is SPECULATING:
        prompts = repeating_prompts_of(engine, 9)
    for index, prompt in enumerate(prompts):
        engine.add_request(prompt, params, f"r{index}")
    for _ in range(5):
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            engine.step()
        # Somebody new joins, and still nobody waits.
        engine.add_request(list(range(5, 45)), params, "late")
        for _ in range(20):
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    while engine.has_unfinished():
        engine.step()
    if overrides is SPECULATING:
        assert engine.counters()["graph_runner.verify_replays"] > 0


def check_memory_does_not_grow(num_requests: int = 10_000) -> None:
    """After a first thousand of short requests, ten thousand more reserve no further memory."""
    engine = engine_of(*FAST)
    rng = random.Random(1)

    def serve(count: int) -> int:
        for index in range(count):
            prompt = [rng.randrange(engine.parts.vocab_size) for _ in range(rng.randint(1, 40))]
            params = SamplingParams(max_tokens=rng.randint(1, 4), ignore_eos=True)
            engine.add_request(prompt, params, f"r{index}")
        while engine.has_unfinished():
            engine.step()
        return torch.cuda.memory_reserved()

    serve(1000)
    before = torch.cuda.memory_reserved()
    assert serve(num_requests) <= before + (2 << 20), "memory grew by over a segment"


CHECKS: dict[str, Any] = {
    "replay is the step, fp32": lambda: check_a_replay_is_the_step_bit_for_bit("float32"),
    "replay is the step, bf16": lambda: check_a_replay_is_the_step_bit_for_bit("bfloat16"),
    "replay is the step, groups, fp32": lambda: check_a_replay_is_the_step_bit_for_bit(
        "float32", "cascade"
    ),
    "replay is the step, groups, bf16": lambda: check_a_replay_is_the_step_bit_for_bit(
        "bfloat16", "cascade"
    ),
    "drafts, replay is the step, fp32": lambda: check_a_replay_verifies_bit_for_bit("float32"),
    "drafts, replay is the step, bf16": lambda: check_a_replay_verifies_bit_for_bit("bfloat16"),
    "drafts, tokens under traffic": lambda: check_tokens_under_traffic(drafter=RECALLED),
    "drafts, tokens under traffic, ngram": lambda: check_tokens_under_traffic(drafter=SPECULATING),
    "drafts, never waits": lambda: never_waits(SPECULATING),
    "mixed, replay is the step, fp32": lambda: check_a_replay_of_any_split_is_the_step_bit_for_bit(
        "float32"
    ),
    "mixed, replay is the step, bf16": lambda: check_a_replay_of_any_split_is_the_step_bit_for_bit(
        "bfloat16"
    ),
    "mixed, tokens under traffic": lambda: check_tokens_under_traffic(chunked=True),
    "mixed, never waits": lambda: never_waits(CHUNKED),
    "tokens under traffic": check_tokens_under_traffic,
    "tokens under traffic that shares": lambda: check_tokens_under_traffic(shares=True),
    "never waits": check_the_steady_path_never_waits,
    "memory": check_memory_does_not_grow,
}


def test_the_fast_path_on_a_cuda_device() -> None:
    run_under_pytest(CHECKS)


if __name__ == "__main__":
    raise SystemExit(run_as_program(CHECKS))
