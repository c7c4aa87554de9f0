"""Base class of data sets, whether the images are files of a folder or parts of one file."""

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

UNLABELED = -1
_HASHED_IMAGES = 64  # images that are read to tell one set from another; reading all takes as long as an epoch


class ImageSet(ABC):
    """N images in a fixed order, each with a class index."""

    root: Path  # the folder or the file that holds them, for messages
    labels: NDArray[np.int64]  # (N,), UNLABELED if the set has none
    classes: list[str]  # names; empty if the set has no labels
    notes: tuple[str, ...]  # what a user should know about how the set was found, one line each

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """Return a stored image: an encoded file, or writable C-contiguous pixels (H, W, 3).

        Raises:
            OSError: the image cannot be read.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of an image within the set."""

    @abstractmethod
    def subset(self, indices: NDArray[np.int64]) -> Self:
        """Return the set of the images at `indices`, in that order."""

    @abstractmethod
    def with_labels(self, labels: NDArray[np.int64], classes: list[str]) -> Self:
        """Return the same images with other labels."""

    @abstractmethod
    def _identity(self, members: NDArray[np.int64]) -> bytes:
        """Return bytes that identify the images at `members`, in order, without reading them."""

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

    def subsample(self, limit: int) -> Self:
        """Return at most `limit` images, evenly spaced over the set and so over its classes."""
        return self if len(self) <= limit else self.subset(self.subsample_indices(limit))

    def subsample_indices(self, limit: int) -> NDArray[np.int64]:
        """Return the indices of the images of `subsample`."""
        n = len(self)
        return np.arange(n) if n <= limit else np.linspace(0, n - 1, limit).astype(np.int64)


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
