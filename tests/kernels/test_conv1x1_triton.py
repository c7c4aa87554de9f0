"""The Triton kernel of 1x1 convolutions in the interpreter."""

import pytest
import torch
from helpers.norm_problems import error
from torch.nn import functional as F

from fastbyol.kernels.batch_norm_torch import Norm

pytestmark = pytest.mark.interpreter

# (images, K, H, W), C: sizes that are no multiples of a tile's sides, one position, one channel.
SHAPES = [((6, 24, 5, 7), 40), ((12, 64, 1, 1), 16), ((6, 5, 9, 8), 1), ((6, 72, 4, 4), 33)]
TILES = [(16, 32, 16, 4, 2), (64, 16, 64, 4, 2), (32, 64, 128, 4, 2)]


class Problem:
    """One convolution and the BatchNorm that follows it."""

    def __init__(self, shape, channels, dtype=torch.float32, mean=0.0):
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=rng) + mean
        self.x = x.to(memory_format=torch.channels_last).to(dtype)
        self.weight = (torch.randn((channels, shape[1], 1, 1), generator=rng) / shape[1] ** 0.5).to(dtype)
        self.draw = lambda *shape: torch.randn(shape, generator=rng)
        running = torch.zeros(channels), torch.ones(channels), torch.zeros((), dtype=torch.int64)
        self.norm = Norm(torch.ones(channels), torch.zeros(channels), 1e-5, *running, 0.1)

    def run(self, module, tile, views=2, stride=1):
        return module.conv1x1(self.x, self.weight, self.norm, stride=stride, views=views, tile=module.Tile(*tile))


def statistics_of(y, views):
    """Return mean and biased variance (V, C) in float64."""
    rows = y.detach().double().movedim(1, -1).reshape(views, -1, y.shape[1])
    return rows.mean(1), rows.var(1, correction=0)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("shape", "channels"), SHAPES)
def test_y_and_statistics_equal_float64(interpreted, shape, channels, tile):
    module = interpreted("conv1x1")
    for views, stride in ((1, 1), (2, 1), (3, 2)):
        problem = Problem(shape, channels)
        y, (first, delta, var) = problem.run(module, tile, views, stride)
        exact = F.conv2d(problem.x.double(), problem.weight.double(), stride=stride)
        assert y.shape == exact.shape
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert error(y, exact) < 1e-5
        mean, exact_var = statistics_of(y, views)
        assert error(first + delta, mean) < 1e-6
        assert error(var, exact_var) < 1e-5
        norm, averages = problem.norm, [torch.zeros(channels).double(), torch.ones(channels).double()]
        count = y.numel() // channels // views
        for m, s in zip(mean, exact_var, strict=True):
            averages[0].lerp_(m, 0.1)
            averages[1].lerp_(s * count / max(count - 1, 1), 0.1)
        assert error(norm.running_mean, averages[0]) < 1e-5
        assert error(norm.running_var, averages[1]) < 1e-5
        assert norm.batches == views


@pytest.mark.parametrize("parts", [1, 3, 1000])
def test_rows_shared_by_several_programs(interpreted, monkeypatch, parts):
    """Parts of unequal length, and parts without rows."""
    module = interpreted("conv1x1")
    monkeypatch.setattr(module, "PROGRAMS", 2 * parts)
    y, (first, delta, var) = Problem((10, 24, 6, 9), 7).run(module, (16, 16, 32, 4, 2))
    mean, exact_var = statistics_of(y, 2)
    assert error(first + delta, mean) < 1e-6
    assert error(var, exact_var) < 1e-5


def test_large_mean_costs_no_precision(interpreted):
    module = interpreted("conv1x1")
    problem = Problem((8, 16, 9, 9), 21)
    problem.weight += 1  # of every output channel
    problem.x += 1000
    y, (first, delta, var) = problem.run(module, (32, 32, 16, 4, 2))
    mean, exact_var = statistics_of(y, 2)
    assert mean.abs().min() > 3e3
    assert error(first + delta, mean) < 1e-6
    assert error(var, exact_var) < 1e-4  # y itself is rounded to 1e-3


def test_statistics_are_those_of_the_rounded_y(interpreted):
    """In float16; the interpreter cannot multiply bfloat16."""
    module, dtype = interpreted("conv1x1"), torch.float16
    problem = Problem((8, 24, 5, 5), 40, dtype)
    y, (first, delta, var) = problem.run(module, TILES[0])
    assert y.dtype == dtype
    assert error(y, F.conv2d(problem.x.double(), problem.weight.double())) < torch.finfo(dtype).eps
    mean, exact_var = statistics_of(y, 2)
    assert error(first + delta, mean) < 1e-6
    assert error(var, exact_var) < 1e-6


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_torchs(interpreted, stride):
    module = interpreted("conv1x1")
    problem = Problem((6, 24, 5, 7), 40)
    results = []
    for own in (True, False):
        x, weight = (t.clone().requires_grad_() for t in (problem.x, problem.weight))
        if own:
            y, stats = module.conv1x1(x, weight, problem.norm, stride=stride, views=2, tile=module.Tile(*TILES[0]))
            assert not stats.requires_grad
        else:
            y = F.conv2d(x, weight, stride=stride)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        y.backward(dy)
        results.append((x.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norm_before_the_product_equals_norm_on_its_own(interpreted, tile, dtype):
    module, batch_norm = interpreted("conv1x1"), interpreted("batch_norm")
    for shape, channels in SHAPES:
        problem = Problem(shape, channels, dtype, mean=0.5)
        before = Norm(problem.draw(shape[1]), problem.draw(shape[1]), 1e-3)
        for views in (1, 2):
            (x,), stats, _ = batch_norm.batch_norm_triton(problem.x, before, views=views, relu=True)
            options = {"views": views, "tile": module.Tile(*tile)}
            expected, expected_stats = module.conv1x1(x, problem.weight, problem.norm, stride=1, **options)
            y, own = module.norm_conv1x1(problem.x, before, stats, problem.weight, problem.norm, **options)
            assert error(y, expected.double()) < 2 * torch.finfo(dtype).eps
            assert error(own[0] + own[1], (expected_stats[0] + expected_stats[1]).double()) < 1e-3
            assert not y.requires_grad


def test_nan_is_kept(interpreted):
    module = interpreted("conv1x1")
    problem = Problem((4, 16, 3, 3), 8)
    problem.x[0, 2, 1, 1] = float("nan")
    y, (_, _, var) = problem.run(module, TILES[0])
    assert y[0, :, 1, 1].isnan().all()
    assert not y[1:].isnan().any()
    assert var[0].isnan().all()
    assert not var[1].isnan().any()
