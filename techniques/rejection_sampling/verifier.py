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
from workbench.slots.verifier import (
    AcceptanceCounts,
    Accepted,
    DraftsToVerify,
    TreeShape,
    Verifier,
)

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
    verifies_trees = True

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
            if drafts.tree is not None:
                place, last = drafts.match_tree(output.token_ids)
                accepted = drafts.path(place)
                self._counts.add(drafts, (accepted >= 0).sum(1))
                return Accepted(drafts.keep_path(accepted, last), output.logprobs, accepted)
            num_accepted, last = drafts.match(output.token_ids)
            self._counts.add(drafts, num_accepted)
            return Accepted(drafts.keep(num_accepted, last), output.logprobs)
        raw = logits.float().clone() if metadata.any_logprobs else logits
        probs = target_probs(logits, metadata)
        probs /= probs.sum(-1, keepdim=True)
        rows = drafts.rows(logits.shape[0])
        path: torch.Tensor | None = None
        if drafts.tree is not None:
            place, last = self._walk(drafts, drafts.tree, probs, rows, metadata)
            path = drafts.path(place)
            num_accepted, kept = (path >= 0).sum(1), drafts.keep_path(path, last)
        else:
            num_accepted = self._accept(drafts, probs, rows, metadata)
            last = self._draw(drafts, probs, rows, num_accepted, metadata)
            kept = drafts.keep(num_accepted, last)
        self._counts.add(drafts, num_accepted)
        if not metadata.any_logprobs:
            return Accepted(kept, path=path)
        by_row = drafts.by_row(kept, logits.shape[0], path)
        return Accepted(kept, find_logprobs(raw, by_row, metadata.params), path)

    def _walk(
        self,
        drafts: DraftsToVerify,
        tree: TreeShape,
        probs: torch.Tensor,
        rows: torch.Tensor,
        metadata: SamplingMetadata,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Place of the last accepted draft, 0 where none is, and the token after it; both ``[B]``.

        Drafts that follow the same one are tested one after another, each against what the ones
        before it have left of the target's distribution (SpecInfer, Miao et al. 2023,
        arXiv:2305.09781, section 4.3). What each was drawn from, given those before it, may be
        anything: drawing without replacement is (Sequoia, Chen et al. 2024, arXiv:2402.12374).
        """
        at = torch.zeros_like(rows[:, 0])
        left = probs[rows[:, 0]]
        for place, ids in enumerate(drafts.token_ids.unbind(1), start=1):
            row = rows.gather(1, at.unsqueeze(1)).squeeze(1)
            is_tested = (tree.parents[:, place - 1] == at) & (ids >= 0)
            ids = ids.clamp(min=0).unsqueeze(1)
            if drafts.probs is None:
                proposed = torch.zeros_like(left).scatter_(1, ids, 1.0)
            else:
                proposed = drafts.probs[:, place - 1].float()
            uniform = uniform_from_seed(
                _test_seeds(metadata.seeds[row], place), metadata.positions[row]
            )
            passes = uniform * proposed.gather(1, ids).squeeze(1) < left.gather(1, ids).squeeze(1)
            rest = (left - proposed).clamp_(min=0.0)
            mass = rest.sum(-1, keepdim=True)
            # Nothing is left where both are equal but for rounding: a rejection was rounding too.
            rest = torch.where(mass > 0, rest / mass, left)
            rejected = (is_tested & ~passes).unsqueeze(1)
            accepted = (is_tested & passes).unsqueeze(1)
            left = torch.where(rejected, rest, left)
            left = torch.where(accepted, probs[rows[:, place]], left)
            at = torch.where(is_tested & passes, place, at)
        row = rows.gather(1, at.unsqueeze(1)).squeeze(1)
        uniform = uniform_from_seed(metadata.seeds[row], metadata.positions[row])
        return at, invert_cdf(left, uniform)

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


def _test_seeds(seeds: torch.Tensor, place: int = 0) -> torch.Tensor:
    """Seeds ``[L]`` of the tests, from those of the draws: hashed, since seeds at a fixed distance
    share their numbers. Drafts of one position have others for each place in the tree."""
    return (uniform_from_seed(seeds, torch.full_like(seeds, _TEST_SALT + place)) * 2.0**53).long()
