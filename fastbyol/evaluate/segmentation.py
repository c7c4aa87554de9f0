"""Semantic segmentation: an FCN head on a backbone's maps, frozen or fine-tuned, on a VOC-format folder.

Head: two 3x3 convolutions with BatchNorm and ReLU and a 1x1 convolution, as in appendix C.6 of Grill et al. 2020. They dilate the
last stage of a ResNet to a stride of 16; here, for any backbone, nothing is dilated: the head sees the maps of strides 8, 16 and
32 (of a ResNet layer2, layer3 and layer4), the coarser ones upsampled to the finest, which are what FCN-8s (Long et al. 2015,
arXiv 1411.4038) joins. Of a transformer with a single stride it sees the last block. Logits are upsampled bilinearly.

Training: images are scaled at random, flipped and cropped, SGD with momentum; with a frozen backbone its features are those of
eval mode. Validation: the longer side is scaled to S, the image is padded to S x S, and the logits are scaled back to the mask's
size. Metrics by torchmetrics, over all pixels of the split: mean IoU over the classes with background that occur in the masks or
are predicted, as in PASCAL VOC, and pixel accuracy; void pixels (255) count nowhere.

The folder:

    ImageSets/Segmentation/{train,val}.txt   names, one per line, with or without an extension
    JPEGImages/NAME.jpg                      or another format that is read, by its extension
    SegmentationClass/NAME.png               palette or gray: 0 background, 1 .. K classes, 255 void
    labels.txt                               names of the classes 1 .. K, one per line; without it the 20 of PASCAL VOC

Shapes: n images, S x S pixels, K classes and the background.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from fastbyol.config import Config, SegmentationEval
from fastbyol.data.decode import EXTENSIONS, BadImage, as_stored
from fastbyol.data.voc import LABELS_FILE, VOID
from fastbyol.data.workers import map_in_order
from fastbyol.errors import InputError, error_reason
from fastbyol.evaluate import dense
from fastbyol.evaluate.protocol import EvalContext, Protocol, Row
from fastbyol.kernels.augment import IMAGENET_MEAN
from fastbyol.precision import autocast

IMAGE_EXTENSIONS = (".jpg", *(extension for extension in EXTENSIONS if extension != ".jpg"))
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
_PADDING = np.array([round(255 * value) for value in IMAGENET_MEAN], dtype=np.uint8)  # 0 once it is normalized


class VocImage(NamedTuple):
    """An image's two files."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class VocFolder:
    """A VOC-format folder: the images of both splits, and names of the classes 1 .. K."""

    root: Path
    train: list[VocImage]
    val: list[VocImage]
    classes: list[str]


def open_voc(options: SegmentationEval, config: Config, frame: EvalContext) -> VocFolder:
    """Both splits of the folder `options.root`; every image and mask is decoded once. Says which classes a split lacks.

    Raises:
        InputError: a file is missing, damaged or does not suit the others, or a split's masks hold fewer than two classes.
    """
    root = Path(str(options.root))
    if not root.is_dir():
        raise InputError(f"root={root}: there is no such folder")
    if not (root / "ImageSets" / "Segmentation").is_dir():
        raise InputError(f"root={root}: is not a VOC-format folder: it has no ImageSets/Segmentation/")
    files = _Files(root)
    folder = VocFolder(root, _listed(root, "train", files), _listed(root, "val", files), _classes(root))
    both = set(folder.train) & set(folder.val)
    if both:
        name = min(both).image.stem
        raise InputError(f"root={root}: {name} is in train.txt and in val.txt; an image must be in one of them")
    images = [*folder.train, *folder.val]
    found = map_in_order(lambda one: _check(one, folder), images, options.threads)
    held = list(frame.track("reading images and masks", found, len(images)))
    seen: dict[str, set[int]] = {}
    for split, part in (("train", held[: len(folder.train)]), ("val", held[len(folder.train) :])):
        every = set().union(*part)
        seen[split] = every - {VOID}
        if len(seen[split]) < 2:
            raise InputError(f"{root / 'SegmentationClass'}: {_too_few(split, every)}")
    dense.warn_of_absent(
        "pixel",
        ["background", *folder.classes],
        seen,
        frame,
        "these count in the mean IoU only if they are predicted, then as 0",
    )
    return folder


def _too_few(split: str, held: set[int]) -> str:
    values = " and ".join(map(str, sorted(held)))
    if not held - {VOID}:
        return f"the masks of {split} hold only {VOID}, which is void: there is nothing to learn or to measure"
    return (
        f"the masks of {split} hold only {values}{f': {VOID} is void' if VOID in held else ''}, but at least two classes are needed: "
        f"write 0 for the background, 1 to K for objects of the classes, {VOID} where a pixel is not to count"
    )


def read_mask(file: Path) -> NDArray[np.uint8]:
    """A mask (H, W).

    Raises:
        InputError: missing, damaged, or not of class ids.
    """
    try:
        image = as_stored(file.read_bytes())
    except (OSError, ValueError, BadImage) as error:  # ValueError: a name that no file can have
        raise InputError(f"{file}: {error_reason(error)}") from None
    if image.mode not in ("P", "L", "1"):
        raise InputError(
            f"{file}: its pixels are {image.mode}, not class numbers; save it as a palette or gray image of 0, 1, 2, ..."
        )
    return np.array(image, dtype=np.uint8)


def _check(one: VocImage, folder: VocFolder) -> set[int]:
    """The ids that a mask holds."""
    size, mask = dense.checked_size(one.image), read_mask(one.mask)
    if size != mask.shape:
        raise InputError(f"{one.mask}: {_by(mask.shape)} pixels but its image has {_by(size)}")
    held = set(np.flatnonzero(np.bincount(mask.ravel(), minlength=VOID + 1)).tolist())
    highest = max(held - {VOID}, default=0)
    if highest > len(folder.classes):
        raise InputError(
            f"{one.mask}: holds class {highest} but there are {len(folder.classes)} classes; name all of them in "
            f"{folder.root / LABELS_FILE}, one per line, and write 1 to K for the classes, {VOID} for void, not levels of gray"
        )
    return held


class FCN(nn.Module):
    """(n, 3, S, S) -> logits (n, 1 + K, S, S) float32."""

    def __init__(self, maps: dense.Maps, shapes: list[dense.MapShape], classes: int) -> None:
        super().__init__()
        width = dense.head_width(shapes[-1])
        self.maps, self.sides = maps, [shape.side for shape in shapes]
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


def evaluate_segmenter(network: nn.Module, folder: VocFolder, size: int, frame: EvalContext, *, batch_size: int) -> Row:
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
        for chunk in frame.track("validation", chunks, len(folder.val), each=batch_size):
            images, masks, inner = zip(
                *map_in_order(lambda one: _validation_pair(one, size), chunk, frame.threads), strict=True
            )
            logits = network(dense.normalize(torch.from_numpy(np.stack(images)).to(frame.device))).float()
            for scores, mask, (height, width) in zip(logits, masks, inner, strict=True):
                scores = F.interpolate(scores[None, :, :height, :width], mask.shape, mode="bilinear")
                metrics.update(scores.argmax(1), torch.from_numpy(mask).to(frame.device)[None].long())
    return {key: value.item() for key, value in metrics.compute().items()}


def _measure(backbone: nn.Module | None, folder: VocFolder, options: SegmentationEval, frame: EvalContext) -> Row:
    assert backbone is not None
    size = dense.dense_size(options.image_size_px, frame)
    dtype = frame.training_dtype
    with dense.seeded(options.seed, frame.device):
        network = build_segmenter(backbone, size, len(folder.classes), finetune=options.finetune)
        if min(options.batch_size, len(folder.train)) == 1 and network.sides[-1 if options.finetune else 0] == 1:
            raise InputError(
                f"batch_size={options.batch_size}, {len(folder.train)} training image(s): at image_size_px={size} BatchNorm would see "
                "one value per channel; take at least 2 images per step, or larger ones"
            )

        def loss_of(batch: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> Tensor:
            images, masks = (torch.from_numpy(np.stack(part)).to(frame.device) for part in zip(*batch, strict=True))
            with autocast(frame.device, dtype):
                logits = network(dense.normalize(images))
            seen = (masks != VOID).sum().clamp(min=1)  # a batch of padding and void alone gives 0, not NaN
            return F.cross_entropy(logits, masks.long(), ignore_index=VOID, reduction="sum") / seen

        dense.fit(
            network,
            loss_of,
            lambda index, rng: _training_pair(folder.train[index], size, rng),
            len(folder.train),
            options,
            frame,
        )
    return evaluate_segmenter(network, folder, size, frame, batch_size=options.batch_size)


def _training_pair(one: VocImage, size: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Image (S, S, 3) and mask (S, S): scaled at random, flipped at random, a random part of it."""
    image, mask = dense.read_pixels(one.image), read_mask(one.mask)
    height, width = _scaled(mask.shape, size * rng.uniform(*SCALES))
    image, mask = dense.resize(image, height, width), dense.resize(mask, height, width, labels=True)
    if rng.random() < 0.5:
        image, mask = image[:, ::-1], mask[:, ::-1]
    y, x = (int(rng.integers(max(side - size, 0) + 1)) for side in (height, width))
    part = slice(y, y + size), slice(x, x + size)
    return _padded(image[part], size, _PADDING), _padded(mask[part], size, VOID)


def _validation_pair(one: VocImage, size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], tuple[int, int]]:
    """Padded image (S, S, 3), the mask as it is, and the height and width of the image within the padding."""
    image, mask = dense.read_pixels(one.image), read_mask(one.mask)
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


class _Files:
    """Finds the image and the mask that a list means by a name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[Path, dict[str, list[str]]] = {}  # names of files by what they are without an extension

    def find(self, folder: str, name: str, extensions: tuple[str, ...]) -> Path:
        """ROOT/FOLDER/NAME with one of the extensions, the first of them if there are several; `name` may have its own.

        Raises:
            InputError: there is none, or several others.
        """
        place = self.root / folder / name
        if not place.is_relative_to(self.root / folder):
            raise InputError(f"names are of files in {self.root / folder}")
        stems = [place.name, *([place.stem] if place.suffix.lower() in extensions else [])]
        for stem in stems:
            files = [n for n in self._listing(place.parent).get(stem, []) if Path(n).suffix.lower() in extensions]
            exact = [n for n in (place.name, stem + extensions[0]) if n in files]
            if len(files) > 1 and not exact:
                raise InputError(f"{place} may be {' or '.join(files)}; give its name with the extension")
            if files:
                return place.parent / (exact or files)[0]
        raise InputError(f"there is no {place.parent / stems[-1]}{extensions[0]}")

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._folders:
            found = self._folders[folder] = {}
            try:
                for name in sorted(os.listdir(folder)):
                    found.setdefault(Path(name).stem, []).append(name)
            except OSError as error:
                raise InputError(f"{folder}: {error.strerror}") from None
        return self._folders[folder]


def _listed(root: Path, split: str, files: _Files) -> list[VocImage]:
    """The images that ImageSets/Segmentation/SPLIT.txt names."""
    file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    images: dict[VocImage, int] = {}  # -> number of its line
    for number, line in enumerate(dense.read_text(file).splitlines(), start=1):
        if not (name := line.strip()):
            continue
        try:
            image = _resolved(files, name)
        except InputError as error:
            raise InputError(f"{file}, line {number}: {name!r}: {error}") from None
        if image in images:
            raise InputError(f"{file}, line {number}: {name!r} is in line {images[image]} already; name it once")
        images[image] = number
    if not images:
        raise InputError(f"{file}: names no images")
    return list(images)


def _resolved(files: _Files, name: str) -> VocImage:
    name = dense.spellings(name)[-1].removeprefix("./")
    image = files.find("JPEGImages", name.removeprefix("JPEGImages/"), IMAGE_EXTENSIONS)
    inside = image.relative_to(files.root / "JPEGImages")
    return VocImage(image, files.find("SegmentationClass", str(inside.with_suffix(".png")), (".png",)))


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
    calibration=lambda folder: dense.unlabeled([one.image for one in folder.train]),
    measure=_measure,
    takes_pixels=False,
)
