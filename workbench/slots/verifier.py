"""Slot ``verifier``: how many of the drafts hold, and what comes after them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from workbench.core.step import TokenLogprobs
from workbench.slots.component import Component
from workbench.slots.sampler import Sampler, SamplingMetadata


@dataclass(frozen=True, slots=True)
class DraftsToVerify:
    """Drafts in the batch: ``L`` rows of logits of ``B`` requests that yield a token.

    Attributes
    ----------
    token_ids : Tensor[B, K] int64
        Drafts, padded with -1; ``K`` is the most drafts of any request, 0 without drafts.
    first_row : Tensor[B] int64
        Request ``b`` owns rows ``first_row[b] .. first_row[b] + num_drafts[b]``; the row after
        the last draft yields the bonus token.
    """

    token_ids: torch.Tensor
    first_row: torch.Tensor


@dataclass(frozen=True, slots=True)
class Accepted:
    """New tokens a request: the accepted drafts and one token of the target's own.

    Attributes
    ----------
    token_ids : Tensor[B, K + 1] int64
        On the device, padded with -1 after each request's last token.
    logprobs : list or None
        One entry a row of logits, where any was asked for.
    """

    token_ids: torch.Tensor
    logprobs: list[TokenLogprobs | None] | None = None


class Verifier(Component):
    """Turns logits and drafts into tokens, keeping the distribution it declares to keep.

    Must not wait for the device, unless log-probabilities are asked for.
    """

    #: ``exact``, ``distributional`` or ``lossy``.
    losslessness: str = "exact"
    #: Whether drafts may be given to it.
    accepts_drafts: bool = True
    #: Whether, where every request is greedy, it keeps drafts as far as they are the likeliest
    #: tokens, and the likeliest token after them. Then a prepared step may do so in its place.
    is_greedy_match: bool = False

    @abstractmethod
    def verify(
        self,
        drafts: DraftsToVerify,
        logits: torch.Tensor,
        metadata: SamplingMetadata,
        sampler: Sampler,
    ) -> Accepted:
        """Verify against ``logits[L, V]`` (the model's dtype; may be overwritten)."""

    def note_prepared(self, num_drafts: list[int], num_accepted: list[int]) -> None:
        """Count a step that verified in its place, drafts and accepted ones by request."""


class NoVerifier(Verifier):
    """Every request has one row of logits, which is sampled: the null object."""

    accepts_drafts = False

    def verify(
        self,
        drafts: DraftsToVerify,
        logits: torch.Tensor,
        metadata: SamplingMetadata,
        sampler: Sampler,
    ) -> Accepted:
        assert drafts.token_ids.shape[1] == 0, "drafts need a verifier"
        output = sampler.sample(logits, metadata)
        return Accepted(output.token_ids.unsqueeze(1), output.logprobs)
