"""LARS and the target update against an independent float64 numpy loop."""

import copy
import gc
import math
import pickle
import weakref

import numpy as np
import pytest
import torch
from helpers.problems import ETA, GRADIENTS, Problem, odd_shapes, reference_update
from torch import nn

from fastbyol import schedules
from fastbyol.build import build_model
from fastbyol.config import ModelConfig, OptimConfig
from fastbyol.kernels import lars_ema
from fastbyol.kernels.cpu import lars_ema as cpu
from fastbyol.optim import LARS, build_optimizer, parameter_groups

MU = 0.9


def lars_float64(w, gradients, *, lrs, taus, wd, adapt, target):
    """The formulas of Grill et al. and You et al. for one tensor, step by step."""
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
def test_twenty_steps_equal_float64(shape, wd, adapt, with_target, kind):
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


def test_updates_in_place_and_skips_parameters_without_gradient():
    p, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    target = torch.zeros(3)
    optimizer = LARS([p, still], 0.1, target_pairs=[(p, target)], tau=torch.tensor(0.5))
    p.grad = torch.ones(3)
    pointers = p.data_ptr(), target.data_ptr()
    optimizer.step()
    assert (p.data_ptr(), target.data_ptr()) == pointers
    assert torch.equal(still.detach(), torch.ones(3))
    assert (target - 0.5 * p.detach()).abs().max() < 1e-7


def test_biases_and_norm_parameters_have_no_decay_and_no_trust_ratio():
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


def test_ema_update_equals_the_formula():
    pairs = [(torch.randn(3, 2), torch.randn(3, 2)), (torch.randn(5), torch.randn(5))]
    expected = [t + (1 - 0.9) * (w - t) for w, t in pairs]
    lars_ema.ema_update(torch.device("cpu"))(pairs, torch.tensor(0.9))
    assert all((t - e).abs().max() < 1e-6 for (_, t), e in zip(pairs, expected, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam"])
def test_torch_optimizers_follow_the_lr_tensor(name):
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


def test_unknown_target_pair_raises():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="not among the optimizer's parameters"):
        LARS([p], 0.1, target_pairs=[(nn.Parameter(torch.ones(2)), torch.ones(2))], tau=torch.ones(()))
    with pytest.raises(ValueError, match="need tau"):
        LARS([p], 0.1, target_pairs=[(p, torch.ones(2))])


# --- torch's optimizer interface, compared with torch.optim.SGD ---

# With trust ratio 1 and no target, LARS is SGD with momentum.
PLAIN = {"momentum": 0.9, "weight_decay": 0.1}


def make_pair(lr=0.1, tensor=False, groups=1):
    """Return LARS without trust ratios and SGD, with equal parameters."""

    def make(kind, **more):
        own = [{"params": [nn.Parameter(torch.arange(1.0, 4.0) + k)], **more} for k in range(groups)]
        return kind(own, torch.tensor(lr) if tensor else lr, **PLAIN)

    return make(LARS, adapt=False), make(torch.optim.SGD)


def weights(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def closure_of(optimizer):
    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in weights(optimizer))
        loss.backward()
        return loss

    return closure


def assert_equal(lars, sgd):
    for ours, theirs in zip(weights(lars), weights(sgd), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_closure_computes_loss_and_gradients_like_sgd():
    lars, sgd = make_pair(groups=2)
    for _ in range(5):
        with torch.no_grad():  # the closure must enable gradients itself
            ours, theirs = (o.step(closure_of(o)) for o in (lars, sgd))
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        assert_equal(lars, sgd)
    assert lars.step() is None


def test_non_finite_gradients_of_a_closure_skip_the_step_with_a_loss_scale():
    p, inv_scale = nn.Parameter(torch.ones(3)), torch.tensor(1 / 8)
    optimizer = LARS([p], 0.1, inv_scale=inv_scale)

    def closure(factor=torch.inf):
        optimizer.zero_grad()
        loss = p.sum()
        (factor * loss).backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert (optimizer.found_inf.item(), p.tolist()) == (1, [1.0] * 3)
    assert optimizer.step(lambda: closure(8)).item() == 3
    assert optimizer.found_inf.item() == 0
    assert (p < 1).all()


def test_zero_grad_like_sgd():
    lars, _ = make_pair()
    lars.step(closure_of(lars))
    lars.zero_grad(set_to_none=False)
    assert torch.equal(weights(lars)[0].grad, torch.zeros(3))
    lars.zero_grad()
    assert weights(lars)[0].grad is None


@pytest.mark.parametrize("lr", [{}, {"lr": 0.3}, {"lr": torch.tensor(0.3)}], ids=["default", "number", "tensor"])
def test_add_param_group(lr):
    lars, sgd = make_pair()
    for optimizer, more in ((lars, {"adapt": False}), (sgd, {})):
        optimizer.step(closure_of(optimizer))
        optimizer.add_param_group({"params": [nn.Parameter(torch.full((4,), 2.0))], **lr, **more})
        for _ in range(3):
            optimizer.step(closure_of(optimizer))
    assert_equal(lars, sgd)


def test_invalid_param_group_raises_and_is_not_added():
    lars, _ = make_pair()
    for group, text in (
        ({"params": [nn.Parameter(torch.ones(2).double())]}, "float32 parameters"),
        ({"params": [nn.Parameter(torch.ones(2, device="meta"))]}, "all parameters on one device, not on cpu and meta"),
        ({"params": [nn.Parameter(torch.ones(2))], "lr": -1}, "lr=-1: must be 0 or more"),
        ({"params": [nn.Parameter(torch.ones(2))], "momentum": math.nan}, "momentum=nan: must be 0 or more, and fin"),
        ({"params": [nn.Parameter(torch.ones(2))], "lr": torch.ones(1)}, "lr must be a float32 scalar on cpu"),
    ):
        with pytest.raises(ValueError, match=text):
            lars.add_param_group(group)
    assert len(lars.param_groups) == 1
    with pytest.raises(ValueError, match="LARS got no parameters"):
        LARS([{"params": []}], 0.1)
    assert len(LARS([{"params": []}, {"params": weights(lars)}], 0.1).param_groups) == 2


@pytest.mark.parametrize("tensor", [False, True])
def test_state_dict_round_trip(tensor, tmp_path):
    source, sgd = make_pair(tensor=tensor, groups=2)
    for optimizer in (source, sgd):
        optimizer.step(closure_of(optimizer))
        optimizer.param_groups[0]["momentum"] = 0.5
    torch.save(source.state_dict(), tmp_path / "s.pt")
    lr = torch.tensor(9.0)
    target = LARS([{"params": [nn.Parameter(p.detach().clone())]} for p in weights(source)], lr)
    target.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert lr.item() == pytest.approx(0.1)
    assert all(group["lr"] is lr for group in target.param_groups)  # writing to the tensor still sets the rate
    for optimizer in (target, sgd):
        optimizer.step(closure_of(optimizer))
    assert_equal(target, sgd)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        make_pair()[0].load_state_dict(source.state_dict())


def test_different_rates_of_a_state_dict_split_the_shared_lr_tensor():
    source, _ = make_pair(groups=2)
    source.param_groups[1]["lr"] = 0.7
    source.step()
    target, _ = make_pair(lr=9.0, tensor=True, groups=2)
    target.load_state_dict(source.state_dict())
    assert [group["lr"].item() for group in target.param_groups] == pytest.approx([0.1, 0.7])


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda k: 1 / (k + 1), lambda k: 1 / (k + 2)]),
    "multiplicative": lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda k: 0.7),
    "polynomial": lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 6),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
    "restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=8),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.CosineAnnealingLR(o, 3)],
        [3],
    ),
    "manual": lambda o: Manual(o),
}


class Manual:
    """Sets the rate like training scripts without a scheduler."""

    def __init__(self, optimizer):
        self.optimizer, self.steps = optimizer, 0

    def step(self):
        self.steps += 1
        for k, group in enumerate(self.optimizer.param_groups):
            group["lr"] = 0.1 / (self.steps + k)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_torch_schedulers_set_the_rate(name):
    lars, sgd = make_pair(groups=2)
    schedules_of_both = [SCHEDULERS[name](o) for o in (lars, sgd)]
    for _ in range(6):
        for optimizer, schedule in zip((lars, sgd), schedules_of_both, strict=True):
            optimizer.step(closure_of(optimizer))
            schedule.step()
        rates = [[float(group["lr"]) for group in o.param_groups] for o in (lars, sgd)]
        assert rates[0] == pytest.approx(rates[1], abs=1e-6)
        assert_equal(lars, sgd)


def test_reduce_on_plateau_sets_the_rate():
    lars, _ = make_pair(groups=2)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(lars, factor=0.1, patience=0)
    for loss in (1.0, 2.0, 3.0):
        schedule.step(loss)
    assert [group["lr"].item() for group in lars.param_groups] == pytest.approx([0.001, 0.001])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copy_is_independent(copied):
    p, target = nn.Parameter(torch.ones(3, 2)), torch.zeros(3, 2)
    lars = LARS([p], torch.tensor(0.1), target_pairs=[(p, target)], tau=torch.tensor(0.5), inv_scale=torch.tensor(1.0))
    lars.step(closure_of(lars))
    other, (q, goal) = copied((lars, (p, target)))
    assert q is weights(other)[0]
    assert q is not p
    before = p.detach().clone(), target.clone()
    other.step(closure_of(other))
    assert torch.equal(p, before[0]) and torch.equal(target, before[1])
    lars.step(closure_of(lars))
    assert not torch.equal(p, before[0])
    assert torch.equal(p, q) and torch.equal(target, goal)


# --- every implementation against float64 ---


@pytest.fixture(params=["numba", pytest.param("triton", marks=pytest.mark.interpreter)])
def implementation(request):
    """The module with LarsEma and EmaUpdate: numba, or Triton in its interpreter."""
    if request.param == "numba":
        return cpu
    module, patch = request.getfixturevalue("interpreted")("lars_ema"), request.getfixturevalue("monkeypatch")
    # The interpreter takes a millisecond per block, whatever its size.
    patch.setattr(module, "CHUNK", 1 << 18)
    patch.setattr(module, "BLOCK", 1 << 16)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
def test_twenty_steps_over_many_tensors(implementation, dtype):
    count = 170 if dtype == torch.float32 or implementation is cpu else 20  # the interpreter is slow
    problem, update = Problem(odd_shapes(count), dtype=dtype), implementation.LarsEma()
    problem.weights[7].zero_()
    problem.exact[7][0][...] = 0
    for k in range(20):
        problem.new_gradients()
        problem.grads[9].zero_()
        problem.step(update, k, 20)
        problem.exact_step()
    assert problem.largest_error() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", GRADIENTS, ids=str)
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_non_finite_gradient_skips_the_step_for_all_tensors(implementation, dtype, poison):
    problem, update = Problem(odd_shapes(9), dtype=dtype, scale=64.0), implementation.LarsEma()
    for k in range(6):
        # Tensor 4 has a trust ratio. Tensor 5 has none, and needs the first pass only for this
        # check.
        problem.new_gradients(poison if k in (1, 4) else None, poisoned=4 if k == 1 else 5)
        problem.step(update, k + 5, 20)
        assert problem.found_inf.item() == (k in (1, 4))
        if k not in (1, 4):
            problem.exact_step()
    assert problem.largest_error() < 1e-6


def test_nothing_is_skipped_without_a_loss_scale(implementation):
    """As in torch's optimizers: the loss then becomes NaN."""
    problem, update = Problem([(5,), (6,), (7,)]), implementation.LarsEma()
    problem.new_gradients(float("nan"))
    problem.step(update, 6, 20)
    assert problem.weights[1].isnan().any()
    assert problem.weights[0].isfinite().all()


def layouts():
    """Yield (weight, gradient, target) in memory layouts other than contiguous."""
    rng = torch.Generator().manual_seed(0)

    def values(*shape):
        return torch.randn(shape, generator=rng)

    last = torch.channels_last
    yield "channels_last", tuple(values(8, 3, 5, 5).to(memory_format=last) for _ in range(3))
    weight, target = (values(8, 3, 5, 5).to(memory_format=last) for _ in range(2))
    yield "gradient in another memory order", (weight, values(8, 3, 5, 5), target)
    yield (
        "target in another memory order",
        (values(4, 6, 3, 3), values(4, 6, 3, 3), values(4, 6, 3, 3).to(memory_format=last)),
    )
    yield "strided", tuple(values(9, 20)[:, ::2] for _ in range(3))
    yield "transposed", tuple(values(9, 21).T for _ in range(3))
    yield "expanded gradient", (values(6, 4), values(1, 4).expand(6, 4), values(6, 4))
    yield "1x1 convolution", (values(6, 4, 1, 1).to(memory_format=last), values(6, 4, 1, 1), values(6, 4, 1, 1))
    bucket = values(1000)
    yield "unaligned bucket views", (values(300), bucket[1:301], values(300))


@pytest.mark.parametrize(("name", "tensors"), [pytest.param(n, t, id=n) for n, t in layouts()])
def test_any_memory_layout(implementation, name, tensors):
    weight, grad, target = tensors
    momentum_buffer, other = torch.zeros_like(weight), torch.ones(4)
    plain = [t.contiguous().clone() for t in (weight, grad, momentum_buffer, target)]
    hypers = [lars_ema.Hyper(lr=torch.tensor(0.1), weight_decay=0.1, momentum=0.9, trust_coefficient=ETA)]
    tau, update = torch.tensor(0.9), implementation.LarsEma()
    for _ in range(3):
        update([(weight, grad, momentum_buffer, target), (other, other, other, None)], [0, 0], hypers, tau)
        lars_ema.lars_ema_reference(
            *plain, lr=hypers[0].lr, tau=tau, weight_decay=0.1, momentum=0.9, trust_coefficient=ETA
        )
    for actual, expected in zip((weight, momentum_buffer, target), (plain[0], plain[2], plain[3]), strict=True):
        assert (actual - expected).abs().max() < 1e-6, name


@pytest.mark.slow
def test_bit_identical_between_runs(implementation):
    results = []
    for _ in range(2):
        problem, update = Problem(odd_shapes(12)), implementation.LarsEma()
        for k in range(3):
            problem.new_gradients()
            problem.step(update, k + 5, 20)
        results.append(problem.weights + problem.momenta)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bit_identical_for_any_number_of_threads():
    results, before = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            problem, update = Problem(odd_shapes(12)), cpu.LarsEma()
            for k in range(3):
                problem.new_gradients()
                problem.step(update, k + 5, 20)
            results.append(problem.weights + problem.momenta)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_new_gradient_addresses_are_used(implementation):
    problem, update, old = Problem([(5, 7), (4097,)]), implementation.LarsEma(), []
    for k in range(4):
        old.append(problem.grads)  # kept alive, so that the new ones have other addresses
        problem.grads = [torch.zeros_like(g) for g in problem.grads]
        problem.new_gradients()
        problem.step(update, k + 5, 20)
        problem.exact_step()
    assert problem.largest_error() < 1e-6


def test_other_tensors_and_layouts_in_the_next_call(implementation):
    """A parameter loses its gradient in one step; another's memory order changes in the next."""
    update = implementation.LarsEma()
    problems = [Problem([(300,), (4, 3, 5, 5)]), Problem([(7,)]), Problem([(8, 3, 5, 5), (300,)])]
    for problem in (*problems, problems[0]):
        problem.new_gradients()
        problem.step(update, 6, 20)
        problem.exact_step()
        problem.grads = [g.to(memory_format=torch.channels_last) if g.ndim == 4 else g for g in problem.grads]
        problem.new_gradients()
        problem.step(update, 7, 20)
        problem.exact_step()
        assert problem.largest_error() < 1e-6


def test_new_weight_addresses_are_used(implementation):
    """`p.data = ...` keeps the tensor but changes its memory."""
    problem, update, old = Problem([(5, 7), (4097,)]), implementation.LarsEma(), []
    for k in range(3):
        for w in problem.weights:
            old.append(w.data)
            w.data = w.data.clone()
        problem.new_gradients()
        problem.step(update, k + 5, 20)
        problem.exact_step()
    assert problem.largest_error() < 1e-6


def test_no_reference_to_gradients_after_the_step(implementation):
    """Old gradients during the next backward pass would cost the model's size in memory."""
    problem, update = Problem([(5, 7), (8, 3, 5, 5)]), implementation.LarsEma()
    # Staged: its memory order differs from the gradient's.
    problem.weights[1] = problem.weights[1].to(memory_format=torch.channels_last)
    problem.new_gradients()
    problem.step(update, 6, 20)
    references = [weakref.ref(g) for g in problem.grads]
    problem.grads = []
    gc.collect()
    assert [r() for r in references] == [None, None]


@pytest.mark.slow
def test_error_with_16_bit_gradients_is_at_most_twice_torch_s(implementation):
    """Compared with the float32 reference on the same gradients."""
    for dtype in GRADIENTS[1:]:
        ours, plain, update = (
            Problem(odd_shapes(9), dtype=dtype),
            Problem(odd_shapes(9), dtype=dtype),
            implementation.LarsEma(),
        )
        for k in range(20):
            for problem in (ours, plain):
                problem.new_gradients()
            ours.step(update, k, 20)
            plain.step(reference_update, k, 20)
            ours.exact_step()
            plain.exact_step()
        assert ours.largest_error() <= 2 * plain.largest_error()


def test_reference_skips_with_found_inf():
    tensors = [torch.ones(3), torch.full((3,), torch.inf), torch.ones(3), torch.zeros(3)]
    lars_ema.lars_ema_reference(
        *tensors,
        lr=torch.tensor(0.1),
        tau=torch.tensor(0.5),
        weight_decay=0.0,
        momentum=0.9,
        trust_coefficient=None,
        inv_scale=torch.tensor(0.5),
        found_inf=torch.tensor(1.0),
    )
    assert [t.tolist() for t in (tensors[0], tensors[2], tensors[3])] == [[1.0] * 3, [1.0] * 3, [0.0] * 3]


def test_ema_update_of_any_memory_layout(implementation):
    rng = torch.Generator().manual_seed(0)
    shapes = [(1,), (3, 5), (4097,), (8, 3, 5, 5), (2**17 + 1,)]
    pairs = [(torch.randn(s, generator=rng), torch.randn(s, generator=rng)) for s in shapes]
    pairs[3] = (pairs[3][0].to(memory_format=torch.channels_last), pairs[3][1])
    bucket = torch.randn(302, generator=rng)
    pairs.append((bucket[1:], torch.randn(301, generator=rng)))
    around = torch.ones(10, 20)
    pairs.append((torch.randn(10, 20, generator=rng)[:, ::2], around[:, ::2]))
    expected = [(t.double() + 0.1 * (w.double() - t.double())) for w, t in pairs]
    implementation.EmaUpdate()(pairs, torch.tensor(0.9))
    assert torch.equal(around[:, 1::2], torch.ones(10, 10))
    assert all((t - e).abs().max() < 1e-6 for (_, t), e in zip(pairs, expected, strict=True))


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ((torch.zeros(3), torch.zeros(4), torch.zeros(3), None), ValueError, r"\(3,\).*\(4,\)"),
        ((torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(2)), ValueError, r"target \(2,\)"),
        ((torch.zeros(3), torch.zeros(3).double(), torch.zeros(3), None), TypeError, "gradients must be one of"),
        (
            (torch.zeros(3), torch.zeros(3), torch.zeros(3).half(), None),
            TypeError,
            "must be float32, not torch.float16",
        ),
    ],
)
def test_mismatched_tensors_raise(implementation, row, error, message):
    hyper = lars_ema.Hyper(lr=torch.tensor(0.1), weight_decay=0.0, momentum=0.9, trust_coefficient=ETA)
    with pytest.raises(error, match=message):
        implementation.LarsEma()([row], [0], [hyper], torch.tensor(0.5))


def test_invalid_scalars_raise():
    for tau in (0.9, torch.tensor(0.9, dtype=torch.float64), torch.ones(2)):
        with pytest.raises(TypeError, match="tau must be a float32 scalar"):
            lars_ema.ema_update(torch.device("cpu"))([(torch.ones(2), torch.zeros(2))], tau)
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="lr must be a float32 scalar"):
        LARS([p], torch.tensor(0.1, dtype=torch.float64))
    with pytest.raises(ValueError, match="tau must be a float32 scalar"):
        LARS([p], 0.1, target_pairs=[(p, torch.ones(2))], tau=torch.ones(1))
    with pytest.raises(ValueError, match="float32 parameters"):
        LARS([nn.Parameter(torch.ones(2).double())], 0.1)
    with pytest.raises(TypeError, match="float32 scalar tensor"):
        lars_ema.Hyper(lr=0.1, weight_decay=0.0, momentum=0.9, trust_coefficient=None)


def test_optimizer_with_a_loss_scale_skips_and_sets_found_inf():
    p, target, inv_scale = nn.Parameter(torch.ones(4, 4)), torch.zeros(4, 4), torch.tensor(1 / 8)
    optimizer = LARS([p], 0.1, target_pairs=[(p, target)], tau=torch.tensor(0.5), inv_scale=inv_scale)
    p.grad = torch.full((4, 4), torch.inf)
    optimizer.step()
    assert optimizer.found_inf.item() == 1
    assert torch.equal(p.detach(), torch.ones(4, 4))
    assert torch.equal(target, torch.zeros(4, 4))
    p.grad = 8 * torch.ones(4, 4)
    optimizer.step()
    assert optimizer.found_inf.item() == 0
    assert (p.detach() - (1 - 0.1 * ETA)).abs().max() < 1e-6  # |w| / |g / 8| = 1
    assert (target - 0.5 * p.detach()).abs().max() < 1e-7
