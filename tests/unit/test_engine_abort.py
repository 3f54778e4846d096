"""Aborts, interrupts and faults: what was held is free again, and the engine serves on."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.helpers.engines import (
    check_idle,
    mixed_prompts,
    run_to_end,
    shared_engine,
    tiny_engine,
    together,
)
from tests.helpers.tiny_models import hf_greedy, tiny_model
from workbench.core.sampling import SamplingParams
from workbench.core.step import ModelRunnerOutput, SchedulerOutput
from workbench.engine.engine import Engine
from workbench.slots.executor import Executor

ALL = together()
SMALL_CHUNKS = "engine.prefill.chunk_tokens=6"
GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)


@pytest.fixture(params=["core", "all techniques"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = (
        shared_engine(max_num_seqs=3)
        if request.param == "core"
        else shared_engine(SMALL_CHUNKS, techniques=ALL, max_num_seqs=3)
    )
    yield engine
    try:
        check_idle(engine)
    finally:
        for name in engine.unfinished_ids():
            engine.abort(name)


def rows_in_use(engine: Engine) -> set[str]:
    return set(engine.parts.executor.runner.table.row_of)  # type: ignore[attr-defined]


def assert_serves(engine: Engine) -> None:
    """More requests than rows all get HF's tokens, and no row is lost."""
    check_idle(engine)
    prompts = mixed_prompts(5, seed=9)
    outputs = engine.generate(prompts, GREEDY)
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.error is None
        assert output.token_ids == hf_greedy(tiny_model("llama"), prompt, 10)
    assert len(rows_in_use(engine)) <= 3
    check_idle(engine)


@pytest.mark.parametrize("seed", range(4))
def test_random_aborts_leave_the_others_alone(engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    prompts = mixed_prompts(14, seed=seed)
    names, aborted = [], set()
    tokens: dict[str, list[int]] = {}
    pending = list(enumerate(prompts))
    while pending or engine.has_unfinished():
        while pending and rng.random() < 0.5:
            index, prompt = pending.pop(0)
            names.append(engine.add_request(prompt, GREEDY, f"s{seed}-{index}"))
        if names and rng.random() < 0.25:
            name = rng.choice(names)  # it may wait, run, or have ended
            if name in engine.unfinished_ids():
                aborted.add(name)
            engine.abort(name)
            engine.check_integrity()
        for output in engine.step():
            assert output.request_id not in aborted, "an aborted request still speaks"
            tokens[output.request_id] = list(output.token_ids)
        engine.check_integrity()
    assert 2 <= len(aborted) < len(names)
    for name, prompt in zip(names, prompts, strict=True):
        if name not in aborted:
            assert tokens[name] == hf_greedy(tiny_model("llama"), prompt, 10)
    assert_serves(engine)


@pytest.mark.parametrize("steps", range(8))
def test_abort_after_any_number_of_steps(engine: Engine, steps: int) -> None:
    for index, prompt in enumerate(mixed_prompts(6)):
        engine.add_request(prompt, dataclasses.replace(GREEDY, n=1 + index % 2))
    for _ in range(steps):
        engine.step()
    for name in engine.unfinished_ids():
        engine.abort(name)
        engine.check_integrity()
    assert engine.step() == []
    assert_serves(engine)


def test_abort_ends_every_completion_and_unknown_ids_are_ignored(engine: Engine) -> None:
    name = engine.add_request([5, 6, 7], dataclasses.replace(GREEDY, n=3))
    engine.step()
    engine.abort("nobody")
    engine.abort(name)
    engine.abort(name)
    check_idle(engine)


def test_id_of_an_aborted_request_can_be_used_at_once(engine: Engine) -> None:
    engine.add_request([5] * 20, GREEDY, "again")
    engine.step()
    engine.abort("again")
    engine.add_request([6, 7], GREEDY, "again")
    assert run_to_end(engine) == {"again": hf_greedy(tiny_model("llama"), [6, 7], 10)}


class Faulty(Executor):
    """Raises at one call, before or after the real executor has run."""

    def __init__(self, real: Executor, at: int, after: bool, error: type[BaseException]) -> None:
        super().__init__()
        self.real, self.left, self.after, self.error = real, at, after, error
        self.runner = real.runner  # type: ignore[attr-defined]

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error("injected")
        result = self.real.execute(plan)
        if self.left == 0:
            raise self.error("injected")
        return result


def with_fault(engine: Engine, body: Callable[[], Any], **fault: Any) -> None:
    parts = engine.parts
    engine.parts = dataclasses.replace(parts, executor=Faulty(parts.executor, **fault))
    try:
        body()
    finally:
        engine.parts = parts


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_interrupt_in_generate_leaves_the_engine_empty_and_usable(
    engine: Engine, after: bool, error: type[BaseException]
) -> None:
    lengths = [1, 4, 9, 2, 6, 3]
    params = [dataclasses.replace(GREEDY, max_tokens=n) for n in lengths]
    for at in (1, 4, 9):
        # Interrupted over and over: a row lost each time would soon leave none.
        with pytest.raises(error, match="injected"):
            with_fault(
                engine,
                lambda: engine.generate(mixed_prompts(6), params),
                at=at,
                after=after,
                error=error,
            )
        check_idle(engine)
    assert_serves(engine)


def test_interrupt_while_prompts_are_queued(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize = engine._tokenize

    def interrupted(prompt: Any) -> list[int]:
        if prompt == [7]:
            raise KeyboardInterrupt
        return tokenize(prompt)

    monkeypatch.setattr(engine, "_tokenize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[5], [6], [7]], GREEDY)
    check_idle(engine)


def test_finished_requests_give_their_rows_back() -> None:
    engine = tiny_engine(max_num_seqs=2)
    for _ in range(4):
        engine.generate(mixed_prompts(5), GREEDY)
    engine.add_request([5], GREEDY, "last")
    engine.step()
    assert rows_in_use(engine) == {"last"}


def test_step_on_an_empty_engine_does_nothing(engine: Engine) -> None:
    assert engine.step() == []
    assert len(engine.steps) == 0
    assert not engine.has_unfinished()
    assert engine.unfinished_ids() == []
