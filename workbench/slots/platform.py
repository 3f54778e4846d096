"""Slot ``platform``: what the machine is and what it can do."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import psutil
import torch

from workbench.core.errors import ConfigError, unknown_name
from workbench.core.memory import DeviceMemory, MemoryProbe
from workbench.slots.component import Component

#: By the names that configs have for them.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Platform(Component):
    """One kind of device."""

    name: str

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where tensors live."""

    @abstractmethod
    def unsupported_reasons(self) -> list[str]:
        """Why it cannot be used here; empty when it can."""

    @abstractmethod
    def default_dtype(self) -> torch.dtype:
        """Precision for ``dtype=auto``."""

    @abstractmethod
    def free_memory_bytes(self) -> int:
        """Bytes that could be taken now."""

    @abstractmethod
    def auto_pool_bytes(self, memory_fraction: float) -> int:
        """Most bytes that a KV pool takes when nobody says how many, and nothing is measured yet.

        ``memory_fraction`` is the share of a device with memory of its own that may be used.
        """

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done what it was told."""

    def device_memory(self) -> DeviceMemory | None:
        """Where the device has memory of its own, its counts: the KV pool is sized by a profile.
        None where its memory is the host's."""
        return None

    def memory_probe(self) -> MemoryProbe:
        """A probe of this device's memory."""
        return MemoryProbe(self.device)


@dataclass(frozen=True, slots=True)
class CpuConfig:
    """Options of :class:`Cpu`.

    Attributes
    ----------
    num_threads
        Threads of torch's pool; 0 leaves torch's own choice.
    """

    num_threads: int = 0


class Cpu(Platform):
    """The host's processor: the null object, which is always there."""

    Config = CpuConfig
    name = "cpu"

    def __init__(self, config: CpuConfig | None = None) -> None:
        super().__init__(config)
        if self.config.num_threads < 0:
            raise ConfigError("platform.num_threads must be 0 (torch's choice) or more.")
        if self.config.num_threads:
            torch.set_num_threads(self.config.num_threads)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def unsupported_reasons(self) -> list[str]:
        return []

    def default_dtype(self) -> torch.dtype:
        return torch.float32

    def free_memory_bytes(self) -> int:
        return int(psutil.virtual_memory().available)

    def auto_pool_bytes(self, memory_fraction: float) -> int:
        # Host memory is everybody's, whatever share the engine could have: take little, since what
        # is taken is zeroed page by page.
        return min(2 << 30, self.free_memory_bytes() // 4)

    def synchronize(self) -> None: ...


def resolve_dtype(name: str, platform: Platform) -> torch.dtype:
    """``auto`` (the platform's choice) or a name in :data:`DTYPES` as torch has it."""
    if name == "auto":
        return platform.default_dtype()
    if name not in DTYPES:
        raise unknown_name("dtype", name, ["auto", *DTYPES])
    return DTYPES[name]
