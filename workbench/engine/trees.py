"""Token trees: how they are written down, drawn up and cut.

A tree of ``n`` drafts is a list of ``n`` parents: node ``i`` follows node ``parents[i] < i``, or,
where that is -1, the last known token. So its first nodes are a tree too; ``[-1, 0]`` is a chain.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

ROOT = -1


def chain_parents(count: int) -> list[int]:
    """Parents of a chain."""
    return list(range(ROOT, count - 1))


def is_chain(parents: Sequence[int]) -> bool:
    """Whether every node follows the one before it."""
    return all(parent == i - 1 for i, parent in enumerate(parents))


def depths_of(parents: Sequence[int]) -> list[int]:
    """Nodes from the root to each node, itself included: 1 for those that follow the last known
    token."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    return depths


def path_to(parents: Sequence[int], node: int) -> list[int]:
    """Nodes from the root to a node, itself included."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def fault_of(parents: Sequence[int], token_ids: Sequence[int]) -> str | None:
    """What is wrong with a tree; None if nothing is."""
    if len(parents) != len(token_ids):
        return f"it proposed {len(token_ids)} tokens and {len(parents)} parents"
    seen: set[tuple[int, int]] = set()
    for i, (parent, token) in enumerate(zip(parents, token_ids, strict=True)):
        if not ROOT <= parent < i:
            return f"node {i} follows node {parent}, and a parent stands before its children"
        if (parent, token) in seen:
            return f"token {token} follows node {parent} twice"
        seen.add((parent, token))
    return None


def static_tree(
    top_tokens: Sequence[Sequence[int]], paths: Sequence[Sequence[int]], limit: int
) -> tuple[list[int], list[int]]:
    """A tree of one shape for all: each node is a path of ranks, ``(0, 2)`` being the third
    likeliest token at depth 2 behind the likeliest at depth 1 (Cai et al. 2024, arXiv:2401.10774,
    section 2.1.2).

    Parameters
    ----------
    top_tokens
        By depth, the likeliest tokens, whatever stands before them.
    paths
        Each after its own beginning.
    limit
        Most nodes; those of the first paths stay.

    Returns
    -------
    Tokens and parents.
    """
    place: dict[tuple[int, ...], int] = {(): ROOT}
    tokens: list[int] = []
    parents: list[int] = []
    for path in paths[:limit]:
        *before, rank = path
        if len(path) > len(top_tokens) or rank >= len(top_tokens[len(path) - 1]):
            continue
        parent = place.get(tuple(before))
        if parent is None:
            continue
        place[tuple(path)] = len(tokens)
        tokens.append(top_tokens[len(path) - 1][rank])
        parents.append(parent)
    return tokens, parents


def likeliest_paths(logprobs: Sequence[Sequence[float]], limit: int) -> list[tuple[int, ...]]:
    """The ``limit`` likeliest paths of ranks where a depth's tokens do not depend on those before
    them: what a tree verifies with the most to gain (Cai et al. 2024, section 2.3.3).

    Parameters
    ----------
    logprobs
        By depth, those of its tokens, best first.

    Returns
    -------
    Best first, so each behind its own beginning.
    """
    paths: list[tuple[int, ...]] = []
    waiting: list[tuple[float, tuple[int, ...]]] = []
    if logprobs and logprobs[0]:
        waiting.append((-logprobs[0][0], (0,)))
    while waiting and len(paths) < limit:
        cost, path = heapq.heappop(waiting)
        paths.append(path)
        depth, rank = len(path), path[-1]
        own = logprobs[depth - 1]
        if rank + 1 < len(own):
            heapq.heappush(waiting, (cost + own[rank] - own[rank + 1], (*path[:-1], rank + 1)))
        if depth < len(logprobs):
            heapq.heappush(waiting, (cost - logprobs[depth][0], (*path, 0)))
    return paths


def select_tree(
    confidences: Sequence[float], parents: Sequence[int], limit: int
) -> tuple[list[int], list[int]]:
    """The nodes of most confidence that hang together (Li et al. 2024, section 4.2 of
    arXiv:2406.16858).

    Parameters
    ----------
    confidences
        By node, of the whole path to it: no node has more than its parent.

    Returns
    -------
    The chosen nodes in order, and their parents among themselves.
    """
    ranked = sorted(range(len(parents)), key=lambda node: (-confidences[node], node))
    chosen: set[int] = set()
    for node in ranked:
        if len(chosen) == limit:
            break
        if parents[node] < 0 or parents[node] in chosen:
            chosen.add(node)
    nodes = sorted(chosen)
    place = {node: i for i, node in enumerate(nodes)}
    return nodes, [place.get(parents[node], ROOT) for node in nodes]
