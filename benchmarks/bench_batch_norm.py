"""BatchNorm over the two views of a batch, forward and backward: fastbyol, torch, and a plain copy.

    pytest benchmarks/bench_batch_norm.py --devices cuda -rs

All contenders get the same channels-last bfloat16 tensors and compute the gradients of x, weight,
bias and the residual, if there is one; they run interleaved in one process. A set is a shape of x,
with or without residual and ReLU. The GPU's shapes are the widest of a ResNet-50 at 224 px with
256 images. Bytes are the minimum of cpu/batch_norm.py's passes: 16 per value, 22 with residual and
ReLU.

    fastbyol                kernels/batch_norm.py in eager mode
    fastbyol compiled       the same under torch.compile
    reference compiled      the plain formulas under torch.compile, with autograd's backward pass
    nn.BatchNorm2d          less work: one set of statistics for both views; torch's add and ReLU
    nn.BatchNorm2d compiled the same under torch.compile
    copy                    torch copies as many bytes
"""

from collections.abc import Callable
from functools import cache, partial
from math import prod

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timing import measure
from torch import Tensor, nn

from fastbyol.kernels import batch_norm

SHAPES = {"cpu": [(32, 64, 24, 24), (32, 256, 12, 12)], "cuda": [(512, 256, 56, 56), (512, 64, 112, 112)]}
VIEWS, EPS = 2, 1e-5
# Per value, without and with residual and ReLU: moments, apply, sums, gradient.
BYTES = {False: 2 + 4 + 4 + 6, True: 2 + 6 + 8 + 6}
# (x, residual, weight, bias) -> y, with ReLU if there is a residual
Norm = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


@cache
def inputs(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x, residual, weight, bias and dy, shared since x takes 0.8 GB on a GPU."""
    torch.manual_seed(0)
    x, residual, dy = (
        torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    weight, bias = torch.rand(2, shape[1], device=device)
    return x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), dy


def fastbyol_norm(function: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Norm:
    """Return a contender that calls `batch_norm` or its reference."""

    def norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        return function(x, residual, weight, bias, views=VIEWS, eps=EPS, relu=residual is not None)[0]

    return norm


def torch_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """nn.BatchNorm2d in training, without running statistics."""
    y = nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    return y if residual is None else torch.relu(y + residual)


def compiled(norm: Norm) -> Norm:
    torch._dynamo.config.cache_size_limit = 64  # one function, multiple shapes
    return torch.compile(norm, dynamic=False)


CONTENDERS: dict[str, Callable[[], Norm] | None] = {
    "fastbyol": lambda: fastbyol_norm(batch_norm.batch_norm),
    "fastbyol compiled": lambda: compiled(fastbyol_norm(batch_norm.batch_norm)),
    "reference compiled": lambda: compiled(fastbyol_norm(batch_norm.batch_norm_reference)),
    "nn.BatchNorm2d": lambda: torch_norm,
    "nn.BatchNorm2d compiled": lambda: compiled(torch_norm),
    "copy": None,
}


@cache
def norm_of(contender: str) -> Norm:
    return CONTENDERS[contender]()


def step(norm: Norm, shape: tuple[int, ...], device: str, residual: bool) -> list[Tensor]:
    """Return y and the gradients of x, weight, bias (and residual)."""
    x, other, weight, bias, dy = inputs(shape, device)
    y = norm(x, other if residual else None, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, [x, weight, bias, *([other] if residual else [])], dy)]


@cache
def buffers(device: str) -> Tensor:
    """Return (2, n) int32, enough for the largest copy."""
    n = max(map(prod, SHAPES[device])) * BYTES[True] // 8
    return torch.ones(2, n, dtype=torch.int32, device=device)


def copy(moved: int, device: str) -> None:
    target, source = buffers(device)[:, : moved // 8]
    target.copy_(source)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual + ReLU"])
@pytest.mark.parametrize("k", range(2), ids=["shape0", "shape1"])
@pytest.mark.parametrize("contender", CONTENDERS)
def test_batch_norm(
    benchmark: BenchmarkFixture, device: str, contender: str, k: int, residual: bool, turn: int
) -> None:
    shape = SHAPES[device][k]
    moved = BYTES[residual] * prod(shape)
    call = (
        partial(copy, moved, device)
        if contender == "copy"
        else partial(step, norm_of(contender), shape, device, residual)
    )
    name = f"{shape}, residual + ReLU" if residual else str(shape)
    measure(benchmark, call, device=device, turn=turn, set_name=name, contender=contender, moved=moved)
