"""Workloads made to share prefixes: an exact hit rate, and conversations of many turns.

Both are of random token ids, and a request names in ``after`` the one whose prompt it continues,
so that what it shares has been computed when it is sent, whatever the load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from workbench.bench.workloads.base import Workload
from workbench.bench.workloads.checks import require_choice, require_int, require_share
from workbench.bench.workloads.synthetic import random_token_ids
from workbench.core.errors import ConfigError
from workbench.core.workload import WorkloadRequest

TURN_ORDERS = ("grouped", "interleaved")
_NOTED_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class PrefixHits:
    """What a cache of endless size would have found, had the requests come one by one."""

    hit_blocks: int
    num_blocks: int
    hit_tokens: int
    num_tokens: int

    def to_dict(self) -> dict[str, float]:
        """Return the shares of 1, of blocks and of tokens."""
        return {
            "blocks": self.hit_blocks / self.num_blocks,
            "tokens": self.hit_tokens / self.num_tokens,
        }


def infinite_cache_hits(blocks: Iterable[tuple[Sequence[Any], Sequence[int]]]) -> PrefixHits:
    """Count the blocks of each prompt that lie in a leading run of blocks seen before.

    Parameters
    ----------
    blocks
        By prompt, in order of arrival: a key for each block's content (equal keys, equal tokens),
        and each block's length in tokens.
    """
    nodes: dict[tuple[int, Any], int] = {}
    counts = [0, 0, 0, 0]
    for keys, lengths in blocks:
        node = 0
        for key, length in zip(keys, lengths, strict=True):
            is_hit = (node, key) in nodes
            node = nodes.setdefault((node, key), len(nodes) + 1)
            for index, amount in enumerate((is_hit, 1, is_hit * length, length)):
                counts[index] += amount
    return PrefixHits(*counts)


def hits_of_requests(requests: Iterable[WorkloadRequest], block_tokens: int) -> PrefixHits:
    """Count hits from token ids, in blocks of ``block_tokens`` (the last of a prompt may be short).

    Parameters
    ----------
    block_tokens
        1 counts tokens one by one, as a radix tree over single ids does.
    """

    def cut(ids: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[int]]:
        parts = [ids[i : i + block_tokens] for i in range(0, len(ids), block_tokens)]
        return parts, [len(part) for part in parts]

    return infinite_cache_hits(cut(request.prompt_token_ids) for request in requests)


@dataclass(frozen=True, kw_only=True)
class PrefixHitsWorkload(Workload):
    """Prompts of one length of which a given share of tokens is found in a prefix cache.

    There are ``num_groups`` prefixes. The first request of a group brings the prefix and generates
    one token; the others are sent after it has ended, start with a part of the prefix, and go on
    with tokens of their own. How long the parts are makes up for the first requests, which find
    nothing: of **all** prompt tokens exactly ``hit_rate`` are cached once everything that was
    computed stays in the cache. The workload declares that rate, and a run that misses it by more
    than a hundredth is INVALID.

    Lengths, order and output are the same at every rate, so runs at several rates compare, as in
    the prefix caching figure of https://blog.vllm.ai/2025/01/27/v1-alpha-release.html.

    Parameters
    ----------
    hit_rate
        Share of the prompt tokens, from 0 up to below 1.
    num_requests
        Number of requests, those that bring a prefix included.
    num_groups
        Number of prefixes.
    input_len, output_len
        Tokens in each prompt, and tokens that each request but the first of a group generates.
    granularity
        What is shared comes in multiples of this many tokens, so that caches whose block size
        divides it find all of it.
    """

    hit_rate: float = 0.5
    num_requests: int = 256
    num_groups: int = 8
    input_len: int = 2048
    output_len: int = 128
    granularity: int = 64

    _name: ClassVar[str] = "prefix_hits"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("hit_rate", self.hit_rate)
        for key in ("num_requests", "num_groups", "input_len", "output_len", "granularity"):
            require_int(key, getattr(self, key), 1)
        self._shared_lens()

    @property
    def declared_hit_rate(self) -> float | None:
        """Share of the prompt tokens that a prefix cache must have found."""
        return self.hit_rate

    def requests(
        self,
        seed: int,
        tokenizer: Any = None,
        vocab_size: int = 0,
        max_model_len: int | None = None,
    ) -> list[WorkloadRequest]:
        """Build the requests (see :meth:`Workload.requests`).

        Raises
        ------
        ConfigError
            Also where the context cuts or drops requests, since the rate would be another one.
        """
        kept = super().requests(seed, tokenizer, vocab_size, max_model_len)
        if self._notes.get("num_overlong") and self.overlong != "keep":
            raise ConfigError(
                f"workload {self.name}: input_len + output_len is "
                f"{self.input_len + self.output_len}, and the context holds {max_model_len}; cut "
                f"or dropped requests would not hit {self.hit_rate:g} of their tokens. Shorten "
                "input_len."
            )
        hits = hits_of_requests(kept, self.granularity)
        self._notes["infinite_cache_hit_rate"] = hits.to_dict()
        wanted = round(self.hit_rate * hits.num_tokens)
        assert hits.hit_tokens == wanted, f"{hits.hit_tokens} tokens hit, not {wanted}"
        return kept

    def _shared_lens(self) -> list[int]:
        """Tokens that each request but the first of its group shares, in order.

        Raises
        ------
        ConfigError
            No lengths make the rate exactly.
        """
        num_sharing = self.num_requests - self.num_groups
        cached = self.hit_rate * self.num_requests * self.input_len
        num_units = round(cached / self.granularity)
        # One token at least must be left to compute, or there is nothing to sample from.
        most_units = (self.input_len - 1) // self.granularity
        if abs(num_units * self.granularity - cached) > 1e-6:
            raise ConfigError(
                f"hit_rate is {self.hit_rate:g}, which is {cached:g} of "
                f"{self.num_requests * self.input_len} prompt tokens and no multiple of "
                f"granularity ({self.granularity}); valid: a rate that is, or a granularity that "
                "divides it."
            )
        if num_units > max(0, num_sharing) * most_units:
            best = max(0, num_sharing) * most_units * self.granularity
            best_rate = best / (self.num_requests * self.input_len)
            raise ConfigError(
                f"hit_rate is {self.hit_rate:g}; valid here: at most {best_rate:.3f}, since the "
                f"first of each of {self.num_groups} groups finds nothing, in {self.num_requests} "
                f"requests of {self.input_len} tokens at a granularity of {self.granularity}. "
                "Take fewer num_groups, or more num_requests."
            )
        if num_sharing <= 0:
            return []
        low, more = divmod(num_units, num_sharing)
        # The longer ones are spread evenly, so that no stretch of the run hits more than another.
        units = [
            low + ((i + 1) * more // num_sharing - i * more // num_sharing)
            for i in range(num_sharing)
        ]
        return [count * self.granularity for count in units]

    def _build(self, seed: int, tokenizer: Any, vocab_size: int) -> Iterator[WorkloadRequest]:
        rng = Random(seed)
        parting = _Parting(rng, vocab_size)
        prefixes = [parting.go_on((), self.input_len, "the start") for _ in range(self.num_groups)]
        shared_lens = self._shared_lens()
        for index in range(self.num_requests):
            group = index % self.num_groups
            is_first = index < self.num_groups
            if is_first:
                prompt = prefixes[group]
            else:
                shared = prefixes[group][: shared_lens[index - self.num_groups]]
                parting.is_taken(shared, prefixes[group][len(shared)])
                prompt = parting.go_on(shared, self.input_len, f"a prefix of {len(shared)} tokens")
            yield WorkloadRequest(
                request_id=f"{self.name}-{index:04d}",
                prompt_token_ids=prompt,
                max_tokens=1 if is_first else self.output_len,
                category=self.name,
                prefix_group=f"group-{group:03d}",
                after=None if is_first else f"{self.name}-{group:04d}",
            )


class _Parting:
    """Continues prompts so that no two with one start go on with the same token.

    Without it two prompts would now and then share a token more than meant, by chance, and a cache
    that looks at single tokens would find it.
    """

    def __init__(self, rng: Random, vocab_size: int) -> None:
        self._rng = rng
        self._vocab_size = vocab_size
        self._taken: dict[tuple[int, ...], set[int]] = {}

    def is_taken(self, start: tuple[int, ...], token_id: int) -> None:
        """Note that a prompt that begins with ``start`` goes on with ``token_id``."""
        self._taken.setdefault(start, set()).add(token_id)

    def go_on(self, start: tuple[int, ...], length: int, where: str) -> tuple[int, ...]:
        """Return ``start`` with random ids after it, ``length`` tokens in all."""
        taken = self._taken.setdefault(start, set())
        if len(taken) >= self._vocab_size:
            raise ConfigError(
                f"more prompts part after {where} than the vocabulary of {self._vocab_size} has "
                "ids, so some would share more than they should. Take fewer num_requests."
            )
        token_id = self._rng.randrange(self._vocab_size)
        while token_id in taken:
            token_id = self._rng.randrange(self._vocab_size)
        taken.add(token_id)
        rest = random_token_ids(self._rng, length - len(start) - 1, self._vocab_size)
        return (*start, token_id, *rest)


@dataclass(frozen=True, kw_only=True)
class MultiTurnWorkload(Workload):
    """Conversations: each turn's prompt is everything before it and a new message.

    The prompt of turn ``k`` is the system prompt, then message and answer of each turn before it,
    then a new message. The answers within prompts are fixed random ids, not what the model said,
    so that every engine gets the same prompts; a cache can find the prompt of the turn before, and
    the answer only where the model happened to say it. A turn is sent after the one before it has
    ended, in every load.

    Parameters
    ----------
    num_conversations, num_turns
        Conversations, and turns of each.
    system_len
        Tokens of a system prompt that all conversations share; 0 for none.
    user_len, answer_len
        Tokens of each message, and of each answer: as many are generated.
    order
        ``grouped``: a client keeps to its conversation, so that with ``load=closed`` so many are
        open as there are clients. ``interleaved``: all conversations go through their first turn,
        then through their second one: hardest for a small cache.
    """

    num_conversations: int = 32
    num_turns: int = 6
    system_len: int = 256
    user_len: int = 64
    answer_len: int = 128
    order: str = "grouped"

    _name: ClassVar[str] = "multi_turn"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_conversations", "num_turns", "user_len", "answer_len"):
            require_int(key, getattr(self, key), 1)
        require_int("system_len", self.system_len, 0)
        require_choice("order", self.order, TURN_ORDERS)

    def _build(self, seed: int, tokenizer: Any, vocab_size: int) -> Iterable[WorkloadRequest]:
        rng = Random(seed)
        system = random_token_ids(rng, self.system_len, vocab_size)
        talks = [
            self._conversation(rng, number, system, vocab_size)
            for number in range(self.num_conversations)
        ]
        if self.order == "interleaved":
            return [turn for turns in zip(*talks, strict=True) for turn in turns]
        return [turn for talk in talks for turn in talk]

    def requests(
        self,
        seed: int,
        tokenizer: Any = None,
        vocab_size: int = 0,
        max_model_len: int | None = None,
    ) -> list[WorkloadRequest]:
        """Build the requests (see :meth:`Workload.requests`), and note what a cache could find."""
        kept = super().requests(seed, tokenizer, vocab_size, max_model_len)
        hits = hits_of_requests(kept, _NOTED_BLOCK_TOKENS)
        self._notes["infinite_cache_hit_rate"] = hits.to_dict()
        self._notes["block_tokens"] = _NOTED_BLOCK_TOKENS
        return kept

    def _conversation(
        self, rng: Random, number: int, system: tuple[int, ...], vocab_size: int
    ) -> list[WorkloadRequest]:
        turns: list[WorkloadRequest] = []
        history = system
        for turn in range(self.num_turns):
            history += random_token_ids(rng, self.user_len, vocab_size)
            turns.append(
                WorkloadRequest(
                    request_id=f"{self.name}-{number:03d}-{turn:02d}",
                    prompt_token_ids=history,
                    max_tokens=self.answer_len,
                    category=self.name,
                    prefix_group=f"conversation-{number:03d}",
                    after=turns[-1].request_id if turns else None,
                )
            )
            history += random_token_ids(rng, self.answer_len, vocab_size)
        return turns
