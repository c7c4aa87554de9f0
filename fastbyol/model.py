"""The BYOL pair: two views in, the loss out.

Source: Grill et al. 2020 (arXiv 2006.07733), section 3, and byol/byol_experiment.py of
google-deepmind/deepmind-research. What departs from BYOL is in variants.py.

Shapes: B images, S pixels, F features of the backbone, D = projection_dim.
"""

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.data.views import VIEWS
from fastbyol.layers import fork_between_stages, fuse_layers, set_num_views
from fastbyol.loss import byol_loss
from fastbyol.spans import ONLINE, TARGET, span


class BYOLOutput(NamedTuple):
    """Result of one forward pass, as device tensors."""

    loss: Tensor  # () float32, mean over the batch; BYOL's lies in [0, 8]
    projection_std: Tensor  # () float32, see `projection_std`
    features: Tensor | None = None  # (B, F) float32 of view 1, for the online classifier


class Encoder(nn.Module):
    """Backbone and projector: the part that the online and the target network share in shape."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, D)."""
        return self.projector(self.backbone(images))


class BYOL(nn.Module):
    """Online network (encoder and predictor) and target network (encoder).

    The target has no gradient. It runs in train mode, with the statistics of its own batch. The
    optimizer step moves it through `target_pairs`.
    """

    is_random = False
    """True if the forward pass draws random numbers."""

    def __init__(self, online: Encoder, target: Encoder | None, predictor: nn.Module) -> None:
        super().__init__()
        self.online, self.predictor = online, predictor
        self.target = None if target is None else target.requires_grad_(False)
        self.return_features = False
        """Whether the output holds the features of view 1."""
        set_num_views(self, VIEWS)
        fork_between_stages(self)  # nobody else reads the outputs of its stages

    @classmethod
    def from_backbone(
        cls, backbone: nn.Module, num_features: int, *, hidden_dim: int = 4096, projection_dim: int = 256
    ) -> "BYOL":
        """Return the pair for a backbone, with the paper's heads; the target starts as a copy.

        Args:
            backbone: (B, 3, S, S) -> (B, F). Its BatchNorm layers are replaced by layers that keep
                the statistics of the two views apart.
            num_features: F.
            hidden_dim: hidden units of projector and predictor.
            projection_dim: D.

        Raises:
            InputError: a BatchNorm of an unsupported type.
        """
        online = fuse_layers(Encoder(backbone, mlp(num_features, hidden_dim, projection_dim)))
        return cls(online, copy.deepcopy(online), fuse_layers(mlp(projection_dim, hidden_dim, projection_dim)))

    def forward(self, view1: Tensor, view2: Tensor) -> BYOLOutput:
        """Return the loss of two views (B, 3, S, S) of the same images.

        The target network runs first, so that its activations are free before the online network
        saves its own for backward.
        """
        inputs = self.inputs(view1, view2)
        with span(TARGET):
            targets = self.target_projections(inputs)
        with span(ONLINE):
            return self.online_loss(inputs, targets)

    def inputs(self, view1: Tensor, view2: Tensor) -> Any:
        """Return what both networks see: the images of both views as one batch (2B, 3, S, S).

        One batch makes larger convolutions. BatchNorm keeps the statistics of the two views apart
        (layers.py).
        """
        return torch.cat((view1, view2))

    @torch.no_grad()
    def target_projections(self, inputs: Any) -> Tensor | None:
        """Return the target network's projections z' (2B, D)."""
        return self.encode(self.target, inputs)[1]

    def online_loss(self, inputs: Any, targets: Tensor | None) -> BYOLOutput:
        """Predict `targets` (2B, D), each view from the other; return the loss."""
        features, projections = self.encode(self.online, inputs)
        predictions = self.predictor(projections)
        return self.output(self.loss(predictions, targets), features, projections)

    def encode(self, encoder: Encoder, inputs: Any) -> tuple[Tensor, Tensor]:
        """Return features (2B, F) and projections (2B, D)."""
        features = encoder.backbone(inputs)
        return features, encoder.projector(features)

    def loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the symmetric loss of predictions and targets (2B, D)."""
        return byol_loss(predictions, targets)

    def output(self, loss: Tensor, features: Tensor, projections: Tensor) -> BYOLOutput:
        """Bundle the loss with what is logged and what the online classifier needs."""
        batch = len(projections) // VIEWS
        view1_features = features[:batch].detach().float() if self.return_features else None
        return BYOLOutput(loss, projection_std(projections[:batch]), view1_features)

    @property
    def num_features(self) -> int:
        """F."""
        return self.online.projector[0].in_features

    def target_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return (online, target) for every parameter of the target network.

        Buffers are not averaged.
        """
        if self.target is None:
            return []
        return list(zip(self.online.parameters(), self.target.parameters(), strict=True))


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The paper's projector and predictor: Linear (bias), BatchNorm, ReLU, Linear (no bias)."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs, bias=False)
    )


def projection_std(projections: Tensor) -> Tensor:
    """Return the standard deviation over the batch of the l2-normalized projections (B, D),
    averaged over D.

    About 1/sqrt(D) if directions are spread evenly, 0 if all images have collapsed onto one.
    """
    return F.normalize(projections.detach().float(), dim=1).std(0).mean()
