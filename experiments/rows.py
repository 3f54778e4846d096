"""What experiments read off the records of a measured run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workbench.bench.records import Record
from workbench.bench.run import VariantResult
from workbench.core.errors import WorkbenchError


def value(record: Record, metric: str, statistic: str = "value") -> float:
    """One number of a record whose gates passed.

    Parameters
    ----------
    metric, statistic
        As in :data:`workbench.bench.metrics.METRICS`; a rate has ``value``, a latency has ``p50``
        and the like.
    """
    assert record.metrics is not None, f"{record.variant} has no speed"
    return float(record.metrics[metric][statistic])


def wall_s(record: Record) -> float:
    """Seconds of a round, the median over rounds."""
    return float(np.median([sample.wall_s for sample in record.samples]))


def hit_rate(record: Record) -> float:
    """Share of the prompt tokens that came from the cache."""
    return float(record.load["hit_rate"] or 0.0)


def cache_name(record: Record) -> str:
    """What a row's prefix cache is called in tables and figures."""
    return "no cache" if record.baseline is None else record.variant.removesuffix("_cache")


def interval(record: Record) -> str:
    """The interval of a speed-up, as a table shows it."""
    return f"[{record.ci95[0]:.2f}, {record.ci95[1]:.2f}]" if record.ci95 else "-"


def records_of(results: Sequence[VariantResult]) -> list[Record]:
    """The records of a run, the base first."""
    return [result.record for result in results]


def file_of(results: Sequence[VariantResult]) -> Path:
    """Where a run's records were written.

    Raises
    ------
    WorkbenchError
        They could not be written.
    """
    for result in results:
        if result.record_file is not None:
            return result.record_file
    raise WorkbenchError(f"no record could be written: {results[0].store_error}.")
