"""FFCV's .beton files, version 2: a reader that believes no number it has not checked, and a writer. ffcv is not needed.

Layout, all little-endian:

    header            version u2 = 2, fields u2, page size u4, samples u8, start of the allocation table u8
    field descriptors type u1, name 16 bytes, arguments 1,024 bytes
    rows              one per sample, the fields' values as an aligned struct; an image is mode u1 (0 JPEG, 1 raw), width u2,
                      height u2, start u8; an integer i8, a float f8, bytes and JSON start u8 and size u8, an array start u8
    pages             the images' bytes; no image lies across a multiple of the page size
    allocation table  (sample u8, start u8, size u8) in any order, up to the end of the file

The writer adds the names of the classes between the pages and the table, and the label descriptor's arguments say where:
ffcv reads neither.

Images are read by pread, not from a memory map: the reader threads wait for the disk without the interpreter lock, and a
file that another process cuts short is a read error, where a map would end the process with SIGBUS.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from fastbyol.data.decode import BadImage, decode, is_whole_jpeg, jpeg_size, without_metadata
from fastbyol.data.images import UNLABELED, ImageSet, number_classes
from fastbyol.data.workers import map_in_order
from fastbyol.errors import InputError, RunError, error_reason
from fastbyol.runtime.files import atomic_write, make_folder

VERSION = 2
HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")])
DESCRIPTOR = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
TABLE = np.dtype([("sample", "<u8"), ("start", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("start", "<u8")])
INTEGER_TYPE, IMAGE_TYPE = 1, 2
_BYTES = np.dtype([("start", "<u8"), ("size", "<u8")])
# Type of a field -> its part of a row: float, integer, image, bytes, array, JSON, tensor.
ROW_PARTS = {0: "<f8", INTEGER_TYPE: "<i8", IMAGE_TYPE: IMAGE, 3: _BYTES, 4: "<u8", 5: _BYTES, 6: "<u8"}
JPEG, RAW = 0, 1
PAGE_SIZE = 1 << 23  # ffcv's own default
MAX_CLASSES = 10_000_000  # a larger label is no class number, and one name per class would fill the memory
_CLASSES_AT = np.dtype([("magic", "S16"), ("start", "<u8"), ("size", "<u8")])  # in the label's arguments
_MAGIC = b"fastbyol classes"

Mode = Literal["jpg", "raw", "auto"]


class BadBeton(InputError, ValueError):
    """A file that is no .beton file or is damaged; the text names the file and the fault."""


@dataclass(frozen=True, eq=False)
class BetonFile(ImageSet):
    """An open .beton file's images; N of them."""

    root: Path
    labels: NDArray[np.int64]
    classes: list[str]
    samples: NDArray[np.int64]  # (N,) number of each image in the file
    modes: NDArray[np.uint8]  # (N,) JPEG or RAW
    shapes: NDArray[np.int64]  # (N, 2) height, width of raw images; what the file says of JPEGs
    starts: NDArray[np.int64]  # (N,) of each image's bytes
    sizes: NDArray[np.int64]  # (N,) in bytes
    fields: tuple[str, ...]  # names of the file's fields, the image's first
    file: IO[bytes]
    notes: tuple[str, ...] = ()

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """A JPEG's bytes or a raw image's pixels (H, W, 3), in memory of their own."""
        start, size = int(self.starts[index]), int(self.sizes[index])
        if self.modes[index] == JPEG:
            data = os.pread(self.file.fileno(), size, start)
            if len(data) < size:
                raise _cut_short(start + len(data), size - len(data))
            return data
        buffer = np.empty(size, dtype=np.uint8)
        _read_into(self.file, start, buffer)
        return buffer.reshape(*self.shapes[index], 3)

    def name(self, index: int) -> str:
        """The sample's number in the file."""
        return str(self.samples[index])

    def where(self, index: int) -> str:
        """The file and the sample's number."""
        return f"{self.root}, sample {self.name(index)}"

    def take(self, keep: NDArray[np.int64]) -> "BetonFile":
        """The images at `keep`; the file stays open once."""
        arrays = ("labels", "samples", "modes", "shapes", "starts", "sizes")
        return replace(self, **{name: getattr(self, name)[keep] for name in arrays})

    def relabel(self, labels: NDArray[np.int64], classes: list[str]) -> "BetonFile":
        """The same images with other labels."""
        return replace(self, labels=labels, classes=classes)

    def _contents(self, members: NDArray[np.int64]) -> bytes:
        columns = (self.samples, self.sizes, self.modes, *self.shapes.T)
        return np.stack([column[members] for column in columns], axis=1).astype("<i8").tobytes()


def open_beton(path: Path) -> BetonFile:
    """Opens a file of ours or of ffcv's with an image field and, if there are labels, an integer field.

    Of several image or integer fields the one named image or label is taken, else the first. Classes are numbered by their
    names, as in a folder; where the file holds none, the numbers are the names.

    Raises:
        BadBeton: missing, not a .beton file, of another version, or damaged.
    """
    try:
        file = open(path, "rb", buffering=0)
    except OSError as error:
        raise BadBeton(f"{path}: {error.strerror}") from None
    try:
        return _Parser(path, file).parse()
    except BaseException as error:
        file.close()
        if isinstance(error, OSError):
            raise BadBeton(f"{path}: {error_reason(error)}") from None
        raise


class _Parser:
    """Reads the parts in front of and behind the pages; `size` bounds whatever the file says of itself."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size

    def parse(self) -> BetonFile:
        header = self._array("the header", 0, 1, HEADER)[0]
        version, fields, page_size, n, table_start = (int(header[name]) for name in HEADER.names or ())
        self._require(version == VERSION, f"version {version}, only {VERSION} is known; is it a .beton file?")
        self._require(fields > 0, "it has no fields")
        self._require(page_size > 0 and page_size & (page_size - 1) == 0, f"page size {page_size} is no power of two")
        self._require(n > 0, "it has no samples: was its writing interrupted?")
        descriptors = self._array("field descriptors", HEADER.itemsize, fields, DESCRIPTOR)
        types = [int(t) for t in descriptors["type"]]
        names = [bytes(name).split(b"\0")[0].decode("ascii", "replace") for name in descriptors["name"]]
        for name, kind in zip(names, types, strict=True):
            self._require(kind in ROW_PARTS, f"field {name!r} has type {kind}, whose layout is not known")
        row = np.dtype([("", ROW_PARTS[kind]) for kind in types], align=True)
        rows_start = HEADER.itemsize + descriptors.nbytes
        rows = self._array("rows", rows_start, n, row)
        data_start = rows_start + rows.nbytes
        image_field = self._pick(IMAGE_TYPE, "image", types, names)
        self._require(image_field is not None, f"no image field among {', '.join(map(repr, names))}")
        label_field = self._pick(INTEGER_TYPE, "label", types, names)
        images = rows[f"f{image_field}"]
        sizes = self._sizes(images, data_start, table_start)
        labels, classes = np.full(n, UNLABELED, dtype=np.int64), list[str]()
        if label_field is not None:
            labels = rows[f"f{label_field}"].astype(np.int64)
            arguments = descriptors[label_field]["arguments"]
            labels, classes = self._classes(labels, arguments, data_start, table_start)
        return BetonFile(
            root=self.path,
            labels=labels,
            classes=classes,
            samples=np.arange(n),
            modes=images["mode"].copy(),
            shapes=np.stack([images["height"], images["width"]], axis=1).astype(np.int64),
            starts=images["start"].astype(np.int64),
            sizes=sizes,
            fields=(names[image_field], *(name for k, name in enumerate(names) if k != image_field)),
            file=self.file,
        )

    def _sizes(self, images: NDArray, data_start: int, table_start: int) -> NDArray[np.int64]:
        """Bytes of each image by the allocation table; all that the table and the rows say of them is checked."""
        self._require(
            data_start <= table_start <= self.size and (self.size - table_start) % TABLE.itemsize == 0,
            f"the allocation table cannot start at byte {table_start}",
        )
        table = self._array("allocation table", table_start, (self.size - table_start) // TABLE.itemsize, TABLE)
        table = table[table["size"] > 0]
        table = table[np.argsort(table["start"], kind="stable")]
        starts, sizes = table["start"], table["size"]
        # One at a time, so that no sum of two numbers from the file can overflow.
        self._require_all(starts >= data_start, "allocation {} starts before the pages")
        self._require_all(starts <= table_start, "allocation {} starts behind the pages")
        self._require_all(sizes <= table_start - starts, "allocation {} ends behind the pages")
        self._require_all(starts[1:] - starts[:-1] >= sizes[:-1], "allocation {} overlaps the next")
        self._require_all(images["mode"] <= RAW, "sample {} is neither JPEG (0) nor raw (1)")
        self._require_all((images["width"] > 0) & (images["height"] > 0), "sample {} has no pixels")
        self._require(len(table) > 0, "the allocation table is empty: was its writing interrupted?")
        place = np.minimum(np.searchsorted(starts, images["start"]), len(table) - 1)
        own = (starts[place] == images["start"]) & (table["sample"][place] == np.arange(len(images)))
        self._require_all(own, "sample {}: the allocation table does not hold its image")
        found = sizes[place].astype(np.int64)
        pixels = images["width"].astype(np.int64) * images["height"]
        self._require_all(
            (images["mode"] == JPEG) | (found == 3 * pixels), "sample {}: raw, but width, height and bytes disagree"
        )
        return found

    def _classes(
        self, labels: NDArray[np.int64], arguments: NDArray[np.uint8], data_start: int, table_start: int
    ) -> tuple[NDArray[np.int64], list[str]]:
        in_range = (labels >= UNLABELED) & (labels < MAX_CLASSES)
        self._require_all(in_range, f"sample {{}}: its label is not in 0..{MAX_CLASSES - 1}")
        count = int(labels.max()) + 1
        place = arguments[: _CLASSES_AT.itemsize].view(_CLASSES_AT)[0]
        if place["magic"] != _MAGIC:
            return labels, [str(k) for k in range(count)]
        start, size = int(place["start"]), int(place["size"])
        self._require(data_start <= start and start + size <= table_start, "its class names lie outside the file")
        try:
            names = json.loads(self._array("class names", start, size, np.dtype("u1")).tobytes())
        except (ValueError, RecursionError):
            names = None
        well = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) >= count
        self._require(well, "its class names are damaged")
        classes, numbers = number_classes(names)
        return np.append(numbers, UNLABELED)[labels], classes

    def _pick(self, kind: int, wanted: str, types: list[int], names: list[str]) -> int | None:
        found = [i for i, t in enumerate(types) if t == kind]
        return next((i for i in found if names[i] == wanted), found[0] if found else None)

    def _array(self, what: str, start: int, count: int, dtype: np.dtype) -> NDArray:
        size = count * dtype.itemsize
        self._require(start + size <= self.size, f"{what} would need {start + size} bytes, it has {self.size}")
        buffer = np.empty(size, dtype=np.uint8)
        _read_into(self.file, start, buffer)
        return buffer.view(dtype)

    def _require(self, ok: bool, fault: str) -> None:
        if not ok:
            raise BadBeton(f"{self.path}: {fault}")

    def _require_all(self, ok: NDArray[np.bool_], fault: str) -> None:
        if not ok.all():
            self._require(False, fault.format(int(np.argmin(ok))))


def _read_into(file: IO[bytes], start: int, buffer: NDArray[np.uint8]) -> None:
    done = 0
    while done < len(buffer):
        got = os.preadv(file.fileno(), [memoryview(buffer)[done:]], start + done)
        if got == 0:
            raise _cut_short(start + done, len(buffer) - done)
        done += got


def _cut_short(end: int, missing: int) -> OSError:
    return OSError(f"the file ends at byte {end}, {missing} bytes early")


# --- writing ---

AUTO_RAW_BYTES = 16_384  # pixels that take no more are stored raw by mode auto: reading them costs less than any decode


class Sample(NamedTuple):
    """An image as it will be stored."""

    mode: int
    width: int
    height: int
    data: bytes


def pack(
    images: ImageSet,
    out: Path,
    *,
    mode: Mode = "auto",
    max_side: int | None = None,
    quality: int = 90,
    skip_bad: bool = False,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Writes a set of images as one .beton file that ffcv's Loader reads too: fields image and, with labels, label.

    JPEG files that need no change are copied byte for byte, without metadata. What has an EXIF orientation, is CMYK, has 16
    bits or alpha becomes 8-bit RGB, upright.

    Args:
        images: what to write.
        out: the file to make.
        mode: "jpg"; "raw" pixels, which need no decoding and 5 to 20 times the bytes; "auto": JPEG, but raw where
            that takes at most AUTO_RAW_BYTES.
        max_side: longer side in pixels that larger images are reduced to, by averaging areas.
        quality: of JPEGs that are made here.
        skip_bad: leave unreadable images out instead of refusing to go on.
        threads: 0 is one per core.
        progress: called after each image with the number done and in all.

    Returns:
        one line saying what was written.

    Raises:
        InputError: `out` exists or its folder cannot be made, or an image is unreadable.
        RunError: `out` could not be written.
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
                    text = f"{images.where(index)}: {sample}"
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
    """Writes samples as they come; the header is written last, so that an unfinished file is not taken for a whole one."""

    def __init__(self, file: IO[bytes], capacity: int, classes: list[str]) -> None:
        self._file, self._classes, self.count, self.raw = file, classes, 0, 0
        self._types = {"image": IMAGE_TYPE} | ({"label": INTEGER_TYPE} if classes else {})
        row = np.dtype([("", ROW_PARTS[kind]) for kind in self._types.values()], align=True)
        self._rows = np.zeros(capacity, dtype=row)
        self._sizes = np.zeros(capacity, dtype=np.int64)
        self._rows_start = HEADER.itemsize + len(self._types) * DESCRIPTOR.itemsize
        self._page_size = PAGE_SIZE
        self._end = _up_to(self._rows_start + self._rows.nbytes, self._page_size)
        file.seek(self._end)

    def add(self, sample: Sample, label: int) -> None:
        size = len(sample.data)
        if size > self._page_size:
            self._page_size = 1 << (size - 1).bit_length()
        start = self._end
        if start // self._page_size != (start + size - 1) // self._page_size:
            start = _up_to(start, self._page_size)
            self._file.seek(start)
        self._file.write(sample.data)
        self._end = start + size
        row = self._rows[self.count]
        row["f0"] = (sample.mode, sample.width, sample.height, start)
        if self._classes:
            row["f1"] = label
        self._sizes[self.count] = size
        self.count += 1
        self.raw += sample.mode == RAW

    def finish(self) -> int:
        """Writes everything but the images; returns the size of the file."""
        file, n = self._file, self.count
        names = json.dumps(self._classes).encode()
        names_start = _up_to(self._end, self._page_size)
        file.seek(names_start)
        file.write(names)
        table = np.zeros(n, dtype=TABLE)
        table["sample"], table["start"], table["size"] = np.arange(n), self._rows["f0"]["start"][:n], self._sizes[:n]
        file.write(table.tobytes())
        size = file.tell()
        descriptors = np.zeros(len(self._types), dtype=DESCRIPTOR)
        for k, (name, kind) in enumerate(self._types.items()):
            descriptors[k]["type"] = kind
            descriptors[k]["name"][: len(name)] = np.frombuffer(name.encode(), dtype=np.uint8)
            if kind == INTEGER_TYPE:
                place = np.array([(_MAGIC, names_start, len(names))], dtype=_CLASSES_AT)
                descriptors[k]["arguments"][: _CLASSES_AT.itemsize] = place.view(np.uint8)
        header = np.array([(VERSION, len(self._types), self._page_size, n, names_start + len(names))], dtype=HEADER)
        file.seek(HEADER.itemsize)
        file.write(descriptors.tobytes())
        file.write(self._rows[:n].tobytes())
        file.seek(0)
        file.write(header.tobytes())
        file.flush()
        return size


def _up_to(offset: int, page_size: int) -> int:
    return -(-offset // page_size) * page_size


def _encode(data: bytes | NDArray[np.uint8], mode: Mode, max_side: int | None, quality: int) -> Sample:
    """One image as it is to be stored.

    Raises:
        BadImage: it cannot be decoded or is too large for the format.
    """
    size = jpeg_size(data) if isinstance(data, bytes) and is_whole_jpeg(data) else None
    if isinstance(data, bytes) and size is not None and (max_side is None or max(size) <= max_side):
        height, width = size
        if mode == "jpg" or (mode == "auto" and 3 * height * width > AUTO_RAW_BYTES):
            return Sample(JPEG, width, height, without_metadata(data))
    pixels = decode(data)
    if max_side is not None and max(pixels.shape[:2]) > max_side:
        pixels = _reduce(pixels, max_side)
    height, width = pixels.shape[:2]
    raw = mode == "raw" or (mode == "auto" and pixels.nbytes <= AUTO_RAW_BYTES)
    longest = 65_535 if raw else 65_500  # libjpeg's limit
    if max(height, width) > longest:
        raise BadImage(f"{width}x{height} pixels: a .beton file holds sides up to {longest:,}; --max-side reduces them")
    if raw:
        return Sample(RAW, width, height, pixels.tobytes())
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality, colorsubsampling="420")
    return Sample(JPEG, width, height, encoded)


def _reduce(pixels: NDArray[np.uint8], max_side: int) -> NDArray[np.uint8]:
    scale = max_side / max(pixels.shape[:2])
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))
