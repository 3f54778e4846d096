"""A device with memory of its own, played by the CPU: what is used there follows a script.

engine = tiny_engine(*OWN_MEMORY)   # and DEVICE.total_bytes, .outside, .step ... before it
"""

from __future__ import annotations

from dataclasses import dataclass, field

from workbench.slots.platform import Cpu

OWN_MEMORY = ("engine.platform._target_=tests.helpers.own_memory.OwnMemoryCpu",)


@dataclass
class ScriptedMemory:
    """Bytes as a test sets them; ``step`` is what a step takes and gives back."""

    total_bytes: int = 64 << 20
    outside: int = 3 << 20
    reserved: int = 5 << 20
    allocated: int = 4 << 20
    step: int = 7 << 20
    calls: list[str] = field(default_factory=list)

    def used_bytes(self) -> int:
        return self.outside + self.reserved

    def reserved_bytes(self) -> int:
        return self.reserved

    def allocated_bytes(self) -> int:
        return self.allocated

    def reset_peak(self) -> None:
        self.calls.append("reset_peak")

    def peak_reserved_bytes(self) -> int:
        self.calls.append("peak")
        return self.reserved + self.step

    def trim(self) -> None:
        self.calls.append("trim")


DEVICE = ScriptedMemory()


class OwnMemoryCpu(Cpu):
    """The CPU with :data:`DEVICE` as its memory."""

    name = "scripted"

    def device_memory(self) -> ScriptedMemory:
        return DEVICE

    def auto_pool_bytes(self, memory_fraction: float) -> int:
        return int(memory_fraction * DEVICE.total_bytes) - DEVICE.used_bytes()
