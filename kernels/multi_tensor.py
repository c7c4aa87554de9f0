"""Tables of tensor addresses, for kernels that update many tensors in one launch.

The numba and Triton versions of lars_ema share this: a tensor is a row of addresses, and rows are
split into chunks.

Shapes: T = tensors (rows), C = chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """Hyperparameters of one parameter group."""

    lr: Tensor
    """Scalar on the tensors' device, read by the kernels and never by the host."""
    weight_decay: float
    momentum: float
    trust_coefficient: float | None
    """eta; None fixes the trust ratio at 1."""

    def __post_init__(self) -> None:
        check_scalar("lr", self.lr)

    def as_floats(self) -> tuple[float, float, float]:
        """Return weight decay, momentum and eta (-1 for None), as the kernels read them."""
        eta = -1.0 if self.trust_coefficient is None else self.trust_coefficient
        return self.weight_decay, self.momentum, eta


def check_scalar(name: str, x: Tensor) -> None:
    """Check that the kernels, which read scalars as float32 from memory, can read x.

    Raises:
        TypeError: x is not a float32 tensor of one value.
    """
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.numel() != 1:
        raise TypeError(f"{name} must be a float32 scalar tensor, since the kernels read it from memory, not {x!r}")


Row = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Weight, gradient, momentum buffer, target."""
_GRADIENT = 1  # column of a row


class AddressTable:
    """The addresses of w, g, m and t, one row per parameter.

    The tensors of a row must share a memory order. Tensors with gaps in memory, and gradients or
    targets whose memory order differs from the weight's, are staged: copied to a buffer before the
    kernels and back afterwards.

    Args:
        tensors: (weight, gradient, momentum buffer, target or None) per parameter, of one shape and
            on one device. Gradient and momentum buffer may be None (target update only).

    Attributes:
        addresses: (T, 4) int64; 0 for None.
        sizes: (T,) int64, values per tensor.
        dtypes: T dtypes of the gradients.

    Raises:
        ValueError: The tensors of a row differ in shape or device: the kernels would write out of
            bounds.
        TypeError: An unsupported dtype.
    """

    def __init__(self, tensors: Sequence[Row]) -> None:
        for row in tensors:
            _check(row)
        self._layout = _layout(tensors)
        self._buffers: dict[tuple[int, int], Tensor] = {}  # (row, column) -> staging buffer
        for i, row in enumerate(tensors):
            self._allocate_buffers(i, row)
        self.sizes = np.array([row[0].numel() for row in tensors], dtype=np.int64)
        self.dtypes = [None if row[1] is None else row[1].dtype for row in tensors]
        self.addresses = np.zeros((len(tensors), 4), dtype=np.int64)

    def matches(self, tensors: Sequence[Row]) -> bool:
        """Return True if the tensors have the shapes, dtypes and strides of this table."""
        return self._layout == _layout(tensors)

    def bind(self, tensors: Sequence[Row]) -> bool:
        """Store the tensors' addresses, but no references: gradients are freed after a step.

        Returns:
            True if any address has changed.
        """
        old = self.addresses
        pointers = [0 if x is None else x.data_ptr() for row in tensors for x in row]
        self.addresses = np.array(pointers, dtype=np.int64).reshape(-1, 4)
        for position, buffer in self._buffers.items():
            self.addresses[position] = buffer.data_ptr()
        return not np.array_equal(old, self.addresses)

    def copy_in(self, tensors: Sequence[Row]) -> None:
        """Fill the staging buffers, before the kernels."""
        for (i, column), buffer in self._buffers.items():
            buffer.copy_(tensors[i][column])

    def copy_out(self, tensors: Sequence[Row]) -> None:
        """Copy the results from the staging buffers, after the kernels."""
        for (i, column), buffer in self._buffers.items():
            if column != _GRADIENT:
                tensors[i][column].copy_(buffer)

    def _allocate_buffers(self, i: int, row: Row) -> None:
        weight, grad = row[0], row[_GRADIENT]
        written = [k for k, x in enumerate(row) if x is not None and k != _GRADIENT]
        if not _is_dense(weight) or any(_memory_order(row[k]) != _memory_order(weight) for k in written):
            for k in written:
                self._buffers[i, k] = torch.empty(weight.shape, device=weight.device)
            weight = self._buffers[i, 0]
        if grad is not None and _memory_order(grad) != _memory_order(weight):
            self._buffers[i, _GRADIENT] = torch.empty_like(weight, dtype=grad.dtype)


def _layout(tensors: Sequence[Row]) -> list[tuple[torch.dtype, torch.Size, tuple[int, ...]] | None]:
    return [None if x is None else (x.dtype, x.shape, x.stride()) for row in tensors for x in row]


def _check(row: Row) -> None:
    weight, grad = row[0], row[_GRADIENT]
    for x in row:
        if x is not None and (x.shape != weight.shape or x.device != weight.device):
            raise ValueError(
                f"a weight is {tuple(weight.shape)} on {weight.device}, but its gradient, momentum or target "
                f"{tuple(x.shape)} on {x.device}"
            )
        if x is not None and x is not grad and x.dtype != torch.float32:
            raise TypeError(f"weights, momentum buffers and targets must be float32, not {x.dtype}")
    if grad is not None and grad.dtype not in GRADIENT_DTYPES:
        raise TypeError(f"gradients must be one of {', '.join(map(str, GRADIENT_DTYPES))}, not {grad.dtype}")


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _memory_order(x: Tensor) -> tuple[int, ...]:
    """Return the strides of all dimensions larger than 1."""
    return tuple(stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)


@dataclass(frozen=True)
class Chunks:
    """Rows split into chunks of equal length; chunk c starts at value start[c] of row[c]."""

    row: NDArray[np.int64]
    start: NDArray[np.int64]
    first: NDArray[np.int64]
    """(T + 1,): row i has chunks first[i] .. first[i + 1] - 1."""

    @staticmethod
    def split(sizes: NDArray[np.int64], length: int) -> "Chunks":
        """Split rows of the given sizes."""
        counts = -(-sizes // length)
        first = np.concatenate([[0], np.cumsum(counts)])
        row = np.repeat(np.arange(len(sizes)), counts)
        return Chunks(row, (np.arange(len(row)) - first[row]) * length, first)
