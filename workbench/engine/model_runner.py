"""From a plan to tokens: gather the batch, run the model, verify, write back, draft."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from workbench.core.step import (
    ForwardBatch,
    ModelRunnerOutput,
    SchedulerOutput,
)
from workbench.engine.decode_step import DecodeStep
from workbench.engine.drafting import Drafting, ProposedProbs
from workbench.engine.host_pool import HostPool
from workbench.engine.mixed_step import MixedStep
from workbench.engine.prepared_step import PreparedRun
from workbench.engine.proposed_trees import ProposedTrees, TreeInputs
from workbench.engine.request_table import RequestTable
from workbench.engine.running_step import CountedTokens, PartClock, RunningStep
from workbench.engine.step_inputs import InputGatherer, StepInputs
from workbench.engine.tokens_to_read import TokensToRead
from workbench.engine.upload import upload
from workbench.engine.verify_step import VerifyStep
from workbench.slots.attention import AttentionBackend, ForwardContext, KeptHidden
from workbench.slots.draft_length import DraftLength
from workbench.slots.drafter import DraftContext, Drafter, FollowedStep
from workbench.slots.graph_runner import GraphRunner, PreparedStep
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
    draft_length: DraftLength
    vocab_size: int
    #: Whether the loop plans a step before the tokens of the one before it are read.
    plans_ahead: bool = False
    #: What the graph runner prepares; None where it does not.
    decode_step: DecodeStep | None = None
    verify_step: VerifyStep | None = None
    mixed_step: MixedStep | None = None

    @property
    def prepared_steps(self) -> list[PreparedStep]:
        """Those that the graph runner prepares."""
        steps = (self.decode_step, self.verify_step, self.mixed_step)
        return [step for step in steps if step is not None] + self.drafter.prepared_steps()


class ModelRunner:
    """Owns the device's state: the request table, the KV pool and the model."""

    def __init__(self, parts: RunnerParts) -> None:
        self.parts = parts
        self.table = parts.table
        self.drafting = Drafting(parts.drafter, parts.vocab_size, parts.draft_length)
        self._proposed_probs = ProposedProbs()
        self._proposed_trees = ProposedTrees(parts.table, parts.pool)
        self.inputs = InputGatherer(
            parts.table,
            parts.pool.block_size,
            parts.graph_runner,
            parts.attention,
            parts.decode_step,
            parts.verify_step,
            parts.mixed_step,
        )
        #: Shown the hidden states ``[T, H]`` of each step but those of prepared single tokens.
        self.watcher: Callable[[ForwardBatch, torch.Tensor], None] | None = None
        self._kept: dict[int, torch.Tensor] = {}  # of the last step
        self._is_followed = False  # by itself
        self._inference = torch.inference_mode()  # one object: the decorator makes one a call

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step of the plan."""
        return self.submit(plan).result()

    def submit(self, plan: SchedulerOutput) -> RunningStep:
        """Queue one step of the plan on the device, without waiting for its tokens.

        The next step may be queued before the tokens of this one are read, where no drafter has to
        see them first: they stand in the request table, on the device.
        """
        try:
            with self._inference:
                return self._submit(plan)
        except BaseException:
            self.inputs.leave_steady()  # it may stand between two steps
            raise

    def _submit(self, plan: SchedulerOutput) -> RunningStep:
        clock = PartClock()
        self._apply_changes(plan)
        inputs = self.inputs.gather(plan)
        prepared = inputs.prepared
        trees = self._proposed_trees.apply(inputs) if inputs.max_drafts else None
        logits, metadata = None, None
        if prepared is None:
            hidden = self._forward(inputs, clock)
            if self.watcher is not None:
                self.watcher(inputs.batch, hidden)
            if inputs.sampling:
                logits = self._logits(inputs, hidden)
            metadata = self._sampling_metadata(inputs, trees) if inputs.sampling else None
        else:
            clock.lap("prepare")
            logits, metadata = self._run_prepared(inputs, prepared)
        clock.lap("model")
        accepted = None
        if metadata is not None:
            assert logits is not None
            accepted = self.parts.verifier.verify(
                self._drafts(inputs, trees), logits, metadata, self.parts.sampler
            )
            self._advance(inputs, accepted)
            if trees is not None and accepted.path is not None:
                self._kept = self._proposed_trees.make_chains(
                    inputs, trees, accepted.path, self._kept
                )
            self._is_followed = False
        elif prepared is not None:
            self._is_followed = True
            new = prepared.step.new_ids[: len(inputs.rows)]
            if not new.is_cuda:  # else it is copied to the host in the order of the steps
                new = new.clone()
            accepted = Accepted(new)
        else:
            self._is_followed = False
            self._advance(inputs, None)
        clock.lap("sample")
        verified = prepared is not None and metadata is None and inputs.max_drafts > 0
        running = RunningStep(self, plan, inputs, accepted, clock, verified)
        if verified:  # the host may read the step's tokens while the next drafts are made
            assert self.parts.verify_step is not None
            self.drafting.draft_ahead(plan.request_ids, inputs.rows, self.parts.verify_step)
        clock.lap("queue")
        return running

    def _forward(self, inputs: StepInputs, clock: PartClock) -> torch.Tensor:
        parts, batch = self.parts, inputs.batch
        if inputs.mixed is not None:
            clock.lap("prepare")
            parts.graph_runner.run(inputs.mixed.step.kind, inputs.mixed.size)
            self._kept = inputs.mixed.states(batch.num_tokens)
            return inputs.mixed.hidden()
        metadata, layers = parts.attention.build_metadata(batch), parts.drafter.kept_layers
        context = ForwardContext(
            batch, parts.attention, metadata, parts.pool, KeptHidden(layers) if layers else None
        )
        clock.lap("prepare")
        hidden = parts.model.forward(batch, context)
        self._kept = {} if context.kept is None else context.kept.states
        return hidden

    def _run_prepared(
        self, inputs: StepInputs, prepared: PreparedRun
    ) -> tuple[torch.Tensor | None, SamplingMetadata | None]:
        """Logits, and how to draw from them, where the tokens that the step drew greedily are not
        the ones wanted."""
        step, batch = prepared.step, inputs.batch
        self.parts.graph_runner.run(step.kind, prepared.size, prepared.form)
        self._kept = prepared.states(batch.num_tokens)
        self.parts.attention.note_prepared(prepared.form)
        if step.writes_tokens and self.table.all_plain_greedy:
            return None, None
        logits = prepared.logits()
        if inputs.max_drafts:
            # As if its ops had been launched one by one. A request's tokens end its place.
            tokens = [
                (i + 1) * step.tokens_each - back
                for i, num_drafts in enumerate(inputs.num_drafts)
                for back in range(num_drafts + 1, 0, -1)
            ]
            batch.logits_indices = upload(tokens, self.table.device)
            logits = logits[batch.logits_indices]
            first_row = upload(inputs.first_row, self.table.device)
            inputs.first_new = batch.positions[batch.logits_indices[first_row]] + 1
            if step.writes_tokens:
                self._write_drafts_again(inputs)
        else:
            logits = logits[: len(inputs.rows)]
            inputs.first_new = batch.positions + 1
        return logits, self._sampling_metadata(inputs)

    def _write_drafts_again(self, inputs: StepInputs) -> None:
        """Put drafts back where a prepared step has written what it drew: penalties count them."""
        table, drafts = self.table, self._drafts(inputs).token_ids
        columns = inputs.first_new.unsqueeze(1) + self.inputs.first_arange(drafts.shape[1])
        columns = columns.masked_fill(drafts < 0, table.trash_column)
        table.token_ids[inputs.batch.rows.unsqueeze(1), columns] = drafts.to(torch.int32)

    def _apply_changes(self, plan: SchedulerOutput) -> None:
        if plan.copies_out or plan.copies_in:  # before anything is written to these blocks
            self.parts.host_pool.copy(plan.copies_out, plan.copies_in)
        if plan.new_requests or plan.finished_request_ids:
            self.inputs.leave_steady()  # an id may have come back with another row
        for request_id in plan.finished_request_ids:
            self.table.remove(request_id)
            self.drafting.finish(request_id)
        if plan.new_requests:
            self.table.add_all(plan.new_requests)
        if plan.new_block_ids:
            self.table.append_blocks(plan.new_block_ids)
        self.parts.drafter.note_plan(plan)

    def _drafts(self, inputs: StepInputs, trees: TreeInputs | None = None) -> DraftsToVerify:
        """Drafts of the requests that yield tokens, read back from the step's inputs."""
        device, batch = self.table.device, inputs.batch
        count, width = len(inputs.sampling), inputs.max_drafts
        if width == 0:
            return DraftsToVerify(
                torch.empty(count, 0, dtype=torch.int64, device=device),
                self.inputs.first_arange(count),
            )
        counts = [inputs.num_drafts[i] for i in inputs.sampling]
        num_drafts, first_row = upload([counts, inputs.first_row], device)
        steps = self.inputs.first_arange(width)
        tokens = batch.logits_indices[first_row].unsqueeze(1) + 1 + steps
        drafts = batch.input_ids[tokens.clamp_(max=batch.num_tokens - 1)]
        is_draft = steps < num_drafts.unsqueeze(1)
        drafts = drafts.masked_fill(~is_draft, -1)
        rows = [inputs.rows[i] for i in inputs.sampling]
        probs = self._proposed_probs.gather(rows, counts, drafts)
        return DraftsToVerify(drafts, first_row, probs, None if trees is None else trees.shape)

    def _logits(self, inputs: StepInputs, hidden: torch.Tensor) -> torch.Tensor:
        index = inputs.batch.logits_indices
        is_all = index.shape[0] == hidden.shape[0] and inputs.mixed is None
        selected = hidden if is_all else hidden[index]
        return self.parts.model.compute_logits(selected)

    def _sampling_metadata(
        self, inputs: StepInputs, trees: TreeInputs | None = None
    ) -> SamplingMetadata:
        table, batch = self.table, inputs.batch
        if table.all_plain_greedy:
            nothing = batch.positions[:0]
            return SamplingMetadata(params=[], positions=nothing, seeds=nothing)
        rows = [inputs.rows[i] for i in inputs.sampling for _ in range(inputs.num_drafts[i] + 1)]
        params = [p for row in rows if (p := table.params[row]) is not None]
        positions = batch.positions[batch.logits_indices] + 1
        index = upload(rows, table.device)
        any_penalties = any(p.has_penalties for p in params)
        contexts: list[torch.Tensor] = []
        if any_penalties and trees is not None:
            contexts = self._proposed_trees.contexts(inputs, trees)
        elif any_penalties:
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

    def _advance(self, inputs: StepInputs, accepted: Accepted | None) -> None:
        """Write new tokens and progress back to the table, on the device."""
        table, batch = self.table, inputs.batch
        table.num_computed_tokens[batch.rows] = batch.seq_lens.long()
        if accepted is None:
            return
        selected = self.inputs.device_index(inputs.sampling, batch.num_requests)
        rows = batch.rows if isinstance(selected, slice) else batch.rows[selected]
        ids = accepted.token_ids
        if ids.shape[1] == 1:
            new = ids[:, 0]
            if self.inputs.steady is not None and inputs.prepared is None:
                inputs.batch.input_ids = new  # of the next step, if it is one like this
            table.token_ids[rows, inputs.first_new] = new.to(torch.int32)
            return
        is_token = ids >= 0
        columns = inputs.first_new.unsqueeze(1) + self.inputs.first_arange(ids.shape[1])
        columns = columns.masked_fill(~is_token, table.trash_column)
        table.token_ids[rows.unsqueeze(1), columns] = ids.to(torch.int32)
        table.num_computed_tokens[rows] = inputs.first_new + is_token.sum(1) - 1

    def may_draft(self, plan: SchedulerOutput, inputs: StepInputs) -> bool:
        """Whether the drafter is asked once the tokens of a step are read; where the loop plans
        ahead, that is settled now."""
        parts = self.parts
        if not parts.drafter.num_lookahead_tokens:
            return False
        if not parts.plans_ahead or inputs.max_drafts:
            return True
        return self.drafting.decide(len(inputs.sampling))

    def book(self, inputs: StepInputs) -> None:
        """Count on the host the one token that each sampling request gets in a step."""
        if self.inputs.steady is not None:
            self.inputs.steady.num_unbooked += 1
            return
        table, index = self.table, inputs.rows_index
        if len(inputs.sampling) != len(inputs.rows):
            table.num_computed_host[index] = inputs.batch.seq_lens_host
            index = index[inputs.sampling]
        table.count_tokens(index)

    def draft(
        self,
        plan: SchedulerOutput,
        inputs: StepInputs,
        tokens: list[list[int]],
        drawn: TokensToRead | None,
    ) -> list[list[int]]:
        """Note the new tokens on the host and ask the drafter what may follow them."""
        self.inputs.settle()
        table, index = self.table, inputs.rows_index
        ends = table.num_computed_host[index] + plan.num_scheduled_tokens
        if len(inputs.sampling) != len(inputs.rows):
            table.num_computed_host[index] = ends
            index = index[inputs.sampling]
        table.note_tokens(index, tokens)
        rows = index.tolist()
        limits = []
        for row in rows:
            params = table.params[row]
            assert params is not None
            generated = int(table.num_tokens[row]) - table.num_prompt_tokens[row]
            limits.append(max(0, params.max_tokens - generated - 1))
        self.drafting.observe(plan, tokens)
        if self._kept:
            self._follow(plan, inputs, ends.tolist())
        proposed = self.drafting.propose(
            DraftContext(
                request_ids=[plan.request_ids[i] for i in inputs.sampling],
                token_ids=[table.known_tokens(row) for row in rows],
                max_draft_tokens=limits,
                num_prompt_tokens=[table.num_prompt_tokens[row] for row in rows],
                rows=rows,
                drawn=None if drawn is None else self._drawn_by_request(inputs, drawn),
            )
        )
        drafts = proposed.token_ids
        self._proposed_probs.note(rows, proposed)
        self._proposed_trees.note(rows, proposed)
        to_write: Sequence[Sequence[int]] = drafts
        if proposed.on_device is not None:
            there = zip(drafts, proposed.on_device, strict=True)
            to_write = [() if is_there else draft for draft, is_there in there]
        table.write_drafts(index, to_write)
        return drafts

    def book_silently(self, plan: SchedulerOutput, inputs: StepInputs) -> CountedTokens:
        """Book a step that no drafts follow, before its tokens are known; the drafter sees it
        now, since the next step may be queued before they are."""
        self.inputs.settle()
        table, index = self.table, inputs.rows_index
        if self._kept:
            self._follow(
                plan, inputs, (table.num_computed_host[index] + plan.num_scheduled_tokens).tolist()
            )
        rows = index if len(inputs.sampling) == len(inputs.rows) else index[inputs.sampling]
        counted = CountedTokens(rows, table.num_owners[rows], table.num_tokens[rows])
        self.book(inputs)
        return counted

    def note_silently(
        self, plan: SchedulerOutput, counted: CountedTokens, tokens: list[list[int]]
    ) -> None:
        """The tokens of such a step are known."""
        self.table.fill_tokens(*counted, tokens)
        self.drafting.observe(plan, tokens)

    def _follow(self, plan: SchedulerOutput, inputs: StepInputs, ends: list[int]) -> None:
        """Show the drafter the step, whose requests have so many computed tokens now."""
        batch = inputs.batch
        if inputs.prepared is not None:  # which keeps no lengths up
            batch = dataclasses.replace(
                batch,
                query_lens_host=[inputs.prepared.step.tokens_each] * len(ends),
                seq_lens_host=ends,
                host_rows=(self.table.host_block_table, inputs.rows),
            )
        states, self._kept = self._kept, {}
        self.drafting.follow(
            FollowedStep(plan.request_ids, inputs.rows, batch, states, self._is_followed)
        )

    @staticmethod
    def _drawn_by_request(inputs: StepInputs, drawn: TokensToRead) -> list[list[int]]:
        ids = drawn.read()
        counts = [inputs.num_drafts[i] + 1 for i in inputs.sampling]
        return [ids[f : f + n] for f, n in zip(inputs.first_row, counts, strict=True)]
