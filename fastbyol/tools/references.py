"""Steps in plain PyTorch to compare with: BYOL as its paper says, and supervised training.

Neither uses fastbyol's layers or kernels.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.model import mlp
from fastbyol.precision import autocast

MOMENTUM = 0.996  # of the target
CLASSES = 1000  # of supervised training


class PlainBYOL(nn.Module):
    """Straightforward implementation of online network, predictor and target.

    Args:
        backbone: (B, 3, S, S) -> (B, `features`).
        hidden: width of projector and predictor.
        projection: their output size.
    """

    def __init__(self, backbone: nn.Module, features: int, hidden: int, projection: int) -> None:
        super().__init__()
        self.online = nn.Sequential(backbone, mlp(features, hidden, projection))
        self.predictor = mlp(projection, hidden, projection)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        """The loss of two views (B, 3, S, S)."""
        q1, q2 = self.predictor(self.online(view1)), self.predictor(self.online(view2))
        with torch.no_grad():
            t1, t2 = self.target(view1), self.target(view2)
        cosines = F.cosine_similarity(q1.float(), t2.float()) + F.cosine_similarity(q2.float(), t1.float())
        return (4 - 2 * cosines).mean()


def plain_step(
    model: PlainBYOL,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
    mode: str | None = None,
    fused: bool | None = True,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a step, views (B, 3, S, S) -> loss, with SGD with momentum and a foreach EMA.

    Args:
        model: on `device`.
        dtype: of autocast.
        compiled: compile the model with torch.compile's `mode`.
        fused: of torch.optim.SGD.
    """
    loss_of = torch.compile(model, mode=mode) if compiled else model
    weights, targets = list(model.online.parameters()), list(model.target.parameters())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.03, momentum=0.9, fused=fused)

    def step(view1: Tensor, view2: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with autocast(device, dtype):
            loss = loss_of(view1, view2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(targets, weights, 1 - MOMENTUM)
        return loss.detach()

    return step


def supervised_step(
    model: nn.Module, batch: int, device: torch.device, dtype: torch.dtype, mode: str
) -> Callable[[Tensor], Tensor]:
    """Return a supervised step, images (B, 3, S, S) -> loss, with cross-entropy and SGD with
    momentum.

    Args:
        model: (B, 3, S, S) -> (B, CLASSES), on `device`.
        batch: B.
        dtype: of autocast.
        mode: "eager"; anything else compiles, on a GPU with torch's CUDA graphs.
    """
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9, fused=True)
    labels = (torch.arange(batch) % CLASSES).to(device)

    def forward(images: Tensor) -> Tensor:
        with autocast(device, dtype):
            return F.cross_entropy(model(images), labels)

    if mode != "eager":
        forward = torch.compile(forward, mode=graphs_mode(device))

    def step(images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        loss = forward(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def graphs_mode(device: torch.device) -> str | None:
    """Return the mode of torch.compile that uses CUDA graphs, where there are any."""
    return "reduce-overhead" if device.type == "cuda" else None
