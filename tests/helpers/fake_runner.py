"""Schedulers under test: requests, and step results that no model made."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.engines import component, node_of
from workbench.assemble import build_config, load_class
from workbench.core.request import Request
from workbench.core.sampling import SamplingParams
from workbench.core.step import ModelRunnerOutput, SchedulerOutput
from workbench.slots.scheduler import Scheduler, SchedulerParts
from workbench.slots.step_plan import RequestUpdate

EOS = 2


def make_request(
    name: str, prompt_len: int = 4, max_tokens: int = 4, prompt: Sequence[int] = (), **fields: Any
) -> Request:
    """A request of ``prompt_len`` tokens that may end at ``EOS`` unless ``ignore_eos``."""
    sampling = SamplingParams(max_tokens=max_tokens, **fields)
    ids = list(prompt) or [10 + i for i in range(prompt_len)]
    return Request(name, ids, sampling, eos_token_ids=frozenset({EOS}))


@dataclass(frozen=True)
class Choice:
    """One option a slot, and the sizes that a scheduler is built with."""

    scheduler: str = "continuous"
    prefill: str = "whole_prompt"
    kv_cache: str = "paged"
    policy: str = "fcfs"
    admission: str = "reserve_full"
    prefix_cache: str = "none"
    eviction: str = "none"
    kv_offload: str = "none"
    max_num_seqs: int = 4
    max_model_len: int = 32
    pool_tokens: int = 96
    settings: dict[str, dict[str, Any]] = field(default_factory=dict, hash=False)


def make_scheduler(choice: Choice) -> Scheduler:
    """Build a scheduler and its parts, as the assembly does."""

    def build(slot: str, **runtime: Any) -> Any:
        settings = choice.settings.get(slot, {})
        return component(slot, getattr(choice, slot), settings=settings, **runtime)

    node = {**node_of("kv_cache", choice.kv_cache), **choice.settings.get("kv_cache", {})}
    cls = load_class(node.pop("_target_"))
    block_size = cls.choose_block_size(build_config(cls, "kv_cache", node), choice.max_model_len)
    parts = SchedulerParts(
        kv_cache=build(
            "kv_cache", num_blocks=choice.pool_tokens // block_size, block_size=block_size
        ),
        prefix_cache=build("prefix_cache", block_size=block_size, eviction=build("eviction")),
        offload=build("kv_offload", bytes_per_block=1),
        policy=build("policy"),
        admission=build("admission"),
        prefill=build("prefill"),
        max_num_seqs=choice.max_num_seqs,
        max_model_len=choice.max_model_len,
    )
    scheduler: Scheduler = build("scheduler", parts=parts)
    return scheduler


class FakeRunner:
    """Plays the model: checks that plans make sense, accepts drafts at random, drafts at random.

    Keeps what a real runner keeps of each request (progress, blocks), from plans alone.
    """

    def __init__(self, scheduler: Scheduler, seed: int = 0, max_drafts: int = 0) -> None:
        self.scheduler = scheduler
        self.rng = random.Random(seed)
        self.max_drafts = max_drafts
        self.num_known: dict[str, int] = {}
        self.num_computed: dict[str, int] = {}
        self.num_drafts: dict[str, int] = {}
        self.blocks: dict[str, list[int]] = {}
        self.eos_rate = 0.05
        self.accepted = 0

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Results for a plan; raises AssertionError where the plan is impossible."""
        self._apply(plan)
        size = self.scheduler.parts.kv_cache.block_size
        tokens: list[list[int]] = []
        drafts: list[list[int]] = []
        contexts = []
        for i, name in enumerate(plan.request_ids):
            count, num_drafts = plan.num_scheduled_tokens[i], plan.num_draft_tokens[i]
            contexts.append(self.num_computed[name])
            assert count >= 1, "a request was scheduled without tokens"
            assert 0 <= num_drafts <= min(count - 1, self.num_drafts[name])
            end = self.num_computed[name] + count
            assert end - num_drafts <= self.num_known[name], "tokens that nobody knows were run"
            assert plan.samples[i] == (end - num_drafts == self.num_known[name])
            assert num_drafts == 0 or plan.samples[i], "drafts without their last known token"
            assert end <= len(self.blocks[name]) * size, "KV without a block"
            tokens.append([])
            drafts.append([])
            self.num_computed[name] = end
            if plan.samples[i]:
                tokens[i] = self._tokens(name, num_drafts)
                drafts[i] = [self._token() for _ in range(self.rng.randint(0, self.max_drafts))]
                self.num_drafts[name] = len(drafts[i])
        owners = [b for name in plan.request_ids for b in self.blocks[name]]
        assert len(set(owners)) == len(owners), "two running requests share a block"
        return ModelRunnerOutput(tokens, drafts, [None] * len(tokens), sum(contexts))

    def _apply(self, plan: SchedulerOutput) -> None:
        for name in plan.finished_request_ids:
            assert name in self.num_known, f"{name} was told finished but never started"
            for book in (self.num_known, self.num_computed, self.num_drafts, self.blocks):
                del book[name]
        for new in plan.new_requests:
            assert new.request_id not in self.num_known, "a new request is here already"
            self.num_known[new.request_id] = len(new.token_ids)
            self.num_computed[new.request_id] = new.num_computed_tokens
            self.num_drafts[new.request_id] = 0
            self.blocks[new.request_id] = list(new.block_ids)
        for name, blocks in plan.new_block_ids.items():
            self.blocks[name] += blocks
        assert len(self.num_known) <= self.scheduler.parts.max_num_seqs, "more rows than there are"
        assert len(set(plan.request_ids)) == len(plan.request_ids)

    def _token(self) -> int:
        return EOS if self.rng.random() < self.eos_rate else self.rng.randrange(3, 100)

    def _tokens(self, name: str, num_drafts: int) -> list[int]:
        accepted = self.rng.randint(0, num_drafts)
        self.accepted += accepted
        self.num_known[name] += accepted + 1
        self.num_computed[name] = self.num_known[name] - 1
        return [self._token() for _ in range(accepted + 1)]

    def step(self) -> tuple[SchedulerOutput | None, list[RequestUpdate]]:
        """Plan, execute, book, and check the books."""
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is None:
            return None, []
        updates = self.scheduler.update_from_output(plan, self.execute(plan))
        self.scheduler.check_integrity()
        return plan, updates
