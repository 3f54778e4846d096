"""Drafts by what followed the longest repeated suffix most often."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from techniques.suffix_decoding.automaton import SEPARATOR, SuffixAutomaton
from workbench.core.errors import ConfigError
from workbench.engine.trees import is_chain
from workbench.slots.drafter import DraftContext, Drafter, DraftTokens


@dataclass(frozen=True, slots=True)
class SuffixConfig:
    """Options of :class:`Suffix`.

    Attributes
    ----------
    num_draft_tokens
        Most drafts a request a step.
    max_match, min_match
        Lengths of the suffix that is looked up.
    draft_factor
        Drafts for each token of the suffix that was found: the paper's alpha.
    min_probability
        A draft ends before its probability, by what followed so far, falls below.
    shared_tokens
        Most tokens of finished outputs that are kept for all requests; 0 keeps none.
    tree
        Propose a tree, in which several continuations may stand, instead of one of them.
    """

    num_draft_tokens: int = 8
    max_match: int = 16
    min_match: int = 1
    draft_factor: float = 1.0
    min_probability: float = 0.1
    shared_tokens: int = 65536
    tree: bool = False


class Suffix(Drafter):
    """Looks for the context's suffixes in the request's own text and in what finished ones wrote.

    Of all drafts that these suggest, the one that is expected to have most tokens accepted is
    proposed.
    """

    Config = SuffixConfig
    config: SuffixConfig

    def __init__(self, config: SuffixConfig) -> None:
        super().__init__(config)
        _check(config)
        self.num_lookahead_tokens = config.num_draft_tokens
        self._depth = config.max_match + config.num_draft_tokens
        self._requests: dict[str, _RequestText] = {}
        self._buffers = np.empty((2, config.num_draft_tokens), np.int32)
        self._tree_buffers = np.empty((2, 2, config.num_draft_tokens), np.int32)
        self.proposes_trees = config.tree
        self._shared: list[SuffixAutomaton] = []  # the younger generation first
        self.clear_cached()
        self.reset_counters()
        self._warm_up()

    def propose(self, context: DraftContext) -> DraftTokens:
        drafts: list[list[int]] = []
        parents: list[list[int] | None] | None = [] if self.config.tree else None
        for request_id, tokens, limit, num_prompt_tokens in zip(
            context.request_ids,
            context.token_ids,
            context.max_draft_tokens,
            context.num_prompt_tokens,
            strict=True,
        ):
            text = self._requests.get(request_id)
            if text is None:
                text = _RequestText(self._depth, tokens, num_prompt_tokens)
                self._requests[request_id] = text
            text.extend(tokens)
            limit = min(limit, self.config.num_draft_tokens)
            if parents is None:
                draft = self._draft(text, tokens, limit)
            else:
                draft, followed = self._draft_tree(text, tokens, limit)
                parents.append(followed)
            self._drafted_tokens += len(draft)
            drafts.append(draft)
        return DraftTokens(drafts, None, parents)

    def finish(self, request_id: str) -> None:
        text = self._requests.pop(request_id, None)
        if text is None or text.is_old or not self.config.shared_tokens:
            return
        output = text.output()
        # Two generations: when the younger one is full, the older one goes.
        room = max(2, self.config.shared_tokens // 2)
        if self._shared[0].num_tokens + len(output) + 1 > room:
            self._shared = [SuffixAutomaton(self._depth), self._shared[0]]
        self._shared[0].extend(np.append(output[-(room - 1) :], np.int32(SEPARATOR)))

    def clear_cached(self) -> None:
        self._shared = [SuffixAutomaton(self._depth) for _ in range(2)]
        for text in self._requests.values():  # a request may be done before it is told finished
            text.is_old = True

    def counters(self) -> dict[str, float]:
        return {
            "drafted_tokens": self._drafted_tokens,
            "shared_drafted_tokens": self._shared_drafted_tokens,
            "branching_trees": self._branching_trees,
        }

    def reset_counters(self) -> None:
        self._drafted_tokens = self._shared_drafted_tokens = self._branching_trees = 0

    @property
    def num_shared_tokens(self) -> int:
        """Tokens of finished outputs that are kept, separators included."""
        return sum(automaton.num_tokens for automaton in self._shared)

    def _draft(self, text: _RequestText, tokens: np.ndarray, limit: int) -> list[int]:
        if limit < 1:
            return []
        config, tail = self.config, tokens[-self.config.max_match :]
        best: list[int] = []
        best_score, is_shared = 0.0, False
        for automaton in (text.automaton, *self._shared):
            if automaton.num_tokens and best_score < limit:
                draft, score = automaton.draft(
                    tail,
                    limit,
                    min_match=config.min_match,
                    factor=config.draft_factor,
                    min_probability=config.min_probability,
                    to_beat=best_score,
                    buffers=self._buffers,
                )
                if score > best_score:
                    best, best_score, is_shared = draft, score, automaton is not text.automaton
        if is_shared:
            self._shared_drafted_tokens += len(best)
        return best

    def _draft_tree(
        self, text: _RequestText, tokens: np.ndarray, limit: int
    ) -> tuple[list[int], list[int]]:
        """Drafts and their parents."""
        best: tuple[list[int], list[int]] = ([], [])
        if limit < 1:
            return best
        config, tail = self.config, tokens[-self.config.max_match :]
        best_score, is_shared = 0.0, False
        for automaton in (text.automaton, *self._shared):
            if automaton.num_tokens and best_score < limit:
                draft, parents, score = automaton.draft_tree(
                    tail,
                    limit,
                    min_match=config.min_match,
                    factor=config.draft_factor,
                    min_probability=config.min_probability,
                    to_beat=best_score,
                    buffers=self._tree_buffers,
                )
                if score > best_score:
                    best, best_score = (draft, parents), score
                    is_shared = automaton is not text.automaton
        if is_shared:
            self._shared_drafted_tokens += len(best[0])
        self._branching_trees += not is_chain(best[1])
        return best

    def _warm_up(self) -> None:
        """Compile now, with arrays like those to come."""
        tokens = np.array([1, 2, 1, 3], np.int32)
        tokens.flags.writeable = False
        text = _RequestText(self._depth, tokens, 1)
        text.extend(tokens)
        text.automaton.extend(text.output())
        if self.config.tree:
            self._draft_tree(text, tokens, 1)
        else:
            self._draft(text, tokens, 1)


class _RequestText:
    """One request's tokens and their automaton."""

    def __init__(self, depth: int, tokens: np.ndarray, num_prompt_tokens: int) -> None:
        self.automaton = SuffixAutomaton(depth, 2 * len(tokens))
        self.is_old = False  # began before what was learnt was last forgotten
        self._num_prompt_tokens = num_prompt_tokens
        self._output: list[np.ndarray] = []

    def extend(self, tokens: np.ndarray) -> None:
        """Append what is new of the request's tokens."""
        first = self.automaton.num_tokens
        if first < len(tokens):
            self.automaton.extend(tokens[first:])
            # A copy: the row of the tokens is another request's one day.
            self._output.append(tokens[max(first, self._num_prompt_tokens) :].copy())

    def output(self) -> np.ndarray:
        """The tokens after the prompt, int32 ``[n]``."""
        return np.concatenate([np.empty(0, np.int32), *self._output])


def _check(config: SuffixConfig) -> None:
    for name, is_valid, valid in (
        ("num_draft_tokens", config.num_draft_tokens >= 1, "1 or more"),
        ("min_match", config.min_match >= 1, "1 or more"),
        ("max_match", config.max_match >= config.min_match, "min_match or more"),
        ("draft_factor", config.draft_factor > 0, "over 0"),
        ("min_probability", 0 <= config.min_probability <= 1, "between 0 and 1"),
        ("shared_tokens", config.shared_tokens >= 0, "0 (none) or more"),
    ):
        if not is_valid:
            value = getattr(config, name)
            raise ConfigError(f"engine.drafter.{name}={value} must be {valid}.")
