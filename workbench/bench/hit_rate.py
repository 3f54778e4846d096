"""The gate of the prefix hit rate: a workload that declares one is measured at that one.

A prefix cache that is colder or warmer than the workload says makes a number about something else:
an evicted prefix hides a gain, a cache left warm by an earlier run invents one.
"""

from __future__ import annotations

from collections.abc import Mapping

from workbench.bench.gates import GateResult

CACHED_TOKENS = "step.num_cached_tokens"
"""The counter of a backend that says how many prompt tokens came from a prefix cache."""

PROOFS_OF_USE = ("prefix_cache.lookups", "prefix_cache.inserted_blocks")
"""Counters of a prefix cache that move in a run in which it finds nothing, as one without shared
prefixes must be: prompts looked up, and blocks published."""

HIT_RATE_TOLERANCE = 0.01
"""How far the achieved rate may lie from the declared one, as a share of the prompt tokens."""


def achieved_hit_rate(counters: Mapping[str, float], num_prompt_tokens: int) -> float | None:
    """Return cached prompt tokens / prompt tokens; None where the backend does not tell."""
    if CACHED_TOKENS not in counters or num_prompt_tokens == 0:
        return None
    return counters[CACHED_TOKENS] / num_prompt_tokens


def check_hit_rate(declared: float | None, achieved: float | None) -> GateResult | None:
    """Void a round whose hit rate is not the one that its workload declares.

    Parameters
    ----------
    declared
        Share of the prompt tokens; None where the workload declares none.
    achieved
        As :func:`achieved_hit_rate` found it.

    Returns
    -------
    None where all is as declared.
    """
    if declared is None:
        return None
    if achieved is None:
        return GateResult(
            "INVALID",
            f"the workload declares a prefix hit rate of {_percent(declared)}, and the backend "
            f"has no counter {CACHED_TOKENS!r} that could show it.",
        )
    if abs(achieved - declared) <= HIT_RATE_TOLERANCE:
        return None
    cause = (
        "the cache lost prefixes (a pool too small), never published them, or its blocks are "
        "longer than what prompts share"
        if achieved < declared
        else "the cache was warm before the run, or prompts share more than the workload says"
    )
    return GateResult(
        "INVALID",
        f"the workload declares a prefix hit rate of {_percent(declared)}, and "
        f"{_percent(achieved)} of the prompt tokens came from the cache: {cause}.",
        details={"declared_hit_rate": declared, "achieved_hit_rate": achieved},
    )


def check_use(declared: float | None, counters: Mapping[str, float]) -> GateResult | None:
    """Void a round at a declared hit rate of 0 in which the prefix cache was not in use.

    There no hit is as it should be, and a cache that does nothing has none either. So it must have
    been asked, and must have kept what it was given.

    Returns
    -------
    None where all is as it should be, or where another rate, or none, is declared.
    """
    if declared != 0:
        return None
    idle = [name for name in PROOFS_OF_USE if not counters.get(name, 0) > 0]
    if not idle:
        return None
    what = "asked" if PROOFS_OF_USE[0] in idle else "given anything to keep"
    return GateResult(
        "INVALID",
        f"no evidence: the prefix cache was never {what} (counters at 0 or not reported: "
        f"{', '.join(idle)}).",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
