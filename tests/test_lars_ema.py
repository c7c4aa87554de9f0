"""LARS and the target update against an independent float64 numpy loop."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fastbyol import schedules
from fastbyol.config import ModelConfig, OptimConfig
from fastbyol.kernels.lars_ema import ema_update_
from fastbyol.model import build_model
from fastbyol.optim import LARS, build_optimizer, parameter_groups

ETA, MU = 1e-3, 0.9


def lars_float64(w, gradients, *, lrs, taus, wd, adapt, target):
    """The formulas of Grill et al. and You et al., one tensor, one step after the other."""
    m = np.zeros_like(w)
    for g, lr, tau in zip(gradients, lrs, taus, strict=True):
        u = g + wd * w
        w_norm, u_norm = np.sqrt((w**2).sum()), np.sqrt((u**2).sum())
        r = ETA * w_norm / u_norm if adapt and w_norm > 0 and u_norm > 0 else 1.0
        m = MU * m + r * u
        w = w - lr * m
        if target is not None:
            target = target + (1 - tau) * (w - target)
    return w, m, target


@pytest.mark.parametrize("shape", [(1,), (3, 1), (127, 2), (4097,), (5, 3, 3, 3)])
@pytest.mark.parametrize(
    ("wd", "adapt", "with_target", "kind"),
    [
        (1e-6, True, True, "random"),
        (0.1, True, False, "random"),
        (0.0, False, True, "random"),
        (1e-6, True, True, "zero weight"),
        (0.0, True, True, "zero gradient"),
    ],
)
def test_twenty_steps_against_float64(shape, wd, adapt, with_target, kind):
    rng = np.random.default_rng(0)
    steps = 20
    w = rng.normal(size=shape) * (kind != "zero weight")
    gradients = [rng.normal(size=shape) * (kind != "zero gradient") for _ in range(steps)]
    target = rng.normal(size=shape) if with_target else None
    lrs = [schedules.learning_rate(k, peak=3.0, warmup_steps=5, total_steps=steps) for k in range(steps)]
    taus = [schedules.target_decay(k, base=0.9, total_steps=steps) for k in range(steps)]
    expected = lars_float64(w, gradients, lrs=lrs, taus=taus, wd=wd, adapt=adapt, target=target)

    p = nn.Parameter(torch.tensor(w, dtype=torch.float32))
    t = torch.tensor(target, dtype=torch.float32) if with_target else None
    lr, tau = torch.zeros(()), torch.zeros(())
    pairs = [(p, t)] if with_target else []
    optimizer = LARS([{"params": [p], "weight_decay": wd, "adapt": adapt}], lr, target_pairs=pairs, tau=tau)
    for g, lr_k, tau_k in zip(gradients, lrs, taus, strict=True):
        lr.fill_(lr_k)
        tau.fill_(tau_k)
        p.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()

    results = [p.detach(), optimizer.state[p]["momentum_buffer"], t]
    for actual, reference in zip(results, expected, strict=True):
        if reference is not None:
            scale = max(np.abs(reference).max(), 1e-12)
            assert np.abs(actual.numpy() - reference).max() / scale < 2e-6


def test_trust_ratio_scales_with_the_weight_and_not_with_the_gradient():
    moved = []
    for weight_scale, gradient_scale in ((1, 1), (1, 1000), (10, 1)):
        p = nn.Parameter(weight_scale * torch.ones(4, 4))
        p.grad = gradient_scale * torch.ones(4, 4)
        LARS([p], 1.0, weight_decay=0.0).step()
        moved.append((weight_scale - p[0, 0]).item())
    assert moved[0] == pytest.approx(ETA, rel=1e-3)
    assert moved[1] == pytest.approx(moved[0], rel=1e-3)
    assert moved[2] == pytest.approx(10 * moved[0], rel=1e-3)


def test_pointers_stay_and_parameters_without_gradient_do_too():
    p, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    target = torch.zeros(3)
    optimizer = LARS([p, still], 0.1, target_pairs=[(p, target)], tau=torch.tensor(0.5))
    p.grad = torch.ones(3)
    pointers = p.data_ptr(), target.data_ptr()
    optimizer.step()
    assert (p.data_ptr(), target.data_ptr()) == pointers
    assert torch.equal(still.detach(), torch.ones(3))
    assert (target - 0.5 * p.detach()).abs().max() < 1e-7


def test_groups_list_biases_and_norm_parameters_without_decay_and_trust_ratio():
    model = build_model(ModelConfig(backbone="resnet18", width=0.125, hidden_dim=8, projection_dim=4), 32, 0)
    decayed, plain = parameter_groups(model, 0.1)
    names = {p: name for name, p in model.named_parameters()}
    plain_names = {names[p] for p in plain["params"]}
    expected = {
        f"{prefix}.{leaf}" if prefix else leaf
        for prefix, module in model.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or leaf == "bias"
    }
    expected = {name for name in expected if not name.startswith("target.")}
    assert plain_names == expected
    assert (plain["weight_decay"], plain["adapt"]) == (0.0, False)
    assert (decayed["weight_decay"], decayed["adapt"]) == (0.1, True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert plain_names | {names[p] for p in decayed["params"]} == trained
    assert not any(name.startswith("target.") for name in trained)


def test_ema_update_moves_parameters_by_the_formula():
    pairs = [(torch.randn(3, 2), torch.randn(3, 2)), (torch.randn(5), torch.randn(5))]
    expected = [t + (1 - 0.9) * (w - t) for w, t in pairs]
    ema_update_(pairs, torch.tensor(0.9))
    assert all((t - e).abs().max() < 1e-6 for (_, t), e in zip(pairs, expected, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam"])
def test_torch_s_optimisers_follow_the_lr_tensor(name):
    module = nn.Linear(3, 2)
    start = copy.deepcopy(module.weight)
    lr = torch.zeros(())
    optimizer = build_optimizer(OptimConfig(name=name, weight_decay=0.1), module, [], lr, torch.ones(()))
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(module.weight, start)
    lr.fill_(0.1)
    optimizer.step()
    assert (module.weight - start).abs().min() > 0.01
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_a_pair_that_the_optimiser_does_not_know_is_refused():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="not among the optimiser's parameters"):
        LARS([p], 0.1, target_pairs=[(nn.Parameter(torch.ones(2)), torch.ones(2))], tau=torch.ones(()))
    with pytest.raises(ValueError, match="need tau"):
        LARS([p], 0.1, target_pairs=[(p, torch.ones(2))])
