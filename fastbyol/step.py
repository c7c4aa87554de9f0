"""ONE training step: two views in; loss, gradients, new weights and a moved target out."""

import ctypes
import gc
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbyol.config import Config
from fastbyol.data import Batch
from fastbyol.errors import InputError
from fastbyol.kernels import lars_ema
from fastbyol.layers import activation_checkpointing
from fastbyol.model import BYOL, BYOLOutput
from fastbyol.optim import build_optimizer
from fastbyol.parallel import data_parallel, sync_batch_norm
from fastbyol.precision import LossScale, autocast, compute_dtype, set_float32_precision
from fastbyol.runtime.distributed import World
from fastbyol.schedules import Schedule

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_STEPS_BEFORE_CAPTURE = 3  # real steps: they create what a graph must not (optimizer state, compiled code, workspaces)


class TrainStep:
    """Owns the optimizer and the device scalars that it reads; reads no device value itself.

    Args:
        model: the pair, already on `device`.
        config: of the run, with a batch size that is a number.
        steps_per_epoch: optimizer steps in an epoch.
        world: this process among all.

    Raises:
        InputError: a setting does not fit the device or the number of ranks.
    """

    def __init__(
        self, model: BYOL, config: Config, steps_per_epoch: int, device: torch.device, world: World | None = None
    ) -> None:
        self.model, self.device, self.world = model, device, world or World()
        self.mode = choose_step_mode(config.step.mode, device, self.world)
        self.dtype = compute_dtype(config.precision, device)
        set_float32_precision(config.precision)
        torch.backends.cudnn.benchmark = True  # all batches have one shape: let cuDNN try its algorithms once
        if device.type == "cpu":
            _keep_freed_memory()
        self.schedule = Schedule(config.optim, config.data.batch_size, steps_per_epoch)
        self.total_steps = self.schedule.total_steps
        self.lr, self.tau = torch.zeros((), device=device), torch.ones((), device=device)
        self.loss_scale = LossScale(device) if self.dtype == torch.float16 else None
        self.pairs = model.target_pairs()
        self.optimizer = build_optimizer(config.optim, model, self.pairs, self.lr, self.tau, self.loss_scale)
        self._ema_update = lars_ema.ema_update(device)
        # Masks and noise are functions of (seed, step, rank): the same after a restart, different on every rank.
        draws = config.model.feature_noise or config.model.mask_ratio
        self._noise_seed = config.seed if draws else None
        self._parts, self._clip = _micro_batches(config, self.world), config.optim.clip_grad_norm
        # The first step whose loss was not finite, -1 while there is none: kept on the device, read when logged.
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._number = torch.zeros((), dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._before_capture = _STEPS_BEFORE_CAPTURE
        # One stream for all steps before capture: the allocator keeps a pool of memory for each.
        self._side = torch.cuda.Stream(device) if self.mode == "cuda_graph" else None
        activation_checkpointing(model.online.backbone, config.step.activation_checkpointing)
        self._forward: Any = model.forward
        if self.world.size > 1:
            sync_batch_norm(model, config.distributed, self.world)
            if self.mode == "compile":
                _compile_parts(model)
            self._forward = data_parallel(model, config.distributed, device, static_graph=self._parts == 1)
        elif self.mode != "eager":
            self._forward = torch.compile(model.forward, fullgraph=True, dynamic=False)

    def __call__(self, step: int, batch: Batch) -> BYOLOutput:
        """Optimizer step number `step` (from 0). Its output is valid until the next step."""
        self.lr.fill_(self.schedule.lr(step))
        self.tau.fill_(self.schedule.tau(step))
        self._number.fill_(step)
        if self._noise_seed is not None:
            torch.manual_seed(_mix(self._noise_seed, step, self.world.rank))
        return self._compute(*batch.views) if self.mode != "cuda_graph" else self._replay(*batch.views)

    def _compute(self, view1: Tensor, view2: Tensor) -> BYOLOutput:
        """The whole step, on device values alone: what a CUDA graph captures."""
        outputs = []
        for k, part in enumerate(zip(view1.chunk(self._parts), view2.chunk(self._parts), strict=True)):
            with self._no_sync(k < self._parts - 1):
                with autocast(self.device, self.dtype):
                    output = self._forward(*part)
                self._backward(output.loss / self._parts)
            outputs.append(output._replace(loss=output.loss.detach()))
        self._clip_gradients()
        self._update()
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.stack([part.loss for part in outputs]).mean()
        std = torch.stack([part.projection_std for part in outputs]).mean()
        features = [part.features for part in outputs if part.features is not None]
        bad = ~torch.isfinite(loss) & (self.first_bad_step < 0)
        self.first_bad_step.copy_(torch.where(bad, self._number, self.first_bad_step))
        return BYOLOutput(loss, std, torch.cat(features) if features else None)

    def _backward(self, loss: Tensor) -> None:
        (loss if self.loss_scale is None else loss * self.loss_scale.scale).backward()

    def _update(self) -> None:
        """New weights, then the target, unless a scaled gradient was not finite: then neither, and a lower scale."""
        moves_target, scale, tau = getattr(self.optimizer, "moves_target", False), self.loss_scale, self.tau
        if scale is not None and not moves_target:
            scale.check_and_unscale_(self._gradients())
            self.optimizer.found_inf = scale.found_inf  # torch's fused optimizers skip the step by themselves
            tau = torch.where(scale.found_inf > 0, 1.0, tau)
        self.optimizer.step()
        if not moves_target and self.pairs:
            self._ema_update(self.pairs, tau)
        if scale is not None:
            scale.update()

    def _clip_gradients(self) -> None:
        if self._clip:
            grads = self._gradients()
            limit = self._clip if self.loss_scale is None else self._clip * self.loss_scale.scale
            norm = torch.nn.utils.get_total_norm(grads)
            torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1))

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _no_sync(self, yes: bool) -> AbstractContextManager[None]:
        """Micro-batches before the last add up gradients without telling other ranks."""
        return self._forward.no_sync() if yes and self.world.size > 1 else nullcontext()

    def _replay(self, *views: Tensor) -> BYOLOutput:
        """The step as one captured graph; the first few are carried out call by call, on the stream that capture wants."""
        if self._before_capture > 0:
            self._before_capture -= 1
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                output = self._compute(*views)
            current.wait_stream(self._side)
            return output
        if self._graph is None:
            self._inputs = [torch.empty_like(view) for view in views]
            graph = torch.cuda.CUDAGraph()
            # thread_local: a CUDA call of another thread, such as DALI's or a loader's, does not end the capture.
            with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                self._output = self._compute(*self._inputs)
            self._graph = graph
        torch._foreach_copy_(self._inputs, list(views))
        self._graph.replay()
        return self._output

    def drop_graph(self) -> None:
        """Gives back the memory of the captured graph; the next step captures it anew."""
        if self._graph is not None:
            self._graph = self._inputs = self._output = None
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Lets go of the graph and of DistributedDataParallel; no step can follow. Call it while the process group stands.

        DDP's reducer joins gloo's thread when it is destroyed. Python would do so later with the interpreter lock held, which that thread
        may be waiting for.
        """
        self._graph = self._forward = None
        gc.collect()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state by parameter name, and the loss scale where there is one.

        {"optimizer": {"online.backbone.conv1.weight": {"momentum_buffer": ...}, ...}, "loss_scale": {"scale": ..., ...}}
        """
        names = {p: name for name, p in self.model.named_parameters()}
        return {
            "optimizer": {names[p]: dict(state) for p, state in self.optimizer.state.items()},
            "loss_scale": {} if self.loss_scale is None else self.loss_scale.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; a loss scale that this precision does not use, or lacks, is left out.

        Raises:
            ValueError: a name or a shape does not fit the model, or a value is no tensor.
        """
        parameters = dict(self.model.named_parameters())
        for name, values in state["optimizer"].items():
            if name not in parameters:
                raise ValueError(f"optimizer state of an unknown parameter {name}")
            p = parameters[name]
            for key, value in values.items():
                if not isinstance(value, Tensor):
                    raise ValueError(f"optimizer state {key} of {name} is {value!r}")
                if value.ndim and value.shape != p.shape:
                    raise ValueError(f"optimizer state {key} of {name} has shape {tuple(value.shape)}")
            self.optimizer.state[p] = {
                key: value.to(self.device).to(memory_format=_memory_format(p) if value.ndim else torch.preserve_format)
                for key, value in values.items()
            }
        if self.loss_scale is not None and state.get("loss_scale"):
            self.loss_scale.load_state_dict(state["loss_scale"])


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that config.device means; the GPU of this process's number where there are several.

    Raises:
        InputError: cuda was asked for and there is none, or fewer than processes on this machine.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device=cuda but torch sees no GPU here; `fastbyol doctor` says why, device=cpu runs on the CPU"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"process {local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}; "
            "lower torchrun's --nproc-per-node"
        )
    return torch.device("cuda", local_rank)


def choose_step_mode(mode: str, device: torch.device, world: World) -> str:
    """eager, compile or cuda_graph: what config.step.mode means on a device.

    A CPU's `auto` is eager: the fused kernels (kernels/batch_norm.py) run there alone, and compilation, which takes a minute,
    brought nothing even before them (benchmarks/LOG.md).

    Raises:
        InputError: a CUDA graph without a GPU, or over several ranks.
    """
    if mode == "auto":
        return "compile" if device.type == "cuda" else "eager"
    if mode == "cuda_graph" and device.type != "cuda":
        raise InputError("step.mode=cuda_graph needs a GPU; on a CPU use eager")
    if mode == "cuda_graph" and world.size > 1:
        raise InputError(f"step.mode=cuda_graph runs on one rank, this run has {world.size}; use compile")
    return mode


def _compile_parts(model: BYOL) -> None:
    """Compiles stem, stages and heads one by one, each as one graph.

    The backward pass of a graph hands over all its gradients at its end. Of one graph for the whole network no rank could send
    any before the last is there; of these parts they travel while the ones before them compute.
    """
    parts = [
        part
        for branch in (model.online, model.target)
        if branch is not None
        for part in (*branch.backbone.children(), branch.projector)
    ]
    # All parts are the same function to the compiler, which would give up after eight different ones.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(parts))
    for part in (*parts, model.predictor):
        if any(True for _ in part.parameters()):
            part.compile(fullgraph=True, dynamic=False)


def _keep_freed_memory() -> None:
    """Lets glibc's malloc keep what a step frees for the next one.

    By its defaults it gives large blocks back to the system, and the next step takes a page fault for every 4 KB of its
    activations: 30,000 a step of R18 at 96 px and batch 32, 6 % of its time (benchmarks/LOG.md). Other allocators have no such knob.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _micro_batches(config: Config, world: World) -> int:
    parts = config.step.micro_batches
    images, rest = divmod(config.data.batch_size, world.size * parts)
    if rest or images < 2:
        raise InputError(
            f"data.batch_size={config.data.batch_size} cannot be split into {world.size} ranks x step.micro_batches="
            f"{parts}: equal parts of at least 2 images are needed"
        )
    return parts


def _mix(*numbers: int) -> int:
    """One 63-bit seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _memory_format(p: Tensor) -> torch.memory_format:
    channels_last = p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
