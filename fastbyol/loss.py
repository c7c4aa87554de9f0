"""BYOL's loss.

Source: Grill et al. 2020 (arXiv 2006.07733), equation 2. Other losses are in variants.py.

Shapes: B images, D = projection_dim. Everything is computed in float32.
"""

import torch.nn.functional as F
from torch import Tensor


def byol_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of both directions: view 1 predicts view 2's target and the reverse.

    Args:
        predictions: (2B, D), view 1 first.
        targets: (2B, D), without gradient.
    """
    q1, q2 = predictions.chunk(2)
    t1, t2 = targets.chunk(2)
    return regression_loss(q1, t2) + regression_loss(q2, t1)


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the batch mean of |n(q) - n(z')|^2 = 2 - 2 cos(q, z'), where n is l2 normalization.

    Args:
        prediction, target: (B, D); the target has no gradient.
    """
    q = F.normalize(prediction.float(), dim=1)
    z = F.normalize(target.float(), dim=1)
    return (q - z).square().sum(1).mean()
