"""VOC-format folders of segmentation masks.

ImageSets/Segmentation/{train,val}.txt   image names, one per line, with or without extension
JPEGImages/NAME.jpg                      or another supported image format
SegmentationClass/NAME.png               palette or gray: 0 background, 1 .. K classes, 255 void
labels.txt                               names of the classes, one per line; default: VOC's 20
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.decode import EXTENSIONS, BadImage, as_stored
from fastbyol.errors import InputError, error_reason
from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.image_files import image_size, path_spellings, read_text, warn_absent_classes

VOID = 255  # mask value of pixels that do not count
LABELS_FILE = "labels.txt"  # names of the classes 1 .. K, one per line; not part of VOC itself
IMAGE_EXTENSIONS = (".jpg", *(extension for extension in EXTENSIONS if extension != ".jpg"))
VOC_CLASSES = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


class VocImage(NamedTuple):
    """An image and its mask."""

    file: Path
    mask: Path


@dataclass(frozen=True)
class VocFolder:
    """Both splits of a VOC-format folder, and the names of the classes 1 .. K."""

    root: Path
    train: list[VocImage]
    val: list[VocImage]
    classes: list[str]


def open_voc(root: Path, context: EvalContext) -> VocFolder:
    """Open a VOC-format folder.

    Decodes every image and mask once. Logs the classes that a split lacks.

    Raises:
        InputError: a file is missing or damaged, an image does not match its mask, or a split's
            masks hold fewer than two classes.
    """
    if not root.is_dir():
        raise InputError(f"root={root}: no such folder")
    if not (root / "ImageSets" / "Segmentation").is_dir():
        raise InputError(f"root={root}: not a VOC-format folder: it has no ImageSets/Segmentation/")
    finder = _FileFinder(root)
    folder = VocFolder(root, _read_list(root, "train", finder), _read_list(root, "val", finder), _read_classes(root))
    if both := set(folder.train) & set(folder.val):
        name = min(both).file.stem
        raise InputError(f"root={root}: {name} is in both train.txt and val.txt; remove it from one of them")
    images = [*folder.train, *folder.val]
    ids = context.map_images("reading images and masks", lambda image: _check_image(image, folder), images)
    seen: dict[str, set[int]] = {}
    for split, part in (("train", ids[: len(folder.train)]), ("val", ids[len(folder.train) :])):
        found = set().union(*part)
        seen[split] = found - {VOID}
        if len(seen[split]) < 2:
            raise InputError(f"{root / 'SegmentationClass'}: {_too_few_classes(split, found)}")
    consequence = "the mean IoU counts these only where they are predicted, as 0"
    warn_absent_classes("pixel", ["background", *folder.classes], seen, consequence)
    return folder


def _too_few_classes(split: str, ids: set[int]) -> str:
    values = " and ".join(map(str, sorted(ids)))
    if not ids - {VOID}:
        return f"the masks of {split} hold only {VOID}, which is void: there is nothing to train on or to evaluate"
    void = f": {VOID} is void" if VOID in ids else ""
    return (
        f"the masks of {split} hold only {values}{void}, but at least two classes are needed: "
        f"write 0 for the background, 1 to K for the classes, {VOID} for pixels to ignore"
    )


def read_mask(file: Path) -> NDArray[np.uint8]:
    """Read a mask of class ids, (H, W).

    Raises:
        InputError: the file is missing, damaged or not a mask.
    """
    try:
        image = as_stored(file.read_bytes())
    except (OSError, ValueError, BadImage) as error:  # ValueError: a null character in the name
        raise InputError(f"{file}: {error_reason(error)}") from None
    if image.mode not in ("P", "L", "1"):
        raise InputError(
            f"{file}: its pixels are {image.mode}, not class ids; save it as a palette or gray image of 0, 1, 2, ..."
        )
    return np.array(image, dtype=np.uint8)


def _check_image(image: VocImage, folder: VocFolder) -> set[int]:
    """Check an image and its mask; return the ids in the mask."""
    size, mask = image_size(image.file), read_mask(image.mask)
    if size != mask.shape:
        raise InputError(f"{image.mask}: {_format_size(mask.shape)} pixels but its image has {_format_size(size)}")
    ids = set(np.flatnonzero(np.bincount(mask.ravel(), minlength=VOID + 1)).tolist())
    highest = max(ids - {VOID}, default=0)
    if highest > len(folder.classes):
        raise InputError(
            f"{image.mask}: holds class {highest} but there are {len(folder.classes)} classes; name all of them in "
            f"{folder.root / LABELS_FILE}, one per line, and write 1 to K for the classes, {VOID} for void, not gray levels"
        )
    return ids


def _format_size(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"


class _FileFinder:
    """Find the files that a name in a list stands for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listings: dict[Path, dict[str, list[str]]] = {}  # folder -> stem -> file names

    def find(self, folder: str, name: str, extensions: tuple[str, ...]) -> Path:
        """Return ROOT/FOLDER/NAME with one of the extensions. `name` may include it.

        If files with more than one of the extensions exist, the first extension has priority.

        Raises:
            InputError: there is no such file, or the name is ambiguous.
        """
        path = self.root / folder / name
        if not path.is_relative_to(self.root / folder):
            raise InputError(f"must be a file in {self.root / folder}")
        stems = [path.name, *([path.stem] if path.suffix.lower() in extensions else [])]
        for stem in stems:
            files = [n for n in self._list(path.parent).get(stem, []) if Path(n).suffix.lower() in extensions]
            exact = [n for n in (path.name, stem + extensions[0]) if n in files]
            if len(files) > 1 and not exact:
                raise InputError(f"{path} may be {' or '.join(files)}; give the name with its extension")
            if files:
                return path.parent / (exact or files)[0]
        raise InputError(f"there is no {path.parent / stems[-1]}{extensions[0]}")

    def _list(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._listings:
            listing = self._listings[folder] = {}
            try:
                for name in sorted(os.listdir(folder)):
                    listing.setdefault(Path(name).stem, []).append(name)
            except OSError as error:
                raise InputError(f"{folder}: {error.strerror}") from None
        return self._listings[folder]


def _read_list(root: Path, split: str, finder: _FileFinder) -> list[VocImage]:
    """Return the images listed in ImageSets/Segmentation/SPLIT.txt."""
    file = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    lines: dict[VocImage, int] = {}  # image -> line number
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not (name := line.strip()):
            continue
        try:
            image = _find_image(finder, name)
        except InputError as error:
            raise InputError(f"{file}, line {number}: {name!r}: {error}") from None
        if image in lines:
            raise InputError(f"{file}, line {number}: {name!r} duplicates line {lines[image]}; remove one")
        lines[image] = number
    if not lines:
        raise InputError(f"{file}: lists no images")
    return list(lines)


def _find_image(finder: _FileFinder, name: str) -> VocImage:
    name = path_spellings(name)[-1].removeprefix("./")
    image = finder.find("JPEGImages", name.removeprefix("JPEGImages/"), IMAGE_EXTENSIONS)
    inside = image.relative_to(finder.root / "JPEGImages")
    return VocImage(image, finder.find("SegmentationClass", str(inside.with_suffix(".png")), (".png",)))


def _read_classes(root: Path) -> list[str]:
    file = root / LABELS_FILE
    if not file.exists():
        return VOC_CLASSES
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not names or len(set(names)) < len(names) or len(names) >= VOID:
        raise InputError(f"{file}: must name the classes 1 to K (fewer than {VOID}), each once, one per line")
    return names
