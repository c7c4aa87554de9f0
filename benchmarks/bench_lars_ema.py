"""LARS and target update of a BYOL pair: fastbyol, other libraries, less work, and a plain copy.

    make bench-kernels      # in the peers' environment, on the CPU and on a GPU if there is one

Every contender updates its own pair with the same random gradients; they run interleaved in one
process. Bytes are what the contender's work must move: for LARS and target 36 per parameter with a
target, 28 without.

    fastbyol             kernels/lars_ema.py
    fastbyol captured    the same, replayed as a CUDA graph: without host time
    reference            the plain formulas, per tensor
    reference compiled   the same under torch.compile
    foreach              the same formulas with torch._foreach_*
    lightly              its LARS (divides by |g| + wd |w| + eps) and update_momentum
    SGD + lerp           less work, no norms: torch's fused SGD and _foreach_lerp_
    apex                 less work, no norms: FusedSGD of NVIDIA's apex and _foreach_lerp_
    copy                 torch copies as many bytes
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timing import measure
from torch import Tensor

from fastbyol.build import build_model
from fastbyol.config import ModelConfig, OptimConfig
from fastbyol.kernels import lars_ema
from fastbyol.model import BYOL
from fastbyol.optim import build_optimizer
from fastbyol.runtime import environment

SETS = {"R18": "resnet18", "R50": "resnet50"}
WEIGHT_DECAY, MOMENTUM, ETA = 1e-6, 0.9, 1e-3


@cache
def pair(backbone: str, device: str, contender: str) -> BYOL:
    """Return the contender's own pair, with gradients."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=SETS[backbone]), 224, 0)
    model = model.to(device=device, memory_format=torch.channels_last)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = 1e-3 * torch.randn_like(p)
    return model


def bytes_moved(model: BYOL, *, norms: bool) -> int:
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    targets = sum(t.numel() for _, t in model.target_pairs())
    return (28 if norms else 20) * n + (8 if norms else 12) * targets


def fastbyol(model: BYOL, lr: Tensor, tau: Tensor) -> Callable[[], None]:
    return build_optimizer(OptimConfig(weight_decay=WEIGHT_DECAY), model, model.target_pairs(), lr, tau).step


def captured(model: BYOL, lr: Tensor, tau: Tensor) -> Callable[[], None]:
    if lr.device.type != "cuda":
        pytest.skip("a CUDA graph needs a GPU")
    step = fastbyol(model, lr, tau)
    step()  # compiles, and allocates the momentum buffers
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    # The default argument keeps the optimizer alive, whose momentum buffers the graph writes.
    def replay(_: Callable[[], None] = step) -> None:
        graph.replay()

    return replay


def rows(model: BYOL) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None, bool]]:
    targets = dict(model.target_pairs())
    return [(p, p.grad, torch.zeros_like(p), targets.get(p), p.ndim > 1) for p in model.parameters() if p.requires_grad]


def reference(
    model: BYOL, lr: Tensor, tau: Tensor, update: Callable = lars_ema.lars_ema_reference
) -> Callable[[], None]:
    tensors = rows(model)

    def step() -> None:
        for w, g, m, t, adapt in tensors:
            decay, eta = (WEIGHT_DECAY, ETA) if adapt else (0.0, None)
            update(w, g, m, t, lr=lr, tau=tau, weight_decay=decay, momentum=MOMENTUM, trust_coefficient=eta)

    return step


def reference_compiled(model: BYOL, lr: Tensor, tau: Tensor) -> Callable[[], None]:
    torch._dynamo.config.cache_size_limit = 64
    return reference(model, lr, tau, torch.compile(lars_ema.lars_ema_reference, dynamic=True))


def foreach(model: BYOL, lr: Tensor, tau: Tensor) -> Callable[[], None]:
    tensors = rows(model)
    adapted, plain = [r for r in tensors if r[4]], [r for r in tensors if not r[4]]
    with_target = [r for r in tensors if r[3] is not None]

    @torch.no_grad()
    def step() -> None:
        weights, grads = [r[0] for r in adapted], [r[1] for r in adapted]
        updates = list(torch._foreach_add(grads, weights, alpha=WEIGHT_DECAY))
        w_norms, u_norms = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(updates))
        ratios = torch.where((w_norms > 0) & (u_norms > 0), ETA * w_norms / u_norms, 1.0)
        torch._foreach_mul_(updates, list(ratios.unbind()))
        updates += [r[1] for r in plain]
        ordered = adapted + plain
        momenta = [r[2] for r in ordered]
        torch._foreach_mul_(momenta, MOMENTUM)
        torch._foreach_add_(momenta, updates)
        torch._foreach_sub_([r[0] for r in ordered], torch._foreach_mul(momenta, lr))
        lerp([r[3] for r in with_target], [r[0] for r in with_target], tau)

    return step


def lerp(targets: list[Tensor], weights: list[Tensor], tau: Tensor) -> None:
    torch._foreach_add_(targets, torch._foreach_mul(torch._foreach_sub(weights, targets), 1 - tau))


def lightly(model: BYOL, lr: Tensor, tau: Tensor) -> Callable[[], None]:
    pytest.importorskip("lightly", reason="lightly is not installed: run make bench-setup")
    from lightly.models.utils import update_momentum
    from lightly.utils.lars import LARS

    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = LARS(groups, lr=lr.item(), momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    online = torch.nn.ParameterList([w for w, _ in model.target_pairs()])
    target = torch.nn.ParameterList([torch.nn.Parameter(t, requires_grad=False) for _, t in model.target_pairs()])

    def step() -> None:
        optimizer.step()
        update_momentum(online, target, m=tau.item())

    return step


def sgd_and_lerp(model: BYOL, lr: Tensor, tau: Tensor) -> Callable[[], None]:
    return _without_norms(model, lr, tau, torch.optim.SGD, fused=True)


def apex(model: BYOL, lr: Tensor, tau: Tensor) -> Callable[[], None]:
    if lr.device.type != "cuda" or not all(map(environment.has_module, ("amp_C", "apex.multi_tensor_apply"))):
        pytest.skip(
            "NVIDIA's apex (amp_C) is not installed, or there is no GPU; apex on PyPI is another project: APEX_CPP_EXT=1 "
            "APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex"
        )
    from apex.optimizers import FusedSGD

    return _without_norms(model, lr.item(), tau, FusedSGD)


def _without_norms(model: BYOL, lr: Tensor | float, tau: Tensor, kind: type, **options: bool) -> Callable[[], None]:
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=MOMENTUM, **options)
    weights, targets = map(list, zip(*model.target_pairs(), strict=True))

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(targets, weights, 0.01)

    return step


def copy(model: BYOL, lr: Tensor, tau: Tensor) -> Callable[[], None]:
    values = torch.ones(bytes_moved(model, norms=True) // 8, device=lr.device)
    other = torch.empty_like(values)
    return lambda: other.copy_(values)


CONTENDERS = {
    "fastbyol": fastbyol,
    "fastbyol captured": captured,
    "reference": reference,
    "reference compiled": reference_compiled,
    "foreach": foreach,
    "lightly": lightly,
    "SGD + lerp": sgd_and_lerp,
    "apex": apex,
    "copy": copy,
}


@cache
def prepared(set_name: str, device: str, contender: str) -> Callable[[], None]:
    lr, tau = torch.tensor(0.1, device=device), torch.tensor(0.99, device=device)
    return CONTENDERS[contender](pair(set_name, device, contender), lr, tau)


@pytest.mark.parametrize("set_name", SETS)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_update(benchmark: BenchmarkFixture, device: str, set_name: str, contender: str, turn: int) -> None:
    step = prepared(set_name, device, contender)
    moved = bytes_moved(pair(set_name, device, contender), norms=contender not in ("SGD + lerp", "apex"))
    measure(benchmark, step, device=device, turn=turn, set_name=set_name, contender=contender, moved=moved)
