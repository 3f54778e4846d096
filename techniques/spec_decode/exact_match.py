"""Accept a draft exactly as far as the target would have written it itself."""

from __future__ import annotations

import torch

from workbench.slots.sampler import Sampler, SamplingMetadata
from workbench.slots.verifier import AcceptanceCounts, Accepted, DraftsToVerify, Verifier


class ExactMatch(Verifier):
    """Draw the target's own token at every position, and keep drafts while they agree.

    Lossless for greedy and for random sampling alike: a draw depends only on the logits, the
    request's seed and the position, so the tokens are those of a run without drafts, not merely
    ones of the same distribution.
    """

    losslessness = "exact"
    is_greedy_match = True
    verifies_trees = True
    tells_drawn = True

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
        output = sampler.sample(logits, metadata)
        if drafts.token_ids.shape[1] == 0:
            return Accepted(output.token_ids.unsqueeze(1), output.logprobs)
        if drafts.tree is not None:
            place, last = drafts.match_tree(output.token_ids)
            path = drafts.path(place)
            self._counts.add(drafts, (path >= 0).sum(1))
            kept = drafts.keep_path(path, last)
            return Accepted(kept, output.logprobs, path, output.token_ids)
        num_accepted, last = drafts.match(output.token_ids)
        self._counts.add(drafts, num_accepted)
        kept = drafts.keep(num_accepted, last)
        return Accepted(kept, output.logprobs, drawn=output.token_ids)

    def note_prepared(self, num_drafts: list[int], num_accepted: list[int]) -> None:
        self._counts.note(num_drafts, num_accepted)

    def counters(self) -> dict[str, float]:
        return self._counts.counters()

    def reset_counters(self) -> None:
        self._counts.reset()
