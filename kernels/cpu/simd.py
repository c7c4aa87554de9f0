"""Vectors of channels in compiled kernels over channels-last tensors of bfloat16 or float32, which are given by their addresses.

Loops over rows and channels are made around a body that is written once: `over_rows` calls it with a `Tile`, up to ROWS rows of one
vector of channels, on which it loads, computes and stores. All arithmetic is float32.

numba's cache does not notice a change of this file in the kernels that use it; `dispatch.compile_cpu_kernels` does.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastbyol.kernels.cpu.intrinsics import LANES, round_bfloat16, splat

ROWS = 4  # that a vector of channels is carried over at once: what is kept a channel is loaded once for all of them
_I64, _I32, _I16, _F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()
_CONTRACT = ("contract",)


@intrinsic
def floats(typing_context, address):
    """The float32 numbers at an address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], _F32.as_pointer())

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def doubles(typing_context, address):
    """The float64 numbers at an address."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.DoubleType().as_pointer())

    return types.CPointer(types.float64)(types.int64), generate


@intrinsic
def double_of(typing_context, bits):
    """The float64 with these bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def bfloat16_at(typing_context, address, index):
    """bfloat16 number `index` at an address, as float32."""

    def generate(context, builder, signature, arguments):
        return load(builder, arguments[0], arguments[1], 1, bfloat16=True, scalar=True)

    return types.float32(types.int64, types.int64), generate


def load(builder, address, index, lanes, *, bfloat16, scalar=False) -> ir.Value:
    """Numbers `index` to `index` + `lanes` - 1 at an address, as a vector of float32 (or, scalar, one float32)."""
    stored, wide, result = _I16 if bfloat16 else _F32, _I32, _F32
    if not scalar:
        stored, wide, result = (ir.VectorType(kind, lanes) for kind in (stored, wide, result))
    place = builder.gep(builder.inttoptr(address, (_I16 if bfloat16 else _F32).as_pointer()), [index])
    value = builder.load(builder.bitcast(place, stored.as_pointer()), align=2 if bfloat16 else 4)
    if not bfloat16:
        return value
    upper = ir.Constant(wide, 16 if scalar else [16] * lanes)
    return builder.bitcast(builder.shl(builder.zext(value, wide), upper), result)


def store(builder, value, address, index, *, bfloat16) -> None:
    """Writes a vector of float32 as numbers from `index` on."""
    place = builder.gep(builder.inttoptr(address, (_I16 if bfloat16 else _F32).as_pointer()), [index])
    if bfloat16:
        value = round_bfloat16(builder, value)
    builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=2 if bfloat16 else 4)


class Tile:
    """Up to ROWS rows of one vector of channels, in the middle of the loops that `over_rows` makes.

    Attributes:
        rows: how many.
        lanes: channels.
    """

    def __init__(self, builder, row, rows, channel, lanes, stride) -> None:
        self.builder, self.rows, self.lanes, self._channel = builder, rows, lanes, channel
        self._places = [
            builder.add(builder.mul(builder.add(row, ir.Constant(_I64, k)), stride), channel) for k in range(rows)
        ]

    def load(self, address, *, bfloat16) -> list[ir.Value]:
        """A vector a row, of a tensor of x's size."""
        return [load(self.builder, address, place, self.lanes, bfloat16=bfloat16) for place in self._places]

    def store(self, values, address, *, bfloat16) -> None:
        """Writes a vector a row."""
        for value, place in zip(values, self._places, strict=True):
            store(self.builder, value, address, place, bfloat16=bfloat16)

    def channels(self, address, *, bfloat16=False) -> ir.Value:
        """The channels' vector of a (C,) array."""
        return load(self.builder, address, self._channel, self.lanes, bfloat16=bfloat16)

    def add_to(self, address, values) -> None:
        """Adds vectors to the channels of a (C,) float32 array; in pairs, which rounds less than one by one."""
        while len(values) > 1:
            values = [
                self.plus(*values[k : k + 2]) if k + 1 < len(values) else values[k] for k in range(0, len(values), 2)
            ]
        store(self.builder, self.plus(self.channels(address), values[0]), address, self._channel, bfloat16=False)

    def plus(self, a, b) -> ir.Value:
        """a + b, to be fused with a product."""
        return self.builder.fadd(a, b, flags=_CONTRACT)

    def minus(self, a, b) -> ir.Value:
        """a - b."""
        return self.builder.fsub(a, b, flags=_CONTRACT)

    def times(self, a, b) -> ir.Value:
        """a b, to be fused with a sum."""
        return self.builder.fmul(a, b, flags=_CONTRACT)

    def splat(self, scalar) -> ir.Value:
        """The scalar in all lanes."""
        return splat(self.builder, scalar, self.lanes)

    def above(self, values, floor, otherwise) -> list[ir.Value]:
        """otherwise[k] where values[k] is above `floor` or NaN, else 0."""
        zero = ir.Constant(floor.type, [0.0] * self.lanes)
        return [
            self.builder.select(self.builder.fcmp_unordered(">", v, floor), o, zero)
            for v, o in zip(values, otherwise, strict=True)
        ]

    def at_least(self, values, floor) -> list[ir.Value]:
        """The larger of value and `floor`; NaN stays NaN."""
        return [self.builder.select(self.builder.fcmp_ordered("<", v, floor), floor, v) for v in values]


def over_channels(builder, channels, body: Callable[[ir.Value, int], None]) -> None:
    """Makes loops that call body(channel, lanes) for vectors of LANES channels, and for what is left one by one."""
    whole = builder.and_(channels, ir.Constant(_I64, -LANES))
    for begin, end, lanes in ((ir.Constant(_I64, 0), whole, LANES), (whole, channels, 1)):
        with cgutils.for_range_slice(builder, begin, end, ir.Constant(_I64, lanes)) as (channel, _):
            body(channel, lanes)


def over_rows(builder, rows, channels, stride, body: Callable[[Tile], None]) -> None:
    """Makes loops that call body(tile) for tiles of ROWS rows, and one by one for the rows that are left.

    Rows of `channels` channels are `stride` values apart.
    """
    whole = builder.and_(rows, ir.Constant(_I64, -ROWS))
    for begin, end, count in ((ir.Constant(_I64, 0), whole, ROWS), (whole, rows, 1)):
        with cgutils.for_range_slice(builder, begin, end, ir.Constant(_I64, count)) as (row, _):
            over_channels(
                builder,
                channels,
                # Called at once: row and count are this iteration's.
                lambda channel, lanes: body(Tile(builder, row, count, channel, lanes, stride)),  # noqa: B023
            )
