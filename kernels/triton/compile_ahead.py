"""Compile Triton kernels for a GPU that is not there, from the launches of the ops themselves.

``record_launches`` catches what a wrapper would have launched, with all that it chose (grid,
constants, warps, stages); ``compile_launch`` builds that kernel down to machine code for a compute
capability, with the assembler that Triton brings along. Nothing of it needs a device or a driver,
so a test can tell that every kernel builds, and ``python -m kernels.triton.compile_ahead`` prints
what each one takes of shared memory.

Every module of this package with kernels in it defines ``example_launches()``: calls of its public
functions on small tensors, one for each form of a kernel that is worth building.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import kernels.triton

CAPABILITIES = (80, 90)

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
#: Arguments of a launch that choose how it is compiled and are no parameters of the kernel.
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl")
#: Constants that say that a kernel may start while the one before it finishes (capability 9.0 on).
_DEPENDENT = ("IS_DEPENDENT", "HAS_DEPENDENT")
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: JITFunction[Any]
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: Any

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return str(self.kernel.__name__)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Catch launches instead of running them: outputs hold whatever was in memory.

    For one thread, and not under ``TRITON_INTERPRET=1``, where kernels are Python functions.
    """
    launches: list[Launch] = []

    def record(
        self: JITFunction[Any], *args: Any, grid: Any, warmup: bool = False, **kwargs: Any
    ) -> None:
        options = {k: kwargs.pop(k) for k in _OPTIONS if k in kwargs}
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        launches.append(Launch(self, dict(bound.arguments), options, grid))

    run = JITFunction.run
    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(launch: Launch, capability: int) -> Any:
    """Build the kernel of a launch for ``capability`` (90 for 9.0), down to machine code.

    Arguments are specialised as at run time: integers of 1 and ``None`` become constants, pointers
    and integers that 16 divides are known to be so.

    Returns
    -------
    triton.compiler.CompiledKernel
        ``asm`` has every stage by name (``ttgir``, ``ptx``, ``cubin``), ``metadata`` the sizes.
    """
    options = dict(launch.options)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        kind, is_divisible = _kind_of(value)
        if parameter.do_not_specialize and isinstance(value, int) and value == 1:
            kind = "i32"
        if parameter.name in _DEPENDENT and capability >= 90:  # as a device there would have it
            value = options["launch_pdl"] = True
        if parameter.is_constexpr or kind == "constexpr":
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = kind
        if is_divisible and not parameter.do_not_specialize:
            attributes[(parameter.num,)] = _DIVISIBLE
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def _kind_of(value: Any) -> tuple[str, bool]:
    """Triton's name of an argument's type, and whether 16 divides it."""
    if value is None or isinstance(value, str):
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        if value == 1:
            return "constexpr", False
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    return "constexpr", False  # a dtype or another compile-time object


def example_modules() -> list[str]:
    """Modules of this package that have example launches."""
    names = [m.name for m in pkgutil.iter_modules(kernels.triton.__path__, "kernels.triton.")]
    return [n for n in names if hasattr(importlib.import_module(n), "example_launches")]


def launches_of(module: str) -> list[tuple[str, Launch]]:
    """What the examples of a module launch: the example's name, and each launch of it."""
    examples: dict[str, Callable[[], object]] = importlib.import_module(module).example_launches()
    found = []
    for name, call in examples.items():
        with record_launches() as launches:
            call()
        assert launches, f"example {name!r} of {module} launches nothing"
        found += [(name, launch) for launch in launches]
    return found


def main() -> int:
    """Build every example for every capability and print what it takes."""
    for module in example_modules():
        for name, launch in launches_of(module):
            for capability in CAPABILITIES:
                compiled = compile_launch(launch, capability)
                print(
                    f"{launch.name:22} {name:32} sm_{capability}"
                    f" {compiled.metadata.shared:7} B shared, {launch.options}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
