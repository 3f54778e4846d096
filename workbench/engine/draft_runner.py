"""Runs a drafting model over the request table: what it has not seen, then token after token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

import kernels
from kernels.tree_attention import Tree
from workbench.core.step import ForwardBatch, SchedulerOutput
from workbench.engine.proposed_trees import token_trees
from workbench.engine.request_table import RequestTable
from workbench.engine.upload import upload
from workbench.slots.attention import PLAIN_FORM, AttentionBackend, ForwardContext, TokenTrees
from workbench.slots.kv_pool import KVPool
from workbench.slots.sampler import (
    SamplingMetadata,
    invert_cdf,
    target_probs,
    uniform_from_seed,
)

#: Makes of a request's seed that of drafts which are tested by what they were drawn from.
_DRAFT_SALT = 0x2545F4914F6CDD1D


class DraftingModel(Protocol):
    """What is asked of a model that drafts."""

    def forward(self, batch: ForwardBatch, context: ForwardContext) -> torch.Tensor:
        """Hidden states ``[T, H]``."""
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[L, V]`` from hidden states ``[L, H]``."""
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of a request that a drafting model runs: ``start <= position < end``, in a row of the
    table."""

    row: int
    start: int
    end: int


class DraftRunner:
    """A model, the layers of the pool that it writes, and an attention backend of its own."""

    def __init__(
        self,
        model: DraftingModel,
        table: RequestTable,
        pool: KVPool,
        attention: AttentionBackend,
        vocab_size: int,
    ) -> None:
        self._model, self._table = model, table
        self.pool, self.attention = pool, attention
        self._vocab_size = vocab_size
        self._arange = torch.arange(table.padding_row + 1, device=table.device)
        #: Forward passes and their tokens.
        self.num_passes = self.num_tokens = 0

    def capacity(self, row: int) -> int:
        """Tokens that a row's blocks hold."""
        return self._table.num_blocks[row] * self.pool.block_size

    def run(self, spans: Sequence[Span]) -> torch.Tensor:
        """Run known tokens; logits ``[B, V]`` after the last of each span, in float or the model's
        dtype."""
        batch = self._batch(spans)
        return self.logits(self.forward(batch), batch.logits_indices)

    def draft(
        self,
        spans: Sequence[Span],
        num_drafts: int,
        draw: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> torch.Tensor:
        """Run known tokens up to each request's last, and draft ``num_drafts`` tokens after them.

        Parameters
        ----------
        draw
            Tokens ``[B]`` int64 from logits ``[B, V]``, for the given place in the drafts.

        Returns
        -------
        Tensor [B, num_drafts] int64
            On the device. Behind the end of a request's blocks they mean nothing.
        """
        drawn = draw(self.run(spans), 0)
        return self._draft_singles(spans, drawn, [drawn], num_drafts, draw)

    def draft_on(
        self,
        rows: Sequence[int],
        positions: Sequence[int],
        token_ids: torch.Tensor,
        num_drafts: int,
        draw: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> torch.Tensor:
        """Draft by passes over one token of each request: the first runs ``token_ids[B]`` at these
        positions, each other one what was drawn before it. Returns what :meth:`draft` does."""
        before = [Span(row, at - 1, at) for row, at in zip(rows, positions, strict=True)]
        drafts: list[torch.Tensor] = []
        return self._draft_singles(before, token_ids, drafts, num_drafts, draw)

    def run_singles(
        self, rows: Sequence[int], positions: Sequence[int], token_ids: torch.Tensor
    ) -> torch.Tensor:
        """Run one token of each request, ``token_ids[B]``, at these positions, which its blocks
        hold: hidden states ``[B, H]``."""
        before = [Span(row, at - 1, at) for row, at in zip(rows, positions, strict=True)]
        batch, limits = self._single_tokens(before, [self.capacity(row) for row in rows])
        self.move_on(batch, limits, token_ids)
        batch.seq_lens_host = [at + 1 for at in positions]
        return self.forward(batch)

    def run_nodes(
        self,
        rows: Sequence[int],
        first: Sequence[int],
        parents: Sequence[Sequence[int]],
        token_ids: torch.Tensor,
        depth: int,
    ) -> torch.Tensor:
        """Run the newest nodes of a tree of each request: hidden states ``[T, H]``.

        Parameters
        ----------
        first
            Where each request's nodes begin in its sequence; they stand there one after another,
            in slots that its blocks hold.
        parents
            By request and node, those that were run before included, as of
            :mod:`workbench.engine.trees`. All trees have as many nodes.
        token_ids : Tensor [T] int64
            Of the newest nodes, as many of each request.
        depth
            Theirs.
        """
        table, device, size = self._table, self._device, len(rows)
        each, num_nodes = len(token_ids) // size, len(parents[0])
        packed = upload([list(rows), list(first)], device)
        own, starts = packed[0], packed[1]
        owner = self._first(size).repeat_interleave(each)
        places = self._first(num_nodes)[num_nodes - each :].repeat(size) + starts[owner]
        blocks = table.block_table[own]
        lengths = [start + num_nodes for start in first]
        trees = [
            Tree(i * each, each, start, of_tree)
            for i, (start, of_tree) in enumerate(zip(first, parents, strict=True))
        ]
        batch = ForwardBatch(
            input_ids=token_ids,
            positions=starts[owner] + (depth - 1),
            query_start_loc=(self._first(size + 1) * each).to(torch.int32),
            seq_lens=(starts + num_nodes).to(torch.int32),
            block_table=blocks,
            slot_mapping=self._slots(blocks, owner, places),
            logits_indices=self._first(len(token_ids)),
            rows=own,
            query_lens_host=[each] * size,
            seq_lens_host=lengths,
            block_size=self.pool.block_size,
            host_rows=(table.host_block_table, list(rows)),
            extras={TokenTrees: token_trees(trees, len(token_ids), device)},
        )
        return self.forward(batch)

    def _draft_singles(
        self,
        before: Sequence[Span],
        drawn: torch.Tensor,
        drafts: list[torch.Tensor],
        num_drafts: int,
        draw: Callable[[torch.Tensor, int], torch.Tensor],
    ) -> torch.Tensor:
        """Complete ``drafts``, with what was ``drawn`` behind the end of each span."""
        if len(drafts) < num_drafts:
            limits_host = [self.capacity(span.row) for span in before]
            batch, limits = self._single_tokens(before, limits_host)
            for place in range(len(drafts), num_drafts):
                self.move_on(batch, limits, drawn)
                batch.seq_lens_host = [
                    min(length + 1, limit)
                    for length, limit in zip(batch.seq_lens_host, limits_host, strict=True)
                ]
                drawn = draw(self.logits(self.forward(batch), None), place)
                drafts.append(drawn)
        return torch.stack(drafts, dim=1)

    def forward_prepared(self, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states ``[T, H]`` of a batch of which only what lies on the device is true."""
        metadata = self.attention.prepared_metadata(batch, PLAIN_FORM)
        return self._model.forward(
            batch, ForwardContext(batch, self.attention, metadata, self.pool)
        )

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Hidden states ``[T, H]``."""
        self.num_passes += 1
        self.num_tokens += batch.num_tokens
        metadata = self.attention.build_metadata(batch)
        return self._model.forward(
            batch, ForwardContext(batch, self.attention, metadata, self.pool)
        )

    def logits(self, hidden: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        """Logits ``[L, V]`` behind these tokens, by default all, over the target's vocabulary,
        whatever the model pads its own to."""
        selected = hidden if index is None else hidden[index]
        logits = self._model.compute_logits(selected)
        width = logits.shape[1]
        if width < self._vocab_size:
            logits = torch.nn.functional.pad(
                logits, (0, self._vocab_size - width), value=-torch.inf
            )
        return logits[:, : self._vocab_size]

    def _batch(self, spans: Sequence[Span]) -> ForwardBatch:
        table, device = self._table, self._table.device
        rows_host = [span.row for span in spans]
        lengths = [span.end - span.start for span in spans]
        packed = upload([rows_host, [span.start for span in spans], lengths], device)
        rows, starts, lens = packed[0], packed[1], packed[2]
        size, num_tokens = len(spans), sum(lengths)
        ends = torch.cumsum(lens, 0)
        first = torch.cat([ends.new_zeros(1), ends])
        owner = torch.repeat_interleave(self._first(size), lens, output_size=num_tokens)
        positions = starts[owner] + self._first(num_tokens) - first[owner]
        blocks = table.block_table[rows]
        return ForwardBatch(
            input_ids=table.token_ids[rows[owner], positions].long(),
            positions=positions,
            query_start_loc=first.to(torch.int32),
            seq_lens=(starts + lens).to(torch.int32),
            block_table=blocks,
            slot_mapping=self._slots(blocks, owner, positions),
            logits_indices=ends - 1,
            rows=rows,
            query_lens_host=lengths,
            seq_lens_host=[span.end for span in spans],
            block_size=self.pool.block_size,
            host_rows=(table.host_block_table, rows_host),
        )

    def _single_tokens(
        self, spans: Sequence[Span], capacities: list[int]
    ) -> tuple[ForwardBatch, torch.Tensor]:
        """A batch of each request's last known token, to be moved on; and how many tokens their
        blocks hold, ``[B]``."""
        table, size = self._table, len(spans)
        rows_host = [span.row for span in spans]
        ends_host = [span.end for span in spans]
        packed = upload(
            [rows_host, ends_host, [self.capacity(row) for row in rows_host]], self._device
        )
        rows, ends, limits = packed[0], packed[1], packed[2]
        batch = ForwardBatch(
            input_ids=rows,  # until it is moved on
            positions=ends - 1,
            query_start_loc=self._first(size + 1).to(torch.int32),
            seq_lens=ends.to(torch.int32),
            block_table=table.block_table[rows],
            slot_mapping=rows,
            logits_indices=self._first(size),
            rows=rows,
            query_lens_host=[1] * size,
            seq_lens_host=ends_host,
            block_size=self.pool.block_size,
            host_rows=(table.host_block_table, rows_host),
        )
        return batch, limits

    def move_on(self, batch: ForwardBatch, limits: torch.Tensor, drawn: torch.Tensor) -> None:
        """The next token of each request, ``drawn[B]``, on the device. From ``limits[B]`` on, where
        its blocks end, it goes to the trash block, since nobody will look at its drafts."""
        positions = batch.positions + 1
        inside = positions < limits
        batch.positions = torch.minimum(positions, limits - 1)
        batch.input_ids = drawn
        slots = self._slots(batch.block_table, batch.logits_indices, batch.positions)
        batch.slot_mapping = torch.where(inside, slots, self.pool.num_blocks * batch.block_size)
        batch.seq_lens = (batch.positions + 1).to(torch.int32)

    @property
    def _device(self) -> torch.device:
        return self._table.device

    def _slots(
        self, blocks: torch.Tensor, owner: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        size = self.pool.block_size
        block = blocks[owner, torch.div(positions, size, rounding_mode="floor")]
        return block.long() * size + positions % size

    def _first(self, count: int) -> torch.Tensor:
        """``0 .. count - 1`` on the device; not to be written."""
        if count > len(self._arange):
            self._arange = torch.arange(2 * count, device=self._device)
        return self._arange[:count]


class FilledBlocks:
    """How far each block of the pool holds a drafting model's KV for what is in it now.

    The target's own progress says nothing of it: a drafting model may not have been asked about a
    request, and its last tokens it never sees.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._filled = np.zeros(num_blocks + 1, np.int64)  # leading slots, by block
        self._block_size = block_size

    def note_plan(self, plan: SchedulerOutput) -> None:
        """Blocks that are given out hold something else from now on."""
        for new in plan.new_requests:
            shared = new.num_computed_tokens // self._block_size
            self._filled[new.block_ids[shared:]] = 0
        for blocks in plan.new_block_ids.values():
            self._filled[blocks] = 0
        if plan.copies_in:
            self._filled[[block for _, block in plan.copies_in]] = 0

    def length(self, blocks: np.ndarray, end: int) -> int:
        """Of a request's tokens before ``end``, how many at the front are filled."""
        needed = -(-end // self._block_size)
        filled = self._filled[blocks[:needed]]
        short = np.flatnonzero(filled < self._block_size)
        if not len(short):
            return end
        first = int(short[0])
        return min(end, first * self._block_size + int(filled[first]))

    def fill(self, blocks: np.ndarray, start: int, end: int) -> None:
        """Tokens ``start <= position < end`` were run, and all before them."""
        size = self._block_size
        first, last = start // size, -(-end // size)
        ends = np.minimum(size, end - np.arange(first, last) * size)
        self._filled[blocks[first:last]] = ends


class DraftDraws:
    """Draws drafts as each request draws: greedily, or at its temperature and truncation.

    Parameters
    ----------
    tests_probs
        Whether the drafts are tested by what they were drawn from. Then they are drawn by numbers
        of their own; else by those that the target's draws are made by, so that two distributions
        that are alike draw the same token.
    """

    def __init__(
        self, table: RequestTable, rows: Sequence[int], ends: Sequence[int], tests_probs: bool
    ) -> None:
        params = [table.params[row] for row in rows]
        self._params = [p for p in params if p is not None]
        self.all_greedy = all(p.is_greedy for p in self._params)
        self._tests_probs = tests_probs
        self._probs: list[torch.Tensor] = []
        if not self.all_greedy:
            index, self._ends = upload([list(rows), list(ends)], table.device)
            self._seeds = table.seeds[index]
            self._used_seeds = self._seeds
            if tests_probs:
                salt = torch.full_like(self._seeds, _DRAFT_SALT)
                self._used_seeds = (uniform_from_seed(self._seeds, salt) * 2.0**53).long()

    def draw(self, logits: torch.Tensor, place: int) -> torch.Tensor:
        """Tokens ``[B]`` int64 from logits ``[B, V]``, for a place in the drafts."""
        if self.all_greedy:
            return kernels.argmax(logits)
        positions = self._ends + place
        metadata = SamplingMetadata(self._params, positions, self._seeds, all_greedy=False)
        probs = target_probs(logits, metadata)
        if self._tests_probs:
            probs = probs / probs.sum(-1, keepdim=True)
            self._probs.append(probs)
        return invert_cdf(probs, uniform_from_seed(self._used_seeds, positions))

    def probs(self) -> torch.Tensor | None:
        """What the drafts were drawn from, ``[B, K, V]`` float32; None where nobody asks."""
        return torch.stack(self._probs, dim=1) if self._probs else None
