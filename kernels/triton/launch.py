"""Launches of Triton kernels, worked out once for a layout of tensors and then repeated cheaply.

Triton binds and specialises every argument of every launch anew, and a wrapper chooses tiles and
checks shapes: tens of microseconds of the host for kernels that run for a few. All of it follows
from the layout of the tensors (dtype, shape, strides) and some numbers, and a model's layers repeat
both. So each op has one function under :class:`planned`, which does that work for a layout that it
has not met and returns a :class:`Launcher`; from then on only addresses differ.

The first launch of a layout is Triton's own, and tells which compiled kernel it takes. A launcher
repeats it with all numbers and constants as they were then, so that of what Triton specialises on
only the alignment of addresses is left to look at. Where anything is set that only Triton honours
(hooks, debugging), or is not as this module knows it, the launch stays Triton's; :func:`describe`
says how many did, and why.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

#: Of these, ``CompiledKernel.run`` and what decides on the kernel of a launch were read.
VERSIONS = ("3.6", "3.7")
MAX_LAYOUTS = 1024  # of an op; so many more would be no repetition
_MAX_THREADS = 16
_ALIGNMENT = 16  # bytes; Triton tells addresses that it divides from others
_TRITON_RUN = JITFunction.run

#: Launches through Triton, by why.
through_triton: Counter[str] = Counter()
_only_triton = [False]
_only_compiles = [False]


class Launcher:
    """A launch of which all is settled but the addresses of its tensors.

    Parameters
    ----------
    kernel
        A kernel whose first parameters are tensors (or None), the next ones numbers, and the others
        compile-time constants.
    grid
        Programs in one to three dimensions.
    numbers
        Arguments after the tensors.
    seen_as
        How a tensor is handed to Triton, at the same address; None: as it is.
    scratch
        Shapes of fp32 tensors that the caller must bring besides its own.
    constants
        Compile-time constants and Triton's options (``num_warps`` and so on), by name.

    Notes
    -----
    Serves tensors of one layout, on the device that is current when it is called, and launches on
    that device's current stream; a CUDA graph can capture it once it has run. Only its first launch
    compiles.
    """

    __slots__ = ("_arguments", "_constants", "_grid", "_is_compiled", "_kernel", "_numbers",
                 "_ready", "_seen_as", "num_direct", "scratch")  # fmt: skip

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *numbers: float | None,
        seen_as: Callable[[Tensor], Tensor] | None = None,
        scratch: tuple[tuple[int, ...], ...] = (),
        **constants: Any,
    ) -> None:
        self._kernel = kernel
        self._grid = grid
        self._numbers = numbers
        self._seen_as = seen_as
        self._constants = constants
        self._ready: dict[Any, tuple[Any, Any, tuple[Any, ...]]] = {}
        self._arguments: tuple[Any, ...] = ()
        self._is_compiled = False
        self.scratch = scratch
        #: How often it has launched without Triton.
        self.num_direct = 0

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on tensors of the layout that this was made for."""
        if not self._ready:
            return self._run_through_triton(tensors)
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        device = _driver().get_current_device()
        ready = self._ready.get(_specialization(device, addresses))
        if ready is None or _is_watched(self._kernel):
            return self._run_through_triton(tensors)
        run, stream_of, fixed = ready
        run(*self._grid, stream_of(device), *fixed, *addresses, *self._arguments)
        self.num_direct += 1
        return None

    def _run_through_triton(self, tensors: tuple[Tensor | None, ...]) -> None:
        seen_as = self._seen_as
        if _only_compiles[0] and self._is_compiled:
            return
        seen = [t if t is None or seen_as is None else seen_as(t) for t in tensors]
        if _only_compiles[0] and isinstance(self._kernel, JITFunction):
            arguments = (*seen, *self._numbers)
            self._kernel.warmup(*arguments, grid=self._grid, **self._constants)
            self._is_compiled = True
            return
        compiled = self._kernel[self._grid](*seen, *self._numbers, **self._constants)
        reason = _why_not_directly(self._kernel, compiled, tensors)
        through_triton[reason or "first of its layout"] += 1
        if reason is None:
            self._prepare(compiled, tensors)

    def _prepare(self, compiled: Any, tensors: tuple[Tensor | None, ...]) -> None:
        """Keep what repeats the launch that Triton has just done."""
        parameters = self._kernel.params
        rest = parameters[len(tensors) + len(self._numbers) :]
        constants = (self._constants.get(p.name, p.default) for p in rest)
        self._arguments = (*self._numbers, *constants)
        self._grid = (*self._grid, 1, 1)[:3]
        driver = _driver()
        device = driver.get_current_device()
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        # Without hooks: a launch that any hook watches is Triton's.
        fixed = (compiled.function, compiled.packed_metadata, None, None, None)
        ready = (compiled.run, driver.get_current_stream, fixed)
        self._ready[_specialization(device, addresses)] = ready


class planned:
    """Turn a function that prepares a :class:`Launcher` into one that does so once a layout.

    ``plan(*tensors, *numbers)`` checks its arguments, may raise, and must depend on nothing but the
    layouts of the tensors, the numbers and the device. What it makes is called as
    ``op(tensors, *numbers)``, with the tensors of the launch in the kernel's order: it launches.
    """

    def __init__(self, plan: Callable[..., Launcher]) -> None:
        self._plan = plan
        self._launchers: dict[Any, Launcher] = {}
        self.__doc__ = plan.__doc__

    def __call__(self, tensors: tuple[Tensor | None, ...], *numbers: Any) -> None:
        """Launch on ``tensors``; the first of them says which device."""
        self.find(tensors, *numbers)(*tensors)

    def find(self, tensors: tuple[Tensor | None, ...], *numbers: Any) -> Launcher:
        """The launcher for these layouts and numbers, for launches that need more tensors."""
        first = tensors[0]
        assert first is not None
        key = (
            numbers,
            *map(type, numbers),  # 1, 1.0 and True are equal, and are not the same to Triton
            first.device,
            *[None if t is None else (t.dtype, t.shape, t.stride(), t.is_cuda) for t in tensors],
        )
        launcher = self._launchers.get(key)
        if launcher is None:
            launcher = self._plan(*tensors, *numbers)
            if len(self._launchers) >= MAX_LAYOUTS:
                self._launchers.clear()
            self._launchers[key] = launcher
        return launcher

    def forget(self) -> None:
        """Drop all launchers, as after a change of what a plan takes for constant."""
        self._launchers.clear()


def dependent_options(is_dependent: bool) -> dict[str, Any]:
    """Option of a launch that may start while the one before it finishes."""
    return {"launch_pdl": True} if is_dependent else {}


@contextmanager
def only_triton() -> Iterator[None]:
    """Have every launch be Triton's own, to compare with."""
    before = _only_triton[0]
    _only_triton[0] = True
    try:
        yield
    finally:
        _only_triton[0] = before


@contextmanager
def compiled_together() -> Iterator[None]:
    """Have launches of layouts not met before compile and nothing else, all at once, in threads.

    Their outputs hold whatever was in memory. At the end all is compiled and loaded; what could not
    be is an error when it is launched. What launches otherwise than through :class:`planned` runs
    as ever. Within another such block, it is a part of that.
    """
    if _only_compiles[0]:
        yield
        return
    # An error is raised again by the kernel's launch; raised here, it would leave the mode on.
    mode = functools.partial(triton.AsyncCompileMode, ignore_errors=True)
    with _Loading(min(_MAX_THREADS, len(os.sched_getaffinity(0)))) as pool, mode(pool):
        _only_compiles[0] = True
        try:
            yield
        finally:
            _only_compiles[0] = False


class _Loading(ThreadPoolExecutor):
    """Compiles kernels, and has what Triton leaves to the first launch done as well: its launcher
    is built by a C compiler, and the kernel is loaded onto the device."""

    def __init__(self, num_threads: int) -> None:
        super().__init__(num_threads)
        # Each thread has a current device of its own.
        self._device = torch.cuda.current_device() if _is_on_cuda() else None

    def submit(  # type: ignore[override]
        self, compile_kernel: Callable[[], Any]
    ) -> Future[Any]:
        return super().submit(self._compile, compile_kernel)

    def _compile(self, compile_kernel: Callable[[], Any]) -> Any:
        kernel = compile_kernel()
        is_known = triton.__version__.rpartition(".")[0] in VERSIONS
        if is_known and self._device is not None and type(kernel) is CompiledKernel:
            torch.cuda.set_device(self._device)
            with suppress(Exception):  # raised again by the first launch
                kernel._init_handles()
        return kernel


def _is_on_cuda() -> bool:
    is_initialized: Callable[[], bool] = torch.cuda.is_initialized
    return is_initialized()


def describe() -> str:
    """One line: how many launches went through Triton since the start, and why."""
    parts = [f"{count} {reason}" for reason, count in through_triton.most_common()]
    return f"{through_triton.total()} launches through Triton ({', '.join(parts) or 'none'})"


def _driver() -> Any:
    return triton.runtime.driver.active


def _specialization(device: int, addresses: list[int]) -> Any:
    """What Triton's choice of a kernel depends on when all but addresses is settled."""
    together = 0
    for address in addresses:
        together |= address
    if together % _ALIGNMENT == 0:
        return device
    return device, *[address % _ALIGNMENT == 0 for address in addresses]


def _is_watched(kernel: Any) -> bool:
    """Whether something is set, perhaps since the launch was prepared, that only Triton honours."""
    runtime = knobs.runtime
    return bool(
        _has_calls(runtime.launch_enter_hook)
        or _has_calls(runtime.launch_exit_hook)
        or runtime.debug
        or kernel.pre_run_hooks
        or getattr(runtime, "add_stages_inspection_hook", None) is not None  # 3.7
        or "instrumentation_mode" in vars(knobs.compilation)
        or _only_triton[0]
        or JITFunction.run is not _TRITON_RUN  # replaced: compile_ahead records launches so
    )


def _has_calls(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


def _why_not_directly(kernel: Any, compiled: Any, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why a launch cannot be repeated without Triton; None when it can."""
    if not isinstance(kernel, JITFunction):
        return "interpreted"
    if _is_watched(kernel):
        return "watched by hooks, for debugging or to compare"
    if not all(t is None or t.is_cuda for t in tensors):
        return "not on a GPU"
    if triton.__version__.rpartition(".")[0] not in VERSIONS:
        return f"of Triton {triton.__version__}, which is not one of {', '.join(VERSIONS)}"
    if type(compiled) is not CompiledKernel or compiled.metadata.target.backend != "cuda":
        return "not of a compiled CUDA kernel"
    takes = _first_parameters(compiled.run.__class__)
    if takes != ("gridX", "gridY", "gridZ", "stream", "function"):
        return f"by a launcher that takes {', '.join(takes)}"
    return None


@functools.lru_cache
def _first_parameters(launcher: Any) -> tuple[str, ...]:
    """Of a class whose instances are called, without ``self``."""
    return tuple(inspect.signature(launcher.__call__).parameters)[1:6]
