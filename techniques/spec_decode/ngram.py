"""Drafts copied from where the last few tokens stood before (prompt lookup decoding)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workbench.core.errors import ConfigError
from workbench.slots.drafter import DraftContext, Drafter, DraftTokens

#: New tokens up to which a loop is faster than columns.
_FEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class NgramConfig:
    """Options of :class:`Ngram`.

    Attributes
    ----------
    num_draft_tokens
        Drafts a request a step.
    max_ngram, min_ngram
        Lengths of the suffix that is looked up, longest first.
    """

    num_draft_tokens: int = 8
    max_ngram: int = 4
    min_ngram: int = 2


class Ngram(Drafter):
    """Looks the last n tokens up in the request's own prompt and output.

    The latest earlier occurrence is continued. An index from n-gram to position is kept by
    request and extended by the new tokens only, so a step costs the same however long the
    context is.
    """

    Config = NgramConfig
    config: NgramConfig

    def __init__(self, config: NgramConfig) -> None:
        super().__init__(config)
        if not 1 <= config.min_ngram <= config.max_ngram:
            raise ConfigError(
                f"engine.drafter.min_ngram={config.min_ngram} and max_ngram={config.max_ngram}: "
                "1 <= min_ngram <= max_ngram must hold."
            )
        if config.num_draft_tokens < 1:
            raise ConfigError(
                f"engine.drafter.num_draft_tokens={config.num_draft_tokens} must be 1 or more."
            )
        self.num_lookahead_tokens = config.num_draft_tokens
        self._index: dict[str, _NgramIndex] = {}
        self._drafted_tokens = 0

    def propose(self, context: DraftContext) -> DraftTokens:
        drafts = []
        for request_id, tokens, limit in zip(
            context.request_ids, context.token_ids, context.max_draft_tokens, strict=True
        ):
            index = self._index.get(request_id)
            if index is None:
                index = self._index[request_id] = _NgramIndex(self.config)
            draft = index.continuation(tokens, min(limit, self.config.num_draft_tokens))
            self._drafted_tokens += len(draft)
            drafts.append(draft)
        return DraftTokens(drafts)

    def finish(self, request_id: str) -> None:
        self._index.pop(request_id, None)

    def counters(self) -> dict[str, float]:
        return {"drafted_tokens": self._drafted_tokens}

    def reset_counters(self) -> None:
        self._drafted_tokens = 0


class _NgramIndex:
    """Where each n-gram of one request was last followed by something."""

    def __init__(self, config: NgramConfig) -> None:
        self._sizes = range(config.max_ngram, config.min_ngram - 1, -1)
        # One dictionary a size: keys of one length hash and compare faster than mixed ones.
        self._after: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in self._sizes}
        self._num_indexed = 0

    def continuation(self, tokens: np.ndarray, limit: int) -> list[int]:
        """Up to ``limit`` tokens that followed the longest suffix seen before."""
        num_tokens = len(tokens)
        base = max(0, min(self._num_indexed + 1, num_tokens) - self._sizes.start)
        recent = tokens[base:].tolist()
        if num_tokens - 1 > self._num_indexed:
            self._extend(recent, base)
        if limit < 1:
            return []
        for size, after in self._after.items():
            if size < num_tokens:
                start = after.get(tuple(recent[-size:]))
                if start is not None:
                    draft: list[int] = tokens[start : start + limit].tolist()
                    return draft
        return []

    def _extend(self, recent: list[int], base: int) -> None:
        """Index every n-gram that ends before the last token (the last has no continuation).

        ``recent`` are the tokens from ``base`` on, which begins so early that each n-gram that
        ends at a new token is whole.
        """
        stop = len(recent) - 1
        first = self._num_indexed - base
        self._num_indexed = base + stop
        if stop - first > _FEW_TOKENS:
            for size, after in self._after.items():
                columns = [recent[offset:] for offset in range(size)]
                # zip makes the tuples without a line of Python a token.
                after.update(
                    zip(
                        zip(*columns, strict=False),
                        range(base + size, base + stop + 1),
                        strict=False,
                    )
                )
            return
        for size, after in self._after.items():
            for end in range(max(first + 1, size), stop + 1):
                after[tuple(recent[end - size : end])] = base + end
