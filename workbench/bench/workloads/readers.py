"""Reading rows of workload files; every error names the file, the line and the field."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from os import PathLike, fspath
from pathlib import Path
from typing import IO, Any

from workbench.core.errors import ConfigError


class WorkloadFileError(ConfigError, FileNotFoundError):
    """The file of a workload is not there, or its path was not given."""


def find_file(path: str | PathLike[str] | None, workload: str, expects: str, source: str) -> Path:
    """Return the path of a workload's file.

    Parameters
    ----------
    path
        As the user gave it; ``~`` is expanded.
    workload, expects, source
        Name of the workload, what the file should be, and where it can be had: for the error.

    Raises
    ------
    WorkloadFileError
        If no path was given, or no file is there (a ``ValueError`` and a ``FileNotFoundError``).
    """
    help_text = f"Expected: {expects}. Source: {source}."
    if path is None or not fspath(path):
        raise WorkloadFileError(
            f"workload {workload} needs a file: set workload.path=FILE. {help_text}"
        )
    found = Path(path).expanduser()
    if found.is_dir():
        raise WorkloadFileError(
            f"workload {workload}: {found} is a folder, not a file. {help_text}"
        )
    if not found.is_file():
        raise WorkloadFileError(f"workload {workload}: there is no file {found}. {help_text}")
    return found


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file, and where it stands."""

    path: Path
    line: int
    values: dict[str, Any]

    def error(self, field: str, problem: str, valid: str) -> ConfigError:
        """Build the error for a bad field of this row."""
        return ConfigError(f"{self.path}, line {self.line}: {field!r} {problem}; valid: {valid}.")

    def _get(self, field: str, valid: str) -> Any:
        if field not in self.values:
            raise self.error(field, "is missing", valid)
        return self.values[field]

    def text(self, field: str) -> str:
        """Return a field that must be a string with something in it."""
        valid = "a string that is not empty"
        value = self._get(field, valid)
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, f"is {_short(value)}", valid)
        return value

    def integer(self, field: str, minimum: int) -> int:
        """Return a field that must be a whole number of at least ``minimum``."""
        valid = f"a whole number of at least {minimum}"
        value = self._get(field, valid)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(field, f"is {_short(value)}", valid)
        return value

    def number(self, field: str) -> float:
        """Return a field that must be a finite number of at least 0."""
        valid = "a number of at least 0"
        value = self._get(field, valid)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            raise self.error(field, f"is {_short(value)}", valid)
        return float(value)

    def integers(self, field: str, limit: int | None = None) -> list[int]:
        """Return a field that must be a list of whole numbers from 0 up to below ``limit``."""
        below = "" if limit is None else f" and below {limit}"
        valid = f"a list of whole numbers, each at least 0{below}, with at least one"
        value = self._get(field, valid)
        if not isinstance(value, list) or not value:
            raise self.error(field, f"is {_short(value)}", valid)
        for item in value:
            is_int = isinstance(item, int) and not isinstance(item, bool)
            if not is_int or item < 0 or (limit is not None and item >= limit):
                raise self.error(field, f"holds {_short(item)}", valid)
        return value

    def texts(self, field: str) -> list[str]:
        """Return a field that must be a list of strings, none of them empty."""
        valid = "a list of strings that are not empty, with at least one"
        value = self._get(field, valid)
        if not isinstance(value, list) or not value:
            raise self.error(field, f"is {_short(value)}", valid)
        for item in value:
            if not isinstance(item, str) or not item.strip():
                raise self.error(field, f"holds {_short(item)}", valid)
        return value

    def messages(self, field: str) -> list[dict[str, str]]:
        """Return a field that must be a chat: ``[{"role": ..., "content": ...}, ...]``."""
        valid = 'a list of {"role": string, "content": string}, with at least one'
        value = self._get(field, valid)
        if not isinstance(value, list) or not value:
            raise self.error(field, f"is {_short(value)}", valid)
        for item in value:
            is_message = isinstance(item, dict) and item.keys() == {"role", "content"}
            if not is_message or not all(isinstance(part, str) for part in item.values()):
                raise self.error(field, f"holds {_short(item)}", valid)
        return value


def _short(value: Any) -> str:
    """Return a value as it can stand in one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def open_text(path: Path) -> IO[str]:
    """Open a text file, also a gzipped one; a byte order mark is left out."""
    if path.suffix == ".gz":
        return TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers; what cannot be read is an error, not an end."""
    line = 0
    try:
        with open_text(path) as file:
            for line, text in enumerate(file, start=1):
                yield line, text
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}, after line {line}: not UTF-8 text ({error.reason}).") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise ConfigError(f"{path}, after line {line}: not a whole gzip file ({error}).") from error


def read_jsonl(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSONL file (one object a line, blank lines are passed over).

    Raises
    ------
    ConfigError
        If a line is no JSON object, or the file has no rows.
    """
    is_empty = True
    for line, text in _lines(path):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path}, line {line}: not JSON ({error.msg} at column {error.colno}); "
                "valid: one JSON object a line."
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}, line {line}: {_short(values)} is no JSON object; "
                "valid: one JSON object a line."
            )
        is_empty = False
        yield Row(path, line, values)
    if is_empty:
        raise ConfigError(f"{path}: the file has no rows.")


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a CSV file whose header has at least ``columns``; values are strings.

    Raises
    ------
    ConfigError
        If a column is missing, a row is short, or the file has no rows.
    """
    numbered = _lines(path)
    reader = csv.DictReader(text for _, text in numbered)
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(
            f"{path}, line 1: no column {', '.join(missing)}; "
            f"valid: a header with {', '.join(columns)}."
        )
    is_empty = True
    for values in reader:
        row = Row(path, reader.line_num, dict(values))
        for column in columns:
            if values[column] is None:
                raise row.error(column, "is missing", f"{len(columns)} values a line")
        is_empty = False
        yield row
    if is_empty:
        raise ConfigError(f"{path}: the file has a header but no rows.")
