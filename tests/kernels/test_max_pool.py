"""Max-pool against torch, with ties and NaN."""

from functools import partial

import pytest
import torch
from timm.layers.pool2d_same import MaxPool2dSame
from torch.nn import functional as F

from fastbyol.kernels.cpu.intrinsics import LANES
from fastbyol.kernels.max_pool import max_pool, max_pool_reference

SHAPES = [(2, 5, 3, 7), (1, 1, 1, 1), (3, LANES, 2, 1), (2, LANES + 1, 8, 9), (2, 2 * LANES, 17, 20), (1, 3, 40, 1)]


def draw(shape, dtype, *, nan=0.0, seed=0, channels_last=True):
    """Few distinct values, so that most windows have ties."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng).mul(2).round()
    x[torch.rand(shape, generator=rng) < nan] = torch.nan
    x = x.to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(99.0), b.nan_to_num(99.0))


def forward_backward(f, x, dy):
    x = x.clone().requires_grad_()
    y = f(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nan", [0.0, 0.05, 1.0])
def test_equals_torch(shape, dtype, nan):
    for channels_last in (True, False):
        x = draw(shape, dtype, nan=nan, channels_last=channels_last)
        expected = F.max_pool2d(x, 3, 2, 1)
        dy = draw(expected.shape, dtype, seed=1)
        y, dx = forward_backward(max_pool, x, dy)
        # The reference sums in float64, since torch rounds after every term in bfloat16.
        _, exact = forward_backward(lambda t: F.max_pool2d(t, 3, 2, 1), x.double(), dy)
        assert y.dtype == dx.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert same(y, expected)
        assert torch.equal(dx, exact.to(dtype))
        with torch.no_grad():
            assert same(max_pool(x), expected)


def test_gradients_are_summed_in_float32():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16)
    x[0, 0, 1, 1] = 1  # the maximum of all four windows
    dy = torch.tensor([[256.0, 0.5], [0.5, 0.5]]).bfloat16()[None, None]
    _, dx = forward_backward(max_pool, x, dy)
    assert dx[0, 0, 1, 1] == 258  # 257.5 rounded once; rounding every sum would give 256


def test_ties_and_nan_of_a_known_example():
    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [torch.nan, 0.0, torch.nan]])[None, None]
    y, dx = forward_backward(max_pool, x, torch.tensor([[1.0, 10.0], [100.0, 1000.0]])[None, None])
    assert y[0, 0, 0].tolist() == [1, 1]
    assert y[0, 0, 1].isnan().all()
    assert dx[0, 0].tolist() == [[0, 11, 0], [0, 0, 0], [100, 0, 1000]]


def test_bit_identical_for_any_number_of_threads():
    x = torch.randn(4, 33, 37, 41).bfloat16().to(memory_format=torch.channels_last)
    dy, before, results = torch.randn(4, 33, 19, 21), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(forward_backward(max_pool, x, dy))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_only_indices_are_saved_for_backward():
    x, saved = torch.randn(2, 3, 8, 8).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        max_pool(x)
        assert [(t.dtype, tuple(t.shape)) for t in saved] == [(torch.uint8, (2, 3, 4, 4))]
        with torch.no_grad():
            max_pool(x)
        max_pool(x.detach())
    assert len(saved) == 1


def test_expanded_gradient():
    x = draw((2, 20, 8, 8), torch.float32)
    dy = torch.randn(2, 20, 1, 1).expand(2, 20, 4, 4)
    assert torch.equal(forward_backward(max_pool, x, dy)[1], forward_backward(max_pool_reference, x, dy)[1])


def test_other_dtypes_use_torch():
    x = draw((2, 3, 9, 9), torch.float64)
    assert torch.equal(max_pool(x), F.max_pool2d(x, 3, 2, 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_padding_equals_timm(shape, dtype):
    x = draw(shape, dtype, nan=0.05)
    expected = MaxPool2dSame(3, 2)(x)
    dy = draw(expected.shape, dtype, seed=1)
    y, dx = forward_backward(partial(max_pool, same=True), x, dy)
    _, exact = forward_backward(MaxPool2dSame(3, 2), x.double(), dy)
    assert same(y, expected)
    assert torch.equal(dx, exact.to(dtype))
    reference_y, reference_dx = forward_backward(partial(max_pool_reference, same=True), x.double(), dy)
    assert same(reference_y, expected.double())
    assert torch.equal(reference_dx, exact)


def test_torch_compile_has_no_graph_break():
    x = draw((2, 3, 5, 5), torch.float32)
    assert torch.equal(torch.compile(max_pool, fullgraph=True, backend="aot_eager")(x), max_pool(x))


@pytest.mark.parametrize("x", [torch.ones(3, 4, 4), torch.ones(2, 3, 0, 4)])
def test_input_that_is_not_a_batch_of_images_raises(x):
    with pytest.raises(ValueError, match=r"x must be \(N, C, H, W\) and not empty"):
        max_pool(x)
