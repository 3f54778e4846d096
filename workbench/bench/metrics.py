"""What is measured: one definition a metric, with its unit and which way is better.

Tools of the field disagree on these names (TPOT with or without the first token, ITL by chunk or
by token); ``METRICS`` is the one place that says what they mean here. Everything is derived from
the :class:`~workbench.core.backend.TokenEvent` stream of a run and the release times of its load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from workbench.core.backend import TokenEvent
from workbench.core.workload import WorkloadRequest


@dataclass(frozen=True, slots=True)
class MetricDef:
    """One metric.

    Attributes
    ----------
    better
        Which way is an improvement.
    is_distribution
        Whether it is a sample summarised by mean, std and percentiles, or one number a run.
    source
        Whose definition it is.
    """

    name: str
    unit: str
    better: Literal["higher", "lower"]
    is_distribution: bool
    definition: str
    source: str


METRICS: dict[str, MetricDef] = {
    metric.name: metric
    for metric in (
        MetricDef(
            "output_tok_s",
            "tok/s",
            "higher",
            False,
            "output tokens of served requests / wall time from the start of the load to the last"
            " token, ramp and drain included",
            "vLLM bench serve, output throughput",
        ),
        MetricDef(
            "total_tok_s",
            "tok/s",
            "higher",
            False,
            "prompt and output tokens of served requests / the same wall time",
            "vLLM bench serve, total token throughput",
        ),
        MetricDef(
            "request_s",
            "req/s",
            "higher",
            False,
            "served requests / the same wall time",
            "vLLM bench serve, request throughput",
        ),
        MetricDef(
            "ttft_ms",
            "ms",
            "lower",
            True,
            "release of the request by the load to its first token on the host, so queueing counts",
            "MLPerf inference, time to first token from issue",
        ),
        MetricDef(
            "tpot_ms",
            "ms",
            "lower",
            True,
            "per request (E2E - TTFT) / (output tokens - 1); requests with one token left out",
            "vLLM bench serve, time per output token without the first",
        ),
        MetricDef(
            "itl_ms",
            "ms",
            "lower",
            True,
            "gap between visible events of a request, pooled over requests; where one event brings"
            " k tokens its gap counts as k gaps of 1/k, so that speculation compares by token;"
            " tokens that come with the first event have no gap",
            "SGLang bench_serving since #12064 (divided by accept length)",
        ),
        MetricDef(
            "e2el_ms",
            "ms",
            "lower",
            True,
            "release of the request by the load to its last token on the host",
            "vLLM bench serve, end-to-end latency",
        ),
    )
}

PERCENTILES = (50, 90, 95, 99)


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


def summarise(values: Sequence[float] | np.ndarray) -> dict[str, float | int | None]:
    """Return mean, std (of the sample), percentiles (linear interpolation) and n.

    What cannot be stated is None: everything of an empty sample, the std of one value.
    """
    sample = np.asarray(values, dtype=np.float64)
    n = int(sample.size)
    if n == 0:
        return {"mean": None, "std": None, **{f"p{p}": None for p in PERCENTILES}, "n": 0}
    marks = np.percentile(sample, PERCENTILES)
    return {
        "mean": float(sample.mean()),
        "std": float(sample.std(ddof=1)) if n > 1 else None,
        **{f"p{p}": float(mark) for p, mark in zip(PERCENTILES, marks, strict=True)},
        "n": n,
    }


def latency_samples_ms(round_: RoundSample) -> dict[str, np.ndarray]:
    """Return the raw sample of every latency metric, in milliseconds."""
    served = round_.served
    tpot = [request.tpot_s for request in served]
    gaps = [request.itl_s() for request in served]
    seconds = {
        "ttft_ms": np.asarray([request.ttft_s for request in served]),
        "tpot_ms": np.asarray([value for value in tpot if value is not None]),
        "itl_ms": np.concatenate(gaps) if gaps else np.empty(0),
        "e2el_ms": np.asarray([request.e2el_s for request in served]),
    }
    return {name: values.astype(np.float64) * 1e3 for name, values in seconds.items()}


def round_metrics(round_: RoundSample) -> dict[str, Any]:
    """Compute every metric of one round.

    Returns
    -------
    By name of ``METRICS``: a number, or None where the wall time is zero; a summary for the
    latency metrics.
    """
    served = round_.served
    num_output = sum(request.num_output_tokens for request in served)
    num_prompt = sum(request.num_prompt_tokens for request in served)
    counts = {
        "output_tok_s": num_output,
        "total_tok_s": num_output + num_prompt,
        "request_s": len(served),
    }
    rates = {
        name: count / round_.wall_s if round_.wall_s > 0 else None for name, count in counts.items()
    }
    latencies = {name: summarise(v) for name, v in latency_samples_ms(round_).items()}
    return {**rates, **latencies}


def metrics_over_rounds(rounds: Sequence[RoundSample]) -> dict[str, dict[str, Any]]:
    """Take the median over rounds of every metric (of every statistic of the latency ones).

    Returns
    -------
    By name: ``unit``, ``better``, and either ``value`` with ``per_round``, or the statistics with
    ``p50_per_round``. ``n`` is the sample of one round.
    """
    per_round = [round_metrics(round_) for round_ in rounds]
    table: dict[str, dict[str, Any]] = {}
    for name, metric in METRICS.items():
        row: dict[str, Any] = {"unit": metric.unit, "better": metric.better}
        found = [result[name] for result in per_round]
        if metric.is_distribution:
            for key in found[0] if found else ():
                row[key] = _median([summary[key] for summary in found])
            row["p50_per_round"] = [summary["p50"] for summary in found]
        else:
            row["value"] = _median(found)
            row["per_round"] = found
        table[name] = row
    return table


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def load_metrics(round_: RoundSample) -> dict[str, float | int | None]:
    """What the load achieved: rates, requests in flight, queue.

    Returns
    -------
    ``achieved_request_s``: served requests / wall. ``mean_in_flight``: sum of end-to-end times /
    wall (Little's law). ``max_queue``: most requests that were released and had no token yet.
    ``max_taken_late_s``: longest time that a released request waited for the backend to take it.
    """
    served = round_.served
    wall = round_.wall_s
    steps = [(request.release_s, 1) for request in round_.requests]
    steps += [(request.first_s, -1) for request in served if request.first_s is not None]
    waiting = max_queue = 0
    for _, step in sorted(steps):
        waiting += step
        max_queue = max(max_queue, waiting)
    late = [request.taken_s - request.release_s for request in round_.requests]
    return {
        "achieved_request_s": len(served) / wall if wall > 0 else None,
        "mean_in_flight": sum(request.e2el_s for request in served) / wall if wall > 0 else None,
        "max_queue": max_queue,
        "max_taken_late_s": max(late, default=0.0),
    }
