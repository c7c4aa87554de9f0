"""LARS and the target's moving average on a GPU: the two passes of kernels/lars_ema.py in Triton.

Formulas, bytes and reference are there. A program processes one chunk of one tensor, whose address
it reads from a table on the device. Each pass has one launch per kind of gradient (dtype, and
16-byte alignment): one for a model's own gradients, and a second one if some are unaligned views of
a bucket. lr, tau, 1 / loss scale and the flag of a non-finite gradient are read from device memory:
a change causes no host sync and no recompilation, and a CUDA graph that has captured the launches
follows them.

Shapes: T = tensors, C = chunks.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol.kernels.multi_tensor import AddressTable, Chunks, Hyper, Row, check_scalar

CHUNK = 1 << 14  # values per program: about 2,300 programs for a ResNet-50 pair
BLOCK = 2048  # values per iteration: two 16-byte vectors of each array per thread
WARPS = 8
GRADIENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _element_pointer(addresses, row, column, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to value `start` of a tensor in the table of addresses (T, 4)."""
    address = tl.load(addresses + 4 * row + column)
    pointer = address.to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:  # start is a multiple of CHUNK
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _squares(w, g, decay, inverse):
    """Return the terms of |w|^2, of |u|^2 and of the number of gradients that are not finite."""
    u = g * inverse + decay * w
    bad = (g * 0.0 != 0.0).to(tl.float32)
    return w * w, u * u, bad


@triton.jit(do_not_specialize=["first_chunk"])
def norms_kernel(
    chunk_row,  # (C,) int32: the tensor of a chunk
    chunk_start,  # (C,) int64: its first value there
    addresses,  # (T, 4) int64: w, g, m, t
    sizes,  # (T,) int64
    row_group,  # (T,) int32
    decays,  # (groups,) float32
    etas,  # (groups,) float32; negative for a trust ratio of 1
    inv_scale,  # scalar
    found_inf,  # scalar, set to 1
    sums,  # (C, 2) float32
    first_chunk,  # first chunk of this launch
    SCALED: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First pass over one chunk: |w|^2, |u|^2, and the flag of non-finite gradients."""
    c = first_chunk + tl.program_id(0)
    row = tl.load(chunk_row + c)
    group = tl.load(row_group + row)
    eta = tl.load(etas + group)
    if SCALED or eta >= 0:
        start = tl.load(chunk_start + c)
        n = tl.minimum(tl.load(sizes + row) - start, CHUNK).to(tl.int32)
        decay = tl.load(decays + group)
        inverse = tl.load(inv_scale)
        w_pointer = _element_pointer(addresses, row, 0, start, tl.float32, ALIGNED)
        g_pointer = _element_pointer(addresses, row, 1, start, DTYPE, ALIGNED)
        ww = tl.zeros((BLOCK,), tl.float32)
        uu = tl.zeros((BLOCK,), tl.float32)
        bad = tl.zeros((BLOCK,), tl.float32)
        offsets = tl.arange(0, BLOCK)
        whole = n // BLOCK
        for k in range(whole):
            w = tl.load(w_pointer + k * BLOCK + offsets)
            g = tl.load(g_pointer + k * BLOCK + offsets).to(tl.float32)
            more_ww, more_uu, more_bad = _squares(w, g, decay, inverse)
            ww, uu, bad = ww + more_ww, uu + more_uu, bad + more_bad
        if whole * BLOCK < n:
            inside = whole * BLOCK + offsets < n
            w = tl.load(w_pointer + whole * BLOCK + offsets, mask=inside, other=0.0)
            g = tl.load(g_pointer + whole * BLOCK + offsets, mask=inside, other=0.0).to(tl.float32)
            more_ww, more_uu, more_bad = _squares(w, g, decay, inverse)
            ww, uu, bad = ww + more_ww, uu + more_uu, bad + more_bad
        tl.store(sums + 2 * c, tl.sum(ww, 0))
        tl.store(sums + 2 * c + 1, tl.sum(uu, 0))
        if SCALED:
            if tl.sum(bad, 0) > 0:
                tl.store(found_inf, 1.0)


@triton.jit
def _ratio(sums, chunk_first, row, eta, BLOCK: tl.constexpr):
    """Return the trust ratio of a tensor from its chunks' sums, added in a fixed order."""
    begin = tl.load(chunk_first + row)
    end = tl.load(chunk_first + row + 1)
    ww = tl.zeros((BLOCK,), tl.float32)
    uu = tl.zeros((BLOCK,), tl.float32)
    end = tl.where(eta >= 0, end, begin)  # tensors without a trust ratio have no sums
    for k in range(begin, end, BLOCK):
        offsets = k + tl.arange(0, BLOCK)
        ww += tl.load(sums + 2 * offsets, mask=offsets < end, other=0.0)
        uu += tl.load(sums + 2 * offsets + 1, mask=offsets < end, other=0.0)
    w_norm = tl.sqrt_rn(tl.sum(ww, 0))
    u_norm = tl.sqrt_rn(tl.sum(uu, 0))
    usable = (w_norm > 0) & (u_norm > 0)
    return tl.where(usable, tl.div_rn(eta * w_norm, tl.where(usable, u_norm, 1.0)), 1.0)


@triton.jit
def _new_weights(w, g, m, lr, decay, mu, ratio, inverse):
    m = mu * m + ratio * (g * inverse + decay * w)
    return w - lr * m, m


@triton.jit(do_not_specialize=["first_chunk"])
def update_kernel(
    chunk_row,
    chunk_start,
    chunk_first,  # (T + 1,): first chunk of each tensor
    addresses,
    sizes,
    row_group,
    lrs,  # (groups,) int64: addresses of scalars
    decays,
    momenta,  # (groups,) float32
    etas,
    tau,  # scalar
    inv_scale,
    found_inf,
    sums,
    first_chunk,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second pass over one chunk: momentum, weight and target; does nothing if found_inf is set."""
    if tl.load(found_inf) == 0:
        c = first_chunk + tl.program_id(0)
        row = tl.load(chunk_row + c)
        group = tl.load(row_group + row)
        start = tl.load(chunk_start + c)
        n = tl.minimum(tl.load(sizes + row) - start, CHUNK).to(tl.int32)
        lr = tl.load(tl.load(lrs + group).to(tl.pointer_type(tl.float32)))
        decay = tl.load(decays + group)
        mu = tl.load(momenta + group)
        eta = tl.load(etas + group)
        keep = 1.0 - tl.load(tau)
        inverse = tl.load(inv_scale)
        ratio = _ratio(sums, chunk_first, row, eta, 256)
        has_target = tl.load(addresses + 4 * row + 3) != 0
        w_pointer = _element_pointer(addresses, row, 0, start, tl.float32, ALIGNED)
        g_pointer = _element_pointer(addresses, row, 1, start, DTYPE, ALIGNED)
        m_pointer = _element_pointer(addresses, row, 2, start, tl.float32, ALIGNED)
        t_pointer = _element_pointer(addresses, row, 3, start, tl.float32, ALIGNED)
        offsets = tl.arange(0, BLOCK)
        whole = n // BLOCK
        for k in range(whole):
            at = k * BLOCK + offsets
            w = tl.load(w_pointer + at)
            g = tl.load(g_pointer + at).to(tl.float32)
            m = tl.load(m_pointer + at)
            t = tl.load(t_pointer + at, mask=has_target)
            w, m = _new_weights(w, g, m, lr, decay, mu, ratio, inverse)
            tl.store(w_pointer + at, w)
            tl.store(m_pointer + at, m)
            tl.store(t_pointer + at, t + keep * (w - t), mask=has_target)
        if whole * BLOCK < n:
            at = whole * BLOCK + offsets
            inside = at < n
            w = tl.load(w_pointer + at, mask=inside)
            g = tl.load(g_pointer + at, mask=inside).to(tl.float32)
            m = tl.load(m_pointer + at, mask=inside)
            t = tl.load(t_pointer + at, mask=inside & has_target)
            w, m = _new_weights(w, g, m, lr, decay, mu, ratio, inverse)
            tl.store(w_pointer + at, w, mask=inside)
            tl.store(m_pointer + at, m, mask=inside)
            tl.store(t_pointer + at, t + keep * (w - t), mask=inside & has_target)


@triton.jit(do_not_specialize=["first_chunk"])
def ema_kernel(
    chunk_row,
    chunk_start,
    addresses,
    sizes,
    tau,
    first_chunk,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The target update alone, over one chunk."""
    c = first_chunk + tl.program_id(0)
    row = tl.load(chunk_row + c)
    start = tl.load(chunk_start + c)
    n = tl.minimum(tl.load(sizes + row) - start, CHUNK).to(tl.int32)
    keep = 1.0 - tl.load(tau)
    w_pointer = _element_pointer(addresses, row, 0, start, tl.float32, ALIGNED)
    t_pointer = _element_pointer(addresses, row, 3, start, tl.float32, ALIGNED)
    offsets = tl.arange(0, BLOCK)
    whole = n // BLOCK
    for k in range(whole):
        at = k * BLOCK + offsets
        w = tl.load(w_pointer + at)
        t = tl.load(t_pointer + at)
        tl.store(t_pointer + at, t + keep * (w - t))
    if whole * BLOCK < n:
        at = whole * BLOCK + offsets
        inside = at < n
        w = tl.load(w_pointer + at, mask=inside)
        t = tl.load(t_pointer + at, mask=inside)
        tl.store(t_pointer + at, t + keep * (w - t), mask=inside)


class _DeviceTables:
    """Addresses, chunks and launches of tensors, on their device; rebuilt if an address changes.

    Rows are sorted so that the chunks of a launch are consecutive.
    """

    def __init__(self) -> None:
        self.table: AddressTable | None = None
        self._groups: list[int] = []
        # Pinned memory for the next tables: it cannot be allocated during the capture of a CUDA
        # graph.
        self._spare: Tensor | None = None
        # Pinned memory that captured graphs copy from on every replay.
        self._captured: list[Tensor] = []

    def prepare(self, tensors: Sequence[Row], groups: Sequence[int]) -> Sequence[Row]:
        """Update the tables for the tensors, and return the tensors in the order of the tables.

        Raises:
            RuntimeError: Addresses have changed twice during graph captures, without a step outside
                in between.
        """
        nonempty = [(row, group) for row, group in zip(tensors, groups, strict=True) if row[0].numel()]
        nonempty.sort(key=lambda pair: _launch_key(pair[0]))
        tensors, groups = [row for row, _ in nonempty], [group for _, group in nonempty]
        new = self.table is None or not self.table.matches(tensors) or groups != self._groups
        if new:
            self.table, self._groups = AddressTable(tensors), groups
        if tensors and (self.table.bind(tensors) or new):
            self._build(tensors[0][0].device)
        return tensors

    def _build(self, device: torch.device) -> None:
        chunks = Chunks.split(self.table.sizes, CHUNK)
        addresses, sizes = self.table.addresses.ravel(), self.table.sizes
        parts = chunks.row, chunks.start, chunks.first, addresses, sizes, np.array(self._groups)
        # Every table starts at a multiple of 16 bytes: Triton would recompile the kernels for other
        # pointers.
        parts = [np.pad(part, (0, len(part) % 2)) for part in parts]
        packed = torch.from_numpy(np.concatenate(parts))
        if device.type == "cuda":
            packed = self._copy_to(device, packed)
        tables = packed.split([len(part) for part in parts])
        self.chunk_row, self.chunk_start, self.chunk_first, self.addresses, self.sizes, self.row_group = tables
        self.sums = torch.zeros(len(chunks.row), 2, device=device)
        # First chunk, number of chunks, gradient dtype, options that all kernels take.
        self.launches: list[tuple[int, int, tl.dtype | None, dict[str, Any]]] = []
        kinds = [
            (dtype, not (row[row != 0] % 16).any())
            for dtype, row in zip(self.table.dtypes, self.table.addresses, strict=True)
        ]
        for (dtype, aligned), run in groupby(range(len(kinds)), key=kinds.__getitem__):
            rows = list(run)
            first, end = int(chunks.first[rows[0]]), int(chunks.first[rows[-1] + 1])
            options = {"ALIGNED": aligned, "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": WARPS}
            self.launches.append((first, end - first, GRADIENTS.get(dtype), options))

    def _copy_to(self, device: torch.device, packed: Tensor) -> Tensor:
        capturing = torch.cuda.is_current_stream_capturing()
        if self._spare is None or len(self._spare) < len(packed):
            if capturing:
                raise RuntimeError(
                    "cannot build the optimizer's tables during the capture of a CUDA graph: run a step before it"
                )
            self._spare = torch.empty(len(packed), dtype=torch.int64, pin_memory=True)
        host = self._spare[: len(packed)]
        host.copy_(packed)
        on_device = torch.empty(len(packed), dtype=torch.int64, device=device)
        on_device.copy_(host, non_blocking=True)
        if capturing:
            self._captured.append(host)
        self._spare = None if capturing else torch.empty(2 * len(packed), dtype=torch.int64, pin_memory=True)
        return on_device


def _launch_key(row: Row) -> tuple[str, bool]:
    """Return the key that groups rows into launches: gradient dtype, then unaligned addresses."""
    grad = row[1]
    return "" if grad is None else str(grad.dtype), any(x is not None and x.data_ptr() % 16 != 0 for x in row)


class LarsEma:
    """LARS and the target update; see `fastbyol.kernels.lars_ema.lars_update` for the call."""

    def __init__(self) -> None:
        self._tables = _DeviceTables()
        self._floats: tuple[tuple[float, float, float], ...] = ()
        self._lrs: list[int] = []

    @torch.no_grad()
    def __call__(self, tensors, groups, hypers, tau, *, inv_scale=None, found_inf=None):
        """Update the tensors in place, without a host sync."""
        t = self._tables
        check_scalar("tau", tau)
        tensors = t.prepare(tensors, groups)
        if not tensors:
            return
        self._upload_hypers(hypers, tau.device)
        scaled = inv_scale is not None
        inverse, flag = (inv_scale, found_inf) if scaled else (self._one, self._zero)
        t.table.copy_in(tensors)
        chunks, table = (t.chunk_row, t.chunk_start), (t.addresses, t.sizes, t.row_group)
        decays, last = (self._decays, self._etas), (inverse, flag, t.sums)
        for first, count, dtype, options in t.launches:
            norms_kernel[(count,)](*chunks, *table, *decays, *last, first, SCALED=scaled, DTYPE=dtype, **options)
        hyper = self._lr_addresses, self._decays, self._momenta, self._etas, tau
        for first, count, dtype, options in t.launches:
            update_kernel[(count,)](*chunks, t.chunk_first, *table, *hyper, *last, first, DTYPE=dtype, **options)
        t.table.copy_out(tensors)

    def _upload_hypers(self, hypers: Sequence[Hyper], device: torch.device) -> None:
        """Copy the hyperparameters to the device if they have changed."""
        floats = tuple(h.as_floats() for h in hypers)
        lrs = [h.lr.data_ptr() for h in hypers]
        if floats != self._floats:
            columns = torch.tensor(floats, dtype=torch.float32).T.contiguous().to(device)
            self._decays, self._momenta, self._etas = columns
            self._one, self._zero = torch.ones((), device=device), torch.zeros((), device=device)
            self._floats = floats
        if lrs != self._lrs:
            self._lr_addresses, self._lrs = torch.tensor(lrs, dtype=torch.int64).to(device), lrs


class EmaUpdate:
    """The target update alone; see `fastbyol.kernels.lars_ema.ema_update` for the call."""

    def __init__(self) -> None:
        self._tables = _DeviceTables()

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[Tensor, Tensor]], tau: Tensor) -> None:
        """Update the targets in place, without a host sync."""
        t = self._tables
        check_scalar("tau", tau)
        tensors = t.prepare([(w, None, None, target) for w, target in pairs], [0] * len(pairs))
        if not tensors:
            return
        t.table.copy_in(tensors)
        arguments = t.chunk_row, t.chunk_start, t.addresses, t.sizes, tau
        for first, count, _, options in t.launches:
            ema_kernel[(count,)](*arguments, first, **options)
        t.table.copy_out(tensors)
