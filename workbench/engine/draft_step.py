"""Drafting with a model as work of the device alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import torch

import kernels
from kernels.draft_step import advance_drafts, gather_draft_inputs
from workbench.core.step import ForwardBatch
from workbench.engine.draft_runner import DraftRunner
from workbench.engine.prepared_step import PreparedStep, StepParts
from workbench.engine.upload import upload_into
from workbench.slots.attention import PLAIN_FORM
from workbench.slots.graph_runner import DRAFT


class DraftStep(PreparedStep):
    """Runs the last tokens that a model has not seen, and drafts after them, greedily.

    Every place runs its request's last ``tokens_each`` known tokens, whether or not some of them
    were run before: what is written again is the same. So a request takes part if it has that many
    known tokens and no more of them are missing.

    Attributes
    ----------
    places : Tensor[B, 2] int64
        Row of the request table, and how many tokens its KV has room for, of each place; all that
        changes from outside.
    drafts : Tensor[B, K] int64
        Of the last step, which has also written them to the table, behind the known tokens.
    """

    kind = DRAFT
    #: Positions by which the token that stands at one runs ahead of it.
    ids_ahead: ClassVar[int] = 0

    def __init__(
        self,
        parts: StepParts,
        runner: DraftRunner,
        max_size: int,
        tokens_each: int,
        num_drafts: int,
    ) -> None:
        table = parts.table
        self.places = torch.zeros(max_size, 2, dtype=torch.int64, device=table.device)
        self.places[:, 0] = table.padding_row
        self.places[:, 1] = 1
        self.drafts = torch.zeros(max_size, num_drafts, dtype=torch.int64, device=table.device)
        self._runner = runner
        super().__init__(parts, max_size, tokens_each, num_requests=max_size)
        whole = self._whole
        starts = torch.arange(max_size + 1, device=table.device)
        whole.query_start_loc.copy_(starts * tokens_each)
        whole.seq_lens.fill_(tokens_each)
        self._starts = starts.int()
        self._last = starts[1:] * tokens_each - 1

    def place_rows(self) -> torch.Tensor:
        return self.places[:, 0]

    @property
    def num_bytes(self) -> int:
        own = (self.places, self.drafts, self._starts, self._last)
        return super().num_bytes + sum(tensor.nbytes for tensor in own)

    def fill(self, rows: list[int], limits: list[int], size: int) -> None:
        """Say which rows run, and how many tokens their KV has room for."""
        places = np.empty((size, 2), np.int64)
        places[:, 0], places[:, 1] = self.parts.table.padding_row, 1
        places[: len(rows), 0], places[: len(rows), 1] = rows, limits
        upload_into(self.places[:size], places)

    def batch(self, size: int) -> ForwardBatch:
        whole, tokens = self._whole, size * self.tokens_each
        return dataclasses.replace(
            whole,
            input_ids=whole.input_ids[:tokens],
            positions=whole.positions[:tokens],
            query_start_loc=whole.query_start_loc[: size + 1],
            seq_lens=whole.seq_lens[:size],
            block_table=whole.block_table[:size],
            slot_mapping=whole.slot_mapping[:tokens],
            logits_indices=self._last[:size],
            rows=whole.rows[:size],
            query_lens_host=whole.query_lens_host[:size],
            seq_lens_host=whole.seq_lens_host[:size],
            extras={},
        )

    def gather(self, batch: ForwardBatch) -> None:
        table = self.parts.table
        gather_draft_inputs(
            self.places[: batch.num_requests],
            table.token_ids,
            table.num_computed_tokens,
            table.block_table,
            batch.block_size,
            self.ids_ahead,
            self.drafts.shape[1],
            input_ids=batch.input_ids,
            positions=batch.positions,
            seq_lens=batch.seq_lens,
            slot_mapping=batch.slot_mapping,
            batch_block_table=batch.block_table,
        )

    def run(self, size: int, form: str = PLAIN_FORM) -> None:
        self._lend()
        runner, batch = self._runner, self.batch(size)
        self.gather(batch)
        hidden = runner.forward_prepared(batch)
        self.finish(batch, hidden, (size, form))

    def likeliest(self, hidden: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        """Likeliest token ``[L]`` int64 behind these tokens, by default all."""
        return kernels.argmax(self._runner.logits(hidden, index))

    def finish(self, batch: ForwardBatch, hidden: torch.Tensor, key: tuple[int, str]) -> None:
        runner, size = self._runner, batch.num_requests
        places, drafts = self.places[:size], self.drafts[:size]
        drawn = self.likeliest(hidden, None if self.tokens_each == 1 else batch.logits_indices)
        single = batch
        if self.tokens_each > 1:
            single = dataclasses.replace(
                batch,
                input_ids=drawn.clone(),
                positions=batch.positions[batch.logits_indices],
                slot_mapping=batch.slot_mapping[:size],
                query_start_loc=self._starts[: size + 1],
                logits_indices=self._starts[:size].long(),
                query_lens_host=[1] * size,
                extras={},
            )
        table, last = self.parts.table, drafts.shape[1] - 1
        for index in range(last + 1):
            advance_drafts(
                drawn,
                places,
                single.block_table,
                single.block_size,
                self.parts.pool.num_blocks,
                token_ids=table.token_ids,
                num_computed_tokens=table.num_computed_tokens,
                input_ids=single.input_ids,
                positions=single.positions,
                seq_lens=single.seq_lens,
                slot_mapping=single.slot_mapping,
                drafts=drafts,
                index=index,
            )
            if index < last:
                drawn = self.likeliest(runner.forward_prepared(single), None)
