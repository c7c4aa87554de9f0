"""Metadata of image files: finding the orientation, and removing the rest.

Pixels and metadata are read separately: decoders get files without metadata, so that broken
metadata cannot make them reject an image, and only the orientation is read. Metadata that cannot be
read counts as absent.
"""

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from PIL import Image

JPEG_MAGIC, PNG_MAGIC = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
APP1 = 0xE1  # marker of the segments that hold EXIF and XMP
_APP0, _APP14, _APP15, _COM, _SOS = 0xE0, 0xEE, 0xEF, 0xFE, 0xDA
_NEEDED_BY_LIBJPEG = {_APP0: 14, _APP14: 12}  # JFIF and Adobe, which define the color space -> their minimum length
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_PNG_ORIENTATIONS = (b"eXIf", b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # types or keywords, by priority
_ORIENTATION = 0x0112
ORIENTATIONS = range(1, 9)

_pixel = io.BytesIO()
Image.new("L", (1, 1)).save(_pixel, "PNG")
_PNG_HEAD, _PNG_TAIL = _pixel.getvalue()[:33], _pixel.getvalue()[33:]  # signature and IHDR; IDAT and IEND


class _ThisThread(threading.local):
    """Module pattern of a warning filter that matches everything in threads that are quiet."""

    quiet = False

    def match(self, module: str) -> bool:
        return self.quiet


_this_thread = _ThisThread()
# warnings.catch_warnings changes the filters of all threads, and two threads could restore them in
# the wrong order.
_NO_WARNINGS = ("ignore", None, Warning, _this_thread, 0)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings of this thread."""
    if warnings.filters[:1] != [_NO_WARNINGS]:  # missing, or behind filters that were added later
        warnings.filters.insert(0, _NO_WARNINGS)
    before, _this_thread.quiet = _this_thread.quiet, True
    try:
        yield
    finally:
        _this_thread.quiet = before


def without_metadata(data: bytes) -> bytes:
    """Remove EXIF, XMP, ICC profiles and texts of JPEG, PNG and AVIF; return others unchanged.

    The stored pixels are the same.
    """
    if data.startswith(JPEG_MAGIC):
        kept, at = [], 0
        for code, (begin, end) in zip(*segments(data), strict=True):
            needed = code in _NEEDED_BY_LIBJPEG and end - begin >= _NEEDED_BY_LIBJPEG[code]
            if (_APP0 <= code <= _APP15 or code == _COM) and not needed:
                kept.append(data[at : begin - 4])  # up to the marker and the segment's length
                at = end
        return b"".join((*kept, data[at:])) if kept else data
    if data.startswith(PNG_MAGIC):
        return PNG_MAGIC + b"".join(chunk for kind, chunk in _png_chunks(data) if kind[:1].isupper())
    if data[4:8] == b"ftyp":  # Pillow fails on EXIF that it cannot write back; AVIF's orientation is stored elsewhere
        return re.sub(rb"(infe\x02.{7}|infe\x03.{9})Exif", rb"\1skip", data, flags=re.DOTALL)
    return data


def segments(data: bytes) -> tuple[list[int], list[tuple[int, int]]]:
    """Return marker codes and (begin, end) of the contents of a JPEG's segments before its scan.

    Segments are found as libjpeg finds them. A single loop without calls, since it runs for every
    image; ffcv.py compiles it.
    """
    codes = []
    ranges = []
    size, at = len(data), 2
    while at + 1 < size:
        code = int(data[at + 1])
        if data[at] != 0xFF or code == 0xFF:  # bytes between segments, or fill bytes
            at += 1
        elif code == 0 or code == 0x01 or 0xD0 <= code <= 0xD7:  # not a marker, or one without content
            at += 2
        elif code == 0xD8 or code == 0xD9 or code == _SOS or at + 4 > size:  # start or end of an image, or a scan
            break
        else:
            end = at + 2 + data[at + 2] * 256 + data[at + 3]
            if end < at + 4 or end > size:
                break
            codes.append(code)
            ranges.append((at + 4, end))
            at = end
    return codes, ranges


def read_orientation(data: bytes, image: Image.Image | None = None) -> int:
    """Return the orientation, 1 .. 8, from EXIF or else XMP; 1 if neither has a readable one.

    JPEGs are searched up to their first scan, other files completely.

    Args:
        data: the file.
        image: the file as opened by Pillow; not needed for JPEG and PNG.
    """
    found = None
    if data.startswith(JPEG_MAGIC):
        exif, xmp = b"", b""
        for code, (begin, end) in zip(*segments(data), strict=True):
            if code == APP1 and data.startswith(_EXIF, begin):
                exif += data[begin + len(_EXIF) : end]  # long EXIF continues in the next segment
            elif code == APP1 and data.startswith(_XMP, begin):
                xmp = data[begin + len(_XMP) : end]
        if exif:
            with quiet(), suppress(Exception):
                tags = Image.Exif()
                tags.load(exif)
                found = tags.get(_ORIENTATION)
        if found is None and xmp and (match := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
            found = int(match[1])
    elif data.startswith(PNG_MAGIC):
        found = _png_orientation(data)
    elif image is not None:
        with quiet(), suppress(Exception):
            found = image.getexif().get(_ORIENTATION)
    return int(found) if found in ORIENTATIONS else 1


def _png_orientation(data: bytes) -> object:
    """Return the orientation or None.

    Pillow reads it from a PNG of one pixel with a single metadata chunk of the file.
    """
    chunks = list(_png_chunks(data))
    for wanted in _PNG_ORIENTATIONS:
        for kind, chunk in chunks:
            if kind == wanted or (kind in (b"tEXt", b"zTXt", b"iTXt") and chunk.startswith(wanted, 8)):
                stub = io.BytesIO(_PNG_HEAD + chunk + _PNG_TAIL)
                with quiet(), suppress(Exception), Image.open(stub, formats=["PNG"]) as image:
                    if (found := image.getexif().get(_ORIENTATION)) is not None:
                        return found
    return None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and bytes of each chunk of a PNG.

    From a damaged chunk on, the rest of the file is one chunk.
    """
    at, kind = len(PNG_MAGIC), b""
    while at < len(data) and kind != b"IEND":
        kind, size = data[at + 4 : at + 8], 12 + int.from_bytes(data[at : at + 4], "big")
        if not kind.isalpha():
            kind, size = b"IDAT", len(data) - at
        yield kind, data[at : at + size]
        at += size
