"""Slot ``drafter``: guesses of what comes next, for the verifier to check."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    num_prompt_tokens : list[int]
        How many of the known tokens are prompt.
    hidden_states : Tensor[B, H] or None
        Hidden state behind each request's last logits, for drafters that read the target; None
        after a prepared step, which keeps none.
    """

    request_ids: list[str]
    token_ids: list[np.ndarray]
    max_draft_tokens: list[int]
    num_prompt_tokens: list[int]
    hidden_states: torch.Tensor | None = None

    def take(self, indices: list[int]) -> DraftContext:
        """The same of some of the requests."""
        hidden = self.hidden_states
        return DraftContext(
            request_ids=[self.request_ids[i] for i in indices],
            token_ids=[self.token_ids[i] for i in indices],
            max_draft_tokens=[self.max_draft_tokens[i] for i in indices],
            num_prompt_tokens=[self.num_prompt_tokens[i] for i in indices],
            hidden_states=None if hidden is None else hidden[indices],
        )


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """Proposals by request.

    Attributes
    ----------
    probs : Tensor[B, K, V] or list of (Tensor[K, V] or None), or None
        What the drafts were drawn from, float32, by request and position, where they were not
        proposed with certainty. The numbers that they were drawn with must be others than those of
        the request's seed (``uniform_from_seed``), with which they are tested.
    """

    token_ids: list[list[int]]
    probs: torch.Tensor | Sequence[torch.Tensor | None] | None = None


@dataclass(frozen=True, slots=True)
class DrafterHost:
    """What a drafter with weights of its own is loaded beside.

    Attributes
    ----------
    target
        The model that drafts are for, a ``workbench.models.decoder.Decoder`` with its weights.
    weights
        ``checkpoint``, or ``random``: then the drafter draws its own as well, by ``seed``.
    """

    target: Any
    device: torch.device
    dtype: torch.dtype
    weights: str = "checkpoint"
    seed: int = 0


class Drafter(Component):
    """Proposes tokens. Reads the context, keeps what it needs by request id, forgets on finish.

    Where it raises or proposes what is not valid, that request goes on without drafts.
    """

    #: Whether it may propose anything.
    proposes: bool = True
    #: Whether it reads ``DraftContext.hidden_states``.
    reads_hidden_states: bool = False
    #: Most tokens it proposes for one request; sizes buffers and KV look-ahead.
    num_lookahead_tokens: int = 0

    def load(self, host: DrafterHost) -> None:
        """Get ready beside a target; called once, before the KV pool is sized.

        Raises
        ------
        WorkbenchError
            Its weights are missing or do not fit the target.
        """

    @property
    def weight_bytes(self) -> int:
        """Bytes of its own weights on the device."""
        return 0

    @abstractmethod
    def propose(self, context: DraftContext) -> DraftTokens:
        """One list a request, in order, of ids of the vocabulary, each no longer than
        ``max_draft_tokens`` and ``num_lookahead_tokens``."""

    @abstractmethod
    def finish(self, request_id: str) -> None:
        """Forget a request."""


class NoDrafter(Drafter):
    """Proposes nothing: the null object."""

    proposes = False

    def propose(self, context: DraftContext) -> DraftTokens:
        return DraftTokens([[] for _ in context.request_ids])

    def finish(self, request_id: str) -> None: ...
