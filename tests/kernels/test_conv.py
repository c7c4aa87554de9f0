"""The convolution whose weight gradient is one product per tap, against torch in float64."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastbyol.kernels import conv
from fastbyol.kernels.conv import conv2d, weight_gradient


def draw(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def always_tap_products(monkeypatch):
    """Use products per tap for every shape."""
    monkeypatch.setattr(conv, "_MIN_CHANNEL_PAIRS", 0)
    monkeypatch.setattr(conv, "_MAX_POSITIONS", 1 << 30)
    monkeypatch.setattr(conv, "_MAX_POSITIONS_STRIDED", 1 << 30)


@pytest.mark.parametrize("size", [(3, 3), (6, 5), (7, 8), (3, 9)])
@pytest.mark.parametrize(
    ("k", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (3, 2, 0), (2, 2, 0), (5, 1, 2), (7, 2, 3), (3, 1, 3)]
)
def test_weight_gradient_is_exact_in_float64(size, k, stride, padding):
    x = draw(2, 5, *size, dtype=torch.float64)
    weight = draw(4, 5, k, k, dtype=torch.float64).requires_grad_()
    y = F.conv2d(x, weight, None, stride, padding)
    dy = draw(*y.shape, seed=1, dtype=torch.float64)
    y.backward(dy)
    dw = weight_gradient(x, dy, k, stride, padding, dtype=torch.float64)
    assert (dw - weight.grad).abs().max() < 1e-12
    assert dw.is_contiguous(memory_format=torch.channels_last)


def test_weight_gradient_of_one_pixel():
    x, dy = torch.full((1, 2, 1, 1), 3.0), torch.full((1, 1, 1, 1), 2.0)
    dw = weight_gradient(x, dy, 3, 1, 1, dtype=torch.float32)
    assert dw[0].tolist() == [[[0, 0, 0], [0, 6, 0], [0, 0, 0]]] * 2  # all taps but the center one read padding


@pytest.mark.parametrize(("stride", "size"), [(1, 3), (2, 6), (2, 5)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_bfloat16_error_is_at_most_twice_torch_s(always_tap_products, stride, size, channels_last):
    """Under autocast, with a float32 weight, against float64."""
    x, weight = draw(16, 20, size, size), draw(24, 20, 3, 3, seed=1, dtype=torch.float32)
    if channels_last:
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    dy = draw(16, 24, 3, 3, seed=2)
    results = {}
    for name, f in (("ours", conv2d), ("torch", conv.conv2d_reference)):
        tensors = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = f(*tensors, stride, 1)
        assert type(y.grad_fn).__name__ == ("_ConvBackward" if name == "ours" else "ConvolutionBackward0")
        y.backward(dy)
        results[name] = [y.detach(), *(t.grad for t in tensors)]
    tensors = [t.to(torch.bfloat16).double().requires_grad_() for t in (x, weight)]
    y = F.conv2d(*tensors, None, stride, 1)
    y.backward(dy.double())
    exact = [y.detach(), *(t.grad for t in tensors)]
    for ours, theirs, expected in zip(results["ours"], results["torch"], exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - expected).abs().max() <= 2 * (theirs.double() - expected).abs().max()


def selected(*, n=4, c=256, o=256, size=3, k=3, stride=1, padding=1, dtype=torch.bfloat16, weight_dtype=None):
    weight = torch.empty(o, c, k, k, dtype=weight_dtype or dtype, requires_grad=True)
    return conv.use_tap_products(torch.empty(n, c, size, size, dtype=dtype), weight, stride, padding)


def test_tap_products_are_used_for_small_images_with_many_channels():
    assert selected()
    assert selected(size=5)
    assert selected(size=12, c=128, stride=2)
    assert not selected(size=6)
    assert not selected(size=16, stride=2)
    assert not selected(c=128, o=128)
    assert not selected(k=1, padding=0)
    assert not selected(dtype=torch.float32)
    with torch.no_grad():
        assert not selected()


def test_mismatched_inputs_raise_torch_s_error():
    assert not selected(weight_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert selected(weight_dtype=torch.float32)
    x, weight = torch.zeros(2, 256, 3, 3).bfloat16(), torch.zeros(256, 255, 3, 3).bfloat16().requires_grad_()
    with pytest.raises(RuntimeError, match="channels"):
        conv2d(x, weight, 1, 1)


def test_gradients_only_where_required(always_tap_products):
    x, weight = draw(2, 3, 3, 3), draw(4, 3, 3, 3).requires_grad_()
    conv2d(x, weight, 1, 1).sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_torch_compile_has_no_graph_break(always_tap_products):
    x, weight = draw(2, 3, 3, 3), draw(4, 3, 3, 3).requires_grad_()
    compiled = torch.compile(conv2d, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, 1, 1), conv2d(x, weight, 1, 1))


@pytest.mark.parametrize("channels", [1, 4, 8, 15, 16])
@pytest.mark.parametrize(("size", "stride"), [(8, 2), (7, 2), (9, 3)])
def test_strided_pointwise_convolution_of_few_channels(channels, size, stride):
    """oneDNN's weight gradient writes past its workspace, so its strided kernel must not run."""

    class Strides(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            if f.overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
                position = 3 if f.overloadpacket is torch.ops.aten.convolution else 4
                self.found.append(args[position])
            return f(*args, **(kwargs or {}))

    x = draw(8, channels, size, size, dtype=torch.float32).to(memory_format=torch.channels_last)
    weight = draw(8, channels, 1, 1, seed=1, dtype=torch.float32)
    with Strides() as strides:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = conv2d(*leaves, stride, 0)
        y.backward(torch.ones_like(y))
    assert strides.found == [[stride if channels == 16 else 1] * 2] * 2
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = [t.double().requires_grad_() for t in (x.contiguous(), weight)]
    exact_y = F.conv2d(*exact, stride=stride)
    exact_y.backward(torch.ones_like(exact_y))
    for actual, expected in zip([y, *(t.grad for t in leaves)], [exact_y, *(t.grad for t in exact)], strict=True):
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
