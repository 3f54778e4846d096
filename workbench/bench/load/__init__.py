"""Load generators: when each request of a workload becomes due.

A generator is the :class:`~workbench.core.backend.RequestSource` that a backend pulls from. It
keeps two times a request: its **release** (when the client means to send it, by the rule of the
load) and when the backend took it. Latency counts from the release, so a backend that looks for
new requests late pays for it in its TTFT, and the client never waits for the server to be ready:
what stalls the server does not thin out the measurement ("coordinated omission").

A generator asks no clock; times come from the caller, so a test may use any.
"""

from __future__ import annotations

from workbench.bench.load.base import LoadGenerator, OnEvent
from workbench.bench.load.closed import Closed, Offline
from workbench.bench.load.open import Constant, Gamma, OpenLoad, Poisson, TraceReplay

__all__ = [
    "Closed",
    "Constant",
    "Gamma",
    "LoadGenerator",
    "Offline",
    "OnEvent",
    "OpenLoad",
    "Poisson",
    "TraceReplay",
]
