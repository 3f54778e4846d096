"""Scheduler, KV manager and caches driven for real, with nothing in place of the model.

Which tokens run, what a cache finds, what it evicts, who waits and who is pre-empted depends on
lengths, prefixes and arrivals, not on what a model says, so it can be counted over hours of
traffic in seconds. Time is counted in steps: what a step would have taken is not modelled.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from workbench.core.request import Request
from workbench.core.step import ModelRunnerOutput, SchedulerOutput
from workbench.slots.scheduler import Scheduler
from workbench.slots.step_plan import RequestUpdate


class DryRunner:
    """Plays the model runner: a request that samples gets the same token every time.

    Proposes no drafts, so it takes none.

    Parameters
    ----------
    token_id
        The token. Where it is no id of any prompt, no cache finds output in a prompt by chance.
    """

    def __init__(self, token_id: int = 0) -> None:
        self._token = [token_id]
        self._nothing: list[int] = []
        self._last: tuple[list[bool], ModelRunnerOutput] | None = None

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Return the tokens of a step."""
        # A steady plan holds the very lists of the one before, so its result is the same too.
        if self._last is not None and self._last[0] is plan.samples:
            return self._last[1]
        tokens = [self._token if samples else self._nothing for samples in plan.samples]
        nothing = [self._nothing] * len(tokens)
        result = ModelRunnerOutput(tokens, nothing, [None] * len(tokens))
        self._last = plan.samples, result
        return result


@dataclass(slots=True)
class Timeline:
    """When what happened to one request, in steps; -1 where it did not.

    Attributes
    ----------
    arrived
        Step before which it was queued.
    started
        First step that ran tokens of it.
    first_token, ended
        Steps that brought its first and its last token.
    priority
        As the request's.
    """

    arrived: int
    num_prompt_tokens: int
    priority: int = 0
    started: int = -1
    first_token: int = -1
    ended: int = -1
    num_output_tokens: int = 0

    @property
    def waited(self) -> int:
        """Steps that went by before the first one that ran tokens of it."""
        return self.started - self.arrived

    @property
    def turnaround(self) -> int:
        """Steps from arrival to the last token, that one's included."""
        return self.ended - self.arrived + 1


@dataclass(slots=True)
class DryRunResult:
    """What a dry run counted.

    Attributes
    ----------
    timelines
        By request id, in order of arrival.
    num_steps, num_idle_steps
        Steps that ran something, and steps that went by while nothing was here to run.
    num_cached_tokens
        Prompt tokens that requests found in the prefix cache when they first started.
    kv_used_tokens, kv_allocated_tokens
        Token slots by step that ran, after it: holding a token of a running request, and taken.
    schedule_us
        What each call of ``schedule()`` took, in microseconds: the one thing here that is timed.
    counters
        Of the components, as ``slot.counter``.
    """

    timelines: dict[str, Timeline] = field(default_factory=dict)
    num_steps: int = 0
    num_idle_steps: int = 0
    num_cached_tokens: int = 0
    kv_used_tokens: list[int] = field(default_factory=list)
    kv_allocated_tokens: list[int] = field(default_factory=list)
    schedule_us: list[float] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(line.num_prompt_tokens for line in self.timelines.values())

    def mean_waste(self) -> float:
        """Share of the taken token slots that held no token, mean over steps."""
        shares = [
            1.0 - used / taken
            for used, taken in zip(self.kv_used_tokens, self.kv_allocated_tokens, strict=True)
            if taken
        ]
        return sum(shares) / len(shares) if shares else 0.0

    def waste_at_fullest(self) -> float:
        """The same at the step at which most slots were taken."""
        taken = max(self.kv_allocated_tokens, default=0)
        if not taken:
            return 0.0
        return 1.0 - self.kv_used_tokens[self.kv_allocated_tokens.index(taken)] / taken


class DryRun:
    """Serves requests with a scheduler, step by step, without a model.

    Parameters
    ----------
    scheduler
        Assembled and idle; no drafter may feed it.
    max_arrivals_per_step
        Hand over so many requests a step at most; those that arrive together then follow each
        other, and each finds what the one before it computed in a single step. None for all.
    check_every
        Check the books of the scheduler and its parts after every so many steps; 0 checks them
        at the end alone.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: DryRunner | None = None,
        *,
        max_arrivals_per_step: int | None = None,
        check_every: int = 0,
    ) -> None:
        if max_arrivals_per_step is not None and max_arrivals_per_step < 1:
            raise ValueError(
                f"max_arrivals_per_step={max_arrivals_per_step} must be 1 or more, or None."
            )
        self.scheduler = scheduler
        self.runner = runner or DryRunner()
        self._max_arrivals = max_arrivals_per_step
        self._check_every = check_every

    def serve(self, arrivals: Iterable[tuple[int, Request]]) -> DryRunResult:
        """Serve requests to the end.

        Parameters
        ----------
        arrivals
            Step number and request, in order of steps; consumed as the clock goes on, so that a
            long trace need not lie in memory.

        Raises
        ------
        ValueError
            Steps decrease.
        RequestError
            A request could never be held.
        """
        result, scheduler = DryRunResult(), self.scheduler
        queue = _Queue(arrivals, self._max_arrivals)
        now = 0
        while True:
            for request in queue.due(now):
                result.timelines[request.request_id] = Timeline(
                    now, request.num_prompt_tokens, request.priority
                )
                scheduler.add(request)
            if not scheduler.has_unfinished():
                if queue.next_step is None:
                    break
                result.num_idle_steps += queue.next_step - now
                now = queue.next_step
                continue
            self._step(now, result)
            now += 1
        scheduler.check_integrity()
        result.counters = _counters(scheduler)
        return result

    def _step(self, now: int, result: DryRunResult) -> None:
        scheduler = self.scheduler
        began = time.perf_counter()
        plan = scheduler.schedule()
        result.schedule_us.append((time.perf_counter() - began) * 1e6)
        assert plan is not None, "requests wait but nothing can run"
        result.num_cached_tokens += plan.num_cached_tokens
        for new in plan.new_requests:
            line = result.timelines[new.request_id]
            if line.started < 0:  # else it runs again after a pre-emption
                line.started = now
        updates = scheduler.update_from_output(plan, self.runner.execute(plan))
        _note_tokens(updates, now, result)
        usage = scheduler.kv_usage()
        result.kv_used_tokens.append(usage.used_tokens)
        result.kv_allocated_tokens.append(usage.allocated_tokens)
        result.num_steps += 1
        if self._check_every and result.num_steps % self._check_every == 0:
            scheduler.check_integrity()


def _note_tokens(updates: list[RequestUpdate], now: int, result: DryRunResult) -> None:
    for update in updates:
        request = update.request
        line = None
        if len(request.output_token_ids) == 1:
            line = result.timelines[request.request_id]
            line.first_token = now
        if request.finish_reason is not None:
            line = line or result.timelines[request.request_id]
            line.ended = now
            line.num_output_tokens = len(request.output_token_ids)


def _counters(scheduler: Scheduler) -> dict[str, float]:
    parts = scheduler.parts
    components = {
        "scheduler": scheduler,
        "kv_cache": parts.kv_cache,
        "prefix_cache": parts.prefix_cache,
        "kv_offload": parts.offload,
        "policy": parts.policy,
        "admission": parts.admission,
    }
    return {
        f"{slot}.{name}": value
        for slot, component in components.items()
        for name, value in component.counters().items()
    }


class _Queue:
    """Arrivals that are still to come; holds one request ahead."""

    def __init__(self, arrivals: Iterable[tuple[int, Request]], max_arrivals: int | None) -> None:
        self._arrivals = iter(arrivals)
        self._max_arrivals = max_arrivals
        self._next = next(self._arrivals, None)

    @property
    def next_step(self) -> int | None:
        """Step of the next arrival, None where none is left."""
        return None if self._next is None else self._next[0]

    def due(self, now: int) -> Iterator[Request]:
        """Yield the requests to hand over before step ``now``."""
        num_handed = 0
        while self._next is not None and self._next[0] <= now:
            if self._max_arrivals is not None and num_handed >= self._max_arrivals:
                return
            step, request = self._next
            self._next = next(self._arrivals, None)
            if self._next is not None and self._next[0] < step:
                raise ValueError(
                    f"request {self._next[1].request_id!r} arrives at step {self._next[0]}, before "
                    f"the one that stands before it (step {step}); sort them by step."
                )
            num_handed += 1
            yield request
