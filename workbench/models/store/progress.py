"""Progress of a fetch: what the store reports, and two listeners."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

POLL_SECONDS = 0.2


class FetchProgress(Protocol):
    """Listener of one fetch. Phases follow one another; `advance` may come from another thread."""

    def start(self, phase: str, total_bytes: int | None) -> None:
        """A phase begins; `total_bytes` is None where the size is not known."""

    def advance(self, num_bytes: int) -> None:
        """So many more bytes of the current phase are done."""

    def finish(self) -> None:
        """The current phase is over, done or not. Harmless where none is open."""

    def note(self, message: str) -> None:
        """One line for the user, e.g. why a source did not answer."""


class SilentProgress:
    """Reports nothing."""

    def start(self, phase: str, total_bytes: int | None) -> None:
        """Ignore."""

    def advance(self, num_bytes: int) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""

    def note(self, message: str) -> None:
        """Ignore."""


class RichProgress:
    """A bar on stderr; where stderr is not a terminal, one line a phase instead."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def start(self, phase: str, total_bytes: int | None) -> None:
        """Show a new bar."""
        self.finish()
        if not self.console.is_terminal:
            size = "" if total_bytes is None else f" ({total_bytes / 1e6:.1f} MB)"
            self.console.print(f"{phase}{size}", highlight=False, markup=False, soft_wrap=True)
            return
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=self.console,
        )
        self._task = self._bar.add_task(phase, total=total_bytes)
        self._bar.start()

    def advance(self, num_bytes: int) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, num_bytes)

    def finish(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def note(self, message: str) -> None:
        """Print one line above the bar."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files under `folder`; files that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
    return total


@contextmanager
def watch_folder(folder: Path, progress: FetchProgress) -> Iterator[None]:
    """Report the growth of `folder` as progress while the body runs.

    This is how programs that show no usable progress of their own (pip, the Hub library's
    several downloaders) get one bar that looks the same.
    """
    stop = threading.Event()
    seen = folder_bytes(folder)

    def poll() -> None:
        nonlocal seen
        while not stop.wait(POLL_SECONDS):
            now = folder_bytes(folder)
            if now > seen:  # it shrinks when a finished file replaces temporary ones
                progress.advance(now - seen)
                seen = now

    thread = threading.Thread(target=poll, name="fetch-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
