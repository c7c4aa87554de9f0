"""The online linear classifier: it learns from the labels while the backbone pre-trains, and changes nothing of the backbone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.config import ProbeConfig
from fastbyol.runtime.distributed import World


class OnlineProbe:
    """A linear layer on the features of view 1, trained by Adam on the cross-entropy, and what it has got right this epoch.

    Args:
        features: F; classes: C.
        world: gradients are averaged over its ranks.
    """

    def __init__(self, features: int, classes: int, config: ProbeConfig, device: torch.device, world: World) -> None:
        self.classes, self._world = classes, world
        self._layer = nn.Linear(features, classes, device=device)
        nn.init.zeros_(self._layer.weight)
        nn.init.zeros_(self._layer.bias)
        self._optimizer = torch.optim.Adam(self._layer.parameters(), config.lr, fused=True)
        # Images, loss * images, right at the first and within the first five: of the epoch so far, on the device.
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def step(self, features: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Counts what is right before it learns from it; reads no device value.

        Args:
            features: (B, F) without gradient; labels: (B,); loss: () of the pre-training.
        """
        scores = self._layer(features)
        F.cross_entropy(scores, labels).backward()
        if self._world.size > 1:
            for p in self._layer.parameters():
                p.grad = self._world.mean(p.grad)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            right = scores.topk(min(5, self.classes), dim=1).indices == labels[:, None]
            count = torch.full((), len(labels), dtype=torch.float64, device=labels.device)
            self._sums += torch.stack((count, loss.double() * count, right[:, 0].sum().double(), right.sum().double()))

    def end_of_epoch(self) -> dict[str, float]:
        """loss (of the pre-training), top5 and top1 in [0, 1] of the epoch's images, over all ranks; starts the next epoch."""
        images, loss, top1, top5 = self._world.mean(self._sums).tolist()
        self._sums.zero_()
        return {"loss": loss / images, "top5": top5 / images, "top1": top1 / images}

    def state_dict(self) -> dict[str, Any]:
        """Weights, Adam's state and the epoch's sums."""
        return {"layer": self._layer.state_dict(), "adam": self._optimizer.state_dict(), "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._layer.load_state_dict(state["layer"])
        self._optimizer.load_state_dict(state["adam"])
        self._sums.copy_(state["sums"])
