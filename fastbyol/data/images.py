"""What every set of images can do, whether it lies in a folder or in one file, and the part of it that a run uses."""

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

UNLABELLED = -1


class ImageSet(ABC):
    """N images in a fixed order, each with a class index."""

    root: Path  # the folder or the file that holds them, for messages
    labels: NDArray[np.int64]  # (N,), UNLABELLED where the set has none
    classes: list[str]  # names; empty where the set has no labels

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

    def where(self, index: int) -> str:
        """Where an image lies, for messages."""
        return f"{self.root}/{self.name(index)}"

    def fingerprint(self) -> dict[str, list]:
        """What tells these images from others: per class name ('' without labels) their number and a digest of their names in order."""
        found: dict[str, list] = {}
        for i in range(len(self)):
            name = self.classes[self.labels[i]] if self.classes else ""
            known = found.setdefault(name, [0, hashlib.blake2b(digest_size=8)])
            known[0] += 1
            known[1].update(self.name(i).encode("utf-8", "surrogateescape") + b"\0")
        return {name: [count, digest.hexdigest()] for name, (count, digest) in found.items()}

    def spread(self, limit: int) -> Self:
        """At most `limit` of the images, evenly spread over the set and so over the classes."""
        return self if len(self) <= limit else self.take(self.evenly(limit))

    def evenly(self, limit: int) -> NDArray[np.int64]:
        """The indices of the images of `spread`."""
        n = len(self)
        return np.arange(n) if n <= limit else np.linspace(0, n - 1, limit).astype(np.int64)
