"""One live line while a run measures, on stderr.

It is told every token, inside the measured path, so a token costs it one comparison; it draws at
most four times a second, the same for every variant.
"""

from __future__ import annotations

from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from workbench.core.backend import TokenEvent

_REDRAW_S = 0.25
_PLAIN_S = 30.0


class Progress(Protocol):
    """What a run tells while it goes."""

    def begin(self, what: str, num_requests: int, now_s: float) -> None:
        """A phase starts: a build, a warm-up, a round."""
        ...

    def on_event(self, event: TokenEvent) -> None:
        """Tokens arrived."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line of its own, such as a variant that failed."""
        ...

    def close(self) -> None:
        """The run is over; nothing stays on the line."""
        ...


class NoProgress:
    """Says nothing."""

    def begin(self, what: str, num_requests: int, now_s: float) -> None:
        """Ignore it."""

    def on_event(self, event: TokenEvent) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""

    def close(self) -> None:
        """Nothing to do."""


class LiveProgress:
    """A line that is redrawn on a terminal, and a plain line every half minute elsewhere.

    Parameters
    ----------
    console
        Where to write; stderr by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._live: Live | None = None
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        self._what = ""
        self._num_requests = self._num_done = self._num_tokens = 0
        self._begin_s = self._next_s = 0.0

    def begin(self, what: str, num_requests: int, now_s: float) -> None:
        """Show what is going on now."""
        self._what, self._num_requests = what, num_requests
        self._num_done = self._num_tokens = 0
        self._begin_s = now_s
        self._next_s = now_s + (_REDRAW_S if self._live else _PLAIN_S)
        if self._live:
            self._draw(now_s)

    def on_event(self, event: TokenEvent) -> None:
        """Count the tokens, and redraw when it is time."""
        self._num_tokens += len(event.token_ids)
        self._num_done += event.finished or event.error is not None
        if event.time_s >= self._next_s:
            self._next_s = event.time_s + (_REDRAW_S if self._live else _PLAIN_S)
            self._draw(event.time_s)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(Text(text))

    def close(self) -> None:
        """Take the live line away."""
        if self._live:
            self._live.stop()
            self._live = None

    def _draw(self, now_s: float) -> None:
        parts = [self._what]
        if self._num_requests:
            parts.append(f"{self._num_done}/{self._num_requests} requests")
        elapsed = now_s - self._begin_s
        if self._num_tokens and elapsed > 0:
            parts.append(f"{self._num_tokens / elapsed:,.1f} tok/s")
        line = Text(" · ".join(parts), no_wrap=True, overflow="ellipsis")
        if self._live:
            self._live.update(line, refresh=True)
        else:
            self.console.print(line)
