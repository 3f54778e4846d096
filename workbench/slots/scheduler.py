"""Slot ``scheduler``: which tokens of which requests run in the next step."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from workbench.core.errors import ConfigError, RequestError
from workbench.core.request import FinishReason, Request, RequestStatus
from workbench.core.step import ModelRunnerOutput, NewRequest, SchedulerOutput
from workbench.slots.admission import Admission
from workbench.slots.component import Component
from workbench.slots.kv_cache import KVCacheManager, KVUsage
from workbench.slots.kv_offload import KVOffload
from workbench.slots.kv_space import KVSpace
from workbench.slots.policy import Policy, WaitingQueue
from workbench.slots.prefill import Prefill
from workbench.slots.prefix_cache import PrefixCache
from workbench.slots.step_plan import RequestUpdate, SteadyPlan, StepPlan


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
        if self.token_budget < parts.max_num_seqs:
            raise ConfigError(
                f"a step's budget of {self.token_budget} tokens is under "
                f"max_num_seqs={parts.max_num_seqs}, so running requests could starve. Raise the "
                "budget or lower max_num_seqs."
            )
        self.space = KVSpace(parts.kv_cache, parts.prefix_cache, parts.offload)
        if parts.admission.preempts_to_host and not parts.offload.holds_blocks:
            raise ConfigError(
                "admission.preemption=swap needs a host tier to swap to. Choose "
                "engine/kv_offload=host, or admission.preemption=recompute."
            )
        self.waiting = WaitingQueue(parts.policy, parts.prefix_cache.match_length)
        self.running: dict[str, Request] = {}
        self.requests: dict[str, Request] = {}
        self.finished_since_plan: list[str] = []
        self._step = 0
        self._steady: SteadyPlan | None = None
        self._num_kv_tokens = 0
        self.reset_counters()

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
                "raise max_model_len."
            )
        request.max_total_tokens = min(request.max_total_tokens, limit)
        if not self.parts.kv_cache.fits(request.max_total_tokens):
            total = self.parts.kv_cache.usage().total_tokens
            raise RequestError(
                f"the request needs KV for {request.max_total_tokens} tokens (prompt and output), "
                f"more than the pool of {total} tokens can give one request. Raise "
                "kv_pool_tokens or lower max_tokens."
            )
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id!r} is in use already.")
        self.requests[request.request_id] = request
        self.space.prepare(request)
        self.waiting.push(request)
        self._steady = None

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
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.draft_token_ids = []
        if self.running.pop(request_id, None) is not None:
            self.space.release(request)
            self._num_kv_tokens -= request.num_computed_tokens
            self._steady = None
            self.finished_since_plan.append(request_id)
            self._counts["leaves_while_others_run"] += bool(self.running)
        else:
            self.waiting.remove(request_id)
        self.space.forget(request)
        return request

    def _preempt(self, request: Request, to_host: bool) -> None:
        """Take a running request's row and KV; it waits again, ahead of those never started."""
        del self.running[request.request_id]
        self._num_kv_tokens -= request.num_computed_tokens
        swapped = self.space.preempt(request, to_host)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.draft_token_ids = []
        request.num_preemptions += 1
        self.finished_since_plan.append(request.request_id)
        self.waiting.push(request)
        self._counts["preemptions"] += 1
        self._counts["swaps_out"] += swapped

    def plan_failed(self, plan: SchedulerOutput) -> None:
        """A step ended with an exception: how far it came is unknown.

        Its requests are pre-empted, so that they start again from what earlier steps computed,
        and freed rows are told again.
        """
        self._steady = None
        self.finished_since_plan[:0] = plan.finished_request_ids
        if plan.copies_out or plan.copies_in:
            self.space.distrust_host()
            for new in plan.new_requests:
                if (request := self.running.get(new.request_id)) is not None:
                    self._num_kv_tokens -= request.num_computed_tokens
                    request.num_computed_tokens = 0  # what was to be copied in may not be there
        for request_id in plan.request_ids:
            if (request := self.running.get(request_id)) is not None:
                self._preempt(request, to_host=False)

    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.requests)

    # -- planning -----------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """Plan the next step, or None where nothing can run."""
        if self._steady is not None:
            return self._schedule_steady(self._steady)
        return self._schedule_anew({})

    def _schedule_anew(self, new_block_ids: dict[str, list[int]]) -> SchedulerOutput | None:
        """Plan a step request by request; ``new_block_ids`` were given for it already."""
        plan = StepPlan(self.token_budget, new_block_ids=new_block_ids)
        before = self._counts["preemptions"]
        num_after = len(self.running)
        for request in list(self.running.values()):
            # Every running request moves in every step: one token is kept for each that follows.
            num_after -= 1
            if request.status is RequestStatus.RUNNING:  # else it was pre-empted just now
                self._schedule_running(plan, request, plan.budget - num_after)
        num_continuing = len(plan.requests)
        # A pool that just ran dry has no room for others.
        room = self._counts["preemptions"] == before
        while room and plan.budget > 0 and len(self.running) < self.parts.max_num_seqs:
            if not len(self.waiting) or not self._may_admit() or not self._admit_next(plan):
                break
        if not plan.requests:
            return None
        self._counts["joins_while_others_run"] += (
            len(plan.requests) - num_continuing if num_continuing else 0
        )
        return self._emit(plan)

    @abstractmethod
    def _may_admit(self) -> bool:
        """Whether a waiting request may join the batch now."""

    def _idle_rows(self) -> int:
        """Rows of the batch that are held without being used."""
        return 0

    def _schedule_steady(self, steady: SteadyPlan) -> SchedulerOutput | None:
        """Repeat the last step's plan; only requests whose block is full are looked at."""
        new_block_ids: dict[str, list[int]] = {}
        for request in steady.growth.pop(self._step, ()):
            blocks = self.space.grow(request, request.num_computed_tokens + 1)
            if blocks is None:  # the pool ran dry: plan anew, and say what was given so far
                self._steady = None
                return self._schedule_anew(new_block_ids)
            if blocks:  # drafts that were rejected may have left room
                new_block_ids[request.request_id] = blocks
            self._note_growth(steady.growth, request, request.num_computed_tokens + 1)
        output = SchedulerOutput(
            step=self._step,
            request_ids=steady.request_ids,
            num_scheduled_tokens=steady.ones,
            num_draft_tokens=steady.zeros,
            samples=steady.samples,
            new_requests=[],
            new_block_ids=new_block_ids,
            finished_request_ids=[],
            num_idle_rows=self._idle_rows(),
            copies_out=self.space.take_copies()[0] if new_block_ids else (),
        )
        self._step += 1
        self._counts["steps"] += 1
        self._counts["scheduled_tokens"] += len(steady.ones)
        return output

    def _note_growth(
        self, growth: dict[int, list[Request]], request: Request, num_tokens: int
    ) -> None:
        """Book when a request that holds ``num_tokens`` after this step needs a block."""
        room = -num_tokens % self.parts.kv_cache.block_size
        growth.setdefault(self._step + 1 + room, []).append(request)

    def _become_steady(self, plan: StepPlan, output: SchedulerOutput) -> None:
        """Keep this step's plan for the next ones, if all it does is one token a request."""
        if (
            output.new_requests
            or len(plan.requests) != len(self.running)
            or len(plan.requests) != self.token_budget - plan.budget
            or any(plan.num_drafts)
            or not all(output.samples)
        ):
            return
        growth: dict[int, list[Request]] = {}
        for request in plan.requests:
            self._note_growth(growth, request, request.num_computed_tokens + 1)
        self._steady = SteadyPlan(
            output.request_ids,
            plan.requests,
            [RequestUpdate(request, [], None) for request in plan.requests],
            output.num_scheduled_tokens,
            output.num_draft_tokens,
            output.samples,
            growth,
        )

    def _schedule_running(self, plan: StepPlan, request: Request, budget: int) -> None:
        # Drafts are optional: they go before a running request is left out of the step.
        num_drafts = min(len(request.draft_token_ids), budget - 1)
        outstanding = request.num_tokens - request.num_computed_tokens
        if num_drafts == 0 and outstanding == 1:
            num_tokens = 1
        else:
            num_tokens = self.parts.prefill.num_tokens(
                outstanding + num_drafts, budget, not plan.requests
            )
            if num_tokens == 0:
                return
            num_drafts = max(0, num_tokens - outstanding)
        blocks = self._grow_or_preempt(plan, request, request.num_computed_tokens + num_tokens)
        if blocks is None:
            return
        if blocks:
            plan.new_block_ids.setdefault(request.request_id, []).extend(blocks)
        plan.add(request, num_tokens, num_drafts)

    def _grow_or_preempt(
        self, plan: StepPlan, request: Request, num_tokens: int
    ) -> list[int] | None:
        """Blocks for a running request, taken from the least of the others where none is free;
        None where it had to be pre-empted itself."""
        while (blocks := self.space.grow(request, num_tokens)) is None:
            planned = {r.request_id for r in plan.requests}
            others = [r for r in self.running.values() if r.request_id not in planned]
            victim = max(others, key=self.waiting.key)
            self._preempt(victim, self.parts.admission.preempts_to_host)
            plan.new_block_ids.pop(victim.request_id, None)
            if victim is request:
                return None
        return blocks

    def _admit_next(self, plan: StepPlan) -> bool:
        request = self.waiting.peek()
        assert request is not None
        parts, space = self.parts, self.space
        found = space.find(request)
        outstanding = request.num_tokens - found.num_tokens
        num_tokens = parts.prefill.num_tokens(outstanding, plan.budget, not plan.requests)
        if num_tokens == 0:
            return False
        total = found.num_tokens + num_tokens
        blocks = space.admit(request, found, parts.admission.reserve_tokens(request), total)
        if blocks is None:
            return False
        self.waiting.pop()
        request.num_computed_tokens = found.num_tokens
        self._num_kv_tokens += found.num_tokens
        if request.num_preemptions == 0:
            request.num_cached_tokens = found.num_tokens
            plan.num_cached_tokens += found.num_tokens
        request.status = RequestStatus.RUNNING
        self.running[request.request_id] = request
        plan.new_requests.append(
            NewRequest(
                request_id=request.request_id,
                token_ids=request.token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                num_computed_tokens=request.num_computed_tokens,
                block_ids=blocks,
                sampling=request.sampling,
                seed=request.sampling.seed or 0,
            )
        )
        plan.add(request, num_tokens, 0)
        self._counts["admitted"] += 1
        self._counts["swaps_in"] += found.swapped
        return True

    def _emit(self, plan: StepPlan) -> SchedulerOutput:
        samples = [
            r.num_computed_tokens + tokens - drafts >= r.num_tokens
            for r, tokens, drafts in zip(
                plan.requests, plan.num_scheduled, plan.num_drafts, strict=True
            )
        ]
        num_prefills = sum(r.num_computed_tokens < r.num_prompt_tokens for r in plan.requests)
        self._counts["partial_prompts"] += samples.count(False)
        self._counts["mixed_steps"] += 0 < num_prefills < len(plan.requests)
        self._counts["steps"] += 1
        self._counts["scheduled_tokens"] += sum(plan.num_scheduled)
        finished, self.finished_since_plan = self.finished_since_plan, []
        copies_out, copies_in = self.space.take_copies()
        output = SchedulerOutput(
            step=self._step,
            request_ids=[r.request_id for r in plan.requests],
            num_scheduled_tokens=plan.num_scheduled,
            num_draft_tokens=plan.num_drafts,
            samples=samples,
            new_requests=plan.new_requests,
            new_block_ids=plan.new_block_ids,
            finished_request_ids=finished,
            num_cached_tokens=plan.num_cached_tokens,
            num_idle_rows=self._idle_rows(),
            copies_out=copies_out,
            copies_in=copies_in,
        )
        self._become_steady(plan, output)
        self._step += 1
        return output

    # -- results ------------------------------------------------------------------------------

    def update_from_output(
        self, plan: SchedulerOutput, result: ModelRunnerOutput
    ) -> list[RequestUpdate]:
        """Book a step's tokens, end the requests that are done, and return what changed."""
        if self._steady is not None and plan.request_ids is self._steady.request_ids:
            return self._update_steady(self._steady, result)
        updates = []
        get = self.requests.get
        for request_id, num_tokens, num_drafts, samples, tokens, drafts, logprobs in zip(
            plan.request_ids,
            plan.num_scheduled_tokens,
            plan.num_draft_tokens,
            plan.samples,
            result.token_ids,
            result.draft_token_ids,
            result.logprobs,
            strict=True,
        ):
            request = get(request_id)
            if request is None:  # aborted while the step ran
                continue
            if samples:  # rejected drafts leave no valid KV
                num_tokens -= num_drafts - (len(tokens) - 1)
            computed = request.num_computed_tokens
            request.num_computed_tokens = computed + num_tokens
            self._num_kv_tokens += num_tokens
            if computed < request.num_prompt_tokens:
                self.space.publish(request)  # a prompt's KV is of use while it still runs
            if not samples:
                request.draft_token_ids = []
                continue
            kept, reason = self._append(request, tokens)
            updates.append(
                RequestUpdate(request, tokens if kept == len(tokens) else tokens[:kept], logprobs)
            )
            if reason is not None:
                self.finish(request_id, reason)
                continue
            room = max(0, request.max_total_tokens - request.num_tokens - 1)
            request.draft_token_ids = drafts[:room]
            if drafts:
                self._steady = None
        return updates

    def _update_steady(self, steady: SteadyPlan, result: ModelRunnerOutput) -> list[RequestUpdate]:
        """Book one token a request; the updates are the same objects in every steady step."""
        updates = steady.updates
        ended = []
        self._num_kv_tokens += len(updates)
        for update, tokens, logprobs in zip(
            updates, result.token_ids, result.logprobs, strict=True
        ):
            request = update.request
            update.new_token_ids = tokens
            update.logprobs = logprobs
            request.num_computed_tokens += 1
            request.num_tokens = num_tokens = request.num_tokens + 1
            (token,) = tokens
            request.output_token_ids.append(token)
            if token in request.stop_ids:
                ended.append((request.request_id, FinishReason.STOP))
            elif num_tokens >= request.max_total_tokens:
                ended.append((request.request_id, FinishReason.LENGTH))
        if any(result.draft_token_ids):
            self._steady = None
            for update, drafts in zip(updates, result.draft_token_ids, strict=True):
                room = update.request.max_total_tokens - update.request.num_tokens - 1
                update.request.draft_token_ids = drafts[: max(0, room)]
        for request_id, reason in ended:
            self.finish(request_id, reason)
        return updates

    @staticmethod
    def _append(request: Request, tokens: list[int]) -> tuple[int, FinishReason | None]:
        """Append tokens up to the first that ends the request; how many, and why it ended."""
        for kept, token in enumerate(tokens, start=1):
            request.output_token_ids.append(token)
            request.num_tokens += 1
            if token in request.stop_ids:
                return kept, FinishReason.STOP
            if request.num_tokens >= request.max_total_tokens:
                return kept, FinishReason.LENGTH
        return len(tokens), None

    def kv_usage(self) -> KVUsage:
        """Slots of the KV pool now: allocated by the manager, used by computed tokens."""
        return self.space.usage(self._num_kv_tokens)

    def check_integrity(self) -> None:
        """Raise AssertionError where the scheduler's books contradict each other."""
        assert len(self.running) <= self.parts.max_num_seqs, "more requests run than rows exist"
        assert len(self.running) + len(self.waiting) == len(self.requests), "a request is lost"
        for request in self.running.values():
            assert request.status is RequestStatus.RUNNING
            assert request.num_computed_tokens <= request.num_tokens, "computed beyond the known"
        held = sum(request.num_computed_tokens for request in self.running.values())
        assert held == self._num_kv_tokens, "KV tokens miscounted"
        self.space.check_integrity(self.running)

    # -- counters -----------------------------------------------------------------------------

    def counters(self) -> dict[str, float]:
        return dict(self._counts)

    def reset_counters(self) -> None:
        names = (
            "steps",
            "scheduled_tokens",
            "admitted",
            "joins_while_others_run",
            "leaves_while_others_run",
            "partial_prompts",
            "mixed_steps",
            "preemptions",
            "swaps_out",
            "swaps_in",
        )
        self._counts: dict[str, int] = dict.fromkeys(names, 0)


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
