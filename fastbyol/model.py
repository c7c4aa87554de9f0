"""Backbone, heads, and the online/target pair as one module: two views in, the loss out.

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
from fastbyol.data.views import VIEWS
from fastbyol.errors import InputError, first_line
from fastbyol.layers import batch_norms, convert, one_view, replace_batch_norms, standardize_weights
from fastbyol.loss import pair_loss


class BYOLOutput(NamedTuple):
    """What one forward pass of the pair gives; device tensors."""

    loss: Tensor  # () float32: mean over the batch of the two summed terms; BYOL's lies in [0, 8]
    projection_std: Tensor  # () float32: see `projection_std`
    features: Tensor | None = None  # (B, F) float32 of view 1, for a classifier beside the run


class Encoder(nn.Module):
    """Backbone and projector: the network that online and target share in shape."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, view: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D)."""
        return self.projector(self.backbone(view))


class BYOL(nn.Module):
    """The online network (branch and predictor) and its target.

    The target has no gradient, runs in train mode with its own batch statistics, and is moved by the optimizer step
    through `target_pairs`. Without one (model.target=online) the online network predicts its own projections.

    Args:
        config: what of the forward pass differs from BYOL, if anything.
    """

    def __init__(
        self, online: Encoder, target: Encoder | None, predictor: nn.Module, config: ModelConfig | None = None
    ) -> None:
        super().__init__()
        self.online, self.predictor = online, predictor
        self.target = None if target is None else target.requires_grad_(False)
        self.config = config or ModelConfig()
        self.return_features = False
        """Whether the output holds view 1's features."""
        for norm in batch_norms(self):
            norm.views = VIEWS
        if self.config.feature_noise:
            for branch in (online, target):
                if branch is not None:
                    one_view(branch.backbone)

    def forward(self, view1: Tensor, view2: Tensor) -> BYOLOutput:
        """Loss of two views (B, 3, S, S) of the same images.

        Both go through the networks as one batch, in which BatchNorm keeps the statistics of each view apart (see layers.py). The
        target comes first: its activations are gone before the online network's are kept for the backward pass.
        """
        images, noise = self.inputs(view1, view2)
        return self.predict(images, noise, self.targets(images, noise))

    def inputs(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor | None]:
        """What both networks see: the images of both views (2B, 3, S, S); or of one (B, 3, S, S), and the noise (B, F) that makes view 2."""
        if not self.config.feature_noise:
            return torch.cat((view1, view2)), None
        return view1, torch.randn(len(view1), self.features, device=view1.device)

    @torch.no_grad()
    def targets(self, images: Tensor, noise: Tensor | None) -> Tensor | None:
        """The target network's projections (2B, D); None without one."""
        if self.target is None:
            return None
        return self.target.projector(noisy_views(self.target.backbone(images), noise, self.config.feature_noise))

    def predict(self, images: Tensor, noise: Tensor | None, t: Tensor | None) -> BYOLOutput:
        """The online network's part: predictions, and their loss against the targets `t`, or against its own projections."""
        features = self.online.backbone(self._masked(images))
        z = self.online.projector(noisy_views(features, noise, self.config.feature_noise))
        q1, q2 = self.predictor(z).chunk(2)
        t1, t2 = (z.detach() if t is None else t).chunk(2)
        return BYOLOutput(
            pair_loss(q1, q2, t1, t2, self.config),
            projection_std(z.chunk(2)[0]),
            features[: len(q1)].detach().float() if self.return_features else None,
        )

    @property
    def features(self) -> int:
        """F, of the backbone."""
        return self.online.projector[0].in_features

    def target_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(online, target) of every parameter that the target has; buffers are not averaged."""
        if self.target is None:
            return []
        return list(zip(self.online.parameters(), self.target.parameters(), strict=True))

    def _masked(self, images: Tensor) -> Tensor:
        """The images (2B, 3, S, S) with a share of their patches, drawn per image, set to the mean color (0)."""
        if not self.config.mask_ratio:
            return images
        size, patch = images.shape[-1], self.config.mask_patch_px
        grid = -(-size // patch)
        keep = torch.rand(len(images), 1, grid, grid, device=images.device) >= self.config.mask_ratio
        keep = keep.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[..., :size, :size]
        return images * keep.to(images.dtype)


def noisy_views(features: Tensor, noise: Tensor | None, alpha: float) -> Tensor:
    """Two views of features x (B, F), one below the other (2B, F): BN(x) and BN(x) + alpha * noise, BN without weights.

    Without noise the features are those of two views already, and stay as they are.
    """
    if noise is None:
        return features
    x = F.batch_norm(features.float(), None, None, training=True)
    return torch.cat((x, x + alpha * noise))


def head(inputs: int, outputs: int, config: ModelConfig) -> nn.Sequential:
    """Projector or predictor: the paper's two layers, or one Linear without bias, with the configured norms."""
    linear = config.heads == "linear"
    layers = (
        nn.Sequential(nn.Linear(inputs, outputs, bias=False)) if linear else mlp(inputs, config.hidden_dim, outputs)
    )
    return _with_layers(layers, config, "a head")


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The paper's projector and predictor: Linear with bias, BatchNorm, ReLU, Linear without bias."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs, bias=False)
    )


def projection_std(projection: Tensor) -> Tensor:
    """Standard deviation over the batch of the l2-normalized projections (B, D), mean over D.

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
    _with_layers(backbone, config, "backbone")
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
        online = _build_encoder(config, image_size)
        predictor = head(config.projection_dim, config.projection_dim, config)
        target = None
        if config.target == "ema":
            target = copy.deepcopy(online) if config.target_init == "copy" else _build_encoder(config, image_size)
    return BYOL(convert(online), None if target is None else convert(target), convert(predictor), config).train()


def _build_encoder(config: ModelConfig, image_size: int) -> Encoder:
    backbone, features = build_backbone(config, image_size)
    return Encoder(backbone, head(features, config.projection_dim, config))


def _with_layers(network: nn.Module, config: ModelConfig, name: str) -> nn.Module:
    """The network, changed in place: with the configured norms instead of BatchNorm, and standardized weights."""
    if config.norm != "batch":
        replace_batch_norms(network, 1 if config.norm == "layer" else config.norm_groups, name)
    if config.weight_standardization:
        standardize_weights(network)
    return network
