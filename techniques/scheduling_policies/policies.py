"""Policies, each a few lines over what a request says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.core.errors import ConfigError
from workbench.core.request import Request
from workbench.slots.policy import Policy


class ShortestJobFirst(Policy):
    """The request with the least left to compute goes first: the rest of its prompt, and all the
    output that it may ask for (Smith 1956, doi:10.1002/nav.3800030106)."""

    def key(self, request: Request, arrival_index: int) -> int:
        return request.max_total_tokens - request.num_computed_tokens


@dataclass(frozen=True, slots=True)
class LongestPrefixMatchConfig:
    """Options of :class:`LongestPrefixMatch`.

    Attributes
    ----------
    window
        Waiting requests, the oldest ones, that are compared at each start. It bounds what a start
        costs, however many wait.
    """

    window: int = 32


class LongestPrefixMatch(Policy):
    """The request of which the prefix cache holds most goes first, while it is still there.

    Zheng et al. 2024, arXiv:2312.07104, section 3: in a batch this is the order of a walk through
    the tree, which computes every shared prefix once.
    """

    Config = LongestPrefixMatchConfig
    config: LongestPrefixMatchConfig
    needs_prefix_cache = True

    def __init__(self, config: LongestPrefixMatchConfig) -> None:
        super().__init__(config)
        if config.window < 2:
            raise ConfigError(
                f"engine.policy.window={config.window} must be 2 or more to compare any."
            )
        self.window = config.window

    def key(self, request: Request, arrival_index: int) -> int:
        return -request.num_matched_tokens


@dataclass(frozen=True, slots=True)
class PriorityConfig:
    """Options of :class:`Priority`.

    Attributes
    ----------
    requests_per_level
        A request of priority ``p`` goes as if it had arrived ``p`` times so many requests earlier.
    """

    requests_per_level: int = 64


class Priority(Policy):
    """The request of the highest priority goes first, and waiting counts.

    Whoever waits gains on all that come later, by one level every ``requests_per_level`` arrivals.
    All gain alike, so the order of two requests never changes and the queue need not be sorted
    again (linear aging: Kleinrock, A delay dependent queue discipline, 1964).
    """

    Config = PriorityConfig
    config: PriorityConfig
    uses_priority = True

    def __init__(self, config: PriorityConfig) -> None:
        super().__init__(config)
        if config.requests_per_level < 1:
            raise ConfigError(
                f"engine.policy.requests_per_level={config.requests_per_level} must be 1 or more."
            )

    def key(self, request: Request, arrival_index: int) -> int:
        return arrival_index - request.priority * self.config.requests_per_level


@dataclass(frozen=True, slots=True)
class DecodeFirstConfig:
    """Options of :class:`DecodeFirst`.

    Attributes
    ----------
    steps_between_prompts
        Steps in a row that run no prompt tokens before waiting requests may start beside others.
        Of so many plus one successive tokens of a running request, new prompts delay one.
    """

    steps_between_prompts: int = 8


class DecodeFirst(Policy):
    """Running requests come first: others start in order of arrival, but only now and then.

    What Sarathi-Serve calls prioritising decodes (Agrawal et al. 2024, arXiv:2403.02310), with a
    dial between continuous batching (0) and waiting for the whole batch to end.
    """

    Config = DecodeFirstConfig
    config: DecodeFirstConfig

    def __init__(self, config: DecodeFirstConfig) -> None:
        super().__init__(config)
        if config.steps_between_prompts < 0:
            raise ConfigError(
                f"engine.policy.steps_between_prompts={config.steps_between_prompts} must be 0 or "
                "more."
            )
        self._num_held_back = 0

    def key(self, request: Request, arrival_index: int) -> int:
        return arrival_index

    def holds_back(self, num_steps_without_prompts: int) -> bool:
        held_back = num_steps_without_prompts < self.config.steps_between_prompts
        self._num_held_back += held_back
        return held_back

    def counters(self) -> dict[str, float]:
        return super().counters() | {"held_back_steps": self._num_held_back}

    def reset_counters(self) -> None:
        super().reset_counters()
        self._num_held_back = 0
