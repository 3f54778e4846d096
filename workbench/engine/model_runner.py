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
from workbench.engine.host_pool import HostPool
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
    host_pool: HostPool
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


@dataclass(frozen=True, slots=True)
class _HostViews:
    """numpy's call costs a fifth of torch's, which counts for a few integers."""

    walk: np.ndarray
    seq_lens: np.ndarray
    block_table: np.ndarray


@dataclass(slots=True)
class _Steady:
    """What a batch of single tokens keeps from step to step while the same requests run.

    The plan of such steps carries the very list of ids of the one before, which is how they are
    known.
    """

    request_ids: list[str]
    #: The last step's, brought up to date in place.
    inputs: _Inputs
    no_drafts: list[list[int]]
    no_logprobs: list[list[TokenLogprobs] | None]
    #: ``[3, B]`` int64: position of the token, its slot, and the column of the token after it.
    walk: torch.Tensor
    #: Which requests enter a block, by steps modulo the block size.
    crossings: dict[int, list[int]]
    #: Views of the same memory, where the device's is the host's.
    views: _HostViews | None
    age: int = 0
    #: Steps that the table's host books do not know of yet.
    num_unbooked: int = 0


class ModelRunner:
    """Owns the device's state: the request table, the KV pool and the model."""

    def __init__(self, parts: RunnerParts) -> None:
        self.parts = parts
        self.table = parts.table
        self._arange = torch.arange(self.table.token_ids.shape[0], device=self.table.device)
        self._steady: _Steady | None = None
        self._inference = torch.inference_mode()  # one object: the decorator makes one a call

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step of the plan."""
        try:
            with self._inference:
                return self._execute(plan)
        except BaseException:
            self._leave_steady()  # it may stand between two steps
            raise

    def _execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
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
        if plan.copies_out or plan.copies_in:  # before anything is written to these blocks
            self.parts.host_pool.copy(plan.copies_out, plan.copies_in)
        if plan.new_requests or plan.finished_request_ids:
            self._leave_steady()  # an id may have come back with another row
        for request_id in plan.finished_request_ids:
            self.table.remove(request_id)
            self.parts.drafter.finish(request_id)
        for new in plan.new_requests:
            self.table.add(new)
        if plan.new_block_ids:
            self.table.append_blocks(plan.new_block_ids)

    def _gather(self, plan: SchedulerOutput) -> _Inputs:
        """Gather the batch from the table: a few integers go to the device, all else is there."""
        steady = self._steady
        if steady is not None and plan.request_ids is steady.request_ids:
            return self._gather_again(steady)
        rows_host = [self.table.row_of[request_id] for request_id in plan.request_ids]
        if plan.total_num_scheduled_tokens == len(rows_host) and all(plan.samples):
            return self._gather_decode(plan, rows_host)
        self._leave_steady()
        return self._gather_mixed(plan, rows_host)

    def _leave_steady(self) -> None:
        """Forget what was kept between steps, after booking what it still owes the table."""
        if self._steady is not None:
            self._settle(self._steady)
            self._steady = None

    def _settle(self, steady: _Steady) -> None:
        """Bring the table's host books up with the steps that ran without them."""
        if steady.num_unbooked:
            rows = steady.inputs.rows_index
            self.table.num_tokens[rows] += steady.num_unbooked
            self.table.num_computed_host[rows] += steady.num_unbooked
            steady.num_unbooked = 0

    def _gather_decode(self, plan: SchedulerOutput, rows_host: list[int]) -> _Inputs:
        """Every request runs its last token."""
        self._leave_steady()
        table, size = self.table, len(rows_host)
        rows = torch.tensor(rows_host, dtype=torch.int64).to(table.device, non_blocking=True)
        rows_index = np.array(rows_host)
        computed = table.num_computed_host[rows_index]
        positions = table.num_computed_tokens[rows]
        blocks, index = table.block_table[rows], self._first_arange(size)
        slots = self._slots(blocks, index, positions)
        walk, seq_lens = torch.stack([positions, slots, positions + 1]), positions.int() + 1
        positions, slots, first_new = walk.unbind()
        batch = ForwardBatch(
            input_ids=table.token_ids[rows, positions].long(),
            positions=positions,
            query_start_loc=self._first_arange(size + 1).to(torch.int32),
            seq_lens=seq_lens,
            block_table=blocks,
            slot_mapping=slots,
            logits_indices=index,
            rows=rows,
            query_lens_host=plan.num_scheduled_tokens,
            seq_lens_host=(computed + 1).tolist(),
            block_size=self.parts.pool.block_size,
            host_rows=(table.host_block_table, rows_host),
        )
        indices = list(range(size))
        inputs = _Inputs(
            batch=batch,
            rows=rows_host,
            rows_index=rows_index,
            sampling=indices,
            num_drafts=plan.num_draft_tokens,
            first_row=indices,
            first_new=first_new,
            max_drafts=0,
        )
        crossings: dict[int, list[int]] = {}
        for i, phase in enumerate((-computed % batch.block_size).tolist()):
            crossings.setdefault(phase, []).append(i)
        views = None
        if table.device.type == "cpu":
            views = _HostViews(walk.numpy(), seq_lens.numpy(), blocks.numpy())
        self._steady = _Steady(
            request_ids=plan.request_ids,
            inputs=inputs,
            no_drafts=[[] for _ in rows_host],
            no_logprobs=[None] * size,
            walk=walk,
            crossings=crossings,
            views=views,
        )
        return inputs

    def _gather_again(self, steady: _Steady) -> _Inputs:
        """The same requests as in the last step, each one token further: nothing is gathered
        again, and the last step's tokens are this one's inputs (see :meth:`_advance`)."""
        batch, views = steady.inputs.batch, steady.views
        if views is not None:
            np.add(views.walk, 1, out=views.walk)
            np.add(views.seq_lens, 1, out=views.seq_lens)
        else:
            steady.walk.add_(1)
            batch.seq_lens.add_(1)
        batch.seq_lens_host = [length + 1 for length in batch.seq_lens_host]
        steady.age += 1
        crossing = steady.crossings.get(steady.age % batch.block_size)
        if crossing is not None:
            self._enter_blocks(steady, crossing)
        return steady.inputs

    def _enter_blocks(self, steady: _Steady, members: list[int]) -> None:
        """The next token of these requests opens a block; its slot is not beside the last one."""
        inputs, batch = steady.inputs, steady.inputs.batch
        block_size, host = batch.block_size, self.table.host_block_table
        columns = [(batch.seq_lens_host[i] - 1) // block_size for i in members]
        blocks = [
            int(host[inputs.rows[i], column]) for i, column in zip(members, columns, strict=True)
        ]
        if steady.views is not None:
            for i, column, block in zip(members, columns, blocks, strict=True):
                steady.views.walk[1, i] = block * block_size
                steady.views.block_table[i, column] = block
            return
        packed = torch.tensor([members, columns, blocks])
        member, column, block = packed.to(self.table.device, non_blocking=True)
        steady.walk[1, member] = block * block_size
        batch.block_table[member, column] = block.int()

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
            host_rows=(table.host_block_table, rows_host),
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
            new = ids[:, 0]
            if self._steady is not None:
                self._steady.inputs.batch.input_ids = new
            table.token_ids[rows, inputs.first_new] = new.to(torch.int32)
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
        table, drafter, steady = self.table, self.parts.drafter, self._steady
        if steady is not None and drafter.num_lookahead_tokens == 0:
            steady.num_unbooked += 1
            return steady.no_drafts
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
        steady = self._steady
        logprobs: list[list[TokenLogprobs] | None] = (
            [None] * count if steady is None else steady.no_logprobs
        )
        if accepted is not None and accepted.logprobs is not None:
            logprobs = [None] * count
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
