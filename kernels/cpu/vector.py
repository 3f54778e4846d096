"""Sixteen fp32 numbers as one value in numba kernels.

LLVM keeps such a value in one AVX-512 register, two AVX ones or four NEON ones, so that a kernel
can say which partial sums stay in registers. The loops of simple kernels need none of this: LLVM
vectorises them by itself.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from kernels.cpu.pointers import is_bf16, narrow, widen

LANES = 16

_F32 = ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)


class _Vector(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager, numba_type) -> None:
        super().__init__(manager, numba_type, _VECTOR)


def _splat(builder, scalar):
    one = builder.insert_element(
        ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
    )
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, one, mask)


def _call(builder, intrinsic_name, result, operands):
    """Call an LLVM intrinsic over vectors of sixteen."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    name = f"{intrinsic_name}.v{LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def _load(builder, base, index, bf16):
    """Sixteen elements at ``base + index``, widened."""
    address = builder.gep(base, [index])
    element = ir.IntType(16) if bf16 else _F32
    value = builder.load(builder.bitcast(address, ir.VectorType(element, LANES).as_pointer()))
    value.align = 2 if bf16 else 4
    return widen(builder, value) if bf16 else value


def _store(builder, value, base, index, bf16):
    """Sixteen elements to ``base + index``, narrowed."""
    if bf16:
        value = narrow(builder, value)
    address = builder.gep(base, [index])
    instruction = builder.store(value, builder.bitcast(address, value.type.as_pointer()))
    instruction.align = 2 if bf16 else 4


@intrinsic
def vfill(typingctx, value):
    """Sixteen times ``value``."""

    def codegen(context, builder, signature, args):
        return _splat(builder, args[0])

    return vector(types.float32), codegen


@intrinsic
def vload(typingctx, base, index):
    """Elements ``index .. index + 15``."""
    bf16 = is_bf16(base)

    def codegen(context, builder, signature, args):
        return _load(builder, args[0], args[1], bf16)

    return vector(base, types.int64), codegen


@intrinsic
def vstore(typingctx, base, index, value):
    """Write elements ``index .. index + 15``, rounded to the type of ``base``."""
    bf16 = is_bf16(base)

    def codegen(context, builder, signature, args):
        _store(builder, args[2], args[0], args[1], bf16)
        return context.get_dummy_value()

    return types.void(base, types.int64, vector), codegen


@intrinsic
def vfma(typingctx, scalar, value, total):
    """``scalar * value + total``."""

    def codegen(context, builder, signature, args):
        operands = [_splat(builder, args[0]), args[1], args[2]]
        return _call(builder, "llvm.fmuladd", _VECTOR, operands)

    return vector(types.float32, vector, vector), codegen


@intrinsic
def vadd(typingctx, a, b):
    """``a + b``."""

    def codegen(context, builder, signature, args):
        return builder.fadd(args[0], args[1])

    return vector(vector, vector), codegen


@intrinsic
def vscale(typingctx, scalar, value):
    """``scalar * value``."""

    def codegen(context, builder, signature, args):
        return builder.fmul(_splat(builder, args[0]), args[1])

    return vector(types.float32, vector), codegen


@intrinsic
def vmax(typingctx, a, b):
    """Greater of each pair; of a number and a NaN the number."""

    def codegen(context, builder, signature, args):
        return _call(builder, "llvm.maxnum", _VECTOR, args)

    return vector(vector, vector), codegen


@intrinsic
def greatest(typingctx, value):
    """Greatest of the sixteen; a NaN counts only where all are."""

    def codegen(context, builder, signature, args):
        return _call(builder, "llvm.vector.reduce.fmax", _F32, args)

    return types.float32(vector), codegen


@intrinsic
def transpose_16x16(typingctx, source, rows, target):
    """Transpose a block whose rows lie apart.

    Row j is the 16 elements of ``source`` from offset ``rows[j]`` (int64 pointer); ``target`` (fp32
    pointer) receives the 16 columns one after another.
    """
    bf16 = is_bf16(source)

    def codegen(context, builder, signature, args):
        base, offsets, out = args
        v = []
        for j in range(LANES):
            offset = builder.load(builder.gep(offsets, [ir.Constant(ir.IntType(64), j)]))
            v.append(_load(builder, base, offset, bf16))
        # Each stage swaps the off-diagonal blocks of every 2 x 2 arrangement of blocks of size
        # `step`.
        for step in (8, 4, 2, 1):
            lanes = range(LANES)
            upper = [k if not k & step else LANES + k - step for k in lanes]
            lower = [k + step if not k & step else LANES + k for k in lanes]
            for j in range(LANES):
                if not j & step:
                    a, b = v[j], v[j + step]
                    v[j] = _shuffle(builder, a, b, upper)
                    v[j + step] = _shuffle(builder, a, b, lower)
        for j in range(LANES):
            _store(builder, v[j], out, ir.Constant(ir.IntType(64), j * LANES), False)
        return context.get_dummy_value()

    return types.void(source, rows, target), codegen


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes))
