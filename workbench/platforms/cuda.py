"""NVIDIA GPUs through CUDA."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workbench.core.memory import DeviceMemory, MemoryProbe
from workbench.slots.platform import Platform


@dataclass(frozen=True, slots=True)
class CudaConfig:
    """Options of :class:`Cuda`.

    Attributes
    ----------
    index
        Which GPU.
    """

    index: int = 0


class Cuda(Platform):
    """One NVIDIA GPU."""

    Config = CudaConfig
    name = "cuda"

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.config.index)

    def unsupported_reasons(self) -> list[str]:
        if not torch.cuda.is_available():
            built = torch.version.cuda or "none: this is a CPU build of torch"
            return [f"torch sees no CUDA device (torch's CUDA version: {built})"]
        if self.config.index >= torch.cuda.device_count():
            return [f"GPU {self.config.index} of {torch.cuda.device_count()} does not exist"]
        major, minor = torch.cuda.get_device_capability(self.config.index)
        return [] if major >= 8 else [f"compute capability {major}.{minor} is under 8.0"]

    def default_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def free_memory_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def auto_pool_bytes(self, memory_fraction: float) -> int:
        memory = self.device_memory()
        return max(0, int(memory_fraction * memory.total_bytes) - memory.used_bytes())

    def device_memory(self) -> DeviceMemory:
        return CudaMemory(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class CudaMemory:
    """Bytes of one GPU, and of torch's allocator there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[1]

    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def reserved_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_reserved_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)

    def trim(self) -> None:
        torch.cuda.synchronize(self._device)
        MemoryProbe(self._device).trim()
