"""A CUDA driver for Triton that compiles for a card of capability 9.0 and writes launches down.

Tensors of :func:`on_card` lie in host memory and say that they are on the card, so that wrappers
and Triton take them as on a GPU: all of the host's side of a launch runs but the driver's call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver


class CardTensor(Tensor):
    """A host tensor that says it is on the first card, as do its views."""

    is_cuda = True
    is_cpu = False
    device = torch.device("cuda", 0)


def on_card(x: Tensor) -> Tensor:
    """``x`` as a tensor of the card, over the same memory."""
    return torch.Tensor._make_subclass(CardTensor, x)


@dataclass(slots=True)
class Written:
    """What reached the driver: the kernel's handle, how it was compiled, and the launch.

    Of the arguments, those that the machine code does not take are None, addresses are integers.
    """

    function: str
    metadata: Any
    grid: tuple[int, int, int]
    stream: int
    packed: Any
    arguments: tuple[Any, ...]


@dataclass
class FakeDriver(GPUDriver):  # type: ignore[misc]
    """In place of Triton's CUDA driver."""

    launches: list[Written] = field(default_factory=list)
    device: int = 0
    stream: int = 7
    keeps: bool = True

    def __post_init__(self) -> None:
        self.utils = self
        driver = self

        class FakeLauncher:
            """Takes what Triton's takes."""

            def __init__(self, src: Any, metadata: Any) -> None:
                self.metadata = metadata
                self.is_constant = [kind == "constexpr" for kind in src.signature.values()]

            def __call__(self, gridX: int, gridY: int, gridZ: int, stream: int, function: str,
                         *args: Any) -> None:  # fmt: skip
                if not driver.keeps:
                    return
                packed, metadata, enter, leave, *arguments = args
                assert len(arguments) == len(self.is_constant)
                seen = [
                    None if fixed else a.data_ptr() if hasattr(a, "data_ptr") else a
                    for a, fixed in zip(arguments, self.is_constant, strict=True)
                ]
                for hook in (enter, leave):
                    if hook is not None:
                        hook(metadata)
                driver.launches.append(
                    Written(
                        function,
                        self.metadata,
                        (gridX, gridY, gridZ),
                        stream,
                        packed,
                        tuple(seen),
                    )
                )

        self.launcher_cls = FakeLauncher

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + 100 * device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """A handle that differs where the machine code does, or the device."""
        return None, f"{name} {hash(kernel)} on {device}", 32, 0, 1024

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.device)

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@contextmanager
def fake_cuda() -> Iterator[FakeDriver]:
    """Triton with this driver."""
    driver, config = FakeDriver(), triton.runtime.driver
    before = config._active
    config.set_active(driver)
    try:
        yield driver
    finally:
        config._active = before
