"""Bytes of an image file -> uint8 RGB, upright. JPEG by libjpeg-turbo (simplejpeg), everything else by Pillow."""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fastbyol.errors import first_line

# Formats that Pillow recognises and does not decode by itself: other programs draw EPS and WMF, the rest it only identifies.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
Image.init()
FORMATS = tuple(sorted(Image.OPEN.keys() - _NOT_DECODED))
"""Pillow's names of the formats that are read."""
EXTENSIONS = tuple(sorted(e for e, form in Image.registered_extensions().items() if form in FORMATS))
"""Extensions of their files, in lower case with the dot."""

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: 0.5 GB of RGB
_EXIF_SEARCH_BYTES = 65_536


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

    What is stored as pixels comes back as it is.

    Grayscale, palette, 16-bit, alpha, CMYK and YCCK inputs give RGB; an EXIF orientation is applied.

    Returns:
        uint8 (H, W, 3), C-contiguous and writable.

    Raises:
        BadImage: empty, truncated, damaged, too large or not an image.
    """
    if isinstance(data, np.ndarray):
        return data
    if not data:
        raise BadImage("the file is empty")
    if _is_plain_jpeg(data):
        pixels = _decode_simplejpeg(data, buffer or DecodeBuffer())
        if pixels is not None:
            return pixels
    return _decode_pillow(data)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that `decode_reduced` can decode; None for any other file (damaged, EXIF, CMYK, PNG)."""
    if not _is_plain_jpeg(data):
        return None
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (height, width) if colour_space in ("YCbCr", "Gray", "RGB") and height * width <= MAX_PIXELS else None


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
    except ValueError:  # a libjpeg warning: let Pillow judge, as `decode` does, and keep the size that was promised
        with Image.fromarray(_decode_pillow(data)) as image:
            return np.array(image.resize((width, height), Image.Resampling.BOX))


def _is_plain_jpeg(data: bytes) -> bool:
    """A JPEG without EXIF data, which could hold an orientation: Pillow reads those."""
    return data[:2] == b"\xff\xd8" and data.find(b"Exif\x00\x00", 0, _EXIF_SEARCH_BYTES) < 0


def _decode_simplejpeg(data: bytes, buffer: DecodeBuffer) -> NDArray[np.uint8] | None:
    """The fast path; None for what Pillow judges better: CMYK, odd subsampling, and every libjpeg warning.

    simplejpeg's strict mode turns all warnings into errors. Some are harmless (bytes between markers), some are not
    (a truncated file): Pillow decodes the former and refuses the latter.
    """
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if colour_space in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, buffer=buffer.for_pixels(width * height))
    except ValueError:
        return None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels are more than {MAX_PIXELS}")


def _decode_pillow(data: bytes) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image.width, image.height)
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit gray: Pillow would clip it to 255 instead of scaling
                upright = Image.fromarray((np.asarray(upright, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return np.array(upright.convert("RGB"))
    except UnidentifiedImageError:
        raise BadImage("not an image file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(first_line(error)) from None
