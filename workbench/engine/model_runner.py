"""From a plan to tokens: gather the batch, run the model, verify, write back, draft."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from workbench.core.step import (
    ForwardBatch,
    ModelRunnerOutput,
    SchedulerOutput,
    TokenLogprobs,
)
from workbench.engine.request_table import RequestTable
from workbench.slots.attention import AttentionBackend, ForwardContext
from workbench.slots.drafter import DraftContext, Drafter
from workbench.slots.graph_runner import GraphRunner
from workbench.slots.kv_pool import KVPool
from workbench.slots.sampler import Sampler, SamplingMetadata
from workbench.slots.verifier import Accepted, DraftsToVerify, Verifier


class Model(Protocol):
    """What the runner asks of a model."""

    def forward(self, batch: ForwardBatch, context: ForwardContext) -> torch.Tensor:
        """Hidden states ``[T, H]``."""
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[L, V]`` from hidden states ``[L, H]``."""
        ...


@dataclass(frozen=True, slots=True)
class RunnerParts:
    """The components that a model runner drives."""

    model: Model
    table: RequestTable
    pool: KVPool
    attention: AttentionBackend
    graph_runner: GraphRunner
    sampler: Sampler
    drafter: Drafter
    verifier: Verifier


@dataclass(slots=True)
class _Inputs:
    """A batch and what the host knows of it. ``S`` requests yield a token in this step."""

    batch: ForwardBatch
    rows: list[int]
    rows_index: np.ndarray  # the same, for the host's books
    sampling: list[int]  # S indices into the batch
    num_drafts: list[int]  # by request of the batch
    first_row: list[int]  # S first rows of logits
    first_new: torch.Tensor  # S columns of the table that take the first new token
    max_drafts: int


@dataclass(slots=True)
class _Steady:
    """What a batch of single tokens keeps from step to step while the same requests run.

    The plan of such steps carries the very list of ids of the one before, which is how they are
    known.
    """

    request_ids: list[str]
    rows_host: list[int]
    rows_index: np.ndarray
    indices: list[int]
    rows: torch.Tensor
    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    positions: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor


class ModelRunner:
    """Owns the device's state: the request table, the KV pool and the model."""

    def __init__(self, parts: RunnerParts) -> None:
        self.parts = parts
        self.table = parts.table
        self._arange = torch.arange(self.table.token_ids.shape[0], device=self.table.device)
        self._steady: _Steady | None = None

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step of the plan."""
        clock = _PartClock()
        parts = self.parts
        self._apply_changes(plan)
        inputs = self._gather(plan)
        batch = inputs.batch
        context = ForwardContext(
            batch, parts.attention, parts.attention.build_metadata(batch), parts.pool
        )
        clock.lap("prepare")
        descriptor = parts.graph_runner.dispatch(batch)
        hidden = parts.graph_runner.run(
            descriptor, batch, lambda b: parts.model.forward(b, context)
        )
        tokens: list[list[int]] = []
        logits = accepted = None
        selected = hidden[:0]
        if inputs.sampling:
            logits, selected = self._logits(inputs, hidden)
        clock.lap("model")
        if logits is not None:
            accepted = parts.verifier.verify(
                self._drafts(inputs), logits, self._sampling_metadata(inputs), parts.sampler
            )
        self._advance(inputs, accepted)
        if accepted is not None:
            tokens = accepted.token_ids.tolist()
            if inputs.max_drafts:
                tokens = [[t for t in row if t >= 0] for row in tokens]
        clock.lap("sample")
        drafts = self._draft(plan, inputs, tokens, selected)
        clock.lap("draft")
        return self._output(plan, inputs, tokens, drafts, accepted, descriptor.mode, clock)

    # -- inputs -------------------------------------------------------------------------------

    def _apply_changes(self, plan: SchedulerOutput) -> None:
        if plan.new_requests or plan.finished_request_ids:
            self._steady = None  # an id may have come back with another row
        for request_id in plan.finished_request_ids:
            self.table.remove(request_id)
            self.parts.drafter.finish(request_id)
        for new in plan.new_requests:
            self.table.add(new)
        for request_id, blocks in plan.new_block_ids.items():
            self.table.append_blocks(self.table.row_of[request_id], blocks)

    def _gather(self, plan: SchedulerOutput) -> _Inputs:
        """Gather the batch from the table: a few integers go to the device, all else is there."""
        steady = self._steady
        if steady is not None and plan.request_ids is steady.request_ids:
            return self._gather_again(plan, steady)
        rows_host = [self.table.row_of[request_id] for request_id in plan.request_ids]
        if plan.total_num_scheduled_tokens == len(rows_host) and all(plan.samples):
            return self._gather_decode(plan, rows_host)
        self._steady = None
        return self._gather_mixed(plan, rows_host)

    def _gather_decode(self, plan: SchedulerOutput, rows_host: list[int]) -> _Inputs:
        """Every request runs its last token."""
        table, size = self.table, len(rows_host)
        rows = torch.tensor(rows_host, dtype=torch.int64).to(table.device, non_blocking=True)
        positions = table.num_computed_tokens[rows]
        blocks, index = table.block_table[rows], self._first_arange(size)
        self._steady = _Steady(
            request_ids=plan.request_ids,
            rows_host=rows_host,
            rows_index=np.array(rows_host),
            rows=rows,
            block_table=blocks,
            query_start_loc=self._first_arange(size + 1).to(torch.int32),
            indices=list(range(size)),
            positions=positions,
            seq_lens=(positions + 1).to(torch.int32),
            slots=self._slots(blocks, index, positions),
        )
        return self._decode_inputs(plan, self._steady)

    def _gather_again(self, plan: SchedulerOutput, steady: _Steady) -> _Inputs:
        """The same requests as in the last step, each one token further: nothing is gathered
        again but the tokens themselves, and block tables where a request enters a block."""
        steady.positions.add_(1)
        steady.seq_lens.add_(1)
        block_size = self.parts.pool.block_size
        if not (self.table.num_computed_host[steady.rows_index] % block_size).all():
            # A token opens a block; the next slot is not beside the last one.
            steady.block_table = self.table.block_table[steady.rows]
            index = self._first_arange(len(steady.rows_host))
            steady.slots = self._slots(steady.block_table, index, steady.positions)
        else:
            steady.slots.add_(1)
        return self._decode_inputs(plan, steady)

    def _decode_inputs(self, plan: SchedulerOutput, steady: _Steady) -> _Inputs:
        table, size = self.table, len(steady.rows_host)
        batch = ForwardBatch(
            input_ids=table.token_ids[steady.rows, steady.positions].long(),
            positions=steady.positions,
            query_start_loc=steady.query_start_loc,
            seq_lens=steady.seq_lens,
            block_table=steady.block_table,
            slot_mapping=steady.slots,
            logits_indices=self._first_arange(size),
            rows=steady.rows,
            query_lens_host=plan.num_scheduled_tokens,
            seq_lens_host=table.num_tokens[steady.rows_index].tolist(),
            block_size=self.parts.pool.block_size,
        )
        return _Inputs(
            batch=batch,
            rows=steady.rows_host,
            rows_index=steady.rows_index,
            sampling=steady.indices,
            num_drafts=plan.num_draft_tokens,
            first_row=steady.indices,
            first_new=steady.positions + 1,
            max_drafts=0,
        )

    def _slots(
        self, block_table: torch.Tensor, owner: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Where the KV of tokens goes, ``[T]`` int64."""
        block_size = self.parts.pool.block_size
        block = block_table[owner, torch.div(positions, block_size, rounding_mode="floor")]
        return block.long() * block_size + positions % block_size

    def _gather_mixed(self, plan: SchedulerOutput, rows_host: list[int]) -> _Inputs:
        """Queries of any length: prompts, their pieces, drafts and single tokens."""
        table = self.table
        query_lens = plan.num_scheduled_tokens
        size, num_tokens = len(rows_host), sum(query_lens)
        packed_host = np.array([rows_host, query_lens, plan.num_draft_tokens], dtype=np.int64)
        packed = torch.from_numpy(packed_host).to(table.device, non_blocking=True)
        rows, lens, num_drafts = packed[0], packed[1], packed[2]
        computed = table.num_computed_tokens[rows]
        seq_lens = computed + lens
        blocks = table.block_table[rows]
        ends = torch.cumsum(lens, 0)
        start = torch.cat([ends.new_zeros(1), ends])
        owner = torch.repeat_interleave(self._first_arange(size), lens, output_size=num_tokens)
        positions = computed[owner] + self._first_arange(num_tokens) - start[owner]
        sampling, first_row, logits_indices = self._logits_rows(plan)
        batch = ForwardBatch(
            input_ids=table.token_ids[rows[owner], positions].long(),
            positions=positions,
            query_start_loc=start.to(torch.int32),
            seq_lens=seq_lens.to(torch.int32),
            block_table=blocks,
            slot_mapping=self._slots(blocks, owner, positions),
            logits_indices=logits_indices,
            rows=rows,
            query_lens_host=query_lens,
            seq_lens_host=(table.num_computed_host[packed_host[0]] + packed_host[1]).tolist(),
            block_size=self.parts.pool.block_size,
        )
        return _Inputs(
            batch=batch,
            rows=rows_host,
            rows_index=packed_host[0],
            sampling=sampling,
            num_drafts=plan.num_draft_tokens,
            first_row=first_row,
            first_new=(seq_lens - num_drafts)[self._device_index(sampling, size)],
            max_drafts=max(plan.num_draft_tokens),
        )

    def _first_arange(self, count: int) -> torch.Tensor:
        if count > self._arange.shape[0]:
            self._arange = torch.arange(2 * count, device=self.table.device)
        return self._arange[:count]

    def _device_index(self, indices: list[int], size: int) -> torch.Tensor | slice:
        """An index that picks requests of the batch; a slice where it is all of them."""
        if len(indices) == size:
            return slice(None)
        return torch.tensor(indices, dtype=torch.int64).to(self.table.device, non_blocking=True)

    def _logits_rows(self, plan: SchedulerOutput) -> tuple[list[int], list[int], torch.Tensor]:
        """Which requests yield tokens, their first rows of logits, and the tokens behind them."""
        sampling: list[int] = []
        first_row: list[int] = []
        indices: list[int] = []
        end = 0
        for i, (length, drafts) in enumerate(
            zip(plan.num_scheduled_tokens, plan.num_draft_tokens, strict=True)
        ):
            end += length
            if plan.samples[i]:
                sampling.append(i)
                first_row.append(len(indices))
                indices.extend(range(end - drafts - 1, end))
        if len(indices) == end:  # every token yields a row
            return sampling, first_row, self._first_arange(end)
        index = torch.tensor(indices, dtype=torch.int64).to(self.table.device, non_blocking=True)
        return sampling, first_row, index

    def _drafts(self, inputs: _Inputs) -> DraftsToVerify:
        """Drafts of the requests that yield tokens, read back from the table's rows."""
        device, batch = self.table.device, inputs.batch
        count, width = len(inputs.sampling), inputs.max_drafts
        if width == 0:
            return DraftsToVerify(
                torch.empty(count, 0, dtype=torch.int64, device=device), self._first_arange(count)
            )
        selected = self._device_index(inputs.sampling, batch.num_requests)
        num_drafts = torch.tensor([inputs.num_drafts[i] for i in inputs.sampling])
        steps = self._first_arange(width)
        columns = inputs.first_new.unsqueeze(1) + steps
        drafts = self.table.token_ids[batch.rows[selected].unsqueeze(1), columns].long()
        is_draft = steps < num_drafts.to(device).unsqueeze(1)
        first_row = torch.tensor(inputs.first_row, dtype=torch.int64).to(device)
        return DraftsToVerify(drafts.masked_fill(~is_draft, -1), first_row)

    def _logits(self, inputs: _Inputs, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = inputs.batch.logits_indices
        selected = hidden if index.shape[0] == hidden.shape[0] else hidden[index]
        return self.parts.model.compute_logits(selected), selected

    def _sampling_metadata(self, inputs: _Inputs) -> SamplingMetadata:
        table, batch = self.table, inputs.batch
        if table.all_plain_greedy:
            nothing = batch.positions[:0]
            return SamplingMetadata(params=[], positions=nothing, seeds=nothing)
        rows = [inputs.rows[i] for i in inputs.sampling for _ in range(inputs.num_drafts[i] + 1)]
        params = [p for row in rows if (p := table.params[row]) is not None]
        positions = batch.positions[batch.logits_indices] + 1
        index = torch.tensor(rows, dtype=torch.int64).to(table.device, non_blocking=True)
        any_penalties = any(p.has_penalties for p in params)
        contexts: list[torch.Tensor] = []
        if any_penalties:
            ends = positions.tolist()
            contexts = [
                table.token_ids[row, :end].long() for row, end in zip(rows, ends, strict=True)
            ]
        return SamplingMetadata(
            params=params,
            positions=positions,
            seeds=table.seeds[index],
            all_greedy=all(p.is_greedy for p in params),
            any_penalties=any_penalties,
            any_logprobs=any(p.logprobs is not None for p in params),
            contexts=contexts,
            num_prompt_tokens=[table.num_prompt_tokens[row] for row in rows],
        )

    # -- results ------------------------------------------------------------------------------

    def _advance(self, inputs: _Inputs, accepted: Accepted | None) -> None:
        """Write new tokens and progress back to the table, on the device."""
        table, batch = self.table, inputs.batch
        table.num_computed_tokens[batch.rows] = batch.seq_lens.long()
        if accepted is None:
            return
        selected = self._device_index(inputs.sampling, batch.num_requests)
        rows = batch.rows if isinstance(selected, slice) else batch.rows[selected]
        ids = accepted.token_ids
        if ids.shape[1] == 1:
            table.token_ids[rows, inputs.first_new] = ids[:, 0].to(torch.int32)
            return
        is_token = ids >= 0
        columns = inputs.first_new.unsqueeze(1) + self._first_arange(ids.shape[1])
        columns = columns.masked_fill(~is_token, table.trash_column)
        table.token_ids[rows.unsqueeze(1), columns] = ids.to(torch.int32)
        table.num_computed_tokens[rows] = inputs.first_new + is_token.sum(1) - 1

    def _draft(
        self,
        plan: SchedulerOutput,
        inputs: _Inputs,
        tokens: list[list[int]],
        hidden: torch.Tensor,
    ) -> list[list[int]]:
        """Note the new tokens on the host and ask the drafter what may follow them."""
        table, drafter = self.table, self.parts.drafter
        index = inputs.rows_index
        if len(inputs.sampling) != len(inputs.rows):
            table.num_computed_host[index] = inputs.batch.seq_lens_host
            index = index[inputs.sampling]
        table.note_tokens(index, tokens, uniform=inputs.max_drafts == 0)
        if drafter.num_lookahead_tokens == 0:
            return [[] for _ in tokens]
        rows = index.tolist()
        limits = []
        for row in rows:
            params = table.params[row]
            assert params is not None
            generated = int(table.num_tokens[row]) - table.num_prompt_tokens[row]
            limits.append(max(0, params.max_tokens - generated - 1))
        drafts = drafter.propose(
            DraftContext(
                request_ids=[plan.request_ids[i] for i in inputs.sampling],
                token_ids=[table.known_tokens(row) for row in rows],
                max_draft_tokens=limits,
                hidden_states=hidden,
            )
        ).token_ids
        for row, draft in zip(rows, drafts, strict=True):
            table.write_drafts(row, draft)
        return drafts

    def _output(
        self,
        plan: SchedulerOutput,
        inputs: _Inputs,
        tokens: list[list[int]],
        drafts: list[list[int]],
        accepted: Accepted | None,
        mode: str,
        clock: _PartClock,
    ) -> ModelRunnerOutput:
        count = len(plan.request_ids)
        by_request, drafts_by_request = tokens, drafts
        if len(inputs.sampling) != count:
            by_request, drafts_by_request = [[] for _ in range(count)], [[] for _ in range(count)]
            for k, i in enumerate(inputs.sampling):
                by_request[i], drafts_by_request[i] = tokens[k], drafts[k]
        logprobs: list[list[TokenLogprobs] | None] = [None] * count
        if accepted is not None and accepted.logprobs is not None:
            for k, i in enumerate(inputs.sampling):
                first = inputs.first_row[k]
                entries = accepted.logprobs[first : first + len(tokens[k])]
                logprobs[i] = [e for e in entries if e is not None] or None
        clock.lap("collect")
        return ModelRunnerOutput(
            token_ids=by_request,
            draft_token_ids=drafts_by_request,
            logprobs=logprobs,
            num_context_tokens=sum(inputs.batch.seq_lens_host) - inputs.batch.num_tokens,
            graph_mode=mode,
            timings_us=clock.laps,
        )


class _PartClock:
    """Microseconds by part of a step."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """Book the time since the last lap."""
        now = time.perf_counter()
        self.laps[part] = (now - self._last) * 1e6
        self._last = now
