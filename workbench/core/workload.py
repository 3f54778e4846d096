"""What a workload hands to a backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request of a workload, as token ids, so that every backend counts the same tokens.

    Attributes
    ----------
    request_id
        Unique within the workload.
    prompt_token_ids
        The prompt, already tokenised.
    max_tokens
        Output tokens asked for; with ``ignore_eos`` exactly this many are generated.
    arrival_s
        Seconds after the start at which the request arrives (open loads only).
    category
        Task family, for reports by category.
    prompt_text
        The text behind the ids, where there is one.
    ignore_eos
        Generate ``max_tokens`` tokens whatever the model says.
    prefix_group
        Requests with the same group share a prefix.
    after
        Id of the request whose end this one waits for, as the next turn of a conversation does.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    arrival_s: float = 0.0
    category: str = ""
    prompt_text: str | None = None
    ignore_eos: bool = True
    prefix_group: str | None = None
    after: str | None = None
