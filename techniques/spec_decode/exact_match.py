"""Accept a draft exactly as far as the target would have written it itself."""

from __future__ import annotations

import torch

from workbench.slots.sampler import Sampler, SamplingMetadata
from workbench.slots.verifier import Accepted, DraftsToVerify, Verifier


class ExactMatch(Verifier):
    """Draw the target's own token at every position, and keep drafts while they agree.

    Lossless for greedy and for random sampling alike: a draw depends only on the logits, the
    request's seed and the position, so the tokens are those of a run without drafts, not merely
    ones of the same distribution.
    """

    losslessness = "exact"
    is_greedy_match = True

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        # Verifications, verified and accepted tokens, summed on the device.
        self._totals: torch.Tensor | None = None
        self._prepared = [0, 0, 0]  # the same of prepared steps, known on the host

    def verify(
        self,
        drafts: DraftsToVerify,
        logits: torch.Tensor,
        metadata: SamplingMetadata,
        sampler: Sampler,
    ) -> Accepted:
        output = sampler.sample(logits, metadata)
        width = drafts.token_ids.shape[1]
        if width == 0:
            return Accepted(output.token_ids.unsqueeze(1), output.logprobs)
        steps = torch.arange(width + 1, device=logits.device)
        rows = (drafts.first_row.unsqueeze(1) + steps).clamp_(max=logits.shape[0] - 1)
        drawn = output.token_ids[rows]
        agrees = (drawn[:, :width] == drafts.token_ids).long()  # padding (-1) never agrees
        num_accepted = agrees.cumprod(1).sum(1, keepdim=True)
        self._count(drafts, num_accepted)
        return Accepted(drawn.masked_fill(steps > num_accepted, -1), output.logprobs)

    def _count(self, drafts: DraftsToVerify, num_accepted: torch.Tensor) -> None:
        """Add up on the device, so that counting does not wait for it."""
        is_draft = drafts.token_ids >= 0
        step = torch.stack([is_draft.any(1).sum(), is_draft.sum(), num_accepted.sum()])
        self._totals = step if self._totals is None else self._totals + step

    def note_prepared(self, num_drafts: list[int], num_accepted: list[int]) -> None:
        step = (sum(n > 0 for n in num_drafts), sum(num_drafts), sum(num_accepted))
        self._prepared = [a + b for a, b in zip(self._prepared, step, strict=True)]

    def counters(self) -> dict[str, float]:
        own = [0, 0, 0] if self._totals is None else self._totals.tolist()
        verifications, verified, accepted = (
            a + b for a, b in zip(own, self._prepared, strict=True)
        )
        return {
            "verifications": verifications,
            "verified_tokens": verified,
            "accepted_tokens": accepted,
            "acceptance_rate": accepted / max(1, verified),
            # The target's own token counts, as in vLLM and SGLang: 1 means nothing accepted.
            "mean_accepted_length": 1 + accepted / max(1, verifications),
        }

    def reset_counters(self) -> None:
        self._totals = None
        self._prepared = [0, 0, 0]
