"""Slot ``scheduler``: which tokens of which requests run in the next step."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from workbench.core.errors import ConfigError, RequestError
from workbench.core.request import FinishReason, Request, RequestStatus
from workbench.core.step import ModelRunnerOutput, SchedulerOutput
from workbench.slots.admission import Admission
from workbench.slots.component import Component
from workbench.slots.kv_cache import KVCacheManager, KVUsage
from workbench.slots.kv_offload import KVOffload
from workbench.slots.kv_space import KVSpace
from workbench.slots.policy import Policy, WaitingQueue
from workbench.slots.prefill import Prefill
from workbench.slots.prefix_cache import PrefixCache
from workbench.slots.step_plan import (
    UNKNOWN_TOKEN,
    AssumedStep,
    RequestUpdate,
    Running,
    StepPlan,
    append_tokens,
)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Options of every scheduler.

    Attributes
    ----------
    max_num_batched_tokens
        Tokens that one step may run, unless the ``prefill`` slot says less.
    """

    max_num_batched_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class SchedulerParts:
    """The components that a scheduler drives, and the limits it keeps."""

    kv_cache: KVCacheManager
    prefix_cache: PrefixCache
    offload: KVOffload
    policy: Policy
    admission: Admission
    prefill: Prefill
    max_num_seqs: int
    max_model_len: int
    #: Slots that a drafter writes behind a request's last known token.
    num_kv_lookahead: int = 0


class Scheduler(Component):
    """Owns the progress of requests, and decides how many of each one's tokens run next.

    There are no phases: every step lets ``num_computed_tokens`` catch up with
    ``num_tokens + len(draft_token_ids)`` within a budget (as in vLLM's V1 scheduler). What
    differs between schedulers is only when a waiting request may join (:meth:`_may_admit`).

    Only the scheduler mutates a :class:`Request` or calls the KV manager.
    """

    Config = SchedulerConfig
    config: SchedulerConfig

    def __init__(self, config: SchedulerConfig, *, parts: SchedulerParts) -> None:
        super().__init__(config)
        self.parts = parts
        self.token_budget = parts.prefill.token_budget(config.max_num_batched_tokens)
        _check_parts(parts, self.token_budget)
        self.space = KVSpace(parts.kv_cache, parts.prefix_cache, parts.offload)
        self.waiting = WaitingQueue(parts.policy, parts.prefix_cache.match_length)
        self.requests: dict[str, Request] = {}
        self._unresolved: dict[str, Request] = {}  # pre-empted before their last token was known
        self.finished_since_plan: list[str] = []
        self._running = Running(parts.kv_cache.block_size)
        self._step = 0
        self._planned: SchedulerOutput | None = None  # the plan that is being executed
        self._planned_decodes: list[RequestUpdate] = []  # of its first requests
        self._head_is_stuck = False  # the next to start had no room, and nothing has changed since
        self._steps_without_prompts = 0
        self.reset_counters()

    @property
    def running(self) -> dict[str, Request]:
        """Requests that have a row, by id; not to be changed."""
        return self._running.requests

    # -- requests -----------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises
        ------
        RequestError
            It could never be held: longer than the context or than the whole KV pool.
        """
        limit = self.parts.max_model_len
        if request.num_prompt_tokens >= limit:
            raise RequestError(
                f"the prompt has {request.num_prompt_tokens} tokens, but with at least one output "
                f"token the context of {limit} holds {limit - 1} at most. Shorten the prompt or "
                "raise limits.max_model_len."
            )
        request.max_total_tokens = min(request.max_total_tokens, limit)
        if not self.parts.kv_cache.fits(request.max_total_tokens):
            total = self.parts.kv_cache.total_tokens
            raise RequestError(
                f"the request needs KV for {request.max_total_tokens} tokens (prompt and output), "
                f"more than the pool of {total} tokens can give one request. Raise "
                "limits.kv_pool_tokens or lower max_tokens."
            )
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id!r} is in use already.")
        self.requests[request.request_id] = request
        self.space.prepare(request)
        self.waiting.push(request)
        self._head_is_stuck = False

    def finish(
        self, request_id: str, reason: FinishReason, num_output_tokens: int | None = None
    ) -> Request | None:
        """End a request wherever it stands and free all it holds; None if it is unknown.

        ``num_output_tokens`` drops output past a stop string that the tokens' text held.
        """
        request = self.requests.pop(request_id, None)
        if request is None:
            return None
        if num_output_tokens is not None:
            del request.output_token_ids[num_output_tokens:]
            request.num_tokens = request.num_prompt_tokens + len(request.output_token_ids)
        request.finish_reason = reason
        if request_id in self.running:
            self._stop_running(request)
            # Output may have been dropped whose KV is written; nobody knows its tokens any more.
            request.num_computed_tokens = min(request.num_computed_tokens, request.num_tokens)
            self.space.release(request)
            self._counts["leaves_while_others_run"] += bool(self.running)
        else:
            if self._unresolved.pop(request_id, None) is None:
                self.waiting.remove(request_id)
            self._head_is_stuck = False
        request.status = RequestStatus.FINISHED
        self.space.forget(request)
        return request

    def _stop_running(self, request: Request) -> None:
        self._running.stop(request)
        self.finished_since_plan.append(request.request_id)
        self._head_is_stuck = False

    def _put_back(self, request: Request, to_host: bool) -> bool:
        """Let a running request wait again, where it stood; whether its KV went to the host."""
        self._stop_running(request)
        swapped = self.space.preempt(request, to_host)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        if request.output_token_ids and request.output_token_ids[-1] == UNKNOWN_TOKEN:
            self._unresolved[request.request_id] = request
        else:
            self.waiting.push(request)
        return swapped

    def plan_failed(self, plan: SchedulerOutput) -> None:
        """A step ended with an exception: how far it came is unknown.

        Its requests wait again, to start from what earlier steps computed, and freed rows are told
        again.
        """
        self._planned = None
        self.finished_since_plan[:0] = plan.finished_request_ids
        for new in plan.new_requests:
            request = self.requests.get(new.request_id)
            if request is not None and request.first_step == plan.step:
                request.first_step = -1
        if plan.copies_out or plan.copies_in:
            self.space.distrust_host()
            for new in plan.new_requests:
                if (request := self.running.get(new.request_id)) is not None:
                    self._running.num_kv_tokens -= request.num_computed_tokens
                    request.num_computed_tokens = 0  # what was to be copied in may not be there
        for request_id in plan.request_ids:
            if (request := self.running.get(request_id)) is not None:
                self._put_back(request, to_host=False)
        if self.space.has_unwritten:  # and yet published: nobody else has a lock on it
            self.space.clear_device()

    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.requests)

    # -- planning -----------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """Plan the next step, or None where nothing can run."""
        decodes, others = self._running.decodes, self._running.others
        plan = StepPlan(self.token_budget - len(decodes))
        num_preemptions = self._counts["preemptions"]
        for request in decodes.take_full(self._step):
            if request.request_id in decodes:  # else it was pre-empted just now
                self._grow(plan, request, request.num_computed_tokens + 1)
        if others:
            # Every running request moves in every step: one token is kept for each that follows.
            for num_after, request in zip(
                range(len(others) - 1, -1, -1), list(others.values()), strict=True
            ):
                if request.request_id in others:
                    self._schedule_running(plan, request, plan.budget - num_after)
        num_continuing = len(plan.requests) + len(decodes)
        # A pool that just ran dry has no room for others, unless everybody had to give way.
        if self._counts["preemptions"] == num_preemptions or not num_continuing:
            self._start_waiting(plan)
        if not plan.requests and not len(decodes):
            return None
        if num_continuing:
            self._counts["joins_while_others_run"] += len(plan.new_requests)
        return self._emit(plan)

    def _start_waiting(self, plan: StepPlan) -> None:
        """Let waiting requests join the step, in the policy's order, as long as there is room."""
        if self._head_is_stuck or len(self.running) >= self.parts.max_num_seqs:
            return
        if not len(self.waiting) or not self._may_admit():
            return
        if self.running and self.parts.policy.holds_back(self._steps_without_prompts):
            return
        for request, num_tokens in zip(plan.requests, plan.num_scheduled, strict=True):
            self.space.publish_planned(request, request.num_computed_tokens + num_tokens)
        while len(self.waiting) and len(self.running) < self.parts.max_num_seqs:
            if plan.budget <= 0 or not self._admit_next(plan):
                # Another mix of prompts and drafts leaves another budget; single tokens do not.
                self._head_is_stuck |= not plan.requests
                return

    @abstractmethod
    def _may_admit(self) -> bool:
        """Whether a waiting request may join the batch now."""

    def _idle_rows(self) -> int:
        """Rows of the batch that are held without being used."""
        return 0

    def _schedule_running(self, plan: StepPlan, request: Request, budget: int) -> None:
        computed = request.num_computed_tokens
        outstanding = request.num_tokens - computed
        # Drafts are optional: they go before a running request is left out of the step.
        num_drafts = min(len(request.draft_token_ids), budget - 1)
        is_empty = not plan.requests and not len(self._running.decodes)
        num_tokens = self.parts.prefill.num_tokens(outstanding + num_drafts, budget, is_empty)
        if num_tokens == 0:
            return
        num_drafts = max(0, num_tokens - outstanding)
        if num_drafts:
            blocks = self._ask(request, computed + num_tokens)
            if blocks is None:  # and before anybody is pre-empted
                num_tokens, num_drafts = num_tokens - num_drafts, 0
            elif blocks:
                plan.new_block_ids[request.request_id] = blocks
        if num_drafts or self._grow(plan, request, computed + num_tokens):
            plan.add(request, num_tokens, num_drafts)

    def _grow(self, plan: StepPlan, request: Request, num_tokens: int) -> bool:
        """Get a running request room for ``num_tokens`` tokens, from the last of those that run
        where nothing is free; False where it had to give way itself."""
        while (blocks := self._ask(request, num_tokens)) is None:
            victim = max(self.running.values(), key=self.waiting.place_of)
            self._preempt(plan, victim)
            if victim is request:
                return False
        if blocks:
            plan.new_block_ids[request.request_id] = blocks
        return True

    def _ask(self, request: Request, num_tokens: int) -> list[int] | None:
        """Blocks added for ``num_tokens`` tokens, and where there is room for those too that a
        drafter writes behind them; None for want of room."""
        ahead = self.parts.num_kv_lookahead
        if ahead:
            most = min(num_tokens + ahead, request.max_total_tokens)
            if most > num_tokens and (blocks := self.space.grow(request, most)) is not None:
                return blocks
        return self.space.grow(request, num_tokens)

    def _preempt(self, plan: StepPlan, victim: Request) -> None:
        """Take a running request's KV, and it out of the step if it is planned already."""
        if victim.request_id in self._running.decodes:
            plan.budget += 1
        else:
            plan.drop(victim)
        plan.new_block_ids.pop(victim.request_id, None)
        victim.num_preemptions += 1
        self._counts["preemptions"] += 1
        self._counts["preempted_tokens"] += victim.num_computed_tokens
        to_host = self.parts.admission.preempts_to_host
        has_kv = victim.num_computed_tokens > 0
        swapped = self._put_back(victim, to_host)
        self._counts["swaps_out"] += swapped
        self._counts["swaps_refused"] += to_host and has_kv and not swapped

    def _admit_next(self, plan: StepPlan) -> bool:
        """Start the request that goes next; False where it has to wait for budget or KV."""
        request = self.waiting.peek()
        assert request is not None
        parts, space = self.parts, self.space
        found = space.find(request)
        outstanding = request.num_tokens - found.num_tokens
        is_empty = not plan.requests and not len(self._running.decodes)
        num_tokens = parts.prefill.num_tokens(outstanding, plan.budget, is_empty)
        if num_tokens == 0:
            return False
        total = found.num_tokens + num_tokens
        blocks = space.admit(request, found, parts.admission.reserve_tokens(request), total)
        if blocks is None:
            # While nobody ends, only blocks that it may share can help, not tokens and drafts.
            self._head_is_stuck = not self._running.may_publish()
            return False
        self.waiting.pop()
        request.num_computed_tokens = found.num_tokens
        self._running.start(request)
        if request.first_step < 0:
            request.first_step = self._step
            request.num_cached_tokens = found.num_tokens
            plan.num_cached_tokens += found.num_tokens
        plan.start(request, num_tokens, blocks)
        space.publish_planned(request, total)
        possible = space.num_distinct(self._running.num_possible_tokens)
        self._counts["admitted"] += 1
        self._counts["overcommitted_starts"] += possible > parts.kv_cache.total_tokens
        self._counts["swaps_in"] += found.swapped
        return True

    def _emit(self, plan: StepPlan) -> SchedulerOutput:
        """The step's plan: first the requests that decode, then those with more to run."""
        decodes = self._running.decodes.columns()
        request_ids, updates, counts, drafts, samples = decodes
        if plan.requests:
            request_ids = [*request_ids, *(r.request_id for r in plan.requests)]
            counts = [*counts, *plan.num_scheduled]
            drafts = [*drafts, *plan.num_drafts]
            samples = [*samples, *plan.samples()]
            self._count_others(plan, samples)
        else:
            self._steps_without_prompts += 1
        self._counts["steps"] += 1
        num_tokens = len(updates) + sum(plan.num_scheduled)
        assert plan.budget == self.token_budget - num_tokens, "the step's budget is miscounted"
        self._counts["scheduled_tokens"] += num_tokens
        finished, self.finished_since_plan = self.finished_since_plan, []
        copies_out, copies_in = self.space.take_copies()
        output = SchedulerOutput(
            step=self._step,
            request_ids=request_ids,
            num_scheduled_tokens=counts,
            num_draft_tokens=drafts,
            samples=samples,
            new_requests=plan.new_requests,
            new_block_ids=plan.new_block_ids,
            finished_request_ids=finished,
            num_cached_tokens=plan.num_cached_tokens,
            num_idle_rows=self._idle_rows(),
            copies_out=copies_out,
            copies_in=copies_in,
        )
        self._planned, self._planned_decodes = output, updates
        self._step += 1
        return output

    def _count_others(self, plan: StepPlan, samples: list[bool]) -> None:
        num_prefills = sum(r.num_computed_tokens < r.num_prompt_tokens for r in plan.requests)
        self._counts["partial_prompts"] += samples.count(False)
        self._counts["mixed_steps"] += 0 < num_prefills < len(samples)
        if num_prefills or plan.new_requests:
            self._steps_without_prompts = 0
        else:
            self._steps_without_prompts += 1

    # -- results ------------------------------------------------------------------------------

    def update_from_output(
        self, plan: SchedulerOutput, result: ModelRunnerOutput
    ) -> list[RequestUpdate]:
        """Book a step's tokens, end the requests that are done, and return what changed.

        Comes before the next :meth:`schedule`. The updates are good until then.
        """
        assert plan is self._planned, "results of another plan than the last"
        num_decodes = len(self._planned_decodes)
        updates = self._update_decodes(result)
        if num_decodes < len(plan.request_ids):
            updates = updates + self._update_others(plan, result, num_decodes)
        return updates

    def assume(self, plan: SchedulerOutput) -> AssumedStep:
        """Book a step that is queued and whose tokens nobody knows yet, to plan the next one.

        Takes the place of :meth:`update_from_output`, for plans without drafts: each token stands
        in its request as :data:`UNKNOWN_TOKEN` until :meth:`resolve`, which comes before the next
        :meth:`assume`. A request that reaches its length ends here; one that ends by its token ends
        when that is known.
        """
        assert not any(plan.num_draft_tokens), "drafts cannot be assumed"
        count = len(plan.request_ids)
        tokens = [[UNKNOWN_TOKEN] if samples else [] for samples in plan.samples]
        place = {request_id: i for i, request_id in enumerate(plan.request_ids)}
        empty: list[list[int]] = [[]] * count
        result = ModelRunnerOutput(tokens, empty, [None] * count)
        updates = self.update_from_output(plan, result)
        return AssumedStep([(place[u.request.request_id], u.request) for u in updates])

    def resolve(self, assumed: AssumedStep, result: ModelRunnerOutput) -> list[RequestUpdate]:
        """Put the tokens of an assumed step where they belong; what changed, as of
        :meth:`update_from_output`."""
        updates = []
        for index, request in assumed.sampled:
            tokens = request.output_token_ids
            if request.finish_reason is FinishReason.ABORT:
                continue
            assert tokens[-1] == UNKNOWN_TOKEN, "a token is known before its step"
            (tokens[-1],) = new = result.token_ids[index]
            if self._unresolved.pop(request.request_id, None) is not None:
                self.waiting.push(request)
                self._head_is_stuck = False
            if tokens[-1] in request.stop_ids:
                if request.is_finished:
                    request.finish_reason = FinishReason.STOP
                else:
                    self.finish(request.request_id, FinishReason.STOP)
            updates.append(RequestUpdate(request, new, result.logprobs[index]))
        return updates

    def _update_decodes(self, result: ModelRunnerOutput) -> list[RequestUpdate]:
        """Book one token a request; the updates are the same objects while a request decodes."""
        planned = self._planned_decodes
        updates, ended = self._running.book_decodes(planned, result)
        for request_id, reason in ended:
            self.finish(request_id, reason)
        if any(result.draft_token_ids):
            for update, drafts in zip(planned, result.draft_token_ids, strict=False):
                if update.request.status is RequestStatus.RUNNING:
                    self._running.take_drafts(update.request, drafts, self._step)
        return updates

    def _update_others(
        self, plan: SchedulerOutput, result: ModelRunnerOutput, first: int
    ) -> list[RequestUpdate]:
        """Book the requests from ``first`` on: any number of tokens, drafts among them."""
        updates = []
        for index in range(first, len(plan.request_ids)):
            request = self.running.get(plan.request_ids[index])
            if request is None:  # aborted while the step ran
                continue
            tokens, samples = result.token_ids[index], plan.samples[index]
            num_tokens = plan.num_scheduled_tokens[index]
            if samples:  # rejected drafts leave no valid KV
                num_tokens -= plan.num_draft_tokens[index] - (len(tokens) - 1)
            computed = request.num_computed_tokens
            request.num_computed_tokens = computed + num_tokens
            self._running.num_kv_tokens += num_tokens
            if not samples:
                self.space.publish(request)  # a prompt's KV is of use while it still runs
                continue
            kept, reason = append_tokens(request, tokens)
            new_token_ids = tokens if kept == len(tokens) else tokens[:kept]
            updates.append(RequestUpdate(request, new_token_ids, result.logprobs[index]))
            if reason is not None:
                self.finish(request.request_id, reason)
                continue
            if computed < request.num_prompt_tokens:
                self.space.publish(request)
            self._running.take_drafts(request, result.draft_token_ids[index], self._step)
        return updates

    def kv_usage(self) -> KVUsage:
        """Slots of the KV pool now: allocated by the manager, used by computed tokens."""
        return self.space.usage(self._running.num_kv_tokens)

    def check_integrity(self) -> None:
        """Raise AssertionError where the scheduler's books contradict each other."""
        assert len(self.running) <= self.parts.max_num_seqs, "more requests run than rows exist"
        num_waiting = len(self.waiting) + len(self._unresolved)
        assert len(self.running) + num_waiting == len(self.requests), "a request is lost"
        self._running.check_integrity()
        for request_id, request in self.requests.items():
            assert request_id in self.running or not request.num_computed_tokens, "waits with KV"
        self.space.check_integrity(self.running)

    # -- counters -----------------------------------------------------------------------------

    def counters(self) -> dict[str, float]:
        return {**self._counts, "in_flight_tokens": self.space.num_in_flight_tokens}

    def reset_counters(self) -> None:
        names = (
            "steps",
            "scheduled_tokens",
            "admitted",
            "overcommitted_starts",
            "joins_while_others_run",
            "leaves_while_others_run",
            "partial_prompts",
            "mixed_steps",
            "preemptions",
            "preempted_tokens",
            "swaps_out",
            "swaps_in",
            "swaps_refused",
        )
        self._counts: dict[str, int] = dict.fromkeys(names, 0)
        self.space.num_in_flight_tokens = 0


def _check_parts(parts: SchedulerParts, token_budget: int) -> None:
    """Raise ConfigError where components do not go together."""
    if token_budget < parts.max_num_seqs:
        raise ConfigError(
            f"a step's budget of {token_budget} tokens is under "
            f"limits.max_num_seqs={parts.max_num_seqs}, so running requests could starve. Raise "
            "what sets it, engine.scheduler.max_num_batched_tokens or "
            "engine.prefill.chunk_tokens, or lower limits.max_num_seqs."
        )
    if parts.admission.preempts_to_host and not parts.offload.holds_blocks:
        raise ConfigError(
            "engine.admission.preemption=swap needs a host tier to swap to. Choose "
            "engine/kv_offload=host, or engine.admission.preemption=recompute."
        )
    caches = parts.prefix_cache.shares_blocks
    if parts.offload.holds_blocks and not caches and not parts.admission.preempts_to_host:
        raise ConfigError(
            "a host tier has nothing to hold: no prefix cache gives blocks up and nothing is "
            "swapped. Choose engine/prefix_cache=block_hash (or radix), "
            "engine.admission.preemption=swap, or engine/kv_offload=none."
        )
    if parts.prefix_cache.eviction.orders and not caches:
        raise ConfigError(
            f"eviction {type(parts.prefix_cache.eviction).__name__} orders a prefix cache, and "
            "there is none. Choose engine/prefix_cache=radix (or block_hash), or "
            "engine/eviction=none."
        )
    if parts.policy.needs_prefix_cache and not caches:
        raise ConfigError(
            f"policy {type(parts.policy).__name__} orders by what a prefix cache holds, and there "
            "is none. Choose engine/prefix_cache=radix (or block_hash), or another engine/policy."
        )


class StaticBatch(Scheduler):
    """Fill a batch, run it until its last request ends, then fill the next: the null object.

    A request that ends early leaves its row idle; the row is not computed, which is kinder than
    the padded loops of old, and ``num_idle_rows`` counts what it costs (Orca, Yu et al. 2022,
    section 3).
    """

    def __init__(self, config: SchedulerConfig, *, parts: SchedulerParts) -> None:
        self._filling = True
        self._batch_size = 0
        super().__init__(config, parts=parts)

    def schedule(self) -> SchedulerOutput | None:
        if not self.running:
            self._filling, self._batch_size = True, 0
        plan = super().schedule()
        if self._batch_size == len(self.running) and self.running:
            self._filling = False  # a step that added nobody closes the batch
        self._batch_size = max(self._batch_size, len(self.running))
        if len(self.running) >= self.parts.max_num_seqs or not len(self.waiting):
            self._filling = False
        return plan

    def _may_admit(self) -> bool:
        return self._filling

    def _idle_rows(self) -> int:
        return max(0, self._batch_size - len(self.running))
