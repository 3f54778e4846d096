"""A request and its progress."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from workbench.core.sampling import SamplingParams


class RequestStatus(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to be generated. Mutable, owned by the scheduler.

    Prefill, chunks, prefix hits, decode and verification are the same arithmetic:
    ``num_computed_tokens`` catches up with ``num_tokens + len(draft_token_ids)``.

    Attributes
    ----------
    num_tokens
        Known tokens: prompt and accepted output, drafts apart.
    num_computed_tokens
        Tokens whose KV is written and valid.
    num_cached_tokens
        Of those, tokens that came from a prefix cache when the request first started.
    first_step
        The step in which it first started, -1 before; a step that failed does not count.
    stop_ids
        Ids that end the output: the request's own and, unless ignored, the model's.
    draft_token_ids
        Proposed continuation that the next step will verify; not part of ``num_tokens``.
    extra_keys
        What beside token ids a cached prefix depends on (adapter id, image hash, tenant salt).
    prefix_key
        What the prefix cache computed of the tokens so far, output too once it is of use; nobody
        else reads it.
    num_matched_tokens
        Tokens found in the prefix cache when a policy last asked, for those that order by it; -1
        where none has.
    arrival_index
        Place in the order of arrival, kept through pre-emptions; -1 before the request is queued.
    is_overdue
        It waited behind later ones, or was pre-empted, as often as the policy allows: from now on
        it goes before all that are not, and is pre-empted after them.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    arrival_s: float = 0.0
    priority: int = 0
    extra_keys: tuple[str, ...] = ()
    output_token_ids: list[int] = field(default_factory=list)
    draft_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    first_step: int = -1
    num_preemptions: int = 0
    prefix_key: Any = None
    num_matched_tokens: int = -1
    arrival_index: int = -1
    is_overdue: bool = False
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    max_total_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.num_tokens = self.num_prompt_tokens + len(self.output_token_ids)
        self.max_total_tokens = self.num_prompt_tokens + self.sampling.max_tokens
        eos = frozenset() if self.sampling.ignore_eos else self.eos_token_ids
        self.stop_ids = eos | frozenset(self.sampling.stop_token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output ids, as a new list."""
        return self.prompt_token_ids + self.output_token_ids

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be generated."""
        return self.status is RequestStatus.FINISHED
