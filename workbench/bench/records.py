"""One record a variant, kept in append-only JSONL files.

A record states its own validity: it refuses to hold a speed when its gate did not pass.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from workbench.bench.gates import COUNTED, PASSED, Verdict
from workbench.bench.jsonsafe import plain, to_json
from workbench.bench.metrics import RoundSample

SCHEMA = 1

STATUSES: dict[str, str] = {
    "OK": "every gate passed",
    "FAILED_CORRECTNESS": "wrong, missing or refused output",
    "INVALID_EVIDENCE": "a technique did not run, or the run could not be judged",
    "ERROR": "the backend raised an error",
    "OOM": "out of memory",
    "TIMEOUT": "a round ran past its limit",
    "UNSUPPORTED": "this machine, library or model cannot run it",
    "INTERRUPTED": "stopped by the user; what was measured by then is kept",
}
_SPEED_FIELDS = (
    "metrics",
    "steady",
    "slo",
    "speedup",
    "ci95",
    "p_value",
    "compared",
    "roofline",
    "samples",
    "timeline",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Everything that is known of one variant in one run.

    Attributes
    ----------
    status, error, trace
        From ``STATUSES``; the message of the failure, and where it was raised.
    verdict
        Of the correctness and evidence gates.
    metrics, steady, slo, speedup, ci95, p_value, compared, word, roofline, samples, timeline
        Speed; None (samples: empty) unless the verdict passed. ``speedup`` is the variant's
        output tok/s over that of ``baseline``, paired by round; ``word`` is the most that may be
        said of it. ``metrics`` are of whole rounds, ramp and drain included.
    steady
        The same metrics over the steady window, and where it lies; None where there is none.
    slo
        Bounds that the run was judged by, and goodput; None for a run without any.
    compared
        The same comparison with every variant of kind ``baseline``, by name.
    baseline, baseline_id
        Name of the variant compared with, and the id of its record.
    evidence
        The counters that prove that the techniques ran.
    counters, unstable_counters
        Of the first round; counts that were not the same in every round, by round.
    memory
        Byte ledger of the round with the highest peak, with ``peak_memory_bytes``.
    samples
        Raw times, one entry a round.
    timeline
        Steps of the last round: sums by kind, and a bounded sample of single ones; None for a
        backend that does not tell its steps.
    """

    run_id: str
    variant: str
    kind: str
    status: str
    verdict: Verdict
    losslessness: str = "exact"
    error: str | None = None
    trace: str | None = None
    baseline: str | None = None
    baseline_id: str | None = None
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    resolved_config: dict[str, Any] = field(default_factory=dict)
    techniques: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    unstable_counters: dict[str, list[float]] = field(default_factory=dict)
    backend: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    num_rounds: int = 0
    metrics: dict[str, Any] | None = None
    steady: dict[str, Any] | None = None
    slo: dict[str, Any] | None = None
    speedup: float | None = None
    ci95: tuple[float, float] | None = None
    p_value: float | None = None
    word: str | None = None
    speedup_note: str | None = None
    compared: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    ceilings: dict[str, Any] | None = None
    roofline: dict[str, Any] | None = None
    timeline: dict[str, Any] | None = None
    samples: tuple[RoundSample, ...] = ()
    command: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Hold the rules of evidence."""
        if self.status not in STATUSES:
            raise ValueError(f"unknown status {self.status!r}. Valid: {', '.join(STATUSES)}.")
        if self.verdict not in get_args(Verdict):
            raise ValueError(f"unknown verdict {self.verdict!r}.")
        if self.verdict not in PASSED:
            kept = [name for name in _SPEED_FIELDS if getattr(self, name) not in (None, ())]
            if kept:
                raise ValueError(
                    f"variant {self.variant!r} has verdict {self.verdict}, so its speed is void; "
                    f"it must not carry {', '.join(kept)}."
                )
        may_be_ok = self.verdict in (*PASSED, COUNTED)
        if (self.status == "OK") != may_be_ok and self.status != "INTERRUPTED":
            raise ValueError(f"status {self.status} cannot go with verdict {self.verdict}.")
        if self.speedup is not None and self.baseline is None:
            raise ValueError("a speed-up must name its baseline.")

    @property
    def record_id(self) -> str:
        """Unique name of the record: its run and its variant."""
        return f"{self.run_id}/{self.variant}"

    @property
    def is_passed(self) -> bool:
        """Whether every gate passed and the run is whole."""
        return self.status == "OK"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        data: dict[str, Any] = {"schema": self.schema, "record_id": self.record_id}
        for item in fields(self):
            if item.name not in ("samples", "schema"):
                data[item.name] = plain(getattr(self, item.name))
        data["samples"] = [sample.to_dict() for sample in self.samples]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """Rebuild a record; keys of later minor versions are ignored.

        Raises
        ------
        ValueError
            The schema is newer than this code, or the data breaks the rules of a record.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"record schema {data.get('schema')!r} is not {SCHEMA}")
        known = {item.name for item in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        values["samples"] = tuple(RoundSample.from_dict(row) for row in data.get("samples", ()))
        if values.get("ci95") is not None:
            values["ci95"] = tuple(values["ci95"])
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"not a record: {error}") from error


@contextmanager
def defer_interrupt() -> Iterator[None]:
    """Hold back Ctrl-C while a line is written, and raise it right after.

    Only the main thread gets KeyboardInterrupt, so elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)
    if previous is None:  # set by other code than Python's, which cannot be put back
        yield
        return
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if caught:
            signal.raise_signal(signal.SIGINT)


class ResultStore:
    """The records under one folder, a file a machine and day.

    Parameters
    ----------
    results_dir
        Made on the first append.
    hardware_slug
        Machine's short name, part of the file name.
    """

    def __init__(self, results_dir: str | Path, hardware_slug: str = "unknown") -> None:
        self.results_dir = Path(results_dir)
        self.hardware_slug = hardware_slug

    @property
    def path(self) -> Path:
        """The file that an append goes to today."""
        day = datetime.now().astimezone().date().isoformat()
        return self.results_dir / f"{self.hardware_slug}_{day}.jsonl"

    def append(self, record: Record) -> Path:
        """Append one line, whole or not at all.

        The line goes out in one write to a file opened for appending, is synced, and is taken
        back should the disk be full in the middle of it. A tail that another program left
        without a line end is closed first, so that it spoils no record but itself.

        Returns
        -------
        The file written.
        """
        line = (to_json(record.to_dict()) + "\n").encode()
        self.results_dir.mkdir(parents=True, exist_ok=True)
        path = self.path
        with defer_interrupt():
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                _lock(descriptor)
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line
                _write_whole(descriptor, line, size)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return path

    def read(self, path: str | Path | None = None) -> tuple[list[Record], list[str]]:
        """Read every record of one file, or of every file of the folder.

        Returns
        -------
        The records in the order written, and one message a line that is none (a broken tail, a
        foreign line, a record of a newer schema). A bad line hides no other.
        """
        if path is not None:
            paths = [Path(path)]
        else:
            paths = sorted(self.results_dir.glob("*.jsonl"), key=lambda p: (p.stem[-10:], p.name))
        records: list[Record] = []
        problems: list[str] = []
        for file in paths:
            for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
                if not line.strip():
                    continue
                try:
                    data = json.loads(line)
                    if not isinstance(data, dict):
                        raise ValueError("not an object")
                    records.append(Record.from_dict(data))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    problems.append(f"{file}:{number}: not a readable record ({error})")
        return records, problems

    def query(self, **wanted: Any) -> list[Record]:
        """Return the records whose fields equal ``wanted``.

        Parameters
        ----------
        **wanted
            Field of :class:`Record` to value; ``workload`` compares the workload's name,
            ``digest`` its digest, ``hardware`` the machine's slug.
        """
        valid = {item.name for item in fields(Record)} | {"digest", "hardware", "record_id"}
        unknown = sorted(set(wanted) - valid)
        if unknown:
            raise ValueError(
                f"unknown record field {unknown[0]!r}. Valid: {', '.join(sorted(valid))}."
            )
        return [
            record
            for record in self.read()[0]
            if all(_field(record, key) == value for key, value in wanted.items())
        ]

    def baseline_for(self, record: Record) -> Record | None:
        """Return the record that ``record`` was, or may be, compared with.

        That is the one named by ``baseline_id``; failing that the latest passed record of the
        baseline's name with the same machine, workload digest and load.
        """
        if record.baseline is None:
            return None
        if record.baseline_id is not None:
            named = self.query(record_id=record.baseline_id)
            if named:
                return named[-1]
        alike = [
            other
            for other in self.query(variant=record.baseline, status="OK")
            if all(_field(other, key) == _field(record, key) for key in ("digest", "hardware"))
            and _load_settings(other) == _load_settings(record)
        ]
        return alike[-1] if alike else None


def _load_settings(record: Record) -> dict[str, Any]:
    return dict(record.load.get("settings", {}))


def _field(record: Record, key: str) -> Any:
    if key == "workload":
        return record.workload.get("name")
    if key == "digest":
        return record.workload.get("digest")
    if key == "hardware":
        return record.environment.get("hardware_slug")
    return getattr(record, key)


def _lock(descriptor: int) -> None:
    """Keep other writers out until the file is closed, where the platform can."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems have no locks
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _write_whole(descriptor: int, line: bytes, size: int) -> None:
    """Write ``line`` at the end, or leave the file as it was."""
    try:
        written = os.write(descriptor, line)
    except OSError:
        os.ftruncate(descriptor, size)
        raise
    if written != len(line):
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes could be written")
