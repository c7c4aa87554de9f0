"""Semantic segmentation: an FCN head on a frozen or fine-tuned backbone.

Head: two 3x3 convolutions with BatchNorm and ReLU and a 1x1 convolution, as in Grill et al. 2020,
appendix C.6. The paper dilates the last stage of a ResNet to stride 16. Here, to support any
backbone, the head takes the maps of strides 8, 16 and 32 (layer2 to layer4 of a ResNet), as FCN-8s
does (Long et al. 2015, arXiv 1411.4038), upsampled to the finest and concatenated. Of a
single-stride transformer it takes the last block. Logits are upsampled bilinearly.

Training: random scale, flip and crop, SGD with momentum. A frozen backbone stays in eval mode.
Validation: the image is resized to a longer side of S and padded to S x S; the logits are resized
to the mask's size. Metrics, by torchmetrics over all pixels of the split: pixel accuracy, and mean
IoU over the background and the classes that occur in the masks or predictions, as in PASCAL VOC.
Void pixels (255) are ignored.

Shapes: n images, S x S pixels, K classes and the background.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from fastbyol.config import Config, DistributedConfig
from fastbyol.errors import InputError
from fastbyol.evaluation import dense
from fastbyol.evaluation.context import EvalContext, Row
from fastbyol.evaluation.image_files import read_pixels, resize
from fastbyol.evaluation.options import SegmentationEval
from fastbyol.evaluation.voc import VOID, VocFolder, VocImage, open_voc, read_mask
from fastbyol.kernels.augment_params import IMAGENET_MEAN
from fastbyol.layers import BatchNorm
from fastbyol.parallel import sync_batch_norm
from fastbyol.precision import autocast
from fastbyol.runtime.device import seeded

SCALES = (0.7, 1.4)  # range of the random scale; the paper trains longer and draws from 0.5 to 2
STRIDES = (8, 32)  # finest and coarsest map of the head
_PADDING = np.array([round(255 * mean) for mean in IMAGENET_MEAN], dtype=np.uint8)  # normalized: 0


class FCN(nn.Module):
    """(n, 3, S, S) -> logits (n, 1 + K, S, S) float32."""

    def __init__(self, maps: dense.FeatureMaps, shapes: list[dense.MapShape], classes: int) -> None:
        super().__init__()
        width = dense.head_channels(shapes[-1])
        self.maps, self.sides = maps, [shape.side for shape in shapes]
        self.head = nn.Sequential(
            nn.Conv2d(sum(shape.channels for shape in shapes), width, 3, padding=1, bias=False),
            BatchNorm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            BatchNorm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 1 + classes, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of every pixel."""
        finest, *coarser = self.maps(images)
        maps = [finest, *(F.interpolate(x, finest.shape[-2:], mode="bilinear") for x in coarser)]
        return F.interpolate(self.head(torch.cat(maps, 1)).float(), images.shape[-2:], mode="bilinear")


def build_segmenter(backbone: nn.Module, size: int, classes: int, *, finetune: bool) -> FCN:
    """Return a copy of the backbone with a new head, in train mode.

    A frozen backbone stays in eval mode.

    Raises:
        InputError: the backbone has no suitable maps.
    """
    own = dense.frozen_copy(backbone, size)
    coarsest, finest = size // STRIDES[1], -(-size // STRIDES[0])
    shapes = [shape for shape in dense.map_shapes(own, size) if coarsest <= shape.side <= finest]
    if not shapes:
        raise InputError(
            f"model.backbone: {type(own).__name__} has no map of a stride between {STRIDES[0]} and {STRIDES[1]}"
        )
    network = FCN(dense.FeatureMaps(own, shapes), shapes, classes).to(next(own.parameters()).device).train()
    own.requires_grad_(finetune).train(finetune)
    return network


def evaluate_segmenter(
    network: nn.Module, folder: VocFolder, size: int, context: EvalContext, *, batch_size: int
) -> Row:
    """Return mIoU and pixel accuracy on the validation images.

    Args:
        network: images (n, 3, S, S) -> logits (n, 1 + K, S, S).
        size: S.
    """
    options = {"num_classes": 1 + len(folder.classes), "ignore_index": VOID}
    metrics = MetricCollection(
        {
            "miou": MulticlassJaccardIndex(**options, average="macro"),
            "pixel_accuracy": MulticlassAccuracy(**options, average="micro"),
        }
    ).to(context.device)
    network.eval()
    batches = dense.validation_batches(folder.val, partial(_validation_sample, size=size), batch_size, context)
    with torch.no_grad(), autocast(context.device, context.dtype):
        for images, masks, sizes in batches:
            logits = network(dense.normalize(torch.from_numpy(np.stack(images)).to(context.device))).float()
            for scores, mask, (height, width) in zip(logits, masks, sizes, strict=True):
                scores = F.interpolate(scores[None, :, :height, :width], mask.shape, mode="bilinear")
                metrics.update(scores.argmax(1), torch.from_numpy(mask).to(context.device)[None].long())
    # torchmetrics adds up the pixel counts of all ranks.
    return {key: value.item() for key, value in metrics.compute().items()}


class SegmentationTask(dense.DenseTask):
    """Semantic segmentation."""

    name = "segmentation"
    title = "Semantic segmentation"

    def open(self, options: SegmentationEval, config: Config, context: EvalContext) -> VocFolder:
        """Open the VOC-format folder `options.root`."""
        return open_voc(Path(str(options.root)), context)

    def measure(self, backbone: nn.Module, data: VocFolder, options: SegmentationEval, context: EvalContext) -> Row:
        """Train a head, and the backbone if `options.finetune`; return mIoU and pixel accuracy."""
        size = dense.resolve_image_size(options.image_size_px, context)
        dtype = context.training_dtype
        with seeded(options.seed, context.device):
            network = build_segmenter(backbone, size, len(data.classes), finetune=options.finetune)
            sync_batch_norm(network, DistributedConfig(), context.world)
            if min(options.batch_size, len(data.train)) == 1 and network.sides[-1 if options.finetune else 0] == 1:
                raise InputError(
                    f"batch_size={options.batch_size}, {len(data.train)} training image(s): at image_size_px={size} "
                    "BatchNorm would see one value per channel; use at least 2 images per step, or larger images"
                )

            def loss_of(batch: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> Tensor:
                images, masks = (
                    torch.from_numpy(np.stack(part)).to(context.device) for part in zip(*batch, strict=True)
                )
                with autocast(context.device, dtype):
                    logits = network(dense.normalize(images))
                pixels = context.world.mean((masks != VOID).sum().float())  # per rank, of the whole batch
                pixels = pixels.clamp(min=1 / context.world.size)  # all void: loss 0, not NaN
                return F.cross_entropy(logits, masks.long(), ignore_index=VOID, reduction="sum") / pixels

            def make_sample(index: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
                return _training_sample(data.train[index], size, rng)

            dense.fit(network, loss_of, make_sample, len(data.train), options, context)
        return evaluate_segmenter(network, data, size, context, batch_size=options.batch_size)


def _training_sample(
    image: VocImage, size: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return a random crop of the scaled and flipped image (S, S, 3) and of its mask (S, S)."""
    pixels, mask = read_pixels(image.file), read_mask(image.mask)
    height, width = _scaled(mask.shape, size * rng.uniform(*SCALES))
    pixels, mask = resize(pixels, height, width), resize(mask, height, width, labels=True)
    if rng.random() < 0.5:
        pixels, mask = pixels[:, ::-1], mask[:, ::-1]
    y, x = (int(rng.integers(max(side - size, 0) + 1)) for side in (height, width))
    crop = slice(y, y + size), slice(x, x + size)
    return _pad(pixels[crop], size, _PADDING), _pad(mask[crop], size, VOID)


def _validation_sample(image: VocImage, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], tuple[int, int]]:
    """Return the padded image (S, S, 3), the unscaled mask and the image's (height, width)."""
    pixels, mask = read_pixels(image.file), read_mask(image.mask)
    inner = _scaled(mask.shape, size)
    return _pad(resize(pixels, *inner), size, _PADDING), mask, inner


def _scaled(sides: tuple[int, ...], longer: float) -> tuple[int, int]:
    """Return height and width scaled to a longer side of about `longer` pixels."""
    height, width = (max(1, round(side * longer / max(sides))) for side in sides)
    return height, width


def _pad(pixels: NDArray[np.uint8], size: int, value: Any) -> NDArray[np.uint8]:
    """Pad at the bottom and right to S x S."""
    padded = np.empty((size, size, *pixels.shape[2:]), dtype=np.uint8)
    padded[:] = value
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    return padded


SEGMENTATION = SegmentationTask()
