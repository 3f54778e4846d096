"""Base of the drafters that run a model over the tokens which are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from workbench.core.errors import ConfigError
from workbench.engine.draft_runner import DraftDraws, DraftRunner, Span
from workbench.slots.drafter import DraftContext, Drafter, DrafterBinding, DraftTokens


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
        self._passes_before = self._tokens_before = 0
        self.reset_counters()

    # -- what a drafter of this kind says of itself ------------------------------------------------

    def make_runner(self, binding: DrafterBinding) -> DraftRunner:
        """What runs the model."""
        raise NotImplementedError

    def num_run(self, row: int, num_known: int) -> int:
        """Of a row's known tokens, how many the model has run; all but one at most."""
        raise NotImplementedError

    def note_run(self, span: Span) -> None:
        """Known tokens were run."""

    #: Positions that the model has.
    max_positions: int

    # -- the drafter -------------------------------------------------------------------------------

    def bind(self, binding: DrafterBinding) -> None:
        self._binding = binding
        self._runner = self.make_runner(binding)
        self._passes_before = self._tokens_before = 0

    def propose(self, context: DraftContext) -> DraftTokens:
        runner, binding = self._runner, self._binding
        assert runner is not None, "a drafter is bound before it drafts"
        drafts: list[list[int]] = [[] for _ in context.rows]
        limits = [
            min(limit, self.config.num_draft_tokens, self._room(runner, row, len(known)))
            for row, known, limit in zip(
                context.rows, context.token_ids, context.max_draft_tokens, strict=True
            )
        ]
        ready, behind = self._spans(context, limits)
        if behind:
            runner.run(behind)
            for span in behind:
                self.note_run(span)
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
                self.note_run(span)
                drafts[i] = tokens[k][: limits[i]]
                if probs is not None and found is not None:
                    probs[i] = found[k]
        self._drafted_tokens += sum(map(len, drafts))
        return DraftTokens(drafts, probs)

    def _room(self, runner: DraftRunner, row: int, num_known: int) -> int:
        """Drafts whose KV there is room for: the last of them needs none."""
        return min(runner.capacity(row), self.max_positions) - num_known + 1

    def _spans(
        self, context: DraftContext, limits: list[int]
    ) -> tuple[list[tuple[int, Span]], list[Span]]:
        """What to run of each request: up to its last token, by index; and of those for which one
        step is too little, a first part."""
        budget = self._binding.step_tokens
        ready: list[tuple[int, Span]] = []
        behind: list[Span] = []
        for i, (row, known) in enumerate(zip(context.rows, context.token_ids, strict=True)):
            if limits[i] < 1 or budget < 1:
                continue
            start, end = self.num_run(row, len(known)), len(known)
            if end - start <= budget:
                ready.append((i, Span(row, start, end)))
                budget -= end - start
            else:
                behind.append(Span(row, start, start + budget))
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
