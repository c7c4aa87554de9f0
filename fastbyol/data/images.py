"""What every set of images can do, whether it lies in a folder or in one file, and the part of it that a run uses."""

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

UNLABELED = -1
_SAMPLED = 64  # images that are read to tell a set from another: reading all takes as long as an epoch


class ImageSet(ABC):
    """N images in a fixed order, each with a class index."""

    root: Path  # the folder or the file that holds them, for messages
    labels: NDArray[np.int64]  # (N,), UNLABELED where the set has none
    classes: list[str]  # names; empty where the set has no labels
    notes: tuple[str, ...]  # what a user should know of how the set was found, a line each

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """An image as it is stored: an encoded file's bytes, or pixels (H, W, 3), C-contiguous and writable.

        Raises:
            OSError: it cannot be read.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What an image is called within the set."""

    @abstractmethod
    def take(self, keep: NDArray[np.int64]) -> Self:
        """The set of the images at `keep`, in that order."""

    @abstractmethod
    def relabel(self, labels: NDArray[np.int64], classes: list[str]) -> Self:
        """The same images with other labels."""

    @abstractmethod
    def _contents(self, members: NDArray[np.int64]) -> bytes:
        """What tells the images at `members` from others, in that order, without reading them."""

    def fingerprint(self) -> dict[str, list[int | str]]:
        """Class -> [its number of images, 16 hex digits of their names in order]; '' are the images without a class.

        Of a .beton file, whose images have no names, number, stored size, mode and shape count. Where the set lies does not.
        """
        order = np.argsort(self.labels, kind="stable")
        ends = np.searchsorted(self.labels[order], np.arange(UNLABELED, len(self.classes)), side="right")
        parts = dict(zip(["", *self.classes], np.split(order, ends[:-1]), strict=True))
        return {
            name: [len(members), hashlib.blake2b(self._contents(members), digest_size=8).hexdigest()]
            for name, members in parts.items()
            if name or len(members)
        }

    def sample(self) -> list[str]:
        """16 hex digits of each of a few images as they are stored, evenly spread; empty for one that cannot be read."""
        return [self._digest(index) for index in self.evenly(_SAMPLED).tolist()]

    def _digest(self, index: int) -> str:
        try:
            return hashlib.blake2b(self.read(index), digest_size=8).hexdigest()
        except OSError:
            return ""

    def where(self, index: int) -> str:
        """Where an image lies, for messages."""
        return f"{self.root}/{self.name(index)}"

    def spread(self, limit: int) -> Self:
        """At most `limit` of the images, evenly spread over the set and so over the classes."""
        return self if len(self) <= limit else self.take(self.evenly(limit))

    def evenly(self, limit: int) -> NDArray[np.int64]:
        """The indices of the images of `spread`."""
        n = len(self)
        return np.arange(n) if n <= limit else np.linspace(0, n - 1, limit).astype(np.int64)


def composed(name: str) -> str:
    """The name in Unicode's composed form (NFC): macOS writes an accent as a character of its own, other systems do not."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def number_classes(names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The classes that names stand for, composed and sorted, and each name's number among them.

    So that sets with the same classes give them the same numbers, whatever system wrote the names.
    """
    classes = sorted(set(map(composed, names)))
    number = {name: k for k, name in enumerate(classes)}
    return classes, np.array([number[composed(name)] for name in names], dtype=np.int64)
