"""Dry runs for experiments: a scheduler from the configuration, and counted records."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from workbench.assemble import Limits, build_config, load_class
from workbench.bench.environment import Environment, collect_environment
from workbench.bench.gates import COUNTED
from workbench.bench.records import Record, ResultStore
from workbench.configuration import Composed
from workbench.core.request import Request
from workbench.core.sampling import SamplingParams
from workbench.core.workload import WorkloadRequest
from workbench.simulate.dry_run import DryRunResult
from workbench.slots.scheduler import Scheduler, SchedulerParts


def build_scheduler(components: Mapping[str, Mapping[str, Any]], limits: Limits) -> Scheduler:
    """Build a scheduler and what it drives, as an engine would have them, and no model.

    Parameters
    ----------
    components
        By slot, as :attr:`workbench.configuration.Composed.components`.
    limits
        All of them given; the pool is cut to whole blocks.
    """

    def build(slot: str, **runtime: Any) -> Any:
        cls, config = _class_and_config(components, slot)
        return cls(config, **runtime)

    cls, config = _class_and_config(components, "kv_cache")
    block_size = cls.choose_block_size(config, limits.max_model_len)
    kv_cache = build(
        "kv_cache", num_blocks=limits.kv_pool_tokens // block_size, block_size=block_size
    )
    parts = SchedulerParts(
        kv_cache=kv_cache,
        prefix_cache=build("prefix_cache", block_size=block_size, eviction=build("eviction")),
        offload=build("kv_offload", bytes_per_block=1),
        policy=build("policy"),
        admission=build("admission"),
        prefill=build("prefill"),
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
    )
    scheduler: Scheduler = build("scheduler", parts=parts)
    return scheduler


def _class_and_config(
    components: Mapping[str, Mapping[str, Any]], slot: str
) -> tuple[type[Any], Any]:
    node = dict(components[slot])
    cls = load_class(node.pop("_target_"))
    return cls, build_config(cls, slot, node)


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
                "engine": composed.components,
                "choices": {k: v for k, v in composed.choices.items() if k.startswith("engine/")},
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
