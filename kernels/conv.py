"""Convolution with a weight gradient of one matrix product per tap, for small images on the CPU.

Formulas, for input row r, output row p, tap (i, j) of k x k, r = s p - a + i with stride s and
padding a, columns likewise:

    y[n, :, p, q]  = sum over (i, j) of w[:, :, i, j] x[n, :, s p - a + i, s q - a + j]
    dw[:, :, i, j] = sum over n and the (p, q) whose input is inside the image of
                     dy[n, :, p, q] x[n, :, s p - a + i, s q - a + j]^T

y and dx are computed by oneDNN. Its dw is slow for small images: on two cores of an AMD EPYC with
AVX512-bf16, with 64 images of 3x3 px and 512 to 512 channels, it runs at 225 GFLOP/s, forward at
450. Here a tap is one product (O, K) (K, C) over the K positions whose input is not padding: for a
3x3 image, 49 of the 81 pairs of tap and position. This takes 5.3 instead of 12.0 ms. Larger images
have less padding and longer sums, for which oneDNN is as fast; see `use_tap_products`.

dw is rounded to bfloat16 per tap, like oneDNN's, and returned in the weight's dtype, which saves
autocast a pass.

Shapes: x (N, C, H, W), w (O, C, k, k), y (N, O, P, Q), all channels-last.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Where products per tap are faster. dw with 3x3 kernels in ms on two cores, oneDNN's and per tap:
# 64 images of 512 channels at 5x5: 25.5, 20.1; 256 at 6x6: 6.8, 6.7; 256 at 8x8: 12.1, 18.4.
_MAX_POSITIONS = 25
# Of the output, with stride 2. 256 to 512 channels at 7x7: 36.6, 23.5; 64 to 128 at 12x12: equal.
_MAX_POSITIONS_STRIDED = 49
_MIN_CHANNEL_PAIRS = 1 << 15  # 128 to 256 channels; below, the overhead of the calls dominates

# With fewer input channels than a vector has floats (AVX-512), oneDNN's dw of a strided 1x1
# convolution in channels-last memory writes past its workspace: wrong results, hangs and crashes
# (github.com/uxlfoundation/oneDNN/issues/6035).
_MIN_STRIDED_CHANNELS = 16


def conv2d_reference(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Compute the formulas in torch."""
    return F.conv2d(x, weight, None, stride, padding)


def conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Convolve without bias, groups or dilation, like `F.conv2d`; respects autocast.

    Args:
        x: (N, C, H, W).
        weight: (O, C, k, k).
        stride: For both dimensions.
        padding: On all sides.

    Returns:
        (N, O, P, Q).

    Raises:
        RuntimeError: From torch, for mismatched shapes or dtypes.
    """
    if x.is_cpu and x.ndim == 4 and stride > 1 and padding == 0 and _is_narrow(weight):
        x, stride = x[..., ::stride, ::stride].contiguous(memory_format=torch.channels_last), 1  # the same result
    if use_tap_products(x, weight, stride, padding):
        return _Conv.apply(x, weight, stride, padding)
    return conv2d_reference(x, weight, stride, padding)


def _is_narrow(weight: Tensor) -> bool:
    return weight.shape[2:] == (1, 1) and weight.shape[1] < _MIN_STRIDED_CHANNELS


class Tile(NamedTuple):
    """Launch configuration of the GPU's 1x1 convolution (triton/conv1x1.py)."""

    rows: int
    """Positions per iteration."""
    channels: int
    inputs: int
    """Input channels per iteration."""
    warps: int
    stages: int
    """Of the software pipeline."""


def has_gpu_products(x: Tensor) -> bool:
    """Return True if the GPU's 1x1 convolution takes x."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def use_tap_products(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Return True if dw should be one product per tap.

    That is for bfloat16 on the CPU, k x k kernels with k > 1, a small y, and many channels.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and weight.requires_grad):
        return False
    if not x.is_cpu or x.dtype != torch.bfloat16 or x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        return False
    # Leave a dtype mismatch to torch, which raises an error.
    if weight.dtype != x.dtype and not (
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    ):
        return False
    k = weight.shape[2]
    height, width = ((size + 2 * padding - k) // stride + 1 for size in x.shape[2:])
    if k == 1 or weight.shape[3] != k or min(*x.shape, height, width) < 1:
        return False
    limit = _MAX_POSITIONS if stride == 1 else _MAX_POSITIONS_STRIDED
    return height * width <= limit and weight.shape[0] * weight.shape[1] >= _MIN_CHANNEL_PAIRS


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
            mask = [True, False, False]
            dx = torch.ops.aten.convolution_backward(dy, x, w, None, s, a, [1, 1], False, [0, 0], 1, mask)[0]
        return dx, weight_gradient(x, dy, w.shape[2], ctx.stride, ctx.padding, dtype=ctx.dtype), None, None


def weight_gradient(x: Tensor, dy: Tensor, k: int, stride: int, padding: int, *, dtype: torch.dtype) -> Tensor:
    """Return dw (O, C, k, k), channels-last, from x (N, C, H, W) and dy (N, O, P, Q)."""
    x, dy = x.permute(0, 2, 3, 1), dy.permute(0, 2, 3, 1)
    channels, outputs = x.shape[3], dy.shape[3]
    dw = torch.zeros(outputs, k, k, channels, dtype=dtype, device=x.device)
    for i in range(k):
        (p0, p1), h = _valid_outputs(i, x.shape[1], dy.shape[1], stride, padding)
        for j in range(k):
            (q0, q1), w = _valid_outputs(j, x.shape[2], dy.shape[2], stride, padding)
            if p0 < p1 and q0 < q1:
                g = dy[:, p0:p1, q0:q1].reshape(-1, outputs)
                inputs = x[:, h : h + stride * (p1 - p0) : stride, w : w + stride * (q1 - q0) : stride]
                dw[:, i, j] = g.t() @ inputs.reshape(-1, channels)
    return dw.permute(0, 3, 1, 2)


def _valid_outputs(i: int, size: int, outputs: int, stride: int, padding: int) -> tuple[tuple[int, int], int]:
    """Return the output rows (start, end) whose input rows for tap row i are inside the image.

    Also returns the first of these input rows.
    """
    first = max(0, -(-(padding - i) // stride))
    end = min(outputs, (size - 1 + padding - i) // stride + 1)
    return (first, end), stride * first - padding + i
