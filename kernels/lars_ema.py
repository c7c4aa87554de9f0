"""LARS and the target's moving average, in one call over all tensors.

Formulas, per tensor and in float32 (w online weight, g gradient, s loss scale, m momentum buffer, t target weight):

    u  = g / s + wd w
    r  = eta |w| / |u|        1 where either norm is 0, and for biases and norm-layer parameters (wd is 0 there too)
    m <- mu m + r u
    w <- w - lr m
    t <- t + (1 - tau) (w - t)    with the new w; for weights that have a target

With a loss scale nothing at all is written where any value of any gradient is infinite or NaN (a skipped step).

Source: You et al. 2017 (arXiv 1708.03888) as in `byol/utils/optimizers.py` of google-deepmind/deepmind-research, and
Grill et al. 2020, equation 1. Others differ: |g| + wd |w| + eps below the line is a different optimizer.

Two passes over all tensors, whatever their number and sizes, in chunks of a table of addresses:
    norms     per chunk |w|^2 and |u|^2: reads w and g, 8 bytes a parameter (6 with 16-bit gradients)
    update    reads w, g, m, t and writes w, m, t: 28 bytes a parameter (26); 20 (18) without a target
Together 36 bytes a parameter with a target, the least that two passes can move: the update of a tensor's first value needs the
norm of all of them. Tensors without a trust ratio have no first pass. On a CPU the threads take small tensors whole, both passes
while the tensor is in the cache, which leaves 28 bytes to memory. Partial sums are added in a fixed order: two runs give
the same bits, for any number of threads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.kernels.cpu import openmp as threads

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """Hyperparameters of one group of tensors."""

    lr: Tensor
    """Scalar on the tensors' device: read by the kernels, never by the host."""
    weight_decay: float
    momentum: float
    trust_coefficient: float | None
    """eta; None fixes the trust ratio at 1."""

    def __post_init__(self) -> None:
        check_scalar("lr", self.lr)


def check_scalar(name: str, x: Tensor) -> None:
    """Refuses what the kernels would misread: they read scalars as float32 where they lie.

    Raises:
        TypeError: x is no float32 tensor of one value.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.numel() != 1:
        raise TypeError(f"{name} must be a float32 scalar tensor, since the kernels read it where it lies, not {x!r}")


@torch.no_grad()
def lars_ema_reference(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    target: Tensor | None,
    *,
    lr: Tensor,
    tau: Tensor,
    weight_decay: float,
    momentum: float,
    trust_coefficient: float | None,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One tensor's update, in place, without a host sync; any float dtype of weight, so float64 too.

    Args:
        weight, momentum_buffer: any one shape; overwritten.
        grad: the same shape, any float dtype.
        target: the same shape, overwritten; None where the weight has no target (the predictor).
        lr, tau: scalars on the tensors' device.
        trust_coefficient: eta; None fixes the trust ratio at 1.
        inv_scale: scalar, 1 / s; None is 1.
        found_inf: scalar, not 0 where the step is to be skipped: some tensor's gradient is not finite.
    """
    update = grad.to(weight.dtype) * (1.0 if inv_scale is None else inv_scale) + weight_decay * weight
    if trust_coefficient is not None:
        weight_norm, update_norm = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(update)
        usable = (weight_norm > 0) & (update_norm > 0)
        update *= torch.where(usable, trust_coefficient * weight_norm / update_norm, 1.0)
    keep = torch.zeros((), dtype=torch.bool, device=weight.device) if found_inf is None else found_inf != 0
    new_momentum = momentum * momentum_buffer + update
    momentum_buffer.copy_(torch.where(keep, momentum_buffer, new_momentum))
    weight.copy_(torch.where(keep, weight, weight - lr * momentum_buffer))
    if target is not None:
        target.copy_(torch.where(keep, target, target + (1 - tau) * (weight - target)))


def ema_reference(weight: Tensor, target: Tensor, tau: Tensor) -> None:
    """t <- t + (1 - tau) (w - t), in place."""
    target.add_((1 - tau) * (weight - target))


Row = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # weight, gradient, momentum buffer, target
_GRADIENT = 1  # column of a row


class Rows:
    """The tensors of an update as rows of addresses: w, g, m, t, in a memory order that a row's tensors share.

    Tensors that do not fill their memory, or whose gradient or target is laid out in another order than the weight, are
    staged: copied to a buffer before the kernels and back after them.

    Args:
        tensors: (weight, gradient, momentum buffer, target or None) per parameter, all of one shape and on one device;
            gradient and momentum buffer may be None (the target update alone).

    Attributes:
        addresses: (T, 4) int64; 0 where there is no tensor.
        sizes: (T,) int64, values per tensor.
        dtypes: the gradients', one per tensor.

    Raises:
        ValueError: tensors of a row differ in shape or device (the kernels would write outside of them).
        TypeError: a dtype that the kernels do not know.
    """

    def __init__(self, tensors: Sequence[Row]) -> None:
        for row in tensors:
            _check(row)
        self._layout = _layout(tensors)
        self._buffers: dict[tuple[int, int], Tensor] = {}  # (row, column) -> staging buffer
        for i, row in enumerate(tensors):
            self._stage(i, row)
        self.sizes = np.array([row[0].numel() for row in tensors], dtype=np.int64)
        self.dtypes = [None if row[1] is None else row[1].dtype for row in tensors]
        self.addresses = np.zeros((len(tensors), 4), dtype=np.int64)

    def fit(self, tensors: Sequence[Row]) -> bool:
        """Whether these rows can stand for these tensors too: shapes, dtypes and orders of memory are the same."""
        return self._layout == _layout(tensors)

    def bind(self, tensors: Sequence[Row]) -> bool:
        """Takes the tensors' addresses, and holds none of them: gradients are to be freed after a step.

        Returns:
            whether any address has changed.
        """
        old = self.addresses
        pointers = [0 if x is None else x.data_ptr() for row in tensors for x in row]
        self.addresses = np.array(pointers, dtype=np.int64).reshape(-1, 4)
        for place, buffer in self._buffers.items():
            self.addresses[place] = buffer.data_ptr()
        return not np.array_equal(old, self.addresses)

    def before(self, tensors: Sequence[Row]) -> None:
        """Fills the staging buffers."""
        for (i, column), buffer in self._buffers.items():
            buffer.copy_(tensors[i][column])

    def after(self, tensors: Sequence[Row]) -> None:
        """Copies what the kernels wrote back from them."""
        for (i, column), buffer in self._buffers.items():
            if column != _GRADIENT:
                tensors[i][column].copy_(buffer)

    def _stage(self, i: int, row: Row) -> None:
        weight, grad = row[0], row[_GRADIENT]
        written = [k for k, x in enumerate(row) if x is not None and k != _GRADIENT]
        if not _fills_memory(weight) or any(_order(row[k]) != _order(weight) for k in written):
            for k in written:
                self._buffers[i, k] = torch.empty(weight.shape, device=weight.device)
            weight = self._buffers[i, 0]
        if grad is not None and _order(grad) != _order(weight):
            self._buffers[i, _GRADIENT] = torch.empty_like(weight, dtype=grad.dtype)


def _layout(tensors: Sequence[Row]) -> list[tuple[torch.dtype, torch.Size, tuple[int, ...]] | None]:
    return [None if x is None else (x.dtype, x.shape, x.stride()) for row in tensors for x in row]


def _check(row: Row) -> None:
    weight, grad = row[0], row[_GRADIENT]
    for x in row:
        if x is not None and (x.shape != weight.shape or x.device != weight.device):
            raise ValueError(
                f"a weight is {tuple(weight.shape)} on {weight.device}, its gradient, momentum or target {tuple(x.shape)} on "
                f"{x.device}"
            )
        if x is not None and x is not grad and x.dtype != torch.float32:
            raise TypeError(f"weights, momentum buffers and targets must be float32, not {x.dtype}")
    if grad is not None and grad.dtype not in GRADIENT_DTYPES:
        raise TypeError(f"gradients must be of {', '.join(map(str, GRADIENT_DTYPES))}, not {grad.dtype}")


def _fills_memory(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _order(x: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that have any."""
    return tuple(stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)


@dataclass(frozen=True)
class Chunks:
    """The rows cut into chunks of at most `length` values; chunk c holds values from start[c] on of row[c]."""

    row: NDArray[np.int64]
    start: NDArray[np.int64]
    first: NDArray[np.int64]  # (T + 1,): chunks first[i] .. first[i + 1] - 1 are row i's

    @staticmethod
    def of(sizes: NDArray[np.int64], length: int) -> "Chunks":
        """Cuts every row."""
        counts = -(-sizes // length)
        first = np.concatenate([[0], np.cumsum(counts)])
        row = np.repeat(np.arange(len(sizes)), counts)
        return Chunks(row, (np.arange(len(row)) - first[row]) * length, first)


# --- the CPU: numba, threads over chunks ---

_CHUNK = 1 << 15  # values; also the length of a partial sum
_RUN = 1 << 18  # values that a thread takes at a time
_WHOLE_BYTES = 20 << 20  # tensors whose w and g are no larger are taken whole: the second pass finds them in the cache
_JIT = {"error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}
# The gradients' dtypes as numbers, and as what compiled functions are told of them: a value of the type that they are read as.
_DTYPES = {None: 0, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_AS_FLOAT32, _AS_BFLOAT16, _AS_FLOAT16 = np.float32(0), np.uint16(0), np.int16(0)  # numba has no float16 on the CPU
_WEIGHT_DECAY, _MOMENTUM, _ETA = range(3)  # a group's hyperparameters; eta is -1 where r = 1


def _pointer(builder, address, index, kind) -> ir.Value:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


@intrinsic
def _value(typing_context, address, index):
    """float32 number `index` at an address."""

    def generate(context, builder, signature, arguments):
        return builder.load(_pointer(builder, *arguments, ir.FloatType()))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def _set_value(typing_context, address, index, value):
    """Writes float32 number `index` at an address."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], _pointer(builder, *arguments[:2], ir.FloatType()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def _gradient(typing_context, sample, address, index):
    """Number `index` at an address as float32; stored as float32, bfloat16 or float16, as the type of `sample` tells."""

    def generate(context, builder, signature, arguments):
        stored, address, index = signature.args[0], arguments[1], arguments[2]
        if stored == types.float32:
            return builder.load(_pointer(builder, address, index, ir.FloatType()))
        if stored == types.int16:
            return builder.fpext(builder.load(_pointer(builder, address, index, ir.HalfType())), ir.FloatType())
        bits = builder.zext(builder.load(_pointer(builder, address, index, ir.IntType(16))), ir.IntType(32))
        return builder.bitcast(builder.shl(bits, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(sample, types.int64, types.int64), generate


@intrinsic
def _numbers(typing_context, like, address):
    """The numbers at an address, of the type of `like`."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[1], context.get_value_type(signature.return_type))

    return types.CPointer(like)(like, types.int64), generate


# Words of all kernels: addresses of tables, all (., k) arrays with their rows end to end, and of the scalars.
(
    _UNITS,  # (units, 4) int64: chunks from, to (exclusive), number of the gradients' dtype, whether both passes are to be made
    _CHUNK_ROW,
    _CHUNK_START,
    _CHUNK_FIRST,
    _ADDRESSES,  # (T, 4) int64
    _SIZES,
    _GROUPS,
    _HYPER,  # (groups, 3) float32
    _LRS,  # (groups,) int64: addresses of scalars
    _TAU,
    _INV_SCALE,
    _FOUND_INF,
    _SCALED,  # whether there is a loss scale
    _SUMS,  # (C, 2) float64
    _BAD,  # (C,) uint8
) = range(15)


@njit(**_JIT)
def _unit(unit, words):
    """Chunks from and to, dtype, and whether both passes are to be made."""
    table = _numbers(unit, words[_UNITS])
    return table[4 * unit], table[4 * unit + 1], table[4 * unit + 2], table[4 * unit + 3]


@intrinsic
def _size(typing_context, sample):
    """Bytes of a value of this type."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(ir.IntType(64), signature.args[0].bitwidth // 8)

    return types.int64(sample), generate


@njit(**_JIT)
def _norms(begin, end, sample, words):
    """First pass over chunks begin .. end - 1: SUMS = |w|^2 and |u|^2; BAD = whether g holds an infinity or NaN."""
    chunk_row, chunk_start = _numbers(begin, words[_CHUNK_ROW]), _numbers(begin, words[_CHUNK_START])
    addresses, sizes, groups = (
        _numbers(begin, words[_ADDRESSES]),
        _numbers(begin, words[_SIZES]),
        _numbers(begin, words[_GROUPS]),
    )
    hyper, sums, bad = (
        _numbers(np.float32(0), words[_HYPER]),
        _numbers(0.0, words[_SUMS]),
        _numbers(np.uint8(0), words[_BAD]),
    )
    inverse = _value(words[_INV_SCALE], 0)
    for c in range(begin, end):
        row, start = chunk_row[c], chunk_start[c]
        group = groups[row]
        if hyper[3 * group + _ETA] < 0 and words[_SCALED] == 0:
            continue
        n = min(sizes[row] - start, _CHUNK)
        w = addresses[4 * row] + 4 * start
        g = addresses[4 * row + 1] + _size(sample) * start
        decay = hyper[3 * group + _WEIGHT_DECAY]
        ww, uu = 0.0, 0.0
        not_finite = np.float32(0)
        for block in range(0, n, 1024):  # short enough for float32 sums
            block_ww, block_uu = np.float32(0), np.float32(0)
            for i in range(block, min(block + 1024, n)):
                x, y = _value(w, i), _gradient(sample, g, i)
                u = y * inverse + decay * x
                block_ww += x * x
                block_uu += u * u
                not_finite += y * np.float32(0)
            ww += block_ww
            uu += block_uu
        sums[2 * c], sums[2 * c + 1], bad[c] = ww, uu, not_finite != 0


@njit(**_JIT)
def _update(begin, end, sample, words):
    """Second pass over chunks begin .. end - 1."""
    if _value(words[_FOUND_INF], 0) != 0:
        return
    chunk_row, chunk_start = _numbers(begin, words[_CHUNK_ROW]), _numbers(begin, words[_CHUNK_START])
    chunk_first, lrs = _numbers(begin, words[_CHUNK_FIRST]), _numbers(begin, words[_LRS])
    addresses, sizes, groups = (
        _numbers(begin, words[_ADDRESSES]),
        _numbers(begin, words[_SIZES]),
        _numbers(begin, words[_GROUPS]),
    )
    hyper, sums = _numbers(np.float32(0), words[_HYPER]), _numbers(0.0, words[_SUMS])
    keep, inverse = np.float32(1) - _value(words[_TAU], 0), _value(words[_INV_SCALE], 0)
    for c in range(begin, end):
        row, start = chunk_row[c], chunk_start[c]
        group = groups[row]
        lr, decay, mu, eta = (
            _value(lrs[group], 0),
            hyper[3 * group + _WEIGHT_DECAY],
            hyper[3 * group + _MOMENTUM],
            hyper[3 * group + _ETA],
        )
        ratio = np.float32(1)
        if eta >= 0:
            ww, uu = 0.0, 0.0
            for k in range(chunk_first[row], chunk_first[row + 1]):
                ww += sums[2 * k]
                uu += sums[2 * k + 1]
            if ww > 0 and uu > 0:
                ratio = np.float32(eta * math.sqrt(ww) / math.sqrt(uu))
        n = min(sizes[row] - start, _CHUNK)
        w, m, t = addresses[4 * row] + 4 * start, addresses[4 * row + 2] + 4 * start, addresses[4 * row + 3] + 4 * start
        g = addresses[4 * row + 1] + _size(sample) * start
        scale, decay = ratio * inverse, ratio * decay
        if addresses[4 * row + 3] == 0:
            for i in range(n):
                x = _value(w, i)
                v = mu * _value(m, i) + (scale * _gradient(sample, g, i) + decay * x)
                _set_value(m, i, v)
                _set_value(w, i, x - lr * v)
        else:
            for i in range(n):
                x, y = _value(w, i), _value(t, i)
                v = mu * _value(m, i) + (scale * _gradient(sample, g, i) + decay * x)
                x -= lr * v
                _set_value(m, i, v)
                _set_value(w, i, x)
                _set_value(t, i, y + keep * (x - y))


@threads.kernel(**_JIT)
def _first_pass(unit, words):
    """The norms of a unit's chunks."""
    begin, end, dtype, _ = _unit(unit, words)
    if dtype == 0:
        _norms(begin, end, _AS_FLOAT32, words)
    elif dtype == 1:
        _norms(begin, end, _AS_BFLOAT16, words)
    else:
        _norms(begin, end, _AS_FLOAT16, words)


@threads.kernel(**_JIT)
def _second_pass(unit, words):
    """The update of a unit's chunks; behind the first pass where the unit has not had it."""
    begin, end, dtype, both = _unit(unit, words)
    if dtype == 0:
        if both:
            _norms(begin, end, _AS_FLOAT32, words)
        _update(begin, end, _AS_FLOAT32, words)
    elif dtype == 1:
        if both:
            _norms(begin, end, _AS_BFLOAT16, words)
        _update(begin, end, _AS_BFLOAT16, words)
    else:
        if both:
            _norms(begin, end, _AS_FLOAT16, words)
        _update(begin, end, _AS_FLOAT16, words)


@threads.kernel(**_JIT)
def _average(unit, words):
    """The target update alone, over a unit's chunks."""
    begin, end, _, _ = _unit(unit, words)
    chunk_row, chunk_start = _numbers(begin, words[_CHUNK_ROW]), _numbers(begin, words[_CHUNK_START])
    addresses, sizes = _numbers(begin, words[_ADDRESSES]), _numbers(begin, words[_SIZES])
    keep = np.float32(1) - _value(words[_TAU], 0)
    for c in range(begin, end):
        row, start = chunk_row[c], chunk_start[c]
        w, t = addresses[4 * row] + 4 * start, addresses[4 * row + 3] + 4 * start
        for i in range(min(sizes[row] - start, _CHUNK)):
            y = _value(t, i)
            _set_value(t, i, y + keep * (_value(w, i) - y))


_ONE, _ZERO = torch.ones(()), torch.zeros(())
KERNELS = (_first_pass, _second_pass, _average)


class LarsEma:
    """LARS and the target update over many tensors on the CPU; keeps its tables while the tensors stay where they are.

    The same call with the same meaning on a GPU: `fastbyol.kernels.triton.lars_ema.LarsEma`.
    """

    def __init__(self) -> None:
        self._rows: Rows | None = None
        self._groups: NDArray[np.int64] | None = None

    @torch.no_grad()
    def __call__(
        self,
        tensors: Sequence[Row],
        groups: Sequence[int],
        hypers: Sequence[Hyper],
        tau: Tensor,
        *,
        inv_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """One update, in place.

        Args:
            tensors: (weight, gradient, momentum buffer, target or None) per parameter; float32, gradients also bfloat16 or
                float16.
            groups: per parameter, the index of its hyperparameters.
            hypers: of the groups.
            tau: scalar.
            inv_scale: scalar, 1 / loss scale; then `found_inf` is needed too.
            found_inf: scalar float32; set to 1 where a gradient is not finite. Where it is not 0, nothing is updated.
        """
        check_scalar("tau", tau)
        tensors = self._plan(tensors, groups)
        if not tensors:
            return
        rows = self._rows
        rows.before(tensors)
        scaled = inv_scale is not None
        # The kernels read the scalars where they are, as on a GPU: no tensor becomes a Python number here.
        inverse, found = (inv_scale, found_inf) if scaled else (_ONE, _ZERO)
        hyper = np.array([_hyper_row(h) for h in hypers], dtype=np.float32)
        lrs = np.array([h.lr.data_ptr() for h in hypers], dtype=np.int64)
        scalars = [t.data_ptr() for t in (tau, inverse, found)]
        split, units = self._units[self._whole :], self._units

        def words(units: NDArray[np.int64]) -> list[int]:
            arrays = [units, *self._tables, rows.addresses, rows.sizes, self._groups, hyper, lrs]
            sums = [a.ctypes.data for a in (self._sums, self._bad)]
            return [*(a.ctypes.data for a in arrays), *scalars, scaled, *sums]

        if scaled:
            units = units * np.array([1, 1, 1, 0])  # every unit has its first pass before any has its second
            self._bad[:] = 0
            threads.run(_first_pass, len(units), words(units))
            if self._bad.any():
                found_inf.fill_(1)
        else:
            threads.run(_first_pass, len(split), words(split))
        threads.run(_second_pass, len(units), words(units))
        rows.after(tensors)

    def _plan(self, tensors: Sequence[Row], groups: Sequence[int]) -> Sequence[Row]:
        """Makes the tables fit the tensors, anew where anything but addresses has changed; returns the tensors in their order."""
        kept = [(row, group) for row, group in zip(tensors, groups, strict=True) if row[0].numel()]
        # One dtype after the other, so that the chunks of a unit are of one dtype.
        kept.sort(key=lambda pair: str(pair[0][1].dtype))
        tensors, groups = [row for row, _ in kept], np.array([group for _, group in kept])
        if self._rows is not None and self._rows.fit(tensors) and np.array_equal(self._groups, groups):
            self._rows.bind(tensors)
            return tensors
        self._rows, self._groups = Rows(tensors), groups
        self._rows.bind(tensors)
        chunks = Chunks.of(self._rows.sizes, _CHUNK)
        self._tables = chunks.row, chunks.start, chunks.first
        self._sums, self._bad = np.zeros((len(chunks.row), 2)), np.zeros(len(chunks.row), dtype=np.uint8)
        self._units, self._whole = _units(self._rows, chunks)
        return tensors


def _units(rows: Rows, chunks: Chunks) -> tuple[NDArray[np.int64], int]:
    """What a thread takes at a time: runs of whole small rows, large ones first; then runs of chunks of the other rows.

    Returns:
        (units, 4), see _UNITS, and how many of them hold whole rows.
    """
    total = int(rows.sizes.sum())
    largest = min(_WHOLE_BYTES // 8, max(_RUN, total // (4 * torch.get_num_threads())))
    whole, split = [], []
    last, values = -1, 0  # of the run in hand: where its chunks end, and its size
    for i, size in enumerate(rows.sizes.tolist()):
        first, end = int(chunks.first[i]), int(chunks.first[i + 1])
        dtype = _DTYPES[rows.dtypes[i]]
        if size > largest:
            step = _RUN // _CHUNK
            split += [(k, min(k + step, end), dtype, 0) for k in range(first, end, step)]
            continue
        if last == first and values + size <= _RUN and whole[-1][2] == dtype:
            whole[-1] = (whole[-1][0], end, dtype, 1)
            values += size
        else:
            whole.append((first, end, dtype, 1))
            values = size
        last = end
    whole.sort(key=lambda unit: unit[0] - unit[1])
    return np.array(whole + split, dtype=np.int64).reshape(-1, 4), len(whole)


def _hyper_row(h: Hyper) -> tuple[float, float, float]:
    return h.weight_decay, h.momentum, -1.0 if h.trust_coefficient is None else h.trust_coefficient


class EmaUpdate:
    """The target update alone over many pairs on the CPU, for optimizers that do not move the target.

    The same call with the same meaning on a GPU: `fastbyol.kernels.triton.lars_ema.EmaUpdate`.
    """

    def __init__(self) -> None:
        self._rows: Rows | None = None

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[Tensor, Tensor]], tau: Tensor) -> None:
        """t <- t + (1 - tau) (w - t) in place for all pairs (w, t), float32."""
        check_scalar("tau", tau)
        tensors = [(weight, None, None, target) for weight, target in pairs if weight.numel()]
        if not tensors:
            return
        if self._rows is None or not self._rows.fit(tensors):
            self._rows = Rows(tensors)
            self._chunks = Chunks.of(self._rows.sizes, _CHUNK)
        rows, c = self._rows, self._chunks
        rows.bind(tensors)

        step, n = _RUN // _CHUNK, len(c.row)
        units = np.array([(k, min(k + step, n), 0, 0) for k in range(0, n, step)], dtype=np.int64)
        words = [0] * (_BAD + 1)
        arrays = ((_UNITS, units), (_CHUNK_ROW, c.row), (_CHUNK_START, c.start))
        for place, array in (*arrays, (_ADDRESSES, rows.addresses), (_SIZES, rows.sizes)):
            words[place] = array.ctypes.data
        words[_TAU] = tau.data_ptr()
        rows.before(tensors)
        threads.run(_average, len(units), words)
        rows.after(tensors)
