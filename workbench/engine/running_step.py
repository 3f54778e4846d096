"""A step that is queued on the device, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from workbench.core.step import ModelRunnerOutput, SchedulerOutput, TokenLogprobs
from workbench.engine.step_inputs import StepInputs
from workbench.engine.tokens_to_read import TokensToRead
from workbench.slots.verifier import Accepted

if TYPE_CHECKING:
    from workbench.engine.model_runner import ModelRunner


class CountedTokens(NamedTuple):
    """Tokens that were booked before they were known: rows, their owners then, places in them."""

    rows: np.ndarray
    owners: np.ndarray
    places: np.ndarray


class RunningStep:
    """A step that is queued on the device.

    Holds all that its result needs, since the inputs of a steady batch are brought up to date in
    place by the next step.
    """

    def __init__(
        self,
        runner: ModelRunner,
        plan: SchedulerOutput,
        inputs: StepInputs,
        accepted: Accepted | None,
        clock: PartClock,
        verified: bool,
    ) -> None:
        self._runner, self._plan, self._clock = runner, plan, clock
        self._inputs = inputs
        self._steady = runner.inputs.steady
        self._sampling, self._first_row = inputs.sampling, inputs.first_row
        self._num_context_tokens = inputs.num_context_tokens
        self._prepared = inputs.mixed if inputs.prepared is None else inputs.prepared
        self._verified = verified  # by the prepared step itself
        self._has_drafts = inputs.max_drafts > 0
        self._logprobs = None if accepted is None else accepted.logprobs
        self._tokens = None if accepted is None else TokensToRead(accepted.token_ids)
        path = None if accepted is None else accepted.path
        self._path = None if path is None else TokensToRead(path)
        self._drawn: TokensToRead | None = None
        if runner.parts.drafter.reads_drawn and accepted is not None and self._has_drafts:
            assert accepted.drawn is not None, "the verifier tells what was drawn"
            self._drawn = TokensToRead(accepted.drawn)
        #: Whether drafts may follow its tokens, or are verified in it.
        self.is_read_first = runner.may_draft(plan, inputs)
        self._counted: CountedTokens | None = None
        if self.is_read_first:
            return
        if runner.parts.drafter.num_lookahead_tokens:
            self._counted = runner.book_silently(plan, inputs)
        else:
            runner.book(inputs)

    def result(self) -> ModelRunnerOutput:
        """Wait for the step's tokens; to be called once, in the order of the steps."""
        clock = self._clock
        clock.resume()
        tokens = [] if self._tokens is None else self._tokens.read()
        if self._has_drafts:
            tokens = [[t for t in row if t >= 0] for row in tokens]
        rows = [] if self._logprobs is None else self._rows_of(tokens)
        if self._verified:
            num_accepted = [len(row) - 1 for row in tokens]
            self._runner.parts.verifier.note_prepared(self._plan.num_draft_tokens, num_accepted)
        clock.lap("wait")
        plan, steady = self._plan, self._steady
        count = len(plan.request_ids)
        if self.is_read_first:
            with torch.inference_mode():
                drafts = self._runner.draft(plan, self._inputs, tokens, self._drawn)
        else:
            if self._counted is not None:
                self._runner.note_silently(plan, self._counted, tokens)
            drafts = [[] for _ in tokens] if steady is None else steady.no_drafts
        clock.lap("draft")
        by_request, drafts_by_request = tokens, drafts
        if len(self._sampling) != count:
            by_request, drafts_by_request = [[] for _ in range(count)], [[] for _ in range(count)]
            for k, i in enumerate(self._sampling):
                by_request[i], drafts_by_request[i] = tokens[k], drafts[k]
        logprobs: list[list[TokenLogprobs] | None] = (
            [None] * count if steady is None else steady.no_logprobs
        )
        if self._logprobs is not None:
            logprobs = [None] * count
            for k, i in enumerate(self._sampling):
                entries = [self._logprobs[row] for row in rows[k]]
                logprobs[i] = [e for e in entries if e is not None] or None
        clock.lap("collect")
        return ModelRunnerOutput(
            token_ids=by_request,
            draft_token_ids=drafts_by_request,
            logprobs=logprobs,
            num_context_tokens=self._num_context_tokens,
            num_padded_tokens=0 if self._prepared is None else self._prepared.num_padded_tokens,
            graph_mode="eager" if self._prepared is None else "graph",
            num_draft_failures=self._runner.drafting.take_num_failures(),
            timings_us=clock.laps,
            starts_s=clock.starts,
        )

    def _rows_of(self, tokens: list[list[int]]) -> list[Sequence[int]]:
        """Rows of logits that each request's tokens were drawn from."""
        if self._path is None:
            return [range(f, f + len(t)) for f, t in zip(self._first_row, tokens, strict=True)]
        return [
            [first, *(first + place for place in path if place >= 0)]
            for first, path in zip(self._first_row, self._path.read(), strict=True)
        ]


class PartClock:
    """Microseconds by part of a step, and when each part began (``perf_counter``)."""

    __slots__ = ("_last", "laps", "starts")

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}
        self.starts: dict[str, float] = {}

    def resume(self) -> None:
        """Leave out what has passed since the last lap."""
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.starts[part] = self._last
        self.laps[part] = (now - self._last) * 1e6
        self._last = now
