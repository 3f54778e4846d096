"""``Engine.generate``: prompts of every kind, sampling, and bad input that spares the others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.engines import (
    VOCAB_SIZE,
    check_idle,
    mixed_prompts,
    shared_engine,
    tiny_engine,
    together,
)
from tests.helpers.tiny_models import hf_greedy, hf_logits, tiny_model
from workbench.core.errors import RequestError
from workbench.core.outputs import RequestOutput
from workbench.core.request import FinishReason
from workbench.core.sampling import SamplingParams
from workbench.engine.engine import Engine
from workbench.slots.sampler import uniform_from_seed

ALL = together()
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(params=["core", "all techniques"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = shared_engine(techniques=() if request.param == "core" else ALL)
    yield engine
    try:
        check_idle(engine)
    finally:
        for name in engine.unfinished_ids():  # so that one failure is not everybody's
            engine.abort(name)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    assert all(o.error is None for o in outputs), [o.error for o in outputs]
    return [o.token_ids for o in outputs]


def greedy(prompt: list[int], count: int = 12) -> list[int]:
    return hf_greedy(tiny_model("llama"), prompt, count)


# -- prompts --------------------------------------------------------------------------------------


def test_text_ids_and_messages_say_the_same(engine: Engine) -> None:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    messages = [{"role": "user", "content": "hello"}]
    text = "user: hello\nassistant: "
    ids = tokenizer.encode(text)
    by_text, by_ids, by_messages = (engine.generate(p, GREEDY)[0] for p in (text, ids, messages))
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids == by_messages.prompt_token_ids
    assert by_text.token_ids == by_ids.token_ids == by_messages.token_ids == greedy(ids)
    assert by_text.text == tokenizer.decode(by_text.token_ids, skip_special_tokens=True)


def test_messages_are_tokenised_as_the_template_s_own_ids(engine: Engine) -> None:
    """A template writes its own special tokens; encoding its text must not add them again."""
    from tests.helpers.workload_data import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "hi"}]
    expected = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.bos_token_id in tokenizer.encode("hi"), "plain text starts with BOS"
    before, engine.tokenizer = engine.tokenizer, tokenizer
    before_parts = engine.parts
    engine.parts = dataclasses.replace(before_parts, vocab_size=len(tokenizer))
    try:
        assert engine._tokenize(messages) == expected
    finally:
        engine.tokenizer, engine.parts = before, before_parts


def test_outputs_come_in_the_order_of_the_prompts_and_equal_hf(engine: Engine) -> None:
    prompts = mixed_prompts(9)
    params = [SamplingParams(max_tokens=3 + 5 * (i % 4), ignore_eos=True) for i in range(9)]
    outputs = engine.generate(prompts, params)
    assert [o.prompt_token_ids for o in outputs] == prompts
    for output, prompt, p in zip(outputs, prompts, params, strict=True):
        assert output.finished
        assert output.token_ids == greedy(prompt, p.max_tokens)
        assert output.outputs[0].finish_reason is FinishReason.LENGTH
        assert output.outputs[0].stop_reason is None


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor], ids=["tuple", "numpy", "torch"])
def test_ids_in_other_containers(engine: Engine, kind: Any) -> None:
    prompt = [5, 6, 7]
    assert tokens(engine.generate([kind(prompt), prompt], GREEDY)) == [greedy(prompt)] * 2
    assert tokens(engine.generate(kind(prompt), GREEDY)) == [greedy(prompt)]


def test_several_texts_and_several_chats(engine: Engine) -> None:
    texts = ["ab", "cd"]
    assert len(engine.generate(texts, GREEDY)) == 2
    chats = [[{"role": "user", "content": text}] for text in texts]
    assert len(engine.generate(chats, GREEDY)) == 2
    assert engine.generate([], GREEDY) == []


def test_default_sampling_is_greedy(engine: Engine) -> None:
    (output,) = engine.generate([5, 6, 7])
    expected = greedy([5, 6, 7], SamplingParams().max_tokens)
    assert expected[: len(output.token_ids)] == output.token_ids


# -- bad input ------------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, SamplingParams, str]] = {
    "empty ids": ([], GREEDY, "empty"),
    "empty text": ("", GREEDY, "empty"),
    "overlong": ([5] * 128, GREEDY, "context of 128"),
    "id over the vocabulary": ([5, VOCAB_SIZE], GREEDY, f"0 to {VOCAB_SIZE - 1}"),
    "negative id": ([5, -1], GREEDY, f"0 to {VOCAB_SIZE - 1}"),
    "id that is no integer": ([5, 1.5], GREEDY, "1.5"),
    "id that is no number": ([5, None], GREEDY, "None"),
    "no prompt at all": (None, GREEDY, "prompt"),
    "max_tokens": ([5], SamplingParams(max_tokens=0), "max_tokens=0"),
    "negative max_tokens": ([5], SamplingParams(max_tokens=-4), "max_tokens=-4"),
    "temperature": ([5], SamplingParams(temperature=-0.1), "temperature=-0.1"),
    "temperature nan": ([5], SamplingParams(temperature=math.nan), "temperature=nan"),
    "temperature inf": ([5], SamplingParams(temperature=math.inf), "temperature=inf"),
    "top_k": ([5], SamplingParams(top_k=-1), "top_k=-1"),
    "top_p 0": ([5], SamplingParams(top_p=0.0), "top_p=0.0"),
    "top_p 2": ([5], SamplingParams(top_p=2.0), "top_p=2.0"),
    "min_p": ([5], SamplingParams(min_p=1.5), "min_p=1.5"),
    "repetition": ([5], SamplingParams(repetition_penalty=0.0), "repetition_penalty=0.0"),
    "presence": ([5], SamplingParams(presence_penalty=math.inf), "presence_penalty=inf"),
    "frequency": ([5], SamplingParams(frequency_penalty=math.nan), "frequency_penalty=nan"),
    "logprobs": ([5], SamplingParams(logprobs=-1), "logprobs=-1"),
    "n": ([5], SamplingParams(n=0), "n=0"),
    "empty stop": ([5], SamplingParams(stop=("a", "")), "stop="),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_request_gets_a_clear_error_and_the_others_finish(
    engine: Engine, case: tuple[Any, SamplingParams, str]
) -> None:
    prompt, params, message = case
    outputs = engine.generate([[5, 6], prompt, [7, 8, 9]], [GREEDY, params, GREEDY])
    first, bad, last = outputs
    assert tokens([first, last]) == [greedy([5, 6]), greedy([7, 8, 9])]
    assert bad.error is not None
    assert message in bad.error
    assert bad.finished
    assert bad.outputs == []
    assert (bad.text, bad.token_ids) == ("", [])


def test_all_bad_returns_at_once(engine: Engine) -> None:
    outputs = engine.generate([[], [999]], GREEDY)
    assert all(o.error for o in outputs)


def test_longest_prompt_that_fits_yields_one_token(engine: Engine) -> None:
    prompt = [5 + i % 100 for i in range(127)]
    (output,) = engine.generate(prompt, dataclasses.replace(GREEDY, max_tokens=50))
    assert output.token_ids == greedy(prompt, 1)
    assert output.outputs[0].finish_reason is FinishReason.LENGTH


def test_pool_too_small_for_one_request_spares_the_others() -> None:
    engine = tiny_engine("engine/kv_cache=paged", kv_pool_tokens=32)
    outputs = engine.generate([[5] * 30, [5, 6], [6] * 20], GREEDY)
    assert outputs[0].error is not None
    assert "pool of 32 tokens" in outputs[0].error
    assert tokens(outputs[1:]) == [greedy([5, 6]), greedy([6] * 20)]
    check_idle(engine)


def test_as_many_parameters_as_prompts(engine: Engine) -> None:
    with pytest.raises(RequestError, match="2 prompts but 1 sampling"):
        engine.generate([[5], [6]], [GREEDY])


def test_ids_of_requests_are_unique(engine: Engine) -> None:
    engine.add_request([5, 6], GREEDY, "mine")
    with pytest.raises(RequestError, match="'mine' is in use already"):
        engine.add_request([7], GREEDY, "mine")
    engine.abort("mine")
    check_idle(engine)
    engine.add_request([5, 6], GREEDY, "mine")
    engine.abort("mine")


def test_ids_that_look_like_a_completion_s_leave_nothing_behind(engine: Engine) -> None:
    engine.add_request([5, 6], GREEDY, "a#1")
    with pytest.raises(RequestError, match="in use already"):
        engine.add_request([5, 6], dataclasses.replace(GREEDY, n=2), "a")
    engine.abort("a#1")
    check_idle(engine)


def test_generated_ids_do_not_meet_the_caller_s(engine: Engine) -> None:
    ids = [f"request-{i}" for i in range(2000)]
    waiting = engine.add_request([5, 6], GREEDY)
    number = int(waiting.rpartition("-")[2])
    mine = ids[number + 1] if number + 1 < len(ids) else f"request-{number + 1}"
    engine.add_request([7, 8], GREEDY, mine)
    (output,) = engine.generate([9, 10], GREEDY)
    assert output.error is None
    assert output.token_ids == greedy([9, 10])
    for name in engine.unfinished_ids():
        engine.abort(name)


# -- ends -----------------------------------------------------------------------------------------


def test_stop_ids_end_the_output_and_are_kept(engine: Engine) -> None:
    prompt = mixed_prompts(2)[1]
    full = greedy(prompt, 24)
    for stop in sorted(set(full)):
        params = SamplingParams(max_tokens=24, ignore_eos=True, stop_token_ids=(stop,))
        (output,) = engine.generate([prompt], params)
        assert output.token_ids == full[: full.index(stop) + 1]
        assert output.outputs[0].finish_reason is FinishReason.STOP
        assert output.outputs[0].stop_reason == stop


def test_eos_ends_the_output_unless_it_is_ignored() -> None:
    prompt = [9, 9, 9]
    full = greedy(prompt, 16)
    eos = full[5]
    engine = tiny_engine(techniques=ALL, model=tiny_model("llama", eos_token_id=eos))
    (stopped,) = engine.generate([prompt], SamplingParams(max_tokens=16))
    assert stopped.token_ids == full[: full.index(eos) + 1]
    assert stopped.outputs[0].finish_reason is FinishReason.STOP
    (ignored,) = engine.generate([prompt], SamplingParams(max_tokens=16, ignore_eos=True))
    assert ignored.token_ids == full
    assert ignored.outputs[0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_max_tokens(engine: Engine, max_tokens: int) -> None:
    params = dataclasses.replace(GREEDY, max_tokens=max_tokens)
    assert tokens(engine.generate(mixed_prompts(5), params)) == [
        greedy(p, max_tokens) for p in mixed_prompts(5)
    ]


# -- sampling -------------------------------------------------------------------------------------


def test_greedy_completions_of_one_prompt_are_equal_and_drawn_ones_differ(engine: Engine) -> None:
    (output,) = engine.generate([5, 6, 7], dataclasses.replace(GREEDY, n=3))
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert [c.token_ids for c in output.outputs] == [greedy([5, 6, 7])] * 3
    drawn = dataclasses.replace(GREEDY, n=6, temperature=1.5, seed=3)
    (output,) = engine.generate([5, 6, 7], drawn)
    assert len({tuple(c.token_ids) for c in output.outputs}) == 6
    assert all(c.finish_reason is FinishReason.LENGTH for c in output.outputs)
    (again,) = engine.generate([5, 6, 7], drawn)
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in output.outputs]
    # The first of several is what one alone would have been.
    (alone,) = engine.generate([5, 6, 7], dataclasses.replace(drawn, n=1))
    assert alone.token_ids == output.outputs[0].token_ids


def test_completions_of_one_prompt_are_independent(engine: Engine) -> None:
    """No completion may use another's random numbers, a position later or otherwise."""
    seeds = []
    for base in range(16):
        name = engine.add_request([5], dataclasses.replace(GREEDY, n=4, seed=base))
        states = engine.parts.scheduler.requests
        seeds += [states[f"{name}#{k}"].sampling.seed for k in range(4)]
        engine.abort(name)
    positions = torch.arange(64)
    numbers = [
        u for s in seeds for u in uniform_from_seed(torch.full((64,), s), positions).tolist()
    ]
    assert len(set(numbers)) == len(numbers)


def test_seed_fixes_the_tokens_whatever_the_batch(engine: Engine) -> None:
    prompts = mixed_prompts(6)
    params = [
        SamplingParams(max_tokens=10, temperature=1.2, top_p=0.9, seed=i, ignore_eos=True)
        for i in range(6)
    ]
    together = tokens(engine.generate(prompts, params))
    alone = [tokens(engine.generate([p], s))[0] for p, s in zip(prompts, params, strict=True)]
    backwards = tokens(engine.generate(prompts[::-1], params[::-1]))
    assert together == alone == backwards[::-1]
    other = [dataclasses.replace(p, seed=(p.seed or 0) + 50) for p in params]
    assert tokens(engine.generate(prompts, other)) != together


def test_unseeded_requests_differ_and_repeat_with_the_engine_s_seed() -> None:
    hot = SamplingParams(max_tokens=10, temperature=2.0, ignore_eos=True)
    outputs = []
    for seed in (0, 0, 1):
        engine = tiny_engine(f"seed={seed}")
        outputs.append(tokens(engine.generate([[5, 6, 7]] * 3, hot)))
    first, again, other = outputs
    assert first == again != other
    assert len({tuple(t) for t in first}) == 3


def test_greedy_beside_drawn_beside_penalised(engine: Engine) -> None:
    prompts = mixed_prompts(4)
    hot = SamplingParams(max_tokens=12, temperature=2.0, seed=1, ignore_eos=True, logprobs=1)
    penalised = SamplingParams(max_tokens=12, repetition_penalty=1.5, ignore_eos=True)
    outputs = engine.generate(prompts, [GREEDY, hot, penalised, GREEDY])
    assert outputs[0].token_ids == greedy(prompts[0])
    assert outputs[3].token_ids == greedy(prompts[3])
    assert outputs[2].token_ids == reference_with_penalty(prompts[2], 1.5, 12)


def reference_with_penalty(prompt: list[int], penalty: float, count: int) -> list[int]:
    """Transformers' logits with Transformers' own penalty, one whole forward a token."""
    from transformers import RepetitionPenaltyLogitsProcessor

    process = RepetitionPenaltyLogitsProcessor(penalty=penalty)
    ids = list(prompt)
    for _ in range(count):
        scores = hf_logits(tiny_model("llama"), ids)[-1:].clone()
        ids.append(int(process(torch.tensor([ids]), scores).argmax()))
    return ids[len(prompt) :]


def test_penalties_see_every_token_before_the_drawn_one(engine: Engine) -> None:
    """Accepted drafts included: repetitive prompts make drafts, the penalty breaks them off."""
    for prompt in mixed_prompts(6)[1::2]:
        params = SamplingParams(max_tokens=16, repetition_penalty=1.2, ignore_eos=True)
        (output,) = engine.generate([prompt], params)
        assert output.token_ids == reference_with_penalty(prompt, 1.2, 16)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_equal_hf_s_at_every_position_drafts_or_not(
    engine: Engine, temperature: float
) -> None:
    prompts = mixed_prompts(6)
    params = [
        SamplingParams(max_tokens=10, logprobs=k, temperature=temperature, seed=3, ignore_eos=True)
        for k in (None, 0, 1, 4, None, 2)
    ]
    for output, p in zip(engine.generate(prompts, params), params, strict=True):
        entries = output.outputs[0].logprobs
        if p.logprobs is None:
            assert entries is None
            continue
        assert entries is not None
        assert [e.token_id for e in entries] == output.token_ids
        ids = output.prompt_token_ids + output.token_ids
        rows = hf_logits(tiny_model("llama"), ids[:-1])[-len(output.token_ids) :]
        reference = torch.log_softmax(rows.double(), dim=-1)
        for entry, row in zip(entries, reference, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
            assert len(entry.top) == p.logprobs
            best = row.topk(p.logprobs).values.tolist()
            assert [v for _, v in entry.top] == pytest.approx(best, abs=1e-3)
            if temperature == 0.0 and entry.top:
                assert entry.top[0][0] == entry.token_id


# -- what happened --------------------------------------------------------------------------------


def test_step_records_add_up(engine: Engine) -> None:
    prompts = mixed_prompts(7)
    outputs = engine.generate(prompts, dataclasses.replace(GREEDY, max_tokens=20))
    steps = engine.steps
    produced = sum(len(o.token_ids) for o in outputs)
    assert sum(s.num_output_tokens for s in steps) == produced
    # Earlier tests may have left prefixes in a cache.
    prompt_tokens = sum(map(len, prompts)) - sum(s.num_cached_tokens for s in steps)
    # Every prompt token but the last of each is no token that yields one.
    assert sum(s.num_prompt_tokens for s in steps) == prompt_tokens - len(prompts)
    scheduled = sum(s.num_scheduled_tokens for s in steps)
    drafted = sum(s.num_draft_tokens for s in steps)
    accepted = sum(s.num_accepted_tokens for s in steps)
    assert scheduled == prompt_tokens - len(prompts) + produced - accepted + drafted
    assert 0 <= accepted <= drafted
    assert [s.step for s in steps] == list(range(steps[0].step, steps[0].step + len(steps)))
    assert all(s.host_us > 0 and s.device_us > 0 for s in steps)
    counters = engine.counters()
    assert counters["scheduler.steps"] == len(steps)
    assert counters["scheduler.scheduled_tokens"] == scheduled
    engine.reset_counters()
    assert not engine.steps
    assert engine.counters()["scheduler.steps"] == 0
