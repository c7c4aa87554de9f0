"""Optimizers: LARS with a fused target update, and torch's own SGD, Adam and AdamW."""

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
    """Layer-wise adaptive rate scaling.

    `step()` also moves the target network towards the new weights.

    Formulas, source and kernels: kernels/lars_ema.py. Two passes update all tensors, without a host
    sync on a GPU.

    Closures, schedulers, later groups, state dicts and copies work as in torch.optim.SGD. A state
    dict holds no target, tau or loss scale: they belong to the run.

    Args:
        params: float32 parameters or groups on one device. Gradients may be bfloat16 or float16. A
            group with `adapt=False` has trust ratio 1: use it for biases and norm layers, together
            with weight_decay=0.
        lr: scalar tensor on the parameters' device, or a number that is copied into one tensor per
            group. To change the learning rate, write to the tensor; this neither recompiles nor
            synchronizes.
        momentum, weight_decay, trust_coefficient: mu, wd and eta.
        target_pairs: (online, target) tensors. Every online tensor must be one of the parameters.
        tau: scalar tensor, the decay of the target. Required with target_pairs.
        inv_scale: scalar tensor, 1 / loss scale, for gradients of a scaled loss. A step with a
            non-finite gradient then changes neither weights nor targets and sets `found_inf` to 1;
            other steps set it to 0.
        found_inf: scalar tensor to use for that.

    Raises:
        ValueError: a parameter is not float32 or not on the device of the first; a hyperparameter
            is negative or not finite; lr, tau, inv_scale or found_inf is not a float32 scalar on
            the parameters' device; a pair's online tensor is not a parameter; tau is missing.
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
        """Add a group of parameters. Missing options take the constructor's values.

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
        self._lrs_to_tensors()

    def _lrs_to_tensors(self) -> None:
        """Turn learning rates that are numbers into tensors; schedulers write numbers to groups."""
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
        """Load momenta and groups of another LARS.

        Learning rates are written into this optimizer's tensors.

        Raises:
            ValueError: the groups have other sizes.
        """
        self._lrs_to_tensors()
        own = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        values = [float(group["lr"]) for group in self.param_groups]
        for group, lr, value in zip(self.param_groups, own, values, strict=True):
            # Groups that share a tensor but have different rates get their own tensors.
            rates = {v for tensor, v in zip(own, values, strict=True) if tensor is lr}
            group["lr"] = lr.fill_(value) if len(rates) == 1 else torch.full_like(lr, value)

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the kernels' tables of addresses, for copy and pickle."""
        return {name: value for name, value in self.__dict__.items() if name in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_update" not in self.__dict__:
            self._update = lars_ema.lars_update(self._device)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update weights and targets from the gradients.

        Parameters without a gradient do not change.

        Args:
            closure: recomputes the gradients and returns the loss.

        Returns:
            The closure's result, None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        self._lrs_to_tensors()
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


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: weights with decay and trust ratio; biases and norm parameters
    (one-dimensional) without.
    """
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
    """Return the configured optimizer over the module's trainable parameters.

    Only LARS moves the target (`moves_target`). With the others, the training step calls
    `ema_update`.

    Args:
        lr, tau: scalar tensors on the parameters' device, which the training step writes.
        loss_scale: of float16. LARS unscales the gradients, skips steps with non-finite ones and
            sets `loss_scale.found_inf`. For the others, the training step does this.
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
    # torch captures only `capturable` optimizers, although the fused kernel reads its step counter
    # on the device anyway.
    return adam(groups, lr, betas=(config.momentum, config.beta2), fused=True, capturable=lr.is_cuda)


class Update:
    """Update of weights and target from the gradients, in this order.

    With a loss scale, a step with a non-finite gradient changes neither of them and lowers the
    scale.

    Args:
        pairs: (online, target) tensors.
        tau: scalar tensor, the decay of the target.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, pairs: list[Pair], tau: Tensor, loss_scale: LossScale | None
    ) -> None:
        self._optimizer, self._pairs, self._tau, self._loss_scale = optimizer, pairs, tau, loss_scale
        self._ema_update = lars_ema.ema_update(tau.device)

    def __call__(self) -> None:
        """Run the update."""
        optimizer, scale, tau = self._optimizer, self._loss_scale, self._tau
        if moves_target(optimizer):  # LARS does all of it in one pass
            optimizer.step()
        else:
            if scale is not None:
                scale.check_and_unscale_(gradients(optimizer))
                optimizer.found_inf = scale.found_inf  # torch's fused optimizers then skip the step
                tau = torch.where(scale.found_inf > 0, 1.0, tau)
            optimizer.step()
            if self._pairs:
                self._ema_update(self._pairs, tau)
        if scale is not None:
            scale.update()


def moves_target(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if the optimizer's step also moves the target network."""
    return getattr(optimizer, "moves_target", False)


def gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the gradients of all parameters that have one."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float | Tensor) -> None:
    """Scale all gradients down so that their total norm is at most `limit`."""
    grads = gradients(optimizer)
    norm = torch.nn.utils.get_total_norm(grads)
    torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1))


def named_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's state by parameter name: {"online.backbone.conv1.weight":
    {"momentum_buffer": ...}, ...}.
    """
    names = {p: name for name, p in module.named_parameters()}
    return {names[p]: dict(state) for p, state in optimizer.state.items()}


def load_named_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, state: dict[str, dict[str, Tensor]], device: torch.device
) -> None:
    """Load the result of `named_state` onto `device`, in the memory format of the parameters.

    Raises:
        ValueError: a name or a shape does not fit the module, or a value is not a tensor.
    """
    parameters = dict(module.named_parameters())
    for name, values in state.items():
        if name not in parameters:
            raise ValueError(f"optimizer state of an unknown parameter {name}")
        p = parameters[name]
        for key, value in values.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"optimizer state {key} of {name} is {value!r}")
            if value.ndim and value.shape != p.shape:
                raise ValueError(f"optimizer state {key} of {name} has shape {tuple(value.shape)}")
        optimizer.state[p] = {
            key: value.to(device).to(memory_format=_memory_format(p) if value.ndim else torch.preserve_format)
            for key, value in values.items()
        }


def _memory_format(p: Tensor) -> torch.memory_format:
    channels_last = p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
