"""The loss between the online network's predictions and the target network's projections.

Source of the default and of the contrastive term: Grill et al. 2020, equation 2 and section 5, "Ablation to contrastive methods"
(InfoNCE with weight beta and temperature alpha).

Shapes: B images, D = projection_dim. Everything is computed in float32.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.config import ModelConfig

_EPS = 1e-12  # below the square root of a distance, whose gradient has no bound at 0


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of |n(q) - n(z')|^2 = 2 - 2 cos(q, z'), n = l2 normalization.

    Args:
        prediction, target: (B, D); the target carries no gradient.
    """
    q = F.normalize(prediction.float(), dim=1)
    z = F.normalize(target.float(), dim=1)
    return (q - z).square().sum(1).mean()


def euclidean_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of the plain distance |q - z'|; arguments as for `regression_loss`."""
    return _distance(prediction.float(), target.float()).mean()


def mse_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over batch and dimensions of (q - z')^2; arguments as for `regression_loss`."""
    return F.mse_loss(prediction.float(), target.float())


def hinge_loss(prediction: Tensor, target: Tensor, margin: float) -> Tensor:
    """Mean over the batch of max(0, |n(q) - n(z')| - margin): pairs nearer than the margin are near enough.

    The distance of normalized vectors lies in [0, 2]; arguments as for `regression_loss`.
    """
    q = F.normalize(prediction.float(), dim=1)
    z = F.normalize(target.float(), dim=1)
    return (_distance(q, z) - margin).clamp(min=0).mean()


def contrastive_term(prediction: Tensor, target: Tensor, same_view: Tensor, temperature: float) -> Tensor:
    """What turns the regression loss into InfoNCE when it is added: it drives predictions away from other images.

    2 a mean_i log(sum_{j != i} exp(cos(q_i, z_j) / a) + sum_j exp(cos(q_i, z'_j) / a)), a = temperature. Added to 2 - 2 cos(q_i,
    z'_i) with weight 1, it gives 2 + 2 a InfoNCE.

    Args:
        prediction: (B, D) of one view.
        target: (B, D) z', the other view's projections; same_view: (B, D) z, the same view's; neither carries a gradient.
    """
    q, other, same = (F.normalize(x.float(), dim=1) for x in (prediction, target, same_view))
    itself = torch.eye(len(q), dtype=torch.bool, device=q.device)
    logits = torch.cat(((q @ same.T).masked_fill(itself, -torch.inf), q @ other.T), dim=1) / temperature
    return 2 * temperature * logits.logsumexp(1).mean()


def pair_loss(q1: Tensor, q2: Tensor, t1: Tensor, t2: Tensor, config: ModelConfig) -> Tensor:
    """The configured loss of both directions, summed.

    Args:
        q1, q2: (B, D) predictions of views 1 and 2; t1, t2: (B, D) target projections, without gradient.
    """
    term = partial(hinge_loss, margin=config.hinge_margin) if config.loss == "hinge" else _LOSSES[config.loss]
    loss = term(q1, t2) + term(q2, t1)
    if config.contrastive_weight:
        a = config.contrastive_temperature
        loss = loss + config.contrastive_weight * (contrastive_term(q1, t2, t1, a) + contrastive_term(q2, t1, t2, a))
    return loss


_LOSSES = {"byol": regression_loss, "euclidean": euclidean_loss, "mse": mse_loss}


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """(B,) Euclidean distances of rows."""
    return (a - b).square().sum(1).add(_EPS).sqrt()
