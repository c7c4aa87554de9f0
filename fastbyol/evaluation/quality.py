"""Quality of features without labels: effective rank, uniformity, alignment.

Shapes: n images of this rank, M of all ranks, F features, B images of a batch.
"""

import torch
from torch import Tensor, nn

from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.features import BATCH, Features, inference

_EPSILON = 1e-7  # of RankMe
_TEMPERATURE = 2.0  # t of the uniformity
_UNIFORMITY_IMAGES = 4096


def rank_me(features: Features) -> float:
    """Return the effective rank, between 1 and K = min(M, F). Every rank must call this.

    It is the exponential of the entropy of the K normalized singular values of the feature matrix
    (M, F). Source: Garrido et al. 2023, "RankMe" (arXiv 2210.02885), equation 1.
    """
    gram = torch.zeros(features.dim, features.dim, dtype=torch.float64, device=features.device)
    for rows in features.slices(16 * BATCH):
        x = features.rows(rows).double()
        gram += x.T @ x
    count = min(len(features.all_labels), features.dim)
    singular = torch.linalg.eigvalsh(features.world.sum(gram))[-count:].clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny) + _EPSILON
    return (-(share * share.log()).sum()).exp().item()


def uniformity(features: Features) -> float:
    """Return log E exp(-2 |u - v|^2) over pairs of unit vectors: 0 if all are equal, else lower.

    A vector of zeros stays one; all of them are equal.

    Takes at most 4096 images, evenly spaced. Every rank must call this. Source: Wang & Isola 2020
    (arXiv 2005.10242), equation 4.
    """
    count = len(features.all_labels)
    chosen = torch.linspace(0, count - 1, min(count, _UNIFORMITY_IMAGES), device=features.device).long()
    x = nn.functional.normalize(features.gather(chosen), dim=1)
    squares = x.square().sum(1).round()  # 1, or 0 for a vector of zeros
    pairs = _TEMPERATURE * (2 * (x @ x.T).double() - squares - squares[:, None])  # -t |u - v|^2
    others = pairs.flatten()[1:].view(len(x) - 1, -1)[:, :-1] if len(x) > 1 else pairs  # without the diagonal
    return (others.logsumexp((0, 1)) - torch.tensor(float(others.numel())).log()).item()


def alignment(backbone: nn.Module, views: tuple[Tensor, Tensor], context: EvalContext) -> float:
    """Return E |u - v|^2 over the unit features of two views of an image; 0 if they are equal.

    Every rank must call this, with the same number of images. Source: Wang & Isola 2020, eq. 3.

    Args:
        views: each (B, 3, S, S), on the device.
    """
    total = torch.zeros((), dtype=torch.float64, device=context.device)
    with inference(backbone, context):
        for pair in zip(*(view.split(BATCH) for view in views), strict=True):
            u, v = (nn.functional.normalize(backbone(view).float(), dim=1) for view in pair)
            total += (u - v).square().sum().double()
    return (context.world.mean(total) / len(views[0])).item()
