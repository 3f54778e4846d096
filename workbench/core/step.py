"""What one engine step is made of: the plan, the batch, the result, the record.

What is built anew at every step is not frozen, since building a frozen dataclass costs three times
as much; it is not to be changed all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from workbench.core.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class NewRequest:
    """What the runner must know of a request once; later steps send only what changed.

    Attributes
    ----------
    token_ids
        Every token known so far (a re-added request brings its output along).
    num_computed_tokens
        Tokens whose KV is already in the pool (a prefix hit).
    block_ids
        The request's blocks so far, in order.
    seed
        Resolved seed of its draws.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: list[int]
    sampling: SamplingParams
    seed: int


@dataclass(slots=True)
class SchedulerOutput:
    """The plan of one step. Plain data, so that an executor may send it elsewhere.

    Attributes
    ----------
    request_ids, num_scheduled_tokens, num_draft_tokens
        The batch in order: for each request how many tokens run in this step, and how many of
        those (the last ones) are drafts to be verified.
    samples
        For each request, whether this step reaches its last known token, so that it yields one.
    new_requests
        Requests that the runner has not seen (or that were re-added after pre-emption).
    new_block_ids
        Blocks appended to requests seen before.
    finished_request_ids
        Requests whose row can be freed before this step runs.
    num_idle_rows
        Rows that a finished member of a static batch holds without using (padding waste).
    copies_out, copies_in
        Blocks of KV to copy before this step runs: (device block, host block) first, then
        (host block, device block).
    """

    step: int
    request_ids: list[str]
    num_scheduled_tokens: list[int]
    num_draft_tokens: list[int]
    samples: list[bool]
    new_requests: list[NewRequest]
    new_block_ids: dict[str, list[int]]
    finished_request_ids: list[str]
    num_cached_tokens: int = 0
    num_idle_rows: int = 0
    copies_out: Sequence[tuple[int, int]] = ()
    copies_in: Sequence[tuple[int, int]] = ()

    @property
    def total_num_scheduled_tokens(self) -> int:
        """Tokens that this step runs."""
        return sum(self.num_scheduled_tokens)


@dataclass(slots=True)
class ForwardBatch:
    """Inputs of one forward pass: token-major flat tensors on the device.

    ``T`` tokens of ``B`` requests, ``P`` block-table columns, ``L`` rows of logits.

    Attributes
    ----------
    input_ids : Tensor[T] int64
    positions : Tensor[T] int64
    query_start_loc : Tensor[B + 1] int32
        Request ``b`` owns tokens ``query_start_loc[b]:query_start_loc[b + 1]``.
    seq_lens : Tensor[B] int32
        Context length after this step, drafts included.
    block_table : Tensor[B, P] int32
    slot_mapping : Tensor[T] int64
        Where each token's KV is written: ``block * block_size + offset``.
    logits_indices : Tensor[L] int64
        Tokens whose hidden state becomes logits.
    rows : Tensor[B] int64
        Each request's row in the request table.
    query_lens_host, seq_lens_host : list[int]
        Host copies of the lengths, known without asking the device.
    block_size : int
        Tokens a block.
    host_rows : tuple[ndarray[R, P] int32, list[int]] or None
        The host's copy of all block tables, and each request's row of it; see
        :meth:`host_block_table`.
    extras : dict[type, Any]
        What a technique adds, keyed by its own dataclass.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    logits_indices: torch.Tensor
    rows: torch.Tensor
    query_lens_host: list[int]
    seq_lens_host: list[int]
    block_size: int
    host_rows: tuple[np.ndarray, list[int]] | None = None
    extras: dict[type, Any] = field(default_factory=dict)

    def host_block_table(self) -> np.ndarray:
        """The block table on the host, ``[B, P]``, made when asked for; entries past a request's
        end may be anything. Waits for the device only where nobody keeps a copy."""
        if self.host_rows is None:
            return self.block_table.cpu().numpy()
        table, rows = self.host_rows
        return table[rows]

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch, ``T``."""
        return self.input_ids.shape[0]

    @property
    def num_requests(self) -> int:
        """Requests in the batch, ``B``."""
        return len(self.query_lens_host)

    @property
    def max_query_len(self) -> int:
        """Longest query of the batch."""
        return max(self.query_lens_host)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one output position.

    They are those of the raw model distribution (before temperature, penalties and truncation).
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class ModelRunnerOutput:
    """What one step produced, in the order of ``SchedulerOutput.request_ids``.

    Attributes
    ----------
    token_ids
        New tokens by request: none for an unfinished prompt, one for a plain step, up to
        ``1 + num_draft_tokens`` for a verified draft.
    draft_token_ids
        Drafts for the next step by request (empty where there are none).
    logprobs
        By request and new token, where asked for.
    num_context_tokens
        Tokens of KV that the step's requests had before it, summed.
    num_draft_failures
        Requests that go on without drafts since the drafter failed for them in this step.
    timings_us, starts_s
        By part of the step: how long the host was at it, and when it began (``perf_counter``).
    """

    token_ids: list[list[int]]
    draft_token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None]
    num_context_tokens: int = 0
    num_padded_tokens: int = 0
    graph_mode: str = "eager"
    num_draft_failures: int = 0
    timings_us: dict[str, float] = field(default_factory=dict)
    starts_s: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class StepRecord:
    """One row a step: counts first, times beside them.

    Attributes
    ----------
    num_single_tokens
        Requests that run one token.
    num_context_tokens
        Tokens of KV that the step's requests had before it, summed.
    host_us
        Everything but the model: scheduling, input preparation, drafting, updating.
    device_us
        The device's time as the host sees it: from the launch of the step, or from the tokens of
        the step before if those came later, until the step's tokens are on the host. A step that
        yields no token is not waited for: what the device still has to do of it counts to the next.
    num_draft_failures
        Requests that go on without drafts since the drafter failed for them after this step.
    parts_us, starts_s
        By part of the step: how long the host was at it, and when it began (``perf_counter``).
    device_start_s
        Where ``device_us`` begins (``perf_counter``).
    """

    step: int
    num_requests: int
    num_scheduled_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_padded_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_output_tokens: int
    num_idle_rows: int
    num_single_tokens: int
    num_context_tokens: int
    graph_mode: str
    host_us: float
    device_us: float
    num_draft_failures: int = 0
    parts_us: dict[str, float] = field(default_factory=dict)
    starts_s: dict[str, float] = field(default_factory=dict)
    device_start_s: float = 0.0
