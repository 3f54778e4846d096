"""The main job: measure variants side by side over the same requests.

Every variant is built, warmed up and run for a first round whose outputs go through the gates;
the rounds then alternate (A B A B), so that a drift of the machine meets all of them alike. What
one variant does wrong becomes its record and stops no other.
"""

from __future__ import annotations

import gc
import secrets
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from workbench.bench.assess import Failure, VariantState, build_records
from workbench.bench.environment import Environment, collect_environment
from workbench.bench.gates import (
    GateResult,
    MarginFn,
    Outputs,
    check_errors,
    check_evidence,
    check_exact,
    check_quality,
)
from workbench.bench.hit_rate import achieved_hit_rate, check_hit_rate, check_use
from workbench.bench.load import LoadGenerator
from workbench.bench.metrics import RoundSample, collect
from workbench.bench.progress import NoProgress, Progress
from workbench.bench.records import Record, ResultStore, defer_interrupt
from workbench.bench.roofline import Ceilings
from workbench.bench.settings import BenchSettings, Variant
from workbench.core.backend import Backend, BackendInfo, MemoryLedger, TokenEvent
from workbench.core.errors import UnsupportedError, WorkbenchError
from workbench.core.memory import MemoryProbe
from workbench.core.workload import WorkloadRequest

__all__ = [
    "BenchSettings",
    "Check",
    "LoadFactory",
    "ReferenceFn",
    "RoundTimeout",
    "Variant",
    "VariantResult",
    "run_bench",
]

LoadFactory = Callable[[Sequence[WorkloadRequest]], LoadGenerator]
ReferenceFn = Callable[[Sequence[WorkloadRequest]], Outputs]
Check = Callable[[Outputs, Outputs, BackendInfo], GateResult]
"""``(outputs, reference, info) -> GateResult``: the gate of a losslessness class but ``exact``."""


@dataclass(frozen=True, slots=True)
class VariantResult:
    """A variant's record, its outputs and where the record was written.

    Attributes
    ----------
    outputs
        Token ids by request id, of the first round.
    store_error
        Why the record could not be written.
    """

    record: Record
    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    record_file: Path | None = None
    store_error: str | None = None


class RoundTimeout(BaseException):
    """A round ran past its limit.

    No ``Exception``: a backend that turns those into failed requests would go on for ever.
    """


def run_bench(
    variants: Sequence[Variant],
    requests: Sequence[WorkloadRequest],
    load_factory: LoadFactory,
    *,
    reference: ReferenceFn,
    margin_fn: MarginFn | None = None,
    checks: Mapping[str, Check] | None = None,
    settings: BenchSettings | None = None,
    workload: Mapping[str, Any] | None = None,
    store: ResultStore | None = None,
    environment: Environment | None = None,
    ceilings: Ceilings | None = None,
    progress: Progress | None = None,
    command: str = "",
    clock: Callable[[], float] = time.perf_counter,
) -> list[VariantResult]:
    """Measure ``variants`` over ``requests`` and record what was found.

    Parameters
    ----------
    variants
        In the order of the table; each ``baseline`` names another of them.
    load_factory
        Makes a fresh load of requests for every run, such as ``partial(Closed, concurrency=8)``.
    reference
        Gives the greedy reference outputs by request id; called once, before anything is timed.
    margin_fn
        Margins of the reference, asked for where ties are allowed (see :func:`check_exact`).
    checks
        Gate by losslessness class, for those but ``exact``. Without one, ``distributional`` is held
        to the exact tokens of greedy requests, and ``lossy`` to the variant's quality bound.
    workload
        ``name``, ``digest`` and settings of the workload, for the record; a
        ``declared_hit_rate`` in it must be reached by every variant with a prefix cache.
    store
        Where the records go; None keeps them in memory.
    ceilings
        Of the device, for MBU and MFU.
    command
        Command line, for the record.
    clock
        What the backends' event times are read from.

    Returns
    -------
    One result a variant, in order.

    Raises
    ------
    ValueError
        The request for a run is wrong (names, rounds, no requests).
    KeyboardInterrupt
        After the records of what was measured by then were written.
    """
    settings = settings or BenchSettings()
    _check_request(variants, requests)
    job = _Job(requests, load_factory, settings, margin_fn, dict(checks or {}), clock)
    job.declared_hit_rate = (workload or {}).get("declared_hit_rate")
    job.progress = progress or NoProgress()
    states = [VariantState(variant, settings.rounds_of(variant)) for variant in variants]
    run_id = f"{datetime.now():%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    common = {
        "run_id": run_id,
        "workload": dict(workload or {"name": "unnamed"}),
        "command": command,
    }

    def finish() -> list[VariantResult]:
        seen = environment or collect_environment(_device_of(states))
        records = build_records(states, settings, seen, ceilings, common)
        return [_store(store, record, state) for record, state in zip(records, states, strict=True)]

    try:
        job.reference_of(reference, states)
        for index in range(max(state.target_rounds for state in states)):
            for state in states:
                if state.failure is None and index < state.target_rounds:
                    job.run_round(state, index)
    except KeyboardInterrupt:
        with defer_interrupt():  # a second Ctrl-C waits for the records
            finish()
        raise
    else:
        with defer_interrupt():
            return finish()
    finally:
        job.progress.close()
        for state in states:
            job.close(state)


def _check_request(variants: Sequence[Variant], requests: Sequence[WorkloadRequest]) -> None:
    names = [variant.name for variant in variants]
    if not names:
        raise ValueError("there is no variant to measure.")
    if not requests:
        raise ValueError("the workload has no requests.")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two variants are called {name!r}; names must be unique.")
    for variant in variants:
        if variant.baseline is not None and variant.baseline not in names:
            raise ValueError(
                f"variant {variant.name!r} is compared with {variant.baseline!r}, which is not "
                f"measured. Valid: {', '.join(names)}."
            )
        if variant.baseline == variant.name:
            raise ValueError(f"variant {variant.name!r} is its own baseline.")


def _device_of(states: Sequence[VariantState]) -> str:
    devices = [state.info.device for state in states if state.info is not None]
    return next((device for device in devices if not device.startswith("cpu")), "cpu")


def _store(store: ResultStore | None, record: Record, state: VariantState) -> VariantResult:
    """Append one record; a disk that is full costs the record, not the table."""
    if store is None:
        return VariantResult(record, state.outputs)
    try:
        return VariantResult(record, state.outputs, record_file=store.append(record))
    except OSError as error:
        return VariantResult(record, state.outputs, store_error=f"{store.path}: {error}")


class _Job:
    """What every round of a run shares."""

    def __init__(
        self,
        requests: Sequence[WorkloadRequest],
        load_factory: LoadFactory,
        settings: BenchSettings,
        margin_fn: MarginFn | None,
        checks: dict[str, Check],
        clock: Callable[[], float],
    ) -> None:
        self.requests = list(requests)
        self.load_factory = load_factory
        self.settings = settings
        self.margin_fn = margin_fn
        self.checks = checks
        self.clock = clock
        self.progress: Progress = NoProgress()
        self.reference: Outputs = {}
        self.declared_hit_rate: float | None = None

    def reference_of(self, reference: ReferenceFn, states: Sequence[VariantState]) -> None:
        """Compute the reference; without one no variant can be judged."""
        self.progress.begin("reference", len(self.requests), self.clock())
        try:
            self.reference = reference(self.requests)
        except WorkbenchError:
            raise
        except Exception as error:
            message = f"the reference could not be computed: {_describe(error)}"
            for state in states:
                state.failure = Failure("INVALID_EVIDENCE", "INVALID", message)
            self.progress.note(message)

    def run_round(self, state: VariantState, index: int) -> None:
        """Run one round of one variant; what goes wrong becomes its failure."""
        name = state.variant.name
        try:
            if state.backend is None:
                self._build(state)
            what = f"{name} · round {index + 1}/{state.target_rounds}"
            self.progress.begin(what, len(self.requests), self.clock())
            self._measure(state, index)
        except (RoundTimeout, Exception) as error:
            state.failure = _failure_of(error)
        if state.failure is not None:
            self.progress.note(f"{name}: {state.failure.status}: {state.failure.message}")
        if state.failure is not None or self.settings.residency == "one":
            self.close(state)
            gc.collect()  # the next build finds the memory free

    def close(self, state: VariantState) -> None:
        """Free the backend of a variant; one that cannot be closed stops nothing."""
        backend, state.backend = state.backend, None
        if backend is None:
            return
        try:
            backend.close()
        except Exception as error:
            self.progress.note(f"{state.variant.name}: close failed: {_describe(error)}")

    def _build(self, state: VariantState) -> None:
        self.progress.begin(f"{state.variant.name} · build", 0, self.clock())
        before = _held_bytes()
        state.backend = state.variant.build()
        state.info = state.backend.info()
        state.base_bytes = before.get(torch.device(state.info.device).type, 0)
        prepare = getattr(state.backend, "prepare", None)
        if prepare is not None:
            self.progress.begin(f"{state.variant.name} · calibration", 0, self.clock())
            prepare(self.requests, self.load_factory(self.requests).concurrency)
            state.info = state.backend.info()
        num_warm = self._num_warmups(state.info)
        state.num_warmups = num_warm
        if not num_warm:
            return
        most = self.settings.warmup_tokens
        short = [
            replace(request, max_tokens=min(request.max_tokens, most), after=None)
            for request in self.requests[:num_warm]
        ]
        self.progress.begin(f"{state.variant.name} · warm-up", len(short), self.clock())
        self._serve(state.backend, self.load_factory(self.requests).for_warmup(short))

    def _num_warmups(self, info: BackendInfo) -> int:
        """As many as asked for, or as the load and the backend have in flight together."""
        if self.settings.warmup is not None:
            return min(self.settings.warmup, len(self.requests))
        most = self.load_factory(self.requests).concurrency
        for key in ("max_num_seqs", "batch_size"):
            if isinstance(info.details.get(key), int):
                most = min(most, max(1, info.details[key]))
        return min(most, len(self.requests))

    def _serve(
        self, backend: Backend, load: LoadGenerator
    ) -> tuple[list[TokenEvent], float, float]:
        """Run the backend over a fresh load; its events, start and end."""
        events: list[TokenEvent] = []
        limit, progress = self.settings.timeout_s, self.progress
        start_s = self.clock()

        def on_event(event: TokenEvent) -> None:
            events.append(event)
            progress.on_event(event)
            if limit is not None and event.time_s - start_s > limit:
                raise RoundTimeout(f"the round ran past its limit of {limit:g} s.")

        # The load's clock starts at the first poll: what a backend tidies up before it asks for
        # work (garbage, a manager of its own) is no part of serving.
        backend.run(load, load.watch(on_event))
        end_s = self.clock()
        return events, end_s if load.start_s is None else load.start_s, end_s

    def _measure(self, state: VariantState, index: int) -> None:
        backend = state.backend
        assert backend is not None and state.info is not None
        gc.collect(1)  # young garbage of one variant is not swept on the clock of the next
        probe = MemoryProbe(state.info.device)
        probe.reset_peak()
        load = self.load_factory(self.requests)
        events, start_s, end_s = self._serve(backend, load)
        ledger = backend.memory() or MemoryLedger(
            predicted={},
            measured_peak_bytes=max(0, probe.peak_bytes() - state.base_bytes),
            base_bytes=state.base_bytes,
        )
        counters = dict(backend.counters())
        step_records = getattr(backend, "step_records", None)
        if step_records is not None:
            state.steps = step_records()
        try:
            sample, outputs = collect(
                events, self.requests, load.release_s, load.taken_s, start_s, end_s
            )
        except ValueError as error:
            state.failure = Failure("INVALID_EVIDENCE", "INVALID", str(error))
            return
        state.evidence, gate = self._judge(state, sample, outputs, counters)
        # Of rounds that passed, the one with the most ties speaks for all.
        if state.gate is None or not gate.is_passed or len(gate.ties) > len(state.gate.ties):
            state.gate = gate
        if not gate.is_passed:
            status = "FAILED_CORRECTNESS" if gate.verdict == "FAILED" else "INVALID_EVIDENCE"
            message = gate.message if index == 0 else f"round {index + 1}: {gate.message}"
            state.failure = Failure(status, gate.verdict, message)
        if index == 0:
            state.outputs, state.load_settings = outputs, load.describe()
            state.info = backend.info()  # some only know what they used once they have run
        state.target_request_s = load.target_request_s
        state.rounds.append(sample)
        state.counters.append(counters)
        state.ledgers.append(ledger)

    def _judge(
        self,
        state: VariantState,
        sample: RoundSample,
        outputs: dict[str, tuple[int, ...]],
        counters: Mapping[str, float],
    ) -> tuple[dict[str, float], GateResult]:
        """Every gate, the output's first: evidence found, and the verdict."""
        evidence, no_evidence = check_evidence(state.variant.techniques, counters)
        if no_evidence is not None and self.declared_hit_rate == 0:
            # No hit is what such a workload is for; the gates of the hit rate and of the cache's
            # use stand for the proof.
            rest = {k: v for k, v in state.variant.techniques.items() if not _caches_prefixes(v)}
            no_evidence = check_evidence(rest, counters)[1]
        errors = {r.request_id: r.error for r in sample.requests if r.error is not None}
        refused = check_errors(errors)
        if refused is not None:
            return evidence, refused
        # The same tokens as in a round that passed need no second look.
        is_known = state.gate is not None and state.outputs == outputs
        gate = state.gate if is_known and state.gate else self._check_outputs(state, outputs)
        hit_rate = achieved_hit_rate(counters, sum(r.num_prompt_tokens for r in sample.served))
        state.hit_rates.append(hit_rate)
        if gate.is_passed and no_evidence is not None:
            return evidence, no_evidence
        if gate.is_passed and state.variant.has_prefix_cache:
            declared = self.declared_hit_rate
            unused = check_use(declared, counters)
            return evidence, check_hit_rate(declared, hit_rate) or unused or gate
        return evidence, gate

    def _check_outputs(self, state: VariantState, outputs: Outputs) -> GateResult:
        assert state.info is not None
        lossless = state.variant.losslessness
        check = self.checks.get(lossless)
        if lossless == "exact" or (lossless == "distributional" and check is None):
            gate = check_exact(
                outputs,
                self.reference,
                dtype=state.info.dtype,
                device=state.info.device,
                margin_fn=self.margin_fn,
                epsilon=self.settings.epsilon,
                fixed_length={r.request_id for r in self.requests if r.ignore_eos},
            )
            # The requests are greedy: their distribution is one token.
            is_weaker = gate.is_passed and lossless == "distributional"
            return replace(gate, verdict="distributional") if is_weaker else gate
        if lossless == "lossy" and check is None:
            return check_quality(
                outputs,
                self.reference,
                bound=state.variant.quality_bound,
                margin_fn=self.margin_fn,
                fixed_length={r.request_id for r in self.requests if r.ignore_eos},
            )
        if check is None:
            known = ", ".join(sorted({"exact", "distributional", *self.checks}))
            return GateResult(
                "INVALID",
                f"no check was given for losslessness {lossless!r}, so its outputs cannot be "
                f"judged. Checks at hand: {known}.",
            )
        return check(outputs, self.reference, state.info)


def _caches_prefixes(marker: Mapping[str, Any]) -> bool:
    return "prefix_cache" in marker.get("slots", {})


def _held_bytes() -> dict[str, int]:
    """Bytes held now by device type, for backends that keep no ledger."""
    held = {"cpu": MemoryProbe("cpu").current_bytes()}
    if torch.cuda.is_available():
        held["cuda"] = torch.cuda.memory_allocated()
    return held


def _describe(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _failure_of(error: BaseException) -> Failure:
    """Sort an exception into the taxonomy."""
    if isinstance(error, RoundTimeout):
        return Failure("TIMEOUT", "INVALID", str(error))
    if isinstance(error, UnsupportedError | ModuleNotFoundError):
        return Failure("UNSUPPORTED", "INVALID", str(error))
    text = _describe(error)
    is_oom = isinstance(error, MemoryError | torch.OutOfMemoryError)
    # The CPU allocator of torch raises a RuntimeError that says so.
    if is_oom or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return Failure("OOM", "INVALID", text)
    where = traceback.extract_tb(error.__traceback__)
    tail = f" ({Path(where[-1].filename).name}:{where[-1].lineno})" if where else ""
    return Failure("ERROR", "INVALID", text + tail, "".join(traceback.format_exception(error)))
