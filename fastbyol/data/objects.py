"""Images that a Python program has: lists, arrays, torch Datasets, Hugging Face datasets, and any
object with the methods of `ImageSet`.
"""

import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fastbyol.data.images import Images, ImageSet, label_images
from fastbyol.data.storage import is_url
from fastbyol.errors import InputError, StorageError, first_line

_NPZ_IMAGES = ("images", "x", "data", "arr_0")
_NPZ_LABELS = ("labels", "y", "targets", "label", "arr_1")


class ObjectImages(Images):
    """Images that a function reads.

    Args:
        kind: what holds them, for messages.
        read_one: index -> bytes, path, pixels or PIL image.
        labels, classes: as in `Images`.
        name: index -> name; None numbers the images.
    """

    def __init__(
        self,
        kind: str,
        read_one: Callable[[int], Any],
        labels: NDArray[np.int64],
        classes: list[str],
        name: Callable[[int], str] | None = None,
    ) -> None:
        self.root, self.labels, self.classes = kind, labels, classes
        self._read_one, self._name = read_one, name

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """Return a stored image.

        Raises:
            OSError: the object raised an exception, or returned no image.
        """
        try:
            return stored_image(self._read_one(index))
        except StorageError:
            raise
        except Exception as error:  # any exception of a user's code is one bad image
            text = first_line(error) or type(error).__name__
            raise OSError(
                text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"
            ) from None

    def name(self, index: int) -> str:
        """Return the image's name, or its number."""
        return str(index) if self._name is None else str(self._name(index))

    def location(self, index: int) -> str:
        """Return the object and the image's name."""
        return f"{self.root}, image {self.name(index)}"


def as_images(source: Any, *, name: str = "images") -> Images:
    """Return an object's images.

    Args:
        source: an object with `__len__` and `read` (`ImageSet`); a list of images or of (image,
            label) pairs, where an image is bytes, a path, pixels or a PIL image; an array (N, H, W,
            3), or a pair of it and labels (N,); a Hugging Face dataset; a torch Dataset.
        name: of the argument, for messages.

    Raises:
        InputError: it is none of these, is empty, or its images are not uint8 or PIL images.
    """
    kind = f"{name} ({type(source).__name__})"
    if isinstance(source, Images):
        return source
    if isinstance(source, dict):
        raise InputError(f"{kind}: it holds splits ({', '.join(map(str, source))}); give one of them")
    if hasattr(source, "column_names") and hasattr(source, "features"):
        images = _hugging_face(source, kind)
    elif isinstance(source, np.ndarray):
        images = _from_arrays(source, None, kind)
    elif isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], np.ndarray) and source[0].ndim > 2:
        images = _from_arrays(source[0], source[1], kind)
    elif isinstance(source, list | tuple):
        images = _from_list(source, kind)
    elif hasattr(source, "__len__") and hasattr(source, "read"):
        images = _from_protocol(source, kind)
    elif hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        images = _from_torch(source, kind)
    else:
        raise InputError(
            f"{kind}: give a path, a list of (image, label), a torch Dataset with __len__, a Hugging Face dataset, or an "
            "object with __len__ and read(index)"
        )
    if len(images) == 0:
        raise InputError(f"{kind}: it holds no images")
    return images


def open_npz(path: Path, split: str) -> Images:
    """Return the images of a split of a .npz file.

    Arrays: `images` and `labels`, or for each split `train_images` and `train_labels`, as in
    MedMNIST, or `x_train` and `y_train`, as in Keras.

    Args:
        split: name of the split; "." takes the arrays without a split's name, or else `train`.

    Raises:
        InputError: the file cannot be read, or has no such arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = _npz_names(list(arrays), "train" if split == "." else split)
            if images is None:
                raise InputError(f"{path}: no array of images for {split!r} among {', '.join(arrays)}")
            return _from_arrays(arrays[images], None if labels is None else arrays[labels], str(path))
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(f"{path}: not a readable .npz file: {first_line(error)}") from None


def _npz_names(arrays: Sequence[str], split: str) -> tuple[str | None, str | None]:
    is_train = split == "train"  # other splits must not take the arrays of a file with one split
    images = [f"{split}_images", f"x_{split}", f"images_{split}", *(_NPZ_IMAGES if is_train else ())]
    labels = [f"{split}_labels", f"y_{split}", f"labels_{split}", *(_NPZ_LABELS if is_train else ())]
    return next((n for n in images if n in arrays), None), next((n for n in labels if n in arrays), None)


def stored_image(item: Any) -> bytes | NDArray[np.uint8]:
    """Return an image as `Images.read` does.

    Args:
        item: bytes of a file; a path; a PIL image; uint8 pixels (H, W), (H, W, 1), (H, W, 3) or (H,
            W, 4) as an array, or as a tensor (C, H, W).

    Raises:
        ValueError: it is something else.
    """
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    if isinstance(item, str | os.PathLike):
        return Path(item).read_bytes()
    if isinstance(item, Image.Image):
        if item.mode.startswith(("I", "F")):
            raise ValueError(f"a PIL image of mode {item.mode} has more than 8 bits; convert it to 8")
        return np.array(ImageOps.exif_transpose(item).convert("RGB"))
    if type(item).__module__.startswith("torch") and hasattr(item, "numpy"):
        item = item.numpy()
        item = item.transpose(1, 2, 0) if item.ndim == 3 and item.shape[0] in (1, 3, 4) else item
    if not isinstance(item, np.ndarray):
        raise ValueError(f"a {type(item).__name__} is no image; give bytes, a path, uint8 pixels or a PIL image")
    if item.dtype != np.uint8:
        raise ValueError(
            f"pixels must be uint8, not {item.dtype}; leave out transforms, since fastbyol augments images"
        )
    pixels = item[..., None] if item.ndim == 2 else item
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise ValueError(f"pixels must have the shape (H, W, 3) or (H, W), not {item.shape}")
    rgb = pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3]
    return np.array(rgb, dtype=np.uint8, order="C")


def _labels(values: Any, count: int, kind: str, names: Any = None) -> tuple[NDArray[np.int64], list[str]]:
    """Return labels and class names."""
    try:
        given = [_plain(value) for value in values]
        if len(given) != count:
            raise ValueError(f"{count} images but {len(given)} labels")
        labels, classes = label_images([None if value == -1 else value for value in given])
    except ValueError as error:
        raise InputError(f"{kind}: {error}") from None
    names = [str(name) for name in names] if isinstance(names, list | tuple) else []
    return labels, names if len(names) >= len(classes) else classes


def _plain(value: Any) -> int | str | None:
    """Return a label as an int or a str: numpy's and torch's scalars too."""
    if value is None or isinstance(value, str):
        return value
    if hasattr(value, "item"):
        values = np.asarray(value).reshape(-1)
        if len(values) != 1:
            raise ValueError(f"a label with {len(values)} values is no class; choose one of them")
        value = values[0].item()
    if isinstance(value, str):
        return value
    if not isinstance(value, int | float) or value != value or int(value) != value:
        raise ValueError(f"label {value!r} is neither a whole number nor a name")
    return int(value)


def _from_arrays(pixels: NDArray, labels: Any, kind: str) -> Images:
    if pixels.ndim not in (3, 4):
        raise InputError(f"{kind}: images must have the shape (N, H, W, 3) or (N, H, W), not {pixels.shape}")
    _check_first(lambda index: pixels[index], len(pixels), kind)
    values, classes = _labels([None] * len(pixels) if labels is None else labels, len(pixels), kind)
    return ObjectImages(kind, lambda index: pixels[index], values, classes)


def _from_list(items: Sequence[Any], kind: str) -> Images:
    pairs = [item if isinstance(item, tuple | list) and len(item) == 2 else (item, None) for item in items]
    if any(isinstance(image, str) and is_url(image) for image, _ in pairs):
        raise InputError(f"{kind}: write URLs into a .csv file of path and label, and name that file")
    _check_first(lambda index: pairs[index][0], len(pairs), kind)
    labels, classes = _labels([label for _, label in pairs], len(pairs), kind)

    def name(index: int) -> str:
        image = pairs[index][0]
        return str(image) if isinstance(image, str | os.PathLike) else str(index)

    return ObjectImages(kind, lambda index: pairs[index][0], labels, classes, name)


def _from_protocol(source: ImageSet, kind: str) -> Images:
    count = len(source)
    labels, classes = getattr(source, "labels", None), getattr(source, "classes", None)
    values, names = _labels([None] * count if labels is None else labels, count, kind, classes)
    _check_first(source.read, count, kind)
    return ObjectImages(kind, source.read, values, names, getattr(source, "name", None))


def _hugging_face(dataset: Any, kind: str) -> Images:
    """Images of a column of type Image, as they are stored; labels of a ClassLabel."""
    types = {name: type(feature).__name__ for name, feature in dataset.features.items()}
    column = next((name for name, found in types.items() if found == "Image"), None)
    if column is None:
        raise InputError(f"{kind}: no column of type Image among {', '.join(types)}")
    label = next((name for name, found in types.items() if found == "ClassLabel"), None)
    if label is None:
        label = next((name for name in ("label", "labels") if name in types), None)
    values = [None] * len(dataset) if label is None else dataset.with_format(None)[label]
    labels, classes = _labels(values, len(dataset), kind, getattr(dataset.features.get(label), "names", None))
    stored = dataset.select_columns([column]).with_format(None)
    stored = stored.cast_column(column, type(dataset.features[column])(decode=False))

    def read_one(index: int) -> Any:
        image = stored[index][column]
        if image is None:
            raise ValueError("the row has no image")
        return image["path"] if image["bytes"] is None else image["bytes"]

    _check_first(read_one, len(dataset), kind)
    return ObjectImages(kind, read_one, labels, classes)


def _from_torch(dataset: Any, kind: str) -> Images:
    """A map-style Dataset of images or of (image, label, ...).

    Files of torchvision's folders are read as they are, unless the dataset has a transform.
    """
    files = dataset.samples if _reads_plain_files(dataset) else None
    names = getattr(dataset, "classes", None)
    if files:
        images = _from_list(files, kind)
        if isinstance(names, list) and len(names) >= len(images.classes):
            images.classes = [str(name) for name in names]
        return images
    targets = _targets(dataset)
    labels, classes = _labels([None] * len(dataset) if targets is None else targets, len(dataset), kind, names)

    def read_one(index: int) -> Any:
        item = dataset[index]
        if isinstance(item, dict):
            return next((item[key] for key in ("image", "img", "pixel_values") if key in item), item)
        return item[0] if isinstance(item, tuple | list) else item

    _check_first(read_one, len(dataset), kind)
    images = ObjectImages(kind, read_one, labels, classes)
    if targets is None:
        images.notes = (f"{kind}: it has no `targets`, so its images have no labels",)
    return images


def _targets(dataset: Any) -> Sequence[Any] | None:
    """Return the labels of a torch Dataset, without reading its images; None if it tells none."""
    for name in ("targets", "labels", "_labels"):
        if (found := getattr(dataset, name, None)) is not None and hasattr(found, "__len__"):
            return list(found)
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):  # Subset
        inner = _targets(dataset.dataset)
        return None if inner is None else [inner[i] for i in dataset.indices]
    if isinstance(parts := getattr(dataset, "datasets", None), list):  # ConcatDataset
        found = [_targets(part) for part in parts]
        return None if any(part is None for part in found) else [value for part in found for value in part or ()]
    if isinstance(tensors := getattr(dataset, "tensors", None), tuple) and len(tensors) > 1:  # TensorDataset
        return list(tensors[1])
    return None


def _reads_plain_files(dataset: Any) -> bool:
    """Return True for torchvision's folders without an own transform, loader or method."""
    from torchvision.datasets import DatasetFolder
    from torchvision.datasets.folder import default_loader

    if not isinstance(dataset, DatasetFolder) or type(dataset).__getitem__ is not DatasetFolder.__getitem__:
        return False
    return dataset.loader is default_loader and dataset.transform is None and dataset.target_transform is None


def _check_first(read_one: Callable[[int], Any], count: int, kind: str) -> None:
    """Read the first image, so that images of a wrong kind are an error before anything starts.

    One that cannot be read is skipped later, with its reason.
    """
    if not count:
        return
    try:
        item = read_one(0)
    except Exception:
        return
    try:
        stored_image(item)
    except OSError:
        return
    except ValueError as error:
        raise InputError(f"{kind}: image 0: {first_line(error)}") from None
