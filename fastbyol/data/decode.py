"""Bytes of an image file -> uint8 RGB, upright. JPEG by libjpeg-turbo (simplejpeg), everything else by Pillow."""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fastbyol.errors import first_line

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: 0.5 GB of RGB
_EXIF_SEARCH_BYTES = 65_536


class BadImage(Exception):
    """A file that cannot be decoded; the text says why in one line and does not name the file."""


def decode(data: bytes) -> NDArray[np.uint8]:
    """Decodes one image.

    Grayscale, palette, 16-bit, alpha, CMYK and YCCK inputs give RGB; an EXIF orientation is applied.

    Returns:
        uint8 (H, W, 3), C-contiguous and writable.

    Raises:
        BadImage: empty, truncated, damaged, too large or not an image.
    """
    if not data:
        raise BadImage("the file is empty")
    if data[:2] == b"\xff\xd8" and data.find(b"Exif\x00\x00", 0, _EXIF_SEARCH_BYTES) < 0:
        pixels = _decode_simplejpeg(data)
        if pixels is not None:
            return pixels
    return _decode_pillow(data)


def _decode_simplejpeg(data: bytes) -> NDArray[np.uint8] | None:
    """The fast path; None for what Pillow judges better: CMYK, odd subsampling, and every libjpeg warning.

    simplejpeg's strict mode turns all warnings into errors. Some are harmless (bytes between markers), some are not
    (a truncated file): Pillow decodes the former and refuses the latter.
    """
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        return None if colour_space in ("CMYK", "YCCK") else simplejpeg.decode_jpeg(data, colorspace="RGB")
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
