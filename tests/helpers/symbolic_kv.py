"""A runner that keeps, in place of KV, what each slot of memory would be the KV of.

Every slot of the device's pool, and of the host's, holds a digest of all tokens up to its own. A
step checks that each slot a request reads holds the digest of the request's own tokens: a block
that was copied wrongly, given to two, or published too early shows in the step that reads it.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from typing import Any

from workbench.core.request import Request
from workbench.core.step import ModelRunnerOutput, SchedulerOutput
from workbench.slots.executor import Ran
from workbench.slots.scheduler import Scheduler
from workbench.slots.step_plan import RequestUpdate


class InjectedError(Exception):
    """A step that broke half-way."""


def chain(before: bytes, token: int) -> bytes:
    """What the KV of a token depends on: the token and all before it."""
    return hashlib.blake2b(before + token.to_bytes(4, "big"), digest_size=8).digest()


def next_token(content: bytes) -> int:
    """The token that follows, a function of all before it."""
    return 3 + content[0] % 90


def expected_tokens(request: Request) -> list[int]:
    """The output of a request that runs alone, to its last token."""
    content = repr(request.extra_keys).encode()
    for token in request.prompt_token_ids:
        content = chain(content, token)
    tokens: list[int] = []
    while len(tokens) < request.sampling.max_tokens:
        tokens.append(next_token(content))
        content = chain(content, tokens[-1])
    return tokens


@dataclass
class _Row:
    tokens: list[int]
    contents: list[bytes]  # one more than tokens: the first stands before them
    blocks: list[int]
    num_computed: int


@dataclass
class SymbolicRunner:
    """Executes a scheduler's plans on symbols.

    Attributes
    ----------
    fault_rate
        Share of steps that raise :class:`InjectedError` after some part of them has run.
    """

    scheduler: Scheduler
    seed: int = 0
    fault_rate: float = 0.0
    device: dict[tuple[int, int], bytes] = field(default_factory=dict)
    host: dict[tuple[int, int], bytes] = field(default_factory=dict)
    rows: dict[str, _Row] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.block_size = self.scheduler.parts.kv_cache.block_size

    def step(self) -> tuple[SchedulerOutput | None, list[RequestUpdate]]:
        """Plan, execute, book, and check the books; a fault is told to the scheduler."""
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is None:
            return None, []
        try:
            result = self.execute(plan)
        except InjectedError:
            self.counts["faults"] = self.counts.get("faults", 0) + 1
            self.scheduler.plan_failed(plan)
            self.scheduler.check_integrity()
            return plan, []
        updates = self.scheduler.update_from_output(plan, result)
        self.scheduler.check_integrity()
        return plan, updates

    def submit(self, plan: SchedulerOutput) -> Ran:
        """Run one plan now."""
        return Ran(self.execute(plan))

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Run one plan."""
        fault = self.rng.choice(["start", "out", "in", "rows", "end"])
        fault = fault if self.rng.random() < self.fault_rate else ""
        self._raise_at("start", fault)
        self._copy(plan.copies_out, self.device, self.host)
        self._raise_at("out", fault)
        self._copy(plan.copies_in, self.host, self.device)
        self._raise_at("in", fault)
        self._apply(plan)
        self._raise_at("rows", fault)
        tokens = [
            self._run(self.rows[name], count, samples)
            for name, count, samples in zip(
                plan.request_ids, plan.num_scheduled_tokens, plan.samples, strict=True
            )
        ]
        for name in plan.request_ids:
            self._check(name)
        self._raise_at("end", fault)
        empty: list[Any] = [[] for _ in tokens]
        return ModelRunnerOutput(tokens, empty, [None] * len(tokens))

    def _raise_at(self, place: str, fault: str) -> None:
        if place == fault:
            raise InjectedError(place)

    def _copy(self, pairs: Any, source: dict[Any, bytes], target: dict[Any, bytes]) -> None:
        name = "out" if source is self.device else "in"
        self.counts[name] = self.counts.get(name, 0) + len(pairs)
        targets = [b for _, b in pairs]
        assert len(set(targets)) == len(targets), "a block is written twice by one plan"
        read = [
            [source.get((a, offset), b"nothing") for offset in range(self.block_size)]
            for a, _ in pairs
        ]
        for b, contents in zip(targets, read, strict=True):
            target.update({(b, offset): content for offset, content in enumerate(contents)})

    def _apply(self, plan: SchedulerOutput) -> None:
        for name in plan.finished_request_ids:
            self.rows.pop(name, None)  # a step that failed may not have come to make it
        for new in plan.new_requests:
            request = self.scheduler.requests[new.request_id]
            contents = [repr(request.extra_keys).encode()]
            for token in new.token_ids:
                contents.append(chain(contents[-1], token))
            self.rows[new.request_id] = _Row(
                list(new.token_ids), contents, list(new.block_ids), new.num_computed_tokens
            )
        for name, blocks in plan.new_block_ids.items():
            self.rows[name].blocks += blocks

    def _slot(self, row: _Row, position: int) -> tuple[int, int]:
        return row.blocks[position // self.block_size], position % self.block_size

    def _run(self, row: _Row, count: int, samples: bool) -> list[int]:
        for position in range(row.num_computed, row.num_computed + count):
            self.device[self._slot(row, position)] = row.contents[position + 1]
        row.num_computed += count
        assert samples == (row.num_computed == len(row.tokens))
        if not samples:
            return []
        token = next_token(row.contents[-1])
        row.tokens.append(token)
        row.contents.append(chain(row.contents[-1], token))
        return [token]

    def _check(self, name: str) -> None:
        row = self.rows[name]
        for position in range(row.num_computed):
            slot = self._slot(row, position)
            right = self.device.get(slot) == row.contents[position + 1]
            assert right, f"{name} reads somebody else's KV at position {position}, slot {slot}"
