"""Writer of .beton files, which FFCV's loader reads too. See beton.py for the format."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from fastbyol.data import beton
from fastbyol.data.decode import BadImage, decode, is_complete_jpeg, jpeg_size
from fastbyol.data.images import Images
from fastbyol.data.metadata import without_metadata
from fastbyol.data.workers import map_in_order
from fastbyol.errors import InputError, RunError, error_reason
from fastbyol.runtime.files import atomic_write, make_folder

PAGE_SIZE = 1 << 23  # ffcv's default
AUTO_RAW_BYTES = (
    16_384  # up to this many bytes of pixels mode "auto" stores raw: reading them is cheaper than any decode
)

Mode = Literal["jpg", "raw", "auto"]


class Sample(NamedTuple):
    """An image in the form in which it is stored."""

    mode: int
    width: int
    height: int
    data: bytes


def pack(
    images: Images,
    out: Path,
    *,
    mode: Mode = "auto",
    max_side: int | None = None,
    quality: int = 90,
    skip_bad: bool = False,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Write images as one .beton file with the fields "image" and, if there are labels, "label".

    JPEG files that need no change are copied byte for byte, without metadata. Images with an EXIF
    orientation, CMYK, 16 bits or alpha are converted to upright 8-bit RGB.

    Args:
        images: the data set.
        out: path of the new file.
        mode: "jpg"; "raw" pixels, which need no decoding but 5 to 20 times the bytes; "auto": raw
            for images of at most AUTO_RAW_BYTES bytes of pixels, else JPEG.
        max_side: longer side in pixels to which larger images are reduced, by averaging areas.
        quality: JPEG quality of newly encoded images.
        skip_bad: leave out unreadable images instead of raising InputError.
        threads: number of threads; 0 is one per core.
        progress: called after each image with the number done and the total.

    Returns:
        a one-line summary.

    Raises:
        InputError: `out` exists, its folder cannot be made, or an image is unreadable.
        RunError: writing `out` failed.
    """
    if max_side is not None and max_side < 1:
        raise InputError(f"--max-side {max_side}: must be at least 1 pixel")
    if not 1 <= quality <= 100:
        raise InputError(f"--quality {quality}: must lie in 1..100")
    if os.path.lexists(out):
        raise InputError(f"{out} exists; it is not overwritten: remove it or choose another name")

    def encode(index: int) -> Sample | str:
        try:
            return _encode(images.read(index), mode, max_side, quality)
        except OSError as error:
            return error_reason(error)
        except BadImage as error:
            return str(error)

    try:
        make_folder(out.parent)
    except OSError as error:
        raise InputError(f"{out}: cannot be made: {error.strerror}") from None
    try:
        with atomic_write(out) as partial, open(partial, "w+b") as file:
            writer = _Writer(file, len(images), images.classes)
            skipped = []
            for index, sample in enumerate(map_in_order(encode, range(len(images)), threads)):
                if isinstance(sample, str):
                    text = f"{images.location(index)}: {sample}"
                    if not skip_bad:
                        raise InputError(f"{text}; --skip-bad leaves such images out")
                    skipped.append(text)
                else:
                    writer.add(sample, int(images.labels[index]))
                progress(index + 1, len(images))
            if writer.count == 0:
                raise InputError(f"{images.root}: none of the {len(images)} images can be read")
            size = writer.finish()
    except OSError as error:
        raise RunError(f"{out}: {error_reason(error)}; nothing was kept") from None
    left_out = f"; {len(skipped)} left out, the first: {skipped[0]}" if skipped else ""
    modes = f"{writer.count - writer.raw} JPEG, {writer.raw} raw"
    return f"{out}: {writer.count} images ({modes}), {size / 1e6:.1f} MB{left_out}"


class _Writer:
    """Appends samples to a file.

    The header is written last, so that an unfinished file is recognized as such.
    """

    def __init__(self, file: IO[bytes], capacity: int, classes: list[str]) -> None:
        self._file, self._classes, self.count, self.raw = file, classes, 0, 0
        self._types = {"image": beton.IMAGE_TYPE} | ({"label": beton.INTEGER_TYPE} if classes else {})
        row = np.dtype([("", beton.COLUMN_TYPES[kind]) for kind in self._types.values()], align=True)
        self._rows = np.zeros(capacity, dtype=row)
        self._sizes = np.zeros(capacity, dtype=np.int64)
        self._rows_start = beton.HEADER.itemsize + len(self._types) * beton.DESCRIPTOR.itemsize
        self._page_size = PAGE_SIZE
        self._end = _round_up(self._rows_start + self._rows.nbytes, self._page_size)
        file.seek(self._end)

    def add(self, sample: Sample, label: int) -> None:
        size = len(sample.data)
        if size > self._page_size:
            self._page_size = 1 << (size - 1).bit_length()
        start = self._end
        if start // self._page_size != (start + size - 1) // self._page_size:
            start = _round_up(start, self._page_size)
            self._file.seek(start)
        self._file.write(sample.data)
        self._end = start + size
        row = self._rows[self.count]
        row["f0"] = (sample.mode, sample.width, sample.height, start)
        if self._classes:
            row["f1"] = label
        self._sizes[self.count] = size
        self.count += 1
        self.raw += sample.mode == beton.RAW

    def finish(self) -> int:
        """Write everything but the images; return the size of the file."""
        file, n = self._file, self.count
        names = json.dumps(self._classes).encode()
        names_start = _round_up(self._end, self._page_size)
        file.seek(names_start)
        file.write(names)
        table = np.zeros(n, dtype=beton.TABLE)
        table["sample"], table["start"], table["size"] = np.arange(n), self._rows["f0"]["start"][:n], self._sizes[:n]
        file.write(table.tobytes())
        size = file.tell()
        descriptors = np.zeros(len(self._types), dtype=beton.DESCRIPTOR)
        for k, (name, kind) in enumerate(self._types.items()):
            descriptors[k]["type"] = kind
            descriptors[k]["name"][: len(name)] = np.frombuffer(name.encode(), dtype=np.uint8)
            if kind == beton.INTEGER_TYPE:
                position = np.array([(beton.CLASS_NAMES_MAGIC, names_start, len(names))], dtype=beton.CLASS_NAMES)
                descriptors[k]["arguments"][: beton.CLASS_NAMES.itemsize] = position.view(np.uint8)
        header = np.array(
            [(beton.VERSION, len(self._types), self._page_size, n, names_start + len(names))], dtype=beton.HEADER
        )
        file.seek(beton.HEADER.itemsize)
        file.write(descriptors.tobytes())
        file.write(self._rows[:n].tobytes())
        file.seek(0)
        file.write(header.tobytes())
        file.flush()
        return size


def _round_up(offset: int, page_size: int) -> int:
    return -(-offset // page_size) * page_size


def _encode(data: bytes | NDArray[np.uint8], mode: Mode, max_side: int | None, quality: int) -> Sample:
    """Convert an image to the form in which it is stored.

    Raises:
        BadImage: the image cannot be decoded or is too large for the format.
    """
    size = jpeg_size(data) if isinstance(data, bytes) and is_complete_jpeg(data) else None
    if isinstance(data, bytes) and size is not None and (max_side is None or max(size) <= max_side):
        height, width = size
        if mode == "jpg" or (mode == "auto" and 3 * height * width > AUTO_RAW_BYTES):
            return Sample(beton.JPEG, width, height, without_metadata(data))
    pixels = decode(data)
    if max_side is not None and max(pixels.shape[:2]) > max_side:
        pixels = _reduce(pixels, max_side)
    height, width = pixels.shape[:2]
    raw = mode == "raw" or (mode == "auto" and pixels.nbytes <= AUTO_RAW_BYTES)
    longest = 65_535 if raw else 65_500  # libjpeg's limit
    if max(height, width) > longest:
        raise BadImage(f"{width}x{height} pixels: a .beton file holds sides up to {longest:,}; --max-side reduces them")
    if raw:
        return Sample(beton.RAW, width, height, pixels.tobytes())
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality, colorsubsampling="420")
    return Sample(beton.JPEG, width, height, encoded)


def _reduce(pixels: NDArray[np.uint8], max_side: int) -> NDArray[np.uint8]:
    scale = max_side / max(pixels.shape[:2])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))
