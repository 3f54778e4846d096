"""A step that verifies drafts as work of the device alone."""

from __future__ import annotations

import torch

from kernels.verify_step import gather_verify_inputs, store_verified
from workbench.core.step import ForwardBatch
from workbench.engine.prepared_step import StepParts, UniformStep
from workbench.slots.graph_runner import VERIFY
from workbench.slots.verifier import Verifier


class VerifyStep(UniformStep):
    """Runs the last token and the drafts of each place, as many tokens in every one.

    A request's own tokens stand last in its place. In front of them, where it has fewer drafts than
    there may be, tokens before its last one run over again: what they need is in the pool, what
    they write goes to the trash block, and their logits are not read. So a request takes part if it
    has ``tokens_each`` tokens, its drafts included.

    Drafts are kept as far as they are the likeliest tokens, where the verifier agrees to that
    (:attr:`~workbench.slots.verifier.Verifier.is_greedy_match`); with another one, tokens are not
    drawn here.

    Attributes
    ----------
    places : Tensor[B, 2] int64
        Row of the request table, and number of drafts, of each place; all that changes from
        outside.
    """

    kind = VERIFY

    def __init__(
        self, parts: StepParts, verifier: Verifier, max_size: int, tokens_each: int
    ) -> None:
        table = parts.table
        self.places = torch.zeros(max_size, 2, dtype=torch.int64, device=table.device)
        self.places[:, 0] = table.padding_row
        self._verifier = verifier
        self.writes_tokens = verifier.is_greedy_match
        super().__init__(parts, max_size, tokens_each)

    def place_rows(self) -> torch.Tensor:
        return self.places[:, 0]

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self.places.nbytes

    def gather(self, batch: ForwardBatch) -> None:
        table = self.parts.table
        gather_verify_inputs(
            self.places[: batch.num_requests],
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
        table, size = self.parts.table, batch.num_requests
        shape, places = (size, self.tokens_each), self.places[:size]
        drawn = self._verifier.overrule(
            drawn.view(shape), batch.input_ids.view(shape), places[:, 1]
        )
        store_verified(
            places,
            batch.seq_lens,
            batch.input_ids,
            drawn.view(-1),
            table.token_ids,
            table.num_computed_tokens,
            self.new_ids[:size],
        )
