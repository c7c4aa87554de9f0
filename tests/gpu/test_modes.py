"""Eager, compiled and captured steps: agreement, host syncs, overflow, schedules and resume."""

from functools import lru_cache

import pytest
import torch
from helpers.on_device import (
    DEVICE,
    Network,
    needs_cuda,
    new_batch,
    no_synchronization,
    release_memory,
    run,
    save_and_load,
    set_scale,
    state_of,
    weights_of,
)

pytestmark = pytest.mark.gpu

GRAPH = pytest.param("cuda_graph", marks=needs_cuda)
WARM = 5  # steps after which the graph has been captured and replayed
BUFFERS = (  # updated by the forward pass, even if the optimizer step is skipped
    "running_mean",
    "running_var",
    "num_batches_tracked",
)


@pytest.fixture(scope="module")
def network():
    """Yield a cached factory of networks by backbone, so that all tests share the compiled code."""
    torch._dynamo.reset()
    widths = {"resnet18": {"width": 0.25}}
    yield lru_cache(lambda backbone: Network(backbone, **widths.get(backbone, {})))
    torch._dynamo.reset()
    release_memory()


def snapshot(step):
    """Return copies of everything that a step changes."""
    state = step.state_dict()["optimizer"]
    return state_of(step.model), {name: {key: v.clone() for key, v in values.items()} for name, values in state.items()}


@torch.no_grad()
def restore(step, saved):
    """Restore a snapshot in place, since a captured graph keeps its addresses."""
    for name, tensor in step.model.state_dict().items():
        tensor.copy_(saved[0][name])
    for name, values in step.state_dict()["optimizer"].items():
        for key, tensor in values.items():
            tensor.copy_(saved[1][name][key])


def relative(difference, whole):
    return (difference.norm() / whole.norm()).item()


# --- the modes ---


@pytest.mark.parametrize(
    ("backbone", "precision", "tolerance"), [("resnet18", "bf16", 0.05), ("test_resnet", "fp16", 0.02)]
)
def test_eager_compiled_and_captured_steps_agree(network, backbone, precision, tolerance):
    """Losses agree, and all modes are about as close to float32 weights as the eager mode.

    The learning rate and tau change at every step. Eager code rounds to 16 bits after every
    operator, compiled code after every fused group. On a CPU this changes the losses by up to 0.019
    in bf16 and 0.007 in fp16. They fall by at least 0.4, so the tolerances lie in between. Losses
    may agree by chance, so the test also compares the weight updates: the relative error of eager
    code is 0.18 in bf16 and 0.09 in fp16. A captured step replays compiled code.
    """
    begin, found = weights_of(network(backbone).model), {}
    modes = ["eager", "compile", "cuda_graph"][: 3 if DEVICE.type == "cuda" else 2]
    for mode, dtype in [("eager", "fp32"), *((mode, precision) for mode in modes)]:
        step = network(backbone).step(mode, dtype)
        losses = run(step, 8)
        found[mode, dtype] = losses, weights_of(step.model) - begin
    losses, exact = found["eager", "fp32"]
    assert losses[0] - losses[-1] > 0.25  # the comparison is meaningful only if the network learns
    eager = relative(found["eager", precision][1] - exact, exact)
    assert eager < 0.3
    for mode in modes:
        mine, path = found[mode, precision]
        for other in (losses, found["eager", precision][0]):
            assert max(abs(a - b) for a, b in zip(mine, other, strict=True)) < tolerance, mode
        assert relative(path - exact, exact) < 2 * eager, mode
    if "cuda_graph" in modes:
        compiled, captured = (found[mode, precision] for mode in ("compile", "cuda_graph"))
        assert max(abs(a - b) for a, b in zip(compiled[0], captured[0], strict=True)) < tolerance / 5
        assert relative(compiled[1] - captured[1], exact) < 0.05


@pytest.mark.parametrize(
    ("mode", "precision", "optim"),
    [
        ("eager", "bf16", {"name": "lars"}),
        ("eager", "fp16", {"name": "lars", "clip_grad_norm": 1.0}),
        ("eager", "fp16", {"name": "adamw", "clip_grad_norm": 1.0}),
        ("compile", "fp16", {"name": "lars"}),
        ("compile", "fp16", {"name": "sgd", "clip_grad_norm": 1.0}),
        pytest.param("cuda_graph", "fp16", {"name": "lars", "clip_grad_norm": 1.0}, marks=needs_cuda),
        pytest.param("cuda_graph", "fp16", {"name": "adamw"}, marks=needs_cuda),
    ],
)
def test_step_has_no_host_sync(network, mode, precision, optim):
    step = network("test_resnet").step(mode, precision, optim=optim)
    run(step, WARM)
    batches = [new_batch(k, step.dtype) for k in range(3)]
    with no_synchronization():
        outputs = [step(WARM + k, batch) for k, batch in enumerate(batches)]
        if DEVICE.type == "cuda":
            with pytest.raises(RuntimeError, match="synchroniz"):
                outputs[-1].loss.item()
    assert outputs[-1].loss.isfinite()


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("mode", ["eager", GRAPH])
def test_overflow_skips_the_update_and_halves_the_scale(network, mode, name):
    """The skip happens on the device, in eager and captured steps; the next step updates again."""
    step = network("test_resnet").step(mode, "fp16", optim={"name": name})
    run(step, WARM)
    assert int(step.loss_scale.skipped) == 0
    before = snapshot(step)
    set_scale(step, 2.0**120)
    run(step, 1, start=WARM)
    assert int(step.loss_scale.skipped) == 1
    assert (step.loss_scale.scale.item(), step.loss_scale.inverse.item()) == (2.0**119, 2.0**-119)
    after = snapshot(step)
    for key, value in before[0].items():
        assert key.endswith(BUFFERS) or torch.equal(value, after[0][key]), key
    for key, values in before[1].items():
        assert all(torch.equal(value, after[1][key][k]) for k, value in values.items()), key
    set_scale(step, 1024.0)
    run(step, 1, start=WARM + 1)
    assert int(step.loss_scale.skipped) == 1
    moved = state_of(step.model)
    for part in ("online", "target"):
        name = next(n for n in moved if n.startswith(f"{part}.backbone") and n.endswith("weight"))
        assert not torch.equal(moved[name], after[0][name]), name


@pytest.mark.parametrize("name", ["lars", "sgd"])
@pytest.mark.parametrize("mode", ["compile", GRAPH])
def test_step_follows_lr_and_tau(network, mode, name):
    """Repeat one batch from one state at multiple step numbers.

    The weights move by lr times the same vector, and the target follows its formula.
    """
    step = network("test_resnet").step(mode, "fp16", optim={"name": name})
    run(step, WARM)
    saved, batch = snapshot(step), new_batch(0, step.dtype)
    directions = []
    for k in (WARM, 12, 17):
        restore(step, saved)
        step(k, batch)
        lr, tau = step.schedule.lr(k), step.schedule.tau(k)
        new = dict(step.model.named_parameters())
        online = [key for key in new if not key.startswith("target.")]
        directions.append(torch.cat([(saved[0][key] - new[key]).flatten() / lr for key in online]))
        for key, t in new.items():
            if key.startswith("target."):
                old, w = saved[0][key], new[key.replace("target.", "online.")]
                assert (t - (old + (1 - tau) * (w - old))).abs().max() < 1e-6, key
    assert step.schedule.lr(WARM) > 4 * step.schedule.lr(17)
    assert step.schedule.tau(17) > step.schedule.tau(WARM) + 0.05
    # Rounding of small updates in the weights' last digits changes the vectors by up to 1%.
    assert all(relative(other - directions[0], directions[0]) < 0.05 for other in directions[1:])


# --- resume ---


def cut_and_resume(network, mode, name, at, stop):
    """Return losses and weight changes of an uninterrupted step and of one resumed at step `at`."""
    step = network.step(mode, "fp16", optim={"name": name})
    set_scale(step, 512.0)
    run(step, at)
    saved = save_and_load({"model": step.model.state_dict(), **step.state_dict()})
    begin = weights_of(step.model)
    whole = run(step, stop - at, at), weights_of(step.model) - begin
    again = network.step(mode, "fp16", optim={"name": name})
    again.model.load_state_dict(saved["model"])
    again.load_state_dict(saved)
    assert again.loss_scale.scale.item() == 512.0
    tensors = [t for values in again.state_dict()["optimizer"].values() for t in values.values()]
    assert tensors and {t.device.type for t in tensors} == {DEVICE.type}
    return whole, (run(again, stop - at, at), weights_of(again.model) - begin)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_eager_resume_is_bit_exact(monkeypatch, name):
    """Uses cuDNN's deterministic algorithms and no max-pool (its backward is nondeterministic)."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    network = Network("resnet18", width=0.125, stem="small")
    twice = [run(network.step("eager", "fp16", optim={"name": name}), 3) for _ in range(2)]
    assert twice[0] == twice[1], "an operator is not deterministic here, so the rest of the test is meaningless"
    whole, resumed = cut_and_resume(network, "eager", name, 3, 6)
    assert resumed[0] == whole[0]
    assert torch.equal(resumed[1], whole[1])


@needs_cuda
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_captured_resume_continues_the_run(network, name):
    """Six more steps: three before the new capture and three replays.

    The code is the same, but the summation order of atomics may differ.
    """
    whole, resumed = cut_and_resume(network("test_resnet"), "cuda_graph", name, WARM + 1, WARM + 7)
    assert max(abs(a - b) for a, b in zip(whole[0], resumed[0], strict=True)) < 0.01
    assert relative(resumed[1] - whole[1], whole[1]) < 0.1
