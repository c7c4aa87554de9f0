"""Triton kernels on a GPU: accuracy, host syncs and capture in CUDA graphs."""

import numpy as np
import pytest
import torch
from helpers.norm_problems import CASES, NORMALIZED, RESIDUAL, NormProblem, check
from helpers.problems import ETA, Problem, crops_of, images, largest_error, odd_shapes, parameter_row, reference

from fastbyol import tuning
from fastbyol.data.views import sample
from fastbyol.kernels import crop, lars_ema
from fastbyol.kernels.batch_norm_torch import Norm

pytestmark = pytest.mark.gpu


def on_gpu(problem):
    """Move the problem's tensors to the GPU."""
    for name in ("weights", "targets", "grads", "momenta"):
        setattr(problem, name, [None if x is None else x.cuda() for x in getattr(problem, name)])
    problem.random = lambda shape, draw=problem.random: draw(shape).cuda()
    problem.lr, problem.tau = problem.lr.cuda(), problem.tau.cuda()
    problem.inv_scale, problem.found_inf = problem.inv_scale.cuda(), problem.found_inf.cuda()
    problem.hypers = [
        lars_ema.Hyper(
            lr=problem.lr,
            weight_decay=h.weight_decay,
            momentum=h.momentum,
            trust_coefficient=h.trust_coefficient,
        )
        for h in problem.hypers
    ]
    return problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_lars_and_target_over_twenty_steps(dtype, scale):
    problem = on_gpu(Problem(odd_shapes(170), dtype=dtype, scale=scale))
    update = lars_ema.lars_update(torch.device("cuda"))
    for k in range(20):
        poisoned = scale != 1 and k in (7, 12)
        problem.new_gradients(float("nan") if poisoned else None)
        problem.step(update, k, 20)
        if not poisoned:
            problem.exact_step()
    assert problem.largest_error() < 1e-6


def test_update_has_no_host_sync():
    problem, update = on_gpu(Problem(odd_shapes(20), scale=64.0)), lars_ema.lars_update(torch.device("cuda"))
    problem.new_gradients()
    problem.step(update, 6, 20)
    rows, groups = problem.rows(), [int(g) for g in problem.groups]
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(rows, groups, problem.hypers, problem.tau, inv_scale=problem.inv_scale, found_inf=problem.found_inf)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_update_follows_lr_and_tau():
    captured, eager = (on_gpu(Problem(odd_shapes(12))) for _ in range(2))
    updates = [lars_ema.lars_update(torch.device("cuda")) for _ in range(2)]
    for problem, update in zip((captured, eager), updates, strict=True):
        problem.new_gradients()
        problem.step(update, 6, 20)
    groups, graph = [int(g) for g in captured.groups], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        updates[0](captured.rows(), groups, captured.hypers, captured.tau)
    for k in (7, 8, 15):
        for problem in (captured, eager):
            problem.new_gradients()
        eager.step(updates[1], k, 20)
        captured.lr.copy_(eager.lr)
        captured.tau.copy_(eager.tau)
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured.weights, eager.weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(captured.targets[1:4], eager.targets[1:4], strict=True))


def test_bit_identical_between_runs():
    results = []
    for _ in range(2):
        problem, update = on_gpu(Problem(odd_shapes(50))), lars_ema.lars_update(torch.device("cuda"))
        for k in range(5):
            problem.new_gradients()
            problem.step(update, k + 5, 20)
        results.append(problem.weights)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_unaligned_gradients_in_buckets():
    rng = torch.Generator().manual_seed(0)
    weight, target = (torch.randn(5000, generator=rng).cuda() for _ in range(2))
    bucket = torch.randn(5003, generator=rng).cuda()
    plain = [weight.clone(), bucket[3:].clone(), torch.zeros_like(weight), target.clone()]
    lr, tau = torch.tensor(0.1, device="cuda"), torch.tensor(0.9, device="cuda")
    hyper = lars_ema.Hyper(lr=lr, weight_decay=0.1, momentum=0.9, trust_coefficient=ETA)
    row = (weight, bucket[3:], torch.zeros_like(weight), target)
    lars_ema.lars_update(torch.device("cuda"))([row], [0], [hyper], tau)
    lars_ema.lars_ema_reference(*plain, lr=lr, tau=tau, weight_decay=0.1, momentum=0.9, trust_coefficient=ETA)
    assert (weight - plain[0]).abs().max() < 1e-6
    assert (target - plain[3]).abs().max() < 1e-6


@pytest.mark.parametrize("size", [19, 96, 224])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_augmentation(size, dtype):
    from fastbyol.kernels.triton.augment import augment_views

    count = 24
    params = sample("byol", 0, 0, np.arange(count), np.full((count, 2), 300))
    rows = params.pack().transpose(1, 0, 2).reshape(2 * count, -1).copy()
    crops = crops_of(2 * count, size)
    actual = augment_views(crops.cuda(), torch.from_numpy(rows).cuda(), dtype).cpu()
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]  # for values up to 2.7
    assert largest_error(actual, reference(crops, rows)) < 1 / 255 + rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_augmentation_is_rounded_float32(dtype):
    from fastbyol.kernels.triton.augment import augment_views

    rows = torch.from_numpy(
        np.stack([parameter_row(JITTER=1, CONTRAST=1.2, SATURATION=0.9, SIGMA=s) for s in (0.0, 1.1)])
    )
    crops = crops_of(2, 40).cuda()
    exact = augment_views(crops, rows.cuda(), torch.float32)
    assert torch.equal(augment_views(crops, rows.cuda(), dtype), exact.to(dtype))


def test_augmentation_is_deterministic():
    from fastbyol.kernels.triton.augment import augment_views

    row = parameter_row(JITTER=1, CONTRAST=1.2, SATURATION=0.9, HUE=0.05, SIGMA=1.0)
    crops, rows = crops_of(8, 64).cuda(), torch.from_numpy(np.stack([row] * 8)).cuda()
    first = augment_views(crops, rows, torch.bfloat16)
    assert torch.equal(first, augment_views(crops, rows, torch.bfloat16))


def test_crops():
    from fastbyol.kernels.triton.crop import crop_views

    pictures = images()
    params = sample("byol", 3, 0, np.arange(len(pictures)), [p.shape[:2] for p in pictures])
    actual = crop_views([p.cuda() for p in pictures], params.box, params.flip, 96, torch.float32).cpu()
    for v in range(2):
        for i, picture in enumerate(pictures):
            box, flip = tuple(params.box[i, v].tolist()), bool(params.flip[i, v])
            expected = crop.crop_reference(picture, box, flip=flip, size=96).permute(1, 2, 0)
            assert (actual[v * len(pictures) + i] - expected).abs().max() < 2e-5


@pytest.mark.parametrize("shape", [(6, 5, 3, 7), (512, 256), (8, 64, 56, 56), (6, 1100, 2, 3)])
@pytest.mark.parametrize(("residual", "relu", "fork"), CASES)
def test_batch_norm(shape, residual, relu, fork):
    from fastbyol.kernels.triton import batch_norm

    for views in (1, 2):
        problem = NormProblem(shape, views=views, relu=relu, residual=residual, fork=fork, device="cuda")
        check(problem, batch_norm, 2e-5)


@pytest.mark.parametrize("shape", [(4, 8, 7, 9), (8, 64, 112, 112)])
@pytest.mark.parametrize("same", [False, True])
def test_batch_norm_and_max_pool(shape, same):
    from fastbyol.kernels.triton import batch_norm

    check(NormProblem(shape, pool=True, same=same, fork=True, device="cuda"), batch_norm, 2e-5)


def test_batch_norm_with_large_mean():
    from fastbyol.kernels.triton import batch_norm

    check(NormProblem((8, 64, 28, 28), mean=1000, relu=False, device="cuda"), batch_norm, 1e-5)


@pytest.mark.parametrize("residual", [RESIDUAL, NORMALIZED])
def test_batch_norm_is_deterministic(residual):
    from fastbyol.kernels.triton import batch_norm

    results = []
    for _ in range(2):
        problem = NormProblem((64, 256, 28, 28), residual=residual, fork=True, dtype=torch.bfloat16, device="cuda")
        y, _, gradients = problem.run(batch_norm)
        results.append([y, *(g for g in gradients if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "sizes",
    [
        (64, 2, 64, 256, 28, 28, 1),
        (32, 2, 256, 64, 14, 14, 1),
        (16, 1, 512, 128, 14, 14, 1),
        (16, 2, 256, 512, 15, 13, 2),
        (6, 2, 24, 40, 5, 7, 1),
    ],
)
def test_conv1x1_with_every_tile_equals_cudnn(sizes, dtype, caplog):
    """`measure` leaves out a tile whose result differs, or that does not fit the GPU."""
    shape = tuning.Shape(*sizes, dtype, after_norm=sizes[-1] == 1)
    times = tuning.measure(shape, torch.device("cuda"))
    assert "differs" not in caplog.text
    assert tuning._name(tuning.tiles(shape.inputs, shape.channels)[0]) in times
    assert all(0 < ms < 1000 for ms in times.values())
    tuning.choose(shape, times)


def test_conv1x1_is_deterministic():
    from fastbyol.kernels.triton.conv1x1 import conv1x1

    x = torch.randn(64, 64, 28, 28, device="cuda").to(torch.bfloat16, memory_format=torch.channels_last)
    weight = torch.randn(256, 64, 1, 1, device="cuda").to(torch.bfloat16)
    norm = Norm(torch.ones(256, device="cuda"), torch.zeros(256, device="cuda"), 1e-5)
    results = [conv1x1(x, weight, norm, stride=1, views=2, tile=tuning.tiles(64, 256)[0]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
