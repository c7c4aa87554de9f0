"""One training step: two views in; gradients, new weights and a moved target out."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from numbers import Rational
from typing import Any

import torch
from torch import Tensor

from fastbyol.config import Config
from fastbyol.cuda_graph import CapturedStep
from fastbyol.data import Batch
from fastbyol.model import BYOL, BYOLOutput
from fastbyol.optim import Update, build_optimizer, clip_gradients, load_named_state, named_state
from fastbyol.parallel import check_micro_batches, choose_step_mode, no_sync, prepare_forward, separate_forward
from fastbyol.precision import LossScale, autocast, compute_dtype, set_float32_precision
from fastbyol.runtime.device import tune_device
from fastbyol.runtime.distributed import World
from fastbyol.schedules import Schedule, step_seed
from fastbyol.spans import BACKWARD, UPDATE, span
from fastbyol.tuning import tune


class TrainStep:
    """Owns the optimizer and the device scalars that it reads. A step never waits for the device.

    Args:
        model: the pair, on `device`.
        config: data.batch_size must be a number.
        steps_per_epoch: images / batch size, as a fraction (see `Schedule`).
        world: this process among all ranks.

    Raises:
        InputError: a setting does not fit the device or the number of ranks.
    """

    def __init__(
        self, model: BYOL, config: Config, steps_per_epoch: Rational, device: torch.device, world: World | None = None
    ) -> None:
        self.model, self.config, self.device, self.world = model, config, device, world or World()
        self.mode, self.mode_reason = choose_step_mode(config.step.mode, device, self.world)
        self.dtype = compute_dtype(config.precision, device)
        set_float32_precision(config.precision)
        tune_device(device)
        self.micro_batches = check_micro_batches(config, self.world)
        self.schedule = Schedule(config.optim, config.data.batch_size, steps_per_epoch)
        self.total_steps = self.schedule.total_steps
        # Device scalars: a new value neither recompiles the step nor captures it again.
        self.lr, self.tau = torch.zeros((), device=device), torch.ones((), device=device)
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)  # first with a non-finite loss
        self.loss_scale = LossScale(device) if self.dtype == torch.float16 else None
        pairs = model.target_pairs()
        self.optimizer = build_optimizer(config.optim, model, pairs, self.lr, self.tau, self.loss_scale)
        self.update = Update(self.optimizer, pairs, self.tau, self.loss_scale)
        if device.type == "cuda" and self.dtype.itemsize == 2 and config.step.conv1x1 == "auto":
            images = config.data.batch_size // self.world.size // self.micro_batches
            encoders = [encoder for encoder in (model.online, model.target) if encoder is not None]
            backbones = [encoder.backbone for encoder in encoders]
            tune(backbones, images, config.data.image_size_px, device, self.dtype, self.world)
        self._graph = CapturedStep(self.compute, device, self.world.size) if self.mode == "cuda_graph" else None
        with nullcontext() if self._graph is None else self._graph.stream():
            self.forward: Any = prepare_forward(model, config, self.mode, device, self.world)
        self._separated: Any = None

    def __call__(self, step: int, batch: Batch) -> BYOLOutput:
        """Run optimizer step `step`, counted from 0. The output is valid until the next step."""
        self.lr.fill_(self.schedule.lr(step))
        self.tau.fill_(self.schedule.tau(step))
        self.number.fill_(step)
        if self.model.is_random:  # a function of (seed, step, rank), so that a resumed run draws the same numbers
            torch.manual_seed(step_seed(self.config.seed, step, self.world.rank))
        return self.compute(*batch.views) if self._graph is None else self._graph(*batch.views)

    def compute(self, view1: Tensor, view2: Tensor) -> BYOLOutput:  # views: (B, 3, S, S)
        """Compute the step from device values alone: what a CUDA graph captures."""
        outputs = []
        parts = zip(view1.chunk(self.micro_batches), view2.chunk(self.micro_batches), strict=True)
        for k, part in enumerate(parts):
            with no_sync(self.forward, self.world.size > 1 and k < self.micro_batches - 1):
                with autocast(self.device, self.dtype):
                    output = self.forward(*part)
                with span(BACKWARD):
                    self._scaled(output.loss / self.micro_batches).backward()
            outputs.append(output._replace(loss=output.loss.detach()))
        if self.config.optim.clip_grad_norm:
            clip_gradients(self.optimizer, self._scaled(self.config.optim.clip_grad_norm))
        with span(UPDATE):
            self.update()
        self.optimizer.zero_grad(set_to_none=True)
        return self._combine(outputs)

    def _combine(self, outputs: list[BYOLOutput]) -> BYOLOutput:
        """Average over micro-batches, and remember the first step with a non-finite loss."""
        loss = torch.stack([output.loss for output in outputs]).mean()
        std = torch.stack([output.projection_std for output in outputs]).mean()
        features = [output.features for output in outputs if output.features is not None]
        bad = ~torch.isfinite(loss) & (self.first_bad_step < 0)
        self.first_bad_step.copy_(torch.where(bad, self.number, self.first_bad_step))
        return BYOLOutput(loss, std, torch.cat(features) if features else None)

    def _scaled(self, value: Any) -> Any:
        return value if self.loss_scale is None else value * self.loss_scale.scale

    @contextmanager
    def instrumented(self) -> Iterator[None]:
        """Context manager: target and online network run as separate graphs, without CUDA graph."""
        forward, graph = self.forward, self._graph
        if graph is not None:
            graph.drop()  # its memory is as large as that of the steps that follow
        self._separated = self._separated or separate_forward(self.model, self.mode, self.world, forward)
        self.forward, self._graph = self._separated, None
        try:
            yield
        finally:
            self.forward, self._graph = forward, graph

    def close(self) -> None:
        """Free the CUDA graph and DDP before the process group is destroyed; no step can follow."""
        # DDP's reducer joins gloo's thread. At exit, with the interpreter lock, it would deadlock.
        self.forward = self._graph = self._separated = None
        gc.collect()

    def state_dict(self) -> dict[str, Any]:
        """Return {"optimizer": state by parameter name, "loss_scale": its state or {}}."""
        scale = {} if self.loss_scale is None else self.loss_scale.state_dict()
        return {"optimizer": named_state(self.optimizer, self.model), "loss_scale": scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`. Raises ValueError as `load_named_state`."""
        load_named_state(self.optimizer, self.model, state["optimizer"], self.device)
        if self.loss_scale is not None and state.get("loss_scale"):
            self.loss_scale.load_state_dict(state["loss_scale"])
