"""Base of the drafters that run a model over the tokens which are known."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from workbench.core.errors import ConfigError
from workbench.engine.draft_runner import DraftDraws, DraftRunner, Span
from workbench.engine.draft_step import DraftStep
from workbench.slots.drafter import DraftContext, Drafter, DrafterBinding, DraftTokens
from workbench.slots.graph_runner import DRAFT, PreparedStep


@dataclass(frozen=True, slots=True)
class ModelDrafterConfig:
    """Options of every :class:`ModelDrafter`.

    Attributes
    ----------
    num_draft_tokens
        Drafts a request a step.
    """

    num_draft_tokens: int = 5


class ModelDrafter(Drafter):
    """Drafts token after token with a model whose KV lies in the blocks of the requests.

    It runs when it is asked for drafts, and first makes up for what it has missed, no more than one
    step's tokens at a time: while drafts are switched off it costs nothing. A request that it has
    not caught up with goes without drafts in that step.
    """

    config: ModelDrafterConfig

    def __init__(self, config: ModelDrafterConfig) -> None:
        super().__init__(config)
        if config.num_draft_tokens < 1:
            raise ConfigError(
                f"engine.drafter.num_draft_tokens={config.num_draft_tokens} must be 1 or more."
            )
        self.num_lookahead_tokens = self.num_kv_lookahead = config.num_draft_tokens
        self._runner: DraftRunner | None = None
        self._step: DraftStep | None = None
        self._passes_before = self._tokens_before = 0
        self.reset_counters()

    # -- what a drafter of this kind says of itself ------------------------------------------------

    def make_runner(self, binding: DrafterBinding) -> DraftRunner:
        """What runs the model."""
        raise NotImplementedError

    def num_run(self, request_id: str, row: int, known: np.ndarray) -> int:
        """Of a request's known tokens, how many the model has run; all but one at most."""
        raise NotImplementedError

    def note_run(self, request_id: str, span: Span, drafts: list[int]) -> None:
        """Known tokens were run, and all but the last of these drafts after them."""

    #: Positions that the model has.
    max_positions: int
    #: Most known tokens of a request that it has not run, if it drafted for it in the last step.
    most_missing: int = 1

    # -- the drafter -------------------------------------------------------------------------------

    def bind(self, binding: DrafterBinding) -> None:
        self._binding = binding
        self._runner = self.make_runner(binding)
        self._step = self._prepare(binding, self._runner)
        self._passes_before = self._tokens_before = 0

    def _prepare(self, binding: DrafterBinding, runner: DraftRunner) -> DraftStep | None:
        """The step that drafts from the device's state alone, where the graph runner takes one."""
        if not binding.graph_runner.prepares:
            return None
        each = self.most_missing
        most = binding.graph_runner.largest_verify(runner.attention, each)
        size = min(most, binding.table.padding_row)
        if not size:
            return None
        parts = dataclasses.replace(
            binding.step_parts, pool=runner.pool, attention=runner.attention, components={}
        )
        return DraftStep(parts, runner, size, each, self.config.num_draft_tokens)

    def prepared_steps(self) -> list[PreparedStep]:
        return [] if self._step is None else [self._step]

    def propose(self, context: DraftContext) -> DraftTokens:
        runner = self._runner
        assert runner is not None, "a drafter is bound before it drafts"
        limits = [
            min(limit, self.config.num_draft_tokens, self._room(runner, row, len(known)))
            for row, known, limit in zip(
                context.rows, context.token_ids, context.max_draft_tokens, strict=True
            )
        ]
        drafts = self._propose_prepared(context, limits, runner)
        if drafts is None:
            drafts = self._propose_eager(context, limits, runner)
        self._drafted_tokens += sum(map(len, drafts.token_ids))
        return drafts

    def _propose_prepared(
        self, context: DraftContext, limits: list[int], runner: DraftRunner
    ) -> DraftTokens | None:
        """Drafts of the prepared step; None where there is none for this batch."""
        step, runs = self._step, self._binding.graph_runner
        wanted = [i for i, limit in enumerate(limits) if limit > 0]
        if step is None or not wanted:
            return None
        size = runs.dispatch(DRAFT, len(wanted))
        table, rows = self._binding.table, [context.rows[i] for i in wanted]
        if size is None or not all(table.params[row].is_greedy for row in rows):
            return None
        spans = []
        for i, row in zip(wanted, rows, strict=True):
            known = len(context.token_ids[i])
            start = self.num_run(context.request_ids[i], row, context.token_ids[i])
            if known < step.tokens_each or known - start > step.tokens_each:
                return None
            spans.append(Span(row, start, known))
        room = [min(runner.capacity(row), self.max_positions) for row in rows]
        step.fill(rows, room, size)
        runs.run(DRAFT, size)
        tokens = step.drafts[: len(rows)].tolist()
        drafts: list[list[int]] = [[] for _ in limits]
        for i, span, found in zip(wanted, spans, tokens, strict=True):
            drafts[i] = found[: limits[i]]
            self.note_run(context.request_ids[i], span, drafts[i])
        passes = self.config.num_draft_tokens
        runner.num_passes += passes
        runner.num_tokens += len(rows) * (step.tokens_each + passes - 1)
        return DraftTokens(drafts)

    def _propose_eager(
        self, context: DraftContext, limits: list[int], runner: DraftRunner
    ) -> DraftTokens:
        binding = self._binding
        drafts: list[list[int]] = [[] for _ in limits]
        ready, behind = self._spans(context, limits)
        if behind:
            runner.run([span for _, span in behind])
            for i, span in behind:
                self.note_run(context.request_ids[i], span, [])
        probs: list[torch.Tensor | None] | None = None
        if ready:
            spans = [span for _, span in ready]
            draws = DraftDraws(
                binding.table,
                [span.row for span in spans],
                [span.end for span in spans],
                binding.reads_probs,
            )
            longest = max(limits[i] for i, _ in ready)
            tokens = runner.draft(spans, longest, draws.draw).tolist()
            found = draws.probs()
            if found is not None:
                probs = [None] * len(drafts)
            for k, (i, span) in enumerate(ready):
                drafts[i] = tokens[k][: limits[i]]
                self.note_run(context.request_ids[i], span, drafts[i])
                if probs is not None and found is not None:
                    probs[i] = found[k]
        return DraftTokens(drafts, probs)

    def _room(self, runner: DraftRunner, row: int, num_known: int) -> int:
        """Drafts whose KV there is room for: the last of them needs none."""
        return min(runner.capacity(row), self.max_positions) - num_known + 1

    def _spans(
        self, context: DraftContext, limits: list[int]
    ) -> tuple[list[tuple[int, Span]], list[tuple[int, Span]]]:
        """What to run of each request, by index: up to its last token; and of those for which one
        step is too little, a first part."""
        budget = self._binding.step_tokens
        ready: list[tuple[int, Span]] = []
        behind: list[tuple[int, Span]] = []
        for i, (row, known) in enumerate(zip(context.rows, context.token_ids, strict=True)):
            if limits[i] < 1 or budget < 1:
                continue
            start, end = self.num_run(context.request_ids[i], row, known), len(known)
            if end - start <= budget:
                ready.append((i, Span(row, start, end)))
                budget -= end - start
            else:
                behind.append((i, Span(row, start, start + budget)))
                budget = 0
        return ready, behind

    def finish(self, request_id: str) -> None: ...

    def counters(self) -> dict[str, float]:
        runner = self._runner
        passes = 0 if runner is None else runner.num_passes - self._passes_before
        tokens = 0 if runner is None else runner.num_tokens - self._tokens_before
        return {
            "drafted_tokens": self._drafted_tokens,
            "draft_passes": passes,
            "draft_run_tokens": tokens,
        }

    def reset_counters(self) -> None:
        self._drafted_tokens = 0
        if self._runner is not None:
            self._passes_before = self._runner.num_passes
            self._tokens_before = self._runner.num_tokens


def blocks_of(binding: DrafterBinding, row: int) -> np.ndarray:
    """Host view of the blocks that a row has, int32."""
    table = binding.table
    blocks: np.ndarray = table.host_block_table[row, : table.num_blocks[row]]
    return blocks
