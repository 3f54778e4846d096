"""Asks the drafter, and keeps its mistakes from the engine."""

from __future__ import annotations

import logging

from workbench.slots.drafter import DraftContext, Drafter, DraftTokens

_LOG = logging.getLogger(__name__)


class InvalidDraftError(ValueError):
    """A drafter proposed what it must not."""


class Drafting:
    """Proposals of a drafter that may fail.

    A request for which it raises or proposes what is not valid goes on without drafts until it
    ends; the others keep theirs.

    Parameters
    ----------
    vocab_size
        Ids from 0 on that are valid.
    """

    def __init__(self, drafter: Drafter, vocab_size: int) -> None:
        self.drafter = drafter
        self._num_failures = 0
        self._vocab_size = vocab_size
        self._failed: set[str] = set()
        self._has_warned = False

    def propose(self, context: DraftContext) -> DraftTokens:
        """Valid drafts by request, in the order of the context; none where the drafter failed."""
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
            reason = self._fault(draft, context.max_draft_tokens[index])
            if reason is not None:
                self._give_up(context.request_ids[index], InvalidDraftError(reason))
                valid[index] = []
        return DraftTokens(valid, drafts.probs)

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
        if healthy:
            for i, draft in zip(
                healthy, self.propose(context.take(healthy)).token_ids, strict=True
            ):
                drafts[i] = draft
        return DraftTokens(drafts)

    def _propose_one_by_one(self, context: DraftContext, error: Exception) -> DraftTokens:
        """Find out for whom the drafter fails, since the others need not suffer."""
        if len(context.request_ids) == 1:
            self._give_up(context.request_ids[0], error)
            return DraftTokens([[]])
        alone = [self.propose(context.take([i])) for i in range(len(context.request_ids))]
        return DraftTokens([drafts.token_ids[0] for drafts in alone])

    def _check_shape(self, drafts: DraftTokens, context: DraftContext) -> None:
        count = len(context.request_ids)
        if len(drafts.token_ids) != count:
            raise InvalidDraftError(
                f"it gave {len(drafts.token_ids)} lists of drafts for {count} requests"
            )

    def _fault(self, draft: list[int], limit: int) -> str | None:
        """What is wrong with a request's drafts."""
        limit = min(limit, self.drafter.num_lookahead_tokens)
        if not isinstance(draft, list):
            return f"it proposed {draft!r}, and drafts are a list"
        if len(draft) > limit:
            return f"it proposed {len(draft)} tokens where {limit} were allowed"
        if not all(type(token) is int for token in draft):
            return f"it proposed {draft}, and ids are integers"
        if min(draft) < 0 or max(draft) >= self._vocab_size:
            return f"it proposed {draft}, and ids are 0 to {self._vocab_size - 1}"
        return None

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
