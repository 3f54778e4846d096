"""A step of single tokens as work of the device alone, for whoever captures or replays it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from kernels.decode_step import gather_decode_inputs, store_decoded
from workbench.core.step import ForwardBatch
from workbench.engine.request_table import RequestTable
from workbench.engine.upload import borrowed
from workbench.slots.attention import (
    PLAIN_FORM,
    AttentionBackend,
    ForwardContext,
    StepForm,
)
from workbench.slots.component import Component
from workbench.slots.kv_pool import KVPool
from workbench.slots.sampler import Sampler, SamplingMetadata

if TYPE_CHECKING:
    from workbench.engine.model_runner import Model


class DecodeStep:
    """Runs the last token of each of the first ``size`` places, and writes what it draws back.

    Draws greedily; who wants another token overwrites it, from :attr:`logits`, before the next
    step. Places that no request holds run the table's padding row: one token whose keys and values
    go to the pool's trash block.

    Attributes
    ----------
    rows : Tensor[B] int64
        Row of the request table of each place; all that changes from outside.
    new_ids : Tensor[B] int64
        Tokens drawn by the last step.
    logits : dict[tuple[int, str], Tensor[size, V]]
        Of the last step of each size and form.
    forms : tuple[StepForm, ...]
        Those of the attention backend, beside the plain one.
    """

    def __init__(
        self,
        model: Model,
        table: RequestTable,
        pool: KVPool,
        attention: AttentionBackend,
        sampler: Sampler,
        components: Mapping[str, Component],
    ) -> None:
        self._model, self._table, self._pool = model, table, pool
        self._attention, self._sampler, self._components = attention, sampler, components
        size, columns = table.padding_row, table.block_table.shape[1]
        table.block_table[table.padding_row] = pool.num_blocks
        table.host_block_table[table.padding_row] = pool.num_blocks
        device = table.device
        self.rows = torch.full((size,), table.padding_row, dtype=torch.int64, device=device)
        self.new_ids = torch.zeros(size, dtype=torch.int64, device=device)
        self.logits: dict[tuple[int, str], torch.Tensor] = {}
        self._owned: dict[tuple[int, str], torch.Tensor] = {}
        long: dict[str, Any] = {"dtype": torch.int64, "device": device}
        short: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self._whole = ForwardBatch(
            input_ids=torch.zeros(size, **long),
            positions=torch.zeros(size, **long),
            query_start_loc=torch.arange(size + 1, **short),
            seq_lens=torch.ones(size, **short),
            block_table=torch.full((size, columns), pool.num_blocks, **short),
            slot_mapping=torch.zeros(size, **long),
            logits_indices=torch.arange(size, **long),
            rows=self.rows,
            query_lens_host=[1] * size,
            seq_lens_host=[1] * size,
            block_size=pool.block_size,
        )
        self.forms: tuple[StepForm, ...] = attention.step_forms(self._whole)

    @property
    def max_size(self) -> int:
        """Most requests of a step."""
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of its own buffers on the device; logits lie in the memory of whoever runs it."""
        whole = self._whole
        held = (
            self.rows,
            self.new_ids,
            whole.input_ids,
            whole.positions,
            whole.query_start_loc,
            whole.seq_lens,
            whole.block_table,
            whole.slot_mapping,
            whole.logits_indices,
        )
        return sum(tensor.nbytes for tensor in held)

    def counters(self) -> dict[str, float]:
        """Counts of the components that it drives, as ``slot.counter``."""
        return {
            f"{slot}.{name}": value
            for slot, component in self._components.items()
            for name, value in component.counters().items()
        }

    def batch(self, size: int) -> ForwardBatch:
        """The first places as a batch: views of the buffers. Its host lengths are not kept up."""
        whole = self._whole
        return dataclasses.replace(
            whole,
            input_ids=whole.input_ids[:size],
            positions=whole.positions[:size],
            query_start_loc=whole.query_start_loc[: size + 1],
            seq_lens=whole.seq_lens[:size],
            block_table=whole.block_table[:size],
            slot_mapping=whole.slot_mapping[:size],
            logits_indices=whole.logits_indices[:size],
            rows=whole.rows[:size],
            query_lens_host=whole.query_lens_host[:size],
            seq_lens_host=whole.seq_lens_host[:size],
            extras={},
        )

    def run(self, size: int, form: str = PLAIN_FORM) -> None:
        """Queue the step for the first ``size`` places."""
        self._lend()
        table, batch = self._table, self.batch(size)
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
        metadata = self._attention.prepared_metadata(batch, form)
        context = ForwardContext(batch, self._attention, metadata, self._pool)
        logits = self._model.compute_logits(self._model.forward(batch, context))
        nothing = batch.positions[:0]
        greedy = SamplingMetadata(params=[], positions=nothing, seeds=nothing)
        drawn = self._sampler.sample(logits, greedy).token_ids
        self.new_ids[:size].copy_(drawn)
        self._owned[size, form] = self.logits[size, form] = logits
        store_decoded(
            batch.rows, batch.positions, drawn, table.token_ids, table.num_computed_tokens
        )

    def _lend(self) -> None:
        """Let logits of earlier runs be overwritten: captured steps of all sizes share memory."""
        if self.rows.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        for key, logits in self._owned.items():
            self.logits[key] = borrowed(logits)
        self._owned.clear()
