"""Slot ``scheduler``: which tokens of which requests run in the next step."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from workbench.core.errors import ConfigError, RequestError
from workbench.core.request import FinishReason, Request, RequestStatus
from workbench.core.step import (
    ModelRunnerOutput,
    NewRequest,
    SchedulerOutput,
    TokenLogprobs,
)
from workbench.slots.admission import Admission
from workbench.slots.component import Component
from workbench.slots.kv_cache import KVCacheManager, KVUsage
from workbench.slots.policy import Policy, WaitingQueue
from workbench.slots.prefill import Prefill
from workbench.slots.prefix_cache import PrefixCache


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
    policy: Policy
    admission: Admission
    prefill: Prefill
    max_num_seqs: int
    max_model_len: int


@dataclass(slots=True)
class RequestUpdate:
    """What a step did to one request."""

    request: Request
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None


@dataclass(slots=True)
class _Plan:
    """A step under construction."""

    budget: int
    requests: list[Request] = field(default_factory=list)
    num_scheduled: list[int] = field(default_factory=list)
    num_drafts: list[int] = field(default_factory=list)
    new_requests: list[NewRequest] = field(default_factory=list)
    new_block_ids: dict[str, list[int]] = field(default_factory=dict)
    num_cached_tokens: int = 0
    num_idle_rows: int = 0

    def add(self, request: Request, num_tokens: int, num_drafts: int) -> None:
        self.budget -= num_tokens
        self.requests.append(request)
        self.num_scheduled.append(num_tokens)
        self.num_drafts.append(num_drafts)


@dataclass(slots=True)
class _Steady:
    """The plan of steps in which every running request runs one token and nothing else changes.

    ``growth`` holds, by step number, the requests whose last block is full by then: a steady step
    costs the requests that need a block, not the requests that run.
    """

    request_ids: list[str]
    ones: list[int]
    zeros: list[int]
    samples: list[bool]
    growth: dict[int, list[Request]]


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
        self.waiting = WaitingQueue(parts.policy)
        self.running: dict[str, Request] = {}
        self.requests: dict[str, Request] = {}
        self.finished_since_plan: list[str] = []
        self._step = 0
        self._steady: _Steady | None = None
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
            self.parts.kv_cache.free(request_id)
            self._num_kv_tokens -= request.num_computed_tokens
            self._steady = None
            self.finished_since_plan.append(request_id)
            self._counts["leaves_while_others_run"] += bool(self.running)
        else:
            self.waiting.remove(request_id)
        return request

    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.requests)

    # -- planning -----------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """Plan the next step, or None where nothing can run."""
        if self._steady is not None:
            return self._schedule_steady(self._steady)
        plan = _Plan(self.token_budget)
        num_after = len(self.running)
        for request in self.running.values():
            # Every running request moves in every step: one token is kept for each that follows.
            num_after -= 1
            self._schedule_running(plan, request, plan.budget - num_after)
        num_continuing = len(plan.requests)
        while plan.budget > 0 and len(self.running) < self.parts.max_num_seqs:
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

    def _schedule_steady(self, steady: _Steady) -> SchedulerOutput:
        """Repeat the last step's plan; only requests whose block is full are looked at."""
        new_block_ids = {}
        for request in steady.growth.pop(self._step, ()):
            blocks = self.parts.kv_cache.allocate_slots(
                request.request_id, request.num_computed_tokens + 1
            )
            assert blocks is not None, "admission promised these slots"
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

    def _become_steady(self, plan: _Plan, output: SchedulerOutput) -> None:
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
        self._steady = _Steady(
            output.request_ids,
            output.num_scheduled_tokens,
            output.num_draft_tokens,
            output.samples,
            growth,
        )

    def _schedule_running(self, plan: _Plan, request: Request, budget: int) -> None:
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
        blocks = self.parts.kv_cache.allocate_slots(
            request.request_id, request.num_computed_tokens + num_tokens
        )
        assert blocks is not None, "admission promised these slots"
        if blocks:
            plan.new_block_ids[request.request_id] = blocks
        plan.add(request, num_tokens, num_drafts)

    def _admit_next(self, plan: _Plan) -> bool:
        request = self.waiting.peek()
        assert request is not None
        parts = self.parts
        match = parts.prefix_cache.match(request)
        outstanding = request.num_tokens - match.num_tokens
        num_tokens = parts.prefill.num_tokens(outstanding, plan.budget, not plan.requests)
        if num_tokens == 0:
            return False
        if not parts.kv_cache.admit(request.request_id, parts.admission.reserve_tokens(request)):
            return False
        self.waiting.pop()
        parts.prefix_cache.lock(match)
        request.num_computed_tokens = request.num_cached_tokens = match.num_tokens
        self._num_kv_tokens += match.num_tokens
        blocks = parts.kv_cache.allocate_slots(
            request.request_id, request.num_computed_tokens + num_tokens
        )
        assert blocks is not None, "admission promised these slots"
        request.status = RequestStatus.RUNNING
        self.running[request.request_id] = request
        plan.num_cached_tokens += match.num_tokens
        plan.new_requests.append(
            NewRequest(
                request_id=request.request_id,
                token_ids=request.token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                num_computed_tokens=request.num_computed_tokens,
                block_ids=[*match.block_ids, *blocks],
                sampling=request.sampling,
                seed=request.sampling.seed or 0,
            )
        )
        plan.add(request, num_tokens, 0)
        self._counts["admitted"] += 1
        return True

    def _emit(self, plan: _Plan) -> SchedulerOutput:
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
            request.num_computed_tokens += num_tokens
            self._num_kv_tokens += num_tokens
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

    def _update_steady(self, steady: _Steady, result: ModelRunnerOutput) -> list[RequestUpdate]:
        """Book one token a request."""
        updates = []
        ended = []
        requests = self.requests
        self._num_kv_tokens += len(steady.request_ids)
        for request_id, tokens, logprobs in zip(
            steady.request_ids, result.token_ids, result.logprobs, strict=True
        ):
            request = requests[request_id]
            request.num_computed_tokens += 1
            _, reason = self._append(request, tokens)
            updates.append(RequestUpdate(request, tokens, logprobs))
            if reason is not None:
                ended.append((request_id, reason))
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
        usage = self.parts.kv_cache.usage()
        return KVUsage(usage.total_tokens, usage.allocated_tokens, self._num_kv_tokens)

    def check_integrity(self) -> None:
        """Raise AssertionError where the scheduler's books contradict each other."""
        assert len(self.running) <= self.parts.max_num_seqs, "more requests run than rows exist"
        assert len(self.running) + len(self.waiting) == len(self.requests), "a request is lost"
        for request in self.running.values():
            assert request.status is RequestStatus.RUNNING
            assert request.num_computed_tokens <= request.num_tokens, "computed beyond the known"
        held = sum(request.num_computed_tokens for request in self.running.values())
        assert held == self._num_kv_tokens, "KV tokens miscounted"
        self.parts.kv_cache.check_integrity()
        self.parts.prefix_cache.check_integrity()

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
