"""Semantic segmentation: an FCN head on a backbone's maps, frozen or fine-tuned, on a VOC-format folder.

Head: two 3x3 convolutions with BatchNorm and ReLU and a 1x1 convolution, as in appendix C.6 of Grill et al. 2020. They dilate the
last stage of a ResNet to a stride of 16; here, for any backbone, nothing is dilated: the head sees the maps of strides 8, 16 and
32 (of a ResNet layer2, layer3 and layer4), the coarser ones upsampled to the finest, which are what FCN-8s (Long et al. 2015,
arXiv 1411.4038) joins. Of a transformer with a single stride it sees the last block. Logits are upsampled bilinearly.

Training: images are scaled at random, flipped and cropped, SGD with momentum; with a frozen backbone its features are those of
eval mode. Validation: the longer side is scaled to S, the image is padded to S x S, and the logits are scaled back to the mask's
size. Metrics by torchmetrics, over all pixels of the split: mean IoU over the classes with background, and pixel accuracy;
void pixels (255) count nowhere.

The folder:

    ImageSets/Segmentation/{train,val}.txt   names, one per line
    JPEGImages/NAME.jpg
    SegmentationClass/NAME.png               palette or gray: 0 background, 1 .. K classes, 255 void
    labels.txt                               names of the classes 1 .. K, one per line; without it the 20 of PASCAL VOC

Shapes: n images, S x S pixels, K classes and the background.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from fastbyol.config import Config, SegmentationEval
from fastbyol.data.decode import BadImage, as_stored
from fastbyol.data.shapes import LABELS_FILE, VOID
from fastbyol.data.workers import in_order
from fastbyol.errors import InputError
from fastbyol.evaluate import dense
from fastbyol.evaluate.protocol import Frame, Protocol, Row
from fastbyol.kernels.augment import IMAGENET_MEAN
from fastbyol.precision import autocast

SCALES = (0.7, 1.4)  # of a training image; the paper, which trains for longer, draws from 0.5 to 2
STRIDES = (8, 32)
VOC_CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
_PADDING = np.array([round(255 * value) for value in IMAGENET_MEAN], dtype=np.uint8)  # 0 once it is normalised


@dataclass(frozen=True)
class VocFolder:
    """A VOC-format folder: names of the images of both splits, and of the classes 1 .. K."""

    root: Path
    train: list[str]
    val: list[str]
    classes: list[str]

    def image(self, name: str) -> Path:
        """An image's file."""
        return self.root / "JPEGImages" / f"{name}.jpg"

    def mask(self, name: str) -> NDArray[np.uint8]:
        """An image's mask (H, W).

        Raises:
            InputError: missing, damaged, or not of class ids.
        """
        file = self.root / "SegmentationClass" / f"{name}.png"
        try:
            image = as_stored(file.read_bytes())
        except (OSError, ValueError, BadImage) as error:  # ValueError: a name that no file can have
            raise InputError(f"{file}: {dense.reason(error)}") from None
        if image.mode not in ("P", "L"):
            raise InputError(f"{file}: its pixels are {image.mode}, not class ids in a palette or gray image")
        return np.array(image)


def open_voc(options: SegmentationEval, config: Config) -> VocFolder:
    """Both splits of the folder `options.root`; every image and mask is looked at.

    Raises:
        InputError: a file is missing or does not suit the others.
    """
    root = Path(str(options.root))
    if not root.is_dir():
        raise InputError(f"root={root}: there is no such folder")
    train, val = (_names(root, split) for split in ("train", "val"))
    both = set(train) & set(val)
    if both:
        raise InputError(f"root={root}: {min(both)} is in train.txt and in val.txt; an image must be in one of them")
    folder = VocFolder(root, train, val, _classes(root))

    def check(name: str) -> None:
        size, mask = dense.image_size(folder.image(name)), folder.mask(name)
        where = root / "SegmentationClass" / f"{name}.png"
        if size != mask.shape:
            raise InputError(f"{where}: {_by(mask.shape)} pixels but its image has {_by(size)}")
        highest = mask.max(initial=0, where=mask != VOID)
        if highest > len(folder.classes):
            raise InputError(
                f"{where}: holds class {highest} but there are {len(folder.classes)} classes; name all of them in "
                f"{root / LABELS_FILE}, one per line"
            )

    for _ in in_order(check, [*train, *val], options.threads):
        pass
    return folder


class FCN(nn.Module):
    """(n, 3, S, S) -> logits (n, 1 + K, S, S) float32."""

    def __init__(self, maps: dense.Maps, shapes: list[dense.MapShape], classes: int) -> None:
        super().__init__()
        width = dense.head_width(shapes[-1])
        self.maps = maps
        self.head = nn.Sequential(
            nn.Conv2d(sum(shape.channels for shape in shapes), width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 1 + classes, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every pixel."""
        finest, *coarser = self.maps(images)
        maps = [finest, *(F.interpolate(x, finest.shape[-2:], mode="bilinear") for x in coarser)]
        return F.interpolate(self.head(torch.cat(maps, 1)).float(), images.shape[-2:], mode="bilinear")


def build_segmenter(backbone: nn.Module, size: int, classes: int, *, finetune: bool) -> FCN:
    """A copy of the backbone with a new head, in train mode; a frozen backbone stays in eval mode.

    Raises:
        InputError: the backbone has no suitable maps.
    """
    own = dense.copy_for(backbone, size)
    coarsest, finest = size // STRIDES[1], -(-size // STRIDES[0])
    shapes = [shape for shape in dense.map_shapes(own, size) if coarsest <= shape.side <= finest]
    if not shapes:
        raise InputError(
            f"model.backbone: {type(own).__name__} has no map of a stride between {STRIDES[0]} and {STRIDES[1]}"
        )
    network = FCN(dense.Maps(own, shapes), shapes, classes).to(next(own.parameters()).device).train()
    own.requires_grad_(finetune).train(finetune)
    return network


def evaluate_segmenter(network: nn.Module, folder: VocFolder, size: int, frame: Frame, *, batch_size: int) -> Row:
    """mIoU and pixel accuracy in [0, 1] of a network (n, 3, S, S) -> (n, 1 + K, S, S) on the validation images."""
    kinds = {"num_classes": 1 + len(folder.classes), "ignore_index": VOID}
    metrics = MetricCollection(
        {
            "miou": MulticlassJaccardIndex(**kinds, average="macro"),
            "pixel_accuracy": MulticlassAccuracy(**kinds, average="micro"),
        }
    ).to(frame.device)
    network.eval()
    chunks = [folder.val[i : i + batch_size] for i in range(0, len(folder.val), batch_size)]
    with torch.no_grad(), autocast(frame.device, frame.dtype):
        for names in frame.track("validation", chunks, len(chunks)):
            images, masks, inner = zip(
                *in_order(lambda name: _validation_pair(folder, name, size), names, frame.threads), strict=True
            )
            logits = network(dense.normalise(torch.from_numpy(np.stack(images)).to(frame.device))).float()
            for scores, mask, (height, width) in zip(logits, masks, inner, strict=True):
                scores = F.interpolate(scores[None, :, :height, :width], mask.shape, mode="bilinear")
                metrics.update(scores.argmax(1), torch.from_numpy(mask).to(frame.device)[None].long())
    return {key: value.item() for key, value in metrics.compute().items()}


def _measure(backbone: nn.Module | None, folder: VocFolder, options: SegmentationEval, frame: Frame) -> Row:
    assert backbone is not None
    size = dense.dense_size(options.image_size_px, frame)
    dtype = frame.training_dtype
    with dense.seeded(options.seed, frame.device):
        network = build_segmenter(backbone, size, len(folder.classes), finetune=options.finetune)

        def loss_of(batch: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> Tensor:
            images, masks = (torch.from_numpy(np.stack(part)).to(frame.device) for part in zip(*batch, strict=True))
            with autocast(frame.device, dtype):
                logits = network(dense.normalise(images))
            seen = (masks != VOID).sum().clamp(min=1)  # a batch of padding and void alone gives 0, not NaN
            return F.cross_entropy(logits, masks.long(), ignore_index=VOID, reduction="sum") / seen

        dense.fit(
            network,
            loss_of,
            lambda index, rng: _training_pair(folder, folder.train[index], size, rng),
            len(folder.train),
            options,
            frame,
        )
    return evaluate_segmenter(network, folder, size, frame, batch_size=options.batch_size)


def _training_pair(
    folder: VocFolder, name: str, size: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Image (S, S, 3) and mask (S, S): scaled at random, flipped at random, a random part of it."""
    image, mask = dense.read_pixels(folder.image(name)), folder.mask(name)
    height, width = _scaled(mask.shape, size * rng.uniform(*SCALES))
    image, mask = dense.resize(image, height, width), dense.resize(mask, height, width, labels=True)
    if rng.random() < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    y, x = (int(rng.integers(max(side - size, 0) + 1)) for side in (height, width))
    part = slice(y, y + size), slice(x, x + size)
    return _padded(image[part], size, _PADDING), _padded(mask[part], size, VOID)


def _validation_pair(
    folder: VocFolder, name: str, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], tuple[int, int]]:
    """Padded image (S, S, 3), the mask as it is, and the height and width of the image within the padding."""
    image, mask = dense.read_pixels(folder.image(name)), folder.mask(name)
    inner = _scaled(mask.shape, size)
    return _padded(dense.resize(image, *inner), size, _PADDING), mask, inner


def _scaled(sides: tuple[int, ...], longer: float) -> tuple[int, int]:
    """Height and width in the same proportion, the longer one about `longer` pixels."""
    height, width = (max(1, round(side * longer / max(sides))) for side in sides)
    return height, width


def _padded(part: NDArray[np.uint8], size: int, value: Any) -> NDArray[np.uint8]:
    whole = np.empty((size, size, *part.shape[2:]), dtype=np.uint8)
    whole[:] = value
    whole[: part.shape[0], : part.shape[1]] = part
    return whole


def _names(root: Path, split: str) -> list[str]:
    file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    names = dense.read_text(file).split()
    if not names:
        raise InputError(f"{file}: names no images")
    return names


def _classes(root: Path) -> list[str]:
    file = root / LABELS_FILE
    if not file.exists():
        return VOC_CLASSES
    names = [line.strip() for line in dense.read_text(file).splitlines() if line.strip()]
    if not names or len(set(names)) < len(names) or len(names) >= VOID:
        raise InputError(f"{file}: must name the classes 1 to K (fewer than {VOID}), each once, one per line")
    return names


def _by(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"


SEGMENTATION = Protocol(
    name="segmentation",
    title="Semantic segmentation",
    open=open_voc,
    calibration=lambda folder: dense.unlabelled(folder.root, [f"JPEGImages/{name}.jpg" for name in folder.train]),
    measure=_measure,
    takes_pixels=False,
)
