"""Typed raw pointers for numba kernels: fp32 and bf16 memory read as fp32.

A kernel takes addresses (``tensor.data_ptr()``) and a *marker*, a null pointer whose type says what
the addresses point at: ``float32`` for fp32, ``uint16`` for bf16. That makes a call cost about one
microsecond however many tensors it takes (unboxing NumPy views costs more than most of the
kernels), and lets LLVM vectorise: an index into a NumPy array may be negative, an offset from a
pointer may not. Nothing is bounds-checked: the callers check shapes.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Sums may be reordered and products contracted into FMAs; NaN and infinity keep their meaning. With
# Python's own error model each division may raise, which ends vectorisation.
COMPILE_OPTIONS: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "error_model": "numpy",
    "nogil": True,
}

# Compiled into its callers, again for each of them: nest helpers little, or compilation takes long.
helper = functools.partial(njit, **COMPILE_OPTIONS)

_F32, _I32, _I16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)


def is_bf16(base: types.CPointer) -> bool:
    """Whether a pointer's elements are bf16 (their NumPy stand-in is uint16)."""
    return base.dtype == types.uint16


def _like(value, element):
    """``element`` as a type of the same shape as ``value``: a scalar's or a vector's."""
    kind = value.type
    return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element


def widen(builder, bits):
    """IR: bf16 bits to fp32, being the upper half of the same number. Scalars and vectors."""
    wide = builder.zext(bits, _like(bits, _I32))
    sixteen = _constant(wide.type, 16)
    return builder.bitcast(builder.shl(wide, sixteen), _like(bits, _F32))


def narrow(builder, value):
    """IR: fp32 to bf16 bits, to nearest even; a NaN stays one. Scalars and vectors."""
    bits = builder.bitcast(value, _like(value, _I32))
    odd = builder.and_(builder.lshr(bits, _constant(bits.type, 16)), _constant(bits.type, 1))
    bias = builder.add(_constant(bits.type, 0x7FFF), odd)
    upper = builder.lshr(builder.add(bits, bias), _constant(bits.type, 16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    kept = builder.select(is_nan, _constant(bits.type, 0x7FC0), upper)
    return builder.trunc(kept, _like(value, _I16))


def _constant(kind, number):
    count = [number] * kind.count if isinstance(kind, ir.VectorType) else number
    return ir.Constant(kind, count)


@intrinsic
def pointer(typingctx, address, marker):
    """``address`` (int64) as a pointer of the type of ``marker``, whose value does not matter."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(marker))

    return marker(types.int64, marker), codegen


@intrinsic
def float_pointer(typingctx, address):
    """``address`` as a pointer to fp32."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], _F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


@intrinsic
def int32_pointer(typingctx, address):
    """``address`` as a pointer to int32."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], _I32.as_pointer())

    return types.CPointer(types.int32)(types.int64), codegen


@intrinsic
def int64_pointer(typingctx, address):
    """``address`` as a pointer to int64."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(64).as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def advance(typingctx, base, count):
    """``base`` moved by ``count`` elements."""

    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return base(base, types.int64), codegen


@intrinsic
def load(typingctx, base, index):
    """Element ``index`` as fp32."""
    bf16 = is_bf16(base)

    def codegen(context, builder, signature, args):
        value = builder.load(builder.gep(args[0], [args[1]]))
        value.align = 2 if bf16 else 4
        return widen(builder, value) if bf16 else value

    return types.float32(base, types.int64), codegen


@intrinsic
def store(typingctx, base, index, value):
    """Write the fp32 ``value`` to element ``index``, rounded to the element's type."""
    bf16 = is_bf16(base)

    def codegen(context, builder, signature, args):
        value = narrow(builder, args[2]) if bf16 else args[2]
        instruction = builder.store(value, builder.gep(args[0], [args[1]]))
        instruction.align = 2 if bf16 else 4
        return context.get_dummy_value()

    return types.void(base, types.int64, types.float32), codegen


@intrinsic
def rounded(typingctx, base, value):
    """``value`` as it would read back after a store to ``base``."""
    bf16 = is_bf16(base)

    def codegen(context, builder, signature, args):
        return widen(builder, narrow(builder, args[1])) if bf16 else args[1]

    return types.float32(base, types.float32), codegen


@intrinsic
def load_int(typingctx, base, index):
    """Element ``index`` of an integer pointer, as int64."""

    def codegen(context, builder, signature, args):
        value = builder.load(builder.gep(args[0], [args[1]]))
        width = signature.args[0].dtype.bitwidth
        value.align = width // 8
        return value if width == 64 else builder.sext(value, ir.IntType(64))

    return types.int64(base, types.int64), codegen


@intrinsic
def fetch_add(typingctx, base, count):
    """Atomically add ``count`` to the int64 at ``base``; the value before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], args[1], "monotonic")

    return types.int64(base, types.int64), codegen


@intrinsic
def store_int(typingctx, base, index, value):
    """Write an int64 to element ``index`` of an int64 pointer."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(base, types.int64, types.int64), codegen


@intrinsic
def _bits_to_float(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], _F32)

    return types.float32(types.int32), codegen


@intrinsic
def _round_to_int(typingctx, value):
    """Nearest integer of an fp32 under 2**22, as int32: one addition, which always vectorises."""

    def codegen(context, builder, signature, args):
        magic = ir.Constant(
            _F32, 12582912.0
        )  # 1.5 * 2**23: the sum's low mantissa bits are the integer
        shifted = builder.fadd(
            args[0], magic
        )  # no fast-math flags here, or it would be folded away
        return builder.sub(builder.bitcast(shifted, _I32), builder.bitcast(magic, _I32))

    return types.int32(types.float32), codegen


@helper
def exp(x):
    """``e ** x`` in fp32 within 2 ulp, for ``x`` clamped to -87.3 .. 88.3; a NaN stays one.

    A call to libm does not vectorise. ``x = n log 2 + r``, and ``e ** r`` by the Taylor polynomial
    of degree 7 on ``|r| <= log(2) / 2``, whose remainder is under 1e-8.
    """
    clamped = min(max(x, np.float32(-87.3)), np.float32(88.3))
    n = _round_to_int(clamped * np.float32(1.4426950408889634))
    n_float = np.float32(n)
    # log 2 in two parts: the first has few bits, so that its product with n is exact
    r = clamped - n_float * np.float32(0.693359375)
    r = r - n_float * np.float32(-2.12194440e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(1 / 2)
    p = p * r + np.float32(1)
    p = p * r + np.float32(1)
    result = p * _bits_to_float(np.int32((n + np.int32(127)) << np.int32(23)))
    return result if x == x else x
