"""Workloads of real text: choosing prompts, applying the chat template, tokenising."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from workbench.bench.workloads.base import Workload
from workbench.bench.workloads.checks import require_bool, require_optional_int
from workbench.bench.workloads.readers import Row
from workbench.core.errors import ConfigError
from workbench.core.workload import WorkloadRequest


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt before tokenisation; either ``messages`` or ``token_ids`` is filled.

    Attributes
    ----------
    row
        Where it was read, for errors.
    field
        The field that holds the prompt.
    messages
        A chat, as the tokenizer's template takes it.
    token_ids
        A prompt that comes as token ids.
    max_tokens
        Output tokens that the row asks for, if it does.
    arrival_s
        Seconds after the start.
    id_field
        The field that holds the id, for errors.
    """

    request_id: str
    category: str
    row: Row
    field: str
    messages: Sequence[dict[str, str]] = ()
    token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    arrival_s: float = 0.0
    id_field: str = "id"


def render_chat(
    tokenizer: Any, messages: Sequence[dict[str, str]], apply_chat_template: bool
) -> tuple[str, tuple[int, ...]]:
    """Return the text of a prompt and its token ids.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    messages
        ``[{"role": ..., "content": ...}, ...]``.
    apply_chat_template
        Apply the tokenizer's template and open the assistant's turn; otherwise the contents stand
        as they are, with empty lines between, and the tokenizer adds its own special tokens.

    Raises
    ------
    ConfigError
        If there is no tokenizer, or it has no chat template but one is asked for.
    """
    if tokenizer is None:
        raise ConfigError("a text workload needs the model's tokenizer, and there is none.")
    if not apply_chat_template:
        text = "\n\n".join(message["content"] for message in messages)
        return text, tuple(tokenizer.encode(text))
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the tokenizer has no chat template, so this is probably not a chat model; "
            "set workload.apply_chat_template=false to send the plain text."
        )
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    # The template writes the special tokens itself; a second BOS would change the model's answer.
    return text, tuple(tokenizer.encode(text, add_special_tokens=False))


@dataclass(frozen=True, kw_only=True)
class PromptWorkload(Workload):
    """What all text workloads share: which prompts, in which order, and how they end.

    Parameters
    ----------
    num_requests
        Take this many prompts; ``None`` takes all.
    max_tokens
        Output tokens of every request; ``None`` keeps what each row asks for.
    shuffle
        Shuffle the prompts by the seed before taking ``num_requests``; otherwise file order.
    ignore_eos
        Generate ``max_tokens`` tokens even when the model has ended its answer. Off by default:
        what a model writes after its end is often a loop, which flatters speculation.
    apply_chat_template
        Send chats through the tokenizer's template; off sends the plain text.
    """

    num_requests: int | None = None
    max_tokens: int | None = None
    shuffle: bool = False
    ignore_eos: bool = False
    apply_chat_template: bool = True

    _truncation_keeps: ClassVar[str] = "end"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_optional_int("num_requests", self.num_requests, 1)
        require_optional_int("max_tokens", self.max_tokens, 1)
        for key in ("shuffle", "ignore_eos", "apply_chat_template"):
            require_bool(key, getattr(self, key))

    @abstractmethod
    def _prompts(self) -> Iterable[Prompt]:
        """Yield all prompts in file order, in order of arrival."""

    def _build(self, seed: int, tokenizer: Any, vocab_size: int) -> Iterator[WorkloadRequest]:
        prompts = list(self._prompts())
        _check_ids(prompts)
        # Shuffling moves the prompts, not the times at which requests arrive.
        arrivals = [prompt.arrival_s for prompt in prompts]
        if self.shuffle:
            Random(seed).shuffle(prompts)
        num_taken = len(prompts) if self.num_requests is None else self.num_requests
        if num_taken > len(prompts):
            raise ConfigError(
                f"workload {self.name} has {len(prompts)} prompts, but num_requests is "
                f"{num_taken}; valid: null (all), or 1..{len(prompts)}. Prompts are never "
                "repeated, since a prefix cache would serve the second copy for nothing."
            )
        self._notes["num_prompts_available"] = len(prompts)
        for prompt, arrival_s in zip(prompts[:num_taken], arrivals, strict=False):
            yield self._request(prompt, arrival_s, tokenizer, vocab_size)

    def _request(
        self, prompt: Prompt, arrival_s: float, tokenizer: Any, vocab_size: int
    ) -> WorkloadRequest:
        max_tokens = self.max_tokens if self.max_tokens is not None else prompt.max_tokens
        if max_tokens is None:
            raise prompt.row.error(
                "max_tokens", "is missing", "a whole number here, or workload.max_tokens=N for all"
            )
        text, token_ids = None, prompt.token_ids
        if not token_ids:
            text, token_ids = render_chat(tokenizer, prompt.messages, self.apply_chat_template)
        if not token_ids:
            raise prompt.row.error(prompt.field, "gives no tokens", "text that does")
        if max(token_ids) >= vocab_size:
            raise prompt.row.error(
                prompt.field,
                f"holds token id {max(token_ids)}",
                f"ids below the model's vocabulary size {vocab_size}, which the model's own "
                "tokenizer gives",
            )
        return WorkloadRequest(
            request_id=prompt.request_id,
            prompt_token_ids=token_ids,
            max_tokens=max_tokens,
            arrival_s=arrival_s,
            category=prompt.category,
            prompt_text=text,
            ignore_eos=self.ignore_eos,
        )


def _check_ids(prompts: Iterable[Prompt]) -> None:
    """Refuse two prompts with one id; results could not be told apart."""
    lines: dict[str, int] = {}
    for prompt in prompts:
        if prompt.request_id in lines:
            raise prompt.row.error(
                prompt.id_field,
                f"gives {prompt.request_id!r}, as line {lines[prompt.request_id]} does",
                "an id that no other row has",
            )
        lines[prompt.request_id] = prompt.row.line
