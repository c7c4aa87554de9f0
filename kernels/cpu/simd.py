"""Vectorized loops over channels-last tensors of bfloat16 or float32, given by their addresses.

A loop body is written once in Python and emitted for every vector of channels: `for_each_tile`
calls it with a `Tile`, up to TILE_ROWS rows of one vector of channels, which loads, computes and
stores. All arithmetic is float32.

Kernels in other files inline these functions. numba's cache does not notice when this file changes;
`jit_cache.compile_cpu_kernels` does.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastbyol.kernels.cpu.intrinsics import LANES, round_bfloat16, splat

TILE_ROWS = 4  # per-channel values are loaded once for this many rows
_I64, _I32, _I16, _F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()
_CONTRACT = ("contract",)


# --- scalars and arrays in compiled functions ---


@intrinsic
def float32_array(typing_context, address):
    """Return a pointer to the float32 array at an address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], _F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def float64_array(typing_context, address):
    """Return a pointer to the float64 array at an address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.DoubleType().as_pointer())

    return types.CPointer(types.float64)(types.int64), generate


@intrinsic
def bits_to_float64(typing_context, bits):
    """Reinterpret an int64 as float64."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def load_bfloat16(typing_context, address, index):
    """Return element `index` of the bfloat16 array at an address, as float32."""

    def generate(context, builder, signature, arguments):
        return load_vector(builder, arguments[0], arguments[1], 1, bfloat16=True, scalar=True)

    return types.float32(types.int64, types.int64), generate


# --- helpers that emit LLVM IR ---


def load_vector(builder, address, index, lanes, *, bfloat16, scalar=False) -> ir.Value:
    """Load elements from `index` on of the array at an address as float32 (vector or scalar)."""
    stored, wide, result = _I16 if bfloat16 else _F32, _I32, _F32
    if not scalar:
        stored, wide, result = (ir.VectorType(kind, lanes) for kind in (stored, wide, result))
    pointer = builder.gep(builder.inttoptr(address, (_I16 if bfloat16 else _F32).as_pointer()), [index])
    value = builder.load(builder.bitcast(pointer, stored.as_pointer()), align=2 if bfloat16 else 4)
    if not bfloat16:
        return value
    upper = ir.Constant(wide, 16 if scalar else [16] * lanes)
    return builder.bitcast(builder.shl(builder.zext(value, wide), upper), result)


def store_vector(builder, value, address, index, *, bfloat16) -> None:
    """Store a float32 vector to the array at an address, from element `index` on."""
    pointer = builder.gep(builder.inttoptr(address, (_I16 if bfloat16 else _F32).as_pointer()), [index])
    if bfloat16:
        value = round_bfloat16(builder, value)
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=2 if bfloat16 else 4)


class Tile:
    """Up to TILE_ROWS rows of one vector of channels; `for_each_tile` passes it to the loop body.

    Attributes:
        rows: Number of rows.
        lanes: Number of channels.
    """

    def __init__(self, builder, row, rows, channel, lanes, stride) -> None:
        self.builder, self.rows, self.lanes, self._channel = builder, rows, lanes, channel
        self._offsets = [
            builder.add(builder.mul(builder.add(row, ir.Constant(_I64, k)), stride), channel) for k in range(rows)
        ]

    def load(self, address, *, bfloat16) -> list[ir.Value]:
        """Load one vector per row from a tensor of x's size."""
        return [load_vector(self.builder, address, k, self.lanes, bfloat16=bfloat16) for k in self._offsets]

    def store(self, values, address, *, bfloat16) -> None:
        """Store one vector per row to a tensor of x's size."""
        for value, offset in zip(values, self._offsets, strict=True):
            store_vector(self.builder, value, address, offset, bfloat16=bfloat16)

    def load_channels(self, address, *, bfloat16=False) -> ir.Value:
        """Load this tile's channels of a (C,) array."""
        return load_vector(self.builder, address, self._channel, self.lanes, bfloat16=bfloat16)

    def accumulate(self, address, values) -> None:
        """Add vectors to this tile's channels of a (C,) array, pairwise for less rounding error."""
        while len(values) > 1:
            values = [
                self.add(*values[k : k + 2]) if k + 1 < len(values) else values[k] for k in range(0, len(values), 2)
            ]
        total = self.add(self.load_channels(address), values[0])
        store_vector(self.builder, total, address, self._channel, bfloat16=False)

    def add(self, a, b) -> ir.Value:
        """Return a + b, which LLVM may fuse with a product."""
        return self.builder.fadd(a, b, flags=_CONTRACT)

    def sub(self, a, b) -> ir.Value:
        """Return a - b, which LLVM may fuse with a product."""
        return self.builder.fsub(a, b, flags=_CONTRACT)

    def mul(self, a, b) -> ir.Value:
        """Return a * b, which LLVM may fuse with a sum."""
        return self.builder.fmul(a, b, flags=_CONTRACT)

    def splat(self, scalar) -> ir.Value:
        """Return a vector of copies of the scalar."""
        return splat(self.builder, scalar, self.lanes)

    def where_above(self, values, threshold, then) -> list[ir.Value]:
        """Return then[k] where values[k] is above `threshold` or NaN, else 0."""
        zero = ir.Constant(threshold.type, [0.0] * self.lanes)
        return [
            self.builder.select(self.builder.fcmp_unordered(">", value, threshold), kept, zero)
            for value, kept in zip(values, then, strict=True)
        ]

    def maximum(self, values, floor) -> list[ir.Value]:
        """Return the maximum of each value and `floor`; NaN stays NaN."""
        return [self.builder.select(self.builder.fcmp_ordered("<", v, floor), floor, v) for v in values]


def for_each_channel_vector(builder, channels, body: Callable[[ir.Value, int], None]) -> None:
    """Emit loops that run body(channel, lanes) for LANES channels, then for single ones."""
    vectorized = builder.and_(channels, ir.Constant(_I64, -LANES))
    for start, end, lanes in ((ir.Constant(_I64, 0), vectorized, LANES), (vectorized, channels, 1)):
        with cgutils.for_range_slice(builder, start, end, ir.Constant(_I64, lanes)) as (channel, _):
            body(channel, lanes)


def for_each_tile(builder, rows, channels, stride, body: Callable[[Tile], None]) -> None:
    """Emit loops that run body(tile) for tiles of TILE_ROWS rows, then for single remaining rows.

    A row holds `channels` values; rows start `stride` values apart.
    """
    tiled = builder.and_(rows, ir.Constant(_I64, -TILE_ROWS))
    for start, end, count in ((ir.Constant(_I64, 0), tiled, TILE_ROWS), (tiled, rows, 1)):
        with cgutils.for_range_slice(builder, start, end, ir.Constant(_I64, count)) as (row, _):
            for_each_channel_vector(
                builder,
                channels,
                # Called immediately, so row and count have the values of this iteration.
                lambda channel, lanes: body(Tile(builder, row, count, channel, lanes, stride)),  # noqa: B023
            )
