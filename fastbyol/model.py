"""Backbone, heads, loss, and the online/target pair as one module: two views in, the loss out.

Source: Grill et al. 2020, section 3, and `byol/byol_experiment.py` of google-deepmind/deepmind-research.

Shapes: B images, S pixels, F features of the backbone, D = projection_dim.
"""

import copy
import difflib
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models import ResNet
from torch import Tensor, nn

from fastbyol.config import ModelConfig
from fastbyol.errors import InputError, first_line
from fastbyol.layers import batch_norms, convert
from fastbyol.views import VIEWS


class BYOLOutput(NamedTuple):
    """What one forward pass of the pair gives; device tensors."""

    loss: Tensor  # () float32: mean over the batch of the two summed terms, in [0, 8]
    projection_std: Tensor  # () float32: see `projection_std`


class Branch(nn.Module):
    """Backbone and projector: the network that online and target share in shape."""

    def __init__(self, backbone: nn.Module, features: int, hidden_dim: int, projection_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(features, hidden_dim, projection_dim)

    def forward(self, view: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D)."""
        return self.projector(self.backbone(view))


class BYOL(nn.Module):
    """The online network (branch and predictor) and its target.

    The target has no gradient, runs in train mode with its own batch statistics, and is moved by the optimiser step
    through `target_pairs`.
    """

    def __init__(self, online: Branch, target: Branch, predictor: nn.Module) -> None:
        super().__init__()
        self.online, self.predictor = online, predictor
        self.target = target.requires_grad_(False)
        for norm in batch_norms(self):
            norm.views = VIEWS

    def forward(self, view1: Tensor, view2: Tensor) -> BYOLOutput:
        """Loss of two views (B, 3, S, S) of the same images.

        Both go through the networks as one batch, in which BatchNorm keeps the statistics of each view apart (see layers.py). The
        target comes first: its activations are gone before the online network's are kept for the backward pass.
        """
        images = torch.cat((view1, view2))
        with torch.no_grad():
            t1, t2 = self.target(images).chunk(2)
        z = self.online(images)
        q1, q2 = self.predictor(z).chunk(2)
        return BYOLOutput(regression_loss(q1, t2) + regression_loss(q2, t1), projection_std(z.chunk(2)[0]))

    def target_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(online, target) of every parameter that the target has; buffers are not averaged."""
        return list(zip(self.online.parameters(), self.target.parameters(), strict=True))


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Projector and predictor: Linear with bias, BatchNorm, ReLU, Linear without bias."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs, bias=False)
    )


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of |n(q) - n(z')|^2 = 2 - 2 cos(q, z'), n = l2 normalisation, in float32.

    Args:
        prediction, target: (B, D); the target carries no gradient.
    """
    q = F.normalize(prediction.float(), dim=1)
    z = F.normalize(target.float(), dim=1)
    return (q - z).square().sum(1).mean()


def projection_std(projection: Tensor) -> Tensor:
    """Standard deviation over the batch of the l2-normalised projections (B, D), mean over D.

    About 1/sqrt(D) where directions are spread evenly, 0 where all images have collapsed onto one.
    """
    return F.normalize(projection.detach().float(), dim=1).std(0).mean()


def build_backbone(config: ModelConfig, image_size: int) -> tuple[nn.Module, int]:
    """A timm backbone without classifier, and its number of features F.

    Raises:
        InputError: timm has no such model, or width, stem or image size do not suit it.
    """
    name = config.backbone
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `timm.list_models()` lists what there is"
        raise InputError(f"model.backbone={name!r}: timm has no such model{hint}")
    options = {}
    if config.width != 1:
        widths = [64.0 * config.width * 2**k for k in range(4)]
        if not all(w.is_integer() and w >= 1 for w in widths):
            raise InputError(f"model.width={config.width}: 64 * width must be a whole number of channels")
        options["channels"] = tuple(int(w) for w in widths)
    try:
        backbone = timm.create_model(name, num_classes=0, **options)
    except TypeError:
        raise InputError(f"model.width={config.width}: {name} has no width multiplier; set model.width=1") from None
    if config.stem == "small":
        if not isinstance(backbone, ResNet) or not isinstance(backbone.conv1, nn.Conv2d):
            raise InputError(f"model.stem=small is for plain ResNets; set model.stem=imagenet for {name}")
        backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    try:
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(1, 3, image_size, image_size)).shape[1]
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"model.backbone={name} cannot take data.image_size_px={image_size}: {first_line(error)}"
        ) from None
    return backbone.train(), features


def build_model(config: ModelConfig, image_size: int, seed: int) -> BYOL:
    """The online/target pair with weights drawn from `seed`, in train mode; torch's global generator is untouched.

    Raises:
        InputError: see `build_backbone`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone, features = build_backbone(config, image_size)
        online = Branch(backbone, features, config.hidden_dim, config.projection_dim)
        predictor = mlp(config.projection_dim, config.hidden_dim, config.projection_dim)
        if config.target_init == "copy":
            target = copy.deepcopy(online)
        else:
            target = Branch(build_backbone(config, image_size)[0], features, config.hidden_dim, config.projection_dim)
    return BYOL(convert(online), convert(target), convert(predictor)).train()
