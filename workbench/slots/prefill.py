"""Slot ``prefill``: how much of what a request needs runs in one step."""

from __future__ import annotations

from abc import abstractmethod

from workbench.slots.component import Component


class Prefill(Component):
    """Splits a request's outstanding tokens over steps."""

    @abstractmethod
    def token_budget(self, max_num_batched_tokens: int) -> int:
        """Tokens that one step may run, given the engine's own limit."""

    @abstractmethod
    def num_tokens(self, outstanding: int, budget: int, step_is_empty: bool) -> int:
        """Tokens to run now.

        Parameters
        ----------
        outstanding
            Tokens whose KV is not yet computed, drafts included; at least 1.
        budget
            What is left of the step's budget; at least 1.
        step_is_empty
            Nothing is scheduled in this step yet.

        Returns
        -------
        int
            Between 0 (wait for a later step) and ``outstanding``.
        """


class WholePrompt(Prefill):
    """A prompt runs in one piece: the null object.

    A prompt longer than the whole budget runs alone, so that it never starves.
    """

    def token_budget(self, max_num_batched_tokens: int) -> int:
        return max_num_batched_tokens

    def num_tokens(self, outstanding: int, budget: int, step_is_empty: bool) -> int:
        return outstanding if outstanding <= budget or step_is_empty else 0
