"""What a run measures, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from workbench.bench.slo import Slo
from workbench.core.backend import Backend


@dataclass(frozen=True, slots=True)
class Variant:
    """One row of the table.

    Attributes
    ----------
    build
        Makes the backend; called once, or once a round with ``residency="one"``.
    baseline
        Name of the variant that its speed is compared with.
    losslessness
        ``exact``, ``distributional`` or ``lossy``: which gate its outputs must pass.
    techniques
        Marker by technique name; ``evidence`` lists the counters that must be above zero.
    quality_bound
        Of a lossy variant: mean excess nats a token (:func:`~workbench.bench.gates.check_quality`)
        that its outputs may have; None where nothing was promised.
    kind
        ``baseline`` or ``engine``.
    has_prefix_cache
        Whether it must reach the prefix hit rate that a workload declares.
    """

    name: str
    build: Callable[[], Backend]
    baseline: str | None = None
    losslessness: str = "exact"
    quality_bound: float | None = None
    techniques: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kind: Literal["baseline", "engine"] = "engine"
    resolved_config: Mapping[str, Any] = field(default_factory=dict)
    has_prefix_cache: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """How to measure.

    Attributes
    ----------
    rounds, rounds_for
        Rounds a variant; ``rounds_for`` overrides by variant name or by kind, so that a slow
        baseline may run fewer. Fewer than three show no difference, whatever they measure.
    warmup, warmup_tokens
        Requests that warm a variant up and their output tokens at most. None: as many as the load
        keeps in flight.
    epsilon
        Logit margin under which a divergence counts as a tie where ties are allowed.
    timeout_s
        Limit of one round, noticed at its next token; None for no limit.
    residency
        ``all`` keeps every variant built, ``one`` builds and closes it in each round, for devices
        that hold one at a time.
    slo
        Bounds that goodput counts by; None for no goodput.
    resamples, seed
        Of the bootstrap.
    """

    rounds: int = 3
    rounds_for: Mapping[str, int] = field(default_factory=dict)
    warmup: int | None = None
    warmup_tokens: int = 4
    epsilon: float = 0.0
    timeout_s: float | None = None
    residency: Literal["all", "one"] = "all"
    slo: Slo | None = None
    resamples: int = 4000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot be followed."""
        for what, rounds in {"rounds": self.rounds, **self.rounds_for}.items():
            if rounds < 1:
                raise ValueError(f"rounds for {what!r} is {rounds}; it must be at least 1.")
        if self.residency not in ("all", "one"):
            raise ValueError(f"unknown residency {self.residency!r}. Valid: all, one.")
        if self.warmup is not None and self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}; it must be 0 or more.")
        if self.warmup_tokens < 1:
            raise ValueError(f"warmup_tokens is {self.warmup_tokens}; it must be at least 1.")

    def rounds_of(self, variant: Variant) -> int:
        """Rounds that ``variant`` runs."""
        return self.rounds_for.get(variant.name, self.rounds_for.get(variant.kind, self.rounds))
