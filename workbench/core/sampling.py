"""How one request wants its tokens drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

from workbench.core.errors import RequestError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request.

    Attributes
    ----------
    max_tokens
        Most output tokens, at least 1.
    temperature
        0 is greedy (argmax, ties to the lowest id); otherwise logits are divided by it.
    top_k
        Keep the k most likely tokens; 0 keeps all.
    top_p
        Keep the smallest set of most likely tokens whose probability reaches ``top_p``
        (nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751).
    min_p
        Drop tokens less likely than ``min_p`` times the most likely one
        (Nguyen et al. 2024, arXiv:2407.01082).
    repetition_penalty
        Over 1 makes every token of prompt and output less likely
        (CTRL, Keskar et al. 2019, arXiv:1909.05858).
    presence_penalty, frequency_penalty
        Subtracted from the logits of tokens already in the output, once or by their count.
    stop
        Strings that end the output; the string itself is not part of the text.
    stop_token_ids
        Ids that end the output; the id is kept as the last token.
    ignore_eos
        Do not stop at the model's end-of-sequence ids.
    seed
        Makes the request's draws reproducible, whatever else is in its batch.
    logprobs
        Return the log-probability of each output token and of this many alternatives.
    n
        Independent completions of the one prompt.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

    def validate(self) -> None:
        """Check every field.

        Raises
        ------
        RequestError
            Names the field, its value and the valid range.
        """
        checks = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "an integer of at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "over 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "over 0",
            ),
            (
                "presence_penalty",
                self.presence_penalty,
                math.isfinite(self.presence_penalty),
                "finite",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                math.isfinite(self.frequency_penalty),
                "finite",
            ),
            ("logprobs", self.logprobs, self.logprobs is None or self.logprobs >= 0, "0 or more"),
            ("n", self.n, self.n >= 1, "an integer of at least 1"),
            ("stop", self.stop, all(self.stop), "non-empty strings"),
        )
        for name, value, ok, valid in checks:
            if not ok:
                raise RequestError(f"{name}={value!r} is not valid: it must be {valid}.")

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is the argmax."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
