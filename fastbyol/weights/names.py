"""Tensor names of other libraries.

Checkpoints (after the prefix "online.backbone.") and fastbyol's own files use timm's names. timm
itself renames torchvision's VGG only, and only in pre-trained weights that it downloads.
"""

import re
from typing import NamedTuple

from timm.models import VGG, ConvNeXt, VisionTransformer
from torch import Tensor, nn

Tensors = dict[str, Tensor]


class Naming(NamedTuple):
    """Tensor names that torchvision uses for one family of backbones."""

    substitutions: tuple[tuple[str, str], ...]
    """Regular expressions and replacements that turn torchvision's names into timm's, in order."""
    reshaped: tuple[str, ...]
    """timm's names, or their ends, of tensors that have another shape in torchvision."""
    classifier: str
    """torchvision's name of the classifier, which backbones do not have."""
    marker: str
    """A tensor that only torchvision's files contain."""

    def timm_name(self, name: str) -> str:
        """Return timm's name of a tensor of torchvision. Unknown names are kept."""
        for pattern, replacement in self.substitutions:
            name = re.sub(pattern, replacement, name)
        return name

    def to_timm(self, tensors: Tensors, expected: Tensors) -> Tensors:
        """Rename torchvision's tensors to timm's names and shapes.

        Args:
            tensors: torchvision's tensors.
            expected: State dict of the timm model, which gives the shapes.
        """
        renamed = {self.timm_name(name): tensor for name, tensor in tensors.items()}
        for name, tensor in renamed.items():
            if name.endswith(self.reshaped) and name in expected and expected[name].numel() == tensor.numel():
                renamed[name] = tensor.reshape(expected[name].shape)
        return renamed

    def to_torchvision(self, tensors: Tensors, expected: Tensors) -> Tensors:
        """Rename timm's tensors to torchvision's names and shapes.

        Args:
            tensors: timm's tensors.
            expected: State dict of the torchvision model, with or without values.

        Raises:
            KeyError: The torchvision model has no such tensor.
        """
        names = {self.timm_name(name): name for name in expected}
        return {names[name]: tensor.reshape(expected[names[name]].shape) for name, tensor in tensors.items()}


TORCHVISION: dict[type[nn.Module], Naming] = {
    VGG: Naming(
        ((r"^classifier\.0\.", "pre_logits.fc1."), (r"^classifier\.3\.", "pre_logits.fc2.")),
        reshaped=("fc1.weight", "fc2.weight"),  # convolutions with kernels of 7x7 and 1x1 in timm
        classifier="classifier.6",
        marker="classifier.0.weight",
    ),
    VisionTransformer: Naming(
        (
            (r"^class_token$", "cls_token"),
            (r"^conv_proj\.", "patch_embed.proj."),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^encoder\.ln\.", "norm."),
            (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
            (r"\.ln_(\d)\.", r".norm\1."),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.0\.", ".mlp.fc1."),
            (r"\.mlp\.3\.", ".mlp.fc2."),
        ),
        reshaped=(),
        classifier="heads.head",
        marker="class_token",
    ),
    ConvNeXt: Naming(
        (
            (r"^features\.0\.", "stem."),
            *((rf"^features\.{2 * stage}\.", f"stages.{stage}.downsample.") for stage in (1, 2, 3)),
            *((rf"^features\.{2 * stage + 1}\.", f"stages.{stage}.blocks.") for stage in (0, 1, 2, 3)),
            (r"\.layer_scale$", ".gamma"),  # (C, 1, 1) in torchvision, (C,) in timm
            (r"\.block\.0\.", ".conv_dw."),
            (r"\.block\.2\.", ".norm."),
            (r"\.block\.3\.", ".mlp.fc1."),
            (r"\.block\.5\.", ".mlp.fc2."),
            (r"^classifier\.0\.", "head.norm."),
        ),
        reshaped=(".gamma",),
        classifier="classifier.2",
        marker="features.0.0.weight",
    ),
}
"""torchvision's names, by timm's model class. Those of ResNets are the same in both libraries."""


def torchvision_naming(backbone: nn.Module) -> Naming | None:
    """Return torchvision's names for a timm backbone, None if they are the same as timm's."""
    return next((naming for kind, naming in TORCHVISION.items() if isinstance(backbone, kind)), None)


def detectron2_name(name: str) -> str:
    """Return detectron2's name for a tensor of a timm ResNet."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"bn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
