"""Asks the drafter, and keeps its mistakes from the engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from workbench.core.step import SchedulerOutput
from workbench.engine.trees import fault_of, is_chain
from workbench.slots.draft_length import DraftLength, FullLength, VerifiedStep
from workbench.slots.drafter import (
    DraftContext,
    Drafter,
    DraftTokens,
    FollowedStep,
    PreparedTokens,
)

_LOG = logging.getLogger(__name__)


class InvalidDraftError(ValueError):
    """A drafter proposed what it must not."""


class ProposedProbs:
    """What the drafts that wait for verification were drawn from, by row of the request table."""

    def __init__(self) -> None:
        self._by_row: dict[int, torch.Tensor] = {}

    def note(self, rows: Sequence[int], drafts: DraftTokens) -> None:
        """Keep those of new drafts; drafts that were there before are void."""
        if drafts.probs is None and not self._by_row:
            return
        for k, row in enumerate(rows):
            probs = None if drafts.probs is None else drafts.probs[k]
            if probs is not None and drafts.token_ids[k]:
                self._by_row[row] = probs[: len(drafts.token_ids[k])]
            else:
                self._by_row.pop(row, None)

    def gather(
        self, rows: Sequence[int], num_drafts: Sequence[int], token_ids: torch.Tensor
    ) -> torch.Tensor | None:
        """Float32 ``[B, K, V]`` for the drafts ``token_ids[B, K]`` of these rows, one-hot where a
        request's were proposed with certainty; None where all were."""
        found = [
            (b, count, self._by_row[row])
            for b, (row, count) in enumerate(zip(rows, num_drafts, strict=True))
            if count and row in self._by_row
        ]
        if not found:
            return None
        out = torch.zeros(*token_ids.shape, found[0][2].shape[1], device=token_ids.device)
        out.scatter_(-1, token_ids.clamp(min=0).unsqueeze(-1), 1.0)
        for b, count, probs in found:
            out[b, :count] = probs[:count]
        return out


class Drafting:
    """Proposals of a drafter that may fail.

    A request for which it raises or proposes what is not valid goes on without drafts until it
    ends; the others keep theirs.

    Parameters
    ----------
    vocab_size
        Ids from 0 on that are valid.
    draft_length
        How many are asked for; by default all that the drafter has.
    """

    def __init__(
        self, drafter: Drafter, vocab_size: int, draft_length: DraftLength | None = None
    ) -> None:
        self.drafter = drafter
        self.draft_length: DraftLength = draft_length or FullLength()
        self._num_allowed = drafter.num_lookahead_tokens
        self._decided: int | None = None  # for the proposal to come
        self._known_at: float | None = None  # when the tokens of the last step were
        self._num_failures = 0
        self._vocab_size = vocab_size
        self._failed: set[str] = set()
        self._has_warned = False

    def observe(self, plan: SchedulerOutput, tokens: list[list[int]]) -> None:
        """Tell the draft length of a step whose ``tokens``, by sampling request, are known now."""
        if not self.draft_length.observes:
            return
        now, before = time.perf_counter(), self._known_at
        self._known_at = now if tokens else None  # a step without tokens is not waited for
        drafts = plan.num_draft_tokens
        if len(tokens) != len(drafts):
            drafts = [n for n, samples in zip(drafts, plan.samples, strict=True) if samples]
        runs_prompts = plan.total_num_scheduled_tokens != len(tokens) + sum(drafts)
        self.draft_length.observe(
            VerifiedStep(
                num_drafts=drafts,
                num_accepted=[len(new) - 1 for new in tokens],
                num_allowed=self._num_allowed,
                seconds=None if before is None or runs_prompts else now - before,
            )
        )

    def decide(self, num_requests: int) -> bool:
        """Settle before a step how many drafts of so many requests are to follow it; whether any
        are."""
        self._decided = self.draft_length.choose(num_requests) if num_requests else 0
        return self._decided > 0

    def follow(self, step: FollowedStep) -> None:
        """Show the drafter a step; where it fails, all of the step's requests lose their drafts."""
        try:
            self.drafter.follow(step)
        except Exception as error:
            for request_id in step.request_ids:
                if request_id not in self._failed:
                    self._give_up(request_id, error)

    def draft_ahead(self, request_ids: list[str], rows: list[int], step: PreparedTokens) -> None:
        """Let the drafter begin behind a step that is queued; where it fails, as :meth:`follow`."""
        try:
            self.drafter.draft_ahead(rows, step)
        except Exception as error:
            for request_id in request_ids:
                if request_id not in self._failed:
                    self._give_up(request_id, error)

    def propose(self, context: DraftContext) -> DraftTokens:
        """Valid drafts by request, in the order of the context; none where the drafter failed, and
        no more than the draft length says."""
        if self.draft_length.observes and context.request_ids:
            allowed, self._decided = self._decided, None
            if allowed is None:
                allowed = self.draft_length.choose(len(context.request_ids))
            self._num_allowed = allowed
            if not allowed:
                return DraftTokens([[] for _ in context.request_ids])
            context.max_draft_tokens = [min(allowed, n) for n in context.max_draft_tokens]
        return self._propose(context)

    def _propose(self, context: DraftContext) -> DraftTokens:
        if not self._failed.isdisjoint(context.request_ids):
            return self._propose_to_some(context)
        try:
            drafts = self.drafter.propose(context)
            self._check_shape(drafts, context)
        except Exception as error:
            return self._propose_one_by_one(context, error)
        valid = list(drafts.token_ids)
        for index, draft in enumerate(valid):
            if draft == []:
                continue
            probs = None if drafts.probs is None else drafts.probs[index]
            limit = context.max_draft_tokens[index]
            if drafts.on_device is not None and drafts.on_device[index]:
                reason = self._length_fault(draft, limit)
            else:
                reason = self._fault(draft, probs, limit)
            if reason is None and drafts.parents is not None:
                reason = self._tree_fault(draft, drafts.parents[index])
            if reason is not None:
                self._give_up(context.request_ids[index], InvalidDraftError(reason))
                valid[index] = []
        return DraftTokens(valid, drafts.probs, drafts.parents, drafts.on_device)

    def finish(self, request_id: str) -> None:
        """Forget a request."""
        self._failed.discard(request_id)
        try:
            self.drafter.finish(request_id)
        except Exception as error:
            self._give_up(request_id, error)
            self._failed.discard(request_id)

    def take_num_failures(self) -> int:
        """Requests that lost their drafts since the last call."""
        count, self._num_failures = self._num_failures, 0
        return count

    def _propose_to_some(self, context: DraftContext) -> DraftTokens:
        """Leave out the requests that go on without drafts."""
        healthy = [i for i, name in enumerate(context.request_ids) if name not in self._failed]
        drafts: list[list[int]] = [[] for _ in context.request_ids]
        probs: list[torch.Tensor | None] = [None] * len(drafts)
        parents: list[list[int] | None] = [None] * len(drafts)
        on_device = [False] * len(drafts)
        if healthy:
            found = self._propose(context.take(healthy))
            for k, i in enumerate(healthy):
                drafts[i] = found.token_ids[k]
                probs[i] = None if found.probs is None else found.probs[k]
                parents[i] = None if found.parents is None else found.parents[k]
                on_device[i] = found.on_device is not None and found.on_device[k]
        return DraftTokens(drafts, probs, parents, on_device)

    def _propose_one_by_one(self, context: DraftContext, error: Exception) -> DraftTokens:
        """Find out for whom the drafter fails, since the others need not suffer."""
        if len(context.request_ids) == 1:
            self._give_up(context.request_ids[0], error)
            return DraftTokens([[]])
        alone = [self._propose(context.take([i])) for i in range(len(context.request_ids))]
        return DraftTokens(
            [drafts.token_ids[0] for drafts in alone],
            [None if drafts.probs is None else drafts.probs[0] for drafts in alone],
            [None if drafts.parents is None else drafts.parents[0] for drafts in alone],
            [drafts.on_device is not None and drafts.on_device[0] for drafts in alone],
        )

    def _check_shape(self, drafts: DraftTokens, context: DraftContext) -> None:
        count = len(context.request_ids)
        if len(drafts.token_ids) != count:
            raise InvalidDraftError(
                f"it gave {len(drafts.token_ids)} lists of drafts for {count} requests"
            )
        if drafts.probs is not None and len(drafts.probs) != count:
            raise InvalidDraftError(
                f"it gave probabilities of {len(drafts.probs)} requests for {count} requests"
            )
        if drafts.parents is not None and len(drafts.parents) != count:
            raise InvalidDraftError(
                f"it gave trees of {len(drafts.parents)} requests for {count} requests"
            )

    def _fault(self, draft: list[int], probs: torch.Tensor | None, limit: int) -> str | None:
        """What is wrong with a request's drafts."""
        if not isinstance(draft, list):
            return f"it proposed {draft!r}, and drafts are a list"
        reason = self._length_fault(draft, limit)
        if reason is not None:
            return reason
        if not all(type(token) is int for token in draft):
            return f"it proposed {draft}, and ids are integers"
        if min(draft) < 0 or max(draft) >= self._vocab_size:
            return f"it proposed {draft}, and ids are 0 to {self._vocab_size - 1}"
        if probs is not None:
            rows, width = probs.shape
            if rows < len(draft) or width != self._vocab_size:
                return (
                    f"its probabilities are {rows} x {width}, and {len(draft)} drafts over "
                    f"{self._vocab_size} ids need {len(draft)} x {self._vocab_size}"
                )
        return None

    def _length_fault(self, draft: list[int], limit: int) -> str | None:
        """Whether a request has more drafts than were asked for."""
        limit = min(limit, self.drafter.num_lookahead_tokens)
        if len(draft) > limit:
            return f"it proposed {len(draft)} tokens where {limit} were allowed"
        return None

    def _tree_fault(self, draft: list[int], parents: list[int] | None) -> str | None:
        """What is wrong with how a request's drafts hang together."""
        if parents is None or (is_chain(parents) and len(parents) == len(draft)):
            return None
        if not self.drafter.proposes_trees:
            return "it proposed a tree, and says that it proposes none"
        return fault_of(parents, draft)

    def _give_up(self, request_id: str, error: Exception) -> None:
        self._failed.add(request_id)
        self._num_failures += 1
        if not self._has_warned:
            self._has_warned = True
            _LOG.warning(
                "drafter %s failed for request %r, which goes on without drafts: %s: %s. "
                "Failures from now on are only counted, in drafter.failures.",
                type(self.drafter).__name__,
                request_id,
                type(error).__name__,
                error,
            )
