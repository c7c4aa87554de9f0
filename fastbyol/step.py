"""ONE training step: two views in; loss, gradients, new weights and a moved target out."""

from typing import Any

import torch
from torch import Tensor

from fastbyol import schedules
from fastbyol.config import Config
from fastbyol.data import Batch
from fastbyol.errors import InputError
from fastbyol.kernels import dispatch
from fastbyol.model import BYOL, BYOLOutput
from fastbyol.optim import build_optimizer


class TrainStep:
    """Owns the optimiser and the device scalars lr and tau; reads no device value.

    Args:
        model: the pair, already on `device`.
        config: of the run.
        steps_per_epoch: optimiser steps in an epoch.
    """

    def __init__(self, model: BYOL, config: Config, steps_per_epoch: int, device: torch.device) -> None:
        self.model, self.device = model, device
        self.dtype = compute_dtype(config.precision, device)
        self.total_steps = config.optim.epochs * steps_per_epoch
        self._warmup_steps = round(config.optim.warmup_epochs * steps_per_epoch)
        self._peak_lr = schedules.scaled_lr(config.optim.base_lr, config.data.batch_size)
        self._tau_base = config.optim.tau_base
        self.lr, self.tau = torch.zeros((), device=device), torch.ones((), device=device)
        self.pairs = model.target_pairs()
        self.optimizer = build_optimizer(config.optim, model, self.pairs, self.lr, self.tau)
        self._ema_update = dispatch.ema_update(device)
        # The first step whose loss was not finite, -1 while there is none: kept on the device, read when logged.
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def __call__(self, step: int, batch: Batch) -> BYOLOutput:
        """Optimiser step number `step` (from 0)."""
        self.lr.fill_(self.lr_at(step))
        self.tau.fill_(self.tau_at(step))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            output = self.model(*batch.views)
        output.loss.backward()
        self.optimizer.step()
        if not getattr(self.optimizer, "moves_target", False):
            self._ema_update(self.pairs, self.tau)
        self.optimizer.zero_grad(set_to_none=True)
        self._note_non_finite(step, output.loss.detach())
        return BYOLOutput(output.loss.detach(), output.projection_std)

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step `step`."""
        return schedules.learning_rate(
            step, peak=self._peak_lr, warmup_steps=self._warmup_steps, total_steps=self.total_steps
        )

    def tau_at(self, step: int) -> float:
        """Target decay of optimiser step `step`."""
        return schedules.target_decay(step, base=self._tau_base, total_steps=self.total_steps)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state by parameter name, e.g. {"online.backbone.conv1.weight": {"momentum_buffer": ...}}."""
        names = {p: name for name, p in self.model.named_parameters()}
        return {names[p]: dict(state) for p, state in self.optimizer.state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`.

        Raises:
            ValueError: a name or a shape does not fit the model.
        """
        parameters = dict(self.model.named_parameters())
        for name, values in state.items():
            if name not in parameters:
                raise ValueError(f"optimiser state of an unknown parameter {name}")
            p = parameters[name]
            for key, value in values.items():
                if value.ndim and value.shape != p.shape:
                    raise ValueError(f"optimiser state {key} of {name} has shape {tuple(value.shape)}")
            self.optimizer.state[p] = {
                key: value.to(self.device).to(memory_format=_memory_format(p)) if value.ndim else value
                for key, value in values.items()
            }

    def _note_non_finite(self, step: int, loss: Tensor) -> None:
        bad = ~torch.isfinite(loss) & (self.first_bad_step < 0)
        self.first_bad_step.copy_(torch.where(bad, step, self.first_bad_step))


def choose_device(name: str) -> torch.device:
    """The device that config.device means.

    Raises:
        InputError: cuda was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device=cuda but torch sees no GPU here; `fastbyol doctor` says why, device=cpu runs on the CPU"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32: the autocast dtype; `auto` is bfloat16 where the processor computes in it natively."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _memory_format(p: Tensor) -> torch.memory_format:
    channels_last = p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
