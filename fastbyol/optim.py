"""Optimizers: LARS with the target update folded in, and torch's own for those who prefer them."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol.config import OptimConfig
from fastbyol.kernels import lars_ema
from fastbyol.kernels.lars_ema import Hyper
from fastbyol.precision import LossScale

Pair = tuple[Tensor, Tensor]  # online weight, target weight


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling; `step()` also moves the target network with the new weights.

    Formulas, source and kernels: kernels/lars_ema.py. All tensors are updated in two passes, without a host sync on a GPU.

    Everything else is as in torch.optim.SGD: closures, schedulers, groups added later, state dicts, copies. A state dict holds no
    target, tau or loss scale, which belong to the run.

    Args:
        params: float32 parameters or groups, on one device; their gradients may be bfloat16 or float16. A group may set
            `adapt=False`: trust ratio 1 (biases and norm layers, which should have weight_decay=0 too).
        lr: scalar tensor on the parameters' device, or a number, of which every group gets a tensor. The learning rate may change
            between steps by writing to the tensor; nothing is recompiled or synchronized.
        momentum, weight_decay, trust_coefficient: mu, wd and eta.
        target_pairs: (online, target) tensors; every online tensor must be one of the parameters.
        tau: scalar tensor, the target's decay; needed with target_pairs.
        inv_scale: scalar tensor, 1 / loss scale, for gradients of a scaled loss. Then a step in which any gradient is not
            finite is skipped, the target's too, and `found_inf` is 1 after it, 0 otherwise.
        found_inf: scalar tensor to use for that.

    Raises:
        ValueError: a parameter is not float32 or on another device than the first; a hyperparameter is negative or not finite; lr, tau,
            inv_scale or found_inf is no float32 scalar on the parameters' device; a pair's online tensor is not among the parameters;
            tau is missing.
    """

    moves_target = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 1e-3,
        target_pairs: Iterable[Pair] = (),
        tau: Tensor | None = None,
        inv_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        self._device: torch.device | None = None  # of the first parameter
        super().__init__(params, defaults)
        if self._device is None:
            raise ValueError("LARS got no parameters")
        device = self._device
        for name, scalar in (("tau", tau), ("inv_scale", inv_scale), ("found_inf", found_inf)):
            if scalar is not None:
                _check_scalar(name, scalar, device)
        self._targets = dict(target_pairs)
        missing = self._targets.keys() - {p for group in self.param_groups for p in group["params"]}
        if missing:
            raise ValueError(f"{len(missing)} online tensors of target_pairs are not among the optimizer's parameters")
        if self._targets and tau is None:
            raise ValueError("target_pairs need tau")
        self.tau = torch.ones((), device=device) if tau is None else tau
        self.inv_scale = inv_scale
        self.found_inf = torch.zeros((), device=device) if found_inf is None else found_inf
        self._update = lars_ema.lars_update(device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters; what it does not set is as in the constructor.

        Raises:
            ValueError: as the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._make_lrs_tensors()

    def _make_lrs_tensors(self) -> None:
        """Learning rates that are numbers, of the constructor or written to a group since, become tensors."""
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor) and self._device is not None:
                group["lr"] = torch.tensor(float(group["lr"]), device=self._device)

    def _check_group(self, group: dict[str, Any]) -> None:
        device = self._device
        for p in group["params"]:
            device = device or p.device
            if p.dtype != torch.float32:
                raise ValueError(f"LARS keeps float32 parameters (gradients may be of 16 bits), not {p.dtype}")
            if p.device != device:
                raise ValueError(f"LARS keeps all parameters on one device, not on {device} and {p.device}")
        for name in ("lr", "momentum", "weight_decay", "trust_coefficient"):
            value = group[name]
            if not isinstance(value, Tensor) and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: must be 0 or more, and finite")
        if isinstance(group["lr"], Tensor) and device is not None:
            _check_scalar("lr", group["lr"], device)
        self._device = device

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over momenta and groups of another LARS; learning rates are written to this one's own tensors.

        Raises:
            ValueError: its groups are not as large as this one's.
        """
        self._make_lrs_tensors()
        own = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        values = [float(group["lr"]) for group in self.param_groups]
        for group, lr, value in zip(self.param_groups, own, values, strict=True):
            # Groups that share a tensor and had different rates get tensors of their own.
            rates = {v for tensor, v in zip(own, values, strict=True) if tensor is lr}
            group["lr"] = lr.fill_(value) if len(rates) == 1 else torch.full_like(lr, value)

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle take along: all but the kernels' tables of addresses."""
        return {name: value for name, value in self.__dict__.items() if name in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_update" not in self.__dict__:
            self._update = lars_ema.lars_update(self._device)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the weights and their targets from the gradients; parameters without a gradient stay as they are.

        Args:
            closure: computes the gradients anew and returns the loss.

        Returns:
            what the closure returned; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        self._make_lrs_tensors()
        rows, groups = [], []
        for k, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                rows.append((p, p.grad, state["momentum_buffer"], self._targets.get(p)))
                groups.append(k)
        hypers = [
            Hyper(
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                trust_coefficient=group["trust_coefficient"] if group["adapt"] else None,
            )
            for group in self.param_groups
        ]
        if self.inv_scale is not None:
            self.found_inf.zero_()
        self._update(rows, groups, hypers, self.tau, inv_scale=self.inv_scale, found_inf=self.found_inf)


_COPIED = {"defaults", "state", "param_groups", "tau", "inv_scale", "found_inf", "_targets", "_device"}


def _check_scalar(name: str, scalar: Tensor, device: torch.device) -> None:
    if (scalar.dtype, scalar.device, scalar.ndim) != (torch.float32, device, 0):
        raise ValueError(f"{name} must be a float32 scalar on {device}, not {scalar!r}")


def ema_update_(pairs: Iterable[Pair], tau: Tensor) -> None:
    """t <- t + (1 - tau) (w - t) in place for all pairs (w, t), for optimizers that do not move the target.

    Args:
        pairs: float32 tensors on one device.
        tau: float32 scalar tensor on it.

    Raises:
        TypeError, ValueError: tensors that the kernels could not read, see kernels/lars_ema.py.
    """
    pairs = list(pairs)
    device = pairs[0][0].device if pairs else torch.device("cpu")
    lars_ema.ema_update(device)(pairs, tau)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights, with decay and trust ratio; biases and norm-layer parameters (one-dimensional), without."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay, "adapt": True},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


def build_optimizer(
    config: OptimConfig,
    module: nn.Module,
    target_pairs: Iterable[Pair],
    lr: Tensor,
    tau: Tensor,
    loss_scale: LossScale | None = None,
) -> torch.optim.Optimizer:
    """The configured optimizer over the module's trainable parameters.

    Only LARS moves the target itself (`optimizer.moves_target`); with the others the step calls `ema_update_`.

    Args:
        lr, tau: scalar tensors on the parameters' device, written by the step's schedule.
        loss_scale: of float16. LARS unscales the gradients, skips a step whose gradients are not finite and says so in
            `loss_scale.found_inf`; for the others the step does it.
    """
    groups = parameter_groups(module, config.weight_decay)
    if config.name == "lars":
        return LARS(
            groups,
            lr,
            momentum=config.momentum,
            trust_coefficient=config.trust_coefficient,
            target_pairs=target_pairs,
            tau=tau,
            inv_scale=None if loss_scale is None else loss_scale.inverse,
            found_inf=None if loss_scale is None else loss_scale.found_inf,
        )
    for group in groups:
        del group["adapt"]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=config.momentum, fused=True)
    adam = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    # torch refuses to capture the step of one that is not `capturable`, though the fused kernel reads its counter on the device.
    return adam(groups, lr, betas=(config.momentum, config.beta2), fused=True, capturable=lr.is_cuda)
