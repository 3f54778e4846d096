"""``report``: the figure of recorded runs, where their time went, and where their bytes lie."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from workbench.bench.figure import report
from workbench.bench.memory_report import memory_table, read_ledgers
from workbench.bench.timeline_report import (
    draw_timeline,
    read_timelines,
    timeline_table,
    write_trace,
)
from workbench.cli.output import print_document, takes_json
from workbench.configuration import compose_config
from workbench.core.errors import ConfigError, WorkbenchError, unknown_name

_OPTIONS = ("--timeline", "--trace", "--memory")


def report_command(arguments: Sequence[str]) -> int:
    """Draw the figure of a record file again, or show its timeline or its byte ledger."""
    as_json, rest = takes_json(list(arguments))
    trace = None
    if "--trace" in rest:
        at = rest.index("--trace")
        if at + 1 == len(rest):
            raise ConfigError("--trace needs the file to write: --trace FILE.json")
        trace = Path(rest[at + 1])
        del rest[at : at + 2]
    wanted = {text for text in rest if text.startswith("-")}
    for text in wanted - {*_OPTIONS}:
        raise unknown_name("option of report", text, _OPTIONS)
    files = [text for text in rest if text not in wanted]
    if len(files) != 1 or len(wanted) > 1:
        raise ConfigError(
            "report needs one record file, and one of --timeline and --memory at most: "
            "python -m workbench report [--timeline [--trace FILE.json] | --memory] FILE|latest"
        )
    if trace is not None and wanted != {"--timeline"}:
        raise ConfigError("--trace writes the steps of --timeline: give both.")
    file = _record_file(files[0])
    try:
        if "--timeline" in wanted:
            _show_timeline(file, trace, as_json)
        elif "--memory" in wanted:
            _show_memory(file, as_json)
        else:
            figure = report(file)
            print_document({"schema": 1, "figure": str(figure)}) if as_json else print(figure)
    except WorkbenchError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    return 0


def _record_file(name: str) -> Path:
    """The file, or the newest of the results folder for ``latest``."""
    if name == "latest":
        folder = Path(str(compose_config([]).cfg.results_dir))
        files = sorted(folder.glob("*.jsonl"), key=lambda p: p.stat().st_mtime)
        if not files:
            raise ConfigError(
                f"there is no record in {folder} yet: measure something, or name a file."
            )
        return files[-1]
    if not Path(name).is_file():
        raise ConfigError(f"there is no record file {name}.")
    return Path(name)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)


def _show_timeline(file: Path, trace: Path | None, as_json: bool) -> None:
    timelines = read_timelines(file)
    figure = draw_timeline(timelines, file.with_name(f"{file.stem}_timeline.png"))
    traced = None if trace is None else write_trace(timelines, trace)
    if as_json:
        print_document(
            {
                "schema": 1,
                "figure": str(figure),
                "trace": None if trace is None else str(trace),
                "timelines": timelines,
            }
        )
        return
    out = _console()
    for name, timeline in timelines.items():
        out.print(timeline_table(timeline["kinds"], name))
    if traced is not None:
        total = sum(sum(k["steps"] for k in t["kinds"].values()) for t in timelines.values())
        out.print(f"trace:  {trace}, {traced} of {total} steps", soft_wrap=True)
    out.print(f"figure: {figure}", soft_wrap=True)


def _show_memory(file: Path, as_json: bool) -> None:
    ledgers = read_ledgers(file)
    if as_json:
        print_document({"schema": 1, "ledgers": ledgers})
        return
    out = _console()
    for name, memory in ledgers.items():
        out.print(memory_table(memory, name))
