"""Trees of drafts that grow where the head is most confident.

Li, Wei, Zhang, Zhang, *EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees*,
2024, arXiv:2406.16858, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from techniques.eagle.model import HeadModel
from workbench.engine.draft_runner import DraftRunner
from workbench.engine.trees import ROOT, select_tree
from workbench.engine.upload import upload


@dataclass(frozen=True, slots=True)
class TreeStart:
    """What a request's tree grows behind.

    Attributes
    ----------
    row
        In the request table.
    num_known
        Tokens.
    room
        Tokens that its blocks hold and the head can rotate.
    """

    row: int
    num_known: int
    room: int


@dataclass(slots=True)
class _Growth:
    """A request's tree while it grows.

    Attributes
    ----------
    start
        Where.
    tokens, parents, confidences
        By node; the confidence is the log-probability of the whole path to it.
    run, run_parents
        Nodes that the head ran, in order, and for each the place among them of the node before it.
    newest
        Nodes of the last depth.
    hidden_row : dict[int, int]
        Where the last pass left the hidden state of each node that it ran; the root's under -1.
    """

    start: TreeStart
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    run: list[int] = field(default_factory=list)
    run_parents: list[int] = field(default_factory=list)
    newest: list[int] = field(default_factory=list)
    hidden_row: dict[int, int] = field(default_factory=dict)

    def add(self, parent: int, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Let a node, or the root, be followed by tokens."""
        before = 0.0 if parent < 0 else self.confidences[parent]
        for token, logprob in zip(tokens, logprobs, strict=True):
            self.newest.append(len(self.tokens))
            self.tokens.append(token)
            self.parents.append(parent)
            self.confidences.append(before + logprob)

    def choose(self, width: int) -> list[int]:
        """Of the newest nodes the most confident, which the head runs next."""
        chosen = sorted(self.newest, key=lambda node: (-self.confidences[node], node))[:width]
        chosen.sort()
        place = {node: i for i, node in enumerate(self.run)}
        self.run_parents += [place.get(self.parents[node], ROOT) for node in chosen]
        self.run += chosen
        self.newest = []
        return chosen


class TreeDrafting:
    """Grows a tree of each request, depth by depth: of the last depth the ``width`` most confident
    nodes are run in one pass, and each is followed by its ``width`` likeliest tokens.

    Parameters
    ----------
    depth
        Most drafts on a path.
    width
        Nodes that are run at a depth, and tokens that follow each.
    """

    def __init__(self, model: HeadModel, runner: DraftRunner, depth: int, width: int) -> None:
        self._model, self._runner = model, runner
        self._depth, self._width = depth, width

    def grow(
        self,
        starts: Sequence[TreeStart],
        features: torch.Tensor,
        token_ids: torch.Tensor,
        limits: Sequence[int],
    ) -> list[tuple[list[int], list[int]]]:
        """Tokens and parents by request, those of the most confident nodes.

        Parameters
        ----------
        features : Tensor [B, H]
            Of each request's last known token.
        token_ids : Tensor [B] int64
            That token.
        limits
            Most nodes.
        """
        trees = [_Growth(start) for start in starts]
        model = self._model
        model.features = features
        hidden = self._runner.run_singles(
            [start.row for start in starts], [start.num_known - 2 for start in starts], token_ids
        )
        for i, tree in enumerate(trees):
            tree.hidden_row[ROOT] = i
        self._follow(trees, [[ROOT]] * len(trees), hidden)
        for depth in range(2, self._depth + 1):
            # A node that is run writes keys behind the known tokens.
            grown = [t for t in trees if self._has_room(t)]
            if not grown:
                break
            hidden = self._run(grown, hidden, depth)
        found = []
        for tree, limit in zip(trees, limits, strict=True):
            nodes, parents = select_tree(tree.confidences, tree.parents, limit)
            found.append(([tree.tokens[node] for node in nodes], parents))
        return found

    def _has_room(self, tree: _Growth) -> bool:
        start = tree.start
        return start.num_known - 1 + len(tree.run) + self._width <= start.room

    def _run(self, trees: Sequence[_Growth], hidden: torch.Tensor, depth: int) -> torch.Tensor:
        """Run nodes of the last depth, ``depth - 1``, and add those behind them; what came out of
        the pass before was ``hidden[L, H]``."""
        chosen = [tree.choose(self._width) for tree in trees]
        before = [
            tree.hidden_row[tree.parents[node]]
            for tree, nodes in zip(trees, chosen, strict=True)
            for node in nodes
        ]
        tokens = [t.tokens[node] for t, nodes in zip(trees, chosen, strict=True) for node in nodes]
        index, ids = upload([before, tokens], hidden.device)
        self._model.features = hidden[index]
        found = self._runner.run_nodes(
            [tree.start.row for tree in trees],
            [tree.start.num_known - 1 for tree in trees],
            [tree.run_parents for tree in trees],
            ids,
            depth - 1,
        )
        row = 0
        for tree, nodes in zip(trees, chosen, strict=True):
            tree.hidden_row = {node: row + i for i, node in enumerate(nodes)}
            row += len(nodes)
        self._follow(trees, chosen, found)
        return found

    def _follow(
        self, trees: Sequence[_Growth], nodes: Sequence[Sequence[int]], hidden: torch.Tensor
    ) -> None:
        """Add what is likeliest behind these nodes, whose hidden states are ``hidden[L, H]``."""
        ids, logprobs = self._model.top(hidden, self._width)
        token_rows, logprob_rows = ids.tolist(), logprobs.tolist()
        row = 0
        for tree, own in zip(trees, nodes, strict=True):
            for node in own:
                tree.add(node, token_rows[row], logprob_rows[row])
                row += 1
