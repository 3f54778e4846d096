"""Workloads of random token ids: their lengths are the point, their content is not.

Every request generates exactly its ``max_tokens`` (``ignore_eos``), so that all engines do the
same work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from workbench.bench.workloads.base import Workload
from workbench.bench.workloads.checks import require_bounds, require_choice, require_int
from workbench.core.workload import WorkloadRequest

ORDERS = ("shuffled", "grouped", "interleaved")


def random_token_ids(rng: Random, length: int, vocab_size: int) -> tuple[int, ...]:
    """Draw ``length`` token ids, uniform in ``0..vocab_size - 1``."""
    return tuple(rng.choices(range(vocab_size), k=length))


@dataclass(frozen=True, kw_only=True)
class FixedWorkload(Workload):
    """Requests that all have the same length: the usual "128 in, 128 out".

    Parameters
    ----------
    num_requests
        Number of requests.
    input_len, output_len
        Tokens in each prompt, and tokens that each request generates.
    """

    num_requests: int = 32
    input_len: int = 128
    output_len: int = 128

    _name: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_requests", "input_len", "output_len"):
            require_int(key, getattr(self, key), 1)

    def _build(self, seed: int, tokenizer: Any, vocab_size: int) -> Iterator[WorkloadRequest]:
        rng = Random(seed)
        for index in range(self.num_requests):
            yield WorkloadRequest(
                request_id=f"fixed-{index:04d}",
                prompt_token_ids=random_token_ids(rng, self.input_len, vocab_size),
                max_tokens=self.output_len,
                category=self.name,
            )


@dataclass(frozen=True, kw_only=True)
class MixedWorkload(Workload):
    """Requests of mixed lengths, small enough for a CPU by default.

    Parameters
    ----------
    num_requests
        Number of requests.
    min_input_len, max_input_len
        Bounds of the prompt lengths in tokens, drawn uniformly, both included.
    min_output_len, max_output_len
        Bounds of the output lengths, likewise.
    """

    num_requests: int = 32
    min_input_len: int = 32
    max_input_len: int = 256
    min_output_len: int = 16
    max_output_len: int = 192

    _name: ClassVar[str] = "mixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("num_requests", self.num_requests, 1)
        for what in ("input_len", "output_len"):
            low, high = f"min_{what}", f"max_{what}"
            require_bounds(low, getattr(self, low), high, getattr(self, high), 1)

    def _build(self, seed: int, tokenizer: Any, vocab_size: int) -> Iterator[WorkloadRequest]:
        rng = Random(seed)
        for index in range(self.num_requests):
            input_len = rng.randint(self.min_input_len, self.max_input_len)
            token_ids = random_token_ids(rng, input_len, vocab_size)
            yield WorkloadRequest(
                request_id=f"{self.name}-{index:04d}",
                prompt_token_ids=token_ids,
                max_tokens=rng.randint(self.min_output_len, self.max_output_len),
                category=self.name,
            )


@dataclass(frozen=True, kw_only=True)
class Nano256Workload(MixedWorkload):
    """The shape of nano-vllm's benchmark: 256 requests of 100..1,024 tokens in and out.

    ``random.Random(seed)`` gives, request by request, the input length, the token ids (each
    uniform in ``0..max_token_id``) and the output length. With the defaults the token counts are
    the same for every model; a vocabulary that ends below ``max_token_id`` narrows the range of
    ids, which :meth:`describe` tells. Source: https://github.com/GeeeekExplorer/nano-vllm
    (``bench.py``).

    Parameters
    ----------
    num_requests, min_input_len, max_input_len, min_output_len, max_output_len
        As in :class:`MixedWorkload`; smaller ones suit smaller machines, and are then no longer
        comparable with published figures.
    max_token_id
        Largest token id, itself included.
    """

    num_requests: int = 256
    min_input_len: int = 100
    max_input_len: int = 1024
    min_output_len: int = 100
    max_output_len: int = 1024
    max_token_id: int = 10_000

    _name: ClassVar[str] = "nano256"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("max_token_id", self.max_token_id, 0)

    def _build(self, seed: int, tokenizer: Any, vocab_size: int) -> Iterator[WorkloadRequest]:
        rng = Random(seed)
        last_id = min(self.max_token_id, vocab_size - 1)
        self._notes["max_token_id"] = last_id
        self._notes["token_ids_clamped_to_vocab"] = last_id < self.max_token_id
        for index in range(self.num_requests):
            input_len = rng.randint(self.min_input_len, self.max_input_len)
            # randint and not choices: the draws must be those of the published workload.
            token_ids = tuple(rng.randint(0, last_id) for _ in range(input_len))
            yield WorkloadRequest(
                request_id=f"nano256-{index:04d}",
                prompt_token_ids=token_ids,
                max_tokens=rng.randint(self.min_output_len, self.max_output_len),
                category=self.name,
            )


@dataclass(frozen=True, kw_only=True)
class SharedPrefixWorkload(Workload):
    """Groups of requests that start with the same tokens, as under one system prompt each.

    Parameters
    ----------
    num_groups
        Number of different prefixes.
    requests_per_group
        Requests that start with the same prefix.
    shared_len, own_len
        Tokens of the prefix, and tokens that follow it and differ in each request.
    output_len
        Tokens that each request generates.
    order
        ``shuffled`` by the seed, ``grouped`` (all of one group, then the next: easiest for a
        cache), or ``interleaved`` (one of each group in turn: hardest for a small cache).
    """

    num_groups: int = 8
    requests_per_group: int = 32
    shared_len: int = 2048
    own_len: int = 128
    output_len: int = 64
    order: str = "shuffled"

    _name: ClassVar[str] = "shared_prefix"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_groups", "requests_per_group", "shared_len", "own_len", "output_len"):
            require_int(key, getattr(self, key), 1)
        require_choice("order", self.order, ORDERS)

    def _build(self, seed: int, tokenizer: Any, vocab_size: int) -> Iterable[WorkloadRequest]:
        rng = Random(seed)
        groups = [self._group(rng, group, vocab_size) for group in range(self.num_groups)]
        if self.order == "interleaved":
            return [request for turn in zip(*groups, strict=True) for request in turn]
        ordered = [request for group in groups for request in group]
        if self.order == "shuffled":
            rng.shuffle(ordered)
        return ordered

    def _group(self, rng: Random, group: int, vocab_size: int) -> list[WorkloadRequest]:
        prefix = random_token_ids(rng, self.shared_len, vocab_size)
        return [
            WorkloadRequest(
                request_id=f"shared_prefix-{group:03d}-{index:04d}",
                prompt_token_ids=prefix + random_token_ids(rng, self.own_len, vocab_size),
                max_tokens=self.output_len,
                category=self.name,
                prefix_group=f"group-{group:03d}",
            )
            for index in range(self.requests_per_group)
        ]
