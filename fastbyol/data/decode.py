"""Bytes of an image file -> uint8 RGB, upright. JPEG by libjpeg-turbo (simplejpeg), everything else by Pillow.

Pixels and metadata are read apart: decoders get files without metadata, so that none of it can make them refuse a picture,
and of the metadata only the orientation is read. What cannot be read there counts as none.
"""

import ctypes
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastbyol.errors import first_line, printable

# Formats that Pillow recognizes and does not decode by itself: other programs draw EPS and WMF, the rest it only identifies.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
Image.init()
FORMATS = tuple(sorted(Image.OPEN.keys() - _NOT_DECODED))
"""Pillow's names of the formats that are read."""
EXTENSIONS = tuple(sorted(e for e, form in Image.registered_extensions().items() if form in FORMATS))
"""Extensions of their files, in lower case with the dot."""

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: 0.5 GB of RGB

APP1 = 0xE1  # marker of the segments that hold EXIF and XMP
_APP0, _APP14, _APP15, _COM, _SOS = 0xE0, 0xEE, 0xEF, 0xFE, 0xDA
_READ_BY_LIBJPEG = {_APP0: 14, _APP14: 12}  # JFIF and Adobe, which say what the colors are, and how long they must be
_JPEG, _EXIF, _XMP = b"\xff\xd8", b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_ORIENTATIONS = (b"eXIf", b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # types or keywords, first come first
_ORIENTATION, _BITS_PER_SAMPLE, _IMAGE_LENGTH = 0x0112, 0x0102, 0x0101
_WEBP_SIDE = 16_383  # damaged animations ask for a canvas of up to 16 million, which takes a minute to fill
_TURNS = {  # orientation: exchange rows and columns, then reverse the order of the rows, of the columns
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_REMEDY = "save it with 8 bits"
_BLACK = 16  # of 255: a picture without a brighter pixel shows nothing

_pixel = io.BytesIO()
Image.new("L", (1, 1)).save(_pixel, "PNG")
_PNG_HEAD, _PNG_TAIL = _pixel.getvalue()[:33], _pixel.getvalue()[33:]  # signature and IHDR; IDAT and IEND

# What Pillow and libtiff have to say of a damaged file is in the BadImage; nothing of it belongs on the console.
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints what nobody listens to
with suppress(AttributeError):  # a Pillow with a libtiff that cannot be reached goes on printing
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class _ThisThread(threading.local):
    """In a warning filter's place for the module: matches any, in a thread that is decoding."""

    decoding = False

    def match(self, module: str) -> bool:
        return self.decoding


_this_thread = _ThisThread()
# warnings.catch_warnings would change the filters of all threads, and two threads could restore them in the wrong order.
_NO_WARNINGS = ("ignore", None, Warning, _this_thread, 0)


class DecodeBuffer:
    """Memory that a thread decodes into again and again: fresh pages for every image would cost 4 % of a decode."""

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)

    def for_pixels(self, count: int) -> NDArray[np.uint8]:
        """At least `count` RGB pixels; grows, never shrinks."""
        if len(self._memory) < 3 * count:
            self._memory = np.empty(3 * count, dtype=np.uint8)
        return self._memory


class BadImage(Exception):
    """A file that cannot be decoded; the text says why in one line and does not name the file."""


def decode(data: bytes | NDArray[np.uint8], buffer: DecodeBuffer | None = None) -> NDArray[np.uint8]:
    """Decodes one image, into `buffer` where one is given: the result is then valid until the buffer's next use.

    What is stored as pixels comes back as it is. Of several frames the first is taken.

    Grayscale, palette, alpha (which is dropped), CMYK and YCCK inputs give RGB. An orientation in EXIF, or else in XMP, is
    applied, as by PIL.ImageOps.exif_transpose. 16 bits are scaled to 8. Pixels of 32 bits, integer or float, come out as
    Pillow shows them, if they lie in 0..255; other ranges are refused, because nothing says which value is white.

    Returns:
        uint8 (H, W, 3), C-contiguous and writable.

    Raises:
        BadImage: empty, truncated, damaged, too large, of an unknown range or not an image.
    """
    if isinstance(data, np.ndarray):
        return data
    pixels = _decode_simplejpeg(data, buffer or DecodeBuffer()) if data.startswith(_JPEG) else None
    if pixels is not None and APP1 not in segments(data)[0]:
        return pixels  # most files: nothing below is called for them
    with _one_image():
        return _decode_pillow(data) if pixels is None else _upright(pixels, _orientation(data))


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that `decode_reduced` can decode.

    None for any other file: damaged, with an orientation, CMYK, too large, PNG.
    """
    if not data.startswith(_JPEG):
        return None
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:  # `decode` says what is wrong with it
        return None
    good = color_space in ("YCbCr", "Gray", "RGB") and height * width <= MAX_PIXELS and _orientation(data) == 1
    return (height, width) if good else None


def is_whole_jpeg(data: bytes) -> bool:
    """Whether a JPEG's end marker is there; one that was cut off needs a decoder that says so."""
    return data[-64:].rstrip(b"\0").endswith(b"\xff\xd9")


def decode_reduced(
    data: bytes, size: tuple[int, int], factor: int, buffer: DecodeBuffer | None = None
) -> NDArray[np.uint8]:
    """Decodes a JPEG at 1/factor of its size (each side rounded up) by leaving out high frequencies of its DCT.

    Args:
        data: a file that `jpeg_size` accepts.
        size: what `jpeg_size` returned.
        factor: 1, 2, 4 or 8; with 1 this is `decode`.
        buffer: as for `decode`.

    Raises:
        BadImage: truncated or damaged.
    """
    if factor == 1:
        return decode(data, buffer)
    height, width = (-(-side // factor) for side in size)
    memory = (buffer or DecodeBuffer()).for_pixels(width * height)
    try:
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=factor, buffer=memory)
    except Exception:  # a libjpeg warning: let Pillow judge, as `decode` does, and keep the size that was promised
        with _one_image(), Image.fromarray(_decode_pillow(data)) as image:
            return np.array(image.resize((width, height), Image.Resampling.BOX))


def as_stored(data: bytes) -> Image.Image:
    """The first frame of a file by Pillow: in its own mode, and not turned.

    Raises:
        BadImage: as `decode`, but any range of values will do.
    """
    with _one_image():
        return _load_pillow(data)[0]


def without_metadata(data: bytes) -> bytes:
    """A JPEG, PNG or AVIF file without what does not change its stored pixels: EXIF, XMP, ICC profiles, texts.

    Any other file comes back as it is.
    """
    if data.startswith(_JPEG):
        kept, at = [], 0
        for code, (begin, end) in zip(*segments(data), strict=True):
            needed = code in _READ_BY_LIBJPEG and end - begin >= _READ_BY_LIBJPEG[code]
            if (_APP0 <= code <= _APP15 or code == _COM) and not needed:
                kept.append(data[at : begin - 4])  # up to the marker and the segment's length
                at = end
        return b"".join((*kept, data[at:])) if kept else data
    if data.startswith(_PNG):
        return _PNG + b"".join(chunk for kind, chunk in _png_chunks(data) if kind[:1].isupper())
    if data[4:8] == b"ftyp":  # Pillow fails on EXIF that it cannot write again, though AVIF's orientation is not there
        return re.sub(rb"(infe\x02.{7}|infe\x03.{9})Exif", rb"\1skip", data, flags=re.DOTALL)
    return data


def segments(data: bytes) -> tuple[list[int], list[tuple[int, int]]]:
    """Marker codes, and (begin, end) of the contents, of a JPEG's segments in front of its first scan, where libjpeg finds them.

    One loop without calls: it runs for every image. FFCV's loader compiles it.
    """
    codes = []
    places = []
    size, at = len(data), 2
    while at + 1 < size:
        code = int(data[at + 1])
        if data[at] != 0xFF or code == 0xFF:  # bytes that belong to no segment, or that fill up
            at += 1
        elif code == 0 or code == 0x01 or 0xD0 <= code <= 0xD7:  # no marker, or one without content
            at += 2
        elif code == 0xD8 or code == 0xD9 or code == _SOS or at + 4 > size:  # another image, its end, a scan
            break
        else:
            end = at + 2 + data[at + 2] * 256 + data[at + 3]
            if end < at + 4 or end > size:
                break
            codes.append(code)
            places.append((at + 4, end))
            at = end
    return codes, places


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, nothing that this thread does warns."""
    if warnings.filters[:1] != [_NO_WARNINGS]:  # not there yet, or behind somebody's later filters
        warnings.filters.insert(0, _NO_WARNINGS)
    before, _this_thread.decoding = _this_thread.decoding, True
    try:
        yield
    finally:
        _this_thread.decoding = before


@contextmanager
def _one_image() -> Iterator[None]:
    """Within, whatever is raised is BadImage.

    Decoders are many and raise anything on damaged files (struct.error, TypeError, RuntimeError, MemoryError, ...). None
    of it says more than that this one image is bad, and a run must be able to go on without it.
    """
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image file") from None
    except Exception as error:
        text = printable(first_line(error))
        plain = isinstance(error, OSError | ValueError | SyntaxError | Image.DecompressionBombError)
        raise BadImage(text if plain or text == type(error).__name__ else f"{type(error).__name__}: {text}") from None


def _decode_simplejpeg(data: bytes, buffer: DecodeBuffer) -> NDArray[np.uint8] | None:
    """The fast path; None for what Pillow judges better: CMYK, odd subsampling, and every libjpeg warning.

    simplejpeg's strict mode turns all warnings into errors. Some are harmless (bytes between markers), some are not
    (a truncated file): Pillow decodes the former and refuses the latter.
    """
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if color_space in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, buffer=buffer.for_pixels(width * height))
    except BadImage:
        raise
    except Exception:
        return None


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadImage("it has no pixels")
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels are more than {MAX_PIXELS}")


def _decode_pillow(data: bytes) -> NDArray[np.uint8]:
    image, orientation, bits = _load_pillow(data)
    if bits > 8:
        return _upright(_gray_levels(np.asarray(image), bits)[..., None].repeat(3, axis=2), orientation)
    if image.mode == "La":  # which Pillow converts to LA only
        image = image.convert("LA")
    return _upright(np.array(image.convert("RGB")), orientation)


def _load_pillow(data: bytes) -> tuple[Image.Image, int, int]:
    """The first frame as it is stored, its orientation, and the bits of a gray value."""
    if not data:
        raise BadImage("the file is empty")
    with _quiet(), Image.open(io.BytesIO(without_metadata(data)), formats=FORMATS) as image:
        _check_size(image.width, image.height)
        orientation = _orientation(data, image)
        bits = 8
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            bits = 16  # I in PPM, and in old Pillows in PNG
        elif image.mode in ("I", "F"):
            bits = 32
        if image.format == "TIFF":
            image.load_end = lambda: None  # there Pillow turns the image, and fails on EXIF that it cannot read
            if image.tag_v2.get(_BITS_PER_SAMPLE) == (12,):  # whose mode is I;16
                bits = 12
            if max(extents[3] for _, extents, *_ in image.tile) < image.tag_v2[_IMAGE_LENGTH]:  # black to Pillow
                raise BadImage("it holds too few strips for its height")
        elif image.format == "WEBP" and max(image.size) > _WEBP_SIDE:
            raise BadImage(
                f"{image.width}x{image.height} pixels: no frame of a WebP file has longer sides than {_WEBP_SIDE}"
            )
        image.load()
        image.info.pop("transparency", None)  # alpha is dropped: nothing need be converted for it
        return image.copy(), orientation, bits  # a TIFF that Pillow would turn has another size than its copy


def _gray_levels(values: NDArray, bits: int) -> NDArray[np.uint8]:
    """Values (H, W) of more than 8 bits as uint8."""
    if bits < 32:
        levels = (values.astype(np.int64) >> bits - 8).clip(0, 255).astype(np.uint8)
        if values.any() and levels.max() < _BLACK:  # 10 or 12 bits in a file of 16, say
            raise BadImage(f"its {bits}-bit values are {values.max()} at most, so it would be black: {_REMEDY}")
        return levels
    if not np.isfinite(values).all():
        raise BadImage("it holds NaN or infinite values")
    lowest, highest = values.min(), values.max()
    if lowest < 0 or highest > 255 or 0 < highest <= 1:
        raise BadImage(f"its 32-bit values lie in {lowest:g}..{highest:g} and not in 0..255: {_REMEDY}")
    return values.astype(np.uint8)  # cuts off fractions, as Pillow does


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    if orientation == 1:
        return pixels
    exchange, rows, columns = _TURNS[orientation]
    turned = pixels.swapaxes(0, 1) if exchange else pixels
    return np.array(turned[:: -1 if rows else 1, :: -1 if columns else 1], order="C")


def _orientation(data: bytes, image: Image.Image | None = None) -> int:
    """1 .. 8 as EXIF or else XMP says, in front of the first scan of a JPEG and anywhere in other files.

    1 where neither says anything or what they hold cannot be read: that is no reason to refuse a picture.

    Args:
        image: the file opened by Pillow; a JPEG or PNG is read without it.
    """
    found = None
    if data.startswith(_JPEG):
        exif, xmp = b"", b""
        for code, (begin, end) in zip(*segments(data), strict=True):
            if code == APP1 and data.startswith(_EXIF, begin):
                exif += data[begin + len(_EXIF) : end]  # what does not fit into one segment goes on in the next
            elif code == APP1 and data.startswith(_XMP, begin):
                xmp = data[begin + len(_XMP) : end]
        if exif:
            with _quiet(), suppress(Exception):
                tags = Image.Exif()
                tags.load(exif)
                found = tags.get(_ORIENTATION)
        if found is None and xmp and (match := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
            found = int(match[1])
    elif data.startswith(_PNG):
        found = _png_orientation(data)
    elif image is not None:
        with _quiet(), suppress(Exception):
            found = image.getexif().get(_ORIENTATION)
    return int(found) if found in _TURNS else 1


def _png_orientation(data: bytes) -> object:
    """By Pillow, from PNGs of one pixel that hold no other chunk which could be in the way; None if there is none."""
    chunks = list(_png_chunks(data))
    for wanted in _PNG_ORIENTATIONS:
        for kind, chunk in chunks:
            if kind == wanted or (kind in (b"tEXt", b"zTXt", b"iTXt") and chunk.startswith(wanted, 8)):
                stub = io.BytesIO(_PNG_HEAD + chunk + _PNG_TAIL)
                with _quiet(), suppress(Exception), Image.open(stub, formats=["PNG"]) as image:
                    if (found := image.getexif().get(_ORIENTATION)) is not None:
                        return found
    return None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and bytes of each chunk of a PNG, up to its end; where they are damaged, the rest of the file as one chunk."""
    at, kind = len(_PNG), b""
    while at < len(data) and kind != b"IEND":
        kind, size = data[at + 4 : at + 8], 12 + int.from_bytes(data[at : at + 4], "big")
        if not kind.isalpha():
            kind, size = b"IDAT", len(data) - at
        yield kind, data[at : at + size]
        at += size
