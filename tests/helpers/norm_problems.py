"""Calls of BatchNorm's Triton kernels, and the same in torch in float64: for the interpreter and a
GPU.
"""

import torch
from torch.nn import functional as F

from fastbyol.kernels.batch_norm import mean_and_var
from fastbyol.kernels.batch_norm_torch import Norm
from fastbyol.kernels.max_pool import max_pool_reference

EPS, RESIDUAL_EPS = 1e-5, 1e-3
SHAPES = [(6, 5, 3, 7), (12, 37), (6, 64, 5, 5), (18, 1, 1, 1), (6, 300, 2, 3)]
PLAIN, RESIDUAL, NORMALIZED = range(3)
# residual, ReLU, fork
CASES = [
    (PLAIN, False, False),
    (PLAIN, True, False),
    (PLAIN, True, True),
    (RESIDUAL, False, False),
    (RESIDUAL, False, True),
    (RESIDUAL, True, False),
    (RESIDUAL, True, True),
    (NORMALIZED, False, False),
    (NORMALIZED, True, False),
    (NORMALIZED, True, True),
]


def torch_batch_norm(x, weight, bias, views, eps):
    return torch.cat([F.batch_norm(v, None, None, weight, bias, training=True, eps=eps) for v in x.chunk(views)])


class NormProblem:
    """One call of `batch_norm_triton`, and the same in torch in any dtype."""

    def __init__(
        self,
        shape,
        *,
        views=2,
        relu=True,
        residual=PLAIN,
        pool=False,
        same=False,
        fork=False,
        mean=0.3,
        dtype=None,
        device=None,
    ):
        self.views, self.relu, self.kind, self.fork = views, relu or pool, residual, fork
        self.pool, self.same = pool, same
        rng, dtype = torch.Generator().manual_seed(0), dtype or torch.float32

        def draw(shape=shape):
            t = torch.randn(shape, generator=rng).to(device)
            return t.to(memory_format=torch.channels_last) if t.ndim == 4 else t

        channels = shape[1]
        # A residual of another scale, so that its statistics differ.
        others = (3 * draw() + 0.2).to(dtype) if residual else None
        parameters = [draw((channels,)) for _ in range(4)]
        self.inputs = [(2 * draw() + mean).to(dtype), others, *parameters]
        result = (*shape[:2], (shape[2] + 1) // 2, (shape[3] + 1) // 2) if pool else shape
        self.gradients = [draw(result).to(dtype) for _ in range(2 if fork else 1)]
        batches = torch.zeros((), dtype=torch.int64, device=device)
        self.running = torch.zeros(channels, device=device), torch.ones(channels, device=device), batches

    def leaves(self, dtype=None):
        return [None if t is None else t.clone().to(dtype or t.dtype).requires_grad_() for t in self.inputs]

    def run(self, module, reduce=None):
        """Return y, mean and variance, and the gradients of x, residual and the four parameters."""
        leaves = self.leaves()
        x, residual, *parameters = leaves
        y, stats, _ = module.batch_norm_triton(
            x,
            Norm(*parameters[:2], EPS, *self.running, 0.1),
            residual,
            Norm(*parameters[2:], RESIDUAL_EPS) if self.kind == NORMALIZED else None,
            views=self.views,
            relu=self.relu,
            pool=self.pool,
            same=self.same,
            fork=self.fork,
            reduce=reduce,
        )
        torch.autograd.backward(y, self.gradients)
        return y[0].detach(), mean_and_var(stats), [None if t is None else t.grad for t in leaves]

    def in_torch(self, dtype):
        """Return y and the gradients, computed by torch in `dtype` (parameters in float32)."""
        leaves = self.leaves(dtype if dtype == torch.float64 else None)
        x, residual, weight, bias, r_weight, r_bias = leaves
        y = torch_batch_norm(x, weight, bias, self.views, EPS)
        if self.kind == NORMALIZED:
            y = y + torch_batch_norm(residual, r_weight, r_bias, self.views, RESIDUAL_EPS)
        elif self.kind == RESIDUAL:
            y = y + residual
        y = y.relu() if self.relu else y
        y = max_pool_reference(y, same=self.same) if self.pool else y
        y.backward(sum(g.to(y.dtype) for g in self.gradients))
        return y.detach(), [None if t is None else t.grad for t in leaves]

    def exact_statistics(self):
        rows = self.inputs[0].double().movedim(1, -1).reshape(self.views, -1, self.inputs[0].shape[1])
        return rows.mean(1), rows.var(1, correction=0)


def error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()


def check(problem, module, bound):
    y, (mean, var), gradients = problem.run(module)
    exact_y, exact = problem.in_torch(torch.float64)
    exact_mean, exact_var = problem.exact_statistics()
    assert error(mean, exact_mean) < 1e-5  # delta is larger than the mean where f is an outlier
    assert ((var - exact_var) / exact_var.clamp_min(1e-3)).abs().max() < 1e-5
    assert y.shape == exact_y.shape
    assert y.ndim == 2 or y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, exact_y) < bound
    for actual, expected in zip(gradients, exact, strict=True):
        assert (actual is None) == (expected is None)
        assert actual is None or error(actual, expected) < bound
