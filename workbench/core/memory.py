"""Bytes in use and their peak, on the host or on a CUDA device.

On the host the figure is the process's resident set: Linux keeps its high-water mark in
``VmHWM``, which writing ``5`` to ``/proc/self/clear_refs`` resets (proc(5)). Where that file is
missing the peak is sampled instead, and ``exact_peak`` says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import psutil
import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class DeviceMemory(Protocol):
    """Bytes of a device that has memory of its own, and of torch's allocator there."""

    @property
    def total_bytes(self) -> int:
        """All there is."""
        ...

    def used_bytes(self) -> int:
        """In use, by whomever."""
        ...

    def reserved_bytes(self) -> int:
        """What the allocator has taken from the device."""
        ...

    def allocated_bytes(self) -> int:
        """What of it tensors hold."""
        ...

    def reset_peak(self) -> None:
        """Start a new peak at what is reserved now."""
        ...

    def peak_reserved_bytes(self) -> int:
        """Most that was reserved since :meth:`reset_peak`."""
        ...

    def trim(self) -> None:
        """Wait for the device, and give back what no tensor holds."""
        ...


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Spare the collector what is there already: it is asked for garbage again and again while an
    engine is built, and would look through every module's objects each time."""
    if gc.get_freeze_count():  # by the caller's own choice
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class MemoryProbe:
    """Current and peak bytes of one device.

    Parameters
    ----------
    device
        ``cpu`` measures this process's resident set, ``cuda`` the allocator's bytes.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.exact_peak = self.device.type == "cuda" or (_STATUS.exists() and _CLEAR_REFS.exists())
        self._sampled_peak = 0

    def trim(self) -> None:
        """Give freed memory back to the system, so that the next reading counts what is held."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            return
        # Where there is no glibc, freed pages may stay counted.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def current_bytes(self) -> int:
        """Bytes held now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        now = psutil.Process().memory_info().rss
        self._sampled_peak = max(self._sampled_peak, now)
        return int(now)

    def reset_peak(self) -> None:
        """Start a new peak at what is held now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        self._sampled_peak = 0
        if self.exact_peak:
            try:
                _CLEAR_REFS.write_text("5")
            except OSError:
                self.exact_peak = False
        self.current_bytes()

    def peak_bytes(self) -> int:
        """Highest number of bytes held since :meth:`reset_peak`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        self.current_bytes()
        return _status_bytes("VmHWM:") if self.exact_peak else self._sampled_peak
