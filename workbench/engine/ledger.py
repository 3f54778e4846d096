"""The byte ledger: where memory goes, predicted before the first request."""

from __future__ import annotations

from workbench.core.backend import MemoryLedger
from workbench.core.memory import MemoryProbe
from workbench.slots.kv_cache import KVUsage


class Ledger:
    """Predicted bytes by use, the measured peak, and how much of the KV was used.

    Parameters
    ----------
    probe
        Reads this device's memory.
    base_bytes
        Held before anything of the model existed.
    built_bytes
        Held once the engine was assembled.
    """

    def __init__(
        self, probe: MemoryProbe, predicted: dict[str, int], base_bytes: int, built_bytes: int
    ) -> None:
        self.probe = probe
        self.predicted = predicted
        self.base_bytes = base_bytes
        self.built_bytes = built_bytes
        self.reset()

    def reset(self) -> None:
        """Start a new run."""
        self._start_bytes = self.probe.current_bytes()
        self.probe.reset_peak()
        self._fullest = KVUsage(0, 0, 0)
        self._waste_sum = 0.0
        self._observations = 0

    def observe(self, usage: KVUsage) -> None:
        """Note the KV's use after a step."""
        if not usage.allocated_tokens:
            return
        if usage.allocated_tokens >= self._fullest.allocated_tokens:
            self._fullest = usage
        self._waste_sum += usage.waste
        self._observations += 1

    def read(self) -> MemoryLedger:
        """The ledger of the run so far.

        The measured peak is what building took plus what the run added at its highest, so that
        other engines in the same process do not count.
        """
        run = max(0, self.probe.peak_bytes() - self._start_bytes)
        return MemoryLedger(
            predicted=self.predicted,
            measured_peak_bytes=self.built_bytes - self.base_bytes + run,
            base_bytes=self.base_bytes,
            kv_allocated_tokens=self._fullest.allocated_tokens,
            kv_used_tokens=self._fullest.used_tokens,
            kv_mean_waste=self._waste_sum / self._observations if self._observations else None,
        )
