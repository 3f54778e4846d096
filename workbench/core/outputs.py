"""What a user gets back."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.core.request import FinishReason
from workbench.core.step import TokenLogprobs


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    token_ids: list[int]
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request's outputs.

    From ``Engine.generate``: the whole of it. From ``Engine.step``: what this step added
    (``new_token_ids``), with the completion so far.

    Attributes
    ----------
    error
        Why the request could not be served; its outputs are empty then.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    new_token_ids: tuple[int, ...] = ()
    num_cached_tokens: int = 0
    error: str | None = None

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.outputs[0].text if self.outputs else ""

    @property
    def token_ids(self) -> list[int]:
        """Ids of the first completion."""
        return self.outputs[0].token_ids if self.outputs else []
