"""Open loads: requests arrive by the clock, whether or not the backend keeps up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from workbench.bench.load.arrivals import constant_arrivals, gamma_arrivals, replayed_arrivals
from workbench.bench.load.base import LoadGenerator
from workbench.bench.load.closed import Offline
from workbench.bench.workloads.checks import require_bool, require_int, require_positive
from workbench.core.errors import ConfigError
from workbench.core.workload import WorkloadRequest


class OpenLoad(LoadGenerator):
    """Requests that arrive at given times.

    A request that follows another one (``after``) is sent at its own time or at the end of that
    one, whichever is later.

    Parameters
    ----------
    requests
        The workload, in the order in which it is sent.
    arrivals_s
        Seconds after the start, one a request, sorted.
    """

    name = "open"

    def __init__(self, requests: Sequence[WorkloadRequest], arrivals_s: Sequence[float]) -> None:
        super().__init__(requests)
        assert len(arrivals_s) == len(requests), "one arrival time a request"
        self.arrivals_s = tuple(arrivals_s)

    @property
    def target_request_s(self) -> float | None:
        """Requests / the time of the last arrival; None where all arrive at the start."""
        last_s = self.arrivals_s[-1]
        return len(self.arrivals_s) / last_s if last_s > 0 else None

    def describe(self) -> dict[str, Any]:
        """Return the settings of the load and the rate that they come to, for the record."""
        return {**super().describe(), "target_request_s": self.target_request_s}

    def for_warmup(self, requests: Sequence[WorkloadRequest]) -> LoadGenerator:
        """Return a load that sends ``requests`` at once."""
        return Offline(requests)

    def _scheduled_s(self, index: int) -> float:
        assert self.start_s is not None
        return self.start_s + self.arrivals_s[index]


class Gamma(OpenLoad):
    """Arrivals with Gamma-distributed gaps (see :mod:`workbench.bench.load.arrivals`).

    The times are a function of the settings and the number of requests, so that every variant and
    every round of a run meets the same ones.

    Parameters
    ----------
    requests
        The workload, in the order in which it is sent.
    rate
        Requests a second; above 0.
    burstiness
        Shape of the distribution, above 0: 1 is Poisson, less comes in bursts, more is more even.
    seed
        Of the draws; 0 or more.
    rescale
        Stretch the times so that the last request arrives at ``len(requests) / rate``; without it
        the rate is met only up to the luck of the draw.
    """

    name = "gamma"

    def __init__(
        self,
        requests: Sequence[WorkloadRequest],
        rate: float = 1.0,
        burstiness: float = 1.0,
        seed: int = 0,
        rescale: bool = True,
    ) -> None:
        self.check_settings(rate=rate, burstiness=burstiness, seed=seed, rescale=rescale)
        times = gamma_arrivals(len(requests), rate, burstiness, seed, rescale=rescale)
        super().__init__(requests, times)
        self._settings = {"rate": rate, "burstiness": burstiness, "seed": seed, "rescale": rescale}

    @classmethod
    def check_settings(
        cls,
        *,
        rate: float = 1.0,
        burstiness: float = 1.0,
        seed: int = 0,
        rescale: bool = True,
        **others: Any,
    ) -> None:
        """Refuse a rate or a shape that is no finite number above 0."""
        _require_rate(rate)
        require_positive("load.burstiness", burstiness)
        require_int("load.seed", seed, 0)
        require_bool("load.rescale", rescale)

    def describe(self) -> dict[str, Any]:
        """Return the settings of the load, for the record."""
        return {**super().describe(), **self._settings}


class Poisson(Gamma):
    """Arrivals of a Poisson process: independent of one another, ``rate`` a second on average.

    Parameters
    ----------
    requests, rate, seed, rescale
        As for :class:`Gamma`, whose burstiness is 1 here.
    """

    name = "poisson"

    def __init__(
        self,
        requests: Sequence[WorkloadRequest],
        rate: float = 1.0,
        seed: int = 0,
        rescale: bool = True,
    ) -> None:
        super().__init__(requests, rate=rate, burstiness=1.0, seed=seed, rescale=rescale)
        del self._settings["burstiness"]


class Constant(OpenLoad):
    """Arrivals at even distances of ``1 / rate``.

    Parameters
    ----------
    requests
        The workload, in the order in which it is sent.
    rate
        Requests a second; above 0.
    """

    name = "constant"

    def __init__(self, requests: Sequence[WorkloadRequest], rate: float = 1.0) -> None:
        self.check_settings(rate=rate)
        super().__init__(requests, constant_arrivals(len(requests), rate))
        self._rate = rate

    @classmethod
    def check_settings(cls, *, rate: float = 1.0, **others: Any) -> None:
        """Refuse a rate that is no finite number above 0."""
        _require_rate(rate)

    def describe(self) -> dict[str, Any]:
        """Return the settings of the load, for the record."""
        return {**super().describe(), "rate": self._rate}


class TraceReplay(OpenLoad):
    """The workload's own arrival times, counted from its first request.

    Parameters
    ----------
    requests
        The workload; its requests have arrival times.
    time_scale
        Multiplies the times, above 0: 0.5 plays the trace at twice its speed. A workload may scale
        its times itself; the two multiply.
    rate
        Instead of a scale, requests a second on average; None keeps the trace's own.
    """

    name = "trace"

    def __init__(
        self,
        requests: Sequence[WorkloadRequest],
        time_scale: float = 1.0,
        rate: float | None = None,
    ) -> None:
        self.check_settings(time_scale=time_scale, rate=rate)
        recorded = [request.arrival_s for request in requests]
        super().__init__(requests, replayed_arrivals(recorded, time_scale, rate))
        self._settings = {"time_scale": time_scale, "rate": rate}

    @classmethod
    def check_settings(
        cls, *, time_scale: float = 1.0, rate: float | None = None, **others: Any
    ) -> None:
        """Refuse scales and rates that are no finite numbers above 0, and both at once."""
        require_positive("load.time_scale", time_scale)
        if rate is None:
            return
        _require_rate(rate)
        if time_scale != 1.0:
            raise ConfigError(
                f"load.time_scale={time_scale:g} and load.rate={rate:g} both scale the trace; "
                "give one of them."
            )

    def describe(self) -> dict[str, Any]:
        """Return the settings of the load, for the record."""
        return {**super().describe(), **self._settings}


def _require_rate(rate: Any) -> None:
    if rate == float("inf"):
        raise ConfigError("load.rate=inf sends every request at once; use load=offline for that.")
    require_positive("load.rate", rate)
