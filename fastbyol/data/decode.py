"""Decoding: bytes of an image file -> uint8 RGB, upright.

JPEG by libjpeg-turbo (simplejpeg), everything else by Pillow.
"""

import ctypes
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fastbyol.data.metadata import APP1, JPEG_MAGIC, quiet, read_orientation, segments, without_metadata
from fastbyol.errors import first_line, printable

# Formats that Pillow identifies but does not decode itself; EPS and WMF need other programs.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
Image.init()
FORMATS = tuple(sorted(Image.OPEN.keys() - _NOT_DECODED))
"""Pillow's names of the supported formats."""
EXTENSIONS = tuple(sorted(e for e, form in Image.registered_extensions().items() if form in FORMATS))
"""Their file extensions, in lower case with the dot."""

MAX_PIXELS = 178_956_970  # Pillow's limit for decompression bombs: 0.5 GB of RGB

_BITS_PER_SAMPLE, _IMAGE_LENGTH = 0x0102, 0x0101
_WEBP_SIDE = 16_383  # damaged animations claim a canvas of up to 16 million, which takes a minute to fill
_TURNS = {  # orientation: transpose, then reverse the rows, reverse the columns
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
_REMEDY = "save it with 8 bits"
_BLACK = 16  # of 255: an image without a brighter pixel shows nothing

# BadImage reports damaged files; Pillow and libtiff must not print about them as well.
logging.getLogger("PIL").addHandler(logging.NullHandler())  # Python prints records of loggers without a handler
with suppress(AttributeError):  # in some builds of Pillow libtiff cannot be reached, and goes on printing
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class DecodeBuffer:
    """Memory that a thread reuses for all images; new pages would cost 4 % of a decode."""

    def __init__(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)

    def for_pixels(self, count: int) -> NDArray[np.uint8]:
        """Return memory for at least `count` RGB pixels. It grows and never shrinks."""
        if len(self._memory) < 3 * count:
            self._memory = np.empty(3 * count, dtype=np.uint8)
        return self._memory


class BadImage(Exception):
    """An image that cannot be decoded.

    The text is the reason in one line, without the file's name.
    """


def decode(data: bytes | NDArray[np.uint8], buffer: DecodeBuffer | None = None) -> NDArray[np.uint8]:
    """Decode one image.

    Grayscale, palette, CMYK and YCCK are converted to RGB, and alpha is dropped. An orientation in
    EXIF, or else in XMP, is applied as by PIL.ImageOps.exif_transpose. 16 bits are scaled to 8.
    Values of 32 bits, integer or float, must lie in 0..255, because nothing tells which other value
    is white. The first of multiple frames is decoded.

    Args:
        data: an encoded file, or pixels, which are returned unchanged.
        buffer: memory for the result, which is then valid until the buffer's next use.

    Returns:
        uint8 (H, W, 3), C-contiguous and writable.

    Raises:
        BadImage: the file is empty, truncated, damaged, too large, of an unknown range or not an
            image.
    """
    if isinstance(data, np.ndarray):
        return data
    pixels = _decode_simplejpeg(data, buffer or DecodeBuffer()) if data.startswith(JPEG_MAGIC) else None
    if pixels is not None and APP1 not in segments(data)[0]:
        return pixels  # the fast path of most files
    with _bad_image_errors():
        return _decode_pillow(data) if pixels is None else _upright(pixels, read_orientation(data))


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG that `decode_reduced` can decode.

    None for any other file: not a JPEG, damaged, CMYK, too large or with an orientation.
    """
    if not data.startswith(JPEG_MAGIC):
        return None
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:  # `decode` reports what is wrong
        return None
    good = color_space in ("YCbCr", "Gray", "RGB") and height * width <= MAX_PIXELS and read_orientation(data) == 1
    return (height, width) if good else None


def is_complete_jpeg(data: bytes) -> bool:
    """Return True if a JPEG has its end marker. A truncated one needs a decoder that reports it."""
    return data[-64:].rstrip(b"\0").endswith(b"\xff\xd9")


def decode_reduced(
    data: bytes, size: tuple[int, int], factor: int, buffer: DecodeBuffer | None = None
) -> NDArray[np.uint8]:
    """Decode a JPEG at 1/factor of its size by dropping high frequencies; sides are rounded up.

    Args:
        data: a file that `jpeg_size` accepts.
        size: the result of `jpeg_size`.
        factor: 1, 2, 4 or 8; 1 is `decode`.
        buffer: as for `decode`.

    Raises:
        BadImage: the file is truncated or damaged.
    """
    if factor == 1:
        return decode(data, buffer)
    height, width = (-(-side // factor) for side in size)
    memory = (buffer or DecodeBuffer()).for_pixels(width * height)
    try:
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=factor, buffer=memory)
    except Exception:  # a libjpeg warning: let Pillow decide, as in `decode`, and keep the promised size
        with _bad_image_errors(), Image.fromarray(_decode_pillow(data)) as image:
            return np.array(image.resize((width, height), Image.Resampling.BOX))


def as_stored(data: bytes) -> Image.Image:
    """Decode the first frame of a file with Pillow, in its own mode and orientation.

    Raises:
        BadImage: as `decode`, but any range of values is accepted.
    """
    with _bad_image_errors():
        return _load_pillow(data)[0]


@contextmanager
def _bad_image_errors() -> Iterator[None]:
    """Convert every exception to BadImage.

    The many decoders raise anything on damaged files (struct.error, TypeError, RuntimeError,
    MemoryError, ...). All of it means that this image is bad, and a run must be able to go on
    without it.
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
    """Decode a common JPEG. None leaves CMYK, odd subsampling and libjpeg warnings to Pillow.

    simplejpeg's strict mode turns all warnings into errors. Some are harmless (bytes between
    markers), some are not (a truncated file): Pillow decodes the former and rejects the latter.
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
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    return _upright(np.array(image.convert("RGB")), orientation)


def _load_pillow(data: bytes) -> tuple[Image.Image, int, int]:
    """Return the first frame as it is stored, its orientation, and the bits of a gray value."""
    if not data:
        raise BadImage("the file is empty")
    with quiet(), Image.open(io.BytesIO(without_metadata(data)), formats=FORMATS) as image:
        _check_size(image.width, image.height)
        orientation = read_orientation(data, image)
        bits = 8
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            bits = 16  # mode I in PPM, and in PNG with old versions of Pillow
        elif image.mode in ("I", "F"):
            bits = 32
        if image.format == "TIFF":
            image.load_end = lambda: None  # would apply the orientation, and fail on EXIF that it cannot read
            if image.tag_v2.get(_BITS_PER_SAMPLE) == (12,):  # its mode is I;16
                bits = 12
            if (
                max(extents[3] for _, extents, *_ in image.tile) < image.tag_v2[_IMAGE_LENGTH]
            ):  # Pillow would make it black
                raise BadImage("it holds too few strips for its height")
        elif image.format == "WEBP" and max(image.size) > _WEBP_SIDE:
            raise BadImage(
                f"{image.width}x{image.height} pixels: no frame of a WebP file has longer sides than {_WEBP_SIDE}"
            )
        image.load()
        image.info.pop("transparency", None)  # alpha is dropped anyway
        return image.copy(), orientation, bits  # the size of a TIFF that Pillow would turn differs from its copy


def _gray_levels(values: NDArray, bits: int) -> NDArray[np.uint8]:
    """Convert gray values (H, W) of more than 8 bits to uint8.

    Raises:
        BadImage: the range of the values is unknown.
    """
    if bits < 32:
        levels = (values.astype(np.int64) >> bits - 8).clip(0, 255).astype(np.uint8)
        if values.any() and levels.max() < _BLACK:  # for example 10 or 12 bits stored as 16
            raise BadImage(f"its {bits}-bit values are {values.max()} at most, so it would be black: {_REMEDY}")
        return levels
    if not np.isfinite(values).all():
        raise BadImage("it holds NaN or infinite values")
    lowest, highest = values.min(), values.max()
    if lowest < 0 or highest > 255 or 0 < highest <= 1:
        raise BadImage(f"its 32-bit values lie in {lowest:g}..{highest:g} and not in 0..255: {_REMEDY}")
    return values.astype(np.uint8)  # truncates fractions, as Pillow does


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    if orientation == 1:
        return pixels
    exchange, rows, columns = _TURNS[orientation]
    turned = pixels.swapaxes(0, 1) if exchange else pixels
    return np.array(turned[:: -1 if rows else 1, :: -1 if columns else 1], order="C")
