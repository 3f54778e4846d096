"""NVIDIA GPUs through CUDA."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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

    def auto_pool_bytes(self) -> int:
        return int(0.85 * self.free_memory_bytes())

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)
