"""A suffix automaton that grows by tokens and counts, in flat arrays that numba works on.

Blumer et al. 1985, *The smallest automaton recognizing the subwords of a text*: at most two states
and three edges a token, built in one pass. A state is a set of substrings that end at the same
places; beside the textbook's length and suffix link it keeps at how many places that is and the
latest of them, which is exact for substrings of up to ``depth`` tokens.
"""

from __future__ import annotations

import numpy as np
from numba import njit

#: Stands between two texts; no id is negative, so nothing is matched or drafted across it.
SEPARATOR = -1

# Columns of ``states`` and ``edges``, and entries of ``book``.
_LENGTH, _LINK, _EDGE, _COUNT, _LAST_END = range(5)
_SOURCE, _TOKEN, _TARGET, _NEXT = range(4)
_NUM_STATES, _NUM_EDGES, _WHOLE, _RECENT, _RECENT_LENGTH, _NUM_TOKENS = range(6)
_ROOT = 0
#: Scores that differ by less are equal, whatever order they were summed in.
_ROUNDING = 1e-9


@njit(cache=True)
def _slot(edges, table, state, token):
    """Where the edge of a state by a token stands in the table, or where it would."""
    mask = table.shape[0] - 1
    mixed = np.uint64(state) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= np.uint64(token + 2) * np.uint64(0xC2B2AE3D27D4EB4F)
    place = np.int64((mixed ^ (mixed >> np.uint64(29))) & np.uint64(mask))
    while table[place] >= 0:
        edge = table[place]
        if edges[edge, _SOURCE] == state and edges[edge, _TOKEN] == token:
            break
        place = (place + 1) & mask
    return place


@njit(cache=True)
def _target(edges, table, state, token):
    """State that a token leads to; -1 where none."""
    edge = table[_slot(edges, table, state, token)]
    return edges[edge, _TARGET] if edge >= 0 else np.int32(-1)


@njit(cache=True)
def _connect(states, edges, table, book, state, token, target):
    edge = book[_NUM_EDGES]
    book[_NUM_EDGES] += 1
    edges[edge, _SOURCE], edges[edge, _TOKEN], edges[edge, _TARGET] = state, token, target
    edges[edge, _NEXT] = states[state, _EDGE]
    states[state, _EDGE] = edge
    table[_slot(edges, table, state, token)] = edge


@njit(cache=True)
def _new_state(states, book, length):
    state = book[_NUM_STATES]
    book[_NUM_STATES] += 1
    states[state, _LENGTH] = length
    states[state, _LINK] = _ROOT
    states[state, _EDGE] = -1
    states[state, _COUNT] = 0
    states[state, _LAST_END] = 0
    return state


@njit(cache=True)
def _split(states, edges, table, book, source, token, state):
    """Give the shorter substrings of a state, which are about to end at one more place, their own.

    Returns the new state.
    """
    clone = _new_state(states, book, states[source, _LENGTH] + 1)
    for column in (_LINK, _COUNT, _LAST_END):
        states[clone, column] = states[state, column]
    edge = states[state, _EDGE]
    while edge >= 0:
        _connect(states, edges, table, book, clone, edges[edge, _TOKEN], edges[edge, _TARGET])
        edge = edges[edge, _NEXT]
    while source >= 0:
        edge = table[_slot(edges, table, source, token)]
        if edge < 0 or edges[edge, _TARGET] != state:
            break
        edges[edge, _TARGET] = clone
        source = states[source, _LINK]
    states[state, _LINK] = clone
    if book[_RECENT] == state and book[_RECENT_LENGTH] <= states[clone, _LENGTH]:
        book[_RECENT] = clone
    return clone


@njit(cache=True)
def _count_ends(states, edges, table, book, token, depth):
    """Note that all suffixes of up to ``depth`` tokens end here."""
    state, length = book[_RECENT], book[_RECENT_LENGTH]
    if length == depth:
        length -= 1
        if length <= states[states[state, _LINK], _LENGTH]:
            state = states[state, _LINK]
    state = np.int64(_target(edges, table, state, token))
    book[_RECENT], book[_RECENT_LENGTH] = state, length + 1
    while state != _ROOT:
        states[state, _COUNT] += 1
        states[state, _LAST_END] = book[_NUM_TOKENS]
        state = np.int64(states[state, _LINK])


@njit(cache=True)
def _extend(states, edges, table, book, tokens, depth):
    """Append tokens; there must be room."""
    for i in range(tokens.shape[0]):
        token = tokens[i]
        source = np.int64(book[_WHOLE])
        book[_NUM_TOKENS] += 1
        whole = _new_state(states, book, states[source, _LENGTH] + 1)
        book[_WHOLE] = whole
        while source >= 0 and _target(edges, table, source, token) < 0:
            _connect(states, edges, table, book, source, token, whole)
            source = np.int64(states[source, _LINK])
        if source >= 0:
            state = np.int64(_target(edges, table, source, token))
            if states[state, _LENGTH] != states[source, _LENGTH] + 1:
                state = _split(states, edges, table, book, source, token, state)
            states[whole, _LINK] = state
        _count_ends(states, edges, table, book, token, depth)


@njit(cache=True)
def _fill_table(edges, table, num_edges):
    for edge in range(num_edges):
        table[_slot(edges, table, edges[edge, _SOURCE], edges[edge, _TOKEN])] = edge


@njit(cache=True)
def _match(states, edges, table, tail):
    """State and length of the longest suffix of ``tail`` that is a substring."""
    state, length = np.int64(_ROOT), np.int64(0)
    for i in range(tail.shape[0]):
        target = _target(edges, table, state, tail[i])
        while target < 0 and state != _ROOT:
            state = np.int64(states[state, _LINK])
            length = np.int64(states[state, _LENGTH])
            target = _target(edges, table, state, tail[i])
        if target >= 0:
            state, length = np.int64(target), length + 1
        else:
            length = np.int64(0)
    return state, length


@njit(cache=True)
def _likeliest(states, edges, state):
    """Edge that was taken most often, the latest of equals, and its share; (-1, 0) where none."""
    total, best = np.int64(0), np.int64(-1)
    edge = np.int64(states[state, _EDGE])
    while edge >= 0:
        target = edges[edge, _TARGET]
        total += states[target, _COUNT]
        if edges[edge, _TOKEN] >= 0:
            if best < 0:
                best = edge
            else:
                other = edges[best, _TARGET]
                more = states[target, _COUNT] - states[other, _COUNT]
                later = states[target, _LAST_END] - states[other, _LAST_END]
                if more > 0 or (more == 0 and later > 0):
                    best = edge
        edge = np.int64(edges[edge, _NEXT])
    if best < 0:
        return best, 0.0
    return best, states[edges[best, _TARGET], _COUNT] / total


@njit(cache=True)
def _draft(
    states, edges, table, tail, limit, min_match, factor, min_probability, to_beat, best, trial
):
    """Write the draft of the highest score, if over ``to_beat``, into ``best``; length and score.

    The draft after each suffix of ``tail`` that occurred takes the likeliest token again and again;
    its score is the number of tokens that would be accepted if what follows is drawn as it was so
    far. Suffixes are tried from the longest, whose drafts may be longest.
    """
    state, length = _match(states, edges, table, tail)
    num_best, best_score = 0, to_beat
    while state != _ROOT and length >= min_match:
        most = min(limit, int(factor * length))
        if best_score >= most:
            break
        at, count, probability, score = state, 0, 1.0, 0.0
        # No later token is likelier than those before it.
        while count < most and score + probability * (most - count) > best_score:
            edge, share = _likeliest(states, edges, at)
            probability *= share
            if edge < 0 or probability < min_probability:
                break
            trial[count] = edges[edge, _TOKEN]
            count += 1
            score += probability
            at = np.int64(edges[edge, _TARGET])
        if score > best_score + _ROUNDING:
            num_best, best_score = count, score
            best[:count] = trial[:count]
        state = np.int64(states[state, _LINK])
        length = np.int64(states[state, _LENGTH])
    return num_best, best_score


#: Places for what may be added to a tree next, by node that it may have.
_FRONTIER = 32


@njit(cache=True)
def _push_children(states, edges, state, node, probability, least, frontier, chances, count):
    """Append the tokens that may follow a node, no less probable than ``least``."""
    total = np.int64(0)
    edge = np.int64(states[state, _EDGE])
    while edge >= 0:
        total += states[edges[edge, _TARGET], _COUNT]
        edge = np.int64(edges[edge, _NEXT])
    edge = np.int64(states[state, _EDGE])
    while edge >= 0 and count < chances.shape[0]:
        chance = probability * states[edges[edge, _TARGET], _COUNT] / total
        if edges[edge, _TOKEN] >= 0 and chance >= least and chance > 0:
            frontier[count, 0], frontier[count, 1] = edge, node
            chances[count] = chance
            count += 1
        edge = np.int64(edges[edge, _NEXT])
    return count


@njit(cache=True)
def _draft_tree(
    states, edges, table, tail, limit, min_match, factor, min_probability, to_beat, best, trial
):
    """As :func:`_draft`, for trees: tokens and parents into the two rows of ``best[2, limit]``.

    The tree behind each suffix takes the likeliest token that may follow any of its nodes, again
    and again. Its score is the sum of its nodes' probabilities: of all paths, one comes true.
    """
    state, length = _match(states, edges, table, tail)
    num_best, best_score = 0, to_beat
    frontier = np.empty((limit * _FRONTIER, 2), np.int64)
    chances = np.empty(limit * _FRONTIER)
    while state != _ROOT and length >= min_match:
        most = min(limit, int(factor * length))
        if best_score >= most:
            break
        count, score = 0, 0.0
        size = _push_children(
            states, edges, state, np.int64(-1), 1.0, min_probability, frontier, chances, 0
        )
        while count < most and size:
            place = 0
            for i in range(1, size):
                gain = chances[i] - chances[place]
                if gain > 0 or (
                    gain == 0
                    and states[edges[frontier[i, 0], _TARGET], _LAST_END]
                    > states[edges[frontier[place, 0], _TARGET], _LAST_END]
                ):
                    place = i
            edge, parent, chance = frontier[place, 0], frontier[place, 1], chances[place]
            if score + chance * (most - count) <= best_score:
                break
            size -= 1
            frontier[place, 0], frontier[place, 1] = frontier[size, 0], frontier[size, 1]
            chances[place] = chances[size]
            trial[0, count], trial[1, count] = edges[edge, _TOKEN], parent
            score += chance
            size = _push_children(
                states,
                edges,
                np.int64(edges[edge, _TARGET]),
                np.int64(count),
                chance,
                min_probability,
                frontier,
                chances,
                size,
            )
            count += 1
        if score > best_score + _ROUNDING:
            num_best, best_score = count, score
            best[:, :count] = trial[:, :count]
        state = np.int64(states[state, _LINK])
        length = np.int64(states[state, _LENGTH])
    return num_best, best_score


class SuffixAutomaton:
    """All substrings of a growing text, how often each occurred and what followed.

    Parameters
    ----------
    depth
        Substrings up to this length are counted; a match and the draft after it together may not
        be longer.
    capacity
        Tokens to have room for at first.
    """

    def __init__(self, depth: int, capacity: int = 64) -> None:
        self._depth = depth
        self._book = np.zeros(6, np.int64)
        self._book[_NUM_STATES] = 1
        self._capacity = 0
        self._states = np.zeros((1, 5), np.int32)
        self._states[_ROOT, _LINK] = self._states[_ROOT, _EDGE] = -1
        self._edges = np.zeros((0, 4), np.int32)
        self._table = np.zeros(0, np.int32)
        self._reserve(capacity)

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, separators included."""
        return int(self._book[_NUM_TOKENS])

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self._states.nbytes + self._edges.nbytes + self._table.nbytes

    def extend(self, tokens: np.ndarray) -> None:
        """Append int32 ``[n]`` tokens to the text."""
        needed = self.num_tokens + len(tokens)
        if needed > self._capacity:
            self._reserve(max(needed + 64, 2 * self._capacity))
        _extend(self._states, self._edges, self._table, self._book, tokens, self._depth)

    def count(self, substring: np.ndarray) -> int:
        """How often a substring of up to ``depth`` tokens occurs."""
        state, length = _match(self._states, self._edges, self._table, substring)
        return int(self._states[state, _COUNT]) if length == len(substring) else 0

    def draft(
        self,
        tail: np.ndarray,
        limit: int,
        *,
        min_match: int,
        factor: float,
        min_probability: float,
        to_beat: float,
        buffers: np.ndarray,
    ) -> tuple[list[int], float]:
        """Continue ``tail``, int32 ``[m]``, by what followed it or its suffixes most often.

        Parameters
        ----------
        limit
            Most tokens.
        min_match
            Shortest suffix to go by.
        factor
            Tokens to draft for each token of the suffix.
        min_probability
            The draft ends before its probability falls below.
        to_beat
            Only a draft is wanted of which more tokens than this are expected to be right.
        buffers
            int32 ``[2, limit]`` or more, to write into.

        Returns
        -------
        The draft, and how many of its tokens are expected to be right; none and ``to_beat`` where
        there is no better one.
        """
        count, score = _draft(
            self._states,
            self._edges,
            self._table,
            tail,
            limit,
            min_match,
            factor,
            min_probability,
            to_beat,
            buffers[0],
            buffers[1],
        )
        return buffers[0, :count].tolist(), score

    def draft_tree(
        self,
        tail: np.ndarray,
        limit: int,
        *,
        min_match: int,
        factor: float,
        min_probability: float,
        to_beat: float,
        buffers: np.ndarray,
    ) -> tuple[list[int], list[int], float]:
        """As :meth:`draft`, a tree of at most ``limit`` tokens; ``buffers`` is int32
        ``[2, 2, limit]`` or more.

        Returns
        -------
        Tokens, the place of the one that each follows, -1 for the last of ``tail``, and how many
        are expected to be right.
        """
        count, score = _draft_tree(
            self._states,
            self._edges,
            self._table,
            tail,
            limit,
            min_match,
            factor,
            min_probability,
            to_beat,
            buffers[0],
            buffers[1],
        )
        tokens, parents = buffers[0, :, :count].tolist()
        return tokens, parents, score

    def _reserve(self, capacity: int) -> None:
        """Make room for a text of so many tokens: two states and three edges each."""
        self._capacity = capacity
        states = np.empty((2 * capacity + 2, 5), np.int32)
        edges = np.empty((3 * capacity + 4, 4), np.int32)
        states[: len(self._states)] = self._states
        edges[: len(self._edges)] = self._edges
        self._states, self._edges = states, edges
        self._table = np.full(1 << (2 * len(edges) - 1).bit_length(), -1, np.int32)
        _fill_table(self._edges, self._table, self._book[_NUM_EDGES])
