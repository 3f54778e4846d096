"""Slot ``draft_length``: how many drafts a request may have in the next step."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from workbench.slots.component import Component


@dataclass(slots=True)
class VerifiedStep:
    """What a step did for the ``B`` requests that it gave tokens to.

    Attributes
    ----------
    num_drafts, num_accepted : list[int]
        By request: drafts that were verified, and how many of them hold.
    num_allowed : int
        Most drafts that a request might have had.
    seconds : float or None
        From when the tokens of the step before were known to when these were, drafting included;
        None where the step ran prompts too, or the one before was not waited for.
    """

    num_drafts: list[int]
    num_accepted: list[int]
    num_allowed: int
    seconds: float | None


class DraftLength(Component):
    """Chooses the drafts of each step, from what steps cost and what became of their drafts.

    Parameters
    ----------
    num_lookahead_tokens
        Most tokens that the drafter proposes for one request.
    """

    #: Whether it is to be told of every step.
    observes: bool = False

    def __init__(self, config: Any = None, *, num_lookahead_tokens: int = 0) -> None:
        super().__init__(config)
        self.num_lookahead_tokens = num_lookahead_tokens

    @abstractmethod
    def choose(self, num_requests: int) -> int:
        """Most drafts a request in a step of so many, 0 to ``num_lookahead_tokens``."""

    def observe(self, step: VerifiedStep) -> None:
        """Learn from a step, before the next choice."""


class FullLength(DraftLength):
    """As many as the drafter proposes: the null object."""

    def choose(self, num_requests: int) -> int:
        return self.num_lookahead_tokens
