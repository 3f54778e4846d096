"""Attention within a token tree: several continuations of one text verified in one pass.

Miao et al., "SpecInfer", 2023, arXiv:2305.09781; Cai et al., "Medusa", 2024, arXiv:2401.10774.

The nodes of a tree stand in a sequence one after another, each behind the node that it follows, and
a node sees the tokens before the tree, the nodes that lead to it, and itself. Kernels are told so
by a *tree* tensor, ``[T, 2 + W]`` int64, a row a query:

=============  ====================================================================================
column         of the query
=============  ====================================================================================
0              where its request's tree begins in the sequence; :data:`NO_TREE` without one
1              how many nodes lead to it, itself included; 0 for what is no node
2 to ``1 + W`` bit ``n % 64`` of word ``n // 64``: whether it sees node ``n``
=============  ====================================================================================

Its position, for sliding windows, is that of its depth behind the tokens before the tree. Which
nodes lie within a window is in the bits already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: In place of where a tree begins: behind every sequence.
NO_TREE = 2**31 - 1
_WORD = 64


@dataclass(frozen=True, slots=True)
class Tree:
    """The tree of one request.

    Attributes
    ----------
    start, num_queries
        Its request's queries. All nodes stand last among them, or all of them are nodes, the last.
    first
        Where its nodes begin in the sequence.
    parents
        By node: the node that it follows, or -1 for the last token before the tree. Parents stand
        before their children.
    """

    start: int
    num_queries: int
    first: int
    parents: Sequence[int]


def tree_rows(trees: Sequence[Tree], num_tokens: int, sliding_window: int | None) -> np.ndarray:
    """The tree tensor of a batch, on the host: ``[num_tokens, 2 + W]`` int64."""
    num_words = -(-max((len(tree.parents) for tree in trees), default=1) // _WORD)
    rows = np.zeros((num_tokens, 2 + num_words), np.int64)
    rows[:, 0] = NO_TREE
    for tree in trees:
        depths, seen = _nodes(tree.parents, sliding_window)
        count = min(tree.num_queries, len(depths))
        stop = tree.start + tree.num_queries
        rows[tree.start : stop, 0] = tree.first
        rows[stop - count : stop, 1] = depths[len(depths) - count :]
        bits = b"".join(s.to_bytes(8 * num_words, "little") for s in seen[len(seen) - count :])
        rows[stop - count : stop, 2:] = np.frombuffer(bits, "<i8").reshape(count, num_words)
    return rows


def _nodes(parents: Sequence[int], sliding_window: int | None) -> tuple[list[int], list[int]]:
    """By node, its depth, and a bit for each node that it sees."""
    depths: list[int] = []
    seen: list[int] = []
    for node, parent in enumerate(parents):
        depths.append(1 if parent < 0 else depths[parent] + 1)
        seen.append((0 if parent < 0 else seen[parent]) | 1 << node)
    if sliding_window is not None and max(depths, default=0) > sliding_window:
        for node, depth in enumerate(depths):
            while depth - depths[lowest := (seen[node] & -seen[node]).bit_length() - 1] >= (
                sliding_window
            ):
                seen[node] ^= 1 << lowest
    return depths, seen


def tree_mask(tree: Tensor, index: Tensor, num_keys: int, sliding_window: int | None) -> Tensor:
    """Which keys queries see: bool ``[..., Q, num_keys]``.

    Parameters
    ----------
    tree : Tensor [..., Q, 2 + W] int64
    index : Tensor [..., Q] int64
        Where each query stands in its sequence.
    """
    index = index.unsqueeze(-1)
    first, depth = tree[..., :1], tree[..., 1:2]
    key = torch.arange(num_keys, device=tree.device)
    node = key - first
    within = node.clamp(min=0, max=_WORD * (tree.shape[-1] - 2) - 1)
    words = tree[..., 2:].gather(-1, within // _WORD)
    mask = (key <= index) & ((node < 0) | (words >> (within % _WORD) & 1).bool())
    if sliding_window is not None:
        position = torch.where(index < first, index, first - 1 + depth)
        mask &= (node >= 0) | (key > position - sliding_window)
    return mask
