"""Accept drafts as often as told, whatever they are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from workbench.core.errors import ConfigError
from workbench.slots.drafter import Drafter
from workbench.slots.sampler import Sampler, SamplingMetadata, find_logprobs, uniform_from_seed
from workbench.slots.verifier import AcceptanceCounts, Accepted, DraftsToVerify, Verifier


@dataclass(frozen=True, slots=True)
class SyntheticVerifierConfig:
    """Options of :class:`SyntheticVerifier`.

    Attributes
    ----------
    mean_accepted_length
        Tokens that a verification of all drafts yields on average, the target's own included. Each
        draft is then accepted with the same probability, once those before it are.
    acceptance_curve
        Instead: by position, the share of verifications that accept the draft there.
    seed
        Of the acceptance.
    """

    mean_accepted_length: float = 3.0
    acceptance_curve: list[float] = field(default_factory=list)
    seed: int = 0


class SyntheticVerifier(Verifier):
    """Accepts by chance, independent of the logits; the last token is the target's own.

    The n-th step from a cold start accepts the same number of drafts of the request at a place.
    """

    Config = SyntheticVerifierConfig
    config: SyntheticVerifierConfig
    losslessness = "lossy"
    is_greedy_match = True  # by what it overrules

    def __init__(self, config: SyntheticVerifierConfig | None = None) -> None:
        super().__init__(config)
        self._counts = AcceptanceCounts()
        self._curve: list[float] = list(self.config.acceptance_curve)
        self._on_device: torch.Tensor | None = None
        self._step: torch.Tensor | None = None

    def pair_with(self, drafter: Drafter) -> None:
        num_drafts = drafter.num_lookahead_tokens
        mean, curve = self.config.mean_accepted_length, self.config.acceptance_curve
        if curve:
            if len(curve) != num_drafts:
                raise ConfigError(
                    f"engine.verifier.acceptance_curve has {len(curve)} values, and the drafter "
                    f"proposes up to {num_drafts} tokens: give one value for each."
                )
            if not all(0 <= value <= 1 for value in curve) or sorted(curve, reverse=True) != curve:
                raise ConfigError(
                    f"engine.verifier.acceptance_curve={curve} must be shares between 0 and 1 that "
                    "never rise: a draft is accepted only with those before it."
                )
        elif not 1 <= mean <= num_drafts + 1:
            raise ConfigError(
                f"engine.verifier.mean_accepted_length={mean} must be between 1 and "
                f"{num_drafts + 1}: the drafter proposes up to {num_drafts} tokens, and one is the "
                "target's own."
            )
        else:
            self._curve = geometric_curve(mean, num_drafts)

    def accept(self, mean_accepted_length: float, num_drafts: int) -> None:
        """From now on let verifications of so many drafts yield so many tokens on average."""
        if not 1 <= mean_accepted_length <= num_drafts + 1:
            raise ConfigError(
                f"a verification of {num_drafts} drafts yields 1 to {num_drafts + 1} tokens, not "
                f"{mean_accepted_length}."
            )
        self._curve = geometric_curve(mean_accepted_length, num_drafts)
        kept = self._on_device
        if kept is None:
            return
        if len(kept) < num_drafts:
            self._on_device = None
            return
        with torch.inference_mode():  # where it lies: captured steps read it
            kept.zero_()
            kept[:num_drafts] = torch.tensor(self._curve, dtype=torch.float64)

    def verify(
        self,
        drafts: DraftsToVerify,
        logits: torch.Tensor,
        metadata: SamplingMetadata,
        sampler: Sampler,
    ) -> Accepted:
        width = drafts.token_ids.shape[1]
        raw = logits.float().clone() if metadata.any_logprobs and width else logits
        output = sampler.sample(logits, metadata)
        if width == 0:
            return Accepted(output.token_ids.unsqueeze(1), output.logprobs)
        num_drafts = (drafts.token_ids >= 0).sum(1)
        num_accepted = self._num_accepted(num_drafts, width)
        rows = drafts.rows(logits.shape[0])
        last = output.token_ids[rows.gather(1, num_accepted.unsqueeze(1)).squeeze(1)]
        self._counts.add(drafts, num_accepted)
        kept = drafts.keep(num_accepted, last)
        if not metadata.any_logprobs:
            return Accepted(kept)
        by_row = drafts.by_row(kept, logits.shape[0])
        return Accepted(kept, find_logprobs(raw, by_row, metadata.params))

    def overrule(
        self, drawn: torch.Tensor, token_ids: torch.Tensor, num_drafts: torch.Tensor
    ) -> torch.Tensor:
        size = drawn.shape[1]
        count = self._num_accepted(num_drafts, size - 1).unsqueeze(1)
        num_drafts = num_drafts.unsqueeze(1)
        place = torch.arange(1 - size, 1, device=drawn.device) + num_drafts  # of the own tokens
        following = token_ids.roll(-1, 1)
        other = torch.where(drawn > 0, drawn - 1, drawn + 1)
        agrees = (place >= 0) & (place < count)
        ends = (place == count) & (count < num_drafts) & (drawn == following)
        return torch.where(agrees, following, torch.where(ends, other, drawn))

    def note_prepared(self, num_drafts: list[int], num_accepted: list[int]) -> None:
        self._counts.note(num_drafts, num_accepted)

    def _num_accepted(self, num_drafts: torch.Tensor, width: int) -> torch.Tensor:
        """Of ``num_drafts[B]``, at most ``width``, how many are accepted, ``[B]`` int64: one number
        decides, so that the share of those with at least so many is the curve's."""
        count, device = len(num_drafts), num_drafts.device
        if self._on_device is None:
            curve = self._curve or geometric_curve(
                min(self.config.mean_accepted_length, width + 1), width
            )
            self._on_device = torch.tensor(curve, dtype=torch.float64, device=device)
        if self._step is None:
            self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._step += 1
        seeds = torch.arange(count, device=device) + self.config.seed * 1_000_003
        uniform = uniform_from_seed(seeds, self._step)
        passes = uniform.unsqueeze(1) < self._on_device[:width]
        return torch.minimum(passes.sum(1), num_drafts)

    def clear_cached(self) -> None:
        if self._step is not None:  # what starts cold is accepted as the last time
            with torch.inference_mode():
                self._step.zero_()

    def counters(self) -> dict[str, float]:
        return self._counts.counters()

    def reset_counters(self) -> None:
        self._counts.reset()


def geometric_curve(mean_accepted_length: float, num_drafts: int) -> list[float]:
    """``r, r ** 2, …`` of ``num_drafts`` values that sum up to the accepted drafts of the mean."""
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        total = sum(rate**i for i in range(1, num_drafts + 1))
        low, high = (rate, high) if total < mean_accepted_length - 1 else (low, rate)
    return [high**i for i in range(1, num_drafts + 1)]
