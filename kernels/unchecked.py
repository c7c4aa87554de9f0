"""Array access for inner loops: no wrap-around of negative indices, no slices; and one loop in vector registers.

A slice in compiled code counts references to its array, atomically, and `a[i]` with a signed index tests whether it counts
from the end; both keep LLVM from vector code or cost more than the few hundred values of a row. These do neither:
indices are taken as they are, so the caller proves that they are inside.

numba's cache does not notice a change of this file in the kernels that use it: remove kernels/__pycache__ after one.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8  # of `weighted_sum`: LLVM cuts its vectors to what the processor has

_I64 = ir.IntType(64)


def _data(context, builder, kind, array) -> ir.Value:
    return context.make_array(kind)(context, builder, array).data


def _place(context, builder, signature, arguments) -> ir.Value:
    index = context.cast(builder, arguments[1], signature.args[1], types.int64)
    return builder.gep(_data(context, builder, signature.args[0], arguments[0]), [index])


@intrinsic
def at(typing_context, array, index):
    """array.ravel()[index] of a C-contiguous array."""

    def generate(context, builder, signature, arguments):
        return builder.load(_place(context, builder, signature, arguments))

    return array.dtype(array, index), generate


@intrinsic
def put(typing_context, array, index, value):
    """array.ravel()[index] = value of a C-contiguous array."""

    def generate(context, builder, signature, arguments):
        value = context.cast(builder, arguments[2], signature.args[2], signature.args[0].dtype)
        builder.store(value, _place(context, builder, signature, arguments))
        return context.get_dummy_value()

    return types.void(array, index, value), generate


def weighted_sum(terms: int, *, accumulate: bool) -> Callable[..., Any]:
    """Makes f(source, base, offsets, weights, first, out, start, blocks), float32 arrays and int64 offsets, C-contiguous:

        out[start + j] (+)= sum over k of weights[k] * source[base + offsets[k] + j]

    for first <= k < first + terms and j < LANES * blocks.

    `source` and `out` are different arrays, both long enough for the last block. numba's loop vectoriser makes scalar code
    of this loop: that many streams are more than LLVM tests for aliases.
    """

    @intrinsic
    def add_up(typing_context, source, base, offsets, weights, first, out, start, blocks):
        whole = types.int64
        signature = types.void(source, whole, offsets, weights, whole, out, whole, whole)
        vector = ir.VectorType(ir.FloatType(), LANES)

        def generate(context, builder, signature, arguments):
            source, offsets, weights, out = (
                _data(context, builder, signature.args[i], arguments[i]) for i in (0, 2, 3, 5)
            )
            base, first, start, blocks = (arguments[i] for i in (1, 4, 6, 7))

            def constant(value):
                return ir.Constant(_I64, value)

            def vector_at(base, index):
                return builder.bitcast(builder.gep(base, [index]), vector.as_pointer())

            factors, begins = [], []
            for k in range(terms):
                term = builder.add(first, constant(k))
                scalar = builder.load(builder.gep(weights, [term]))
                lane = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
                zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
                factors.append(builder.shuffle_vector(lane, lane, zeros))
                begins.append(builder.add(base, builder.load(builder.gep(offsets, [term]))))
            with cgutils.for_range(builder, blocks) as loop:
                j = builder.mul(loop.index, constant(LANES))
                place = vector_at(out, builder.add(start, j))
                total = builder.load(place, align=4) if accumulate else None
                for factor, begin in zip(factors, begins, strict=True):
                    values = builder.load(vector_at(source, builder.add(begin, j)), align=4)
                    product = builder.fmul(values, factor, flags=("contract",))
                    total = product if total is None else builder.fadd(total, product, flags=("contract",))
                stored = builder.store(total, place)
                stored.align = 4
            return context.get_dummy_value()

        return signature, generate

    return add_up
