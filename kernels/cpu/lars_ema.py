"""LARS and the target update on the CPU, in numba.

Formulas and passes: kernels/lars_ema.py. Small tensors are processed whole, both passes in one task
while the tensor is in the cache, so that only 28 bytes per parameter come from memory.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.kernels.cpu import openmp
from fastbyol.kernels.multi_tensor import AddressTable, Chunks, Row, check_scalar

_CHUNK = 1 << 15  # values; also the length of a partial sum
_TASK_VALUES = 1 << 18
_FUSED_BYTES = 20 << 20  # tensors with up to 20 MiB of w and g are processed whole, in the cache

# Gradient dtypes as numbers in the task table, and as the values whose numba types select the code
# that reads them.
_DTYPES = {None: 0, torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# numba has no 16-bit floats on the CPU.
_AS_FLOAT32, _AS_BFLOAT16, _AS_FLOAT16 = np.float32(0), np.uint16(0), np.int16(0)

# Columns of the hyperparameter table; eta is -1 for a trust ratio of 1.
_WEIGHT_DECAY, _MOMENTUM, _ETA = range(3)
_ONE, _ZERO = torch.ones(()), torch.zeros(())


class LarsEma:
    """LARS and the target update; see `fastbyol.kernels.lars_ema.lars_update` for the call."""

    def __init__(self) -> None:
        self._table: AddressTable | None = None
        self._groups: NDArray[np.int64] | None = None

    @torch.no_grad()
    def __call__(self, tensors, groups, hypers, tau, *, inv_scale=None, found_inf=None):
        """Update the tensors in place."""
        check_scalar("tau", tau)
        tensors = self._prepare(tensors, groups)
        if not tensors:
            return
        table = self._table
        table.copy_in(tensors)
        scaled = inv_scale is not None
        # The kernels read scalars from memory, as on a GPU: no tensor becomes a Python number here.
        inverse, found = (inv_scale, found_inf) if scaled else (_ONE, _ZERO)
        hyper = np.array([h.as_floats() for h in hypers], dtype=np.float32)
        lrs = np.array([h.lr.data_ptr() for h in hypers], dtype=np.int64)
        scalars = [t.data_ptr() for t in (tau, inverse, found)]
        unfused, tasks = self._tasks[self._fused :], self._tasks

        def pack_args(tasks: NDArray[np.int64]) -> list[int]:
            arrays = [tasks, *self._chunk_arrays, table.addresses, table.sizes, self._groups, hyper, lrs]
            sums = [a.ctypes.data for a in (self._sums, self._not_finite)]
            return [*(a.ctypes.data for a in arrays), *scalars, scaled, *sums]

        if scaled:
            tasks = tasks * np.array([1, 1, 1, 0])  # no fused tasks: all norms before any update
            self._not_finite[:] = 0
            openmp.run(_norms_kernel, len(tasks), pack_args(tasks))
            if self._not_finite.any():
                found_inf.fill_(1)
        else:
            openmp.run(_norms_kernel, len(unfused), pack_args(unfused))
        openmp.run(_update_kernel, len(tasks), pack_args(tasks))
        table.copy_out(tensors)

    def _prepare(self, tensors: Sequence[Row], groups: Sequence[int]) -> Sequence[Row]:
        """Sort the tensors and update the tables; rebuild them if more than addresses changed."""
        nonempty = [(row, group) for row, group in zip(tensors, groups, strict=True) if row[0].numel()]
        nonempty.sort(key=lambda pair: str(pair[0][1].dtype))  # so that the chunks of a task have one dtype
        tensors, groups = [row for row, _ in nonempty], np.array([group for _, group in nonempty])
        if self._table is not None and self._table.matches(tensors) and np.array_equal(self._groups, groups):
            self._table.bind(tensors)
            return tensors
        self._table, self._groups = AddressTable(tensors), groups
        self._table.bind(tensors)
        chunks = Chunks.split(self._table.sizes, _CHUNK)
        self._chunk_arrays = chunks.row, chunks.start, chunks.first
        self._sums, self._not_finite = np.zeros((len(chunks.row), 2)), np.zeros(len(chunks.row), dtype=np.uint8)
        self._tasks, self._fused = _split_into_tasks(self._table, chunks)
        return tensors


def _split_into_tasks(table: AddressTable, chunks: Chunks) -> tuple[NDArray[np.int64], int]:
    """Group chunks into tasks: whole small tensors, largest task first, then parts of large ones.

    Returns:
        (tasks, 4) int64, see _TASKS, and the number of fused tasks, which hold whole tensors.
    """
    total = int(table.sizes.sum())
    limit = min(_FUSED_BYTES // 8, max(_TASK_VALUES, total // (4 * torch.get_num_threads())))
    fused, unfused = [], []
    last, values = -1, 0  # of the current fused task: its end and its number of values
    for i, size in enumerate(table.sizes.tolist()):
        first, end = int(chunks.first[i]), int(chunks.first[i + 1])
        dtype = _DTYPES[table.dtypes[i]]
        if size > limit:
            step = _TASK_VALUES // _CHUNK
            unfused += [(k, min(k + step, end), dtype, 0) for k in range(first, end, step)]
            continue
        if last == first and values + size <= _TASK_VALUES and fused[-1][2] == dtype:
            fused[-1] = (fused[-1][0], end, dtype, 1)
            values += size
        else:
            fused.append((first, end, dtype, 1))
            values = size
        last = end
    fused.sort(key=lambda task: task[0] - task[1])
    return np.array(fused + unfused, dtype=np.int64).reshape(-1, 4), len(fused)


class EmaUpdate:
    """The target update alone; see `fastbyol.kernels.lars_ema.ema_update` for the call."""

    def __init__(self) -> None:
        self._table: AddressTable | None = None

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[Tensor, Tensor]], tau: Tensor) -> None:
        """Update the targets in place."""
        check_scalar("tau", tau)
        tensors = [(weight, None, None, target) for weight, target in pairs if weight.numel()]
        if not tensors:
            return
        if self._table is None or not self._table.matches(tensors):
            self._table = AddressTable(tensors)
            self._chunks = Chunks.split(self._table.sizes, _CHUNK)
        table, c = self._table, self._chunks
        table.bind(tensors)

        step, n = _TASK_VALUES // _CHUNK, len(c.row)
        tasks = np.array([(k, min(k + step, n), 0, 0) for k in range(0, n, step)], dtype=np.int64)
        args = [0] * (_NOT_FINITE + 1)
        arrays = ((_TASKS, tasks), (_CHUNK_ROW, c.row), (_CHUNK_START, c.start))
        for index, array in (*arrays, (_ADDRESSES, table.addresses), (_SIZES, table.sizes)):
            args[index] = array.ctypes.data
        args[_TAU] = tau.data_ptr()
        table.copy_in(tensors)
        openmp.run(_ema_kernel, len(tasks), args)
        table.copy_out(tensors)


# --- LLVM intrinsics ---


def _pointer(builder, address, index, kind) -> ir.Value:
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


@intrinsic
def _load_float32(typing_context, address, index):
    """Return element `index` of the float32 array at an address."""

    def generate(context, builder, signature, arguments):
        return builder.load(_pointer(builder, *arguments, ir.FloatType()))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def _store_float32(typing_context, address, index, value):
    """Set element `index` of the float32 array at an address."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], _pointer(builder, *arguments[:2], ir.FloatType()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic
def _load_gradient(typing_context, sample, address, index):
    """Return element `index` of an array, whose dtype is the type of `sample`, as float32."""

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
def _array(typing_context, like, address):
    """Return a pointer to the array at an address, with elements of the type of `like`."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[1], context.get_value_type(signature.return_type))

    return types.CPointer(like)(like, types.int64), generate


@intrinsic
def _item_size(typing_context, sample):
    """Return the size in bytes of the type of `sample`."""

    def generate(context, builder, signature, arguments):
        return ir.Constant(ir.IntType(64), signature.args[0].bitwidth // 8)

    return types.int64(sample), generate


# --- kernels ---

_JIT = {"error_model": "numpy", "fastmath": {"contract", "nsz", "reassoc"}}

# Arguments of all kernels: addresses of tables (row-major) and scalars.
(
    _TASKS,  # (tasks, 4) int64: first chunk, end, gradient dtype, 1 if fused (both passes in one task)
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
    _SCALED,  # 1 with a loss scale
    _SUMS,  # (C, 2) float64
    _NOT_FINITE,  # (C,) uint8
) = range(15)


@njit(**_JIT)
def _load_task(task, args):
    """Return a task's first chunk, end, gradient dtype, and whether it is fused."""
    table = _array(task, args[_TASKS])
    return table[4 * task], table[4 * task + 1], table[4 * task + 2], table[4 * task + 3]


@njit(**_JIT)
def _norms(begin, end, sample, args):
    """First pass over chunks begin .. end - 1: |w|^2, |u|^2, and 1 if g has an infinity or NaN."""
    chunk_row, chunk_start = _array(begin, args[_CHUNK_ROW]), _array(begin, args[_CHUNK_START])
    addresses, sizes = _array(begin, args[_ADDRESSES]), _array(begin, args[_SIZES])
    groups = _array(begin, args[_GROUPS])
    hyper, sums = _array(np.float32(0), args[_HYPER]), _array(0.0, args[_SUMS])
    bad = _array(np.uint8(0), args[_NOT_FINITE])
    inverse = _load_float32(args[_INV_SCALE], 0)
    for c in range(begin, end):
        row, start = chunk_row[c], chunk_start[c]
        group = groups[row]
        if hyper[3 * group + _ETA] < 0 and args[_SCALED] == 0:
            continue
        n = min(sizes[row] - start, _CHUNK)
        w = addresses[4 * row] + 4 * start
        g = addresses[4 * row + 1] + _item_size(sample) * start
        decay = hyper[3 * group + _WEIGHT_DECAY]
        ww, uu = 0.0, 0.0
        not_finite = np.float32(0)
        for block in range(0, n, 1024):  # short enough for float32 sums
            block_ww, block_uu = np.float32(0), np.float32(0)
            for i in range(block, min(block + 1024, n)):
                x, y = _load_float32(w, i), _load_gradient(sample, g, i)
                u = y * inverse + decay * x
                block_ww += x * x
                block_uu += u * u
                not_finite += y * np.float32(0)
            ww += block_ww
            uu += block_uu
        sums[2 * c], sums[2 * c + 1], bad[c] = ww, uu, not_finite != 0


@njit(**_JIT)
def _update(begin, end, sample, args):
    """Second pass over chunks begin .. end - 1: momentum, weight and target."""
    if _load_float32(args[_FOUND_INF], 0) != 0:
        return
    chunk_row, chunk_start = _array(begin, args[_CHUNK_ROW]), _array(begin, args[_CHUNK_START])
    chunk_first, lrs = _array(begin, args[_CHUNK_FIRST]), _array(begin, args[_LRS])
    addresses, sizes = _array(begin, args[_ADDRESSES]), _array(begin, args[_SIZES])
    groups = _array(begin, args[_GROUPS])
    hyper, sums = _array(np.float32(0), args[_HYPER]), _array(0.0, args[_SUMS])
    keep, inverse = np.float32(1) - _load_float32(args[_TAU], 0), _load_float32(args[_INV_SCALE], 0)
    for c in range(begin, end):
        row, start = chunk_row[c], chunk_start[c]
        group = groups[row]
        lr, decay = _load_float32(lrs[group], 0), hyper[3 * group + _WEIGHT_DECAY]
        mu, eta = hyper[3 * group + _MOMENTUM], hyper[3 * group + _ETA]
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
        g = addresses[4 * row + 1] + _item_size(sample) * start
        scale, decay = ratio * inverse, ratio * decay
        if addresses[4 * row + 3] == 0:
            for i in range(n):
                x = _load_float32(w, i)
                v = mu * _load_float32(m, i) + (scale * _load_gradient(sample, g, i) + decay * x)
                _store_float32(m, i, v)
                _store_float32(w, i, x - lr * v)
        else:
            for i in range(n):
                x, y = _load_float32(w, i), _load_float32(t, i)
                v = mu * _load_float32(m, i) + (scale * _load_gradient(sample, g, i) + decay * x)
                x -= lr * v
                _store_float32(m, i, v)
                _store_float32(w, i, x)
                _store_float32(t, i, y + keep * (x - y))


@njit(**_JIT)
def _run_passes(begin, end, sample, norms, update, args):
    if norms:
        _norms(begin, end, sample, args)
    if update:
        _update(begin, end, sample, args)


@njit(**_JIT)
def _run_task(task, update, args):
    """Run the norms only, or if `update` the update, after the norms if the task is fused."""
    begin, end, dtype, fused = _load_task(task, args)
    norms = fused or not update
    if dtype == 0:
        _run_passes(begin, end, _AS_FLOAT32, norms, update, args)
    elif dtype == 1:
        _run_passes(begin, end, _AS_BFLOAT16, norms, update, args)
    else:
        _run_passes(begin, end, _AS_FLOAT16, norms, update, args)


@openmp.kernel(**_JIT)
def _norms_kernel(task, args):
    """The norms of a task's chunks."""
    _run_task(task, False, args)


@openmp.kernel(**_JIT)
def _update_kernel(task, args):
    """The update of a task's chunks, preceded by their norms if the task is fused."""
    _run_task(task, True, args)


@openmp.kernel(**_JIT)
def _ema_kernel(task, args):
    """The target update alone, over a task's chunks."""
    begin, end, _, _ = _load_task(task, args)
    chunk_row, chunk_start = _array(begin, args[_CHUNK_ROW]), _array(begin, args[_CHUNK_START])
    addresses, sizes = _array(begin, args[_ADDRESSES]), _array(begin, args[_SIZES])
    keep = np.float32(1) - _load_float32(args[_TAU], 0)
    for c in range(begin, end):
        row, start = chunk_row[c], chunk_start[c]
        w, t = addresses[4 * row] + 4 * start, addresses[4 * row + 3] + 4 * start
        for i in range(min(sizes[row] - start, _CHUNK)):
            y = _load_float32(t, i)
            _store_float32(t, i, y + keep * (_load_float32(w, i) - y))


KERNELS = (_norms_kernel, _update_kernel, _ema_kernel)
