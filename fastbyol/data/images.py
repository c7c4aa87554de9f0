"""Base class of data sets, whether the images are files of a folder or parts of one file."""

import hashlib
import os
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fastbyol.errors import printable

UNLABELED = -1
MAX_CLASSES = 10_000_000  # a larger label is no class number, and one name per class would exhaust the memory
_HASHED_IMAGES = 64  # images that are read to tell one set from another; reading all takes as long as an epoch


@runtime_checkable
class ImageSet(Protocol):
    """What own images need: their number, and a way to read one.

    Threads call `read` at the same time. It returns an encoded file (JPEG, PNG, ...), or uint8
    pixels (H, W, 3); an exception means that this image cannot be read, and it is skipped. Images
    must stay the same during a run.

    Optional attributes:

    - `labels`: N class numbers or names, None for an image without a label.
    - `classes`: the classes' names, if `labels` are numbers.
    - `name(index)`: a name for messages.
    """

    def __len__(self) -> int:
        """Return the number of images N."""

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """Return image `index`, 0 <= index < N."""


class Images(ABC):
    """N images in a fixed order, each with a class index."""

    root: Path | str  # the folder, file or URL that holds them, for messages
    labels: NDArray[np.int64]  # (N,), UNLABELED if the set has none
    classes: list[str]  # names; empty if the set has no labels
    notes: tuple[str, ...] = ()  # what a user should know about how the set was found, one line each

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_remote(self) -> bool:
        """True if reading an image takes a network's time."""
        return False

    @abstractmethod
    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """Return a stored image: an encoded file, or writable C-contiguous pixels (H, W, 3).

        Raises:
            OSError: the image cannot be read. It is skipped.
            RunError: its storage does not answer. The run ends.
        """

    def add_note(self, note: str) -> None:
        """Put a line in front of the notes."""
        object.__setattr__(self, "notes", (printable(note), *self.notes))  # most sets are frozen

    def name(self, index: int) -> str:
        """Return the name of an image within the set."""
        return str(index)

    def subset(self, indices: NDArray[np.int64]) -> "Images":
        """Return the set of the images at `indices`, in that order."""
        return ImageSubset(self, indices, self.labels[indices], self.classes)

    def with_labels(self, labels: NDArray[np.int64], classes: list[str]) -> "Images":
        """Return the same images with other labels."""
        return ImageSubset(self, np.arange(len(self)), labels, classes)

    def _identity(self, members: NDArray[np.int64]) -> bytes:
        """Return bytes that identify the images at `members`, in order, without reading them."""
        return pack_names([self.name(i) for i in members.tolist()])

    def fingerprint(self) -> dict[str, list[int | str]]:
        """Return class -> [number of images, hash of their names]; '' is for unlabeled images.

        The hash has 16 hex digits. Images of a .beton file have no names; their number, stored
        size, mode and shape are hashed instead. The set's location does not matter.
        """
        order = np.argsort(self.labels, kind="stable")
        ends = np.searchsorted(self.labels[order], np.arange(UNLABELED, len(self.classes)), side="right")
        parts = dict(zip(["", *self.classes], np.split(order, ends[:-1]), strict=True))
        return {
            name: [len(members), hashlib.blake2b(self._identity(members), digest_size=8).hexdigest()]
            for name, members in parts.items()
            if name or len(members)
        }

    def content_hashes(self) -> list[str]:
        """Return hashes of the bytes of up to 64 evenly spaced images; '' for unreadable ones."""
        return [self._content_hash(index) for index in self.subsample_indices(_HASHED_IMAGES).tolist()]

    def _content_hash(self, index: int) -> str:
        try:
            return hashlib.blake2b(self.read(index), digest_size=8).hexdigest()
        except OSError:
            return ""

    def location(self, index: int) -> str:
        """Return where an image is stored, for messages."""
        return f"{self.root}/{self.name(index)}"

    def subsample(self, limit: int) -> "Images":
        """Return at most `limit` images, evenly spaced over the set and so over its classes."""
        return self if len(self) <= limit else self.subset(self.subsample_indices(limit))

    def subsample_indices(self, limit: int) -> NDArray[np.int64]:
        """Return the indices of the images of `subsample`."""
        n = len(self)
        return np.arange(n) if n <= limit else np.linspace(0, n - 1, limit).astype(np.int64)


class ImageSubset(Images):
    """Some images of another set, in another order or with other labels.

    Args:
        images: the other set.
        indices: (N,) positions in it.
        labels: (N,).
        classes: names of the classes.
    """

    def __init__(
        self, images: Images, indices: NDArray[np.int64], labels: NDArray[np.int64], classes: list[str]
    ) -> None:
        self._images, self._indices, self.labels = images, indices, labels
        self.classes, self.root, self.notes = classes, images.root, images.notes

    @property
    def is_remote(self) -> bool:
        """As the other set's."""
        return self._images.is_remote

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """Return a stored image."""
        return self._images.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        """Return the name of an image within the other set."""
        return self._images.name(int(self._indices[index]))

    def location(self, index: int) -> str:
        """Return where an image is stored."""
        return self._images.location(int(self._indices[index]))

    def subset(self, indices: NDArray[np.int64]) -> "ImageSubset":
        """Return the images at `indices`."""
        return ImageSubset(self._images, self._indices[indices], self.labels[indices], self.classes)

    def with_labels(self, labels: NDArray[np.int64], classes: list[str]) -> "ImageSubset":
        """Return the same images with other labels."""
        return ImageSubset(self._images, self._indices, labels, classes)

    def _identity(self, members: NDArray[np.int64]) -> bytes:
        return self._images._identity(self._indices[members])


def normalize_name(name: str) -> str:
    """Return the name in Unicode's composed form (NFC); macOS decomposes accents."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def number_classes(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Return the sorted, normalized class names, and the number of each of `names` among them.

    Sets with the same classes thus number them equally, whatever system wrote the names.
    """
    classes = sorted(set(map(normalize_name, names)))
    number = {name: k for k, name in enumerate(classes)}
    return classes, np.array([number[normalize_name(name)] for name in names], dtype=np.int64)


def label_images(values: Sequence[int | str | None]) -> tuple[NDArray[np.int64], list[str]]:
    """Return labels (N,) and class names of images whose classes are given as numbers or names.

    Numbers 0..C-1 keep their order and are their own names. If there is a name among them, classes
    are numbered by their names, as in a folder. None is an image without a label.

    Raises:
        ValueError: a number is negative or no class number.
    """
    given = [value for value in values if value is not None]
    labels = np.full(len(values), UNLABELED, dtype=np.int64)
    if not given:
        return labels, []
    where = [k for k, value in enumerate(values) if value is not None]
    if not all(isinstance(value, int) for value in given):
        classes, numbers = number_classes([str(value) for value in given])
        labels[where] = numbers
        return labels, classes
    labels[where] = given
    if min(given) < 0 or max(given) >= MAX_CLASSES:
        wrong = next(value for value in given if not 0 <= value < MAX_CLASSES)
        raise ValueError(f"label {wrong} is not in 0..{MAX_CLASSES - 1}")
    return labels, [str(k) for k in range(max(given) + 1)]


def pack_names(names: Iterable[str]) -> bytes:
    """Join names, each terminated by a zero, so that no names and one empty name differ."""
    return os.fsencode("\0".join([*names, ""]))
