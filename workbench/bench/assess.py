"""From what a run measured to its records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from workbench.bench.environment import Environment
from workbench.bench.gates import GateResult, Verdict
from workbench.bench.jsonsafe import plain
from workbench.bench.metrics import (
    RoundSample,
    load_metrics,
    median,
    metrics_over_rounds,
    round_metrics,
    steady_metrics,
)
from workbench.bench.records import Record
from workbench.bench.roofline import Ceilings, utilisation
from workbench.bench.settings import BenchSettings, Variant
from workbench.bench.slo import goodput_over_rounds
from workbench.bench.stats import RoundPair, paired_ratio, speed_p_value, verdict_word
from workbench.bench.timeline import timeline_of
from workbench.core.backend import Backend, BackendInfo, MemoryLedger
from workbench.core.step import StepRecord

_MIN_ROUNDS = 3
_TIME_UNITS = frozenset({"s", "ms", "us", "ns", "seconds"})


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a variant has no number."""

    status: str
    verdict: Verdict
    message: str
    trace: str | None = None


@dataclass(slots=True)
class VariantState:
    """What is known of a variant while a run goes on; one entry a round in the lists."""

    variant: Variant
    target_rounds: int
    backend: Backend | None = None
    info: BackendInfo | None = None
    failure: Failure | None = None
    gate: GateResult | None = None
    rounds: list[RoundSample] = field(default_factory=list)
    counters: list[dict[str, float]] = field(default_factory=list)
    ledgers: list[MemoryLedger] = field(default_factory=list)
    #: Of the last round, where the backend tells them.
    steps: Sequence[StepRecord] = ()
    evidence: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    load_settings: dict[str, Any] = field(default_factory=dict)
    target_request_s: float | None = None
    hit_rates: list[float | None] = field(default_factory=list)
    num_warmups: int = 0
    base_bytes: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether every round was run and passed."""
        return self.failure is None and len(self.rounds) == self.target_rounds


def is_timing(counter: str) -> bool:
    """Whether a counter is a time (``host_us_per_step``, ``model_seconds``) and may vary.

    Every other counter is a count, which must come out the same in every round.
    """
    return not _TIME_UNITS.isdisjoint(re.split(r"[_.]", counter))


def combine_counters(
    rounds: Sequence[Mapping[str, float]],
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Combine the counters of a variant's rounds.

    Returns
    -------
    Counts of the first round with the median of each time, and the counts that differed, by
    round.
    """
    if not rounds:
        return {}, {}
    combined, unstable = {}, {}
    for name in rounds[0]:
        values = [float(row[name]) for row in rounds if name in row]
        combined[name] = float(np.median(values)) if is_timing(name) else values[0]
        if not is_timing(name) and len(set(values)) > 1:
            unstable[name] = values
    return combined, unstable


def build_records(
    states: Sequence[VariantState],
    settings: BenchSettings,
    environment: Environment,
    ceilings: Ceilings | None,
    common: Mapping[str, Any],
) -> list[Record]:
    """Make one record a variant.

    Parameters
    ----------
    common
        Fields that every record of the run shares (``run_id``, ``workload``, ``command``).
    """
    by_name = {state.variant.name: state for state in states}
    return [_record(state, by_name, settings, environment, ceilings, common) for state in states]


def _record(
    state: VariantState,
    by_name: Mapping[str, VariantState],
    settings: BenchSettings,
    environment: Environment,
    ceilings: Ceilings | None,
    common: Mapping[str, Any],
) -> Record:
    variant = state.variant
    counters, unstable = combine_counters(state.counters)
    status, verdict, error = _outcome(state)
    fields: dict[str, Any] = {
        **common,
        "variant": variant.name,
        "kind": variant.kind,
        "status": status,
        "verdict": verdict,
        "losslessness": variant.losslessness,
        "error": error,
        "trace": state.failure.trace if state.failure else None,
        "baseline": variant.baseline,
        "resolved_config": plain(variant.resolved_config),
        "techniques": plain(variant.techniques),
        "evidence": state.evidence,
        "counters": counters,
        "unstable_counters": unstable,
        "backend": plain(state.info) if state.info else {},
        "environment": environment.to_dict(),
        "gate": state.gate.to_dict() if state.gate else {},
        "num_rounds": len(state.rounds),
        "memory": _memory(state.ledgers),
        "ceilings": ceilings.to_dict() if ceilings else None,
        "load": _load(state, settings, common),
    }
    if variant.baseline is not None:
        fields["baseline_id"] = f"{common['run_id']}/{variant.baseline}"
    if state.failure is None and state.rounds:
        fields.update(_speed(state, counters, ceilings))
        if settings.slo is not None:
            fields["slo"] = goodput_over_rounds(state.rounds, settings.slo)
        if variant.baseline is not None:
            fields.update(_comparison(state, by_name[variant.baseline], settings))
        others = {
            other.variant.name: _comparison(state, other, settings)
            for other in by_name.values()
            if other.variant.kind == "baseline" and other is not state
        }
        fields["compared"] = {name: row for name, row in others.items() if "speedup" in row} or None
    return Record(**fields)


def _outcome(state: VariantState) -> tuple[str, Verdict, str | None]:
    if state.failure is not None:
        return state.failure.status, state.failure.verdict, state.failure.message
    if state.is_whole and state.gate is not None:
        return "OK", state.gate.verdict, None
    done = f"interrupted after {len(state.rounds)} of {state.target_rounds} rounds"
    return "INTERRUPTED", state.gate.verdict if state.gate else "INVALID", done


def _speed(
    state: VariantState, counters: Mapping[str, float], ceilings: Ceilings | None
) -> dict[str, Any]:
    wall_s = float(np.median([round_.wall_s for round_ in state.rounds]))
    dtype = state.info.dtype if state.info else ""
    return {
        "metrics": metrics_over_rounds(state.rounds),
        "steady": steady_metrics(state.rounds),
        "roofline": utilisation(counters, wall_s, ceilings, dtype),
        "samples": tuple(state.rounds),
        "timeline": timeline_of(state.steps),
    }


def _memory(ledgers: Sequence[MemoryLedger]) -> dict[str, Any] | None:
    """The ledger of the round with the highest peak."""
    if not ledgers:
        return None
    highest = max(ledgers, key=lambda ledger: ledger.measured_peak_bytes)
    return {"peak_memory_bytes": highest.measured_peak_bytes, **plain(highest)}


def _load(
    state: VariantState, settings: BenchSettings, common: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings of the load and what became of it; a failed row keeps no achieved rate."""
    declared = common.get("workload", {}).get("declared_hit_rate")
    found: dict[str, Any] = {
        "settings": state.load_settings,
        "num_warmups": state.num_warmups,
        "warmup_tokens": settings.warmup_tokens,
        "residency": settings.residency,
        "hit_rate": median(state.hit_rates),
        **({} if declared is None else {"declared_hit_rate": declared}),
    }
    achieved = [load_metrics(round_) for round_ in state.rounds]
    if state.failure is None and achieved:
        found["target_request_s"] = state.target_request_s
        found |= {name: median([row[name] for row in achieved]) for name in achieved[0]}
        if state.target_request_s is None:
            del found["sent_request_s"]  # the backend set the pace, not the load
    return found


def pair_rounds(variant: VariantState, baseline: VariantState) -> list[RoundPair]:
    """Pair the rounds that both sides ran, with the times of the requests both served."""
    pairs = []
    for ours, theirs in zip(variant.rounds, baseline.rounds, strict=False):
        speed, base = round_metrics(ours)["output_tok_s"], round_metrics(theirs)["output_tok_s"]
        if not speed or not base:
            continue
        our_s = {request.request_id: request.e2el_s for request in ours.served}
        their_s = {request.request_id: request.e2el_s for request in theirs.served}
        both = [key for key in their_s if key in our_s]
        pairs.append(
            RoundPair(
                speed / base,
                tuple(their_s[key] for key in both),
                tuple(our_s[key] for key in both),
            )
        )
    return pairs


def _comparison(
    state: VariantState, baseline: VariantState, settings: BenchSettings
) -> dict[str, Any]:
    """Speed-up, interval and the most that may be said; a note where there is none."""
    name = baseline.variant.name
    if baseline.failure is not None:
        return {"speedup_note": f"no speed-up: baseline {name} is {baseline.failure.verdict}"}
    if not (state.is_whole and baseline.is_whole):
        return {"speedup_note": "no speed-up: the run was interrupted"}
    pairs = pair_rounds(state, baseline)
    if not pairs:
        return {"speedup_note": f"no speed-up: no round of {name} brought tokens"}
    estimate = paired_ratio(pairs, resamples=settings.resamples, seed=settings.seed)
    p = speed_p_value(pairs)
    word = verdict_word(estimate.ci95, p)
    note = None
    if len(pairs) < _MIN_ROUNDS:
        rounds = "one paired round" if len(pairs) == 1 else f"{len(pairs)} paired rounds"
        word, note = "no difference shown", f"{rounds}; {_MIN_ROUNDS} are needed to show one"
    return {
        "speedup": estimate.ratio,
        "ci95": estimate.ci95,
        "p_value": p,
        "word": word,
        "speedup_note": note,
    }
