"""Perplexity: how a text is cut into windows, and what is summed over them.

The text is one stream of tokens. Windows of ``window`` tokens begin every ``stride`` tokens. With
``stride`` equal to ``window`` they are disjoint, which is how GPTQ (Frantar et al. 2022,
arXiv:2210.17323) and AWQ (Lin et al. 2023, arXiv:2306.00978) report. With a smaller one, each
window after the first scores its last ``stride`` tokens only, and the others are their context
("Perplexity of fixed-length models" in the documentation of Transformers). Only whole windows
count; what is left behind the last one is not scored. Where the tokenizer puts a BOS token before a
text by default, each window begins with one, which takes a place of the window and is never scored.
A token without any token before it in its window is not scored either.

Perplexity is ``exp`` of the mean negative log-likelihood of the scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from workbench.core.errors import ConfigError
from workbench.quality.corpus import TokenStream


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that a model sees at once.

    Attributes
    ----------
    num_scored
        How many of the last tokens are scored; each has a token before it.
    """

    token_ids: list[int]
    num_scored: int

    @property
    def scored_ids(self) -> list[int]:
        """The scored tokens."""
        return self.token_ids[-self.num_scored :]

    @property
    def first_row(self) -> int:
        """Position whose logits predict the first scored token."""
        return len(self.token_ids) - self.num_scored - 1


def cut_windows(stream: TokenStream, window: int, stride: int | None = None) -> list[Window]:
    """Cut a stream into windows.

    Parameters
    ----------
    window
        Tokens of a window, BOS included.
    stride
        Tokens from the beginning of a window to that of the next; None takes ``window``.

    Raises
    ------
    ConfigError
        The sizes do not fit each other, or the stream is shorter than a window.
    """
    if window < 2:
        raise ConfigError(f"window={window} must be at least 2: a token is scored after another.")
    if stride is None:
        stride = window
    if not 1 <= stride <= window:
        raise ConfigError(
            f"stride={stride} must be from 1 to window={window}: tokens between two windows would "
            "never be scored."
        )
    bos = [] if stream.bos_id is None else [stream.bos_id]
    room = window - len(bos)
    step = min(stride, room)
    num_tokens = len(stream.token_ids)
    if num_tokens < room:
        largest = num_tokens + len(bos)
        advice = f"window={largest} would do" if largest > 1 else "there is nothing to score"
        raise ConfigError(
            f"the text has {num_tokens} tokens, too few for one window of {window}: {advice}, or "
            "take a longer text (text=, max_tokens=)."
        )
    windows = []
    for start in range(0, num_tokens - room + 1, step):
        ids = bos + stream.token_ids[start : start + room]
        num_scored = len(ids) - 1 if start == 0 else min(step, len(ids) - 1)
        windows.append(Window(ids, num_scored))
    return windows


def token_nlls(logits: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """Negative log-likelihood in nats of tokens ``[n]`` under rows of logits ``[n, V]``.

    Returns
    -------
    Tensor [n] float64
    """
    index = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    return -torch.log_softmax(logits.double(), dim=-1).gather(1, index).squeeze(1)


@dataclass(slots=True)
class Likelihood:
    """Sums over windows, in float64.

    Attributes
    ----------
    nlls
        Negative log-likelihood in nats, by window.
    counts
        Scored tokens, by window.
    """

    nlls: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, nlls: torch.Tensor) -> None:
        """Count the scored tokens ``[n]`` of one window."""
        self.nlls.append(float(nlls.double().sum()))
        self.counts.append(len(nlls))

    @property
    def num_tokens(self) -> int:
        """Scored tokens."""
        return sum(self.counts)

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood."""
        return math.fsum(self.nlls) / self.num_tokens

    @property
    def standard_error(self) -> float | None:
        """Of :attr:`nats_per_token`, with windows as the independent draws; None for one window.

        The ratio estimator (Cochran 1977, section 2.11), since windows may score different numbers
        of tokens.
        """
        n, mean = len(self.nlls), self.nats_per_token
        if n < 2:
            return None
        squares = math.fsum(
            (nll - mean * count) ** 2 for nll, count in zip(self.nlls, self.counts, strict=True)
        )
        return math.sqrt(n / (n - 1) * squares) / self.num_tokens

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean."""
        return _exp(self.nats_per_token)

    @property
    def perplexity_error(self) -> float | None:
        """Standard error of the perplexity, to first order."""
        error = self.standard_error
        return None if error is None else self.perplexity * error

    def bits_per_byte(self, tokens_per_byte: float) -> float:
        """Bits for each byte of the text, which models of different vocabularies compare by."""
        return self.nats_per_token / math.log(2) * tokens_per_byte


def _exp(x: float) -> float:
    """Infinite where it is over what a float holds."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
