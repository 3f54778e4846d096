"""What is measured: one definition a metric, with its unit and which way is better.

Tools of the field disagree on these names (TPOT with or without the first token, ITL by chunk or
by token); ``METRICS`` is the one place that says what they mean here. Everything is derived from
the :class:`~workbench.core.backend.TokenEvent` stream of a run and the release times of its load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from workbench.bench.samples import RequestSample, RoundSample, collect
from workbench.bench.steady import Span, counts_over_time, steady_window

__all__ = [
    "LATE_SEND_S",
    "METRICS",
    "MetricDef",
    "RequestSample",
    "RoundSample",
    "collect",
    "latency_samples_ms",
    "load_metrics",
    "median",
    "metrics_over_rounds",
    "round_metrics",
    "steady_metrics",
    "summarise",
]


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
        MetricDef(
            "norm_latency_ms",
            "ms",
            "lower",
            True,
            "per request E2E / output tokens, the first token and all queueing included",
            "normalised latency (s/token) of Orca (OSDI'22) and PagedAttention (SOSP'23)",
        ),
        MetricDef(
            "max_gap_ms",
            "ms",
            "lower",
            True,
            "per request its longest gap between visible events, not divided by tokens: the worst"
            " stall that its reader saw; requests with one event left out",
            "generation stalls of Sarathi-Serve (OSDI'24), by request",
        ),
    )
}

PERCENTILES = (50, 90, 95, 99)


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


def latency_samples_ms(round_: RoundSample, span: Span | None = None) -> dict[str, np.ndarray]:
    """Return the raw sample of every latency metric, in milliseconds.

    Parameters
    ----------
    span
        Take only what became known within it: a TTFT at the first token, a gap at the event that
        ended it, everything else at the last token. None takes the whole round.
    """
    served = round_.served
    begun = [request for request in served if _is_within(request.first_s, span)]
    ended = [request for request in served if _is_within(request.last_s, span)]
    gaps = [_itl_within(request, span) for request in served]
    seconds: dict[str, Sequence[float | None] | np.ndarray] = {
        "ttft_ms": [request.ttft_s for request in begun],
        "tpot_ms": [request.tpot_s for request in ended],
        "itl_ms": np.concatenate(gaps) if gaps else [],
        "e2el_ms": [request.e2el_s for request in ended],
        "norm_latency_ms": [request.e2el_s / request.num_output_tokens for request in ended],
        "max_gap_ms": [request.max_gap_s for request in ended],
    }
    return {
        name: np.asarray([value for value in values if value is not None], dtype=np.float64) * 1e3
        for name, values in seconds.items()
    }


def _is_within(time_s: float | None, span: Span | None) -> bool:
    return time_s is not None and (span is None or span[0] < time_s <= span[1])


def _itl_within(request: RequestSample, span: Span | None) -> np.ndarray:
    gaps = request.itl_s()
    if span is None:
        return gaps
    ended_s = np.repeat(request.event_times_s()[1:], request.event_tokens[1:])
    return gaps[(span[0] < ended_s) & (ended_s <= span[1])]


def _output_tokens_within(request: RequestSample, span: Span | None) -> int:
    if span is None:
        return request.num_output_tokens
    seen_s = request.event_times_s()
    within = (span[0] < seen_s) & (seen_s <= span[1])
    return int(np.asarray(request.event_tokens)[within].sum())


def round_metrics(round_: RoundSample, span: Span | None = None) -> dict[str, Any]:
    """Compute every metric of one round, or of a span of it.

    Parameters
    ----------
    span
        Count an output token when it is seen, a prompt at its request's first token, a request at
        its last, and latencies as :func:`latency_samples_ms` does; rates are over the length of
        the span. None takes the whole round.

    Returns
    -------
    By name of ``METRICS``: a number, or None where the time is zero; a summary for the latency
    metrics.
    """
    served = round_.served
    num_output = sum(_output_tokens_within(request, span) for request in served)
    begun = [request for request in served if _is_within(request.first_s, span)]
    counts = {
        "output_tok_s": num_output,
        "total_tok_s": num_output + sum(request.num_prompt_tokens for request in begun),
        "request_s": sum(_is_within(request.last_s, span) for request in served),
    }
    length_s = round_.wall_s if span is None else span[1] - span[0]
    rates = {name: count / length_s if length_s > 0 else None for name, count in counts.items()}
    latencies = {name: summarise(v) for name, v in latency_samples_ms(round_, span).items()}
    return {**rates, **latencies}


def metrics_over_rounds(rounds: Sequence[RoundSample]) -> dict[str, dict[str, Any]]:
    """Take the median over rounds of every metric (of every statistic of the latency ones).

    Returns
    -------
    By name: ``unit``, ``better``, and either ``value`` with ``per_round``, or the statistics with
    ``p50_per_round``. ``n`` is the sample of one round.
    """
    return _over_rounds([round_metrics(round_) for round_ in rounds])


def _over_rounds(per_round: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for name, metric in METRICS.items():
        row: dict[str, Any] = {"unit": metric.unit, "better": metric.better}
        found = [result[name] for result in per_round]
        if metric.is_distribution:
            for key in found[0] if found else ():
                row[key] = median([summary[key] for summary in found])
            row["p50_per_round"] = [summary["p50"] for summary in found]
        else:
            row["value"] = median(found)
            row["per_round"] = found
        table[name] = row
    return table


def steady_metrics(rounds: Sequence[RoundSample]) -> dict[str, Any] | None:
    """Compute the metrics over each round's steady window (see :func:`steady_window`).

    Returns
    -------
    ``start_s``, ``end_s``, ``level`` and ``share`` (of the wall time), each the median over
    rounds, and ``metrics`` as of :func:`metrics_over_rounds`. None where a round has no window.
    """
    windows = [steady_window(round_) for round_ in rounds]
    known = [window for window in windows if window is not None]
    if not known or len(known) < len(windows):
        return None
    pairs = list(zip(rounds, known, strict=True))
    return {
        "start_s": median([window.start_s for window in known]),
        "end_s": median([window.end_s for window in known]),
        "level": median([window.level for window in known]),
        "share": median([(w.end_s - w.start_s) / r.wall_s for r, w in pairs]),
        "metrics": _over_rounds([round_metrics(r, w.span) for r, w in pairs]),
    }


def median(values: Sequence[float | None]) -> float | None:
    """Return the median of the values that are known, or None where none is."""
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


LATE_SEND_S = 0.01
"""A send is late where the backend took the request more than this after it was due."""


def load_metrics(round_: RoundSample) -> dict[str, float | int | None]:
    """What the load achieved: rates, requests in flight, queue, late sends.

    The backend takes requests between its steps, so under an open load it takes most of them a
    little after they were due. Latency counts from when a request was due all the same, so no
    wait is lost; the counts here say how far the traffic was from the one asked for.

    Returns
    -------
    ``duration_s``: start of the load to the last token (the wall time). ``achieved_request_s``:
    served requests / wall. ``sent_request_s``: requests taken / time of the last one taken, None
    where that is the start. ``mean_in_flight``, ``max_in_flight``: requests released and not yet
    ended, over the wall time; by Little's law the mean is served requests/s times the mean
    end-to-end time. ``max_queue``: most requests that were released and had no token yet.
    ``num_late_sends``: requests that the backend took more than ``LATE_SEND_S`` after their
    release. ``max_taken_late_s``: longest time that a released request waited to be taken.
    """
    served, wall = round_.served, round_.wall_s
    flights = [(r.release_s, r.last_s) for r in served if r.last_s is not None]
    times, counts = counts_over_time(flights)
    held = float(np.sum(np.diff(times) * counts[:-1])) if flights else 0.0
    # A request that failed stays in the queue of those without a token.
    queued = [(r.release_s, np.inf if r.first_s is None else r.first_s) for r in round_.requests]
    late = [request.taken_s - request.release_s for request in round_.requests]
    last_taken = max((request.taken_s for request in round_.requests), default=0.0)
    return {
        "duration_s": wall,
        "achieved_request_s": len(served) / wall if wall > 0 else None,
        "sent_request_s": len(round_.requests) / last_taken if last_taken > 0 else None,
        "mean_in_flight": held / wall if wall > 0 else None,
        "max_in_flight": int(counts.max(initial=0)),
        "max_queue": int(counts_over_time(queued)[1].max(initial=0)),
        "num_late_sends": sum(value > LATE_SEND_S for value in late),
        "max_taken_late_s": max(late, default=0.0),
    }
