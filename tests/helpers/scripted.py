"""An engine whose tokens are written in advance: a scripted executor in the place of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tests.helpers.engines import shared_engine
from workbench.core.outputs import RequestOutput
from workbench.core.sampling import SamplingParams
from workbench.core.step import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from workbench.engine.engine import Engine
from workbench.slots.executor import Executor


class ScriptedExecutor(Executor):
    """Every request is answered with ``script``; right drafts bring several tokens a step."""

    def __init__(self, script: Sequence[int], num_drafts: int) -> None:
        super().__init__()
        self.script = list(script)
        self.num_drafts = num_drafts
        self.num_done: dict[str, int] = {}

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        tokens: list[list[int]] = []
        drafts: list[list[int]] = []
        logprobs: list[list[TokenLogprobs] | None] = []
        for new in plan.new_requests:
            self.num_done[new.request_id] = 0
        for i, name in enumerate(plan.request_ids):
            done = self.num_done[name]
            count = plan.num_draft_tokens[i] + 1 if plan.samples[i] else 0
            tokens.append(self.script[done : done + count])
            self.num_done[name] = done + count
            after = self.num_done[name]
            drafts.append(self.script[after : after + self.num_drafts] if count else [])
            logprobs.append([TokenLogprobs(t, -float(t)) for t in tokens[-1]])
        return ModelRunnerOutput(tokens, drafts, logprobs)


def scripted_engine(script: Sequence[int], num_drafts: int, tokenizer: Any = None) -> Engine:
    """An engine of its own books over the parts of a shared one, with the script for a model."""
    parts = shared_engine("engine/scheduler=continuous", "engine/kv_cache=paged").parts
    return Engine(
        dataclasses.replace(
            parts,
            executor=ScriptedExecutor(script, num_drafts),
            tokenizer=tokenizer or parts.tokenizer,
            vocab_size=1 << 20,
        )
    )


def run_script(
    script: Sequence[int],
    params: SamplingParams,
    num_drafts: int = 0,
    tokenizer: Any = None,
) -> tuple[RequestOutput, list[int]]:
    """The final output of one request, and its tokens as they were streamed."""
    engine = scripted_engine(script, num_drafts, tokenizer)
    engine.add_request([5, 6, 7], params, "r")
    streamed: list[int] = []
    last: RequestOutput | None = None
    while engine.has_unfinished():
        for output in engine.step():
            streamed += output.new_token_ids
            last = output
        engine.check_integrity()
    assert last is not None
    assert last.finished
    return last, streamed
