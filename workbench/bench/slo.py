"""Service-level objectives: which requests were served well enough, and how many a second.

*Goodput* is the rate of requests that meet every bound (as ``vllm bench serve --goodput`` and
DistServe, Zhong et al., https://arxiv.org/abs/2401.09670, have it). Presets lie in ``conf/slo/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from workbench.bench.metrics import RequestSample, RoundSample, median
from workbench.bench.steady import Span, steady_window
from workbench.bench.workloads.checks import require_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Bounds that a request must keep; None bounds nothing.

    Parameters
    ----------
    ttft_ms
        Time to first token, counted from the release of the request.
    tpot_ms
        Mean time per output token after the first. A request of one token has none, and meets it.
    e2e_ms
        Time to the last token.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if value is not None:
                require_positive(key, value)

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by name."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def met_by(self, request: RequestSample) -> dict[str, bool]:
        """Say of each bound whether ``request`` met it; one that was not served met none."""
        if not request.is_served:
            return dict.fromkeys(self.bounds, False)
        tpot_s = request.tpot_s
        found = {
            "ttft_ms": request.ttft_s,
            "tpot_ms": 0.0 if tpot_s is None else tpot_s,
            "e2e_ms": request.e2el_s,
        }
        return {key: found[key] * 1e3 <= bound for key, bound in self.bounds.items()}


def goodput(round_: RoundSample, slo: Slo, span: Span | None = None) -> dict[str, Any]:
    """Judge the requests of one round.

    Parameters
    ----------
    span
        Judge only requests whose last token was seen within it; None judges all.

    Returns
    -------
    ``goodput_request_s``: requests that met every bound / time. ``share_met``: of the requests
    judged; those that were not served count as not met. ``share_met_by``: the same for each bound
    alone (MLPerf asks for 0.99 of each). None where there is no time, or no request.
    """
    judged = [
        request
        for request in round_.requests
        if span is None or (request.last_s is not None and span[0] < request.last_s <= span[1])
    ]
    length_s = round_.wall_s if span is None else span[1] - span[0]
    found = [slo.met_by(request) for request in judged]
    num_met = sum(all(met.values()) for met in found)
    return {
        "goodput_request_s": num_met / length_s if length_s > 0 else None,
        "share_met": num_met / len(found) if found else None,
        "share_met_by": {
            key: sum(met[key] for met in found) / len(found) if found else None
            for key in slo.bounds
        },
    }


def goodput_over_rounds(rounds: Sequence[RoundSample], slo: Slo) -> dict[str, Any]:
    """Take the median over rounds of what :func:`goodput` finds.

    Returns
    -------
    ``bounds``; ``goodput_request_s``, ``share_met`` and ``share_met_by`` of whole rounds, with
    ``goodput_per_round``; and ``steady``, the same over the steady windows (None where a round has
    none).
    """
    whole = [goodput(round_, slo) for round_ in rounds]
    windows = [steady_window(round_) for round_ in rounds]
    steady = [
        goodput(round_, slo, window.span)
        for round_, window in zip(rounds, windows, strict=True)
        if window is not None
    ]
    return {
        "bounds": slo.bounds,
        **_median_of(whole, slo),
        "goodput_per_round": [row["goodput_request_s"] for row in whole],
        "steady": _median_of(steady, slo) if len(steady) == len(rounds) else None,
    }


def _median_of(rows: Sequence[dict[str, Any]], slo: Slo) -> dict[str, Any]:
    return {
        "goodput_request_s": median([row["goodput_request_s"] for row in rows]),
        "share_met": median([row["share_met"] for row in rows]),
        "share_met_by": {
            key: median([row["share_met_by"][key] for row in rows]) for key in slo.bounds
        },
    }
