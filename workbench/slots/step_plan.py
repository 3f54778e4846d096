"""What runs: a step under construction, and the requests that take part in every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from workbench.core.request import FinishReason, Request, RequestStatus
from workbench.core.step import ModelRunnerOutput, NewRequest, TokenLogprobs


@dataclass(slots=True)
class RequestUpdate:
    """What a step did to one request."""

    request: Request
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None


#: Stands for a token whose step is still running.
UNKNOWN_TOKEN = -1


@dataclass(slots=True)
class AssumedStep:
    """A step that was booked before its tokens were known.

    Attributes
    ----------
    sampled
        Requests that get a token, each with its place in the plan.
    """

    sampled: list[tuple[int, Request]]


@dataclass(slots=True)
class StepPlan:
    """A step under construction: what runs in it beside the requests of :class:`Decodes`."""

    budget: int
    requests: list[Request] = field(default_factory=list)
    num_scheduled: list[int] = field(default_factory=list)
    num_drafts: list[int] = field(default_factory=list)
    new_requests: list[NewRequest] = field(default_factory=list)
    new_block_ids: dict[str, list[int]] = field(default_factory=dict)
    num_cached_tokens: int = 0

    def add(self, request: Request, num_tokens: int, num_drafts: int) -> None:
        """Run tokens of a request, the last ``num_drafts`` of which are drafts."""
        self.budget -= num_tokens
        self.requests.append(request)
        self.num_scheduled.append(num_tokens)
        self.num_drafts.append(num_drafts)

    def start(self, request: Request, num_tokens: int, block_ids: list[int]) -> None:
        """Run a request's first ``num_tokens`` tokens that are not computed, in these blocks."""
        self.new_requests.append(
            NewRequest(
                request_id=request.request_id,
                token_ids=request.token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                num_computed_tokens=request.num_computed_tokens,
                block_ids=block_ids,
                sampling=request.sampling,
                seed=request.sampling.seed or 0,
            )
        )
        self.add(request, num_tokens, 0)

    def drop(self, request: Request) -> None:
        """Undo :meth:`add`, if the request was added at all."""
        if request in self.requests:
            index = self.requests.index(request)
            self.budget += self.num_scheduled[index]
            for column in (self.requests, self.num_scheduled, self.num_drafts):
                del column[index]

    def samples(self) -> list[bool]:
        """For each request, whether the step reaches its last known token."""
        return [
            r.num_computed_tokens + tokens - drafts >= r.num_tokens
            for r, tokens, drafts in zip(
                self.requests, self.num_scheduled, self.num_drafts, strict=True
            )
        ]


class DecodeColumns(NamedTuple):
    """A plan's columns for the members of :class:`Decodes`; nobody changes these lists."""

    request_ids: list[str]
    updates: list[RequestUpdate]
    ones: list[int]
    zeros: list[int]
    samples: list[bool]


class Decodes:
    """Running requests with one token outstanding and no drafts, in the order they came to it.

    A step costs what changes: a member is looked at only when its last block is full, and columns
    are made anew only when somebody came or went. While nobody does, plans carry the very lists of
    the plan before, which is how the runner knows that it may go on as it was.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._updates: dict[str, RequestUpdate] = {}
        self._full_at: dict[str, int] = {}  # the step that needs a block, by id
        self._members_by_step: dict[int, dict[str, Request]] = {}
        self._columns: DecodeColumns | None = None

    def add(self, request: Request, step: int) -> None:
        """Take in a request whose next token runs in ``step``."""
        request_id = request.request_id
        assert request_id not in self._updates, "a request decodes twice"
        self._updates[request_id] = RequestUpdate(request, [], None)
        self._columns = None
        full_at = step + -request.num_computed_tokens % self._block_size
        self._full_at[request_id] = full_at
        self._members_by_step.setdefault(full_at, {})[request_id] = request

    def discard(self, request_id: str) -> bool:
        """Let a request go; False if it is not here."""
        if self._updates.pop(request_id, None) is None:
            return False
        self._columns = None
        step = self._full_at.pop(request_id)
        members = self._members_by_step.get(step)
        if members is not None:
            members.pop(request_id, None)
            if not members:
                del self._members_by_step[step]
        return True

    def take_full(self, step: int) -> list[Request]:
        """Members whose last block is full before ``step``; the caller gets each one a block."""
        members = self._members_by_step.pop(step, None)
        if members is None:
            return []
        requests = [*members.values()]
        after = step + self._block_size
        self._full_at.update(dict.fromkeys(members, after))
        self._members_by_step.setdefault(after, members).update(members)
        return requests

    def columns(self) -> DecodeColumns:
        """The plan's columns of all members."""
        if self._columns is None:
            size = len(self._updates)
            self._columns = DecodeColumns(
                request_ids=list(self._updates),
                updates=list(self._updates.values()),
                ones=[1] * size,
                zeros=[0] * size,
                samples=[True] * size,
            )
        return self._columns

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._updates

    def __len__(self) -> int:
        return len(self._updates)

    def check_integrity(self) -> None:
        """Raise AssertionError where the books contradict each other."""
        for request_id, update in self._updates.items():
            request = update.request
            assert request.request_id == request_id, "filed under another id"
            assert request.num_tokens - request.num_computed_tokens == 1, "more than one to run"
            assert not request.draft_token_ids, "drafts where one token runs"
        noted = {
            (request_id, step)
            for step, members in self._members_by_step.items()
            for request_id in members
        }
        assert noted == set(self._full_at.items()), "a full block is looked for in a wrong step"
        assert self._full_at.keys() == self._updates.keys(), "a block's end is not looked for"


class Running:
    """The running requests, in two parts: those that decode, and those with more to run."""

    def __init__(self, block_size: int) -> None:
        self.requests: dict[str, Request] = {}
        self.decodes = Decodes(block_size)
        #: Prompts, pieces of prompts, and requests with drafts.
        self.others: dict[str, Request] = {}
        self.num_kv_tokens = 0  # computed, summed by request
        self.num_possible_tokens = 0  # what they may come to, together

    def start(self, request: Request) -> None:
        """Take in a request that was waiting."""
        request.status = RequestStatus.RUNNING
        self.requests[request.request_id] = self.others[request.request_id] = request
        self.num_kv_tokens += request.num_computed_tokens
        self.num_possible_tokens += request.max_total_tokens

    def stop(self, request: Request) -> None:
        """Let a request go."""
        request_id = request.request_id
        del self.requests[request_id]
        if not self.decodes.discard(request_id):
            del self.others[request_id]
        self.num_kv_tokens -= request.num_computed_tokens
        self.num_possible_tokens -= request.max_total_tokens
        request.draft_token_ids = []

    def may_publish(self) -> bool:
        """Whether the KV of any may become of use to others before it ends: a prompt's, or pieces
        of what a pre-empted request computes again."""
        return any(
            r.num_computed_tokens < r.num_prompt_tokens or r.num_tokens - r.num_computed_tokens > 1
            for r in self.others.values()
        )

    def book_decodes(
        self, planned: list[RequestUpdate], result: ModelRunnerOutput
    ) -> tuple[list[RequestUpdate], list[tuple[str, FinishReason]]]:
        """Book one token for each of a step's first requests, apart from those that were aborted
        while it ran.

        Returns their updates, which are the same objects while a request decodes, and who is done.
        """
        running = RequestStatus.RUNNING
        ended = []
        num_gone = 0
        for update, tokens, logprobs in zip(
            planned, result.token_ids, result.logprobs, strict=False
        ):
            request = update.request
            if request.status is not running:
                num_gone += 1
                continue
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
        self.num_kv_tokens += len(planned) - num_gone
        if num_gone:
            return [u for u in planned if u.request.status is running], ended
        return planned, ended

    def take_drafts(self, request: Request, drafts: list[int], step: int) -> None:
        """Keep the drafts that ``step``, the next one, may verify; a request without decodes."""
        request_id = request.request_id
        request.draft_token_ids = drafts[: request.max_total_tokens - request.num_tokens - 1]
        if not request.draft_token_ids:
            if self.others.pop(request_id, None) is not None:
                self.decodes.add(request, step)
        elif self.decodes.discard(request_id):
            self.others[request_id] = request

    def check_integrity(self) -> None:
        """Raise AssertionError where the books contradict each other."""
        decoding = {request_id for request_id in self.requests if request_id in self.decodes}
        assert len(decoding) == len(self.decodes), "a request decodes that does not run"
        assert self.requests.keys() - decoding == self.others.keys(), "a running request is lost"
        for request in self.requests.values():
            assert request.status is RequestStatus.RUNNING, "runs, but is not marked so"
            assert request.num_computed_tokens < request.num_tokens, "nothing is left to run"
        computed = sum(request.num_computed_tokens for request in self.requests.values())
        assert computed == self.num_kv_tokens, "KV tokens miscounted"
        possible = sum(request.max_total_tokens for request in self.requests.values())
        assert possible == self.num_possible_tokens, "possible tokens miscounted"
        self.decodes.check_integrity()


def append_tokens(request: Request, tokens: list[int]) -> tuple[int, FinishReason | None]:
    """Append tokens up to the first that ends the request; how many, and why it ended."""
    for kept, token in enumerate(tokens, start=1):
        request.output_token_ids.append(token)
        request.num_tokens += 1
        if token in request.stop_ids:
            return kept, FinishReason.STOP
        if request.num_tokens >= request.max_total_tokens:
            return kept, FinishReason.LENGTH
    return len(tokens), None
