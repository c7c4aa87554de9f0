"""Object detection: torchvision's Faster R-CNN with a feature pyramid over a backbone's maps, on COCO-format annotations.

Source: Ren et al. 2015 (arXiv 1506.01497) and Lin et al. 2017 (arXiv 1612.03144). The backbone is frozen, or its last stages are
trained too; its norms stay in eval mode either way. The pyramid stands on the backbone's last four maps of different sizes (of a
ResNet layer1 to layer4), at least three. Metric: COCO's mAP, by torchmetrics.

Fitted to the shorter side S of the images and to the backbone, so that S = 800 and a ResNet-50 give torchvision's own detector:

- Anchors have sides of 0.64, 0.32, ... of S, from the coarsest level with at least 5 x 5 places to the finest.
- The pyramid is as wide as an eighth of the backbone's last map (64 to 256), the box head four times that.
- A place of a pooled box is sampled twice per direction, in images under 600 px, whose boxes have few places on the maps, once.
- Proposals and the boxes that the head is trained on: as many per pixel as torchvision's, at least 256 and 32 per image.

Images are resized to S, the longer side to at most 1333/800 of it; training images are flipped at random.

The folder:

    annotations/instances_{train,val}.json   or instances_{train,val}2017.json
    JPEGImages/, {train,val}/, {train,val}2017/ or the folder itself: the first that has an image's file_name, if that is relative

Boxes are clipped to their image and left out where nothing remains of them. Training images without objects are left out;
crowds are not trained on, and a detection on one is not counted.
"""

import json
import os
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fastbyol.config import Config, DetectionEval
from fastbyol.data.workers import map_in_order
from fastbyol.errors import InputError, first_line, printable
from fastbyol.evaluate import dense
from fastbyol.evaluate.protocol import EvalContext, Protocol, Row
from fastbyol.kernels.augment import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.precision import autocast

LARGEST_ANCHOR = 0.64  # share of the shorter side; torchvision: 512 of 800 px
LONGER_SIDE = 1333 / 800  # at most, in shorter sides
FEWEST_PLACES = 5  # per side of a level with anchors
MAPS = (3, 4)  # fewest and most that the pyramid stands on
_POOL = 7  # side of what a box is pooled to
_USUAL_SIZE = 800
_SAMPLES = 2  # per direction and place of a pooled box, at the usual size
_DIVISIBLE = 32  # torchvision pads images to multiples of it
_FARTHEST = 2**31  # pixels; also false for NaN
_BOXES, _PROPOSALS = (32, 512), (256, 2000)  # per image: fewest, and at the usual size


@dataclass(frozen=True)
class CocoImage:
    """An image and its objects."""

    file: Path
    boxes: NDArray[np.float32]  # (n, 4): x0, y0, x1, y1 in pixels
    labels: NDArray[np.int64]  # (n,): 1 .. K
    crowd: NDArray[np.bool_]  # (n,)


@dataclass(frozen=True)
class CocoFolder:
    """Both splits of a COCO-format folder, and the names of the classes 1 .. K, in the order of their category ids."""

    root: Path
    train: list[CocoImage]
    val: list[CocoImage]
    classes: list[str]


def open_coco(options: DetectionEval, config: Config, frame: EvalContext) -> CocoFolder:
    """Both splits of the folder `options.root`; every annotation is checked and every image decoded once.

    Says which categories a split has no box of, and how many images are in both.

    Raises:
        InputError: a file is missing, damaged or malformed, or a split has no objects.
    """
    root = Path(str(options.root))
    if not root.is_dir():
        raise InputError(f"root={root}: there is no such folder")
    (train, train_classes), (val, classes) = (_read_split(root, split, options.threads, frame) for split in _SPLITS)
    if train_classes != classes:
        other = min(set(train_classes.items()) ^ set(classes.items()))
        raise InputError(
            f"root={root}: train and val have different categories, for example id {other[0]} {other[1]!r}"
        )
    train = [image for image in train if not image.crowd.all()]
    if not train or all(image.crowd.all() for image in val):
        raise InputError(
            f"root={root}: there are no objects in {'val' if train else 'train'}: no box of more than 0 pixels that is not a crowd"
        )
    names = list(classes.values())
    seen = {
        split: {int(k) - 1 for image in images for k in image.labels[~image.crowd]}
        for split, images in zip(_SPLITS, (train, val), strict=True)
    }
    dense.warn_of_absent("box", names, seen, frame, "mAP is the mean over the others")
    if both := {image.file.resolve() for image in train} & {image.file.resolve() for image in val}:
        frame.say(printable(f"warning: {len(both)} image(s) are in train and in val, for example {min(both)}"))
    return CocoFolder(root, train, val, names)


class Pyramid(nn.Module):
    """(n, 3, H, W) -> pyramid levels by name, finest first: what torchvision takes for a backbone."""

    def __init__(self, maps: dense.Maps, shapes: list[dense.MapShape], dtype: torch.dtype) -> None:
        super().__init__()
        self.maps, self.dtype = maps, dtype
        self.out_channels = dense.head_width(shapes[-1])
        self.fpn = FeaturePyramidNetwork(
            [shape.channels for shape in shapes], self.out_channels, extra_blocks=LastLevelMaxPool()
        )
        sides = {str(k): shape.side for k, shape in enumerate(shapes)} | {"pool": -(-shapes[-1].side // 2)}
        self.levels = [name for name, side in sides.items() if side >= FEWEST_PLACES] or ["0"]

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """float32 (n, out_channels, h, w) of every level with anchors; the coarser maps are in them too."""
        with autocast(images.device, self.dtype):
            maps = self.maps(images)
        found = self.fpn(OrderedDict((str(k), x.float()) for k, x in enumerate(maps)))
        return OrderedDict((name, found[name]) for name in self.levels)


def build_detector(
    backbone: nn.Module, size: int, classes: int, *, dtype: torch.dtype, trainable_stages: int = 0
) -> FasterRCNN:
    """Faster R-CNN on a copy of the backbone, for images with a shorter side of `size` pixels, in eval mode.

    Raises:
        InputError: the backbone has too few maps or cannot take images that are not square.
    """
    own = dense.copy_for(backbone, size)
    shapes = dense.map_shapes(own, size)[-MAPS[1] :]
    if len(shapes) < MAPS[0]:
        raise InputError(
            f"model.backbone: {type(own).__name__} has maps of {len(shapes)} size(s), detection needs {MAPS[0]}; "
            "use a backbone whose stages halve the image"
        )
    dense.map_shapes(own, size, wider=_DIVISIBLE)  # refuses what takes square images alone
    _unfreeze(own, size, trainable_stages)
    pyramid = Pyramid(dense.Maps(own, shapes), shapes, dtype)
    levels, area = len(pyramid.levels), (size / _USUAL_SIZE) ** 2
    sides = [LARGEST_ANCHOR * size / 2**k for k in reversed(range(levels))]
    proposals, boxes = (max(fewest, round(usual * area)) for fewest, usual in (_PROPOSALS, _BOXES))
    samples = max(1, round(_SAMPLES * size / _USUAL_SIZE))
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
        box_roi_pool=MultiScaleRoIAlign([n for n in pyramid.levels if n != "pool"], _POOL, sampling_ratio=samples),
        box_head=TwoMLPHead(pyramid.out_channels * _POOL**2, hidden),
        box_predictor=FastRCNNPredictor(hidden, 1 + classes),
        box_batch_size_per_image=boxes,
    )
    return detector.to(next(own.parameters()).device).eval()


def longest_side(size: int) -> int:
    """Pixels of the longer side at most, for a shorter side of `size`."""
    return round(size * LONGER_SIDE)


def evaluate_detector(
    detector: nn.Module, folder: CocoFolder, size: int, frame: EvalContext, *, batch_size: int
) -> Row:
    """COCO's mAP, mAP at an IoU of 0.5 and at 0.75, in [0, 1], of the validation images.

    Args:
        detector: list of images (3, H, W) in [0, 1] -> per image boxes (m, 4), labels (m,) and scores (m,).
    """
    metric = MeanAveragePrecision(backend="pycocotools")
    chunks = [folder.val[i : i + batch_size] for i in range(0, len(folder.val), batch_size)]
    with torch.no_grad():
        for images in frame.track("validation", chunks, len(folder.val), each=batch_size):
            pixels, targets = zip(
                *map_in_order(lambda image: _sample(image, size, flip=False), images, frame.threads), strict=True
            )
            found = detector([x.to(frame.device) for x in pixels])
            metric.update([{key: value.cpu() for key, value in one.items()} for one in found], list(targets))
    values = metric.compute()
    return {name: values[key].item() for name, key in (("map", "map"), ("map50", "map_50"), ("map75", "map_75"))}


def _measure(backbone: nn.Module | None, folder: CocoFolder, options: DetectionEval, frame: EvalContext) -> Row:
    assert backbone is not None
    size = dense.dense_size(options.image_size_px, frame)
    with dense.seeded(options.seed, frame.device):
        detector = build_detector(
            backbone,
            size,
            len(folder.classes),
            dtype=frame.training_dtype,
            trainable_stages=options.trainable_stages,
        ).train()
        detector.backbone.maps.eval()

        def loss_of(batch: list[tuple[Tensor, dict[str, Tensor]]]) -> Tensor:
            images = [image.to(frame.device) for image, _ in batch]
            targets = [{key: target[key].to(frame.device) for key in ("boxes", "labels")} for _, target in batch]
            return torch.stack(list(detector(images, targets).values())).sum()

        dense.fit(
            detector,
            loss_of,
            lambda index, rng: _sample(folder.train[index], size, flip=rng.random() < 0.5, crowds=False),
            len(folder.train),
            options,
            frame,
        )
        return evaluate_detector(detector.eval(), folder, size, frame, batch_size=options.batch_size)


def _unfreeze(backbone: nn.Module, size: int, stages: int) -> None:
    """Lets the parameters of the last so many stages take gradients: those on which the last map but `stages` does not depend."""
    if stages == 0:
        return
    parameters = list(backbone.requires_grad_(True).parameters())
    image = torch.zeros(1, 3, size, size, device=parameters[0].device)
    maps = backbone.forward_intermediates(image, intermediates_only=True)
    if stages < len(maps):
        before = torch.autograd.grad(maps[-1 - stages].sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.requires_grad_(gradient is None)


def _sample(image: CocoImage, size: int, *, flip: bool, crowds: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Resized image (3, H, W) in [0, 1] and its boxes, labels and crowd flags."""
    pixels = dense.read_pixels(image.file)
    old_height, old_width = pixels.shape[:2]
    ratio = min(size / min(old_height, old_width), longest_side(size) / max(old_height, old_width))
    height, width = (max(1, round(side * ratio)) for side in (old_height, old_width))
    keep = slice(None) if crowds else ~image.crowd
    boxes = image.boxes[keep] * np.array([width / old_width, height / old_height] * 2, dtype=np.float32)
    pixels = dense.resize(pixels, height, width)
    if flip:
        pixels, boxes = (
            pixels[:, ::-1],
            np.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), 1),
        )
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255), {
        "boxes": torch.from_numpy(boxes),
        "labels": torch.from_numpy(image.labels[keep]),
        "iscrowd": torch.from_numpy(image.crowd[keep].astype(np.int64)),
    }


def _read_split(root: Path, split: str, threads: int, frame: EvalContext) -> tuple[list[CocoImage], dict[int, str]]:
    """The images of a split, in the file's order, and its categories: id -> name, by id."""
    file, images, categories, objects = _read_annotations(root, split)
    if split == "train":  # the others are not trained on
        images = [record for record in images if objects[record["id"]]]
    number = {id_: k for k, id_ in enumerate(categories, start=1)}

    def make(record: dict[str, Any]) -> CocoImage:
        path = _image_file(root, split, record["file_name"], file)
        height, width = dense.checked_size(path)
        said = [record.get(key) for key in ("width", "height")]
        if any(s is not None and s != is_ for s, is_ in zip(said, (width, height), strict=True)):
            raise InputError(
                f"{file}: {record['file_name']} is said to have a width of {said[0]!r} and a height of {said[1]!r} pixels, "
                f"the file has {width} and {height}"
            )
        own = objects[record["id"]]
        corners = np.array([a["bbox"] for a in own], dtype=np.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        corners = corners.clip(0, np.array([width, height] * 2, dtype=np.float32))
        whole = (corners[:, 2:] > corners[:, :2]).all(1)
        labels = np.array([number[a["category_id"]] for a in own], dtype=np.int64)
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in own], dtype=np.bool_)
        return CocoImage(path, corners[whole], labels[whole], crowd[whole])

    made = list(frame.track(f"reading images of {split}", map_in_order(make, images, threads), len(images)))
    places: dict[str, int] = {}
    for k, image in enumerate(made):
        if (first := places.setdefault(os.path.normpath(image.file), k)) != k:
            raise InputError(
                f"{file}: images of id {images[first]['id']} and {images[k]['id']} have the same file, {image.file}; give it once"
            )
    return made, categories


def _image_file(root: Path, split: str, name: str, annotations: Path) -> Path:
    """Where an image lies.

    Raises:
        InputError: nowhere.
    """
    folders = [root / inside for inside in ("JPEGImages", split, f"{split}2017", ".")]
    found = (folder / spelling for spelling in dense.spellings(name) for folder in folders)
    try:
        path = next((path for path in found if path.is_file()), None)
    except OSError as error:
        raise InputError(f"{annotations}: image {name[:60]!r}...: {error.strerror}") from None
    if path is not None:
        return path
    if "://" in name:
        raise InputError(f"{annotations}: image {name!r} is an address; file_name must be a file's path")
    if Path(name).is_absolute():
        raise InputError(f"{annotations}: there is no image {name}; make file_name relative to {root}")
    raise InputError(
        f"{annotations}: image {name!r} is neither in JPEGImages/, {split}/ and {split}2017/ of {root} nor in it"
    )


def _read_annotations(
    root: Path, split: str
) -> tuple[Path, list[dict[str, Any]], dict[int, str], dict[int, list[dict[str, Any]]]]:
    """The split's file, its images, its categories by id, and the annotations of each image id."""
    names = [f"instances_{split}.json", f"instances_{split}2017.json"]
    file = next((f for f in (root / "annotations" / name for name in names) if f.is_file()), None)
    if file is None:
        raise InputError(f"root={root}: there is neither annotations/{names[0]} nor annotations/{names[1]}")
    try:
        content = json.loads(dense.read_text(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: not a COCO file: it must hold images, annotations and categories")
    categories = {c["id"]: c["name"] for c in _records(file, content, "categories", {"id": int, "name": str})}
    images = list(_records(file, content, "images", {"id": int, "file_name": str}))
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    if not images or not categories:
        raise InputError(f"{file}: holds no {'categories' if images else 'images'}")
    for key, records in (("images", images), ("categories", content["categories"])):
        if twice := [id_ for id_, count in Counter(record["id"] for record in records).items() if count > 1]:
            raise InputError(f"{file}: two {key} have the same id, {twice[0]}")
    for k, found in enumerate(
        _records(file, content, "annotations", {"image_id": int, "category_id": int, "bbox": list})
    ):
        for key, known in (("image_id", objects), ("category_id", categories)):
            if found[key] not in known:
                raise InputError(f"{file}: annotations[{k}]: {key}={found[key]} is not among the {_LISTED[key]}")
        box = found["bbox"]
        if len(box) != 4 or not all(_is_number(v) for v in box) or min(box[2:]) < 0:
            raise InputError(f"{file}: annotations[{k}]: bbox={box} is not [x, y, width, height] in pixels")
        if found.get("iscrowd") not in (None, 0, 1):
            raise InputError(f"{file}: annotations[{k}]: iscrowd={found['iscrowd']!r} is neither 0 nor 1")
        objects[found["image_id"]].append(found)
    sides = [max(found["bbox"][2:]) for own in objects.values() for found in own]
    if sides and max(sides) <= 1:
        raise InputError(
            f"{file}: no box is larger than 1 pixel; bbox is [x, y, width, height] in pixels, not in shares"
        )
    return file, images, dict(sorted(categories.items())), objects


_SPLITS = ("train", "val")
_KINDS = {int: "a whole number", str: "text", list: "a list of numbers"}
_LISTED = {"image_id": "images", "category_id": "categories"}


def _records(file: Path, content: dict[str, Any], key: str, fields: dict[str, type]) -> Iterator[dict[str, Any]]:
    """The records under a key, each with the fields it needs."""
    if not isinstance(content.get(key), list):
        raise InputError(f"{file}: not a COCO file: there is no list {key!r}")
    for k, record in enumerate(content[key]):
        for field, kind in fields.items():
            value = record.get(field) if isinstance(record, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                given = "is missing" if value is None else f"is {value!r}"
                raise InputError(f"{file}: {key}[{k}]: {field!r} {given}, it must be {_KINDS[kind]}")
        yield record


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _FARTHEST


DETECTION = Protocol(
    name="detection",
    title="Object detection",
    open=open_coco,
    calibration=lambda folder: dense.unlabeled([image.file for image in folder.train]),
    measure=_measure,
    takes_pixels=False,
)
