"""Backbones: timm's networks, and the changes that make ResNets those of BYOL's authors.

Source: byol/utils/networks.py of google-deepmind/deepmind-research (commit 4822a45) and Haiku's
ResNet. timm's ResNets differ in width, shortcuts, initialization and padding:

- `model.width` widens the stem too.
- `byol_resnet18` and `byol_resnet34` project the shortcut of the first block too.
- gamma of each block's last BatchNorm starts at 0 in bottleneck blocks, and at 1 in basic blocks.
- `model.padding=same` pads as TensorFlow does.
"""

import difflib

import timm
from timm.layers import Conv2dSame
from timm.layers.pool2d_same import MaxPool2dSame
from timm.models import ResNet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from fastbyol.config import STEM_CHANNELS, ModelConfig
from fastbyol.errors import InputError, first_line
from fastbyol.plugins import Factory, backbone_factory

BYOL_RESNETS = {"byol_resnet18": "resnet18", "byol_resnet34": "resnet34"}
"""The authors' ResNets of basic blocks -> timm's."""


_UNSAFE_ARGS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
_OWN_ARGS = ("num_classes", "features_only", "in_chans")


def create_backbone(config: ModelConfig) -> nn.Module:
    """Return a backbone without classifier, with weights from torch's generator.

    It is of timm's modules, or what another package or the user provides (plugins.py).

    Raises:
        InputError: There is no such network, or a setting of `config` does not suit it.
    """
    name = config.backbone
    timm_name = BYOL_RESNETS.get(name, name)
    is_timm = timm.is_model(timm_name)
    factory = None if is_timm else backbone_factory(name)
    backbone = _create_timm(timm_name, config) if factory is None else _create_other(factory, config)
    resnet = backbone if _is_plain(backbone) else None
    if config.width != 1 and factory is not None:
        _require(None, f"model.width={config.width}", "model.width=1", name)
    if config.stem_channels:
        _require(resnet, f"model.stem_channels={config.stem_channels}", "model.stem_channels=0", name)
    channels = config.num_stem_channels
    if factory is None and resnet is not None and channels != resnet.conv1.out_channels:
        _widen_stem(resnet, channels)
    if resnet is not None and name in BYOL_RESNETS:
        _project_first_shortcut(resnet)
    if config.stem == "small":
        _make_stem_small(_require(resnet, "model.stem=small", "model.stem=imagenet", name))
    if config.zero_init_last != "auto" or name in BYOL_RESNETS:
        text = f"model.zero_init_last={str(config.zero_init_last).lower()}"
        zero = config.zero_init_last is True
        _init_last_norms(_require(resnet, text, "model.zero_init_last=auto", name), zero=zero)
    if config.padding == "same":
        pad_same(_require(resnet, "model.padding=same", "model.padding=symmetric", name))
    return backbone


def _create_timm(name: str, config: ModelConfig) -> nn.Module:
    if not timm.is_model(name):
        near = difflib.get_close_matches(config.backbone, [*BYOL_RESNETS, *timm.list_models()], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `timm.list_models()` lists all models"
        raise InputError(f"model.backbone={config.backbone!r}: timm has no such model{hint}")
    args = config.backbone_args
    if refused := [key for key in args if key in (*_UNSAFE_ARGS, *_OWN_ARGS)]:
        remedy = "--init loads weights" if refused[0] in _UNSAFE_ARGS else "fastbyol sets it"
        raise InputError(f"model.backbone_args.{refused[0]}: is not accepted: {remedy}")
    options = {}
    if config.width != 1:
        widths = [float(STEM_CHANNELS) * config.width * 2**k for k in range(4)]
        if not all(w.is_integer() and w >= 1 for w in widths):
            raise InputError(f"model.width={config.width}: 64 * width must be a whole number of channels")
        options["channels"] = tuple(int(w) for w in widths)
    try:
        return timm.create_model(name, num_classes=0, **args, **options)
    except TypeError as error:
        if options and not args:
            raise InputError(
                f"model.width={config.width}: {config.backbone} has no width multiplier; set model.width=1"
            ) from None
        raise InputError(f"model.backbone_args={args}: {config.backbone}: {first_line(error)}") from None
    except Exception as error:  # timm's networks raise anything for unsuitable arguments
        if not args:
            raise
        raise InputError(f"model.backbone_args={args}: {config.backbone}: {first_line(error)}") from None


def _create_other(factory: Factory, config: ModelConfig) -> nn.Module:
    """Call a user's or a package's factory."""
    try:
        backbone = factory(**config.backbone_args)
    except InputError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"model.backbone={config.backbone}: its function raised {text}") from error
    if not isinstance(backbone, nn.Module):
        raise InputError(
            f"model.backbone={config.backbone}: its function returned a {type(backbone).__name__}, not a torch.nn.Module"
        )
    return backbone


def _is_plain(backbone: nn.Module) -> bool:
    """Return True for a ResNet with the stem and the blocks of torchvision's."""
    return (
        type(backbone) is ResNet
        and type(backbone.conv1) is nn.Conv2d
        and type(backbone.bn1) is nn.BatchNorm2d
        and type(backbone.maxpool) is nn.MaxPool2d
        and isinstance(backbone.layer1[0], BasicBlock | Bottleneck)
    )


def _require(resnet: ResNet | None, setting: str, remedy: str, name: str) -> ResNet:
    if resnet is None:
        raise InputError(f"{setting} needs a plain ResNet; set {remedy} for {name}")
    return resnet


def _conv(*args: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    """Return a convolution with the initial weights of timm's ResNets."""
    conv = nn.Conv2d(*args, stride=stride, padding=padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _widen_stem(resnet: ResNet, channels: int) -> None:
    """Set the number of channels between stem and first block, in place."""
    first = resnet.layer1[0]
    outputs = resnet.feature_info[1]["num_chs"]
    resnet.conv1, resnet.bn1 = _conv(3, channels, 7, stride=2, padding=3), nn.BatchNorm2d(channels)
    resnet.feature_info[0]["num_chs"] = channels
    conv = first.conv1
    first.conv1 = _conv(channels, conv.out_channels, conv.kernel_size[0], padding=conv.padding[0])
    first.downsample = None if channels == outputs else _projection(channels, outputs)


def _project_first_shortcut(resnet: ResNet) -> None:
    channels = resnet.feature_info[1]["num_chs"]
    resnet.layer1[0].downsample = _projection(resnet.conv1.out_channels, channels)


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, outputs, 1), nn.BatchNorm2d(outputs))


def _make_stem_small(resnet: ResNet) -> None:
    """Replace the stem by a 3x3 convolution of stride 1 without max-pool, in place."""
    resnet.conv1 = _conv(3, resnet.conv1.out_channels, 3, padding=1)
    resnet.maxpool = nn.Identity()


def _init_last_norms(resnet: ResNet, *, zero: bool) -> None:
    """Set gamma of the last BatchNorm of every block to 0 or 1, in place."""
    for block in resnet.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            nn.init.constant_(last.weight, 0.0 if zero else 1.0)


def has_same_padding(backbone: nn.Module) -> bool:
    """Return True if a network has been changed by `pad_same`, with fused layers or not."""
    return any(isinstance(m, Conv2dSame) or getattr(m, "same", False) for m in backbone.modules())


def pad_same(resnet: ResNet) -> None:
    """Give the stem, the max-pool and the strided 3x3 convolutions TensorFlow's SAME padding, in
    place.

    An even side is then padded by one pixel less before it than after it. An odd side, a stride of
    1 and 1x1 convolutions are padded as before.
    """
    for module in resnet.modules():
        if type(module) is nn.Conv2d and module.stride != (1, 1) and module.kernel_size != (1, 1):
            module.__class__, module.padding = Conv2dSame, (0, 0)
    if type(resnet.maxpool) is nn.MaxPool2d:
        resnet.maxpool = MaxPool2dSame(3, 2)
