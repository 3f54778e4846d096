"""As many drafts as pay, and none where none do."""

from __future__ import annotations

from dataclasses import dataclass

from techniques.adaptive_drafts.costs import (
    Acceptance,
    Curve,
    StepCosts,
    bucket_of,
    interpolate,
)
from workbench.core.errors import ConfigError
from workbench.slots.draft_length import DraftLength, VerifiedStep

#: Steps with drafts after which one without is run, to know what it costs now.
_PLAIN_EVERY = 128
#: Steps with drafts after which one is a draft longer than seems best.
_LONGER_EVERY = 16
#: Steps after a trial that did not pay until the next; doubled each time.
_FIRST_GAP = 4
#: Buckets of loads whose costs are as good as measured.
_NEAR = 2


@dataclass(frozen=True, slots=True)
class AdaptiveConfig:
    """Options of :class:`Adaptive`.

    Attributes
    ----------
    max_loss
        Share of the time that drafts may cost more than they bring, over any long stretch.
    allowance
        Steps without drafts whose time may be lost beyond that share before it was earned; negative
        for one more than the drafter's longest draft, which one step can lose at worst.
    max_gap_steps
        Longest wait for the next trial where drafts do not pay.
    """

    max_loss: float = 0.02
    allowance: float = -1.0
    max_gap_steps: int = 256


class Adaptive(DraftLength):
    """Chooses the length of most tokens a second, by measured costs and acceptance.

    Every step with drafts is held against what the same tokens would have cost without: what it
    lost is taken off a credit that grows by ``max_loss`` of the time, and without credit there are
    no drafts. So trials, and estimates that turn out wrong, cost no more than that.
    """

    Config = AdaptiveConfig
    config: AdaptiveConfig
    observes = True

    def __init__(
        self, config: AdaptiveConfig | None = None, *, num_lookahead_tokens: int = 0
    ) -> None:
        super().__init__(config, num_lookahead_tokens=num_lookahead_tokens)
        self._check()
        longest, given = num_lookahead_tokens, self.config.allowance
        #: Steps without drafts that are given, and the most that is kept of what was earned.
        self._allowance = longest + 1.0 if given < 0 else given
        self._credit: float | None = None  # in seconds, once it is known what a step takes
        self._costs = StepCosts()
        self._acceptance = Acceptance(longest)
        self._since_plain: dict[int, int] = {}  # by bucket of requests
        self._gap, self._waited, self._num_trials, self._num_verified = _FIRST_GAP, 0, 0, 0
        self._trial_lengths = sorted({longest, 1, (longest + 1) // 2}, reverse=True)
        self.reset_counters()

    def choose(self, num_requests: int) -> int:
        length = self._choose(num_requests)
        self._decided_steps += 1
        self._steps_off += length == 0
        self._length_sum += length
        return length

    def observe(self, step: VerifiedStep) -> None:
        num_requests, num_drafts = len(step.num_drafts), sum(step.num_drafts)
        if not num_requests:
            return
        bucket = bucket_of(num_requests)
        if num_drafts:
            self._acceptance.add(step.num_drafts, step.num_accepted, step.num_allowed)
            self._since_plain[bucket] = self._since_plain.get(bucket, 0) + 1
            self._num_verified += 1
        else:
            self._since_plain[bucket] = 0
        if step.seconds is None:
            return
        plain = self._costs.plain(num_requests)
        if plain is not None and num_drafts:
            self._settle(step, plain)
        elif self._credit is not None:
            self._earn(self.config.max_loss * step.seconds, step.seconds)
        self._costs.add(num_requests, num_drafts, step.seconds)
        if self._credit is None and not num_drafts:
            self._credit = self._allowance * step.seconds

    def counters(self) -> dict[str, float]:
        return {
            "decided_steps": self._decided_steps,
            "steps_off": self._steps_off,
            "trials": self._trials,
            "mean_length": self._length_sum / max(1, self._decided_steps),
        }

    def reset_counters(self) -> None:
        self._decided_steps = self._steps_off = self._trials = self._length_sum = 0

    def _choose(self, num_requests: int) -> int:
        plain = self._costs.plain(num_requests)
        is_stale = self._since_plain.get(bucket_of(num_requests), 0) >= _PLAIN_EVERY
        if plain is None or self._credit is None or is_stale or self._credit <= 0:
            return 0
        credit = self._credit / plain
        known = self._costs.curve(num_requests, _NEAR) or [(0.0, 1.0)]
        curve = self._costs.curve(num_requests)
        if curve is None:  # nothing is known of drafts: the longest tells most
            expected = self._acceptance.expected()
            return self._try(self._affordable(self.num_lookahead_tokens, known, expected, credit))
        expected = self._acceptance.expected()
        best = _best(curve, expected)
        if best:
            is_longer = self._num_verified % _LONGER_EVERY == 0
            length = min(best + is_longer, self.num_lookahead_tokens)
            return self._affordable(length, known, expected, credit)
        return self._try_again(curve, known, credit)

    def _try_again(self, curve: Curve, known: Curve, credit: float) -> int:
        """No drafts, or a few to see whether they would pay by now."""
        self._waited += 1
        if self._waited < self._gap:
            return 0
        hopeful = _best(curve, self._acceptance.expected(num_deviations=1.0))
        length = hopeful or self._trial_lengths[self._num_trials % len(self._trial_lengths)]
        none_held = [(drafts, 1.0) for drafts, _ in self._acceptance.expected()]
        length = self._affordable(length, known, none_held, credit)
        if not length:
            return 0
        self._waited = 0
        # Too few were tested to tell: soon again.
        self._gap = _FIRST_GAP if hopeful else min(2 * self._gap, self.config.max_gap_steps)
        return self._try(length)

    def _affordable(
        self, length: int, known: Curve, expected: list[tuple[float, float]], credit: float
    ) -> int:
        """The longest draft up to ``length`` for which there is credit, should tokens beyond what
        was measured about this load cost as much as whole steps of one token."""
        most_known, cost_known = known[-1]
        while length:
            drafts, tokens = expected[length]
            cost = cost_known + drafts - most_known
            if len(known) > 1 and drafts <= most_known + 1:
                cost = interpolate(known, drafts)
            if cost - tokens <= credit:
                break
            length -= 1
        return length

    def _try(self, length: int) -> int:
        self._num_trials += 1
        self._trials += length > 0
        return length

    def _settle(self, step: VerifiedStep, plain: float) -> None:
        """Book what a step with drafts brought or lost, in seconds."""
        assert step.seconds is not None
        num_requests = len(step.num_drafts)
        drafts = sum(step.num_drafts) / num_requests
        known = self._costs.curve(num_requests, 0)
        # A step that something held up says nothing of drafts.
        most = 2 + 1.5 * drafts if known is None else 2 * interpolate(known, drafts)
        cost = min(step.seconds / plain, most)
        gain = 1 + sum(step.num_accepted) / num_requests - cost
        self._earn((self.config.max_loss * cost + gain) * plain, plain)
        if gain > 0:
            self._gap = _FIRST_GAP

    def _earn(self, seconds: float, plain: float) -> None:
        if self._credit is not None:
            self._credit = min(self._credit + seconds, self._allowance * plain)

    def _check(self) -> None:
        config = self.config
        if self.num_lookahead_tokens < 1:
            raise ConfigError(
                "engine/draft_length=adaptive chooses how many drafts of a drafter are verified, "
                "and there is none. Choose engine/drafter=..., or engine/draft_length=full."
            )
        if not 0 < config.max_loss <= 1:
            raise ConfigError(
                f"engine.draft_length.max_loss={config.max_loss} must be over 0 and at most 1."
            )
        if config.max_gap_steps < 1:
            raise ConfigError(
                f"engine.draft_length.max_gap_steps={config.max_gap_steps} must be 1 or more."
            )


def _best(curve: Curve, expected: list[tuple[float, float]]) -> int:
    """The length of most tokens a second, the shortest of equals."""
    rates = [tokens / interpolate(curve, drafts) for drafts, tokens in expected]
    return rates.index(max(rates))
