"""Slot ``drafter``: guesses of what comes next, for the verifier to check."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from workbench.slots.component import Component


@dataclass(slots=True)
class DraftContext:
    """What a drafter may look at after a step, for ``B`` requests that yielded a token.

    Attributes
    ----------
    token_ids : list[ndarray[int32]]
        Known tokens of each request, prompt and output, as views that must not be written.
    max_draft_tokens : list[int]
        Drafts that are worth proposing (the request's own limit less one).
    hidden_states : Tensor[B, H] or None
        Hidden state behind each request's last logits, for drafters that read the target; None
        after a prepared step, which keeps none.
    """

    request_ids: list[str]
    token_ids: list[np.ndarray]
    max_draft_tokens: list[int]
    hidden_states: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """Proposals by request; ``probs`` where the drafter drew them from a distribution."""

    token_ids: list[list[int]]
    probs: torch.Tensor | None = None


class Drafter(Component):
    """Proposes tokens. Reads the context, keeps what it needs by request id, forgets on finish."""

    #: Most tokens it proposes for one request; sizes buffers and KV look-ahead.
    num_lookahead_tokens: int = 0

    @abstractmethod
    def propose(self, context: DraftContext) -> DraftTokens:
        """One list a request, in order, each no longer than ``max_draft_tokens``."""

    @abstractmethod
    def finish(self, request_id: str) -> None:
        """Forget a request."""


class NoDrafter(Drafter):
    """Proposes nothing: the null object."""

    def propose(self, context: DraftContext) -> DraftTokens:
        return DraftTokens([[] for _ in context.request_ids])

    def finish(self, request_id: str) -> None: ...
