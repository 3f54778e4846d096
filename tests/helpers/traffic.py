"""Random traffic through a scheduler: arrivals, aborts in every state, failing steps, ends.

traffic = Traffic(make_scheduler(Choice(admission="optimistic")), seed=0, max_drafts=3)
traffic.arrive()
traffic.step()
traffic.drain()     # to the last end, and nothing may be left behind
"""

from __future__ import annotations

import random

from tests.helpers.fake_runner import FakeRunner, make_request
from workbench.core.request import FinishReason, Request, RequestStatus
from workbench.core.step import SchedulerOutput
from workbench.slots.scheduler import Scheduler


def check_budget(scheduler: Scheduler, plan: SchedulerOutput) -> None:
    """A step keeps to the budget, but for one prompt that is longer and then runs alone."""
    total = plan.total_num_scheduled_tokens
    if total > scheduler.token_budget:
        assert len(plan.request_ids) == 1, "over the budget with company"
        assert plan.new_requests, "over the budget without a new prompt"


class Traffic:
    """Drives a scheduler, and knows what is owed to each request.

    Prompts begin alike, so that a prefix cache has something to share, some of them under a salt.
    """

    def __init__(self, scheduler: Scheduler, seed: int, max_drafts: int) -> None:
        self.rng = random.Random(seed)
        self.scheduler = scheduler
        self.max_len = scheduler.parts.max_model_len
        self.runner = FakeRunner(scheduler, seed, max_drafts)
        self.live: dict[str, Request] = {}
        self.done: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.started: list[str] = []  # first starts, in order
        self.aborted_states: set[str] = set()
        self.num_failures = 0
        self.count = 0
        self._stems = [self.rng.choices(range(3, 90), k=self.max_len) for _ in range(3)]

    def prompt(self) -> list[int]:
        """Some of a stem, and then perhaps tokens of its own."""
        stem, length = self.rng.choice(self._stems), self.rng.randint(1, self.max_len - 1)
        shared = self.rng.randint(0, length)
        return stem[:shared] + self.rng.choices(range(3, 90), k=length - shared)

    def arrive(self, request: Request | None = None) -> Request:
        """Queue a request, a random one unless it is given."""
        request = request or make_request(
            f"r{self.count}",
            prompt=self.prompt(),
            max_tokens=self.rng.randint(1, 20),
            priority=self.rng.randint(-2, 2),
            extra_keys=self.rng.choice([(), (), ("salt:a",)]),
            ignore_eos=self.rng.random() < 0.5,
            stop_token_ids=(99,),
        )
        self.count += 1
        self.scheduler.add(request)
        self.live[request.request_id] = request
        self.tokens[request.request_id] = []
        return request

    def abort(self) -> None:
        """Abort one wherever it stands, or one that ended long ago."""
        name = self.rng.choice([*self.live, *list(self.done)[-3:], "never seen"])
        if name in self.live:
            self.aborted_states.add(self.state_of(self.live[name]))
        ended = self.scheduler.finish(name, FinishReason.ABORT)
        assert (ended is not None) == (name in self.live)
        if ended is not None:
            assert ended.finish_reason is FinishReason.ABORT
            self.done[name] = self.live.pop(name)
        self.scheduler.check_integrity()

    def state_of(self, request: Request) -> str:
        """In words."""
        if request.status is RequestStatus.WAITING:
            if request.request_id in self.scheduler.space._swapped:
                return "swapped"
            return "pre-empted" if request.num_preemptions else "waiting"
        if request.num_computed_tokens < request.num_prompt_tokens:
            return "half-prefilled"
        return "drafting" if request.draft_token_ids else "decoding"

    def step(self, fail: str | None = None, abort_meanwhile: bool = False) -> None:
        """Run one step, which may be told to fail, or during which somebody is aborted."""
        running = dict(self.scheduler.running)
        before = {name: r.num_preemptions for name, r in self.scheduler.requests.items()}
        plan, updates = self.runner.step(fail, self.abort if abort_meanwhile else None)
        if plan is None:
            assert fail or not running, "somebody runs, yet nothing was scheduled"
            self.num_failures += bool(fail)
            return
        check_budget(self.scheduler, plan)
        for name, request in running.items():
            assert name in plan.request_ids or request.num_preemptions > before[name], (
                f"{name} runs, but was left out of the step"
            )
        for new in plan.new_requests:
            if new.request_id not in self.started:
                self.started.append(new.request_id)
        for update in updates:
            request = update.request
            name = request.request_id
            assert update.new_token_ids, "an update without a token"
            self.tokens[name] += update.new_token_ids
            assert self.tokens[name] == request.output_token_ids
            if request.is_finished:
                self.done[name] = self.live.pop(name)
                self._check_end(request)
            else:
                room = request.max_total_tokens - request.num_tokens - 1
                assert len(request.draft_token_ids) <= room, "drafts past the request's end"

    def _check_end(self, request: Request) -> None:
        assert request.num_tokens <= request.max_total_tokens <= self.max_len
        output, sampling = request.output_token_ids, request.sampling
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else request.eos_token_ids)}
        assert not stops & set(output[:-1]), "tokens after the end"
        if output[-1] in stops:
            assert request.finish_reason is FinishReason.STOP
        else:
            assert request.finish_reason is FinishReason.LENGTH
            assert request.num_tokens == request.max_total_tokens

    def drain(self, limit: int = 3000) -> None:
        """Run to the last end; then nothing is held but what a prefix cache may keep."""
        for _ in range(limit):
            if not self.scheduler.has_unfinished():
                break
            self.step()
        assert not self.live, f"never finished: {list(self.live)}"
        self.check_nothing_is_held()
        assert self.scheduler.schedule() is None

    def check_nothing_is_held(self) -> None:
        """No request, no row, no KV, no lock, no host block of a request."""
        scheduler = self.scheduler
        parts, space = scheduler.parts, scheduler.space
        usage = scheduler.kv_usage()
        assert (usage.allocated_tokens, usage.used_tokens) == (0, 0), "KV is held"
        cache = parts.prefix_cache
        assert cache.num_evictable == cache.num_blocks, "a cached block is locked"
        for book in (space._held, space._swapped, space._digests):
            assert not book, "the books know a request that is gone"
        tier = parts.offload
        tier.step_planned()
        everything = tier.swap_out("nobody", tier.num_host_blocks)
        assert (everything is not None) == tier.holds_blocks, "a host block is held"
        tier.drop("nobody")
        tier.step_planned()
        assert not scheduler.running
        assert not len(scheduler.waiting)
        assert not scheduler.has_unfinished()
        scheduler.check_integrity()
