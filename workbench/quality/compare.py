"""Two engines over the same windows: KL divergence and top-1 agreement, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from workbench.core.errors import WorkbenchError
from workbench.engine.engine import Engine
from workbench.quality.perplexity import Likelihood, Window, token_nlls
from workbench.quality.prompt_logits import run_prompt, slices


@dataclass(slots=True)
class Divergence:
    """How far an engine's distributions lie from those of another, by scored token.

    Attributes
    ----------
    kl
        KL divergence ``sum p log(p / q)`` in nats, ``p`` the other's and ``q`` the engine's.
    agrees
        Whether both have their highest logit at the same token.
    """

    kl: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean KL divergence."""
        return math.fsum(self.kl) / len(self.kl)

    @property
    def maximum(self) -> float:
        """Highest KL divergence."""
        return max(self.kl)

    @property
    def agreement(self) -> float:
        """Share of tokens with the same top-1 token."""
        return sum(self.agrees) / len(self.agrees)

    def percentile(self, share: float) -> float:
        """KL divergence that ``share`` percent of the tokens do not exceed."""
        return float(np.percentile(self.kl, share))


@dataclass(slots=True)
class Evaluation:
    """What was found of an engine.

    Attributes
    ----------
    divergence
        From the base; None for the base itself, and where there is none.
    """

    likelihood: Likelihood = field(default_factory=Likelihood)
    divergence: Divergence | None = None


def kl_divergence(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``KL(base || other)`` in nats of rows of logits ``[n, V]``, over the whole vocabulary.

    Returns
    -------
    Tensor [n] float64
        Never under 0, which rounding could take it.
    """
    base = torch.log_softmax(base.double(), dim=-1)
    other = torch.log_softmax(other.double(), dim=-1)
    terms = base.exp() * (base - other)
    # A token that the base rules out adds nothing, whatever the other says of it.
    return terms.masked_fill_(base == -math.inf, 0.0).sum(-1).clamp_(min=0.0)


def evaluate(
    engines: Sequence[Engine],
    windows: Sequence[Window],
    progress: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """Run every window through every engine, and hold the others against the first.

    All engines are there at once and no more is kept of a window than its hidden states: the
    logits of whole texts would not fit into memory.

    Parameters
    ----------
    engines
        The base first, with room for the longest window each.
    progress
        Told how many of how many windows are done.

    Raises
    ------
    WorkbenchError
        An engine gave logits that are no numbers, or cannot serve a window.
    """
    found = [Evaluation(divergence=Divergence() if i else None) for i in range(len(engines))]
    for number, window in enumerate(windows):
        _add_window(engines, window, found)
        for row, evaluation in enumerate(found):
            if math.isnan(evaluation.likelihood.nlls[-1]):
                raise WorkbenchError(
                    f"engine {row} of {len(engines)} gave logits that are no numbers, in window "
                    f"{number}. float16 overflows in some models: try dtype=bfloat16 or float32."
                )
        if progress is not None:
            progress(number + 1, len(windows))
    return found


def _add_window(engines: Sequence[Engine], window: Window, found: Sequence[Evaluation]) -> None:
    # The logits behind the last token predict nothing of the window.
    prompts = [run_prompt(engine, window.token_ids[:-1]) for engine in engines]
    nlls: list[list[torch.Tensor]] = [[] for _ in engines]
    first = window.first_row
    for start, stop in slices(first, first + window.num_scored):
        ids = window.token_ids[start + 1 : stop + 1]
        base = prompts[0].rows(start, stop)
        nlls[0].append(token_nlls(base, ids))
        for row in range(1, len(engines)):
            logits = prompts[row].rows(start, stop).to(base.device)
            nlls[row].append(token_nlls(logits, ids))
            divergence = found[row].divergence
            assert divergence is not None
            divergence.kl += kl_divergence(base, logits).tolist()
            divergence.agrees += (base.argmax(-1) == logits.argmax(-1)).tolist()
    for evaluation, parts in zip(found, nlls, strict=True):
        evaluation.likelihood.add(torch.cat(parts))
