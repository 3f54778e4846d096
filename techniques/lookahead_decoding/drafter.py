"""Drafts by n-grams that the target makes itself, by Jacobi iteration beside its own decoding."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from workbench.core.errors import ConfigError
from workbench.slots.drafter import DraftContext, Drafter, DraftTokens


@dataclass(frozen=True, slots=True)
class LookaheadConfig:
    """Options of :class:`Lookahead`.

    Attributes
    ----------
    window
        Positions ahead that are guessed at once: the paper's W.
    ngram
        Tokens of an n-gram, its key included: the paper's N.
    max_candidates
        Most n-grams that are verified in a step: the paper's G.
    from_prompt
        Whether the n-grams of the prompt are candidates too.
    pool_size
        Most n-grams that are kept of a request by key.
    """

    window: int = 4
    ngram: int = 4
    max_candidates: int = 4
    from_prompt: bool = True
    pool_size: int = 16


@dataclass(slots=True)
class _Request:
    """What is kept of a request.

    Attributes
    ----------
    levels
        The window: up to ``N - 1`` lines of ``W`` guesses, the oldest first. Guess ``j`` of a line
        was drawn behind guess ``j`` of the line before.
    prompt : ndarray[int32]
        What was known at first, whose n-grams are candidates; empty where they are not.
    pool
        The window's n-grams by first token, the latest last; a dict for its order.
    newest
        Nodes of the last line in the tree that was proposed, and how many nodes that had.
    """

    levels: list[list[int]]
    prompt: np.ndarray
    pool: dict[int, dict[tuple[int, ...], None]] = field(default_factory=dict)
    newest: list[int] = field(default_factory=list)
    num_nodes: int = 0


class _Trie:
    """Nodes of a tree, each once."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self._places: dict[tuple[int, int], int] = {}

    def add(self, parent: int, token: int) -> int:
        """The node of this token behind a node, or behind the root, -1."""
        place = self._places.get((parent, token))
        if place is None:
            place = self._places[parent, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
        return place


class Lookahead(Drafter):
    """Every step also runs a window of guesses, which are improved by what the target draws behind
    them; the n-grams that they pass through are tried where their first token comes up.

    In the tree, guess ``j`` of the oldest line follows guess ``j - 1`` of it, and in the others
    guess ``j`` of the line before: so each sees what the paper's mask lets it see.
    """

    Config = LookaheadConfig
    config: LookaheadConfig
    proposes_trees = True
    reads_drawn = True

    def __init__(self, config: LookaheadConfig) -> None:
        super().__init__(config)
        for name, value, least in (
            ("window", config.window, 1),
            ("ngram", config.ngram, 2),
            ("max_candidates", config.max_candidates, 1),
            ("pool_size", config.pool_size, 1),
        ):
            if value < least:
                raise ConfigError(f"engine.drafter.{name}={value} must be {least} or more.")
        each = config.ngram - 1
        self.num_lookahead_tokens = each * (config.window + config.max_candidates)
        self._behind = np.arange(1, config.ngram)  # places of an n-gram's rest
        self._requests: dict[str, _Request] = {}
        self.reset_counters()

    def propose(self, context: DraftContext) -> DraftTokens:
        drafts: list[list[int]] = []
        parents: list[list[int] | None] = []
        for i, (request_id, tokens, limit) in enumerate(
            zip(context.request_ids, context.token_ids, context.max_draft_tokens, strict=True)
        ):
            request = self._requests.get(request_id)
            if request is None:
                request = self._requests[request_id] = self._begin(tokens)
            elif context.drawn is not None:
                self._learn(request, context.drawn[i])
            tree = self._tree(request, int(tokens[-1]), min(limit, self.num_lookahead_tokens))
            drafts.append(tree.tokens)
            parents.append(tree.parents)
            self._drafted_tokens += len(tree.tokens)
        return DraftTokens(drafts, None, parents)

    def finish(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def clear_cached(self) -> None:
        self._requests.clear()

    def counters(self) -> dict[str, float]:
        return {
            "drafted_tokens": self._drafted_tokens,
            "candidate_ngrams": self._candidates,
            "collected_ngrams": self._collected,
        }

    def reset_counters(self) -> None:
        self._drafted_tokens = self._candidates = self._collected = 0

    def _begin(self, tokens: np.ndarray) -> _Request:
        """A window of tokens from here and there, the same for the same tokens."""
        rng = random.Random(len(tokens))
        guesses = [int(tokens[rng.randrange(len(tokens))]) for _ in range(self.config.window)]
        # A copy: the row of the tokens is another request's one day.
        return _Request([guesses], tokens[: len(tokens) * self.config.from_prompt].copy())

    def _found(self, request: _Request, last: int) -> list[tuple[int, ...]]:
        """What may follow a token: the window's n-grams, then the prompt's, the latest first."""
        most, rest = self.config.max_candidates, self.config.ngram - 1
        found = list(request.pool.get(last, {}))[: -most - 1 : -1]
        if len(found) < most and len(request.prompt) > rest:
            places = np.flatnonzero(request.prompt[:-rest] == last)[: -most - 1 : -1]
            there = request.prompt[places[:, None] + self._behind].tolist()
            found = list(dict.fromkeys((*found, *map(tuple, there))))
        return found[:most]

    def _note(self, request: _Request, ngram: list[int]) -> None:
        """Put an n-gram into the pool, as its latest."""
        known = request.pool.setdefault(ngram[0], {})
        rest = tuple(ngram[1:])
        known.pop(rest, None)
        known[rest] = None
        if len(known) > self.config.pool_size:
            del known[next(iter(known))]

    def _learn(self, request: _Request, drawn: list[int]) -> None:
        """Take what was drawn behind the newest line as the next one."""
        if not request.newest or len(drawn) <= request.num_nodes:
            return  # some guesses were not run
        request.levels.append([drawn[node + 1] for node in request.newest])
        if len(request.levels) == self.config.ngram:
            for ngram in zip(*request.levels, strict=True):
                self._note(request, list(ngram))
                self._collected += 1
            del request.levels[0]

    def _tree(self, request: _Request, last: int, limit: int) -> _Trie:
        """Candidates first, since a step may run fewer nodes than are proposed."""
        trie = _Trie()
        for rest in self._found(request, last):
            if len(trie.tokens) + len(rest) > limit:
                break
            node = -1
            for token in rest:
                node = trie.add(node, token)
            self._candidates += 1
        request.newest = []
        if len(trie.tokens) + self.config.window * len(request.levels) <= limit:
            line, node = [], -1
            for token in request.levels[0]:
                node = trie.add(node, token)
                line.append(node)
            for level in request.levels[1:]:
                line = [trie.add(node, token) for node, token in zip(line, level, strict=True)]
            request.newest = line
        request.num_nodes = len(trie.tokens)
        return trie
