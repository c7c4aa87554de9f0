"""The model on several ranks: BatchNorm statistics and gradients are averaged over processes."""

import inspect

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from fastbyol.config import DistributedConfig
from fastbyol.errors import InputError
from fastbyol.layers import batch_norms
from fastbyol.runtime.distributed import World, mean_over_ranks


def sync_batch_norm(model: nn.Module, config: DistributedConfig, world: World) -> None:
    """Lets all BatchNorm layers share statistics over all ranks, or over groups of `config.sync_bn_ranks` neighbors.

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


# torch 2.14 has renamed it.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


def data_parallel(
    model: nn.Module, config: DistributedConfig, device: torch.device, *, static_graph: bool
) -> DistributedDataParallel:
    """`model` under DistributedDataParallel: both views in one call, gradients averaged while the backward pass goes on.

    Gradients are views of DDP's buckets. No buffer is broadcast: BatchNorm's are equal on all ranks that share statistics,
    and the checkpoint holds rank 0's.

    Args:
        static_graph: every backward pass is followed by an update; torch's own check fails where micro-batches are not.
    """
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=static_graph,
        **{_SYNC_BUFFERS: False},
    )
    if config.gradient_dtype == "bf16":
        wrapped.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return wrapped
