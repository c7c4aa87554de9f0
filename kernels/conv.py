"""Convolution whose weight gradient is a product of matrices a tap, for small images in bfloat16 on the CPU.

Formulas, for input row r, output row p, tap (i, j) of k x k, r = s p - a + i with stride s and padding a, columns likewise:

    y[n, :, p, q]  = sum over (i, j) of w[:, :, i, j] x[n, :, s p - a + i, s q - a + j]
    dw[:, :, i, j] = sum over n and the (p, q) whose input lies inside the image of dy[n, :, p, q] x[n, :, s p - a + i, s q - a + j]^T

y and dx are oneDNN's. For dw of small images it is slow: on two cores of an AMD EPYC with AVX512-bf16, 64 images, 512 to 512 channels,
3x3 px, it runs at 225 GFLOP/s, forward at 450. A tap is one product (O, K) (K, C) instead, over the K positions whose input is no
padding: of a 3x3 image, 49 of the 81 pairs of tap and position. 5.3 instead of 12.0 ms there. Larger images have less
padding and longer sums, with which oneDNN does as well; see `by_taps`.

dw is rounded to bfloat16 a tap, as oneDNN's is, and returned in the weight's dtype: what autocast would do in one more pass.

Shapes: x (N, C, H, W), w (O, C, k, k), y (N, O, P, Q), all in channels-last memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Where taps win, as measured with 3x3 kernels (times of dw in ms on two cores, oneDNN's and by taps):
_POSITIONS = 25  # 64 images of 512 channels at 5x5: 25.5, 20.1; 256 at 6x6: 6.8, 6.7; 256 at 8x8: 12.1, 18.4
_POSITIONS_STRIDED = (
    49  # with stride 2, of the output; 256 to 512 channels at 7x7: 36.6, 23.5; 64 to 128 at 12x12: no gain
)
_CHANNEL_PAIRS = 1 << 15  # 128 to 256; below, calls outweigh the products


def conv2d_reference(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The formulas in torch."""
    return F.conv2d(x, weight, None, stride, padding)


def conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """y, without bias, groups or dilation; as `F.conv2d` is called, also under autocast.

    Args:
        x: (N, C, H, W).
        weight: (O, C, k, k).

    Raises:
        RuntimeError: what torch raises where shapes or dtypes do not fit.
    """
    if by_taps(x, weight, stride, padding):
        return _Conv.apply(x, weight, stride, padding)
    return conv2d_reference(x, weight, stride, padding)


def by_taps(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Whether the weight gradient is one product a tap: bfloat16 on the CPU, a k x k kernel, a small y, many channels."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
        return False
    if not x.is_cpu or x.dtype != torch.bfloat16 or x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        return False
    # A weight that torch would refuse beside this x is left to torch.
    if weight.dtype != x.dtype and not (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    ):
        return False
    k = weight.shape[2]
    height, width = ((size + 2 * padding - k) // stride + 1 for size in x.shape[2:])
    if k == 1 or weight.shape[3] != k or min(*x.shape, height, width) < 1:
        return False
    limit = _POSITIONS if stride == 1 else _POSITIONS_STRIDED
    return height * width <= limit and weight.shape[0] * weight.shape[1] >= _CHANNEL_PAIRS


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        w = weight.to(x.dtype)
        ctx.save_for_backward(x, w)
        ctx.stride, ctx.padding, ctx.dtype = stride, padding, weight.dtype
        return F.conv2d(x, w, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, w = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            s, a = [ctx.stride] * 2, [ctx.padding] * 2
            wanted = [True, False, False]
            dx = torch.ops.aten.convolution_backward(dy, x, w, None, s, a, [1, 1], False, [0, 0], 1, wanted)[0]
        return dx, weight_gradient(x, dy, w.shape[2], ctx.stride, ctx.padding, dtype=ctx.dtype), None, None


def weight_gradient(x: Tensor, dy: Tensor, k: int, stride: int, padding: int, *, dtype: torch.dtype) -> Tensor:
    """dw (O, C, k, k) in channels-last memory, from x (N, C, H, W) and dy (N, O, P, Q) of one dtype."""
    x, dy = x.permute(0, 2, 3, 1), dy.permute(0, 2, 3, 1)
    channels, outputs = x.shape[3], dy.shape[3]
    dw = torch.zeros(outputs, k, k, channels, dtype=dtype, device=x.device)
    for i in range(k):
        (p0, p1), h = _inside(i, x.shape[1], dy.shape[1], stride, padding)
        for j in range(k):
            (q0, q1), w = _inside(j, x.shape[2], dy.shape[2], stride, padding)
            if p0 < p1 and q0 < q1:
                g = dy[:, p0:p1, q0:q1].reshape(-1, outputs)
                inputs = x[:, h : h + stride * (p1 - p0) : stride, w : w + stride * (q1 - q0) : stride]
                dw[:, i, j] = g.t() @ inputs.reshape(-1, channels)
    return dw.permute(0, 3, 1, 2)


def _inside(i: int, size: int, outputs: int, stride: int, padding: int) -> tuple[tuple[int, int], int]:
    """Output rows (from, to) for which row i of the kernel lies inside the image, and the input row of the first."""
    first = max(0, -(-(padding - i) // stride))
    end = min(outputs, (size - 1 + padding - i) // stride + 1)
    return (first, end), stride * first - padding + i
