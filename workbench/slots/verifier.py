"""Slot ``verifier``: how many of the drafts hold, and what comes after them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from workbench.core.step import TokenLogprobs
from workbench.slots.component import Component
from workbench.slots.drafter import Drafter
from workbench.slots.sampler import Sampler, SamplingMetadata


@dataclass(frozen=True, slots=True)
class TreeShape:
    """How the drafts of ``B`` requests hang together, padded to ``K``.

    Attributes
    ----------
    parents : Tensor[B, K] int64
        Place of the row of logits that each draft is tested by: 0 for that of the last known token,
        ``j + 1`` for that of draft ``j``, which stands before it.
    depths : Tensor[B, K] int64
        Drafts that lead to each, itself included; 0 for padding.
    max_depth
        The largest.
    """

    parents: torch.Tensor
    depths: torch.Tensor
    max_depth: int


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
    probs : Tensor[B, K, V] float32 or None
        What each draft was drawn from; None where all were proposed with certainty.
    tree
        How they hang together; None where each follows the one before it.
    """

    token_ids: torch.Tensor
    first_row: torch.Tensor
    probs: torch.Tensor | None = None
    tree: TreeShape | None = None

    def rows(self, num_rows: int) -> torch.Tensor:
        """Row of logits of each place ``[B, K + 1]``; some valid row behind the last draft."""
        steps = torch.arange(self.token_ids.shape[1] + 1, device=self.token_ids.device)
        return (self.first_row.unsqueeze(1) + steps).clamp_(max=num_rows - 1)

    def match(self, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many drafts agree with what was drawn at every row, ``drawn[L]``, and what was drawn
        after them; both ``[B]`` int64."""
        at = drawn[self.rows(drawn.shape[0])]
        agrees = (at[:, :-1] == self.token_ids).long()  # padding (-1) never agrees
        num_accepted = agrees.cumprod(1).sum(1)
        return num_accepted, at.gather(1, num_accepted.unsqueeze(1)).squeeze(1)

    def match_tree(self, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Place of the last draft on the path that agrees with what was drawn at every row,
        ``drawn[L]``, 0 where none does, and what was drawn after it; both ``[B]`` int64."""
        tree = self.tree
        assert tree is not None
        at = drawn[self.rows(drawn.shape[0])]
        agrees = at.gather(1, tree.parents) == self.token_ids  # padding (-1) never agrees
        holds = agrees
        root = torch.ones_like(agrees[:, :1])
        for _ in range(tree.max_depth - 1):
            holds = agrees & torch.cat([root, holds], 1).gather(1, tree.parents)
        depth, node = (tree.depths * holds).max(1)
        place = torch.where(depth > 0, node + 1, 0)
        return place, at.gather(1, place.unsqueeze(1)).squeeze(1)

    def path(self, place: torch.Tensor) -> torch.Tensor:
        """Places of the drafts that lead to ``place[B]``, itself included, ``[B, max_depth]``
        padded with -1."""
        tree = self.tree
        assert tree is not None
        parents = torch.nn.functional.pad(tree.parents, (1, 0))
        depths = torch.nn.functional.pad(tree.depths, (1, 0))
        place = place.unsqueeze(1)
        path = []
        for depth in range(tree.max_depth, 0, -1):
            is_here = depths.gather(1, place) == depth
            path.append(torch.where(is_here, place, -1))
            place = torch.where(is_here, parents.gather(1, place), place)
        return torch.cat(path[::-1], 1)

    def keep_path(self, path: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """The drafts at ``path[B, D]`` and the token ``last[B]`` after them, ``[B, D + 1]`` padded
        with -1."""
        tokens = self.token_ids.gather(1, (path - 1).clamp(min=0)).masked_fill(path < 0, -1)
        tokens = torch.nn.functional.pad(tokens, (0, 1), value=-1)
        return tokens.scatter(1, (path >= 0).sum(1, keepdim=True), last.unsqueeze(1))

    def has_draft_at(self) -> torch.Tensor:
        """Whether a request has a draft at each position, ``[B, K]``, the first being 1; of a tree,
        at each depth."""
        if self.tree is None:
            return self.token_ids >= 0
        deepest = self.tree.depths.amax(1, keepdim=True)
        positions = torch.arange(1, self.tree.max_depth + 1, device=deepest.device)
        return positions <= deepest

    def by_row(
        self, kept: torch.Tensor, num_rows: int, path: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The tokens of ``kept[B, K + 1]`` at their rows of logits, ``[L]``; 0 elsewhere. Waits for
        the device."""
        is_token = kept >= 0
        placed = kept.new_zeros(num_rows)
        rows = self.rows(num_rows)
        if path is not None:
            rows = rows.gather(1, torch.nn.functional.pad(path, (1, 0)).clamp(min=0))
        placed[rows[is_token]] = kept[is_token]
        return placed

    def keep(self, num_accepted: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """The first ``num_accepted[B]`` drafts and the token ``last[B]`` after them, ``[B, K + 1]``
        padded with -1."""
        count = num_accepted.unsqueeze(1)
        steps = torch.arange(self.token_ids.shape[1] + 1, device=self.token_ids.device)
        padded = torch.nn.functional.pad(self.token_ids, (0, 1), value=-1)
        kept = padded.masked_fill(steps >= count, -1)
        return torch.where(steps == count, last.unsqueeze(1), kept)


@dataclass(frozen=True, slots=True)
class Accepted:
    """New tokens a request: the accepted drafts and one token of the target's own.

    Attributes
    ----------
    token_ids : Tensor[B, K + 1] int64
        On the device, padded with -1 after each request's last token.
    logprobs : list or None
        One entry a row of logits, where any was asked for.
    path : Tensor[B, D] int64 or None
        Where drafts are trees, the places of the accepted ones, as of :meth:`DraftsToVerify.path`.
    drawn : Tensor[L] int64 or None
        What the target drew itself behind each row of logits, where the verifier had it draw.
    """

    token_ids: torch.Tensor
    logprobs: list[TokenLogprobs | None] | None = None
    path: torch.Tensor | None = None
    drawn: torch.Tensor | None = None


class AcceptanceCounts:
    """How many drafts were verified and accepted at each position, summed on the device, so that
    counting does not wait for it."""

    def __init__(self) -> None:
        self._totals: torch.Tensor | None = None  # [2, K] int64
        #: The same of steps whose numbers the host knows.
        self._noted = np.zeros((2, 0), dtype=np.int64)

    def add(self, drafts: DraftsToVerify, num_accepted: torch.Tensor) -> None:
        """Count a step in which the first ``num_accepted[B]`` drafts were accepted."""
        is_draft = drafts.has_draft_at()
        width = is_draft.shape[1]
        kept = torch.arange(width, device=is_draft.device) < num_accepted.unsqueeze(1)
        step = torch.stack([is_draft, kept]).sum(1)
        if self._totals is None:
            self._totals = step
            return
        if self._totals.shape[1] < width:
            missing = width - self._totals.shape[1]
            self._totals = torch.nn.functional.pad(self._totals, (0, missing))
        self._totals[:, :width] += step

    def note(self, num_drafts: list[int], num_accepted: list[int]) -> None:
        """Count a step that was verified elsewhere."""
        width = max(self._noted.shape[1], max(num_drafts, default=0))
        noted = np.zeros((2, width), dtype=np.int64)
        noted[:, : self._noted.shape[1]] = self._noted
        for line, counts in zip(noted, (num_drafts, num_accepted), strict=True):
            # Behind a position: all whose count is beyond it.
            exactly = np.bincount(counts, minlength=width + 1)
            line += exactly[::-1].cumsum()[::-1][1:]
        self._noted = noted

    def counters(self) -> dict[str, float]:
        """Sums, and by position: ``verified_at_1`` and ``accepted_at_1`` are of first drafts."""
        own = np.zeros((2, 0), dtype=np.int64)
        if self._totals is not None:
            own = np.array(self._totals.tolist(), dtype=np.int64)
        both = np.zeros((2, max(own.shape[1], self._noted.shape[1])), dtype=np.int64)
        both[:, : own.shape[1]] += own
        both[:, : self._noted.shape[1]] += self._noted
        verified, accepted = both.tolist()
        verifications = verified[0] if verified else 0
        counts: dict[str, float] = {
            "verifications": verifications,
            "verified_tokens": sum(verified),
            "accepted_tokens": sum(accepted),
            "acceptance_rate": sum(accepted) / max(1, sum(verified)),
            # The target's own token counts, as in vLLM and SGLang: 1 means nothing accepted.
            "mean_accepted_length": 1 + sum(accepted) / max(1, verifications),
        }
        for name, by_position in (("verified", verified), ("accepted", accepted)):
            counts |= {f"{name}_at_{i}": n for i, n in enumerate(by_position, start=1)}
        return counts

    def reset(self) -> None:
        """Start from zero."""
        self._totals = None
        self._noted = np.zeros((2, 0), dtype=np.int64)


class Verifier(Component):
    """Turns logits and drafts into tokens, keeping the distribution it declares to keep.

    Must not wait for the device, unless log-probabilities are asked for.
    """

    #: ``exact``, ``distributional`` or ``lossy``.
    losslessness: str = "exact"
    #: Whether drafts may be given to it.
    accepts_drafts: bool = True
    #: Whether drafts may be trees.
    verifies_trees: bool = False
    #: Whether it has the target draw behind every row of logits, and tells: ``Accepted.drawn``.
    tells_drawn: bool = False
    #: Whether it tests drafts by what they were drawn from, ``DraftsToVerify.probs``.
    reads_probs: bool = False
    #: Whether, where every request is greedy, it keeps drafts as far as they are the likeliest
    #: tokens, and the likeliest token after them. Then a prepared step may do so in its place, with
    #: what :meth:`overrule` makes of these tokens.
    is_greedy_match: bool = False

    def pair_with(self, drafter: Drafter) -> None:
        """Learn, once, whose drafts it will be given.

        Raises
        ------
        ConfigError
            It cannot verify them; says what it could.
        """

    @abstractmethod
    def verify(
        self,
        drafts: DraftsToVerify,
        logits: torch.Tensor,
        metadata: SamplingMetadata,
        sampler: Sampler,
    ) -> Accepted:
        """Verify against ``logits[L, V]`` (the model's dtype; may be overwritten)."""

    def overrule(
        self, drawn: torch.Tensor, token_ids: torch.Tensor, num_drafts: torch.Tensor
    ) -> torch.Tensor:
        """In a prepared step: what is taken for the likeliest tokens, by default what they are.

        Parameters
        ----------
        drawn : Tensor[B, Q] int64
            Likeliest token behind each token of the step.
        token_ids : Tensor[B, Q] int64
            The step's tokens; drafts are the last of each place.
        num_drafts : Tensor[B] int64
            How many.
        """
        return drawn

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
