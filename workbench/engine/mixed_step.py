"""A small step of any mixture of prompts, their pieces and single tokens, up to its hidden states,
as work of the device alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from kernels.mixed_step import gather_mixed_inputs
from workbench.core.step import ForwardBatch
from workbench.engine.prepared_step import Kept, PreparedStep, StepParts
from workbench.slots.attention import PLAIN_FORM
from workbench.slots.graph_runner import MIXED

#: Columns of :attr:`MixedStep.places`: row of the request table and first token, by request; token
#: whose logits are wanted and column of the table for the new token, by request that yields one.
ROW, START, LOGITS_AT, FIRST_NEW = range(4)


@dataclass(frozen=True, slots=True)
class MixedRun:
    """A mixed step in one size, and tokens of it that pad."""

    step: MixedStep
    size: int
    num_padded_tokens: int

    def hidden(self) -> torch.Tensor:
        """Hidden states of all of its tokens, once it is queued."""
        return self.step.hidden[self.size, PLAIN_FORM]

    def states(self, num_tokens: int) -> dict[int, torch.Tensor]:
        """Kept hidden states of its first tokens, by layer."""
        return self.step.kept_states(self.size, PLAIN_FORM, num_tokens)


class MixedStep(PreparedStep):
    """Runs ``size`` tokens, shared out among requests in any way.

    Tokens behind those of the last request pad: they belong to nobody, their keys and values go to
    the trash block, and their hidden states may be anything. Requests behind the last one have no
    token. What follows the hidden states (head, draws, write-back) is launched op by op, for as
    many rows as yield a token: padded to as many requests as there may be, the head would cost more
    than its launch.

    Attributes
    ----------
    max_requests
        Most requests of a step.
    places : Tensor[B + 1, 4] int64
        By request its row and first token, the number of all tokens behind the last one; beside
        them, by request that yields a token, what the host needs on the device once the step ran.
        All that changes from outside.
    hidden : dict[tuple[int, str], Tensor[size, H]]
        Of the last step of each size.
    """

    kind = MIXED

    def __init__(self, parts: StepParts, max_tokens: int) -> None:
        table = parts.table
        self.max_requests = min(table.padding_row, max_tokens)
        self.places = torch.zeros(self.max_requests + 1, 4, dtype=torch.int64, device=table.device)
        self.places[:, ROW] = table.padding_row
        self.hidden: Kept = {}
        super().__init__(parts, max_tokens, 1, self.max_requests)

    def place_rows(self) -> torch.Tensor:
        return self.places[: self.max_requests, ROW]

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self.places.nbytes

    def num_places(self, size: int) -> int:
        """Requests of a step of this size, padding included."""
        return min(self.max_requests, size)

    def batch(self, size: int) -> ForwardBatch:
        whole, requests = self._whole, self.num_places(size)
        return dataclasses.replace(
            whole,
            input_ids=whole.input_ids[:size],
            positions=whole.positions[:size],
            query_start_loc=whole.query_start_loc[: requests + 1],
            seq_lens=whole.seq_lens[:requests],
            block_table=whole.block_table[:requests],
            slot_mapping=whole.slot_mapping[:size],
            logits_indices=whole.logits_indices[:size],
            rows=whole.rows[:requests],
            # A bound: one request may have all tokens.
            query_lens_host=[size] * requests,
            seq_lens_host=[size] * requests,
            extras={},
        )

    def gather(self, batch: ForwardBatch) -> None:
        table = self.parts.table
        gather_mixed_inputs(
            self.places[: batch.num_requests + 1],
            table.token_ids,
            table.num_computed_tokens,
            table.block_table,
            batch.block_size,
            input_ids=batch.input_ids,
            positions=batch.positions,
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            slot_mapping=batch.slot_mapping,
            batch_block_table=batch.block_table,
        )

    def finish(self, batch: ForwardBatch, hidden: torch.Tensor, key: tuple[int, str]) -> None:
        self.keep(self.hidden, key, hidden)
