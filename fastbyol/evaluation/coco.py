"""COCO-format folders of bounding boxes.

The files of a folder:

    annotations/instances_{train,val}.json   or instances_{train,val}2017.json
    JPEGImages/, {train,val}/, {train,val}2017/ or the folder itself: the images

The image folders are searched in this order. Boxes are clipped to their image; empty ones are
dropped. Training images without objects are dropped.

The files are not read by pycocotools.coco.COCO: it does not validate them, and it requires an "id"
of every annotation.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol.errors import InputError, first_line
from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.image_files import image_size, path_spellings, read_text, warn_absent_classes
from fastbyol.runtime.logging import logger

_SPLITS = ("train", "val")
_MAX_COORDINATE = 2**31  # pixels


@dataclass(frozen=True)
class CocoImage:
    """An image file and its n objects."""

    file: Path
    boxes: NDArray[np.float32]  # (n, 4): x0, y0, x1, y1 in pixels
    labels: NDArray[np.int64]  # (n,): 1 .. K
    crowd: NDArray[np.bool_]  # (n,)


@dataclass(frozen=True)
class CocoFolder:
    """Both splits of a COCO-format folder.

    `classes` names the classes 1 .. K, in the order of their category ids.
    """

    root: Path
    train: list[CocoImage]
    val: list[CocoImage]
    classes: list[str]


def open_coco(root: Path, context: EvalContext) -> CocoFolder:
    """Open a COCO-format folder. Checks every annotation and decodes every image once.

    Logs categories without a box in a split, and the number of images that are in both splits.

    Raises:
        InputError: a file is missing, damaged or malformed, or a split has no objects.
    """
    if not root.is_dir():
        raise InputError(f"root={root}: no such folder")
    (train, train_classes), (val, classes) = (_read_split(root, split, context) for split in _SPLITS)
    if train_classes != classes:
        id_, name = min(set(train_classes.items()) ^ set(classes.items()))
        raise InputError(f"root={root}: train and val have different categories, for example id {id_} {name!r}")
    train = [image for image in train if not image.crowd.all()]
    if not train or all(image.crowd.all() for image in val):
        raise InputError(
            f"root={root}: {'val' if train else 'train'} has no objects: no box that is neither empty nor a crowd"
        )
    names = list(classes.values())
    seen = {
        split: {int(k) - 1 for image in images for k in image.labels[~image.crowd]}
        for split, images in zip(_SPLITS, (train, val), strict=True)
    }
    warn_absent_classes("box", names, seen, "mAP is the mean over the others")
    if both := {image.file.resolve() for image in train} & {image.file.resolve() for image in val}:
        logger.warning(f"{len(both)} image(s) are in both train and val, for example {min(both)}")
    return CocoFolder(root, train, val, names)


def _read_split(root: Path, split: str, context: EvalContext) -> tuple[list[CocoImage], dict[int, str]]:
    """Return the images of a split, in the file's order, and its categories (id -> name)."""
    annotations = _read_annotations(root, split)
    file, images = annotations.file, annotations.images
    if split == "train":
        images = [record for record in images if annotations.objects[record["id"]]]
    labels = {id_: k for k, id_ in enumerate(annotations.categories, start=1)}

    def read(record: dict[str, Any]) -> CocoImage:
        return _read_image(record, annotations.objects[record["id"]], labels, root, split, file)

    found = context.map_images(f"reading images of {split}", read, images)
    index_of: dict[str, int] = {}
    for k, image in enumerate(found):
        if (first := index_of.setdefault(os.path.normpath(image.file), k)) != k:
            raise InputError(
                f"{file}: images with ids {images[first]['id']} and {images[k]['id']} are the same file, {image.file}; "
                "remove one"
            )
    return found, annotations.categories


def _read_image(
    record: dict[str, Any],
    objects: list[dict[str, Any]],
    labels: dict[int, int],
    root: Path,
    split: str,
    annotations: Path,
) -> CocoImage:
    """Find and check the file of an image record; convert its objects.

    Args:
        objects: annotations of the image.
        labels: category id -> label.
        annotations: file of the record, for messages.
    """
    path = _find_image(root, split, record["file_name"], annotations)
    height, width = image_size(path)
    given = [record.get(key) for key in ("width", "height")]
    if any(g is not None and g != actual for g, actual in zip(given, (width, height), strict=True)):
        raise InputError(
            f"{annotations}: {record['file_name']}: width={given[0]!r} and height={given[1]!r}, "
            f"but the file has {width}x{height} pixels"
        )
    boxes = np.array([a["bbox"] for a in objects], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.clip(0, np.array([width, height] * 2, dtype=np.float32))
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    classes = np.array([labels[a["category_id"]] for a in objects], dtype=np.int64)
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in objects], dtype=np.bool_)
    return CocoImage(path, boxes[keep], classes[keep], crowd[keep])


def _find_image(root: Path, split: str, name: str, annotations: Path) -> Path:
    """Return the path of an image.

    Raises:
        InputError: there is no such file.
    """
    folders = [root / inside for inside in ("JPEGImages", split, f"{split}2017", ".")]
    candidates = (folder / spelling for spelling in path_spellings(name) for folder in folders)
    try:
        path = next((path for path in candidates if path.is_file()), None)
    except OSError as error:
        raise InputError(f"{annotations}: image {name[:60]!r}...: {error.strerror}") from None
    if path is not None:
        return path
    if "://" in name:
        raise InputError(f"{annotations}: image {name!r} is a URL; file_name must be the path of a file")
    if Path(name).is_absolute():
        raise InputError(f"{annotations}: there is no image {name}; make file_name relative to {root}")
    raise InputError(f"{annotations}: image {name!r} is not in {root} or its JPEGImages/, {split}/ or {split}2017/")


class _Annotations(NamedTuple):
    """A split's validated annotation file."""

    file: Path
    images: list[dict[str, Any]]
    categories: dict[int, str]  # id -> name, sorted by id
    objects: dict[int, list[dict[str, Any]]]  # image id -> its annotations


def _read_annotations(root: Path, split: str) -> _Annotations:
    """Read and validate a split's annotation file.

    Raises:
        InputError: it is missing, damaged or malformed.
    """
    names = [f"instances_{split}.json", f"instances_{split}2017.json"]
    file = next((f for f in (root / "annotations" / name for name in names) if f.is_file()), None)
    if file is None:
        raise InputError(f"root={root}: there is neither annotations/{names[0]} nor annotations/{names[1]}")
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: not a COCO file: expected an object with images, annotations and categories")
    categories = {c["id"]: c["name"] for c in _records(file, content, "categories", {"id": int, "name": str})}
    images = list(_records(file, content, "images", {"id": int, "file_name": str}))
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    if not images or not categories:
        raise InputError(f"{file}: has no {'categories' if images else 'images'}")
    for key, records in (("images", images), ("categories", content["categories"])):
        if repeated := [id_ for id_, count in Counter(record["id"] for record in records).items() if count > 1]:
            raise InputError(f"{file}: two {key} have the same id, {repeated[0]}")
    fields = {"image_id": int, "category_id": int, "bbox": list}
    for k, annotation in enumerate(_records(file, content, "annotations", fields)):
        _check_annotation(f"{file}: annotations[{k}]", annotation, objects.keys(), categories.keys())
        objects[annotation["image_id"]].append(annotation)
    sides = [max(annotation["bbox"][2:]) for own in objects.values() for annotation in own]
    if sides and max(sides) <= 1:
        raise InputError(
            f"{file}: no box is larger than 1 pixel; bbox must be [x, y, width, height] in pixels, not relative to the image"
        )
    return _Annotations(file, images, dict(sorted(categories.items())), objects)


def _check_annotation(where: str, annotation: dict[str, Any], images: Any, categories: Any) -> None:
    """Check an annotation's values.

    Args:
        where: file and index, for messages.
        images: known image ids.
        categories: known category ids.
    """
    for key, known, name in (("image_id", images, "images"), ("category_id", categories, "categories")):
        if annotation[key] not in known:
            raise InputError(f"{where}: {key}={annotation[key]} is not among the {name}")
    box = annotation["bbox"]
    if len(box) != 4 or not all(_is_coordinate(v) for v in box) or min(box[2:]) < 0:
        raise InputError(f"{where}: bbox={box} is not [x, y, width, height] in pixels")
    if annotation.get("iscrowd") not in (None, 0, 1):
        raise InputError(f"{where}: iscrowd={annotation['iscrowd']!r} is neither 0 nor 1")


_TYPE_NAMES = {int: "a whole number", str: "text", list: "a list of numbers"}


def _records(file: Path, content: dict[str, Any], key: str, fields: dict[str, type]) -> Iterator[dict[str, Any]]:
    """Yield the records of a list; check that each has the required fields."""
    if not isinstance(content.get(key), list):
        raise InputError(f"{file}: not a COCO file: there is no list {key!r}")
    for k, record in enumerate(content[key]):
        for field, kind in fields.items():
            value = record.get(field) if isinstance(record, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                given = "is missing" if value is None else f"is {value!r}"
                raise InputError(f"{file}: {key}[{k}]: {field!r} {given}; expected {_TYPE_NAMES[kind]}")
        yield record


def _is_coordinate(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < _MAX_COORDINATE  # False for NaN
