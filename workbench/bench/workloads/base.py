"""What every workload shares: the contract, the digest, and the rule for overlong prompts."""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike, fspath
from typing import Any, ClassVar

import numpy as np

from workbench.bench.workloads.checks import (
    require_choice,
    require_int,
    require_optional_int,
)
from workbench.core.errors import ConfigError
from workbench.core.workload import WorkloadRequest

OVERLONG = ("keep", "error", "truncate", "drop")


@dataclass(frozen=True, kw_only=True)
class Workload(ABC):
    """A list of requests that depends on nothing but the settings, the data and the seed.

    A subclass is a frozen dataclass whose fields are its settings, and yields its requests from
    :meth:`_build`. Settings are checked when the workload is made; what a build clipped, dropped
    or clamped is told by :meth:`describe` afterwards.

    Parameters
    ----------
    overlong
        What to do with a request whose prompt and ``max_tokens`` together exceed the context:
        ``keep`` it (the backend refuses it, and the run shows that), ``error``, ``truncate`` the
        prompt, or ``drop`` the request.
    """

    overlong: str = "keep"
    _notes: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    _name: ClassVar[str]
    # Which end of a prompt survives truncation. Synthetic prompts and traces keep the start, where
    # shared prefixes lie; text keeps the end, where the chat template opens the answer.
    _truncation_keeps: ClassVar[str] = "start"

    def __post_init__(self) -> None:
        require_choice("overlong", self.overlong, OVERLONG)

    @property
    def name(self) -> str:
        """Short name for tables and records."""
        return self._name

    @property
    def declared_hit_rate(self) -> float | None:
        """Share of the prompt tokens that a prefix cache must have found; None for no promise."""
        return None

    @abstractmethod
    def _build(self, seed: int, tokenizer: Any, vocab_size: int) -> Iterable[WorkloadRequest]:
        """Yield the requests in order of arrival; put what the user should know in ``_notes``."""

    def requests(
        self,
        seed: int,
        tokenizer: Any = None,
        vocab_size: int = 0,
        max_model_len: int | None = None,
    ) -> list[WorkloadRequest]:
        """Build the requests.

        Parameters
        ----------
        seed
            The same seed gives the same requests, on every machine.
        tokenizer
            The model's tokenizer (a transformers one); synthetic workloads do without.
        vocab_size
            Number of token ids that the model accepts; every id is below it.
        max_model_len
            Longest context of the model in tokens; ``None`` if unknown, and then no request is
            looked at as overlong.

        Returns
        -------
        list of WorkloadRequest
            In order of arrival; never empty.

        Raises
        ------
        ConfigError
            If a setting, the data or the tokenizer does not fit (a ``ValueError``).
        """
        require_int("seed", seed, 0)
        require_int("vocab_size", vocab_size, 1)
        require_optional_int("max_model_len", max_model_len, 1)
        self._notes.clear()
        built = self._build(seed, tokenizer, vocab_size)
        kept = list(built if max_model_len is None else self._fit(built, max_model_len))
        if not kept:
            raise ConfigError(
                f"workload {self.name}: no request is left; every prompt exceeds the context of "
                f"{max_model_len} tokens. Use shorter prompts or overlong=truncate."
            )
        self._notes.update(_totals(kept, seed))
        return kept

    def _fit(
        self, built: Iterable[WorkloadRequest], max_model_len: int
    ) -> Iterator[WorkloadRequest]:
        """Apply ``overlong`` to the requests that do not fit the context, and count them."""
        num_overlong = num_cut_tokens = 0
        for request in built:
            num_prompt = len(request.prompt_token_ids)
            if num_prompt + request.max_tokens <= max_model_len:
                yield request
                continue
            num_overlong += 1
            if self.overlong == "keep":
                yield request
            elif self.overlong == "truncate":
                num_kept = max_model_len - request.max_tokens
                if num_kept < 1:
                    raise ConfigError(
                        f"request {request.request_id} asks for {request.max_tokens} tokens, "
                        f"which leaves no room for a prompt in the context of {max_model_len}. "
                        "Ask for fewer output tokens."
                    )
                num_cut_tokens += num_prompt - num_kept
                yield self._truncated(request, num_kept)
            elif self.overlong == "error":
                raise ConfigError(
                    f"request {request.request_id} has a prompt of {num_prompt} tokens and asks "
                    f"for {request.max_tokens}; the context holds {max_model_len}. "
                    f"overlong=keep, truncate or drop says what to do with such requests."
                )
        self._notes["max_model_len"] = max_model_len
        self._notes["num_overlong"] = num_overlong
        if self.overlong == "truncate":
            self._notes["num_truncated_tokens"] = num_cut_tokens

    def _truncated(self, request: WorkloadRequest, num_kept: int) -> WorkloadRequest:
        """Return the request with ``num_kept`` tokens of its prompt, and no text."""
        ids = request.prompt_token_ids
        ids = ids[:num_kept] if self._truncation_keeps == "start" else ids[-num_kept:]
        return replace(request, prompt_token_ids=ids, prompt_text=None)

    @staticmethod
    def digest(requests: Sequence[WorkloadRequest]) -> str:
        """Return a SHA-256 over what the backends are asked to do, alike on every machine.

        It covers prompt ids, ``max_tokens``, ``ignore_eos``, arrival times and which request waits
        for which, in order; ids and categories of requests do not count. Two runs compare only if
        their digests are equal.
        """
        digest = hashlib.sha256(b"workload 1\n")
        places = {request.request_id: place for place, request in enumerate(requests)}
        for request in requests:
            ids = np.asarray(request.prompt_token_ids, dtype="<i8")
            head = (ids.size, request.max_tokens, request.arrival_s, request.ignore_eos)
            digest.update(struct.pack("<qqd?", *head))
            digest.update(ids.tobytes())
            if request.after is not None:
                digest.update(struct.pack("<5sq", b"after", places[request.after]))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what can go into a record as JSON: the settings, and the last build.

        Returns
        -------
        dict
            ``name``; ``declared_hit_rate``, where there is one; ``config``, the settings;
            ``built``, what the last call of :meth:`requests` made of them (empty before the
            first): number of requests, tokens, and what was clamped, clipped, left out or
            overlong.
        """
        config = {item.name: _plain(getattr(self, item.name)) for item in fields(self) if item.init}
        rate = self.declared_hit_rate
        declared = {} if rate is None else {"declared_hit_rate": rate}
        return {"name": self.name, **declared, "config": config, "built": dict(self._notes)}


def _plain(value: Any) -> Any:
    """Return a setting as JSON can hold it."""
    if isinstance(value, tuple):
        return list(value)
    return fspath(value) if isinstance(value, PathLike) else value


def _totals(requests: Sequence[WorkloadRequest], seed: int) -> dict[str, Any]:
    prompts = [len(request.prompt_token_ids) for request in requests]
    outputs = [request.max_tokens for request in requests]
    return {
        "seed": seed,
        "num_requests": len(requests),
        "prompt_tokens": {"total": sum(prompts), "min": min(prompts), "max": max(prompts)},
        "max_tokens": {"total": sum(outputs), "min": min(outputs), "max": max(outputs)},
    }
