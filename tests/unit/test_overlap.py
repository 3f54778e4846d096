"""The overlapped loop gives the tokens of the plain one, whatever comes and goes meanwhile."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.helpers.comings import make_traffic
from tests.helpers.engines import check_idle, mixed_prompts, tiny_engine
from tests.helpers.prepared import PREPARED
from workbench.core.sampling import SamplingParams

OVERLAPPED = "engine/loop=overlapped"
CHUNKED = ("engine/prefill=chunked", "engine.prefill.chunk_tokens=16")
PAGED = ("engine/kv_cache=paged", "engine/scheduler=continuous")
TIGHT = ("engine/admission=optimistic", "engine.admission.headroom_tokens=0")
SETTINGS: dict[str, tuple[tuple[str, ...], int]] = {
    "static": ((), 0),
    "continuous": (("engine/scheduler=continuous",), 0),
    "paged, chunked": ((*PAGED, *CHUNKED), 0),
    "radix": ((*PAGED, *CHUNKED, "engine/prefix_cache=radix", "engine/eviction=lru"), 400),
    "pre-empted": ((*PAGED, *TIGHT), 144),
    "pre-empted, block_hash": (
        (*PAGED, *TIGHT, "engine/prefix_cache=block_hash", "engine/eviction=lru"),
        144,
    ),
    "longest prefix match, pre-empted": (
        (
            *PAGED,
            *TIGHT,
            "engine/prefix_cache=radix",
            "engine/eviction=lru",
            "engine/policy=lpm",
        ),
        144,
    ),
    "swapped": (
        (*PAGED, *TIGHT, "engine.admission.preemption=swap", "engine/kv_offload=host"),
        144,
    ),
    "prepared": ((*PAGED, *PREPARED), 0),
    "prepared, pre-empted": ((*PAGED, *TIGHT, *PREPARED), 144),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_are_those_of_the_plain_loop(name: str, seed: int) -> None:
    overrides, pool = SETTINGS[name]
    limits: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 144, "kv_pool_tokens": pool}
    plain = tiny_engine(*overrides, **limits)
    free = make_traffic(seed).serve(plain)
    rng = random.Random(seed)
    # Tokens that the requests come to end half of them, at any place.
    stops = {
        i: (rng.choice(tokens),) for i, (tokens, _) in free.items() if tokens and rng.random() < 0.5
    }
    traffic = make_traffic(seed, stops)
    wanted, got = traffic.serve(plain), (engine := tiny_engine(*overrides, OVERLAPPED, **limits))
    served = traffic.serve(got)
    for i, (tokens, reason) in wanted.items():
        if i in traffic.aborted and "abort" in (reason, served[i][1]):
            shorter, longer = sorted([tokens, served[i][0]], key=len)
            assert longer[: len(shorter)] == shorter
        else:
            assert served[i] == (tokens, reason), i
    assert any(reason == "stop" for _, reason in served.values())
    assert engine.counters()["loop.steps_ahead"] > 0
    if "pre-empted" in name or name == "swapped":
        assert engine.counters()["scheduler.preemptions"] > 0


def test_a_stop_string_ends_a_request_whose_next_step_runs() -> None:
    plain, ahead = (tiny_engine(*PAGED, *more) for more in ((), (OVERLAPPED,)))
    if plain.tokenizer is None:
        pytest.skip("the tiny model has no tokenizer")
    prompt = [5, 9, 13, 40]
    text = plain.generate(prompt, SamplingParams(max_tokens=20, ignore_eos=True))[0].text
    stop = text[len(text) // 2 :][:2]
    params = SamplingParams(max_tokens=20, ignore_eos=True, stop=[stop])
    ours, theirs = ahead.generate([prompt] * 3, params), plain.generate([prompt] * 3, params)
    assert [o.text for o in ours] == [o.text for o in theirs]
    assert [o.token_ids for o in ours] == [o.token_ids for o in theirs]
    check_idle(ahead)


def test_a_stop_token_as_the_last_one_is_a_stop_and_no_length() -> None:
    plain, ahead = (tiny_engine(*more) for more in ((), (OVERLAPPED,)))
    prompt = [5, 9, 13, 40]
    tokens = plain.generate(prompt, SamplingParams(max_tokens=6, ignore_eos=True))[0].token_ids
    last = next(n for n, t in enumerate(tokens, start=1) if t not in tokens[: n - 1] and n > 1)
    params = SamplingParams(max_tokens=last, ignore_eos=True, stop_token_ids=[tokens[last - 1]])
    for engine in (plain, ahead):
        (output,) = engine.generate(prompt, params)
        assert output.outputs[0].finish_reason == "stop"
        assert output.token_ids == tokens[:last]


class Interrupted:
    """A step whose wait is interrupted once, as by Ctrl-C while the device works."""

    def __init__(self, real: Any) -> None:
        self.real, self.is_due = real, True
        self.is_read_first = real.is_read_first

    def result(self) -> Any:
        if self.is_due:
            self.is_due = False
            raise KeyboardInterrupt
        return self.real.result()


def test_an_interrupted_wait_loses_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ahead = (tiny_engine(*PAGED, *more) for more in ((), (OVERLAPPED,)))
    prompts = mixed_prompts(6, longest=30)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    wanted = [output.token_ids for output in plain.generate(prompts, params)]
    submit = ahead.parts.executor.submit
    monkeypatch.setattr(ahead.parts.executor, "submit", lambda plan: Interrupted(submit(plan)))
    for index, prompt in enumerate(prompts):
        ahead.add_request(prompt, params, str(index))
    got: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    num_interrupts = 0
    while ahead.has_unfinished():
        try:
            for output in ahead.step():
                got[output.request_id] += output.new_token_ids
        except KeyboardInterrupt:
            num_interrupts += 1
    assert num_interrupts > 10
    assert list(got.values()) == wanted
    assert all(step.device_us > 0 for step in ahead.steps)
    check_idle(ahead)
