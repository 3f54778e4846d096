"""Compiling, calling and spreading CPU kernels over threads.

A kernel is a function of a *marker* (what its addresses point at), a struct of arguments, and a
range of the rows, tokens or tasks that it is to do. It is compiled on its first call, once for each
dtype, and kept on disk. One parallel loop, which knows nothing of the kernels, hands ranges to
threads.
"""

from __future__ import annotations

import hashlib
import struct
import threading
import warnings
from collections.abc import Callable
from ctypes import CFUNCTYPE, addressof, c_int64, c_void_p, create_string_buffer
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import cfunc, njit, prange, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from kernels.cpu.pointers import COMPILE_OPTIONS
from kernels.cpu.threads import num_threads

_ELEMENT = {torch.float32: types.float32, torch.bfloat16: types.uint16}
_CALL = CFUNCTYPE(None, c_void_p, c_void_p, c_int64, c_int64)
_MAX_ARGUMENTS = 64
_Compiled = tuple[Callable[..., None], int, Any]
_local = threading.local()


def _source_digest() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# numba takes a compiled function from disk if the function's own file has not changed, whatever its
# helpers in other files did. So a digest of this folder is part of each kernel's signature.
_ARGUMENTS = types.Opaque(f"arguments({_source_digest()})")


def _can_cache() -> bool:
    """Whether numba finds a folder to keep compiled kernels in."""
    try:
        FunctionCache(_can_cache)
    except RuntimeError:
        warnings.warn(
            "no writable folder for compiled CPU kernels: each process compiles them again (some"
            " seconds). Set NUMBA_CACHE_DIR to a writable folder.",
            stacklevel=2,
        )
        return False
    return True


IS_CACHED = _can_cache()


class Kernel:
    """A compiled function over a range; made by :func:`kernel`."""

    def __init__(self, function: Callable[..., None], ints: int, floats: int, fault: str) -> None:
        self._function = function
        self._fault = fault
        self._pack_into = struct.Struct(f"q{ints}q{floats}d").pack_into
        self._compiled: dict[torch.dtype, _Compiled] = {}

    def __call__(
        self, dtype: torch.dtype, count: int, is_parallel: bool, *arguments: float
    ) -> None:
        """Do ``0 .. count - 1``, on torch's threads if ``is_parallel`` and there are any.

        Raises
        ------
        IndexError
            If the kernel called :func:`report_fault`: an index among its data was out of range.
        """
        compiled = self._compiled.get(dtype) or self._compile(dtype)
        try:
            buffer, address, has_fault = _local.arguments
        except AttributeError:
            buffer, address, has_fault = _new_buffer()
        self._pack_into(buffer, 0, 0, *arguments)
        if is_parallel and (threads := num_threads()) > 1:
            _fan_out(compiled[1], address, count, threads)
        else:
            compiled[0](None, address, 0, count)
        if has_fault.value:
            raise IndexError(self._fault)

    def _compile(self, dtype: torch.dtype) -> _Compiled:
        """As a ctypes function, as an address, and the owner of its code."""
        marker = types.CPointer(_ELEMENT[dtype])
        signature = types.void(marker, _ARGUMENTS, types.int64, types.int64)
        owner = cfunc(signature, cache=IS_CACHED, **COMPILE_OPTIONS)(self._function)
        assert owner.address is not None
        self._compiled[dtype] = _CALL(owner.address), owner.address, owner
        return self._compiled[dtype]


def kernel(ints: int, floats: int = 0, fault: str = "") -> Callable[[Callable[..., None]], Kernel]:
    """Decorate ``function(marker, arguments, begin, end)`` of so many ints and then floats.

    Inside, ``int_arguments(arguments, ints)`` and ``float_argument(arguments, index)`` read them.
    ``fault`` is the message of the error that ``report_fault(arguments)`` leads to.
    """
    assert ints + floats < _MAX_ARGUMENTS
    return lambda function: Kernel(function, ints, floats, fault)


def _new_buffer() -> tuple[Any, int, c_int64]:
    """This thread's buffer: whether there was a fault, then the arguments.

    It is the thread's own, so that two engines in one process do not share it.
    """
    buffer = create_string_buffer(8 * _MAX_ARGUMENTS)
    _local.arguments = buffer, addressof(buffer), c_int64.from_buffer(buffer)
    return _local.arguments


@intrinsic(prefer_literal=True)
def int_arguments(typingctx, arguments, count):
    """The first ``count`` (a literal) arguments, as a tuple of int64."""
    number = count.literal_value

    def codegen(context, builder, signature, args):
        integer = ir.IntType(64)
        base = builder.bitcast(args[0], integer.as_pointer())
        places = (ir.Constant(integer, 1 + i) for i in range(number))
        values = [builder.load(builder.gep(base, [place])) for place in places]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(types.int64, number)(arguments, count), codegen


@intrinsic
def float_argument(typingctx, arguments, index):
    """Argument ``index``, counted from the first int, as fp32."""

    def codegen(context, builder, signature, args):
        base = builder.bitcast(args[0], ir.DoubleType().as_pointer())
        place = builder.add(args[1], ir.Constant(ir.IntType(64), 1))
        return builder.fptrunc(builder.load(builder.gep(base, [place])), ir.FloatType())

    return types.float32(arguments, types.int64), codegen


@intrinsic
def report_fault(typingctx, arguments):
    """Have the call raise ``IndexError`` when the kernel is done."""

    def codegen(context, builder, signature, args):
        integer = ir.IntType(64)
        builder.store(ir.Constant(integer, 1), builder.bitcast(args[0], integer.as_pointer()))
        return context.get_dummy_value()

    return types.void(arguments), codegen


@intrinsic
def _call_range(typingctx, function, arguments, begin, end):
    """Call the compiled kernel at the address ``function``."""

    def codegen(context, builder, signature, args):
        byte, integer = ir.IntType(8).as_pointer(), ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [byte, byte, integer, integer])
        function = builder.inttoptr(args[0], kind.as_pointer())
        null = ir.Constant(byte, None)
        builder.call(function, [null, builder.inttoptr(args[1], byte), args[2], args[3]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@njit(parallel=True, nogil=True, cache=IS_CACHED)
def _fan_out(function, arguments, count, threads):
    for thread in prange(threads):
        begin, end = count * thread // threads, count * (thread + 1) // threads
        _call_range(function, arguments, begin, end)
