"""From token ids to what the user sees: text, stop strings, completions of one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from workbench.core.outputs import CompletionOutput, RequestOutput
from workbench.core.request import FinishReason, Request
from workbench.core.step import TokenLogprobs


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer (Transformers' do)."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool = ...) -> str: ...


@dataclass(slots=True)
class StopStringScan:
    """Looks for stop strings in the text of a growing output.

    Only the tail that new tokens may have changed is decoded again: a window of tokens long
    enough to hold the longest stop string and a split character.
    """

    stops: tuple[str, ...]
    tokenizer: Tokenizer
    window: int = field(init=False)
    special: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        # A token decodes to at least one byte, so a string of n characters spans at most 4n tokens;
        # 8 more cover characters that are split over tokens on either side.
        self.window = 4 * max(len(s) for s in self.stops) + 8
        # Special tokens are no part of the text, however many stand inside a string.
        self.special = frozenset(getattr(self.tokenizer, "all_special_ids", ()))

    def find(self, token_ids: list[int], num_new: int) -> tuple[int, str] | None:
        """How many tokens to keep and the string that was met, or None.

        ``token_ids`` is the whole output, of which the last ``num_new`` were not looked at yet.
        """
        for end in range(len(token_ids) - num_new + 1, len(token_ids) + 1):
            text = self.tokenizer.decode(self._tail(token_ids, end), skip_special_tokens=True)
            met = [stop for stop in self.stops if stop in text]
            if met:
                return end, min(met, key=text.find)
        return None

    def _tail(self, token_ids: list[int], end: int) -> list[int]:
        """The last tokens before ``end`` that are text, as many as the window holds."""
        tail: list[int] = []
        while end and len(tail) < self.window:
            end -= 1
            if token_ids[end] not in self.special:
                tail.append(token_ids[end])
        return tail[::-1]


@dataclass(slots=True)
class RequestState:
    """One user request on its way: its completions and what was told of them.

    Attributes
    ----------
    child_ids
        Engine request by completion; one unless ``n`` is over 1.
    """

    request_id: str
    prompt_token_ids: list[int]
    child_ids: list[str]
    completions: list[CompletionOutput]
    scan: StopStringScan | None = None
    num_cached_tokens: int = 0
    num_ended: int = 0
    told: RequestOutput | None = None

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return self.num_ended == len(self.completions)

    def look(
        self, index: int, new_ids: list[int], logprobs: list[TokenLogprobs] | None
    ) -> tuple[int, str] | None:
        """Look at a completion's new tokens, which it holds already; returns where a stop string
        ends it, if one does."""
        completion = self.completions[index]
        if logprobs:
            completion.logprobs = (completion.logprobs or []) + logprobs[: len(new_ids)]
        if self.scan is None:
            return None
        return self.scan.find(completion.token_ids, len(new_ids))

    def end(
        self,
        index: int,
        request: Request,
        tokenizer: Tokenizer | None,
        stopped: tuple[int, str] | None = None,
    ) -> None:
        """Close a completion: cut at a stop string, decode its text, say why it ended."""
        completion = self.completions[index]
        self.num_ended += 1
        completion.finish_reason = request.finish_reason
        self.num_cached_tokens = request.num_cached_tokens
        if stopped is not None:
            completion.finish_reason = FinishReason.STOP
            completion.stop_reason = stopped[1]
            del completion.token_ids[stopped[0] :]
            if completion.logprobs:
                del completion.logprobs[stopped[0] :]
        elif completion.finish_reason is FinishReason.STOP:
            completion.stop_reason = completion.token_ids[-1]
        if tokenizer is not None:
            completion.text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            if stopped is not None and (cut := completion.text.find(stopped[1])) >= 0:
                completion.text = completion.text[:cut]

    def output(self, new_token_ids: list[int]) -> RequestOutput:
        """What the user gets: one object a request, brought up to date at every step."""
        told = self.told
        if told is None:
            self.told = told = RequestOutput(
                request_id=self.request_id,
                prompt_token_ids=self.prompt_token_ids,
                outputs=self.completions,
            )
        told.new_token_ids = tuple(new_token_ids)
        if self.num_ended:
            told.finished = self.finished
            told.num_cached_tokens = self.num_cached_tokens
        return told
