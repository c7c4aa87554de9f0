"""How the model runs: eager, compiled or captured, on one rank or several.

On several ranks, BatchNorm statistics and gradients are averaged over processes.
"""

import inspect
import itertools
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from fastbyol.config import Config, DistributedConfig
from fastbyol.errors import InputError
from fastbyol.layers import activation_checkpointing, batch_norms, fork_between_stages
from fastbyol.model import BYOL
from fastbyol.precision import cast_weights, compute_dtype
from fastbyol.runtime.distributed import World, mean_over_ranks
from fastbyol.spans import ONLINE, TARGET, span

# The argument that turns off the broadcast of buffers; torch 2.14 renamed it.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def choose_step_mode(mode: str, device: torch.device, world: World) -> tuple[str, str]:
    """Return what config.step.mode means on this device: eager, compile or cuda_graph; and why.

    Raises:
        InputError: a CUDA graph without a GPU.
    """
    if mode == "auto":
        if device.type != "cuda":  # compilation takes a minute and brings nothing (benchmarks/LOG.md)
            return "eager", "the CPU kernels run in eager mode only"
        if world.size > 1:
            return "compile", "a CUDA graph over several ranks has never run: step.mode=cuda_graph tries it"
        return "cuda_graph", "one launch per step"
    if mode == "cuda_graph" and device.type != "cuda":
        raise InputError("step.mode=cuda_graph needs a GPU; use eager on a CPU")
    return mode, "as configured"


def check_micro_batches(config: Config, world: World) -> int:
    """Return step.micro_batches.

    Raises:
        InputError: the batch does not split into equal parts of at least 2 images.
    """
    parts = config.step.micro_batches
    images, rest = divmod(config.data.batch_size, world.size * parts)
    if rest or images < 2:
        raise InputError(
            f"data.batch_size={config.data.batch_size} cannot be split into {world.size} ranks x step.micro_batches={parts}: "
            "equal parts of at least 2 images are needed"
        )
    return parts


def prepare_forward(model: BYOL, config: Config, mode: str, device: torch.device, world: World) -> Any:
    """Apply activation checkpointing, synchronized BatchNorm, compilation and DDP; return the
    forward function.

    Returns:
        (view1, view2) -> BYOLOutput.
    """
    activation_checkpointing(model.online.backbone, config.step.activation_checkpointing)
    if world.size > 1:
        sync_batch_norm(model, config.distributed, world)
        if mode != "eager":
            _compile_parts(model)
        # DDP's static graph expects an update after every backward pass, so micro-batches need a
        # dynamic one.
        return data_parallel(model, config.distributed, device, static_graph=config.step.micro_batches == 1)
    forward = model.forward
    dtype = compute_dtype(config.precision, device)
    # Activation checkpointing runs blocks again with the module's own weights.
    if device.type == "cuda" and dtype.itemsize == 2 and not config.step.activation_checkpointing:
        forward = with_cast_weights(model, dtype)
    return forward if mode == "eager" else torch.compile(forward, fullgraph=True, dynamic=False)


def with_cast_weights(model: BYOL, dtype: torch.dtype) -> Any:
    """Return the model's forward function with weights that are cast together (`cast_weights`).

    Not for several ranks: no gradient could be sent before the backward pass ends.
    """

    def forward(view1: Tensor, view2: Tensor) -> Any:
        return functional_call(model, cast_weights(model, dtype), (view1, view2))

    return forward


def separate_forward(model: BYOL, mode: str, world: World, forward: Any) -> Any:
    """Return a forward function whose spans tell the target from the online network.

    That is `forward` unless the whole network is one compiled graph; then each network is compiled
    separately.
    """
    if mode == "eager" or world.size > 1:
        return forward
    target_projections = torch.compile(model.target_projections, fullgraph=True, dynamic=False)
    online_loss = torch.compile(model.online_loss, fullgraph=True, dynamic=False)

    def separated(view1: Tensor, view2: Tensor) -> Any:
        inputs = model.inputs(view1, view2)
        with span(TARGET):
            targets = target_projections(inputs)
        with span(ONLINE):
            return online_loss(inputs, targets)

    return separated


def no_sync(forward: Any, skip: bool) -> AbstractContextManager[None]:
    """Context manager: with `skip`, DDP adds up gradients without averaging them over ranks (all
    micro-batches but the last).
    """
    return forward.no_sync() if skip else nullcontext()


def _compile_parts(model: BYOL) -> None:
    """Compile stem, stages and heads as separate graphs.

    A graph's backward pass delivers all its gradients at its end. With one graph for the whole
    network, no gradient could be sent before the last one is ready. With several, gradients are
    sent while earlier parts still compute.
    """
    fork_between_stages(model, False)  # a graph's outputs must not share memory
    encoders = [encoder for encoder in (model.online, model.target) if encoder is not None]
    parts = [part for encoder in encoders for part in (*encoder.backbone.children(), encoder.projector)]
    # The compiler sees the same code object in all parts, and gives up after eight variants by
    # default.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(parts))
    for part in (*parts, model.predictor):
        if any(True for _ in part.parameters()):
            part.compile(fullgraph=True, dynamic=False)


def sync_batch_norm(model: nn.Module, config: DistributedConfig, world: World) -> None:
    """Synchronize the statistics of all BatchNorm layers over all ranks, or over groups of
    `config.sync_bn_ranks` neighbors.

    Raises:
        InputError: the groups do not divide the ranks.
    """
    ranks = config.sync_bn_ranks or world.size
    if world.size % ranks:
        raise InputError(f"distributed.sync_bn_ranks={ranks} does not divide the {world.size} ranks")
    if ranks == 1:
        return
    group = dist.group.WORLD if ranks == world.size else dist.new_subgroups(ranks)[0]

    def reduce(x: Tensor) -> Tensor:
        return mean_over_ranks(x, group, ranks)

    for norm in batch_norms(model):
        norm.reduce, norm.ranks = reduce, ranks


class GradientMean:
    """Averages gradients over ranks, all in one collective: for training too short for DDP to pay.

    Parameters that get no gradient in the first step, on any rank, get none later.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World) -> None:
        self._parameters, self._world = list(parameters), world
        self._is_first = True

    def __call__(self) -> None:
        """Replace the gradients by their means. Every rank must call this, after backward()."""
        if self._world.size == 1:
            return
        if self._is_first:
            used = [
                any(parts)
                for parts in zip(*self._world.gather([p.grad is not None for p in self._parameters]), strict=True)
            ]
            self._parameters = list(itertools.compress(self._parameters, used))
            self._is_first = False
        for p in self._parameters:
            if p.grad is None:  # only other ranks had a use for it
                p.grad = torch.zeros_like(p)
        flat = self._world.mean(torch.cat([p.grad.flatten() for p in self._parameters]))
        for p, mean in zip(self._parameters, flat.split([p.numel() for p in self._parameters]), strict=True):
            p.grad.copy_(mean.view_as(p))  # keeps the memory format


def share_of_batch(batch_size: int, images: int, world: World) -> NDArray[np.int64]:
    """Return this rank's positions in a batch of a network that is trained in parallel.

    Args:
        batch_size: over all ranks.
        images: number of images of the set, to explain a batch that is the whole set.

    Raises:
        InputError: the ranks' parts would differ in size, and their statistics in weight.
    """
    if batch_size % world.size:
        whole = ", all images," if batch_size == images else ""
        fitting = max(batch_size // world.size, 1) * world.size
        remedy = f"use {fitting}" if fitting <= images else f"start at most {images} processes"
        raise InputError(f"batch_size={batch_size}{whole} cannot be split into {world.size} equal parts; {remedy}")
    return world.shard(batch_size, 1)


def data_parallel(
    model: nn.Module, config: DistributedConfig, device: torch.device, *, static_graph: bool
) -> DistributedDataParallel:
    """Wrap the model in DistributedDataParallel, which averages gradients during the backward pass.

    Gradients are views of DDP's buckets. Buffers are not broadcast: BatchNorm's are equal on ranks
    that share statistics, and a checkpoint holds those of rank 0.

    Args:
        static_graph: an update follows every backward pass.
    """
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=static_graph,
        **{_SYNC_BUFFERS: False},
    )
    # DDP would time every 100th iteration with CUDA events, which a capture must not contain.
    wrapped._set_ddp_runtime_logging_sample_rate(2**31 - 1)
    if config.gradient_dtype == "bf16":
        wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return wrapped
