"""The raw times of a run, from the events that a backend told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from workbench.core.backend import TokenEvent
from workbench.core.workload import WorkloadRequest


@dataclass(frozen=True, slots=True)
class RequestSample:
    """The raw times of one request, in seconds after the start of the load.

    Attributes
    ----------
    first_s, last_s
        First and last token on the host; None for a request that brought no token.
    taken_s
        When the backend took the request from the load.
    event_tokens
        Tokens of each event.
    gaps_s
        Seconds between successive events, one fewer than ``event_tokens``.
    """

    request_id: str
    category: str
    num_prompt_tokens: int
    num_output_tokens: int
    release_s: float
    taken_s: float
    first_s: float | None
    last_s: float | None
    event_tokens: tuple[int, ...] = ()
    gaps_s: tuple[float, ...] = ()
    error: str | None = None

    @property
    def is_served(self) -> bool:
        """Whether the request brought tokens and no error."""
        return self.error is None and self.first_s is not None

    @property
    def ttft_s(self) -> float:
        """Release to first token."""
        assert self.first_s is not None
        return self.first_s - self.release_s

    @property
    def e2el_s(self) -> float:
        """Release to last token."""
        assert self.last_s is not None
        return self.last_s - self.release_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first; None for one token."""
        if self.num_output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.num_output_tokens - 1)

    @property
    def max_gap_s(self) -> float | None:
        """Longest time between two visible events; None for a single event."""
        return max(self.gaps_s, default=None)

    def event_times_s(self) -> np.ndarray:
        """Return when each event was seen: float64 [events], in seconds after the start."""
        assert self.first_s is not None and self.last_s is not None
        times = self.first_s + np.concatenate([[0.0], np.cumsum(self.gaps_s, dtype=np.float64)])
        times[-1] = self.last_s  # not the sum of rounded gaps
        return times

    def itl_s(self) -> np.ndarray:
        """Return the gap of every token after the first event: float64 [tokens]."""
        tokens = np.asarray(self.event_tokens[1:], dtype=np.int64)
        return np.repeat(np.asarray(self.gaps_s, dtype=np.float64) / tokens, tokens)


@dataclass(frozen=True, slots=True)
class RoundSample:
    """One measured run of a workload by one variant."""

    wall_s: float
    requests: tuple[RequestSample, ...]

    @property
    def served(self) -> list[RequestSample]:
        """Requests that brought tokens and no error."""
        return [request for request in self.requests if request.is_served]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, times rounded to the microsecond."""
        return {
            "wall_s": round(self.wall_s, 6),
            "requests": [_rounded(asdict(request)) for request in self.requests],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RoundSample:
        """Rebuild a round from :meth:`to_dict`."""
        requests = []
        for row in data["requests"]:
            values = dict(row)
            values["event_tokens"] = tuple(values["event_tokens"])
            values["gaps_s"] = tuple(values["gaps_s"])
            requests.append(RequestSample(**values))
        return cls(wall_s=data["wall_s"], requests=tuple(requests))


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    row["gaps_s"] = [round(gap, 6) for gap in row["gaps_s"]]
    row["event_tokens"] = list(row["event_tokens"])
    return {key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()}


def collect(
    events: Sequence[TokenEvent],
    requests: Sequence[WorkloadRequest],
    release_s: Mapping[str, float],
    taken_s: Mapping[str, float],
    start_s: float,
    end_s: float | None = None,
) -> tuple[RoundSample, dict[str, tuple[int, ...]]]:
    """Turn the events of one run into raw samples and outputs.

    Parameters
    ----------
    events
        As told by the backend, in order.
    release_s, taken_s
        The book of the load, ``perf_counter`` by request id.
    start_s, end_s
        When the load started, and when the backend returned (None: unknown).

    Returns
    -------
    The samples of the round, and the output token ids by request id.

    Raises
    ------
    ValueError
        An event of an unknown request, or one whose time lies before the release, before the
        event ahead of it or after the end of the run: the backend's clock cannot be trusted, so
        nothing may be measured.
    """
    by_id: dict[str, list[TokenEvent]] = {request.request_id: [] for request in requests}
    for event in events:
        if event.request_id not in by_id:
            raise ValueError(f"the backend told tokens of unknown request {event.request_id!r}.")
        by_id[event.request_id].append(event)
    samples, outputs = [], {}
    for request in requests:
        told = by_id[request.request_id]
        outputs[request.request_id] = tuple(t for event in told for t in event.token_ids)
        samples.append(_sample(request, told, release_s, taken_s, start_s))
    last_s = max((s.last_s for s in samples if s.last_s is not None), default=0.0)
    if end_s is not None and start_s + last_s > end_s:
        raise ValueError(
            f"the last token is {start_s + last_s - end_s:.6f} s later than the end of the run; "
            "events must carry time.perf_counter()."
        )
    return RoundSample(wall_s=last_s, requests=tuple(samples)), outputs


def _sample(
    request: WorkloadRequest,
    told: Sequence[TokenEvent],
    release_s: Mapping[str, float],
    taken_s: Mapping[str, float],
    start_s: float,
) -> RequestSample:
    """Build the sample of one request."""
    key = request.request_id
    error = next((event.error for event in told if event.error is not None), None)
    if key not in taken_s:
        error = "the backend never took the request from the load"
    elif error is None and not any(event.finished for event in told):
        error = "the backend returned without finishing the request"
    release = release_s.get(key, start_s)
    shown = [event for event in told if event.token_ids]
    times = [release, *(event.time_s for event in shown)]
    for before, after in pairwise(times):
        if after < before:
            raise ValueError(
                f"request {key!r} has an event {before - after:.6f} s before its release or its"
                " previous event; events must carry time.perf_counter() in order."
            )
    return RequestSample(
        request_id=key,
        category=request.category,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_output_tokens=sum(len(event.token_ids) for event in shown),
        release_s=release - start_s,
        taken_s=taken_s.get(key, start_s) - start_s,
        first_s=shown[0].time_s - start_s if shown else None,
        last_s=shown[-1].time_s - start_s if shown else None,
        event_tokens=tuple(len(event.token_ids) for event in shown),
        gaps_s=tuple(b - a for a, b in pairwise(times[1:])),
        error=error,
    )
