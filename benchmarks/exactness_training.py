"""Comparisons of exactness.py: loss, layers, optimizer, schedules, backbones and a training."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import torch
from exactness_shared import (
    NORM,
    Row,
    compare,
    compare_tensors,
    in_float64,
    nchw,
    nhwc,
    normal,
    photographs,
    to_torch,
    transform,
)

from fastbyol.build import build_backbone, build_model
from fastbyol.cli import train_config
from fastbyol.config import Config, DataConfig, ModelConfig, OptimConfig
from fastbyol.data import Batch
from fastbyol.data.decode import decode
from fastbyol.layers import BatchNorm, fuse_layers, set_num_views
from fastbyol.loss import byol_loss
from fastbyol.model import mlp
from fastbyol.optim import LARS
from fastbyol.schedules import Schedule, learning_rate, target_decay
from fastbyol.step import TrainStep

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
IMAGENET_IMAGES, BATCH = 1_281_167, 4096
BACKBONES = [  # theirs, ours, width, image size
    ("ResNet18", "byol_resnet18", 1, 128),
    ("ResNet50", "resnet50", 1, 97),
    ("ResNet50", "resnet50", 1, 224),
    ("ResNet50", "resnet50", 2, 64),
]


def loss(authors: SimpleNamespace) -> Iterator[Row]:
    q1, q2, z1, z2 = (normal(k, 512, 256, mean=0.1) for k in range(4))

    def theirs(q1: Any, q2: Any) -> Any:
        terms = authors.helpers.regression_loss(q1, z2) + authors.helpers.regression_loss(q2, z1)
        return jnp.mean(terms)

    value, gradients = jax.value_and_grad(theirs, (0, 1))(q1, q2)
    exact, exact_gradients = in_float64(jax.value_and_grad(theirs, (0, 1)), q1, q2)
    predictions = torch.from_numpy(np.concatenate([q1, q2])).requires_grad_()
    ours = byol_loss(predictions, torch.from_numpy(np.concatenate([z1, z2])))
    ours.backward()
    yield compare("loss", "value", ours, value, rounding=exact)
    ours = predictions.grad.chunk(2)
    yield compare("loss", "gradient of the predictions", ours, gradients, rounding=exact_gradients)


def batch_norm(authors: SimpleNamespace, steps: int = 10) -> Iterator[Row]:
    def two_views(view1: Any, view2: Any, is_training: bool) -> Any:
        norm = hk.BatchNorm(**NORM)
        return norm(view1, is_training), norm(view2, is_training)

    net = transform(two_views)
    x = [normal(k, 8, 7, 7, 64, mean=0.5) * (1 + normal(99, 64) ** 2) for k in range(2)]
    params, state = net.init(None, *x, True)
    params = {"batch_norm": {"scale": 1 + 0.5 * normal(1, 1, 1, 1, 64), "offset": normal(2, 1, 1, 1, 64)}}
    own = set_num_views(BatchNorm(64), 2)
    flat = {key: torch.from_numpy(value).flatten() for key, value in params["batch_norm"].items()}
    own.load_state_dict({"weight": flat["scale"], "bias": flat["offset"]}, strict=False)
    for k in range(steps):
        x = [normal(10 * k + v, 8, 7, 7, 64, mean=0.5) * (1 + normal(99, 64) ** 2) for v in range(2)]
        theirs, state = net.apply(params, state, *x, True)
        ours = own(nchw(np.concatenate(x)))
    exact, _ = in_float64(lambda p, s, *x: net.apply(p, s, *x, True), params, state, *x)
    yield compare("BatchNorm", "training: output", nhwc(ours).chunk(2), theirs, rounding=exact)
    mean, var = (state[f"batch_norm/~/{name}_ema"] for name in ("mean", "var"))
    per_view, decay = x[0][..., 0].size, 0.9 ** (2 * steps)
    after = f"after {steps} batches of two views"
    yield compare("BatchNorm", f"moving mean {after}", own.running_mean, mean["average"].ravel())
    yield compare("BatchNorm", f"moving variance {after}", own.running_var, var["average"].ravel())
    ours = own.running_mean / (1 - decay)
    yield compare("BatchNorm", "moving mean, ours divided by 1 - 0.9^k", ours, mean["average"].ravel())
    ours = (own.running_var - decay) / (1 - decay) * (per_view - 1) / per_view
    text = "moving variance, ours biased, without its initial 1, divided by 1 - 0.9^k"
    yield compare("BatchNorm", text, ours, var["average"].ravel())
    own.running_mean, own.running_var = (torch.tensor(np.asarray(e["average"]).ravel()) for e in (mean, var))
    theirs, _ = net.apply(params, state, *x, False)
    ours = own.eval()(nchw(np.concatenate(x)))
    yield compare("BatchNorm", "evaluation: output, with equal moving averages", nhwc(ours).chunk(2), theirs)


def heads(authors: SimpleNamespace) -> Iterator[Row]:
    def two_views(view1: Any, view2: Any) -> Any:
        head = authors.networks.MLP("projector", 4096, 256, NORM)
        return head(view1, True), head(view2, True)

    net = transform(two_views)
    x, cotangent = [normal(k, 128, 2048) for k in (0, 1)], [normal(k, 128, 256) for k in (2, 3)]
    params, state = net.init(jax.random.PRNGKey(0), *x)
    params = jax.tree.map(lambda p: np.asarray(p + 0.1 * normal(p.size, *p.shape)), params)
    own = set_num_views(fuse_layers(mlp(2048, 4096, 256)), 2)
    own.load_state_dict(to_torch(params, prefix="projector."), strict=False)

    def theirs(params: Any, *x: Any) -> Any:
        out, pull = jax.vjp(lambda p, *x: net.apply(p, state, *x)[0], params, *x)
        gradients, *inputs = pull(tuple(jnp.asarray(c, out[0].dtype) for c in cotangent))
        return out, inputs, to_torch(gradients, prefix="projector.")

    inputs = torch.from_numpy(np.concatenate(x)).requires_grad_()
    ours = own(inputs)
    ours.backward(torch.from_numpy(np.concatenate(cotangent)))
    (out, of_inputs, gradients), exact = theirs(params, *x), in_float64(theirs, params, *x)
    yield compare("projector", "training: output", ours.chunk(2), out, rounding=exact[0])
    yield compare("projector", "gradient of the inputs", inputs.grad.chunk(2), of_inputs, rounding=exact[1])
    ours = {name: p.grad for name, p in own.named_parameters()}
    yield compare_tensors("projector", "gradients of the parameters", ours, gradients, exact[2])


def lars(authors: SimpleNamespace, steps: int = 30) -> Iterator[Row]:
    shapes = {
        "res_net/~/conv": {"w": (3, 3, 16, 32)},
        "res_net/~/batchnorm": {"scale": (32,), "offset": (32,)},
        "projector/linear": {"w": (64, 48), "b": (48,)},
        "projector/zero": {"w": (8, 8)},
    }
    schedule = {"peak": 0.8, "warmup_steps": 5, "total_steps": steps}
    optim, base = {"weight_decay": 0.01, "momentum": 0.9, "eta": 1e-3}, 0.9
    params = {m: {k: 0.1 * normal(len(m) + len(k), *s) for k, s in own.items()} for m, own in shapes.items()}
    params["projector/zero"]["w"][:] = 0  # trust ratio 1
    target = jax.tree.map(lambda p: p + 0.01, params)
    exclude = authors.optimizers.exclude_bias_and_norm

    def optimizer(lr: Any) -> Any:
        return authors.optimizers.lars(lr, weight_decay_filter=exclude, lars_adaptation_filter=exclude, **optim)

    def theirs(params: Any, target: Any, gradients: Any) -> Any:
        state = optimizer(0).init(params)
        for k, g in enumerate(gradients):
            step = jnp.asarray(k)
            lr = authors.schedules.learning_schedule(step, 256, schedule["peak"], steps, schedule["warmup_steps"])
            updates, state = optimizer(lr).update(g, state, params)
            params = jax.tree.map(lambda p, u: p + u, params, updates)
            rest = 1 - authors.schedules.target_ema(step, base, steps)
            target = jax.tree.map(lambda x, y, rest=rest: x + rest * (y - x), target, params)
        return params, target

    draw = np.random.default_rng(0).normal
    gradients = [jax.tree.map(lambda p: draw(size=p.shape).astype(np.float32), params) for _ in range(steps)]
    weights = [torch.tensor(p, requires_grad=True) for p in jax.tree.leaves(params)]
    targets = [torch.tensor(p) for p in jax.tree.leaves(target)]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": optim["weight_decay"]},
        {"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0, "adapt": False},
    ]
    lr, tau = torch.zeros(()), torch.ones(())
    own = LARS(groups, lr, trust_coefficient=optim["eta"], target_pairs=zip(weights, targets, strict=True), tau=tau)
    for k, g in enumerate(gradients):
        lr.fill_(learning_rate(k, **schedule))
        tau.fill_(target_decay(k, base=base, total_steps=steps))
        for p, value in zip(weights, jax.tree.leaves(g), strict=True):
            p.grad = torch.from_numpy(value)
        own.step()
    results, exact = theirs(params, target, gradients), in_float64(theirs, params, target, gradients)
    for name, ours, result, wide in zip(("weights", "target"), (weights, targets), results, exact, strict=True):
        leaves, wide = jax.tree.leaves(result), jax.tree.leaves(wide)
        yield compare("LARS and target update", f"{name} after {steps} steps", ours, leaves, rounding=wide)


def schedules(authors: SimpleNamespace) -> Iterator[Row]:
    for epochs in (40, 100, 300, 1000):
        config = authors.get_config(epochs, BATCH)
        rates, decay = config["lr_schedule_config"], config["optimizer_config"]["weight_decay"]
        total, warmup = config["max_steps"], rates["warmup_steps"]
        steps = jnp.arange(total)
        lr = authors.schedules.learning_schedule(steps, batch_size=BATCH, total_steps=total, **rates)
        tau = authors.schedules.target_ema(steps, config["base_target_ema"], total)
        if epochs == 40:
            optim = OptimConfig(epochs=40, tau_base=0.97)
        else:
            optim = train_config(["--config", str(CONFIGS / f"imagenet_r50_{epochs}ep.yaml")]).optim
        own = Schedule(optim, BATCH, Fraction(IMAGENET_IMAGES, BATCH))
        part = f"schedules, {epochs} epochs"
        ours = [own.total_steps, own.warmup_steps, optim.weight_decay]
        yield compare(part, "steps in all, steps of warm-up, weight decay", ours, [total, warmup, decay])
        yield compare(part, "learning rate of every step", [own.lr(k) for k in range(total)], lr)
        yield compare(part, "tau of every step", [own.tau(k) for k in range(total)], tau)


def backbones(authors: SimpleNamespace, batch: int = 4) -> Iterator[Row]:
    for theirs, ours, width, size in BACKBONES:
        yield from backbone(authors, theirs, ours, width, size, batch)


def randomize(params: Any) -> Any:
    """Return parameters of the same shapes with random convolutions, scales and offsets."""
    found, rng = {}, np.random.default_rng(0)
    for module, values in params.items():
        found[module] = own = {}
        for key, p in values.items():
            std = {"w": np.sqrt(2 / np.prod(p.shape[:-1])), "scale": 0.3, "offset": 0.3, "b": 0.3}[key]
            own[key] = rng.normal(key == "scale", std, p.shape).astype(np.float32)
    return found


def backbone(authors: SimpleNamespace, theirs: str, ours: str, width: int, size: int, batch: int) -> Iterator[Row]:
    part = f"{theirs} width {width}, {size} px"

    def two_views(view1: Any, view2: Any, is_training: bool) -> Any:
        net = getattr(authors.networks, theirs)(num_classes=None, bn_config=NORM, width_multiplier=width)
        return net(view1, is_training), net(view2, is_training)

    net = transform(two_views)
    x = [normal(k, batch, size, size, 3) for k in (0, 1)]
    params, state = net.init(jax.random.PRNGKey(0), *x, True)
    params = randomize(params)
    cotangent = [normal(k, batch, 2048 * width if theirs == "ResNet50" else 512) for k in (2, 3)]

    @jax.jit
    def train(params: Any, state: Any, *x: Any) -> Any:
        out, pull, state = jax.vjp(lambda p, *x: net.apply(p, state, *x, True), params, *x, has_aux=True)
        gradients, *inputs = pull(tuple(jnp.asarray(c, out[0].dtype) for c in cotangent))
        return out, inputs, gradients, state

    @jax.jit
    def evaluate(params: Any, state: Any, *x: Any) -> Any:
        return net.apply(params, state, *x, False)[0]

    out, _, _, state = train(params, state, *x)
    exact = in_float64(train, params, state, *x)
    own, _ = build_backbone(ModelConfig(backbone=ours, width=width, padding="same"), size)
    own = set_num_views(fuse_layers(own), 2).to(memory_format=torch.channels_last)
    own.load_state_dict(to_torch(params, prefix="backbone."), strict=False)
    start = {name: v.clone() for name, v in own.state_dict().items()}
    features = own(nchw(np.concatenate(x)))
    yield compare(part, "training: features", features.chunk(2), out, rounding=exact[0])
    # In float32, a rounding can switch a ReLU, and gradients then differ by a few percent.
    own.load_state_dict(start)
    own.double()
    inputs = nchw(np.concatenate(x)).double().requires_grad_()
    features = own(inputs)
    features.backward(torch.from_numpy(np.concatenate(cotangent)).double())
    yield compare(part, "training, float64: features", features.chunk(2), exact[0])
    yield compare(part, "training, float64: gradient of the images", nhwc(inputs.grad).chunk(2), exact[1])
    ours = {name: p.grad for name, p in own.named_parameters()}
    yield compare_tensors(
        part, "training, float64: gradients of the parameters", ours, to_torch(exact[2], prefix="backbone.")
    )
    own.float()
    state = jax.tree.map(lambda v: np.asarray(v) * 1.3, state)
    own.load_state_dict(to_torch(params, state, prefix="backbone."), strict=False)
    x = [normal(k, batch, size, size, 3) for k in (4, 5)]
    with torch.no_grad():
        features = own.eval()(nchw(np.concatenate(x)))
    theirs, exact = evaluate(params, state, *x), in_float64(evaluate, params, state, *x)
    yield compare(part, "evaluation: features", features.chunk(2), theirs, rounding=exact)


def training(authors: SimpleNamespace, steps: int = 10, batch: int = 16, size: int = 64) -> Iterator[Row]:
    """A training of ResNet-18: their update function against TrainStep, on the same views.

    Rounding grows from step to step, so the weights are compared early and at the end. The learning
    rate of the first step is 0.
    """
    after = (2, steps)
    optim = {"base_lr": 0.45, "weight_decay": 1e-6, "tau_base": 0.9}
    config = authors.get_config(1000, batch) | {"num_classes": 10, "max_steps": steps, "base_target_ema": 0.9}
    network = {"encoder_class": "ResNet18", "projector_hidden_size": 512, "predictor_hidden_size": 512}
    config["network_config"] |= network
    config["optimizer_config"] |= {"weight_decay": optim["weight_decay"]}
    config["lr_schedule_config"] = {"base_learning_rate": optim["base_lr"], "warmup_steps": 2}
    config["checkpointing_config"]["use_checkpointing"] = False
    experiment = authors.experiment.ByolExperiment(**config)
    keys = jax.random.split(jax.random.PRNGKey(0), steps + 1)
    inputs = [photo_windows(k, batch, size) for k in range(steps)]
    start = jax.pmap(experiment._make_initial_state, axis_name="i")(keys[-1:], inputs[0])

    def theirs(state: Any, *batches: Any) -> Any:
        losses, states = [], []
        for k, batch in enumerate(batches):
            state, logs = experiment.update_pmap(state, jnp.array([k]), keys[k : k + 1], batch)
            losses.append(logs["repr_loss"][0])
            states.append((state.online_params, state.target_params))
        return [states[k - 1] for k in after], losses

    states, losses = theirs(start, *inputs)
    views = [
        {k: np.asarray(v)[None] for k, v in postprocessed(authors, inputs[k], keys[k]).items()} for k in range(steps)
    ]
    with patch.object(authors.augmentations, "postprocess", lambda inputs, rng: inputs):
        exact_states, exact_losses = in_float64(theirs, start, *views)

    step = our_step(start, optim, steps, batch, size)
    first, ours, own_states = our_state(start.online_params, start.target_params), [], []
    for k in range(steps):
        ours.append(step(k, our_batch(authors, views[k])).loss.item())
        if k + 1 in after:
            own_states.append({name: v.clone() for name, v in step.model.state_dict().items()})
    part = "training of ResNet18"
    yield compare(part, f"losses of {steps} steps", ours, losses, rounding=exact_losses)
    for k, own, *both in zip(after, own_states, states, exact_states, strict=True):
        changes = [{n: v - first[n] for n, v in s.items() if n in first} for s in (own, *(our_state(*s) for s in both))]
        for name in ("online", "predictor", "target"):
            parts = [{n: v for n, v in s.items() if n.startswith(name)} for s in changes]
            yield compare_tensors(part, f"{name}: change of the weights in {k} steps", *parts)


def photo_windows(seed: int, batch: int, size: int) -> dict[str, np.ndarray]:
    """Return a batch of theirs for one device: pairs of windows of photographs."""
    rng, views = np.random.default_rng(seed), np.empty((2, 1, batch, size, size, 3), np.float32)
    photos = [decode(data).copy() for data in photographs().values()]
    for k in range(batch):
        photo = photos[rng.integers(len(photos))]
        y, x = (rng.integers(0, side - size - 16) for side in photo.shape[:2])
        for v in range(2):
            top, left = y + 16 * v, x + 16 * v
            views[v, 0, k] = photo[top : top + size, left : left + size] / np.float32(255)
    return {"view1": views[0], "view2": views[1], "labels": rng.integers(0, 10, (1, batch)).astype(np.int32)}


def postprocessed(authors: SimpleNamespace, batch: dict[str, np.ndarray], key: jax.Array) -> dict[str, Any]:
    return authors.augmentations.postprocess({name: value[0] for name, value in batch.items()}, key)


def our_batch(authors: SimpleNamespace, batch: dict[str, np.ndarray]) -> Batch:
    view1, view2 = (nchw(np.asarray(authors.dataset.normalize_images(batch[f"view{v}"][0]))) for v in (1, 2))
    return Batch((view1, view2), torch.from_numpy(batch["labels"][0]), torch.arange(len(view1)))


def our_state(online_params: Any, target_params: Any) -> dict[str, torch.Tensor]:
    """Return the weights of one device of their experiment by the names of our pair."""
    online, target = (
        to_torch(jax.tree.map(lambda p: np.asarray(p)[0], dict(params))) for params in (online_params, target_params)
    )
    pair = {f"online.{k}": v for k, v in online.items()} | {f"target.{k}": v for k, v in target.items()}
    pair = {k.replace("online.predictor", "predictor"): v for k, v in pair.items()}
    return {k: v for k, v in pair.items() if not k.startswith("target.predictor")}


def our_step(start: Any, optim: dict[str, float], steps: int, batch: int, size: int) -> TrainStep:
    """Return a training step that begins with their initial weights."""
    config = Config(
        precision="fp32",
        data=DataConfig(batch_size=batch, image_size_px=size),
        model=ModelConfig(backbone="byol_resnet18", padding="same", hidden_dim=512),
        optim=OptimConfig(epochs=steps, warmup_epochs=2, **optim),
    )
    model = build_model(config.model, size, 0)
    missing, unexpected = model.load_state_dict(our_state(start.online_params, start.target_params), strict=False)
    assert not unexpected and all("running" in name or "num_batches" in name for name in missing)
    return TrainStep(model.to(memory_format=torch.channels_last), config, Fraction(1), torch.device("cpu"))
