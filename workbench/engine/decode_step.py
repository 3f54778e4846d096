"""A step of single tokens as work of the device alone."""

from __future__ import annotations

import torch

from kernels.decode_step import gather_decode_inputs, store_decoded
from workbench.core.step import ForwardBatch
from workbench.engine.prepared_step import StepParts, UniformStep
from workbench.slots.graph_runner import DECODE


class DecodeStep(UniformStep):
    """Runs the last token of each place, and writes what it draws back.

    Attributes
    ----------
    rows : Tensor[B] int64
        Row of the request table of each place; all that changes from outside.
    """

    kind = DECODE

    def __init__(self, parts: StepParts) -> None:
        table = parts.table
        size = table.padding_row
        self.rows = torch.full((size,), size, dtype=torch.int64, device=table.device)
        super().__init__(parts, max_size=size, tokens_each=1)
        self.forms = parts.attention.step_forms(self._whole)

    def place_rows(self) -> torch.Tensor:
        return self.rows

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self.rows.nbytes

    def gather(self, batch: ForwardBatch) -> None:
        table = self.parts.table
        gather_decode_inputs(
            batch.rows,
            table.token_ids,
            table.num_computed_tokens,
            table.block_table,
            batch.block_size,
            input_ids=batch.input_ids,
            positions=batch.positions,
            seq_lens=batch.seq_lens,
            slot_mapping=batch.slot_mapping,
            batch_block_table=batch.block_table,
        )

    def store(self, batch: ForwardBatch, drawn: torch.Tensor) -> None:
        table = self.parts.table
        self.new_ids[: batch.num_requests, 0].copy_(drawn)
        store_decoded(
            batch.rows, batch.positions, drawn, table.token_ids, table.num_computed_tokens
        )
