"""Accept drafts so that what comes out is distributed as the target's own draws."""

from __future__ import annotations

import torch

from workbench.slots.sampler import (
    Sampler,
    SamplingMetadata,
    find_logprobs,
    invert_cdf,
    target_probs,
    uniform_from_seed,
)
from workbench.slots.verifier import AcceptanceCounts, Accepted, DraftsToVerify, Verifier

#: Makes of a request's seed the seed of its tests, whose numbers must be others than its draws'.
_TEST_SALT = 0x5851F42D4C957F2D


class Rejection(Verifier):
    """Accept a draft with probability ``min(1, p / q)``, else draw from what ``p`` has over ``q``.

    ``p`` is the target's distribution after penalties, temperature and truncation, and ``q`` the
    drafter's; a draft that was proposed with certainty has ``q`` of one. Acceptance and draws are
    fixed by the logits, the drafts, the request's seed and the position.
    """

    losslessness = "distributional"
    reads_probs = True

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self._counts = AcceptanceCounts()

    def verify(
        self,
        drafts: DraftsToVerify,
        logits: torch.Tensor,
        metadata: SamplingMetadata,
        sampler: Sampler,
    ) -> Accepted:
        width = drafts.token_ids.shape[1]
        if width == 0 or metadata.all_greedy:  # the sampler's own draws decide
            output = sampler.sample(logits, metadata)
            if width == 0:
                return Accepted(output.token_ids.unsqueeze(1), output.logprobs)
            num_accepted, last = drafts.match(output.token_ids)
            self._counts.add(drafts, num_accepted)
            return Accepted(drafts.keep(num_accepted, last), output.logprobs)
        raw = logits.float().clone() if metadata.any_logprobs else logits
        probs = target_probs(logits, metadata)
        probs /= probs.sum(-1, keepdim=True)
        rows = drafts.rows(logits.shape[0])
        num_accepted = self._accept(drafts, probs, rows, metadata)
        last = self._draw(drafts, probs, rows, num_accepted, metadata)
        self._counts.add(drafts, num_accepted)
        kept = drafts.keep(num_accepted, last)
        if not metadata.any_logprobs:
            return Accepted(kept)
        by_row = drafts.by_row(kept, logits.shape[0])
        return Accepted(kept, find_logprobs(raw, by_row, metadata.params))

    def _accept(
        self,
        drafts: DraftsToVerify,
        probs: torch.Tensor,
        rows: torch.Tensor,
        metadata: SamplingMetadata,
    ) -> torch.Tensor:
        """How many drafts of each request pass their tests, ``[B]`` int64."""
        places = rows[:, :-1]
        is_draft = drafts.token_ids >= 0
        ids = drafts.token_ids.clamp(min=0)
        target = probs[places, ids].double()
        proposed = torch.ones_like(target)
        if drafts.probs is not None:
            proposed = drafts.probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1).double()
        seeds = _test_seeds(metadata.seeds)[places]
        uniform = uniform_from_seed(seeds, metadata.positions[places])
        passes = (uniform * proposed < target) & is_draft
        return passes.long().cumprod(1).sum(1)

    def _draw(
        self,
        drafts: DraftsToVerify,
        probs: torch.Tensor,
        rows: torch.Tensor,
        num_accepted: torch.Tensor,
        metadata: SamplingMetadata,
    ) -> torch.Tensor:
        """The token after the accepted drafts, ``[B]``: from the target's distribution after the
        last draft, from the residual one where a draft was rejected."""
        place = num_accepted.unsqueeze(1)
        row = rows.gather(1, place).squeeze(1)
        target = probs[row]
        # Behind the last column stands no draft.
        ids = torch.nn.functional.pad(drafts.token_ids, (0, 1), value=-1).gather(1, place)
        is_rejected = ids >= 0
        ids = ids.clamp(min=0)
        if drafts.probs is None:
            taken = torch.zeros_like(target).scatter_(1, ids, 1.0)
        else:
            column = num_accepted.clamp(max=drafts.probs.shape[1] - 1)
            taken = drafts.probs[torch.arange(len(row), device=row.device), column].float()
        residual = (target - taken).clamp_(min=0.0)
        # Nothing is left where both are equal but for rounding: then a rejection was rounding too.
        is_residual = is_rejected & (residual.sum(-1, keepdim=True) > 0)
        final = torch.where(is_residual, residual, target)
        return invert_cdf(final, uniform_from_seed(metadata.seeds[row], metadata.positions[row]))

    def counters(self) -> dict[str, float]:
        return self._counts.counters()

    def reset_counters(self) -> None:
        self._counts.reset()


def _test_seeds(seeds: torch.Tensor) -> torch.Tensor:
    """Seeds ``[L]`` of the tests, from those of the draws: hashed, since seeds at a fixed distance
    share their numbers."""
    return (uniform_from_seed(seeds, torch.full_like(seeds, _TEST_SALT)) * 2.0**53).long()
