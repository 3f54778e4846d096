"""Accept drafts that the target finds typical."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.core.errors import ConfigError
from workbench.slots.sampler import Sampler, SamplingMetadata, find_logprobs, target_probs
from workbench.slots.verifier import AcceptanceCounts, Accepted, DraftsToVerify, Verifier


@dataclass(frozen=True, slots=True)
class TypicalConfig:
    """Options of :class:`Typical`.

    Attributes
    ----------
    threshold
        Probability from which on a draft is accepted, whatever the distribution: the paper's
        epsilon.
    alpha
        Share of ``exp(-entropy)`` from which on it is accepted, where that is less: the paper's
        delta.
    """

    threshold: float = 0.09
    alpha: float = 0.3


class Typical(Verifier):
    """Accept a draft where its probability is over ``min(threshold, alpha * exp(-entropy))``.

    The flatter the target's distribution, the less is asked. The token after the accepted drafts
    is the target's own draw; greedy requests get the target's tokens.
    """

    Config = TypicalConfig
    config: TypicalConfig
    losslessness = "lossy"

    def __init__(self, config: TypicalConfig | None = None) -> None:
        super().__init__(config)
        for name in ("threshold", "alpha"):
            value = getattr(self.config, name)
            if not 0 < value <= 1:
                raise ConfigError(f"engine.verifier.{name}={value} must be over 0 and at most 1.")
        self._counts = AcceptanceCounts()

    def verify(
        self,
        drafts: DraftsToVerify,
        logits: torch.Tensor,
        metadata: SamplingMetadata,
        sampler: Sampler,
    ) -> Accepted:
        is_plain = drafts.token_ids.shape[1] == 0 or metadata.all_greedy
        # Samplers may overwrite logits, which are read twice here.
        scores = logits if is_plain else logits.float().clone()
        output = sampler.sample(logits, metadata)
        if drafts.token_ids.shape[1] == 0:
            return Accepted(output.token_ids.unsqueeze(1), output.logprobs)
        if is_plain:
            num_accepted, last = drafts.match(output.token_ids)
            self._counts.add(drafts, num_accepted)
            return Accepted(drafts.keep(num_accepted, last), output.logprobs)
        raw = scores.clone() if metadata.any_logprobs else scores
        probs = target_probs(scores, metadata)
        probs /= probs.sum(-1, keepdim=True)
        rows = drafts.rows(logits.shape[0])
        num_accepted = self._accept(drafts, probs, rows[:, :-1])
        last = output.token_ids[rows.gather(1, num_accepted.unsqueeze(1)).squeeze(1)]
        self._counts.add(drafts, num_accepted)
        kept = drafts.keep(num_accepted, last)
        if not metadata.any_logprobs:
            return Accepted(kept)
        by_row = drafts.by_row(kept, logits.shape[0])
        return Accepted(kept, find_logprobs(raw, by_row, metadata.params))

    def _accept(
        self, drafts: DraftsToVerify, probs: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """How many drafts of each request are typical, ``[B]`` int64."""
        entropy = torch.special.entr(probs).sum(-1)
        least = (self.config.alpha * torch.exp(-entropy)).clamp(max=self.config.threshold)
        found = probs[places, drafts.token_ids.clamp(min=0)]
        is_typical = (found > least[places]) & (drafts.token_ids >= 0)
        return is_typical.long().cumprod(1).sum(1)

    def counters(self) -> dict[str, float]:
        return self._counts.counters()

    def reset_counters(self) -> None:
        self._counts.reset()
