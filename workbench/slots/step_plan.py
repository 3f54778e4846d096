"""A step under construction, and what of it lasts while nothing changes."""

from __future__ import annotations

from dataclasses import dataclass, field

from workbench.core.request import Request
from workbench.core.step import NewRequest, TokenLogprobs


@dataclass(slots=True)
class RequestUpdate:
    """What a step did to one request."""

    request: Request
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None


@dataclass(slots=True)
class StepPlan:
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
class SteadyPlan:
    """The plan of steps in which every running request runs one token and nothing else changes.

    ``growth`` holds, by step number, the requests whose last block is full by then: a steady step
    costs the requests that need a block, not the requests that run.
    """

    request_ids: list[str]
    requests: list[Request]
    updates: list[RequestUpdate]
    ones: list[int]
    zeros: list[int]
    samples: list[bool]
    growth: dict[int, list[Request]]
