"""CIFAR-10 and Imagenette, from their published files, as image folders."""

import pickle
import re
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.errors import InputError, first_line, join_names
from fastbyol.tools.corpora import Progress, atomic_folder, check_free
from fastbyol.tools.sources import (
    SPLITS,
    Archive,
    Entry,
    Folder,
    NewImage,
    check_counts,
    find_image,
    open_source,
    write_images,
)

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]  # by label
BATCH_IMAGES = 10_000  # of CIFAR-10's official batches: five for training and one for the test
_BATCH = re.compile(r"(data_batch_[1-5]|test_batch)(\.bin)?")
_BATCHES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
_PIXEL_BYTES = 3 * 32 * 32

IMAGENETTE_COUNTS = {  # class -> images in train/ and val/, the same at all sizes
    "n01440764": (963, 387),
    "n02102040": (955, 395),
    "n02979186": (993, 357),
    "n03000684": (858, 386),
    "n03028079": (941, 409),
    "n03394916": (956, 394),
    "n03417042": (961, 389),
    "n03425413": (931, 419),
    "n03445777": (951, 399),
    "n03888257": (960, 390),
}


def prepare_cifar10(out: Path, source: Path | None = None, progress: Progress = lambda done, total: None) -> str:
    """Write CIFAR-10 as OUT/train/CLASS/* and OUT/val/CLASS/*.

    The official versions become lossless PNGs, numbered in the official order. Image files are
    copied or hard-linked.

    Args:
        out: the new folder.
        source: tar archive or folder of the official python or binary version, or of image folders
            {train,val}/CLASS; None downloads the python version.
        progress: called after each image with the number done and the total.

    Returns:
        a one-line summary.

    Raises:
        InputError: `out` exists, the download failed, or `source` is no CIFAR-10, incomplete or
            damaged.
    """
    check_free(out)
    with tempfile.TemporaryDirectory() as temporary:
        files = open_source(_download_cifar10(Path(temporary)) if source is None else source)
        with atomic_folder(out) as folder:
            written = write_images(folder, _cifar10_images(files), 6 * BATCH_IMAGES, progress)
            per_class = {"train": BATCH_IMAGES // 2, "val": BATCH_IMAGES // 10}
            expected = {(split, label): per_class[split] for split in SPLITS for label in CIFAR10_CLASSES}
            check_counts(written, f"--source {files.root}", expected)
    return f"CIFAR-10 in {out}: {written.summary()}"


def prepare_imagenette(out: Path, source: Path, progress: Progress = lambda done, total: None) -> str:
    """Write Imagenette as OUT/train/CLASS/*.JPEG and OUT/val/CLASS/*.JPEG.

    Args:
        out: the new folder.
        source: fast.ai's archive imagenette2.tgz, imagenette2-320.tgz or imagenette2-160.tgz, or
            its unpacked folder, which is hard-linked where possible.
        progress: called after each image with the number done and the total.

    Returns:
        a one-line summary.

    Raises:
        InputError: `out` exists, or `source` is no Imagenette, incomplete or damaged.
    """
    check_free(out)
    files = open_source(source)
    expected = {
        (split, label): counts[k] for k, split in enumerate(SPLITS) for label, counts in IMAGENETTE_COUNTS.items()
    }
    with atomic_folder(out) as folder:
        images = (find_image(entry, list(IMAGENETTE_COUNTS), "Imagenette") for entry in files.entries())
        written = write_images(folder, filter(None, images), sum(expected.values()), progress)
        if not written.counts:
            raise InputError(f"--source {source}: holds no images train/CLASS/*.JPEG and val/CLASS/*.JPEG")
        check_counts(written, f"--source {source}", expected)
    return f"Imagenette in {out}: {written.summary()}"


def _download_cifar10(folder: Path) -> Path:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    try:
        download_url(CIFAR10.url, folder, CIFAR10.filename, CIFAR10.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"CIFAR-10 could not be downloaded ({first_line(error)}): download {CIFAR10.url} elsewhere and name it "
            "with --source"
        ) from None
    return folder / CIFAR10.filename


def _cifar10_images(source: Folder | Archive) -> Iterator[NewImage]:
    """Yield the images of any version of CIFAR-10.

    Raises:
        InputError: the source holds none or more than one, or a batch is missing or damaged.
    """
    versions, batches = dict[str, str](), set[str]()
    for entry in source.entries():
        match = _BATCH.fullmatch(entry.name)
        image = None if match else find_image(entry, CIFAR10_CLASSES, "CIFAR-10")
        if match is None and image is None:
            continue
        versions["image folders" if match is None else "binary version" if match[2] else "python version"] = entry.path
        if len(versions) > 1:
            found = " and ".join(f"the {version} ({path})" for version, path in versions.items())
            raise InputError(f"--source {source.root}: holds {found}: name one of them")
        if image is not None:
            yield image
        elif match is not None:
            batches.add(match[1])
            yield from _batch_images(entry, match[1], *(_read_binary(entry) if match[2] else _read_pickle(entry)))
    if not versions:
        raise InputError(
            f"--source {source.root}: holds no version of CIFAR-10: neither {_BATCHES[0]} and the other batches, nor "
            f"{_BATCHES[0]}.bin, nor images train/{CIFAR10_CLASSES[0]}/*"
        )
    if batches and (missing := [name for name in _BATCHES if name not in batches]):
        raise InputError(f"--source {source.root}: {join_names(missing)} is missing")


def _batch_images(entry: Entry, batch: str, pixels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Iterator[NewImage]:
    """Yield the images of a batch: pixels (N, 3072) are the planes R, G and B of 32x32."""
    if len(labels) and labels.max() >= len(CIFAR10_CLASSES):
        raise InputError(f"{entry.where}: has a label of {labels.max()}, but CIFAR-10's are 0 to 9: damaged")
    split, first = ("val", 0) if batch == "test_batch" else ("train", (int(batch[-1]) - 1) * BATCH_IMAGES)
    for k, (planes, label) in enumerate(zip(pixels.reshape(-1, 3, 32, 32), labels, strict=True), first):
        image = np.ascontiguousarray(planes.transpose(1, 2, 0))
        yield NewImage(split, CIFAR10_CLASSES[label], f"{k:05d}.png", image)


def _read_binary(entry: Entry) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return pixels (N, 3072) and labels (N,): an image is its label and its pixels, all bytes."""
    data, wanted = entry.read(), BATCH_IMAGES * (1 + _PIXEL_BYTES)
    if len(data) != wanted:
        raise InputError(
            f"{entry.where}: has {len(data)} bytes, but {BATCH_IMAGES} images need {wanted}: truncated or damaged"
        )
    records = np.frombuffer(data, dtype=np.uint8).reshape(BATCH_IMAGES, -1)
    return records[:, 1:], records[:, 0]


def _read_pickle(entry: Entry) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return pixels (N, 3072) and labels (N,) of a pickled dict with data and labels."""
    data = entry.read()
    try:
        batch = _BatchUnpickler(BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(f"{entry.where}: not a batch of CIFAR-10, or damaged: {first_line(error)}") from None
    batch = {_text(key): value for key, value in batch.items()} if isinstance(batch, dict) else {}
    pixels, labels = batch.get("data"), batch.get("labels")
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.shape == (BATCH_IMAGES, _PIXEL_BYTES)
        and isinstance(labels, list)
        and len(labels) == BATCH_IMAGES
        and all(isinstance(label, int) and 0 <= label < 256 for label in labels)
    ):
        raise InputError(
            f"{entry.where}: not a batch of CIFAR-10, or damaged: expected {BATCH_IMAGES} images and labels"
        )
    return pixels, np.array(labels, dtype=np.uint8)


def _text(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key


def _encode_latin1(text: str, encoding: str) -> bytes:
    """What pickle.dump(..., protocol=2) of Python 3 stores for bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text in {encoding!r}")
    return text.encode(encoding)


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # since numpy 2
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode_latin1,
}


class _BatchUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and plain values, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no batch needs: not loaded")
        return _ALLOWED[module, name]
