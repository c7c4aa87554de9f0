"""BatchNorm's Triton kernels in the interpreter, alone and in a network."""

import copy
import math

import pytest
import torch
from helpers.norm_problems import CASES, NORMALIZED, PLAIN, RESIDUAL, SHAPES, NormProblem, check, error

from fastbyol import layers
from fastbyol.build import build_model
from fastbyol.config import ModelConfig
from fastbyol.kernels.conv import Tile
from fastbyol.layers import activation_checkpointing, batch_norms, pointwise_convs

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("residual", "relu", "fork"), CASES)
def test_float32_equals_float64(interpreted, shape, residual, relu, fork):
    for views in (1, 2, 3):
        check(NormProblem(shape, views=views, relu=relu, residual=residual, fork=fork), interpreted("batch_norm"), 1e-5)


@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("shape", [(4, 8, 7, 9), (2, 72, 8, 6), (16, 3, 1, 1), (8, 5, 2, 1)])
def test_pool_equals_float64(interpreted, shape, fork):
    for views, same in ((1, False), (2, False), (2, True)):
        problem = NormProblem(shape, views=views, pool=True, same=same, fork=fork)
        check(problem, interpreted("batch_norm"), 1e-5)


@pytest.mark.parametrize("same", [False, True])
def test_first_of_equal_maxima_takes_the_gradient(interpreted, same):
    problem = NormProblem((4, 8, 9, 8), pool=True, same=same)
    problem.inputs[0] = problem.inputs[0].round()
    check(problem, interpreted("batch_norm"), 1e-5)


@pytest.mark.parametrize("parts", [1, 3, 1000])
def test_rows_shared_by_several_programs(interpreted, monkeypatch, parts):
    """Parts of unequal length, and parts without rows."""
    module = interpreted("batch_norm")
    monkeypatch.setattr(module, "TILE", 256)  # 32 rows of 8 channels
    monkeypatch.setattr(module, "PROGRAMS", 2 * parts)
    check(NormProblem((10, 7, 6, 9), residual=RESIDUAL, fork=True), module, 1e-5)
    check(NormProblem((10, 7, 6, 9), pool=True), module, 1e-5)


def test_large_mean_costs_no_precision(interpreted):
    check(NormProblem((8, 21, 9, 9), mean=1000, relu=False), interpreted("batch_norm"), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [PLAIN, RESIDUAL, NORMALIZED])
def test_16_bit_error_is_at_most_twice_torch_s(interpreted, dtype, residual):
    """Errors against float64. The interpreter truncates to bfloat16 where a GPU rounds."""
    problem = NormProblem((12, 37, 5, 3), dtype=dtype, residual=residual)
    y, _, gradients = problem.run(interpreted("batch_norm"))
    exact_y, exact = problem.in_torch(torch.float64)
    torch_y, torch_s = problem.in_torch(dtype)
    truncation = 2.0 if dtype == torch.bfloat16 else 1.0
    assert y.dtype == dtype
    for actual, other, expected in zip([y, *gradients], [torch_y, *torch_s], [exact_y, *exact], strict=True):
        if actual is not None:
            assert error(actual, expected) <= max(2 * truncation * error(other, expected), 1e-5)


def test_running_statistics_take_one_update_per_view(interpreted):
    problem = NormProblem((6, 37, 5, 3), views=3)
    problem.run(interpreted("batch_norm"))
    mean, var = torch.zeros(37, dtype=torch.float64), torch.ones(37, dtype=torch.float64)
    for m, s in zip(*problem.exact_statistics(), strict=True):
        mean, var = mean.lerp(m, 0.1), var.lerp(s * 30 / 29, 0.1)
    assert error(problem.running[0], mean) < 1e-6
    assert error(problem.running[1], var) < 1e-6
    assert problem.running[2] == 3


def test_nan_is_kept(interpreted):
    problem = NormProblem((4, 8, 3, 3), residual=RESIDUAL)
    problem.inputs[0][0, 2, 1, 1] = float("nan")
    y, (_, var), gradients = problem.run(interpreted("batch_norm"))
    assert y[:2, 2].isnan().all()
    assert var[0, 2].isnan()
    assert gradients[0][:2, 2].isnan().all()
    assert not y[2:].isnan().any()


def test_synchronized_statistics_are_those_of_the_reduced_moments(interpreted):
    """Two ranks with the same batch equal one; both passes reduce once."""
    calls = []

    def reduce(t):
        calls.append(t.shape)
        return t.clone()

    alone, together = (NormProblem((6, 19, 4, 3), residual=NORMALIZED) for _ in range(2))
    module = interpreted("batch_norm")
    y, statistics, gradients = alone.run(module)
    other_y, other_statistics, others = together.run(module, reduce)
    assert calls == [(2, 2, 19), (2, 2, 19), (3, 2, 19)]  # both norms' moments; the means of backward
    assert error(other_y, y.double()) < 1e-6
    assert all(error(a, b.double()) < 1e-6 for a, b in zip(other_statistics, statistics, strict=True))
    assert all(error(a, b.double()) < 1e-5 for a, b in zip(others, gradients, strict=True))
    assert together.running[2] == 0  # left to the caller, who knows the number of ranks

    def halve(t):  # a second rank whose values are all 0
        return t / 2

    y, (mean, var), _ = NormProblem((6, 19, 4, 3)).run(module, halve)
    _, (own_mean, own_var), _ = NormProblem((6, 19, 4, 3)).run(module)
    assert error(mean, own_mean.double() / 2) < 1e-6
    assert error(var, own_var.double() / 2 + own_mean.double() ** 2 / 4) < 1e-6


@pytest.mark.parametrize("shape", [(256, 64, 112, 112), (4096, 64, 112, 112), (4096, 2048, 7, 7), (65536, 4096)])
def test_grids_fit_the_limits_of_cuda(interpreted, shape):
    """CUDA limits axis 0 to 2^31 - 1 programs, and axes 1 and 2 to 65,535."""
    module = interpreted("batch_norm")
    rows = math.prod((shape[0], *shape[2:]))
    for grid in (module._stream_grid, module._reduction_grid):
        first, *others = grid(rows, shape[1], 2)
        assert first < 2**31
        assert max(others) < 2**16


def test_mismatched_residual_is_refused(interpreted, monkeypatch):
    """Its addresses would be read as those of x."""
    interpreted("batch_norm")
    monkeypatch.setattr(layers, "has_gpu_kernels", lambda x: True)
    norm, x = layers.BatchNorm(8), torch.zeros(4, 8, 3, 3)
    with pytest.raises(ValueError, match="the residual is .* but x is"):
        norm(x, torch.zeros(4, 8, 3, 2))
    with pytest.raises(ValueError, match="weight must be"):
        norm(x, x, layers.BatchNorm(4))


# --- in a network ---


def output_of(model, views):
    """Return the loss, all gradients and all buffers after one step of the pair."""
    model = copy.deepcopy(model)
    loss = model(*views).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, dict(model.named_buffers())


@pytest.mark.parametrize(
    ("backbone", "checkpointed", "settings", "products"),
    [
        ("resnet18", 0, {}, False),
        pytest.param("resnet18", 2, {}, True, marks=pytest.mark.slow),
        pytest.param("resnet18", 0, {"stem": "small"}, False, marks=pytest.mark.slow),
        pytest.param("resnet50", 0, {}, False, marks=pytest.mark.slow),
        pytest.param("resnet50", 0, {"padding": "same"}, True, marks=pytest.mark.slow),
        pytest.param("test_byobnet", 0, {"width": 1}, False, marks=pytest.mark.slow),
    ],
)
def test_networks_with_gpu_kernels_equal_those_without(
    interpreted, monkeypatch, backbone, checkpointed, settings, products
):
    """Loss, gradients and running statistics of a pair; `products`: 1x1 convolutions in Triton."""
    monkeypatch.setattr(interpreted("batch_norm"), "TILE", 1 << 15)  # the interpreter takes a millisecond per tile
    settings = {"width": 0.125, "hidden_dim": 32, "projection_dim": 16} | settings
    config = ModelConfig(backbone=backbone, **settings)
    model = build_model(config, 32, 0).to(memory_format=torch.channels_last)
    for norm in batch_norms(model):  # the last norm of a block starts at 0, which would hide its branch
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
    model.target.load_state_dict(model.online.state_dict())
    rng = torch.Generator().manual_seed(1)
    size = 16 if config.stem == "small" else 32
    views = [torch.randn(8, 3, size, size, generator=rng).to(memory_format=torch.channels_last) for _ in range(2)]
    activation_checkpointing(model.online.backbone, checkpointed)
    expected = output_of(model, views)
    monkeypatch.setattr(layers, "has_gpu_kernels", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(layers, "has_gpu_products", lambda x: products)
    for conv, after_norm in pointwise_convs(model):
        conv.tile = Tile(512, 64, 64, 4, 2)
        conv.norm_tile = conv.tile if after_norm else None
    loss, gradients, buffers = output_of(model, views)
    assert abs(loss - expected[0]) < 1e-3
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        # Rounding decides about inputs of a ReLU near 0, and is all of a bias before a norm.
        assert (gradient - expected[1][name]).norm() < 0.05 * expected[1][name].norm() + 1e-5, name
    for name, value in buffers.items():
        assert error(value, expected[2][name].double()) < 1e-3, name
