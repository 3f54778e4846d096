"""Arrival processes: seconds after the start at which requests arrive, as plain lists.

Every process is scaled so that the last of ``n`` requests arrives at ``n / rate``: the rate asked
for is then the rate offered, not that rate up to the luck of the seed. vLLM's ``bench serve`` does
the same, and its definition of burstiness is the one used here: gaps are Gamma-distributed with
``shape=burstiness`` and mean ``1 / rate``. A shape of 1 is a Poisson process; BurstGPT (Wang et
al., https://arxiv.org/abs/2401.17644) fits shapes below 1 to recorded traffic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from random import Random

from workbench.core.errors import ConfigError


def gamma_gaps(num: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Draw ``num`` gaps between arrivals, in seconds.

    Parameters
    ----------
    rate
        Arrivals a second; the mean gap is ``1 / rate``.
    burstiness
        Shape of the Gamma distribution: 1 is Poisson, less comes in bursts, more is more even. The
        coefficient of variation of the gaps is ``1 / sqrt(burstiness)``.
    seed
        The same seed gives the same gaps.
    """
    rng = Random(seed)
    return [rng.gammavariate(burstiness, 1.0 / (rate * burstiness)) for _ in range(num)]


def gamma_arrivals(
    num: int, rate: float, burstiness: float, seed: int, *, rescale: bool = True
) -> list[float]:
    """Draw ``num`` arrival times, sorted, in seconds.

    Parameters
    ----------
    rate, burstiness, seed
        As for :func:`gamma_gaps`.
    rescale
        Stretch the times so that the last one is ``num / rate``.
    """
    times = list(accumulate(gamma_gaps(num, rate, burstiness, seed)))
    if rescale and times and times[-1] > 0:
        times = [time_s * (num / rate / times[-1]) for time_s in times]
    return times


def constant_arrivals(num: int, rate: float) -> list[float]:
    """Return ``num`` arrival times at even distances of ``1 / rate``, the first after one gap."""
    return [(index + 1) / rate for index in range(num)]


def replayed_arrivals(
    recorded_s: Sequence[float], time_scale: float = 1.0, rate: float | None = None
) -> list[float]:
    """Return recorded arrival times, counted from the first one and scaled.

    Parameters
    ----------
    recorded_s
        Sorted, in seconds.
    time_scale
        Multiplies the times: 0.5 plays the trace at twice its speed.
    rate
        Instead of a scale, the requests a second that the trace is to bring on average.

    Raises
    ------
    ConfigError
        A time that is negative, not finite or before the one ahead of it; no arrival time at all;
        a rate for requests that all arrive at one moment.
    """
    if not recorded_s:
        return []
    for index, time_s in enumerate(recorded_s):
        if not math.isfinite(time_s) or time_s < 0:
            raise ConfigError(
                f"request {index} of the workload arrives at {time_s:g} s; valid: a finite time "
                "of at least 0."
            )
    for index, (before, after) in enumerate(pairwise(recorded_s), start=1):
        if after < before:
            raise ConfigError(
                f"request {index} of the workload arrives at {after:g} s, before the one ahead of "
                f"it ({before:g} s); a trace must be sorted by arrival time."
            )
    if len(recorded_s) > 1 and not any(recorded_s):
        raise ConfigError(
            "no request of the workload has an arrival time over 0, so there is nothing to "
            "replay. Use a recorded workload (mooncake, azure, or a jsonl with arrival_s) with "
            "more of its requests, or another load: poisson, gamma, constant, closed, offline."
        )
    first_s, span_s = recorded_s[0], recorded_s[-1] - recorded_s[0]
    if rate is not None:
        if span_s == 0:
            raise ConfigError(
                f"all requests of the workload arrive at {first_s:g} s, so they cannot be brought "
                f"to a rate of {rate:g} requests/s; use load=poisson, or more of the trace."
            )
        time_scale = len(recorded_s) / rate / span_s
    return [(time_s - first_s) * time_scale for time_s in recorded_s]
