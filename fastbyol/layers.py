"""Fused layers: BatchNorm with statistics per view, and timm's blocks with BatchNorm, addition and
ReLU in one call.

Both views of a batch go through a network at once: rows 0 .. N - 1 are view 1, the rest is view 2.
Every convolution then works on twice the images, casts its weight once, and computes one weight
gradient. BatchNorm keeps the views apart, so the result equals one forward pass per view, as the
algorithm requires.

`fuse_layers` rewrites a network in place and keeps the names of all tensors: a state dict also fits
the plain network.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, pad_same
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models import ResNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbyol.errors import InputError
from fastbyol.kernels.batch_norm import (
    batch_norm,
    batch_norm_gpu,
    batch_norm_gpu_statistics,
    has_gpu_kernels,
    mean_and_var,
)
from fastbyol.kernels.batch_norm_torch import Norm
from fastbyol.kernels.conv import Tile, conv2d, has_gpu_products
from fastbyol.kernels.max_pool import max_pool

Reduce = Callable[[Tensor], Tensor]  # mean over ranks, differentiable


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d and BatchNorm2d with statistics per view, optionally synchronized over ranks,
    with fused addition and ReLU.

    Training mode takes (V * N, C) or (V * N, C, H, W) and normalizes each of the V views with its
    own mean and variance. The running statistics take one update per view, in order, as V forward
    passes would do. Evaluation mode is torch's.
    """

    views: int = 1
    relu: bool = False
    """Apply a ReLU at the end."""
    fork: bool = False
    """The output has two consumers. Training on a GPU then returns it twice, (y, y), so that the
    backward kernel adds their gradients."""
    reduce: Reduce | None = None
    """Mean over the ranks that share statistics. None: each rank has its own."""
    ranks: int = 1
    """Number of ranks that share statistics."""

    @classmethod
    def from_torch(cls, norm: nn.modules.batchnorm._BatchNorm) -> "BatchNorm":
        """Return a layer that shares the parameters, buffers and constants of `norm`."""
        own = cls(
            norm.num_features, norm.eps, norm.momentum, affine=True, track_running_stats=True, device=norm.weight.device
        )
        own.weight, own.bias = norm.weight, norm.bias
        own.running_mean, own.running_var = norm.running_mean, norm.running_var
        own.num_batches_tracked = norm.num_batches_tracked
        return own.train(norm.training)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        residual_norm: "BatchNorm | None" = None,
        *,
        pool: bool = False,
        same: bool = False,
        stats: Tensor | None = None,
        residual_stats: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalize, add `residual` (shape of x), apply ReLU if `relu`.

        Args:
            residual_norm: norm of the residual, applied before the addition.
            pool: apply the stem's max-pool at the end; only if `pools(x)`.
            same: padding of the max-pool, see `MaxPool`.
            stats: statistics of x on this rank, if `convolve` returned them.
            residual_stats: the same of a residual that is normalized.
        """
        if self.training and has_gpu_kernels(x):
            return self._fused(
                x, residual, residual_norm, pool=pool, same=same, stats=stats, residual_stats=residual_stats
            )
        if residual_norm is not None:
            residual = residual_norm(residual)
        if not self.training:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            y = y if residual is None else y + residual
            return F.relu(y) if self.relu else y
        y, mean, var = self.normalize(x, residual)
        if not _is_recomputed():
            self._update_running_stats(mean, var, x)
        return y

    def pools(self, x: Tensor) -> bool:
        """Return True if `forward` can apply the stem's max-pool to the result for `x`."""
        return self.training and self.relu and has_gpu_kernels(x)

    def _fused(
        self, x: Tensor, residual: Tensor | None, residual_norm: "BatchNorm | None", **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Implement `forward` with the kernels of a GPU, for training."""
        fork = self.fork and torch.is_grad_enabled()
        y, *statistics = batch_norm_gpu(
            x,
            self._for_kernel(),
            residual,
            None if residual_norm is None else residual_norm._for_kernel(),
            views=self.views,
            relu=self.relu,
            reduce=self.reduce,
            fork=fork,
            **options,
        )
        for norm, stats in zip((self, residual_norm), statistics, strict=True):
            if norm is not None:
                norm._update_unless_kernel_does(stats, x)
        return y if fork else y[0]

    def measure(self, x: Tensor) -> Tensor:
        """Return the statistics (3, V, C) of x over all ranks, as the kernels of a GPU take them,
        and update the running statistics.
        """
        stats = batch_norm_gpu_statistics(x, self._for_kernel(), views=self.views, reduce=self.reduce)
        self._update_unless_kernel_does(stats, x)
        return stats

    def _update_unless_kernel_does(self, stats: Tensor, x: Tensor) -> None:
        if not self._is_updated_by_kernel() and not _is_recomputed():
            self._update_running_stats(*mean_and_var(stats), x)

    def _is_updated_by_kernel(self) -> bool:
        return self.reduce is None and self.momentum is not None

    def _for_kernel(self) -> Norm:
        if not self._is_updated_by_kernel() or _is_recomputed():
            return Norm(self.weight, self.bias, self.eps)
        running = self.running_mean, self.running_var, self.num_batches_tracked
        return Norm(self.weight, self.bias, self.eps, *running, self.momentum)

    def normalize(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output and the batch's mean and biased variance (V, C)."""
        return batch_norm(
            x,
            residual,
            self.weight,
            self.bias,
            views=self.views,
            eps=self.eps,
            relu=self.relu,
            reduce=self.reduce,
        )

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, var: Tensor, x: Tensor) -> None:
        """Update from mean and biased variance (V, C) of x, over the ranks that share them."""
        count = x.numel() // (x.shape[1] * self.views) * self.ranks
        unbiased = var * (count / max(count - 1, 1))
        for v in range(self.views):
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean[v], momentum)
            self.running_var.lerp_(unbiased[v], momentum)

    def _check_input_dim(self, x: Tensor) -> None:
        """Accept any input with channels in dimension 1."""


class BatchNormAct(BatchNorm):
    """timm's BatchNormAct2d: norm, dropout, activation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Apply norm, dropout and activation."""
        return self.act(self.drop(super().forward(x, *args, **kwargs)))


class MaxPool(nn.MaxPool2d):
    """Max-pool of the ResNet stem: 3x3, stride 2."""

    same: bool = False
    """TensorFlow's SAME padding instead of 1 on all sides."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2))."""
        return max_pool(x, same=self.same)


class Conv2d(nn.Conv2d):
    """Square convolution without bias, groups or dilation, with the fastest weight gradient for its
    image size.
    """

    same: bool = False
    """TensorFlow's SAME padding, added to `padding`."""

    tile: Tile | None = None
    """Of the 1x1 convolution that also computes the statistics of the norm after it, for training
    on a GPU. None: torch's convolution."""
    norm_tile: Tile | None = None
    """The same with the norm before it applied to its input, where no gradient is needed. None: the
    norm runs on its own."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Conv2d.forward."""
        if self.same:
            x = pad_same(x, self.kernel_size, self.stride)
        return conv2d(x, self.weight, self.stride[0], self.padding[0])


def convolve(conv: nn.Module, norm: BatchNorm, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return conv(x), and its statistics for `norm` if the kernel computes them."""
    if type(conv) is not Conv2d or conv.tile is None or not (norm.training and has_gpu_products(x)):
        return conv(x), None
    from fastbyol.kernels.triton.conv1x1 import conv1x1

    weight, stride = conv.weight.to(x.dtype), conv.stride[0]
    return conv1x1(x, weight, norm._for_kernel(), stride=stride, views=norm.views, tile=conv.tile)


def normalize_and_convolve(
    before: BatchNorm, conv: nn.Module, norm: BatchNorm, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return `convolve` of the result of `before` for x."""
    fused = type(conv) is Conv2d and conv.norm_tile is not None and before.relu and not torch.is_grad_enabled()
    if not (fused and norm.training and has_gpu_products(x)):
        return convolve(conv, norm, before(x))
    from fastbyol.kernels.triton.conv1x1 import norm_conv1x1

    weight, stats = conv.weight.to(x.dtype), before.measure(x)
    return norm_conv1x1(
        x, before._for_kernel(), stats, weight, norm._for_kernel(), views=norm.views, tile=conv.norm_tile
    )


Forked = Tensor | tuple[Tensor, Tensor]
"""A tensor, or the same tensor for two consumers (`BatchNorm.fork`)."""


class FusedBasicBlock(BasicBlock):
    """timm's block with fused norm, addition and ReLU."""

    def forward(self, x: Forked) -> Forked:
        """As BasicBlock.forward."""
        x, shortcut = x if isinstance(x, tuple) else (x, x)
        residual = _shortcut(self.downsample, shortcut)
        x = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(x), **residual)


class FusedBottleneck(Bottleneck):
    """timm's block with fused norm, addition and ReLU."""

    def forward(self, x: Forked) -> Forked:
        """As Bottleneck.forward."""
        x, shortcut = x if isinstance(x, tuple) else (x, x)
        residual = _shortcut(self.downsample, shortcut)
        x, stats = convolve(self.conv1, self.bn1, x)
        x = self.conv2(self.bn1(x, stats=stats))
        x, stats = normalize_and_convolve(self.bn2, self.conv3, self.bn3, x)
        return self.bn3(x, stats=stats, **residual)


def _shortcut(downsample: nn.Module | None, x: Tensor) -> dict[str, Any]:
    """Return a block's residual, and the norm that it still needs, as arguments of BatchNorm."""
    if downsample is None:
        return {"residual": x}
    if not _ends_in_norm(downsample):
        return {"residual": downsample(x)}
    *others, conv, norm = downsample
    for module in others:
        x = module(x)
    x, stats = convolve(conv, norm, x)
    return {"residual": x, "residual_norm": norm, "residual_stats": stats}


def _ends_in_norm(downsample: nn.Module) -> bool:
    return type(downsample) is nn.Sequential and len(downsample) > 1 and type(downsample[-1]) is BatchNorm


class FusedResNet(ResNet):
    """timm's ResNet with fused norm, ReLU and max-pool in its stem."""

    def forward_features(self, x: Tensor) -> Tensor:
        """As ResNet.forward_features."""
        x = self.conv1(x)
        x = self.bn1(x, pool=True, same=self.maxpool.same) if self.bn1.pools(x) else self.maxpool(self.bn1(x))
        for stage in _stages(self):
            x = stage(x)
        return x


def fuse_layers(network: nn.Module) -> nn.Module:
    """Replace every BatchNorm by ours and fuse norm, addition and ReLU where possible, in place.

    Fused are timm's ResNets of plain blocks, and a ReLU that follows a norm in a Sequential.
    Everything else runs unchanged.

    Returns:
        The same network.

    Raises:
        InputError: a BatchNorm of an unsupported type, whose statistics could not be kept per view.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, BatchNorm):
                setattr(module, name, _to_batch_norm(child))
    for module in network.modules():
        if type(module) in (nn.Conv2d, Conv2dSame) and _can_use_conv2d(module):
            same = type(module) is Conv2dSame
            module.__class__, module.same = Conv2d, same
        elif type(module) is nn.Sequential:
            for k in range(len(module) - 1):
                if type(module[k]) is BatchNorm and type(module[k + 1]) is nn.ReLU:
                    module[k].relu, module[k + 1] = True, nn.Identity()
        elif type(module) in _BLOCKS and _is_plain_block(module):
            norms, module.__class__ = _BLOCKS[type(module)]
            for norm in norms:
                getattr(module, norm).relu = True
        elif type(module) is ResNet:
            if type(module.bn1) is BatchNorm and type(module.act1) is nn.ReLU:
                module.bn1.relu, module.act1 = True, nn.Identity()
            pool = module.maxpool
            if type(pool) in (nn.MaxPool2d, MaxPool2dSame) and _can_use_max_pool(pool):
                same = type(pool) is MaxPool2dSame
                pool.__class__, pool.same = MaxPool, same
                if type(module.bn1) is BatchNorm and module.bn1.relu:
                    module.__class__ = FusedResNet
    for module in network.modules():
        if isinstance(module, ResNet):
            for stage in _stages(module):
                _fork_between(stage)
    return network


def pointwise_convs(network: nn.Module) -> Iterator[tuple[Conv2d, bool]]:
    """Yield the 1x1 convolutions whose result goes to a BatchNorm alone (`convolve`).

    Yields:
        The convolution, and whether its input comes from a BatchNorm and ReLU alone.
    """
    for module in network.modules():
        convs = []
        if type(module) is FusedBottleneck:
            convs = [(module.conv1, False), (module.conv3, True)]
        if type(module) in _FUSED and module.downsample is not None and _ends_in_norm(module.downsample):
            convs.append((module.downsample[-2], False))
        for conv, after_norm in convs:
            if type(conv) is Conv2d and conv.kernel_size == (1, 1) and conv.padding == (0, 0):
                yield conv, after_norm


def fork_between_stages(network: nn.Module, enabled: bool = True) -> None:
    """Return outputs twice (`BatchNorm.fork`) between the stages of ResNets too, in place.

    `fuse_layers` does so within stages only, since others may read a stage's output.
    """
    for module in network.modules():
        if isinstance(module, ResNet):
            stages = _stages(module)
            for stage, after in itertools.pairwise(stages):
                _fork_between((stage[-1], after[0]), enabled)
            if type(module) is FusedResNet and type(stages[0][0]) in _FUSED:
                module.bn1.fork = enabled


def _fork_between(blocks: Iterable[nn.Module], enabled: bool = True) -> None:
    for block, after in itertools.pairwise(blocks):
        if type(block) in _FUSED and type(after) in _FUSED:
            getattr(block, _FUSED[type(block)]).fork = enabled


def _stages(backbone: ResNet) -> tuple[nn.Sequential, ...]:
    return backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4


def activation_checkpointing(backbone: nn.Module, stages: int) -> None:
    """Save only the blocks' inputs of the first `stages` stages; backward recomputes the rest.

    A ResNet has stages 1 to 4, and the first hold most of the activations. Other backbones
    checkpoint all stages or none (timm's set_grad_checkpointing).

    Raises:
        InputError: the backbone does not support it.
    """
    if stages == 0:
        return
    if not isinstance(backbone, ResNet):
        try:
            backbone.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            raise InputError(
                f"step.activation_checkpointing={stages}: {type(backbone).__name__} does not support it; set it to 0"
            ) from None
        return
    for stage in _stages(backbone)[:stages]:
        for block in stage:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def set_num_views(network: nn.Module, views: int) -> nn.Module:
    """Set the number of views in a batch for all BatchNorm layers, in place.

    Everything but pre-training uses 1.
    """
    for norm in batch_norms(network):
        norm.views = views
    return network


def batch_norms(network: nn.Module) -> list[BatchNorm]:
    """Return all BatchNorm layers, in module order."""
    return [module for module in network.modules() if isinstance(module, BatchNorm)]


_BLOCKS = {
    BasicBlock: (("bn1", "bn2"), FusedBasicBlock),
    Bottleneck: (("bn1", "bn2", "bn3"), FusedBottleneck),
}
_FUSED = {fused: norms[-1] for norms, fused in _BLOCKS.values()}
"""Fused block -> name of its last norm."""


def _is_recomputed() -> bool:
    """Return True in the second forward pass of activation checkpointing, during backward.

    It must not update running statistics again. Compiled code updates them once.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _can_use_conv2d(conv: nn.Conv2d) -> bool:
    square = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.dilation)) and (
        isinstance(conv.padding, tuple) and len(set(conv.padding)) == 1
    )
    return square and conv.bias is None and conv.groups == conv.dilation[0] == 1 and conv.padding_mode == "zeros"


def _can_use_max_pool(pool: nn.MaxPool2d) -> bool:
    if type(pool) is MaxPool2dSame:
        return (pool.kernel_size, pool.stride) == ((3, 3), (2, 2))
    return (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)


def _is_plain_block(block: nn.Module) -> bool:
    """Return True if a block holds only convolutions, norms, ReLUs and the shortcut."""
    norms, _ = _BLOCKS[type(block)]
    acts = [module for name, module in block.named_children() if name.startswith("act")]
    others = [getattr(block, name, None) for name in ("drop_block", "aa", "se", "drop_path")]
    return (
        all(type(getattr(block, name)) is BatchNorm for name in norms)
        and all(type(act) is nn.ReLU for act in acts)
        and all(other is None or type(other) is nn.Identity for other in others)
    )


def _to_batch_norm(norm: nn.modules.batchnorm._BatchNorm) -> BatchNorm:
    if not norm.affine or not norm.track_running_stats:
        raise InputError(
            f"model.backbone has {norm}: only norms with weight, bias and running statistics are supported"
        )
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d):
        return BatchNorm.from_torch(norm)
    if type(norm) is BatchNormAct2d:
        own = BatchNormAct.from_torch(norm)
        own.drop, own.act = norm.drop, norm.act
        if type(norm.act) is nn.ReLU and type(norm.drop) is nn.Identity:
            own.relu, own.act = True, nn.Identity()
        return own
    raise InputError(
        f"model.backbone has a {type(norm).__name__}, whose statistics cannot be kept per view; choose another backbone"
    )
