"""What is not BYOL: other losses, norms and heads, masked inputs, feature noise, no target network
(docs/variants.md).

Shapes: B images, S pixels, F features of the backbone, D = projection_dim. Losses are computed in
float32.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, GroupNormAct, StdConv2d
from torch import Tensor, nn

from fastbyol.config import ModelConfig
from fastbyol.errors import InputError
from fastbyol.layers import set_num_views
from fastbyol.loss import regression_loss
from fastbyol.model import BYOL, BYOLOutput, Encoder

_EPS = 1e-12  # inside the square root of a distance, whose gradient is unbounded at 0
_STANDARD_EPS = 1e-6  # added to the variance of a filter


class BYOLVariant(BYOL):
    """A pair whose forward pass departs from BYOL as `config` says.

    Args:
        target: None with model.target=online: the online network predicts its own projections
            (SimSiam).
    """

    def __init__(self, online: Encoder, target: Encoder | None, predictor: nn.Module, config: ModelConfig) -> None:
        super().__init__(online, target, predictor)
        self.config = config
        self.is_random = bool(config.feature_noise or config.mask_ratio)
        if config.feature_noise:  # the backbones see one view
            for encoder in (online, target):
                if encoder is not None:
                    set_num_views(encoder.backbone, 1)

    def inputs(self, view1: Tensor, view2: Tensor) -> Any:
        """With feature noise: view 1 (B, 3, S, S), and the noise (B, F) that makes view 2 from its
        features.
        """
        if not self.config.feature_noise:
            return super().inputs(view1, view2)
        return view1, torch.randn(len(view1), self.num_features, device=view1.device)

    @torch.no_grad()
    def target_projections(self, inputs: Any) -> Tensor | None:
        """Return None without a target network."""
        return None if self.target is None else super().target_projections(inputs)

    def online_loss(self, inputs: Any, targets: Tensor | None) -> BYOLOutput:
        """As `BYOL.online_loss`, on masked images; without targets against the online network's own
        projections.
        """
        features, projections = self.encode(self.online, self._mask(inputs))
        predictions = self.predictor(projections)
        loss = self.loss(predictions, projections.detach() if targets is None else targets)
        return self.output(loss, features, projections)

    def encode(self, encoder: Encoder, inputs: Any) -> tuple[Tensor, Tensor]:
        """With feature noise: features (B, F) of view 1, projections (2B, D) of both views."""
        if not self.config.feature_noise:
            return super().encode(encoder, inputs)
        images, noise = inputs
        features = encoder.backbone(images)
        return features, encoder.projector(noisy_views(features, noise, self.config.feature_noise))

    def loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the configured loss of predictions and targets (2B, D)."""
        return pair_loss(*predictions.chunk(2), *targets.chunk(2), self.config)

    def _mask(self, inputs: Any) -> Any:
        if not self.config.mask_ratio:
            return inputs
        mask = partial(mask_patches, ratio=self.config.mask_ratio, patch_px=self.config.mask_patch_px)
        return (mask(inputs[0]), *inputs[1:]) if isinstance(inputs, tuple) else mask(inputs)


def departs_from_byol(config: ModelConfig) -> bool:
    """Return True if the forward pass needs `BYOLVariant`. Other norms and heads do not."""
    default = ModelConfig()
    names = ("target", "loss", "contrastive_weight", "feature_noise", "mask_ratio")
    return any(getattr(config, name) != getattr(default, name) for name in names)


def noisy_views(features: Tensor, noise: Tensor, alpha: float) -> Tensor:
    """Return two views (2B, F) of features x (B, F): BN(x) and BN(x) + alpha * noise.

    BN has no weights.
    """
    x = F.batch_norm(features.float(), None, None, training=True)
    return torch.cat((x, x + alpha * noise))


def mask_patches(images: Tensor, ratio: float, patch_px: int) -> Tensor:
    """Return images (N, 3, S, S) with a share of their patches, drawn per image, set to the mean
    color (0).
    """
    size = images.shape[-1]
    grid = -(-size // patch_px)
    keep = torch.rand(len(images), 1, grid, grid, device=images.device) >= ratio
    keep = keep.repeat_interleave(patch_px, 2).repeat_interleave(patch_px, 3)[..., :size, :size]
    return images * keep.to(images.dtype)


# --- losses ---


def pair_loss(q1: Tensor, q2: Tensor, t1: Tensor, t2: Tensor, config: ModelConfig) -> Tensor:
    """Return the configured loss, summed over both directions.

    Args:
        q1, q2: predictions of views 1 and 2 (B, D).
        t1, t2: target projections (B, D), without gradient.
    """
    term = partial(hinge_loss, margin=config.hinge_margin) if config.loss == "hinge" else _LOSSES[config.loss]
    loss = term(q1, t2) + term(q2, t1)
    if config.contrastive_weight:
        a = config.contrastive_temperature
        loss = loss + config.contrastive_weight * (contrastive_term(q1, t2, t1, a) + contrastive_term(q2, t1, t2, a))
    return loss


def euclidean_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the batch mean of the distance |q - z'|; arguments as for `regression_loss`."""
    return _distance(prediction.float(), target.float()).mean()


def mse_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean over batch and dimensions of (q - z')^2; arguments as for
    `regression_loss`.
    """
    return F.mse_loss(prediction.float(), target.float())


def hinge_loss(prediction: Tensor, target: Tensor, margin: float) -> Tensor:
    """Return the batch mean of max(0, |n(q) - n(z')| - margin), where n is l2 normalization.

    Distances of normalized vectors lie in [0, 2]; arguments as for `regression_loss`.
    """
    q = F.normalize(prediction.float(), dim=1)
    z = F.normalize(target.float(), dim=1)
    return (_distance(q, z) - margin).clamp(min=0).mean()


def contrastive_term(prediction: Tensor, target: Tensor, same_view: Tensor, temperature: float) -> Tensor:
    """Return the term that pushes predictions away from other images and turns the regression loss
    into InfoNCE.

    2 a mean_i log(sum_{j != i} exp(cos(q_i, z_j) / a) + sum_j exp(cos(q_i, z'_j) / a)), with a =
    temperature. Added with weight 1 to 2 - 2 cos(q_i, z'_i) it gives 2 + 2 a InfoNCE. Source: Grill
    et al. 2020, section 5, "Ablation to contrastive methods".

    Args:
        prediction: (B, D) of one view.
        target: (B, D) z', projections of the other view, without gradient.
        same_view: (B, D) z, projections of the same view, without gradient.
    """
    q, other, same = (F.normalize(x.float(), dim=1) for x in (prediction, target, same_view))
    itself = torch.eye(len(q), dtype=torch.bool, device=q.device)
    logits = torch.cat(((q @ same.T).masked_fill(itself, -torch.inf), q @ other.T), dim=1) / temperature
    return 2 * temperature * logits.logsumexp(1).mean()


_LOSSES = {"byol": regression_loss, "euclidean": euclidean_loss, "mse": mse_loss}


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """(B,) Euclidean distances of rows."""
    return (a - b).square().sum(1).add(_EPS).sqrt()


# --- layers ---


def modify_layers(network: nn.Module, config: ModelConfig, name: str) -> nn.Module:
    """Give a network the configured norms and weight standardization, in place.

    Args:
        name: of the network, for error messages.

    Raises:
        InputError: see `replace_batch_norms`.
    """
    if config.norm != "batch":
        replace_batch_norms(network, 1 if config.norm == "layer" else config.norm_groups, name)
    if config.weight_standardization:
        standardize_weights(network)
    return network


def replace_batch_norms(network: nn.Module, groups: int, name: str) -> None:
    """Replace every BatchNorm by GroupNorm, in place.

    One group is LayerNorm over channels and positions.

    Source: Wu & He 2018 (arXiv 1803.08494).

    Args:
        name: of the network, for error messages.

    Raises:
        InputError: the groups do not divide a layer's channels, or the norm's type is not
            supported.
    """
    for path, module in list(network.named_modules()):
        for child, norm in module.named_children():
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            channels = norm.num_features
            if channels % groups:
                where = ".".join(part for part in (name, path, child) if part)
                raise InputError(f"model.norm_groups={groups} does not divide the {channels} channels of {where}")
            if type(norm) is BatchNormAct2d:
                own = GroupNormAct(channels, groups, eps=norm.eps)
                own.drop, own.act = norm.drop, norm.act
            elif type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d):
                own = nn.GroupNorm(groups, channels, eps=norm.eps)
            else:
                raise InputError(f"model.norm: the backbone's {type(norm).__name__} cannot be replaced")
            if norm.affine:  # a block's last norm may start at 0
                with torch.no_grad():
                    own.weight.copy_(norm.weight)
                    own.bias.copy_(norm.bias)
            setattr(module, child, own)


def standardize_weights(network: nn.Module) -> None:
    """Make every convolution and linear layer use its filters with mean 0 and variance 1, in place.

    Source: Qiao et al. 2019 (arXiv 1903.10520); in heads, Richemond et al. 2020 (arXiv 2010.10241).
    There is no factor 1 / sqrt(fan-in): the following norm sets the scale, and the loss normalizes
    the output of the last layer.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = StdConv2d
            module.eps = _STANDARD_EPS
        elif type(module) is nn.Linear:
            module.__class__ = StdLinear


class StdLinear(nn.Linear):
    """Linear layer that uses its rows with mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear.forward."""
        var, mean = torch.var_mean(self.weight, dim=1, correction=0, keepdim=True)
        return F.linear(x, (self.weight - mean) * (var + _STANDARD_EPS).rsqrt(), self.bias)


def linear_head(inputs: int, outputs: int) -> nn.Sequential:
    """Projector or predictor of model.heads=linear."""
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False))
