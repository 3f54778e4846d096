"""Schedulers under test: requests, and step results that no model made."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.engines import component, node_of
from workbench.assemble import build_config, load_class
from workbench.core.request import Request
from workbench.core.sampling import SamplingParams
from workbench.core.step import ModelRunnerOutput, SchedulerOutput
from workbench.slots.executor import Ran
from workbench.slots.scheduler import Scheduler, SchedulerParts
from workbench.slots.step_plan import RequestUpdate

EOS = 2


def make_request(
    name: str,
    prompt_len: int = 4,
    max_tokens: int = 4,
    prompt: Sequence[int] = (),
    priority: int = 0,
    extra_keys: tuple[str, ...] = (),
    **fields: Any,
) -> Request:
    """A request of ``prompt_len`` tokens that may end at ``EOS`` unless ``ignore_eos``."""
    sampling = SamplingParams(max_tokens=max_tokens, **fields)
    ids = list(prompt) or [10 + i for i in range(prompt_len)]
    return Request(
        name,
        ids,
        sampling,
        eos_token_ids=frozenset({EOS}),
        priority=priority,
        extra_keys=extra_keys,
    )


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
        offload=build(
            "kv_offload", bytes_per_block=1, num_device_blocks=choice.pool_tokens // block_size
        ),
        policy=build("policy"),
        admission=build("admission"),
        prefill=build("prefill"),
        max_num_seqs=choice.max_num_seqs,
        max_model_len=choice.max_model_len,
    )
    scheduler: Scheduler = build("scheduler", parts=parts)
    return scheduler


class StepFailedError(Exception):
    """What a step ends with when a test asks for it."""


@dataclass
class _Row:
    """What a runner keeps of a request, from plans alone."""

    token_ids: list[int]
    root: int
    num_computed: int
    blocks: list[int]
    drafts: list[int] = field(default_factory=list)


class FakeRunner:
    """Plays the model: checks that plans make sense, accepts drafts at random, drafts at random.

    It keeps no KV but what stands for it: in each slot of each block a hash of all the tokens up to
    there and of the request's extra keys. After every step each row's computed slots must hold
    those of its own tokens, however they came there: computed, shared, copied out and in again.
    That costs the tokens of all requests a step; ``checks_content=False`` leaves it out.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        seed: int = 0,
        max_drafts: int = 0,
        *,
        checks_content: bool = True,
    ) -> None:
        self.scheduler = scheduler
        self.checks_content = checks_content
        self.rng = random.Random(seed)
        self.max_drafts = max_drafts
        self.rows: dict[str, _Row] = {}
        self.device: dict[tuple[int, int], int] = {}
        self.host: dict[tuple[int, int], int] = {}
        self.eos_rate = 0.05
        self.accepted = 0
        self.num_steps = 0
        self.num_copies_out = 0
        self.num_copies_in = 0
        #: Rows of plans that failed, which may be told finished without having been seen.
        self._in_doubt: set[str] = set()

    @property
    def num_known(self) -> dict[str, int]:
        """Known tokens by request that has a row."""
        return {name: len(row.token_ids) for name, row in self.rows.items()}

    def submit(self, plan: SchedulerOutput) -> Ran:
        """Run a plan now."""
        return Ran(self.execute(plan))

    def execute(self, plan: SchedulerOutput, fail: str | None = None) -> ModelRunnerOutput:
        """Results for a plan; raises AssertionError where the plan is impossible.

        ``fail`` ends the step with :class:`StepFailedError`: ``before`` anything was done, or
        ``during`` it, with rubbish in every slot that was to be written.
        """
        if fail:
            self._in_doubt |= {
                *plan.finished_request_ids,
                *(n.request_id for n in plan.new_requests),
            }
        if fail == "before":
            raise StepFailedError
        self._copy(plan)
        self._apply(plan)
        contexts = [self.rows[name].num_computed for name in plan.request_ids]
        written: set[tuple[int, int]] = set()
        for i, name in enumerate(plan.request_ids):
            count, num_drafts = plan.num_scheduled_tokens[i], plan.num_draft_tokens[i]
            self._write(name, count, num_drafts, plan.samples[i], written)
        if fail == "during":
            self.device.update((slot, -self.rng.getrandbits(30)) for slot in written)
            raise StepFailedError
        self._in_doubt.clear()
        tokens: list[list[int]] = []
        drafts: list[list[int]] = []
        for i, name in enumerate(plan.request_ids):
            row = self.rows[name]
            row.num_computed += plan.num_scheduled_tokens[i]
            tokens.append(self._tokens(row, plan.num_draft_tokens[i]) if plan.samples[i] else [])
            num_proposed = self.rng.randint(0, self.max_drafts) if plan.samples[i] else 0
            row.drafts = [self._token() for _ in range(num_proposed)]
            drafts.append(row.drafts)
        for name in plan.request_ids if self.checks_content else ():
            self._check_content(name)
        return ModelRunnerOutput(tokens, drafts, [None] * len(tokens), sum(contexts))

    def _copy(self, plan: SchedulerOutput) -> None:
        """All out, then all in; within one direction the order must not matter."""
        size = self.scheduler.parts.kv_cache.block_size
        for pairs in (plan.copies_out, plan.copies_in):
            assert len({target for _, target in pairs}) == len(pairs), "a block is written twice"
        self.num_copies_out += len(plan.copies_out)
        self.num_copies_in += len(plan.copies_in)
        for pairs, source, target in (
            (plan.copies_out, self.device, self.host),
            (plan.copies_in, self.host, self.device),
        ):
            before = [
                {k: source[(block, k)] for k in range(size) if (block, k) in source}
                for block, _ in pairs
            ]
            for (_, block), content in zip(pairs, before, strict=True):
                for k in range(size):
                    target[(block, k)] = content.get(k, -1)

    def _apply(self, plan: SchedulerOutput) -> None:
        for name in plan.finished_request_ids:
            known = self.rows.pop(name, None)
            assert known or name in self._in_doubt, f"{name} was told finished but never started"
        for new in plan.new_requests:
            assert new.request_id not in self.rows, "a new request is here already"
            self.rows[new.request_id] = _Row(
                list(new.token_ids),
                hash(self.scheduler.requests[new.request_id].extra_keys),
                new.num_computed_tokens,
                list(new.block_ids),
            )
        for name, blocks in plan.new_block_ids.items():
            self.rows[name].blocks += blocks
        assert len(self.rows) <= self.scheduler.parts.max_num_seqs, "more rows than there are"
        assert len(set(plan.request_ids)) == len(plan.request_ids)
        for row in self.rows.values():
            assert len(set(row.blocks)) == len(row.blocks), "a block twice in one table"

    def _write(
        self,
        name: str,
        count: int,
        num_drafts: int,
        samples: bool,
        written: set[tuple[int, int]],
    ) -> None:
        """Compute the KV of the planned tokens, drafts included."""
        row = self.rows[name]
        known, start = len(row.token_ids), row.num_computed
        size = self.scheduler.parts.kv_cache.block_size
        assert count >= 1, "a request was scheduled without tokens"
        assert 0 <= num_drafts <= min(count - 1, len(row.drafts))
        end = start + count
        assert end - num_drafts <= known, "tokens that nobody knows were run"
        assert samples == (end - num_drafts == known)
        assert num_drafts == 0 or samples, "drafts without their last known token"
        assert end <= len(row.blocks) * size, "KV without a block"
        if not self.checks_content:
            return
        values = self._values(row, [*row.token_ids, *row.drafts][:end])
        for position in range(start, end):
            slot = row.blocks[position // size], position % size
            assert slot not in written, "two requests write to one slot"
            written.add(slot)
            self.device[slot] = values[position]

    @staticmethod
    def _values(row: _Row, token_ids: list[int]) -> list[int]:
        """What the slots of these tokens hold: each stands for all tokens up to it."""
        values, value = [], row.root
        for token in token_ids:
            value = hash((value, token))
            values.append(value)
        return values

    def _check_content(self, name: str) -> None:
        row = self.rows[name]
        size = self.scheduler.parts.kv_cache.block_size
        values = self._values(row, row.token_ids[: row.num_computed])
        for position, value in enumerate(values):
            slot = row.blocks[position // size], position % size
            assert self.device.get(slot) == value, f"{name} reads KV that is not its own"

    def _token(self) -> int:
        return EOS if self.rng.random() < self.eos_rate else self.rng.randrange(3, 100)

    def _tokens(self, row: _Row, num_drafts: int) -> list[int]:
        """Some of the drafts, and one token after them."""
        accepted = self.rng.randint(0, num_drafts)
        self.accepted += accepted
        tokens = [*row.drafts[:accepted], self._token()]
        row.token_ids += tokens
        row.num_computed = len(row.token_ids) - 1
        return tokens

    def step(
        self, fail: str | None = None, meanwhile: Callable[[], None] | None = None
    ) -> tuple[SchedulerOutput | None, list[RequestUpdate]]:
        """Plan, execute (and do something meanwhile), book, and check the books."""
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is None:
            return None, []
        self.num_steps += 1
        try:
            result = self.execute(plan, fail)
        except StepFailedError:
            self.scheduler.plan_failed(plan)
            self.scheduler.check_integrity()
            return None, []
        if meanwhile is not None:
            meanwhile()
        updates = self.scheduler.update_from_output(plan, result)
        self.scheduler.check_integrity()
        return plan, updates
