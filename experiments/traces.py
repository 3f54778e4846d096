"""Recorded traces at their full lengths, as requests whose token ids are made when they arrive.

The traces' workloads hold the ids of every prompt at once, which is right for a model and a few
hundred requests. Here a prompt is a list of numbers until it is sent, so that a trace of hundreds
of millions of tokens is replayed whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

from experiments.dry import make_request
from workbench.bench.workloads.readers import Row, read_csv, read_jsonl
from workbench.core.errors import ConfigError, unknown_name
from workbench.core.request import Request

#: Tokens that one ``hash_id`` of a Mooncake trace stands for.
HASH_BLOCK_TOKENS = 512
#: Token that a dry run samples: the id of no prompt, so that no output is part of one.
OUTPUT_ID = -1


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One row of a trace.

    Attributes
    ----------
    block_ids
        What each block of ``block_tokens`` prompt tokens holds: equal numbers, equal tokens.
    """

    arrival_s: float
    input_len: int
    output_len: int
    block_ids: tuple[int, ...]
    block_tokens: int

    def prompt(self) -> list[int]:
        """Token ids: every token of a block has the block's number."""
        ids: list[int] = []
        for block in self.block_ids:
            ids += [block] * self.block_tokens
        return ids[: self.input_len]


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace's rows, in order of arrival.

    Attributes
    ----------
    shares_prefixes
        Whether the trace says which prompts start alike.
    """

    name: str
    requests: tuple[TraceRequest, ...]
    shares_prefixes: bool

    @property
    def span_s(self) -> float:
        """Seconds from the start to the last arrival."""
        return self.requests[-1].arrival_s

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(r.input_len + r.output_len for r in self.requests)

    def arrivals(self, step_s: float) -> Iterator[tuple[int, Request]]:
        """Step and request, where a step takes ``step_s`` seconds of the trace's time."""
        for index, row in enumerate(self.requests):
            step = int(row.arrival_s / step_s)
            yield step, make_request(f"{self.name}-{index:06d}", row.prompt(), row.output_len)

    def num_blocks(self, block_size: int) -> int:
        """Blocks that hold every request at once, with nothing shared and nothing given up."""
        return sum(-(-(r.input_len + r.output_len) // block_size) for r in self.requests)

    def whole_block_hits(self) -> tuple[int, int]:
        """Blocks that a cache of endless size finds, one request after the other; and blocks kept.

        Counted from the rows alone, as an engine may use them: whole blocks, and one token at
        least left to run.
        """
        children: dict[tuple[int, int], int] = {}
        hits = 0
        for row in self.requests:
            node = num_found = 0
            is_hit = True
            usable = (row.input_len - 1) // row.block_tokens
            for place, block in enumerate(row.block_ids[: row.input_len // row.block_tokens]):
                is_hit = is_hit and (node, block) in children
                num_found += is_hit and place < usable
                node = children.setdefault((node, block), len(children) + 1)
            hits += num_found
        return hits, len(children)

    def recorded_hits(self) -> tuple[int, int]:
        """Blocks that lie in a run of blocks seen before, and all blocks, parts of blocks too: how
        such traces are usually described."""
        children: dict[tuple[int, int], int] = {}
        hits = total = 0
        for row in self.requests:
            node, is_hit = 0, True
            for block in row.block_ids:
                is_hit = is_hit and (node, block) in children
                hits += is_hit
                total += 1
                node = children.setdefault((node, block), len(children) + 1)
        return hits, total


#: File of each trace, and where it can be had.
FILES = {
    "mooncake_conversation": "conversation_trace.jsonl",
    "mooncake_synthetic": "synthetic_trace.jsonl",
    "azure_code": "AzureLLMInferenceTrace_code.csv",
    "azure_conversation": "AzureLLMInferenceTrace_conv.csv",
}
_SOURCES = (
    "https://github.com/kvcache-ai/Mooncake (FAST25-release/traces) and "
    "https://github.com/Azure/AzurePublicDataset (data)"
)


def find_traces(data_dir: str, names: Sequence[str]) -> dict[str, Path]:
    """Files of traces below a folder, at any depth.

    Raises
    ------
    ConfigError
        No folder was given, a name is unknown, or a file is not there.
    """
    for name in names:
        if name not in FILES:
            raise unknown_name("trace", name, FILES)
    wanted = ", ".join(FILES[name] for name in names)
    if not data_dir or not Path(data_dir).expanduser().is_dir():
        raise ConfigError(
            f"data_dir={data_dir or '(not given)'} is no folder. Give one that holds {wanted} at "
            f"any depth; they come from {_SOURCES}."
        )
    found = {}
    for name in names:
        files = sorted(Path(data_dir).expanduser().rglob(FILES[name]))
        if not files:
            raise ConfigError(
                f"there is no {FILES[name]} below {data_dir}. It comes from {_SOURCES}; leave the "
                f"trace out with traces={','.join(n for n in names if n != name)}."
            )
        found[name] = files[0]
    return found


def read_trace(name: str, path: Path, limit: int = 0) -> Trace:
    """Read a trace, its first ``limit`` rows only unless that is 0.

    Raises
    ------
    ConfigError
        A field is missing or wrong, times are negative or decrease, or there are no rows.
    """
    is_mooncake = path.suffix == ".jsonl"
    rows = _mooncake_rows(path) if is_mooncake else _azure_rows(path)
    requests: list[TraceRequest] = []
    for row, request in islice(rows, limit or None):
        if request.arrival_s < (requests[-1].arrival_s if requests else 0.0):
            raise row.error(
                "timestamp" if is_mooncake else "TIMESTAMP",
                "is before the row above",
                "times that never decrease",
            )
        requests.append(request)
    if not requests:
        raise ConfigError(f"{path} holds no requests.")
    return Trace(name, tuple(requests), shares_prefixes=is_mooncake)


def _mooncake_rows(path: Path) -> Iterator[tuple[Row, TraceRequest]]:
    for row in read_jsonl(path):
        input_len = row.integer("input_length", 1)
        block_ids = row.integers("hash_ids")
        num_blocks = -(-input_len // HASH_BLOCK_TOKENS)
        if len(block_ids) != num_blocks:
            raise row.error(
                "hash_ids", f"has {len(block_ids)} ids for {input_len} tokens", f"{num_blocks}"
            )
        yield (
            row,
            TraceRequest(
                row.number("timestamp") / 1000.0,
                input_len,
                row.integer("output_length", 1),
                tuple(block_ids),
                HASH_BLOCK_TOKENS,
            ),
        )


def _azure_rows(path: Path) -> Iterator[tuple[Row, TraceRequest]]:
    first: datetime | None = None
    for index, row in enumerate(read_csv(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))):
        lengths = []
        for column in ("ContextTokens", "GeneratedTokens"):
            text = row.values[column].strip()
            if not (text.isascii() and text.isdecimal()) or int(text) < 1:
                raise row.error(column, f"is {text!r}", "a whole number of at least 1")
            lengths.append(int(text))
        text = row.values["TIMESTAMP"].strip()
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            raise row.error(
                "TIMESTAMP", f"is {text!r}", "a time such as 2023-11-16 18:17:03.97"
            ) from None
        first = first or time
        arrival_s = (time - first).total_seconds()
        # Nothing is known of what prompts share, so each is a single block of its own.
        yield row, TraceRequest(arrival_s, lengths[0], lengths[1], (index,), lengths[0])
