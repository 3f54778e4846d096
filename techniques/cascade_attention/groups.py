"""Which requests of a batch start with the same blocks, and how to group them best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Requests, by their place in the batch, that share their first ``num_blocks`` blocks."""

    members: tuple[int, ...]
    num_blocks: int

    @property
    def saved_blocks(self) -> int:
        """Blocks that need not be read again."""
        return (len(self.members) - 1) * self.num_blocks


def find_groups(
    block_table: np.ndarray,
    num_complete: Sequence[int],
    *,
    min_requests: int,
    min_blocks: int,
) -> list[PrefixGroup]:
    """Groups that together save the most reads; no request is in two.

    Prefixes nest: all may share a system prompt, and some of them a document after it. Reading a
    prefix once for a group saves ``(members - 1) * blocks``. So, from the longest prefix to the
    shortest, either all who share it make one group, or the groups within stay and those who are
    in none make one, whichever saves more.

    Parameters
    ----------
    block_table : ndarray [B, P] int32
        Blocks of each request in order.
    num_complete : sequence of int [B]
        Leading blocks of each request whose KV is all written; no more of it is shared.
    min_requests, min_blocks
        The smallest group, and the shortest prefix, that are worth it.

    Returns
    -------
    list of PrefixGroup
        Members ascending, groups in the order of their first member.
    """
    rows = _candidates(block_table, num_complete, min_requests, min_blocks)
    if not rows:
        return []
    rows, common = _side_by_side(block_table, rows, [num_complete[b] for b in rows])
    common[common < min_blocks] = 0
    found = _choose(common.tolist(), min_requests)
    groups = [PrefixGroup(tuple(sorted(rows[i] for i in chosen)), n) for chosen, n in found]
    return sorted(groups, key=lambda group: group.members)


def _candidates(
    block_table: np.ndarray, num_complete: Sequence[int], min_requests: int, min_blocks: int
) -> list[int]:
    """Requests that could be in a group: long enough, and not alone with their first block."""
    rows = [b for b, n in enumerate(num_complete) if n >= min_blocks]
    if len(rows) < min_requests:
        return []
    _, which, counts = np.unique(block_table[rows, 0], return_inverse=True, return_counts=True)
    return [b for b, many in zip(rows, counts[which] >= min_requests, strict=True) if many]


def _side_by_side(
    block_table: np.ndarray, rows: list[int], lengths: list[int]
) -> tuple[list[int], np.ndarray]:
    """Requests sorted by content, so that those with a prefix in common stand side by side however
    long it is, and how many blocks each shares with the next one."""
    width = max(lengths)
    blocks = block_table[rows, :width]
    ends = np.array(lengths)[:, None] <= np.arange(width)
    np.copyto(blocks, -1 - np.arange(len(rows), dtype=np.int32)[:, None], where=ends)
    data, size = blocks.tobytes(), blocks.itemsize * width
    order = sorted(range(len(rows)), key=lambda i: data[i * size : (i + 1) * size])
    blocks = blocks[order]
    differs = np.ones((len(rows) - 1, width + 1), bool)  # at the latest behind the last block
    np.not_equal(blocks[1:], blocks[:-1], out=differs[:, :-1])
    return [rows[i] for i in order], differs.argmax(1)


@dataclass(slots=True)
class _Span:
    """Neighbours that share ``shared`` blocks: the groups among them, and who is in none."""

    shared: int
    left: list[int] = field(default_factory=list)
    groups: list[tuple[list[int], int]] = field(default_factory=list)
    saved: int = 0

    def include(self, inner: _Span) -> None:
        self.left += inner.left
        self.groups += inner.groups
        self.saved += inner.saved

    def close(self, min_requests: int) -> None:
        """One group of all, or one of those that are left."""

        def gain(count: int) -> int:
            return (count - 1) * self.shared if count >= min_requests else 0

        everyone = [*self.left, *(i for members, _ in self.groups for i in members)]
        together, of_rest = gain(len(everyone)), gain(len(self.left))
        if together and together >= self.saved + of_rest:
            self.left, self.groups, self.saved = [], [(everyone, self.shared)], together
        elif of_rest:
            self.groups.append((self.left, self.shared))
            self.left, self.saved = [], self.saved + of_rest


def _choose(common: Sequence[int], min_requests: int) -> list[tuple[list[int], int]]:
    """Groups of a row of requests: their places in it, and the blocks that they share.

    Parameters
    ----------
    common
        Blocks that each request shares with the next one; all between two requests share the
        smallest number on the way. Spans of neighbours nest, and are closed from within.
    """
    stack = [_Span(0)]
    for place, shared in enumerate([*common, 0]):
        if stack[-1].shared < shared:
            stack.append(_Span(shared, [place]))
            continue
        stack[-1].left.append(place)
        while stack[-1].shared > shared:
            span = stack.pop()
            span.close(min_requests)
            if stack[-1].shared < shared:
                stack.append(_Span(shared))
            stack[-1].include(span)
    (root,) = stack
    return root.groups
