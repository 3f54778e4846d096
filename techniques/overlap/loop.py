"""Plans and queues a step before the tokens of the one before it are read."""

from __future__ import annotations

import time

from workbench.core.step import SchedulerOutput
from workbench.slots.executor import Executor, Running
from workbench.slots.loop import FinishedStep, Loop
from workbench.slots.scheduler import Scheduler
from workbench.slots.step_plan import AssumedStep

_Span = tuple[str, float, float]
_Queued = tuple[SchedulerOutput, Running, _Span]


class OverlappedLoop(Loop):
    """Keeps one step running on the device while the host works on the next one and the last one.

    While step N runs, the host books it as if its tokens were known, plans step N + 1 and queues
    it; only then it waits for the tokens of step N. A request that such a token ends has run in
    step N + 1 for nothing: what that step has of it is dropped. Where drafts may follow a step, or
    are verified in it, its tokens are read before the next one is planned.
    """

    plans_ahead = True

    def __init__(self, config: object = None) -> None:
        super().__init__(config)
        self._running: _Queued | None = None
        #: The running step, once it is booked, and the one queued behind it. Kept until the tokens
        #: are there: a wait that is interrupted is taken up again by the next call.
        self._assumed: AssumedStep | None = None
        self._following: _Queued | None = None
        #: Of the running step, once it is booked.
        self._spans: tuple[_Span, ...] = ()
        self._ahead_s = 0.0
        self._error: BaseException | None = None
        self.reset_counters()

    def step(self, scheduler: Scheduler, executor: Executor) -> FinishedStep | None:
        if self._error is not None and self._assumed is None:
            error, self._error = self._error, None
            raise error
        if self._running is not None and self._assumed is None and not scheduler.running:
            self._drop_rest(scheduler)  # all of it was aborted since
        if self._running is None:
            began = time.perf_counter()
            plan = scheduler.schedule()
            if plan is None:
                return None
            span = ("schedule", began, time.perf_counter())
            try:
                self._running = plan, executor.submit(plan), span
            except BaseException:
                scheduler.plan_failed(plan)
                raise
        plan, running, span = self._running
        if self._assumed is None and (running.is_read_first or any(plan.num_draft_tokens)):
            done = FinishedStep(plan, running.result(), spans=(span,))
            self._running = None
            return done
        if self._assumed is None:
            began = time.perf_counter()
            self._assumed = scheduler.assume(plan)
            assumed = time.perf_counter()
            self._spans = (span, ("assume", began, assumed))
            self._queue_next(scheduler, executor)
            self._ahead_s = time.perf_counter() - assumed
        result = running.result()
        began = time.perf_counter()
        updates = scheduler.resolve(self._assumed, result)
        spans = (*self._spans, ("update", began, time.perf_counter()))
        done = FinishedStep(plan, result, updates, spans, self._ahead_s)
        self._running, self._following, self._assumed = self._following, None, None
        if self._running is not None and not scheduler.has_unfinished():
            self._drop_rest(scheduler)
            self._counts["steps_for_nothing"] += 1
            done.ahead_s = 0.0
        return done

    def _queue_next(self, scheduler: Scheduler, executor: Executor) -> None:
        began = time.perf_counter()
        following = scheduler.schedule()
        if following is None:
            return
        span = ("schedule", began, time.perf_counter())
        try:
            self._following = following, executor.submit(following), span
            self._counts["steps_ahead"] += 1
        except BaseException as error:  # the step before it is fine: it comes first
            scheduler.plan_failed(following)
            self._error = error

    def _drop_rest(self, scheduler: Scheduler) -> None:
        """Nobody is left to take what still runs."""
        assert self._running is not None
        plan, running, _ = self._running
        self._running = None
        assert not scheduler.update_from_output(plan, running.result()), "somebody is left"

    def counters(self) -> dict[str, float]:
        return dict(self._counts)

    def reset_counters(self) -> None:
        self._counts = {"steps_ahead": 0, "steps_for_nothing": 0}
