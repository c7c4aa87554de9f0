"""Max-pool of 3x3 windows and stride 2, as in the stem of a ResNet: forward and backward.

Formulas, per channel, for output position (p, q) and its window x[2 p - a + i, 2 q - b + j], i, j
in 0 .. 2, inside the image. The padding before the image is a = b = 1, or TensorFlow's SAME:
a = H mod 2, b = W mod 2.

    y[p, q] = the maximum; NaN if the window contains one
    k[p, q] = 3 i + j of the first maximum, or of the last NaN if there is one (as in torch)
    dx[h, w] = sum of dy[p, q] over the windows with k[p, q] = 3 (h - 2 p + a) + (w - 2 q + b)

Shapes: x (N, C, H, W), y (N, C, P, Q), P = floor((H - 1) / 2) + 1, channels-last.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbyol.kernels.cpu.max_pool import max_pool_cpu


def max_pool_reference(x: Tensor, *, same: bool = False) -> Tensor:
    """Compute the formulas in torch."""
    a, b = padding_before(x, same)
    if a and b:
        return F.max_pool2d(x, 3, 2, 1)
    return F.max_pool2d(F.pad(x, (b, 1, a, 1), value=-torch.inf), 3, 2)


def padding_before(x: Tensor, same: bool) -> tuple[int, int]:
    """Return the padding (a, b) above and to the left of x (N, C, H, W)."""
    return (x.shape[2] % 2, x.shape[3] % 2) if same else (1, 1)


def max_pool(x: Tensor, *, same: bool = False) -> Tensor:
    """Max-pool 3x3 windows with stride 2.

    Runs in numba on the CPU for bfloat16 and float32, and in torch otherwise and under
    torch.compile.

    Args:
        x: (N, C, H, W); on the CPU used in channels-last memory format, copied if necessary.
        same: TensorFlow's SAME padding instead of 1 on all sides.

    Returns:
        (N, C, P, Q) of x's dtype; channels-last on the CPU.

    Raises:
        ValueError: x does not have four dimensions, or is empty.
    """
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must be (N, C, H, W) and not empty, not {tuple(x.shape)}")
    has_memory = type(x) is Tensor and x.is_cpu  # unlike a FakeTensor
    if torch.compiler.is_compiling() or not has_memory or x.dtype not in (torch.bfloat16, torch.float32):
        return max_pool_reference(x, same=same)
    return max_pool_cpu(x, padding_before(x, same))
