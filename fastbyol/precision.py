"""Precision of the step: the autocast dtype, TF32, and the loss scale of float16.

Weights, gradients, momentum, BatchNorm's statistics, norms and the loss are always float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol.layers import Conv2d

# Micikevicius et al. 2018 (arXiv 1710.03740), section 3.2, with the constants of torch's
# GradScaler.
_FIRST_SCALE, _GROWTH, _BACKOFF, _GROWTH_STEPS = 2.0**16, 2.0, 0.5, 2000


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the autocast dtype of config.precision.

    `auto` is bfloat16 if the processor has native support, else float32.
    """
    if precision == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context manager of a forward pass in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def set_float32_precision(precision: str) -> None:
    """Allow TF32 (10 bits of mantissa) in float32 matrix products and convolutions on a GPU, for
    "tf32" only.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def cast_weights(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights of all convolutions and linear layers in `dtype`, by name; differentiable.

    Autocast would launch a kernel per weight and one per gradient; this takes a few for all. All
    gradients arrive at the end of the backward pass, and that of an unused weight is zero.
    """
    weights = {
        f"{name}.weight": module.weight
        for name, module in network.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d, Conv2d)
    }
    cast: dict[str, Tensor] = {}
    for trained in (True, False):
        names = [name for name, weight in weights.items() if weight.requires_grad is trained]
        if names:
            cast.update(zip(names, _Cast.apply(dtype, *(weights[name] for name in names)), strict=True))
    return cast


class _Cast(torch.autograd.Function):
    """Casts tensors together, and their gradients back to float32."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _cast_together(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_cast_together(gradients, torch.float32)


def _cast_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)


class LossScale(nn.Module):
    """Dynamic loss scale on the device; the host reads nothing of it.

    The loss is multiplied by `scale` before the backward pass. A step with a non-finite gradient is
    skipped (`found_inf`) and halves the scale. 2,000 good steps in a row double it.
    """

    scale: Tensor  # () float32
    inverse: Tensor  # () float32: 1 / scale
    good_steps: Tensor  # () int32, since the scale last changed
    found_inf: Tensor  # () float32: 1 after a step whose gradients were not all finite, else 0
    skipped: Tensor  # () int64: steps skipped so far

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((), _FIRST_SCALE, device=device))
        self.register_buffer("inverse", self.scale.reciprocal())
        self.register_buffer("good_steps", torch.zeros((), dtype=torch.int32, device=device))
        self.register_buffer("found_inf", torch.zeros((), device=device), persistent=False)
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64, device=device))

    def check_and_unscale_(self, grads: list[Tensor]) -> None:
        """Divide the gradients by the scale and set `found_inf`, for optimizers that do neither."""
        self.found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(grads, self.found_inf, self.inverse)

    @torch.no_grad()
    def update(self) -> None:
        """Set the scale of the next step from `found_inf` of this one."""
        torch._amp_update_scale_(self.scale, self.good_steps, self.found_inf, _GROWTH, _BACKOFF, _GROWTH_STEPS)
        self.inverse.copy_(self.scale.reciprocal())
        self.skipped.add_(self.found_inf.to(torch.int64))
