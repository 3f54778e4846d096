"""What a person and a script get to see of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from workbench.bench.gates import COUNTED, PASSED
from workbench.bench.jsonsafe import plain
from workbench.bench.metrics import METRICS
from workbench.bench.notes import footnotes
from workbench.bench.records import Record
from workbench.bench.run import VariantResult

_WIDE, _TIGHT = 110, 76
"""Console widths from which every column, or all but the wide ones, fit."""


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the table, shown on consoles of at least ``min_console_width`` columns, and with
    ``needs_slo`` only where a row was judged by an objective."""

    key: str
    header: str
    is_number: bool = True
    is_foldable: bool = False
    min_console_width: int = 0
    needs_slo: bool = False


_COLUMNS = (
    _Column("variant", "variant", is_number=False, is_foldable=True),
    _Column("output_tok_s", "output\ntok/s"),
    _Column("ttft_ms", "TTFT\np50 ms", min_console_width=_TIGHT),
    _Column("tpot_ms", "TPOT\np50 ms"),
    _Column("itl_ms", "ITL ms\np50/p99", min_console_width=_WIDE),
    _Column("goodput", "goodput\nreq/s, met", needs_slo=True),
    _Column("memory", "peak\nmemory", min_console_width=_TIGHT),
    _Column("mbu", "MBU\n%", min_console_width=_WIDE),
    _Column("speedup", "speed-up\n[95 % interval]", is_number=False),
    _Column("verdict", "correct?", is_number=False),
    _Column("evidence", "evidence", is_number=False, is_foldable=True, min_console_width=_WIDE),
)

_NONE = "-"
_MAX_EVIDENCE = 4


def records_of(results: Sequence[VariantResult | Record]) -> list[Record]:
    """Return the records of results, which may be records already."""
    return [r.record if isinstance(r, VariantResult) else r for r in results]


def print_table(results: Sequence[VariantResult | Record], console: Console | None = None) -> None:
    """Print the table and its footnotes.

    Parameters
    ----------
    console
        stdout by default; its width decides the form of the table.
    """
    console = console or Console()
    console.print(render_table(results, console.width))


def render_table(results: Sequence[VariantResult | Record], width: int = 120) -> RenderableType:
    """Build the table and its footnotes for a console of ``width`` columns."""
    records = records_of(results)
    has_slo = any(record.slo for record in records)
    shown = [c for c in _COLUMNS if width >= c.min_console_width and (has_slo or not c.needs_slo)]
    table = Table(
        title=_title(records),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in shown:
        table.add_column(
            column.header,
            justify="right" if column.is_number else "left",
            # Only these give way on a console that is too narrow for all.
            no_wrap=not column.is_foldable and width >= _TIGHT,
            overflow="fold",
        )
    for number, record in enumerate(records, start=1):
        cells = _cells(record, number)
        table.add_row(*(cells[column.key] for column in shown))
    has_evidence = any(column.key == "evidence" for column in shown)
    notes = Table.grid(padding=(0, 1))
    notes.add_column(justify="right", no_wrap=True)
    notes.add_column(overflow="fold")
    for mark, line in footnotes(records, with_evidence=not has_evidence):
        notes.add_row(mark, Text(line, overflow="fold"))
    for result in results:
        if isinstance(result, VariantResult) and result.store_error:
            notes.add_row("!", Text(f"no record written: {result.store_error}", overflow="fold"))
    return Group(table, notes)


def _title(records: Sequence[Record]) -> str:
    if not records:
        return "no variants"
    first = records[0]
    load: dict[str, Any] = next((r.load["settings"] for r in records if r.load.get("settings")), {})
    parts = [f"workload {first.workload.get('name', '?')}"]
    if load:
        parts.append(f"load {load_label(load)}")
    hardware = first.environment.get("hardware_slug")
    if hardware:
        parts.append(hardware)
    return " · ".join(parts)


def load_label(settings: Mapping[str, Any]) -> str:
    """Write the settings of a load in one line; what is unset or follows from them is left out."""
    kept = [
        f"{key.removeprefix('num_')} {value:g}"
        if isinstance(value, float)
        else f"{key.removeprefix('num_')} {value}"
        for key, value in settings.items()
        if key not in ("name", "target_request_s") and value is not None
    ]
    return f"{settings.get('name', '?')} ({', '.join(kept)})"


def _cells(record: Record, number: int) -> dict[str, Text]:
    metrics = record.metrics or {}
    memory = (record.memory or {}).get("peak_memory_bytes")
    mbu = (record.roofline or {}).get("mbu")
    itl = [quantity(_value(metrics, "itl_ms", key)) for key in ("p50", "p99")]
    return {
        "variant": Text(f"{number} {record.variant}"),
        "output_tok_s": Text(quantity(_value(metrics, "output_tok_s"))),
        "ttft_ms": Text(quantity(_value(metrics, "ttft_ms", "p50"))),
        "tpot_ms": Text(quantity(_value(metrics, "tpot_ms", "p50"))),
        "itl_ms": Text("/".join(itl) if metrics else _NONE),
        "goodput": Text(_goodput(record)),
        "memory": Text(byte_size(memory)),
        "mbu": Text(_NONE if mbu is None else f"{100 * mbu:.0f}"),
        "speedup": _speedup_cell(record),
        "verdict": _verdict_cell(record),
        "evidence": Text(_evidence(record)),
    }


def _goodput(record: Record) -> str:
    if record.slo is None:
        return _NONE
    share = record.slo["share_met"]
    met = _NONE if share is None else f"{100 * share:.0f} %"
    return f"{quantity(record.slo['goodput_request_s'])}\n{met}"


def _value(metrics: Mapping[str, Any], name: str, key: str = "value") -> float | None:
    value: float | None = metrics.get(name, {}).get(key)
    return value


def quantity(value: float | None) -> str:
    """Write a number with three to four significant figures."""
    if value is None:
        return _NONE
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def byte_size(value: int | float | None) -> str:
    """Write a number of bytes in binary units."""
    if value is None:
        return _NONE
    size = float(value)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _speedup_cell(record: Record) -> Text:
    if record.speedup is None:
        return Text("baseline" if record.baseline is None and record.is_passed else _NONE)
    interval = f" [{record.ci95[0]:.2f}, {record.ci95[1]:.2f}]" if record.ci95 else ""
    styles = {"faster": "green", "slower": "red"}
    cell = Text(f"{record.speedup:.2f}x{interval}\n")
    cell.append(record.word or "", style=styles.get(record.word or "", ""))
    return cell


def _verdict_cell(record: Record) -> Text:
    if record.verdict == COUNTED:
        return Text(record.verdict)
    if record.verdict not in PASSED:
        status = "" if record.status.startswith(record.verdict) else f"\n{record.status}"
        return Text(f"{record.verdict}{status}", style="bold red")
    cell = Text(record.verdict, style="green")
    ties = record.gate.get("num_ties")
    if ties:
        cell.append(f"\n{ties} ties")
    if record.status == "INTERRUPTED":
        cell.append("\nINTERRUPTED", style="yellow")
    return cell


def evidence_lines(record: Record) -> list[str]:
    """Each counter that proves a technique ran, by its short name; the record has the whole."""
    return [
        f"{name.rpartition('.')[2]} {value:,.0f}"
        if float(value).is_integer()
        else f"{name.rpartition('.')[2]} {value:,.3g}"
        for name, value in record.evidence.items()
    ]


def _evidence(record: Record) -> str:
    if not record.evidence:
        return _NONE if record.techniques else ""
    shown = evidence_lines(record)
    rest = len(shown) - _MAX_EVIDENCE
    return "\n".join(shown[:_MAX_EVIDENCE] + ([f"and {rest} more"] if rest > 0 else []))


def exit_status(results: Sequence[VariantResult | Record]) -> int:
    """Return 0 where every variant passed its gates and was recorded, 1 otherwise.

    A variant that could not run (out of memory, unsupported, interrupted) has passed no gate.
    """
    is_stored = all(r.store_error is None for r in results if isinstance(r, VariantResult))
    is_passed = all(record.is_passed for record in records_of(results))
    return 0 if results and is_passed and is_stored else 1


_LATENCIES = tuple(name for name, metric in METRICS.items() if metric.is_distribution)


def to_document(
    results: Sequence[VariantResult | Record], *, figure: str | None = None
) -> dict[str, Any]:
    """Build the JSON document of a run: plain data, no NaN and no infinity.

    Parameters
    ----------
    figure
        Path of the figure, where one was drawn.

    Returns
    -------
    ``schema``, ``variants`` and what they share. Speed is null where the verdict is ``FAILED`` or
    ``INVALID``, and so are the percentiles.
    """
    records = records_of(results)
    variants = []
    for result, record in zip(results, records, strict=True):
        variant = _variant_document(record)
        if isinstance(result, VariantResult):
            variant["record_file"] = str(result.record_file) if result.record_file else None
            variant["store_error"] = result.store_error
        variants.append(variant)
    first = records[0] if records else None
    document: dict[str, Any] = {
        "schema": 1,
        "run_id": first.run_id if first else None,
        "variants": variants,
        "workload": first.workload if first else {},
        "environment": first.environment if first else {},
        "ceilings": first.ceilings if first else None,
        "command": first.command if first else "",
        "figure": figure,
        "exit_status": exit_status(results),
    }
    return dict(plain(document))


def _variant_document(record: Record) -> dict[str, Any]:
    metrics = record.metrics or {}
    document: dict[str, Any] = {
        "name": record.variant,
        "kind": record.kind,
        "status": record.status,
        "error": record.error,
        "verdict": record.verdict,
        "ties": record.gate.get("num_ties", 0),
        "output_tok_s": _value(metrics, "output_tok_s"),
        "total_tok_s": _value(metrics, "total_tok_s"),
        "request_s": _value(metrics, "request_s"),
    }
    for name in _LATENCIES:
        keys = ("mean", "std", "p50", "p90", "p95", "p99", "n")
        document[name] = {key: _value(metrics, name, key) for key in keys}
    if record.slo is not None:
        document["slo"] = record.slo
    document |= {
        "steady": record.steady,
        "peak_memory_bytes": (record.memory or {}).get("peak_memory_bytes"),
        "memory": record.memory,
        "roofline": record.roofline,
        "baseline": record.baseline,
        "speedup": record.speedup,
        "ci95": list(record.ci95) if record.ci95 else None,
        "p_value": record.p_value,
        "compared": record.compared,
        "word": record.word,
        "speedup_note": record.speedup_note,
        "losslessness": record.losslessness,
        "techniques": sorted(record.techniques),
        "evidence": record.evidence,
        "counters": record.counters,
        "unstable_counters": record.unstable_counters,
        "rounds": record.num_rounds,
        "load": record.load,
        "backend": record.backend,
        "record_id": record.record_id,
    }
    return document
