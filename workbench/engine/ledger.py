"""The byte ledger: where memory goes, predicted before the first request and found after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import kernels
from workbench.core.backend import MemoryLedger
from workbench.core.memory import DeviceMemory, MemoryProbe
from workbench.slots.kv_cache import KVUsage


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes by use before the first request.

    Attributes
    ----------
    held
        What is there already, counted from its tensors.
    activations, graphs
        What the largest step takes, and what prepared steps hold.
    activation_basis
        What the first of them stands on.
    """

    held: dict[str, int]
    activations: int
    graphs: int
    activation_basis: str

    def by_use(self) -> dict[str, int]:
        """All of it."""
        return {**self.held, "activations": self.activations, "graphs": self.graphs}


def load_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Make math libraries and compiled kernels load now, so that ``base_bytes`` counts them."""
    x = torch.ones(64, 64, dtype=dtype, device=device)
    kernels.apply_linear(kernels.pack_linear(x.clone(), None, 1), x)
    kernels.rms_norm(x, x[0], 1e-6)
    kernels.argmax(x)


class DeviceBooks:
    """Where all bytes of a device with memory of its own are.

    Made once all is built but prepared steps.

    Parameters
    ----------
    outside_bytes
        In use on the device that torch does not know of.
    base_allocated_bytes
        What tensors held before anything of the model existed.
    """

    def __init__(self, memory: DeviceMemory, outside_bytes: int, base_allocated_bytes: int) -> None:
        self._memory = memory
        self._outside = outside_bytes
        self._base = base_allocated_bytes
        memory.trim()
        self._slack = memory.reserved_bytes() - memory.allocated_bytes()
        self._note(0)

    def prepared(self, graph_bytes: int) -> None:
        """Note that steps have been prepared, and what they hold. Nothing runs.

        The driver has loaded code for them, which is outside torch too.
        """
        before = self._reserved
        self._note(graph_bytes)
        of_driver = max(0, graph_bytes - (self._reserved - before))
        self._outside = self._memory.used_bytes() - self._reserved - of_driver

    def _note(self, graph_bytes: int) -> None:
        self._memory.trim()
        self._graphs = graph_bytes
        self._reserved = self._memory.reserved_bytes()
        self._allocated = self._memory.allocated_bytes()

    def read(self, held: dict[str, int]) -> dict[str, int]:
        """Bytes by use, now; all of them make the device.

        Counted from tensors are those ``held``; found by differences are ``activations`` (what the
        allocator keeps for them), ``graphs``, ``allocator_slack`` (rounding, gaps between tensors),
        ``others_in_process`` (held before the model or allocated since, as by other engines) and
        ``outside_torch`` (the CUDA context, code, other processes). Between steps.
        """
        memory = self._memory
        used = memory.used_bytes()
        later = memory.allocated_bytes() - self._allocated
        rows = {
            **held,
            "activations": max(0, memory.reserved_bytes() - self._reserved - later),
            "graphs": self._graphs,
            "allocator_slack": self._slack,
            "others_in_process": self._base + later,
            "outside_torch": self._outside,
        }
        rows["unexplained"] = used - sum(rows.values())
        rows["free"] = memory.total_bytes - used
        return rows


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
    books
        Of a device with memory of its own.
    """

    def __init__(
        self,
        probe: MemoryProbe,
        prediction: Prediction,
        base_bytes: int,
        built_bytes: int,
        books: DeviceBooks | None = None,
    ) -> None:
        self.probe = probe
        self.prediction = prediction
        self.base_bytes = base_bytes
        self.built_bytes = built_bytes
        self.books = books
        self.reset()

    @property
    def predicted(self) -> dict[str, int]:
        """Bytes by use before the first request."""
        return self.prediction.by_use()

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
            activation_basis=self.prediction.activation_basis,
            device={} if self.books is None else self.books.read(self.prediction.held),
        )
