"""BatchNorm over views and ranks, and networks whose norm, addition and ReLU are one call.

Both views of a batch go through a network at once, rows 0 .. N - 1 view 1, the rest view 2: every convolution then works on
twice the images, casts its weight once and makes one weight gradient. BatchNorm keeps the views apart, so the result is that of a
forward pass per view, as the algorithm has it.

`convert` rewrites a network in place and keeps the names of all its tensors: a state dict fits the plain network too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, GroupNormAct, StdConv2d
from timm.models import ResNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbyol.errors import InputError
from fastbyol.kernels.batch_norm import batch_norm
from fastbyol.kernels.conv import conv2d
from fastbyol.kernels.max_pool import max_pool

_STANDARD_EPS = 1e-6  # added to the variance of a filter

Reduce = Callable[[Tensor], Tensor]  # the mean of a tensor over ranks, differentiable


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d and BatchNorm2d with statistics per view, optionally over several ranks, and with what follows it.

    Evaluation mode is torch's. Training mode takes (V * N, C) or (V * N, C, H, W) and normalizes each of the V views with its own
    mean and variance; the running statistics take one update per view, in order, as V forward passes would.
    """

    views: int = 1
    relu: bool = False
    """Ends with a ReLU."""
    reduce: Reduce | None = None
    """Mean over the ranks that share statistics; None: each rank has its own."""
    ranks: int = 1
    """Number of ranks that `reduce` averages over."""

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm) -> "BatchNorm":
        """One with the same parameters, buffers and constants."""
        own = cls(
            norm.num_features, norm.eps, norm.momentum, affine=True, track_running_stats=True, device=norm.weight.device
        )
        own.weight, own.bias = norm.weight, norm.bias
        own.running_mean, own.running_var = norm.running_mean, norm.running_var
        own.num_batches_tracked = norm.num_batches_tracked
        return own.train(norm.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Norm, plus `residual` (of x's shape), ReLU if it is told to."""
        if not self.training:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            y = y if residual is None else y + residual
            return F.relu(y) if self.relu else y
        y, mean, var = batch_norm(
            x,
            residual,
            self.weight,
            self.bias,
            views=self.views,
            eps=self.eps,
            relu=self.relu,
            reduce=self.reduce,
        )
        # In the middle of a backward pass, checkpointing computes again what has been counted.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self._track(mean, var, x.numel() // (x.shape[1] * self.views) * self.ranks)
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Running statistics of `count` values per channel and view; mean and (biased) var are (V, C)."""
        unbiased = var * (count / max(count - 1, 1))
        for v in range(self.views):
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean[v], momentum)
            self.running_var.lerp_(unbiased[v], momentum)

    def _check_input_dim(self, x: Tensor) -> None:
        """Anything with channels in dimension 1."""


class BatchNormAct(BatchNorm):
    """timm's BatchNormAct2d: dropout and an activation after the norm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Norm, dropout, activation."""
        return self.act(self.drop(super().forward(x, residual)))


class MaxPool(nn.MaxPool2d):
    """The ResNet stem's: 3x3, stride 2, padding 1."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, ceil(H / 2), ceil(W / 2))."""
        return max_pool(x)


class Conv2d(nn.Conv2d):
    """Without bias, groups or dilation, with a square kernel, and with the weight gradient that is fastest for its images."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Conv2d.forward."""
        return conv2d(x, self.weight, self.stride[0], self.padding[0])


class StdLinear(nn.Linear):
    """Uses its rows with mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear.forward."""
        var, mean = torch.var_mean(self.weight, dim=1, correction=0, keepdim=True)
        return F.linear(x, (self.weight - mean) * (var + _STANDARD_EPS).rsqrt(), self.bias)


class FusedBasicBlock(BasicBlock):
    """timm's block with norm, addition and ReLU in one call."""

    def forward(self, x: Tensor) -> Tensor:
        """As BasicBlock.forward."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        return self.bn2(self.conv2(x), shortcut)


class FusedBottleneck(Bottleneck):
    """timm's block with norm, addition and ReLU in one call."""

    def forward(self, x: Tensor) -> Tensor:
        """As Bottleneck.forward."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x))
        x = self.bn2(self.conv2(x))
        return self.bn3(self.conv3(x), shortcut)


def convert(network: nn.Module) -> nn.Module:
    """Gives a network our BatchNorm, and joins norm, addition and ReLU where its forward pass is known.

    Known are timm's ResNets of plain blocks and any Sequential in which a ReLU follows a norm; everything else runs as it is.

    Returns:
        the network, changed in place.

    Raises:
        InputError: it has a norm over the batch that is not plain, so its views could not be kept apart.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, BatchNorm):
                setattr(module, name, _norm(child))
    for module in network.modules():
        if type(module) is nn.Conv2d and _is_simple(module):
            module.__class__ = Conv2d
        elif type(module) is nn.Sequential:
            for k in range(len(module) - 1):
                if type(module[k]) is BatchNorm and type(module[k + 1]) is nn.ReLU:
                    module[k].relu, module[k + 1] = True, nn.Identity()
        elif type(module) in _BLOCKS and _is_plain(module):
            norms, module.__class__ = _BLOCKS[type(module)]
            for norm in norms:
                getattr(module, norm).relu = True
        elif type(module) is ResNet:
            if type(module.bn1) is BatchNorm and type(module.act1) is nn.ReLU:
                module.bn1.relu, module.act1 = True, nn.Identity()
            pool = module.maxpool
            if type(pool) is nn.MaxPool2d and (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1):
                pool.__class__ = MaxPool
    return network


def replace_batch_norms(network: nn.Module, groups: int, name: str) -> None:
    """Replaces every BatchNorm by GroupNorm with as many groups, in place; one group is LayerNorm over channels and places.

    Source: Wu & He 2018 (arXiv 1803.08494), where layer normalization of a convolution's output is the case of one group.

    Args:
        name: of the network, for errors.

    Raises:
        InputError: the groups do not divide a layer's channels, or the norm is of a kind that is not known.
    """
    for path, module in list(network.named_modules()):
        for child, norm in module.named_children():
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            channels = norm.num_features
            if channels % groups:
                where = ".".join(part for part in (name, path, child) if part)
                raise InputError(f"model.norm_groups={groups} does not divide the {channels} channels of {where}")
            if type(norm) is BatchNormAct2d:
                own = GroupNormAct(channels, groups, eps=norm.eps)
                own.drop, own.act = norm.drop, norm.act
            elif type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d):
                own = nn.GroupNorm(groups, channels, eps=norm.eps)
            else:
                raise InputError(f"model.norm: the backbone's {type(norm).__name__} cannot be replaced")
            if norm.affine:  # a block's last norm may start at 0
                with torch.no_grad():
                    own.weight.copy_(norm.weight)
                    own.bias.copy_(norm.bias)
            setattr(module, child, own)


def standardize_weights(network: nn.Module) -> None:
    """Makes every convolution and linear layer use its filters with mean 0 and variance 1, in place.

    Source: Qiao et al. 2019 (arXiv 1903.10520), and in heads Richemond et al. 2020 (arXiv 2010.10241). The factor 1 / sqrt(fan-in) that
    keeps the output's scale is the business of the norm that follows; the loss normalizes what no norm follows.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = StdConv2d
            module.eps = _STANDARD_EPS
        elif type(module) is nn.Linear:
            module.__class__ = StdLinear


def activation_checkpointing(backbone: nn.Module, stages: int) -> None:
    """Keeps of the first `stages` stages' blocks only their inputs and computes the rest again in the backward pass.

    A ResNet has stages 1 to 4; the first hold most of the activations. Other backbones know all or nothing (timm's
    set_grad_checkpointing).

    Raises:
        InputError: the backbone cannot do it.
    """
    if stages == 0:
        return
    if not isinstance(backbone, ResNet):
        try:
            backbone.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            raise InputError(
                f"step.activation_checkpointing={stages}: {type(backbone).__name__} has no gradient checkpointing; set it to 0"
            ) from None
        return
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)[:stages]:
        for block in stage:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def one_view(network: nn.Module) -> nn.Module:
    """The network, changed in place: BatchNorm takes a batch as one view's, as every use but pre-training has it."""
    for norm in batch_norms(network):
        norm.views = 1
    return network


def batch_norms(network: nn.Module) -> list[BatchNorm]:
    """Its norms, in the order of its modules."""
    return [module for module in network.modules() if isinstance(module, BatchNorm)]


_BLOCKS = {
    BasicBlock: (("bn1", "bn2"), FusedBasicBlock),
    Bottleneck: (("bn1", "bn2", "bn3"), FusedBottleneck),
}


def _is_simple(conv: nn.Conv2d) -> bool:
    square = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.dilation)) and (
        isinstance(conv.padding, tuple) and len(set(conv.padding)) == 1
    )
    return square and conv.bias is None and conv.groups == conv.dilation[0] == 1 and conv.padding_mode == "zeros"


def _is_plain(block: nn.Module) -> bool:
    """Whether a block is convolutions, norms, ReLUs and the shortcut alone."""
    norms, _ = _BLOCKS[type(block)]
    acts = [module for name, module in block.named_children() if name.startswith("act")]
    others = [getattr(block, name, None) for name in ("drop_block", "aa", "se", "drop_path")]
    return (
        all(type(getattr(block, name)) is BatchNorm for name in norms)
        and all(type(act) is nn.ReLU for act in acts)
        and all(other is None or type(other) is nn.Identity for other in others)
    )


def _norm(norm: nn.modules.batchnorm._BatchNorm) -> BatchNorm:
    if not norm.affine or not norm.track_running_stats:
        raise InputError(
            f"model.backbone has {norm}: only norms with weight, bias and running statistics are supported"
        )
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d):
        return BatchNorm.of(norm)
    if type(norm) is BatchNormAct2d:
        own = BatchNormAct.of(norm)
        own.drop, own.act = norm.drop, norm.act
        if type(norm.act) is nn.ReLU and type(norm.drop) is nn.Identity:
            own.relu, own.act = True, nn.Identity()
        return own
    raise InputError(
        f"model.backbone has a {type(norm).__name__}, whose statistics cannot be kept per view; choose another backbone"
    )
