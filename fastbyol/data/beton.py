"""Reader of FFCV's .beton files, version 2. Does not need ffcv; checks every number before use.

Layout, all little-endian:

    header            version u2 = 2, fields u2, page size u4, samples u8,
                      start of the allocation table u8
    field descriptors type u1, name 16 bytes, arguments 1,024 bytes
    rows              one per sample: the fields' values as an aligned struct;
                      an image is mode u1 (0 JPEG, 1 raw), width u2, height u2, start u8; an integer
                      i8, a float f8, bytes and JSON start u8 and size u8, an array start u8
    pages             the images' bytes; no image crosses a multiple of the page size
    allocation table  (sample u8, start u8, size u8) in any order, up to the end of the file

Our writer, pack.py, adds the names of the classes between the pages and the table, and their
position in the arguments of the label's descriptor; ffcv reads neither.

Images are read by pread, not from a memory map: the reader threads wait for the disk without the
interpreter lock, and if another process truncates the file, that is a read error, where a map would
kill the process with SIGBUS.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.images import MAX_CLASSES, UNLABELED, Images, number_classes
from fastbyol.errors import InputError, error_reason

SUFFIX = ".beton"
VERSION = 2
HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("samples", "<u8"), ("table", "<u8")])
DESCRIPTOR = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
TABLE = np.dtype([("sample", "<u8"), ("start", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("start", "<u8")])
INTEGER_TYPE, IMAGE_TYPE = 1, 2
_BYTES = np.dtype([("start", "<u8"), ("size", "<u8")])
# Type of a field -> dtype of its column: float, integer, image, bytes, array, JSON, tensor.
COLUMN_TYPES = {0: "<f8", INTEGER_TYPE: "<i8", IMAGE_TYPE: IMAGE, 3: _BYTES, 4: "<u8", 5: _BYTES, 6: "<u8"}
JPEG, RAW = 0, 1
CLASS_NAMES = np.dtype([("magic", "S16"), ("start", "<u8"), ("size", "<u8")])  # in the label's arguments
CLASS_NAMES_MAGIC = b"fastbyol classes"


class BadBeton(InputError, ValueError):
    """A file that is damaged or not a .beton file; the text names the file and the error."""


@dataclass(frozen=True, eq=False)
class BetonFile(Images):
    """The N images of an open .beton file."""

    root: Path
    labels: NDArray[np.int64]
    classes: list[str]
    samples: NDArray[np.int64]  # (N,) numbers of the images in the file
    modes: NDArray[np.uint8]  # (N,) JPEG or RAW
    shapes: NDArray[np.int64]  # (N, 2) height, width; of JPEGs as the file has it, which is not verified
    starts: NDArray[np.int64]  # (N,) offset of each image's bytes
    sizes: NDArray[np.int64]  # (N,) in bytes
    fields: tuple[str, ...]  # names of the file's fields, the image field first
    file: IO[bytes]
    notes: tuple[str, ...] = ()

    def read(self, index: int) -> bytes | NDArray[np.uint8]:
        """Return a JPEG's bytes or a raw image's pixels (H, W, 3), in memory of their own."""
        start, size = int(self.starts[index]), int(self.sizes[index])
        if self.modes[index] == JPEG:
            data = os.pread(self.file.fileno(), size, start)
            if len(data) < size:
                raise _truncated(start + len(data), size - len(data))
            return data
        buffer = np.empty(size, dtype=np.uint8)
        _read_into(self.file, start, buffer)
        return buffer.reshape(*self.shapes[index], 3)

    def name(self, index: int) -> str:
        """Return the sample's number in the file."""
        return str(self.samples[index])

    def location(self, index: int) -> str:
        """Return the file and the sample's number."""
        return f"{self.root}, sample {self.name(index)}"

    def subset(self, indices: NDArray[np.int64]) -> "BetonFile":
        """Return the images at `indices`, which share the open file."""
        arrays = ("labels", "samples", "modes", "shapes", "starts", "sizes")
        return replace(self, **{name: getattr(self, name)[indices] for name in arrays})

    def with_labels(self, labels: NDArray[np.int64], classes: list[str]) -> "BetonFile":
        """Return the same images with other labels."""
        return replace(self, labels=labels, classes=classes)

    def _identity(self, members: NDArray[np.int64]) -> bytes:
        columns = (self.samples, self.sizes, self.modes, *self.shapes.T)
        return np.stack([column[members] for column in columns], axis=1).astype("<i8").tobytes()


def open_beton(path: Path) -> BetonFile:
    """Open a .beton file with an image field and, for labels, an integer field.

    If there are multiple image or integer fields, the one named "image" or "label" is used, else
    the first. Classes are numbered by their names, as in a folder; if the file has no names, the
    numbers are the names.

    Raises:
        BadBeton: the file is missing, damaged, of another version or not a .beton file.
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
    """Reads everything but the pages.

    No number in the file is used before it is checked against the file's size.
    """

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
            self._require(kind in COLUMN_TYPES, f"field {name!r} has type {kind}, whose layout is not known")
        row = np.dtype([("", COLUMN_TYPES[kind]) for kind in types], align=True)
        rows_start = HEADER.itemsize + descriptors.nbytes
        rows = self._array("rows", rows_start, n, row)
        data_start = rows_start + rows.nbytes
        image_field = self._find_field(IMAGE_TYPE, "image", types, names)
        self._require(image_field is not None, f"no image field among {', '.join(map(repr, names))}")
        label_field = self._find_field(INTEGER_TYPE, "label", types, names)
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
        """Check the allocation table against the rows; return the size of each image in bytes."""
        self._require(
            data_start <= table_start <= self.size and (self.size - table_start) % TABLE.itemsize == 0,
            f"the allocation table cannot start at byte {table_start}",
        )
        table = self._array("allocation table", table_start, (self.size - table_start) // TABLE.itemsize, TABLE)
        table = table[table["size"] > 0]
        table = table[np.argsort(table["start"], kind="stable")]
        starts, sizes = table["start"], table["size"]
        # In this order no sum of two numbers from the file can overflow.
        self._require_all(starts >= data_start, "allocation {} starts before the pages")
        self._require_all(starts <= table_start, "allocation {} starts after the pages")
        self._require_all(sizes <= table_start - starts, "allocation {} ends after the pages")
        self._require_all(starts[1:] - starts[:-1] >= sizes[:-1], "allocation {} overlaps the next")
        self._require_all(images["mode"] <= RAW, "sample {} is neither JPEG (0) nor raw (1)")
        self._require_all((images["width"] > 0) & (images["height"] > 0), "sample {} has no pixels")
        self._require(len(table) > 0, "the allocation table is empty: was its writing interrupted?")
        position = np.minimum(np.searchsorted(starts, images["start"]), len(table) - 1)
        matches = (starts[position] == images["start"]) & (table["sample"][position] == np.arange(len(images)))
        self._require_all(matches, "sample {}: the allocation table does not hold its image")
        image_sizes = sizes[position].astype(np.int64)
        pixels = images["width"].astype(np.int64) * images["height"]
        self._require_all(
            (images["mode"] == JPEG) | (image_sizes == 3 * pixels),
            "sample {}: raw, but width, height and bytes disagree",
        )
        return image_sizes

    def _classes(
        self, labels: NDArray[np.int64], arguments: NDArray[np.uint8], data_start: int, table_start: int
    ) -> tuple[NDArray[np.int64], list[str]]:
        """Return normalized labels and class names."""
        in_range = (labels >= UNLABELED) & (labels < MAX_CLASSES)
        self._require_all(in_range, f"sample {{}}: its label is not in 0..{MAX_CLASSES - 1}")
        count = int(labels.max()) + 1
        position = arguments[: CLASS_NAMES.itemsize].view(CLASS_NAMES)[0]
        if position["magic"] != CLASS_NAMES_MAGIC:
            return labels, [str(k) for k in range(count)]
        start, size = int(position["start"]), int(position["size"])
        self._require(data_start <= start and start + size <= table_start, "its class names lie outside the file")
        try:
            names = json.loads(self._array("class names", start, size, np.dtype("u1")).tobytes())
        except (ValueError, RecursionError):
            names = None
        valid = isinstance(names, list) and all(isinstance(name, str) for name in names) and len(names) >= count
        self._require(valid, "its class names are damaged")
        classes, numbers = number_classes(names)
        return np.append(numbers, UNLABELED)[labels], classes

    def _find_field(self, kind: int, wanted: str, types: list[int], names: list[str]) -> int | None:
        """Return the index of the field of type `kind` that is named `wanted`, else of the first of
        that type.
        """
        candidates = [i for i, t in enumerate(types) if t == kind]
        return next((i for i in candidates if names[i] == wanted), candidates[0] if candidates else None)

    def _array(self, name: str, start: int, count: int, dtype: np.dtype) -> NDArray:
        size = count * dtype.itemsize
        self._require(start + size <= self.size, f"{name} would need {start + size} bytes, it has {self.size}")
        buffer = np.empty(size, dtype=np.uint8)
        _read_into(self.file, start, buffer)
        return buffer.view(dtype)

    def _require(self, ok: bool, error: str) -> None:
        if not ok:
            raise BadBeton(f"{self.path}: {error}")

    def _require_all(self, ok: NDArray[np.bool_], error: str) -> None:
        """Raise `error`, formatted with the index of the first element that is not ok."""
        if not ok.all():
            self._require(False, error.format(int(np.argmin(ok))))


def _read_into(file: IO[bytes], start: int, buffer: NDArray[np.uint8]) -> None:
    done = 0
    while done < len(buffer):
        got = os.preadv(file.fileno(), [memoryview(buffer)[done:]], start + done)
        if got == 0:
            raise _truncated(start + done, len(buffer) - done)
        done += got


def _truncated(end: int, missing: int) -> OSError:
    return OSError(f"the file ends at byte {end}, {missing} bytes early")
