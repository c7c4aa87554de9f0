"""Training step: modes, precisions, micro-batches, activation checkpointing and clipping."""

import contextlib
import copy

import pytest
import torch
from helpers.common import BATCH
from helpers.problems import reference_update
from helpers.steps import MODEL, SIZE, new_batch, new_step
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastbyol.build import build_model
from fastbyol.config import ModelConfig
from fastbyol.data import Batch
from fastbyol.errors import InputError
from fastbyol.kernels import lars_ema
from fastbyol.parallel import choose_step_mode, with_cast_weights
from fastbyol.precision import LossScale
from fastbyol.runtime.distributed import World
from fastbyol.runtime.memory import SavedTensorBytes

CPU = torch.device("cpu")


def run(step, steps, start=0):
    return [step(k, new_batch(k, dtype=step.dtype)).loss.item() for k in range(start, start + steps)]


def set_scale(step, value):
    step.loss_scale.scale.fill_(value)
    step.loss_scale.inverse.fill_(1 / value)


def weights_of(step):
    return {name: value.clone() for name, value in step.model.state_dict().items()}


# --- modes ---


@pytest.mark.slow
def test_compiled_step_matches_eager_over_fifty_steps():
    """Float32 losses agree to 1e-5 (3.3e-6 over five seeds), with one graph for all lr and tau.

    With ReLUs, a value may fall on the other side of the kink, and early training doubles rounding
    differences every other step. So this test trains a network with smooth activations, and the
    next one starts each step of a network with ReLUs from the same state.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    smooth = {"backbone": "test_efficientnet", "optim": {"base_lr": 0.05}}
    eager, compiled = (new_step(mode=mode, **smooth) for mode in ("eager", "compile"))
    a, b = run(eager, 50), run(compiled, 50)
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-5
    assert min(a[40:]) < min(a[:10]) - 0.2  # the comparison is meaningful only if the network learns
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert all("_orig_mod" not in name for name in compiled.state_dict()["optimizer"])


@pytest.mark.slow
def test_compiled_step_matches_eager_from_fifty_states():
    """Network with ReLUs and fused layers at a realistic learning rate and 1 or 2 micro-batches."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = (new_step(backbone="test_resnet", mode=m, optim={"base_lr": 0.01}) for m in ("eager", "compile"))
    a, b = run(eager, 5), run(compiled, 5)
    # Five uninterrupted steps at a small rate differ by 7e-7 to 8.6e-6 over five seeds, and fifty
    # steps by up to 6.5e-4.
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4
    for step in (eager, compiled):
        step.schedule._peak = 0.1
    gaps = []
    for k in range(50):
        copy_state(eager, compiled)
        a, b = (run(step, 1, start=k)[0] for step in (eager, compiled))
        assert abs(a - b) < 1e-5  # 2.4e-6 over five seeds
        pairs = zip(eager.model.state_dict().values(), compiled.model.state_dict().values(), strict=True)
        gaps.append(max((x.float() - y.float()).abs().max().item() for x, y in pairs))
    # In some states a value is so close to a ReLU's kink that rounding decides whether it has a
    # gradient. Over five seeds, half of the states agree to 7e-7 and all to 6e-4.
    assert sorted(gaps)[25] < 1e-5
    assert max(gaps) < 1e-2
    assert run(eager, 1)[0] < 3.2  # the network has learned: its loss started above 3.5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    options = {"backbone": "test_resnet", "micro_batches": 2, "batch": 2 * BATCH, "optim": {"base_lr": 0.01}}
    eager, compiled = (new_step(mode=mode, **options) for mode in ("eager", "compile"))
    a, b = ([step(k, new_batch(k, 2 * BATCH)).loss.item() for k in range(4)] for step in (eager, compiled))
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 1e-4
    whole = new_step(**options | {"micro_batches": 1})
    assert (
        abs(whole(0, new_batch(0, 2 * BATCH)).loss.item() - a[0]) > 1e-4
    )  # each part has its own BatchNorm statistics


def copy_state(source, target):
    """Copy weights and momenta in place, as compiled models require."""
    with torch.no_grad():
        for x, y in zip(source.model.state_dict().values(), target.model.state_dict().values(), strict=True):
            y.copy_(x)
        momenta = [step.state_dict()["optimizer"] for step in (source, target)]
        for name, state in momenta[0].items():
            momenta[1][name]["momentum_buffer"].copy_(state["momentum_buffer"])


def test_choose_step_mode():
    cuda = torch.device("cuda")
    assert choose_step_mode("auto", CPU, World())[0] == "eager"
    assert choose_step_mode("auto", cuda, World())[0] == "cuda_graph"
    assert choose_step_mode("auto", cuda, World(0, 2))[0] == "compile"
    assert choose_step_mode("cuda_graph", cuda, World(0, 2)) == ("cuda_graph", "as configured")
    assert choose_step_mode("cuda_graph", cuda, World()) == ("cuda_graph", "as configured")
    with pytest.raises(InputError, match="step.mode=cuda_graph needs a GPU"):
        choose_step_mode("cuda_graph", CPU, World())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_step_reads_no_values(monkeypatch, precision):
    """Fake tensors raise an error in `.item()` and similar calls, and the step makes none."""
    # Kernels that take addresses cannot run on fake tensors.
    monkeypatch.setattr(lars_ema, "lars_update", lambda device: reference_update)
    with FakeTensorMode():
        options = {"micro_batches": 2, "optim": {"clip_grad_norm": 1.0}}
        # Copying the weights to a target or another memory format would read them.
        step = new_step(precision=precision, target_init="reseed", layout=None, **options)
        view = torch.empty(BATCH, 3, SIZE, SIZE, dtype=step.dtype)
        output = step(0, Batch((view, view), view, view))
        with pytest.raises(DataDependentOutputException):
            output.loss.item()


# --- precisions ---


@pytest.mark.slow
def test_bf16_learns_like_fp32():
    exact, short = (run(new_step(precision=p, optim={"base_lr": 0.5}), 30) for p in ("fp32", "bf16"))
    assert max(abs(a - b) for a, b in zip(exact[:3], short[:3], strict=True)) < 0.05
    assert abs(sum(exact[-10:]) - sum(short[-10:])) / 10 < 0.3
    assert all(sum(run[-10:]) < sum(run[:10]) - 1 for run in (exact, short))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_weights_momentum_and_loss_stay_float32(precision):
    step = new_step(precision=precision)
    output = step(0, new_batch(0, dtype=step.dtype))
    assert output.loss.dtype == output.projection_std.dtype == torch.float32
    assert {v.dtype for s in step.state_dict()["optimizer"].values() for v in s.values()} == {torch.float32}
    assert {p.dtype for p in step.model.parameters()} == {torch.float32}
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "adam"])
def test_overflow_skips_optimizer_and_target_and_halves_the_scale(name):
    """The skip omits both optimizer step and target update, and the next step updates again."""
    step = new_step(precision="fp16", optim={"name": name, "base_lr": 2.0 if name == "lars" else 0.01})
    set_scale(step, 1024.0)  # the default initial scale is too high for this network
    run(step, 3)
    assert int(step.loss_scale.skipped) == 0
    before, momentum = weights_of(step), copy.deepcopy(step.state_dict()["optimizer"])
    set_scale(step, 2.0**120)
    run(step, 1, start=3)
    assert int(step.loss_scale.skipped) == 1
    assert step.loss_scale.scale.item() == 2.0**119
    after = weights_of(step)
    for key, value in before.items():
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(value, after[key]), key
    for key, state in step.state_dict()["optimizer"].items():
        assert all(torch.equal(value, momentum[key][k]) for k, value in state.items()), key
    set_scale(step, 1024.0)
    online, target = (dict(weights_of(step)) for _ in range(2))
    run(step, 1, start=4)
    new = weights_of(step)
    assert int(step.loss_scale.skipped) == 1
    for key in online:
        if key.startswith("target.") and key.endswith("weight"):
            w, tau = new[key.replace("target.", "online.")], step.schedule.tau(4)
            assert torch.allclose(new[key], target[key] + (1 - tau) * (w - target[key]), atol=1e-6), key
    assert not torch.equal(new["online.backbone.conv1.weight"], online["online.backbone.conv1.weight"])


def test_loss_scale_grows_and_survives_a_checkpoint():
    scale = LossScale(CPU)
    for _ in range(2000):
        scale.update()
    assert (scale.scale.item(), scale.inverse.item()) == (2.0**17, 2.0**-17)
    step = new_step(precision="fp16")
    step.loss_scale.load_state_dict(scale.state_dict())
    again = new_step(precision="fp16")
    again.load_state_dict(step.state_dict())
    assert again.loss_scale.scale.item() == 2.0**17
    new_step().load_state_dict(step.state_dict())  # float32 ignores the scale
    again.load_state_dict(new_step().state_dict())  # and saves none
    assert again.loss_scale.scale.item() == 2.0**17


@pytest.mark.slow
def test_fp16_gradients_match_fp32():
    """After one plain SGD step, the scale is divided out and fp16 has a smaller error than bf16."""
    optim = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "base_lr": 16.0}
    exact, short, rough = (new_step(precision=p, optim=optim) for p in ("fp32", "fp16", "bf16"))
    set_scale(short, 1024.0)
    before = [p.clone() for p in exact.model.online.parameters()]
    moved = []
    for step in (exact, short, rough):
        run(step, 1)
        moved.append(
            torch.cat([(p - b).flatten() for p, b in zip(step.model.online.parameters(), before, strict=True)])
        )
    errors = [(m - moved[0]).norm() / moved[0].norm() for m in moved[1:]]
    assert errors[0] < errors[1] < 0.3


# --- weights cast together ---


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_weights_cast_together_give_the_same_gradients(compiled):
    step = new_step(precision="bf16")
    other = copy.deepcopy(step.model)
    backend = {"fullgraph": True, "backend": "aot_eager"}
    forward = with_cast_weights(other, torch.bfloat16)
    cast = torch.compile(forward, **backend) if compiled else forward
    plain = torch.compile(step.model.forward, **backend) if compiled else step.model
    dtypes = set()
    for module in other.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_pre_hook(lambda m, _: dtypes.add(m.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [f(*new_batch(0).views).loss for f in (plain, cast)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert compiled or dtypes == {torch.bfloat16}
    for (name, p), q in zip(step.model.named_parameters(), other.parameters(), strict=True):
        assert q.dtype == torch.float32
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or (q.grad.dtype == torch.float32 and torch.equal(p.grad, q.grad)), name


# --- micro-batches, activation checkpointing, clipping ---


def test_micro_batches_average_gradients_for_one_update():
    step = new_step(micro_batches=4, optim={"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "base_lr": 0.5})
    batch = new_batch(0)
    reference = copy.deepcopy(step.model)
    losses = []
    for k in range(4):
        part = slice(4 * k, 4 * k + 4)
        output = reference(batch.views[0][part], batch.views[1][part])
        (output.loss / 4).backward()
        losses.append(output.loss.item())
    output = step(0, batch)
    assert output.loss.item() == pytest.approx(sum(losses) / 4, abs=1e-6)
    lr, tau = step.schedule.lr(0), step.schedule.tau(0)
    before = dict(build_model(ModelConfig(**MODEL), SIZE, 0).named_parameters())
    for (name, p), q in zip(step.model.named_parameters(), reference.parameters(), strict=True):
        if q.grad is not None:
            assert torch.allclose(p, q - lr * q.grad, atol=1e-6), name
        else:
            w = dict(step.model.named_parameters())[name.replace("target.", "online.")]
            assert torch.allclose(p, before[name] + (1 - tau) * (w - before[name]), atol=1e-6), name
    for (name, a), b in zip(step.model.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.equal(a, b[1]), name  # BatchNorm processed four batches of four


def test_indivisible_batch_is_rejected():
    with pytest.raises(InputError, match="data.batch_size=16 cannot be split into 1 ranks x step.micro_batches=3"):
        new_step(micro_batches=3)
    with pytest.raises(InputError, match="equal parts of at least 2 images are needed"):
        new_step(micro_batches=16)


@pytest.mark.parametrize(("backbone", "stages"), [("resnet18", 1), ("resnet18", 4), ("test_byobnet", 1)])
def test_activation_checkpointing_only_saves_memory(backbone, stages):
    plain, frugal = (new_step(backbone=backbone, activation_checkpointing=k) for k in (0, stages))
    with SavedTensorBytes(plain.model) as saved:
        run(plain, 1)
    with SavedTensorBytes(frugal.model) as fewer:
        run(frugal, 1)
    assert fewer.total < 0.9 * saved.total
    assert run(plain, 3, start=1) == run(frugal, 3, start=1)
    for (name, a), b in zip(plain.model.state_dict().items(), frugal.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name  # running statistics are not updated a second time


@pytest.mark.slow
def test_backbone_without_activation_checkpointing_is_rejected():
    with pytest.raises(InputError, match="step.activation_checkpointing=2: VGG does not support it"):
        new_step(backbone="vgg11_bn", activation_checkpointing=2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_limits_the_gradient_norm(precision):
    optim = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "base_lr": 16.0}
    free, clipped, loose = (
        new_step(precision=precision, optim=optim | {"clip_grad_norm": c}) for c in (0.0, 0.01, 1000.0)
    )
    for step in (free, clipped, loose) if precision == "fp16" else ():
        set_scale(step, 1024.0)
    before = torch.cat([p.detach().flatten() for p in free.model.online.parameters()])
    moved = []
    for step in (free, clipped, loose):
        run(step, 1)
        moved.append(torch.cat([p.detach().flatten() for p in step.model.online.parameters()]) - before)
    assert (moved[1].norm() / step.schedule.lr(0)).item() < 0.01 < (moved[0].norm() / step.schedule.lr(0)).item()
    assert torch.nn.functional.cosine_similarity(moved[0], moved[1], dim=0) > 0.999
    assert torch.equal(moved[0], moved[2])


# --- addresses ---


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), [("lars", "fp16"), ("adamw", "bf16")])
def test_addresses_are_stable_over_twenty_steps(name, precision):
    """Captured graphs and compiled code keep using the addresses of the first steps."""
    step = new_step(precision=precision, optim={"name": name, "base_lr": 0.01})

    def addresses():
        scale = step.loss_scale.buffers() if step.loss_scale is not None else ()
        tensors = [*step.model.parameters(), *step.model.buffers(), *scale]
        tensors += [step.lr, step.tau, step.number, step.first_bad_step]
        states = [v for s in step.optimizer.state.values() for v in s.values()]
        return [t.data_ptr() for t in (*tensors, *states)]

    run(step, 2)
    before = addresses()
    run(step, 20, start=2)
    assert addresses() == before


def test_first_non_finite_step_is_recorded():
    step = new_step()
    with contextlib.suppress(StopIteration):
        run(step, 2)
    for p in step.model.predictor.parameters():
        p.data.fill_(float("nan"))
    run(step, 3, start=2)
    assert int(step.first_bad_step) == 2
