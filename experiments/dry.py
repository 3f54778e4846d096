"""Dry runs for experiments: what may be asked of them, and counted records."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from workbench.assemble import SCHEDULER_SLOTS, Limits
from workbench.bench.environment import Environment, collect_environment
from workbench.bench.gates import COUNTED
from workbench.bench.records import Record, ResultStore
from workbench.configuration import Composed, load_markers, technique_names
from workbench.core.errors import ConfigError, unknown_name
from workbench.core.request import Request
from workbench.core.sampling import SamplingParams
from workbench.core.workload import WorkloadRequest
from workbench.simulate.dry_run import DryRunResult


def check_overrides(
    overrides: Sequence[str], options: type[Any], keys: Sequence[str], varied: Mapping[str, str]
) -> None:
    """Refuse what a user asks for and a run without a model would not look at.

    Parameters
    ----------
    overrides
        The user's own.
    options
        Dataclass of the experiment's own options.
    keys
        Groups and keys of the configuration (``seed``, ``limits.max_num_seqs``) that the experiment
        reads, beside the engine's slots of ``SCHEDULER_SLOTS``.
    varied
        By slot, the experiment's own option that fills it.

    Raises
    ------
    ConfigError
        An option that nothing reads, with those that are.
    """
    valid = [*keys, "technique", *(f"engine.{slot}" for slot in SCHEDULER_SLOTS)]
    markers = load_markers()
    filled: list[str] = []
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0].partition("@")[0]
        head, *rest = key.replace("/", ".").split(".")
        name = ".".join([head, *rest[:1]])
        if not {head, name} & set(valid):
            own = [item.name for item in dataclasses.fields(options)]
            raise unknown_name("option of a run without a model", name, [*own, *valid])
        if key.startswith("engine/"):
            filled.append(rest[0])
    for technique in technique_names(overrides):
        if technique in markers:  # others are told when the configuration is composed
            slots = markers[technique].slots
            idle = [slot for slot in slots if slot not in SCHEDULER_SLOTS]
            if idle:
                raise ConfigError(
                    f"technique {technique!r} fills {', '.join(idle)}, and a run without a model "
                    f"has none. Slots that it has: {', '.join(SCHEDULER_SLOTS)}."
                )
            filled += slots
    for slot in filled:
        if slot in varied:
            raise ConfigError(f"slot {slot!r} is filled by the experiment: use {varied[slot]}=...")


def make_request(
    request_id: str, prompt: Sequence[int], max_tokens: int, priority: int = 0
) -> Request:
    """A request that generates exactly ``max_tokens`` tokens."""
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id, list(prompt), sampling, priority=priority)


def at_once(
    requests: Iterable[WorkloadRequest],
    priority_of: Callable[[int], int] = lambda index: 0,
) -> Iterator[tuple[int, Request]]:
    """All requests of a workload at step 0, in their order."""
    for index, request in enumerate(requests):
        yield (
            0,
            make_request(
                request.request_id,
                request.prompt_token_ids,
                request.max_tokens,
                priority_of(index),
            ),
        )


def summary(result: DryRunResult) -> dict[str, float]:
    """What a dry run counted, in a few numbers.

    Returns
    -------
    By name: tokens, shares of 1, waits and turnarounds in steps, and (the two with ``us``) the
    host's time of a ``schedule()``.
    """
    waited = [line.waited for line in result.timelines.values()]
    turnaround = [line.turnaround for line in result.timelines.values()]
    prompt_tokens = result.num_prompt_tokens
    used = result.kv_used_tokens
    return {
        "requests": len(waited),
        "steps": result.num_steps,
        "idle_steps": result.num_idle_steps,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": result.num_cached_tokens,
        "hit_rate": result.num_cached_tokens / prompt_tokens if prompt_tokens else 0.0,
        "mean_waited_steps": float(np.mean(waited)),
        "p99_waited_steps": float(np.percentile(waited, 99)),
        "mean_turnaround_steps": float(np.mean(turnaround)),
        "p99_turnaround_steps": float(np.percentile(turnaround, 99)),
        "mean_kv_waste": result.mean_waste(),
        "kv_waste_at_fullest": result.waste_at_fullest(),
        "mean_kv_used_tokens": float(np.mean(used)) if used else 0.0,
        "max_kv_used_tokens": max(used, default=0),
        "schedule_us_median": float(np.median(result.schedule_us)),
        "schedule_us_p99": float(np.percentile(result.schedule_us, 99)),
    }


@dataclass(slots=True)
class DryRecorder:
    """Writes the counted records of one experiment, all of them one run.

    Attributes
    ----------
    results_dir
        Folder of the records.
    command
        Command line, for the records.
    """

    results_dir: str
    command: str
    run_id: str = field(
        default_factory=lambda: f"{datetime.now():%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    )
    records: list[Record] = field(default_factory=list)
    file: Path | None = None
    _environment: Environment | None = None

    def add(
        self,
        variant: str,
        result: DryRunResult,
        composed: Composed,
        limits: Limits,
        workload: Mapping[str, Any],
        load: Mapping[str, Any],
        more: Mapping[str, float] | None = None,
    ) -> Record:
        """Record one dry run.

        Parameters
        ----------
        workload
            ``name``, and what says which requests they were.
        load
            How they were sent.
        more
            Counts that :func:`summary` lacks.
        """
        environment = self._environment or collect_environment("cpu")
        self._environment = environment
        counts = summary(result) | dict(more or {})
        record = Record(
            run_id=self.run_id,
            variant=variant,
            kind="dry_run",
            status="OK",
            verdict=COUNTED,
            resolved_config={
                "engine": {slot: composed.components[slot] for slot in SCHEDULER_SLOTS},
                "choices": {
                    f"engine/{slot}": composed.choices[f"engine/{slot}"] for slot in SCHEDULER_SLOTS
                },
                "limits": dataclasses.asdict(limits),
            },
            counters={
                **{f"dry_run.{name}": value for name, value in counts.items()},
                **result.counters,
            },
            environment=environment.to_dict(),
            workload=dict(workload),
            load={"settings": dict(load)},
            num_rounds=1,
            command=self.command,
        )
        self.file = ResultStore(self.results_dir, environment.hardware_slug).append(record)
        self.records.append(record)
        return record


def count(record: Record, name: str) -> float:
    """A count of a dry run's record, by its name in :func:`summary`."""
    return record.counters[f"dry_run.{name}"]
