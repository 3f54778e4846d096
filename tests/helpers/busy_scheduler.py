"""A scheduler at the size of a busy server, and steps of it that no model runs.

busy = BusyScheduler.build("fcfs", "radix")
busy.plan_step()     # what is measured
busy.finish_step()   # one token for everybody
busy.end_one()       # so that somebody may join
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.helpers.engines import component
from tests.helpers.fake_runner import Choice, make_request, make_scheduler
from workbench.core.request import FinishReason
from workbench.core.step import ModelRunnerOutput, SchedulerOutput
from workbench.slots.scheduler import Scheduler

NUM_RUNNING = 256
NUM_WAITING = 10_000
PROMPT_LEN = 512
BLOCK_SIZE = 16


@dataclass
class BusyScheduler:
    """All rows are taken by requests that decode, and the queue is long."""

    scheduler: Scheduler
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    plan: SchedulerOutput | None = None

    @classmethod
    def build(
        cls, policy: str, cache: str, num_running: int = NUM_RUNNING, num_waiting: int = NUM_WAITING
    ) -> BusyScheduler:
        """Fill it; prompts share long prefixes, as those of a server do."""
        if component("policy", policy).needs_prefix_cache and cache == "none":
            cache = "radix"
        choice = Choice(
            policy=policy,
            prefix_cache=cache,
            eviction="none" if cache == "none" else "lru",
            admission="optimistic",
            max_num_seqs=num_running,
            max_model_len=8192,
            pool_tokens=4 * num_running * 1024,
            settings={
                "kv_cache": {"block_size": BLOCK_SIZE},
                "scheduler": {"max_num_batched_tokens": 1 << 20},
                "policy": {"steps_between_prompts": 0} if policy == "decode_first" else {},
            },
        )
        busy = cls(make_scheduler(choice))
        stems = [[busy.rng.randrange(3, 30_000) for _ in range(PROMPT_LEN)] for _ in range(64)]
        for index in range(num_running + num_waiting):
            stem = busy.rng.choice(stems)[: busy.rng.randint(0, PROMPT_LEN - 16)]
            own = [busy.rng.randrange(3, 30_000) for _ in range(busy.rng.randint(16, 64))]
            busy.scheduler.add(
                make_request(f"r{index}", prompt=stem + own, max_tokens=4096, ignore_eos=True)
            )
        for _ in range(3):
            busy.plan_step()
            busy.finish_step()
        assert len(busy.scheduler.running) == num_running
        assert len(busy.scheduler.waiting) == num_waiting
        return busy

    def plan_step(self) -> None:
        """``schedule()``."""
        self.plan = self.scheduler.schedule()

    def finish_step(self) -> None:
        """Book one token for each request that yields one."""
        plan, self.plan = self.plan, None
        if plan is None:
            return
        nothing: list[list[int]] = [[] for _ in plan.samples]
        tokens = [[5] if samples else [] for samples in plan.samples]
        self.scheduler.update_from_output(
            plan, ModelRunnerOutput(tokens, nothing, [None] * len(tokens))
        )

    def end_one(self) -> None:
        """End a running request."""
        name = self.rng.choice(list(self.scheduler.running))
        self.scheduler.finish(name, FinishReason.ABORT)
