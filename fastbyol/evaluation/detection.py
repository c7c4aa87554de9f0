"""Object detection: torchvision's Faster R-CNN with a feature pyramid, on a COCO-format folder.

Source: Ren et al. 2015 (arXiv 1506.01497) and Lin et al. 2017 (arXiv 1612.03144). The backbone is
frozen, or its last stages are trained; its norm layers stay in eval mode. The pyramid takes the
backbone's last four maps of different sizes (layer1 to layer4 of a ResNet), at least three. Metric:
COCO's mAP, by torchmetrics.

Hyperparameters scale with the shorter side S of the images and with the backbone, so that S = 800
and a ResNet-50 give torchvision's own detector:

- Anchor sides are 0.64 S, 0.32 S, ... from the coarsest level with at least 5 x 5 positions to the
  finest.
- The pyramid has 1/8 of the channels of the backbone's last map (64 to 256), the box head four
  times as many units.
- RoIAlign takes 2 samples per bin and direction; 1 below 600 px, where boxes cover few positions.
- Proposals and training boxes per image scale with the number of pixels, with at least 256 and 32.

Images are resized to a shorter side of S, with a longer side of at most 1333/800 S. Training images
are flipped at random. Crowds are excluded from training, and detections on them are ignored.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fastbyol.config import Config
from fastbyol.errors import InputError
from fastbyol.evaluation import dense
from fastbyol.evaluation.coco import CocoFolder, CocoImage, open_coco
from fastbyol.evaluation.context import EvalContext, Row
from fastbyol.evaluation.image_files import read_pixels, resize
from fastbyol.evaluation.options import DetectionEval
from fastbyol.kernels.augment_params import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.precision import autocast
from fastbyol.runtime.device import seeded
from fastbyol.runtime.distributed import World

LARGEST_ANCHOR = 0.64  # of the shorter side; torchvision: 512 of 800 px
MAX_ASPECT = 1333 / 800  # longest side, in shorter sides
MIN_LEVEL_SIDE = 5  # positions per side of a level with anchors
MIN_MAPS, MAX_MAPS = 3, 4  # of the backbone, that the pyramid takes
_REFERENCE_SIZE = 800  # torchvision's
_POOLED_SIDE = 7  # of RoIAlign
_SAMPLES = 2  # of RoIAlign per bin and direction, at the reference size
_SIZE_DIVISOR = 32  # torchvision pads images to multiples of it
_MIN_BOXES, _BOXES = 32, 512  # per image: minimum, and at the reference size
_MIN_PROPOSALS, _PROPOSALS = 256, 2000


class _Transform(GeneralizedRCNNTransform):
    """Pads the images of a training batch to the largest of all ranks, as one rank would."""

    world = World()

    def max_by_axis(self, the_list: list[list[int]]) -> list[int]:
        """Return the largest size along each axis."""
        sizes = super().max_by_axis(the_list)
        if not self.training or self.world.size == 1:
            return sizes
        return self.world.maximum(torch.tensor(sizes)).tolist()


class _Sampler(BalancedPositiveNegativeSampler):
    """Draws the anchors or proposals of an image from its own seed, on whatever rank it is."""

    drawn = 0
    """Number of samples of the last batch."""

    def begin(self, seed: Sequence[int], first: int) -> None:
        """Prepare for a batch; its images have the numbers first, first + 1, ..."""
        self._seed, self._first = seed, first

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return masks of the positive and negative samples of each image."""
        found: tuple[list[Tensor], list[Tensor]] = [], []
        for k, matched in enumerate(matched_idxs, start=self._first):
            torch.manual_seed(np.random.SeedSequence([*self._seed, k]).generate_state(1, np.uint64)[0])
            for masks, (mask,) in zip(found, super().__call__([matched]), strict=True):
                masks.append(mask)
        self.drawn = sum(int(mask.sum()) for masks in found for mask in masks)
        return found


class Pyramid(nn.Module):
    """Backbone and feature pyramid: images (n, 3, H, W) -> levels by name, finest first.

    It has the interface that torchvision expects of a backbone.
    """

    def __init__(self, maps: dense.FeatureMaps, shapes: list[dense.MapShape], dtype: torch.dtype) -> None:
        super().__init__()
        self.maps, self.dtype = maps, dtype
        self.out_channels = dense.head_channels(shapes[-1])
        self.fpn = FeaturePyramidNetwork(
            [shape.channels for shape in shapes], self.out_channels, extra_blocks=LastLevelMaxPool()
        )
        sides = {str(k): shape.side for k, shape in enumerate(shapes)} | {"pool": -(-shapes[-1].side // 2)}
        self.levels = [name for name, side in sides.items() if side >= MIN_LEVEL_SIDE] or ["0"]

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Return the levels with anchors, float32 (n, out_channels, h, w).

        The other, coarser levels contribute through the top-down path.
        """
        with autocast(images.device, self.dtype):
            maps = self.maps(images)
        levels = self.fpn(OrderedDict((str(k), x.float()) for k, x in enumerate(maps)))
        return OrderedDict((name, levels[name]) for name in self.levels)


def build_detector(
    backbone: nn.Module, size: int, classes: int, *, dtype: torch.dtype, trainable_stages: int = 0
) -> FasterRCNN:
    """Return Faster R-CNN on a copy of the backbone, in eval mode.

    Args:
        size: shorter side of the images, S.
        dtype: autocast dtype of the backbone.

    Raises:
        InputError: the backbone has too few maps or takes only square images.
    """
    own = dense.frozen_copy(backbone, size)
    shapes = dense.map_shapes(own, size)[-MAX_MAPS:]
    if len(shapes) < MIN_MAPS:
        raise InputError(
            f"model.backbone: {type(own).__name__} has maps of {len(shapes)} size(s), detection needs {MIN_MAPS}; "
            "use a backbone whose stages halve the image"
        )
    # Raises for a backbone that takes only square images.
    dense.map_shapes(own, size, extra_width=_SIZE_DIVISOR)
    _unfreeze(own, size, trainable_stages)
    pyramid = Pyramid(dense.FeatureMaps(own, shapes), shapes, dtype)
    levels, area = len(pyramid.levels), (size / _REFERENCE_SIZE) ** 2
    sides = [LARGEST_ANCHOR * size / 2**k for k in reversed(range(levels))]
    proposals, boxes = max(_MIN_PROPOSALS, round(_PROPOSALS * area)), max(_MIN_BOXES, round(_BOXES * area))
    samples = max(1, round(_SAMPLES * size / _REFERENCE_SIZE))
    hidden = 4 * pyramid.out_channels
    detector = FasterRCNN(
        pyramid,
        min_size=size,
        max_size=longest_side(size),
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in sides), ((0.5, 1.0, 2.0),) * levels),
        rpn_pre_nms_top_n_train=proposals,
        rpn_post_nms_top_n_train=proposals,
        rpn_pre_nms_top_n_test=proposals // 2,
        rpn_post_nms_top_n_test=proposals // 2,
        box_roi_pool=MultiScaleRoIAlign(
            [name for name in pyramid.levels if name != "pool"], _POOLED_SIDE, sampling_ratio=samples
        ),
        box_head=TwoMLPHead(pyramid.out_channels * _POOLED_SIDE**2, hidden),
        box_predictor=FastRCNNPredictor(hidden, 1 + classes),
        box_batch_size_per_image=boxes,
    )
    return detector.to(next(own.parameters()).device).eval()


def share_batches(detector: FasterRCNN, world: World) -> list[_Sampler]:
    """Prepare a detector for batches that ranks share; return its samplers: anchors, proposals."""
    old = detector.transform
    detector.transform = _Transform(old.min_size, old.max_size, old.image_mean, old.image_std)
    detector.transform.world = world
    for part in (detector.rpn, detector.roi_heads):
        part.fg_bg_sampler = _Sampler(part.fg_bg_sampler.batch_size_per_image, part.fg_bg_sampler.positive_fraction)
    return [detector.rpn.fg_bg_sampler, detector.roi_heads.fg_bg_sampler]


def longest_side(size: int) -> int:
    """Return the limit of the longer side in pixels, for a shorter side of `size`."""
    return round(size * MAX_ASPECT)


def _unfreeze(backbone: nn.Module, size: int, stages: int) -> None:
    """Make the last `stages` stages trainable: all parameters after the last frozen stage's map."""
    if stages == 0:
        return
    parameters = list(backbone.requires_grad_(True).parameters())
    image = torch.zeros(1, 3, size, size, device=parameters[0].device)
    maps = backbone.forward_intermediates(image, intermediates_only=True)
    if stages < len(maps):
        gradients = torch.autograd.grad(maps[-1 - stages].sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is None)  # not used by the frozen stages


def evaluate_detector(
    detector: nn.Module, folder: CocoFolder, size: int, context: EvalContext, *, batch_size: int
) -> Row:
    """Return COCO's mAP, and mAP at IoU 0.5 and 0.75, on the validation images.

    Args:
        detector: list of images (3, H, W) in [0, 1] -> per image boxes (m, 4), labels (m,) and
            scores (m,).
    """
    found: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []  # number of the image, detections, objects
    batches = dense.validation_batches(folder.val, partial(_sample, size=size, flip=False), batch_size, context)
    first = context.world.rank * batch_size
    with torch.no_grad():
        for images, targets in batches:
            detections = detector([image.to(context.device) for image in images])
            on_host = ({key: value.cpu() for key, value in one.items()} for one in detections)
            found += zip(range(first, first + len(images)), on_host, targets, strict=True)
            first += context.world.size * batch_size
    # All ranks compute the same, in the order of the images: ties of scores depend on it.
    ordered = sorted(itertools.chain.from_iterable(context.world.gather(found)), key=lambda item: item[0])
    metric = MeanAveragePrecision(backend="pycocotools", sync_on_compute=False)
    for _, detections, objects in ordered:
        metric.update([detections], [objects])
    values = metric.compute()
    return {name: values[key].item() for name, key in (("map", "map"), ("map50", "map_50"), ("map75", "map_75"))}


class DetectionTask(dense.DenseTask):
    """Object detection."""

    name = "detection"
    title = "Object detection"

    def open(self, options: DetectionEval, config: Config, context: EvalContext) -> CocoFolder:
        """Open the COCO-format folder `options.root`."""
        return open_coco(Path(str(options.root)), context)

    def measure(self, backbone: nn.Module, data: CocoFolder, options: DetectionEval, context: EvalContext) -> Row:
        """Train a detector; return mAP, and mAP at IoU 0.5 and 0.75."""
        size = dense.resolve_image_size(options.image_size_px, context)
        with seeded(options.seed, context.device):
            detector = build_detector(
                backbone,
                size,
                len(data.classes),
                dtype=context.training_dtype,
                trainable_stages=options.trainable_stages,
            ).train()
            detector.backbone.maps.eval()
            world, samplers, steps = context.world, share_batches(detector, context.world), itertools.count()

            def loss_of(batch: list[tuple[Tensor, dict[str, Tensor]]]) -> Tensor:
                images = [image.to(context.device) for image, _ in batch]
                targets = [{key: target[key].to(context.device) for key in ("boxes", "labels")} for _, target in batch]
                step = next(steps)
                for k, sampler in enumerate(samplers):
                    sampler.begin([options.seed, step, k], first=world.rank * len(batch))
                losses = detector(images, targets)
                # torchvision's losses are means over this rank's samples, which differ in number.
                drawn = torch.tensor([float(sampler.drawn) for sampler in samplers], device=context.device)
                weights = drawn / world.mean(drawn).clamp(min=1 / world.size)
                anchors = losses["loss_objectness"] + losses["loss_rpn_box_reg"]
                proposals = losses["loss_classifier"] + losses["loss_box_reg"]
                return weights[0] * anchors + weights[1] * proposals

            def make_sample(index: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
                return _sample(data.train[index], size, flip=rng.random() < 0.5, crowds=False)

            dense.fit(detector, loss_of, make_sample, len(data.train), options, context)
            return evaluate_detector(detector.eval(), data, size, context, batch_size=options.batch_size)


def _sample(image: CocoImage, size: int, *, flip: bool, crowds: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the resized image (3, H, W) in [0, 1], and its boxes, labels and crowd flags."""
    pixels = read_pixels(image.file)
    old_height, old_width = pixels.shape[:2]
    ratio = min(size / min(old_height, old_width), longest_side(size) / max(old_height, old_width))
    height, width = (max(1, round(side * ratio)) for side in (old_height, old_width))
    keep = slice(None) if crowds else ~image.crowd
    boxes = image.boxes[keep] * np.array([width / old_width, height / old_height] * 2, dtype=np.float32)
    pixels = resize(pixels, height, width)
    if flip:
        pixels = pixels[:, ::-1]
        boxes = np.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), 1)
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255), {
        "boxes": torch.from_numpy(boxes),
        "labels": torch.from_numpy(image.labels[keep]),
        "iscrowd": torch.from_numpy(image.crowd[keep].astype(np.int64)),
    }


DETECTION = DetectionTask()
