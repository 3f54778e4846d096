"""Drafts that are trees, from the drafter to the step that verifies them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.tree_attention import Tree, tree_rows
from workbench.core.step import ForwardBatch
from workbench.engine.request_table import RequestTable
from workbench.engine.step_inputs import StepInputs
from workbench.engine.trees import chain_parents, depths_of, is_chain, path_to
from workbench.engine.upload import upload
from workbench.slots.attention import TokenTrees
from workbench.slots.drafter import DraftTokens
from workbench.slots.kv_pool import KVPool
from workbench.slots.verifier import TreeShape


@dataclass(frozen=True, slots=True)
class TreeInputs:
    """The trees of a step.

    Attributes
    ----------
    parents
        By sampling request, those of its drafts, chains included.
    shape
        The same on the device.
    shift : Tensor[T] int64
        By how many positions a token stands before where a chain's would.
    """

    parents: list[list[int]]
    shape: TreeShape
    shift: torch.Tensor


def token_trees(trees: Sequence[Tree], num_tokens: int, device: torch.device) -> TokenTrees:
    """Trees of a batch, as attention backends find them."""
    return TokenTrees(trees, {None: upload(tree_rows(trees, num_tokens, None), device)})


class ProposedTrees:
    """Trees that wait for verification, by row of the request table. Chains are not among them."""

    def __init__(self, table: RequestTable, pool: KVPool) -> None:
        self._table, self._pool = table, pool
        self._by_row: dict[int, list[int]] = {}

    def note(self, rows: Sequence[int], drafts: DraftTokens) -> None:
        """Keep those of new drafts; what was there before is void."""
        if drafts.parents is None and not self._by_row:
            return
        for k, row in enumerate(rows):
            parents = None if drafts.parents is None else drafts.parents[k]
            if parents is not None and not is_chain(parents):
                self._by_row[row] = parents
            else:
                self._by_row.pop(row, None)

    def apply(self, inputs: StepInputs) -> TreeInputs | None:
        """Let the batch's drafts be trees where they are: positions, and who sees whom. None where
        all are chains.

        Nodes keep the slots of a chain: where KV is written goes by a node's place in its tree.
        """
        rows, counts, batch = inputs.rows, inputs.num_drafts, inputs.batch
        if not any(n and row in self._by_row for row, n in zip(rows, counts, strict=True)):
            return None
        shift = np.zeros(batch.num_tokens, np.int64)
        trees: list[Tree] = []
        parents_of: list[list[int]] = []
        start = 0
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            num_queries = batch.query_lens_host[i]
            parents = self._by_row.get(row, [])[:count]
            if not parents or is_chain(parents):
                parents = chain_parents(count)
            else:
                depths = depths_of(parents)
                shift[start + num_queries - count : start + num_queries] = depths
                shift[start + num_queries - count : start + num_queries] -= np.arange(1, count + 1)
                first = batch.seq_lens_host[i] - count
                trees.append(Tree(start, num_queries, first, parents))
            parents_of.append(parents)
            start += num_queries
        if not trees:
            return None
        on_device = upload(shift, self._table.device)
        batch.positions = batch.positions + on_device
        batch.extras[TokenTrees] = token_trees(trees, batch.num_tokens, self._table.device)
        of_sampling = [parents_of[i] for i in inputs.sampling]
        return TreeInputs(of_sampling, self._shape(of_sampling), on_device)

    def contexts(self, inputs: StepInputs, trees: TreeInputs) -> list[torch.Tensor]:
        """Tokens before the one that each row of logits draws, int64."""
        table, contexts = self._table, []
        ends = inputs.first_new.tolist()
        for index, end, parents in zip(inputs.sampling, ends, trees.parents, strict=True):
            tokens = table.token_ids[inputs.rows[index]]
            known, nodes = tokens[:end].long(), tokens[end : end + len(parents)].long()
            contexts.append(known)
            for node in range(len(parents)):
                path = upload(path_to(parents, node), table.device)
                contexts.append(torch.cat([known, nodes[path]]))
        return contexts

    def make_chains(
        self,
        inputs: StepInputs,
        trees: TreeInputs,
        path: torch.Tensor,
        kept: Mapping[int, torch.Tensor],
    ) -> dict[int, torch.Tensor]:
        """Make of a step that was verified one of chains, for what comes after it.

        KV, tokens and ``kept`` hidden states of accepted nodes, ``path[B, D]`` of
        :class:`Accepted`, go where those of a chain would stand. Returns the hidden states.
        """
        batch = inputs.batch
        first = batch.logits_indices[upload(inputs.first_row, self._table.device)].unsqueeze(1)
        place = torch.arange(1, path.shape[1] + 1, device=path.device)
        self._move_kv(batch, first, place, path)
        end, is_node = batch.num_tokens, path >= 0
        order = torch.arange(end + 1, device=path.device)  # with a place for what is no node
        at = torch.where(is_node, first + place, end)
        order[at.view(-1)] = torch.where(is_node, first + path, end).view(-1)
        order = order[:end]
        inputs.batch = dataclasses.replace(
            batch,
            input_ids=batch.input_ids[order],
            positions=batch.positions - trees.shift,
            extras={key: own for key, own in batch.extras.items() if key is not TokenTrees},
        )
        return {layer: hidden[order] for layer, hidden in kept.items()}

    def _move_kv(
        self, batch: ForwardBatch, first: torch.Tensor, place: torch.Tensor, path: torch.Tensor
    ) -> None:
        pool = self._pool
        moves = (path >= 0) & (path != place)
        if not path.is_cuda and not bool(moves.any()):
            return
        trash = pool.num_blocks * pool.block_size
        last = batch.num_tokens - 1
        slots = batch.slot_mapping
        source = slots[(first + path.clamp(min=0)).clamp(max=last)].masked_fill(~moves, trash)
        target = slots[(first + place).clamp(max=last)].masked_fill(~moves, trash)
        pool.move(source.view(-1), target.view(-1))

    def _shape(self, parents_of: list[list[int]]) -> TreeShape:
        width = max(map(len, parents_of))
        parents = np.zeros((len(parents_of), width), np.int64)
        depths = np.zeros_like(parents)
        for b, parents_here in enumerate(parents_of):
            count = len(parents_here)
            parents[b, :count] = np.array(parents_here, np.int64) + 1
            depths[b, :count] = depths_of(parents_here)
        packed = upload(np.stack([parents, depths]), self._table.device)
        return TreeShape(packed[0], packed[1], int(depths.max()))
