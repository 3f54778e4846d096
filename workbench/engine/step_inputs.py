"""From a plan to the inputs of a forward pass, gathered from the request table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from workbench.core.step import ForwardBatch, SchedulerOutput, TokenLogprobs
from workbench.engine.decode_step import DecodeStep
from workbench.engine.mixed_step import FIRST_NEW, LOGITS_AT, ROW, START, MixedRun, MixedStep
from workbench.engine.prepared_step import PreparedRun
from workbench.engine.request_table import RequestTable
from workbench.engine.upload import upload, upload_into
from workbench.engine.verify_step import VerifyStep
from workbench.slots.attention import PLAIN_FORM, AttentionBackend
from workbench.slots.graph_runner import DECODE, MIXED, VERIFY, GraphRunner


@dataclass(slots=True)
class StepInputs:
    """A batch and what the host knows of it. ``S`` requests yield a token in this step.

    Attributes
    ----------
    sampling
        ``S`` indices into the batch.
    num_drafts
        By request of the batch.
    first_row
        ``S`` first rows of logits.
    first_new : Tensor[S] int64
        Columns of the table that take the first new token.
    num_context_tokens
        Tokens in the KV cache before this step, over all requests.
    prepared
        The prepared step that runs these inputs; None where ops are launched one by one.
    mixed
        The mixed step that runs these inputs as far as their hidden states; the tensors of
        :attr:`batch` hold them from then on.
    """

    batch: ForwardBatch
    rows: list[int]
    rows_index: np.ndarray  # the same, for the host's books
    sampling: list[int]
    num_drafts: list[int]
    first_row: list[int]
    first_new: torch.Tensor
    max_drafts: int
    num_context_tokens: int
    prepared: PreparedRun | None = None
    mixed: MixedRun | None = None


@dataclass(frozen=True, slots=True)
class _HostViews:
    """numpy's call costs a fifth of torch's, which counts for a few integers."""

    walk: np.ndarray
    seq_lens: np.ndarray
    block_table: np.ndarray


@dataclass(slots=True)
class SteadyBatch:
    """What a batch of single tokens keeps from step to step while the same requests run.

    The plan of such steps carries the very list of ids of the one before, which is how they are
    known.
    """

    request_ids: list[str]
    #: The last step's, brought up to date in place.
    inputs: StepInputs
    no_drafts: list[list[int]]
    no_logprobs: list[list[TokenLogprobs] | None]
    #: ``[3, B]`` int64: position of the token, its slot, and the column of the token after it;
    #: None for a prepared step, which keeps them itself.
    walk: torch.Tensor | None
    #: Which requests enter a block, by steps modulo the block size.
    crossings: dict[int, list[int]]
    #: Views of the same memory, where the device's is the host's.
    views: _HostViews | None = None
    age: int = 0
    #: Steps that the table's host books do not know of yet.
    num_unbooked: int = 0


class InputGatherer:
    """Builds a step's inputs: a few integers go to the device, all else is there."""

    def __init__(
        self,
        table: RequestTable,
        block_size: int,
        graph_runner: GraphRunner,
        attention: AttentionBackend,
        decode_step: DecodeStep | None,
        verify_step: VerifyStep | None,
        mixed_step: MixedStep | None,
    ) -> None:
        self.table = table
        self._attention = attention
        self.steady: SteadyBatch | None = None
        self._block_size = block_size
        self._graph_runner = graph_runner
        self._decode_step, self._verify_step = decode_step, verify_step
        self._mixed_step = mixed_step
        self._arange = torch.arange(table.token_ids.shape[0], device=table.device)

    def gather(self, plan: SchedulerOutput) -> StepInputs:
        """Inputs of a plan whose changes the table knows."""
        steady = self.steady
        if steady is not None and plan.request_ids is steady.request_ids:
            return self._gather_again(steady)
        self.leave_steady()
        rows_host = [self.table.row_of[request_id] for request_id in plan.request_ids]
        if plan.total_num_scheduled_tokens == len(rows_host) and all(plan.samples):
            size = None
            if self._decode_step is not None:
                size = self._graph_runner.dispatch(DECODE, len(rows_host))
            if size is not None:
                return self._gather_prepared(plan, rows_host, size)
            return self._gather_decode(plan, rows_host)
        if self._verify_step is not None and _runs_drafts_alone(plan):
            size = self._graph_runner.dispatch(VERIFY, len(rows_host))
            lengths = self.table.num_computed_host[rows_host] + plan.num_scheduled_tokens
            if size is not None and lengths.min() >= self._verify_step.tokens_each:
                return self._gather_verify(self._verify_step, plan, rows_host, size)
        if self._mixed_step is not None and not any(plan.num_draft_tokens):
            size = self._graph_runner.dispatch(MIXED, plan.total_num_scheduled_tokens)
            if size is not None:
                return self._gather_prepared_mixed(self._mixed_step, plan, rows_host, size)
        return self._gather_mixed(plan, rows_host)

    def leave_steady(self) -> None:
        """Forget what was kept between steps, after booking what it still owes the table."""
        self.settle()
        self.steady = None

    def settle(self) -> None:
        """Bring the table's host books up with the steps that ran without them."""
        steady = self.steady
        if steady is not None and steady.num_unbooked:
            rows = steady.inputs.rows_index
            self.table.num_tokens[rows] += steady.num_unbooked
            self.table.num_computed_host[rows] += steady.num_unbooked
            steady.num_unbooked = 0

    def first_arange(self, count: int) -> torch.Tensor:
        """``0 .. count - 1`` on the device; not to be written."""
        if count > self._arange.shape[0]:
            self._arange = torch.arange(2 * count, device=self.table.device)
        return self._arange[:count]

    def device_index(self, indices: list[int], size: int) -> torch.Tensor | slice:
        """An index that picks requests of the batch; a slice where it is all of them."""
        if len(indices) == size:
            return slice(None)
        return upload(indices, self.table.device)

    def _gather_decode(self, plan: SchedulerOutput, rows_host: list[int]) -> StepInputs:
        """Every request runs its last token."""
        table, size = self.table, len(rows_host)
        rows = upload(rows_host, table.device)
        rows_index = np.array(rows_host)
        computed = table.num_computed_host[rows_index]
        positions = table.num_computed_tokens[rows]
        blocks, index = table.block_table[rows], self.first_arange(size)
        slots = self._slots(blocks, index, positions)
        walk, seq_lens = torch.stack([positions, slots, positions + 1]), positions.int() + 1
        positions, slots, first_new = walk.unbind()
        batch = ForwardBatch(
            input_ids=table.token_ids[rows, positions].long(),
            positions=positions,
            query_start_loc=self.first_arange(size + 1).to(torch.int32),
            seq_lens=seq_lens,
            block_table=blocks,
            slot_mapping=slots,
            logits_indices=index,
            rows=rows,
            query_lens_host=plan.num_scheduled_tokens,
            seq_lens_host=(computed + 1).tolist(),
            block_size=self._block_size,
            host_rows=(table.host_block_table, rows_host),
        )
        indices = list(range(size))
        inputs = StepInputs(
            batch=batch,
            rows=rows_host,
            rows_index=rows_index,
            sampling=indices,
            num_drafts=plan.num_draft_tokens,
            first_row=indices,
            first_new=first_new,
            max_drafts=0,
            num_context_tokens=int(computed.sum()),
        )
        crossings: dict[int, list[int]] = {}
        for i, phase in enumerate((-computed % batch.block_size).tolist()):
            crossings.setdefault(phase, []).append(i)
        views = None
        if table.device.type == "cpu":
            views = _HostViews(walk.numpy(), seq_lens.numpy(), blocks.numpy())
        self.steady = SteadyBatch(
            request_ids=plan.request_ids,
            inputs=inputs,
            no_drafts=[[] for _ in rows_host],
            no_logprobs=[None] * size,
            walk=walk,
            crossings=crossings,
            views=views,
        )
        return inputs

    def _gather_prepared(
        self, plan: SchedulerOutput, rows_host: list[int], size: int
    ) -> StepInputs:
        """Every request runs its last token, in a prepared step: only rows go to the device, and
        what a form of it needs beside them."""
        step, table, count = self._decode_step, self.table, len(rows_host)
        assert step is not None
        batch = step.batch(count)
        indices = list(range(count))
        rows_index = np.array(rows_host)
        computed = table.num_computed_host[rows_index]
        form = PLAIN_FORM
        if step.forms:
            batch.host_rows = (table.host_block_table, rows_host)
            batch.seq_lens_host = (computed + 1).tolist()
            form = self._attention.choose_form(batch)
            of_form = self._graph_runner.dispatch(DECODE, count, form)
            size, form = (size, PLAIN_FORM) if of_form is None else (of_form, form)
        upload_into(step.rows[:size], rows_host + [table.padding_row] * (size - count))
        inputs = StepInputs(
            batch=batch,
            rows=rows_host,
            rows_index=rows_index,
            sampling=indices,
            num_drafts=plan.num_draft_tokens,
            first_row=indices,
            first_new=batch.positions,  # of the last token: the step moves it on by itself
            max_drafts=0,
            num_context_tokens=int(computed.sum()),
            prepared=PreparedRun(step, size, size - count, form),
        )
        self.steady = SteadyBatch(
            request_ids=plan.request_ids,
            inputs=inputs,
            no_drafts=[[] for _ in rows_host],
            no_logprobs=[None] * count,
            walk=None,
            crossings={},
        )
        return inputs

    def _gather_verify(
        self, step: VerifyStep, plan: SchedulerOutput, rows_host: list[int], size: int
    ) -> StepInputs:
        """Every request runs its last token and its drafts, in a prepared step: rows and numbers of
        drafts go to the device."""
        table, count, each = self.table, len(rows_host), step.tokens_each
        batch = step.batch(count)
        rows_index = np.array(rows_host)
        computed = table.num_computed_host[rows_index]
        places = np.zeros((size, 2), np.int64)
        places[:, 0] = table.padding_row
        places[:count, 0], places[:count, 1] = rows_index, plan.num_draft_tokens
        upload_into(step.places[:size], places)
        first_row: list[int] = []
        num_rows = 0
        for num_tokens in plan.num_scheduled_tokens:
            first_row.append(num_rows)
            num_rows += num_tokens
        return StepInputs(
            batch=batch,
            rows=rows_host,
            rows_index=rows_index,
            sampling=list(range(count)),
            num_drafts=plan.num_draft_tokens,
            first_row=first_row,
            first_new=batch.positions[:0],  # the step finds it by itself
            max_drafts=max(plan.num_draft_tokens),
            num_context_tokens=int(computed.sum()),
            prepared=PreparedRun(step, size, size * each - num_rows),
        )

    def _gather_again(self, steady: SteadyBatch) -> StepInputs:
        """The same requests as in the last step, each one token further: nothing is gathered
        again, and the last step's tokens are this one's inputs."""
        batch, views = steady.inputs.batch, steady.views
        steady.inputs.num_context_tokens += len(steady.inputs.rows)
        if steady.walk is None:
            return steady.inputs
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

    def _enter_blocks(self, steady: SteadyBatch, members: list[int]) -> None:
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
        assert steady.walk is not None
        member, column, block = upload([members, columns, blocks], self.table.device)
        steady.walk[1, member] = block * block_size
        batch.block_table[member, column] = block.int()

    def _slots(
        self, block_table: torch.Tensor, owner: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Where the KV of tokens goes, ``[T]`` int64."""
        block_size = self._block_size
        block = block_table[owner, torch.div(positions, block_size, rounding_mode="floor")]
        return block.long() * block_size + positions % block_size

    def _gather_mixed(self, plan: SchedulerOutput, rows_host: list[int]) -> StepInputs:
        """Queries of any length: prompts, their pieces, drafts and single tokens."""
        table = self.table
        query_lens = plan.num_scheduled_tokens
        size, num_tokens = len(rows_host), sum(query_lens)
        packed_host = np.array([rows_host, query_lens, plan.num_draft_tokens], dtype=np.int64)
        packed = upload(packed_host, table.device)
        rows, lens, num_drafts = packed[0], packed[1], packed[2]
        computed = table.num_computed_tokens[rows]
        seq_lens = computed + lens
        blocks = table.block_table[rows]
        ends = torch.cumsum(lens, 0)
        start = torch.cat([ends.new_zeros(1), ends])
        owner = torch.repeat_interleave(self.first_arange(size), lens, output_size=num_tokens)
        positions = computed[owner] + self.first_arange(num_tokens) - start[owner]
        sampling, first_row, logits_indices = self._logits_rows(plan)
        computed_host = table.num_computed_host[packed_host[0]]
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
            seq_lens_host=(computed_host + packed_host[1]).tolist(),
            block_size=self._block_size,
            host_rows=(table.host_block_table, rows_host),
        )
        return StepInputs(
            batch=batch,
            rows=rows_host,
            rows_index=packed_host[0],
            sampling=sampling,
            num_drafts=plan.num_draft_tokens,
            first_row=first_row,
            first_new=(seq_lens - num_drafts)[self.device_index(sampling, size)],
            max_drafts=max(plan.num_draft_tokens),
            num_context_tokens=int(computed_host.sum()),
        )

    def _gather_prepared_mixed(
        self, step: MixedStep, plan: SchedulerOutput, rows_host: list[int], size: int
    ) -> StepInputs:
        """Requests run any numbers of tokens and no drafts, in a prepared step: where each begins
        goes to the device, and which of them yield a token."""
        table, count = self.table, len(rows_host)
        rows_index = np.array(rows_host)
        computed = table.num_computed_host[rows_index]
        ends = np.cumsum(plan.num_scheduled_tokens)
        seq_lens = computed + plan.num_scheduled_tokens
        num_tokens = int(ends[-1])
        sampling = [i for i, samples in enumerate(plan.samples) if samples]
        places = np.zeros((step.num_places(size) + 1, step.places.shape[1]), np.int64)
        places[:, ROW], places[:, START] = table.padding_row, num_tokens
        places[:count, ROW] = rows_index
        places[0, START], places[1:count, START] = 0, ends[:-1]
        places[: len(sampling), LOGITS_AT] = ends[sampling] - 1
        places[: len(sampling), FIRST_NEW] = seq_lens[sampling]
        on_device = step.places[: len(places)]
        upload_into(on_device, places)
        whole = step.batch(size)
        batch = dataclasses.replace(
            whole,
            input_ids=whole.input_ids[:num_tokens],
            positions=whole.positions[:num_tokens],
            query_start_loc=whole.query_start_loc[: count + 1],
            seq_lens=whole.seq_lens[:count],
            block_table=whole.block_table[:count],
            slot_mapping=whole.slot_mapping[:num_tokens],
            logits_indices=on_device[: len(sampling), LOGITS_AT],
            rows=whole.rows[:count],
            query_lens_host=plan.num_scheduled_tokens,
            seq_lens_host=seq_lens.tolist(),
            host_rows=(table.host_block_table, rows_host),
        )
        return StepInputs(
            batch=batch,
            rows=rows_host,
            rows_index=rows_index,
            sampling=sampling,
            num_drafts=plan.num_draft_tokens,
            first_row=list(range(len(sampling))),
            first_new=on_device[: len(sampling), FIRST_NEW],
            max_drafts=0,
            num_context_tokens=int(computed.sum()),
            mixed=MixedRun(step, size, size - num_tokens),
        )

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
            return sampling, first_row, self.first_arange(end)
        return sampling, first_row, upload(indices, self.table.device)


def _runs_drafts_alone(plan: SchedulerOutput) -> bool:
    """Whether every request runs its last known token, and behind it drafts, if any."""
    return all(plan.samples) and all(
        tokens == drafts + 1
        for tokens, drafts in zip(plan.num_scheduled_tokens, plan.num_draft_tokens, strict=True)
    )
