"""Recorded traffic: real arrival times and lengths, with token ids made up to match."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from workbench.bench.workloads.base import Workload
from workbench.bench.workloads.checks import require_optional_int, require_positive
from workbench.bench.workloads.readers import Row, find_file, read_csv, read_jsonl
from workbench.bench.workloads.sharing import infinite_cache_hits
from workbench.core.errors import ConfigError
from workbench.core.workload import WorkloadRequest

MOONCAKE_BLOCK_TOKENS = 512


class TokenIdSource:
    """Pseudo-random token ids by key: the same seed and key give the same ids on every machine.

    Parameters
    ----------
    seed
        Different seeds share no content.
    vocab_size
        Ids lie in ``0..vocab_size - 1``.
    """

    def __init__(self, seed: int, vocab_size: int) -> None:
        self._seed = seed
        # One int object per id: a long trace holds each id thousands of times, and the objects
        # would take several times the memory of the tuples.
        self._ids = np.array(range(vocab_size), dtype=object)

    def draw(self, key: str, length: int) -> list[int]:
        """Return ``length`` ids; a shorter draw of a key is the start of a longer one."""
        # A hash and not a generator of some library: its stream can never change with a version.
        raw = hashlib.shake_128(f"{self._seed}:{key}".encode()).digest(4 * length)
        values = np.frombuffer(raw, dtype="<u4") % len(self._ids)
        drawn: list[int] = self._ids[values].tolist()
        return drawn


@dataclass(frozen=True, kw_only=True)
class TraceWorkload(Workload):
    """What the traces share: scaling in time and length, and clipping.

    Parameters
    ----------
    path
        The trace; gzipped if its name ends in ``.gz``.
    max_requests
        Take the first so many rows; ``None`` takes all.
    time_scale
        Multiplies the arrival times: 0.5 plays the trace at twice its speed.
    length_scale
        Multiplies the lengths of inputs and outputs (rounded up), for small machines.
    max_input_len, max_output_len
        Cut inputs (keeping their start) and outputs to so many tokens after scaling;
        :meth:`describe` counts what was cut.
    """

    path: str | PathLike[str] | None = None
    max_requests: int | None = None
    time_scale: float = 1.0
    length_scale: float = 1.0
    max_input_len: int | None = None
    max_output_len: int | None = None

    _expects: ClassVar[str]
    _source: ClassVar[str]
    _time_field: ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("max_requests", "max_input_len", "max_output_len"):
            require_optional_int(key, getattr(self, key), 1)
        require_positive("time_scale", self.time_scale)
        require_positive("length_scale", self.length_scale)
        self._file()

    def _file(self) -> Path:
        return find_file(self.path, self.name, self._expects, self._source)

    @abstractmethod
    def _rows(self) -> Iterator[Row]:
        """Yield the rows of the trace."""

    @abstractmethod
    def _arrival_s(self, row: Row) -> float:
        """Return when the request arrived, in the trace's own time."""

    @abstractmethod
    def _request(
        self, row: Row, index: int, arrival_s: float, source: TokenIdSource
    ) -> WorkloadRequest:
        """Return the request of one row, scaled and clipped."""

    def _build(self, seed: int, tokenizer: Any, vocab_size: int) -> Iterator[WorkloadRequest]:
        for key in ("input", "output"):
            self._notes[f"num_clipped_{key}s"] = self._notes[f"clipped_{key}_tokens"] = 0
        source = TokenIdSource(seed, vocab_size)
        last_s = 0.0
        for index, row in enumerate(islice(self._rows(), self.max_requests)):
            arrival_s = self._arrival_s(row)
            if arrival_s < last_s:
                raise row.error(
                    self._time_field,
                    f"is {last_s - arrival_s:g} s before the row above",
                    "times that never decrease",
                )
            last_s = arrival_s
            yield self._request(row, index, arrival_s * self.time_scale, source)

    def _clip(self, what: str, length: int, limit: int | None) -> int:
        """Return a length cut to its limit, and count the cut."""
        if limit is None or length <= limit:
            return length
        self._notes[f"num_clipped_{what}s"] += 1
        self._notes[f"clipped_{what}_tokens"] += length - limit
        return limit


@dataclass(frozen=True, kw_only=True)
class MooncakeWorkload(TraceWorkload):
    """A Mooncake trace: prompts that share blocks of 512 tokens as recorded.

    A row has ``timestamp`` (ms), ``input_length``, ``output_length`` and ``hash_ids``, one for
    each block of 512 prompt tokens. The same hash id gives the same ids, so a prefix cache hits
    what the recorded one could have hit. ``length_scale`` shrinks the blocks too: 0.03125 makes
    blocks of 16 tokens and keeps the sharing exactly (Qin et al.,
    https://arxiv.org/abs/2407.00079). :meth:`describe` tells the hit rate of a cache of endless
    size, over what is left after scaling and clipping.
    """

    _hash_ids: dict[str, list[int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    _name: ClassVar[str] = "mooncake"
    _time_field: ClassVar[str] = "timestamp"
    _expects: ClassVar[str] = (
        "a Mooncake trace (.jsonl) with timestamp, input_length, output_length, hash_ids"
    )
    _source: ClassVar[str] = "https://github.com/kvcache-ai/Mooncake, FAST25-release/traces"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (MOONCAKE_BLOCK_TOKENS * self.length_scale).is_integer():
            raise ConfigError(
                f"length_scale is {self.length_scale:g}, which makes no whole blocks out of "
                f"{MOONCAKE_BLOCK_TOKENS} tokens; valid: multiples of 1/{MOONCAKE_BLOCK_TOKENS}, "
                "such as 0.03125 (blocks of 16 tokens) or 0.25."
            )

    @property
    def block_tokens(self) -> int:
        """Tokens that one hash id stands for, after scaling."""
        return int(MOONCAKE_BLOCK_TOKENS * self.length_scale)

    def requests(
        self,
        seed: int,
        tokenizer: Any = None,
        vocab_size: int = 0,
        max_model_len: int | None = None,
    ) -> list[WorkloadRequest]:
        """Build the requests (see :meth:`Workload.requests`), and note what a cache could find."""
        self._hash_ids.clear()
        kept = super().requests(seed, tokenizer, vocab_size, max_model_len)
        hits = infinite_cache_hits(self._blocks_of(request) for request in kept)
        self._notes["infinite_cache_hit_rate"] = hits.to_dict()
        self._hash_ids.clear()
        return kept

    def _blocks_of(self, request: WorkloadRequest) -> tuple[list[int], list[int]]:
        """Hash id and length of each block of the prompt, cut as the prompt was."""
        num_tokens = len(request.prompt_token_ids)
        starts = range(0, num_tokens, self.block_tokens)
        lengths = [min(self.block_tokens, num_tokens - start) for start in starts]
        return self._hash_ids[request.request_id][: len(lengths)], lengths

    def _rows(self) -> Iterator[Row]:
        self._notes["block_tokens"] = self.block_tokens
        return read_jsonl(self._file())

    def _arrival_s(self, row: Row) -> float:
        return row.number("timestamp") / 1000.0

    def _scaled(self, length: int) -> int:
        return -(-length * self.block_tokens // MOONCAKE_BLOCK_TOKENS)

    def _request(
        self, row: Row, index: int, arrival_s: float, source: TokenIdSource
    ) -> WorkloadRequest:
        recorded = row.integer("input_length", 1)
        hash_ids = row.integers("hash_ids")
        num_blocks = -(-recorded // MOONCAKE_BLOCK_TOKENS)
        if len(hash_ids) != num_blocks:
            raise row.error(
                "hash_ids",
                f"has {len(hash_ids)} ids for an input_length of {recorded}",
                f"{num_blocks}, one for each {MOONCAKE_BLOCK_TOKENS} tokens",
            )
        input_len = self._clip("input", self._scaled(recorded), self.max_input_len)
        output_len = self._scaled(row.integer("output_length", 1))
        request_id = f"mooncake-{index:06d}"
        self._hash_ids[request_id] = hash_ids
        return WorkloadRequest(
            request_id=request_id,
            prompt_token_ids=self._prompt(hash_ids, input_len, source),
            max_tokens=self._clip("output", output_len, self.max_output_len),
            arrival_s=arrival_s,
            category=self.name,
            prefix_group=str(hash_ids[0]),
        )

    def _prompt(
        self, hash_ids: list[int], input_len: int, source: TokenIdSource
    ) -> tuple[int, ...]:
        token_ids: list[int] = []
        for hash_id in hash_ids:
            length = min(self.block_tokens, input_len - len(token_ids))
            if length <= 0:
                break
            token_ids += source.draw(f"block {hash_id}", length)
        return tuple(token_ids)


@dataclass(frozen=True, kw_only=True)
class AzureWorkload(TraceWorkload):
    """An Azure LLM inference trace: arrivals and lengths of a public service.

    Columns ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``; times count from the first row.
    Nothing is known about shared prefixes, so no two prompts share one (Patel et al.,
    https://arxiv.org/abs/2311.18677).
    """

    _name: ClassVar[str] = "azure"
    _time_field: ClassVar[str] = "TIMESTAMP"
    _expects: ClassVar[str] = (
        "an Azure LLM inference trace (.csv) with TIMESTAMP, ContextTokens, GeneratedTokens"
    )
    _source: ClassVar[str] = "https://github.com/Azure/AzurePublicDataset, data"

    def _rows(self) -> Iterator[Row]:
        # The recorded times become seconds after the first row, so that all traces look alike.
        first: datetime | None = None
        for row in read_csv(self._file(), ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
            time = _timestamp(row)
            first = time if first is None else first
            try:
                seconds = (time - first).total_seconds()
            except TypeError as error:
                raise row.error(
                    "TIMESTAMP", f"is {row.values['TIMESTAMP']!r}", "all with a zone, or none"
                ) from error
            yield Row(row.path, row.line, {**row.values, "seconds": seconds})

    def _arrival_s(self, row: Row) -> float:
        return float(row.values["seconds"])

    def _request(
        self, row: Row, index: int, arrival_s: float, source: TokenIdSource
    ) -> WorkloadRequest:
        input_len = math.ceil(_count(row, "ContextTokens") * self.length_scale)
        output_len = math.ceil(_count(row, "GeneratedTokens") * self.length_scale)
        input_len = self._clip("input", input_len, self.max_input_len)
        return WorkloadRequest(
            request_id=f"azure-{index:06d}",
            prompt_token_ids=tuple(source.draw(f"request {index}", input_len)),
            max_tokens=self._clip("output", output_len, self.max_output_len),
            arrival_s=arrival_s,
            category=self.name,
        )


def _timestamp(row: Row) -> datetime:
    text = row.values["TIMESTAMP"]
    try:
        # The trace has seven digits of a second; those after the microsecond are cut.
        return datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise row.error(
            "TIMESTAMP", f"is {text!r}", "a time such as 2023-11-16 18:17:03.9799600"
        ) from error


def _count(row: Row, column: str) -> int:
    text = row.values[column].strip()
    # isdecimal() alone lets other scripts' digits pass.
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise row.error(column, f"is {text!r}", "a whole number of at least 1")
    return int(text)
