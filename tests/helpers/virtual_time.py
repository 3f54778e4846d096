"""A stand-in for the ``time`` module: seconds that pass by reading the clock and by sleeping."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class VirtualTime:
    """``perf_counter`` moves on by ``tick_s`` a reading; ``sleep`` moves it and does not wait.

    monkeypatch.setattr("workbench.engine.backend.time", VirtualTime())
    """

    now_s: float = 1000.0
    tick_s: float = 0.001
    slept_s: list[float] = field(default_factory=list)

    def perf_counter(self) -> float:
        self.now_s += self.tick_s
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.slept_s.append(seconds)
        self.now_s += seconds
