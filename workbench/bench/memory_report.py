"""The byte ledger of recorded runs as a person sees it: predicted against found, row by row.

``python -m workbench report --memory FILE.jsonl``
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from workbench.bench.records import ResultStore


def read_ledgers(file: str | Path) -> dict[str, dict[str, Any]]:
    """``memory`` of each row of the last run of a record file that keeps a ledger.

    Raises
    ------
    ValueError
        No record of the file has a ledger with predictions.
    """
    file = Path(file)
    records, _ = ResultStore(file.parent).read(file)
    found = [r for r in records if r.memory and r.memory.get("predicted")]
    if not found:
        raise ValueError(f"{file} holds no byte ledger: rows of the engine have one.")
    return {r.variant: dict(r.memory or {}) for r in found if r.run_id == found[-1].run_id}


def memory_table(memory: Mapping[str, Any], title: str) -> Table:
    """A row a use: bytes predicted before the first request and found after the run.

    Where the memory is the host's, the process's peak is all that can be found, so ``unexplained``
    is what the sum of the predictions missed it by. On a device with memory of its own every row
    has its own figure, and ``unexplained`` is what no row accounts for.
    """
    predicted, device = memory["predicted"], memory.get("device") or {}
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("use", no_wrap=True)
    for header in ("predicted", "found", "of the device" if device else "of the peak"):
        table.add_column(header, justify="right", no_wrap=True)
    whole = sum(device.values()) if device else memory["measured_peak_bytes"]
    shown = [name for name in dict.fromkeys([*predicted, *device]) if name not in _LAST]
    for name in shown:
        row = predicted.get(name), device.get(name)
        if any(row):
            _add(table, name, *row, whole)
    peak = memory["measured_peak_bytes"]
    if device:
        _add(table, "unexplained", None, device["unexplained"], whole)
        _add(table, "free", None, device["free"], whole)
        _add(table, "device", None, whole, whole, bold=True)
    else:
        total = sum(predicted.values())
        _add(table, "unexplained", None, peak - total, whole)
        _add(table, "peak of the process", total, peak, whole, bold=True)
    if memory.get("activation_basis"):
        table.caption = f"activations: {memory['activation_basis']}"
        table.caption_justify = "left"
    return table


_LAST = ("unexplained", "free")


def _add(
    table: Table,
    name: str,
    predicted: int | None,
    found: int | None,
    whole: int,
    bold: bool = False,
) -> None:
    share = "" if found is None or not whole else f"{100 * found / whole:.1f} %"
    cells = [_bytes(predicted), _bytes(found), share]
    table.add_row(Text(name.replace("_", " "), style="bold" if bold else ""), *cells)


def _bytes(value: int | None) -> str:
    if value is None:
        return ""
    size = abs(value)
    if size >= 1 << 30:
        return f"{value / 2**30:.2f} GiB"
    return f"{value / 2**20:.1f} MiB" if size >= 1 << 20 else f"{value / 2**10:.1f} KiB"
