"""Small files of all supported formats and randomly damaged versions of them.

PCD is missing, since its files have at least 0.8 MB.
"""

import io
import struct
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin

WIDTH, HEIGHT = 24, 16


def picture(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Return an image with smooth colors and four different corners."""
    coarse = np.random.default_rng(3).integers(30, 226, (2, 3, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    """Encode a copy of an image with Pillow, whose encoders store settings in the image."""
    buffer = io.BytesIO()
    image.copy().save(buffer, form, **options)
    return buffer.getvalue()


def exif(orientation: int | None = None, **texts: str) -> Image.Exif:
    """Return EXIF data with an orientation and texts by hexadecimal tag."""
    tags = Image.Exif()
    if orientation is not None:
        tags[0x0112] = orientation
    for tag, text in texts.items():
        tags[int(tag[1:], 16)] = text
    return tags


def _by_pillow() -> Iterator[tuple[str, bytes]]:
    image = picture()
    gray = image.convert("L")
    frames = [image.transpose(Image.Transpose.ROTATE_180)]
    turned = exif(6, x010F="maker", x0110="model")
    for mode in ("1", "L", "P", "RGB", "LA", "RGBA"):
        yield f"{mode}.png", saved(image.convert(mode), "PNG")
    yield "16 bits.png", saved(Image.fromarray(np.asarray(gray).astype(np.uint16) * 257), "PNG")
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "words " * 40, zip=True)
    texts.add_itxt("Comment", "words " * 40)
    yield "metadata.png", saved(image, "PNG", pnginfo=texts, exif=turned, icc_profile=b"profile" * 9)
    yield "transparent.png", saved(image.quantize(16), "PNG", transparency=bytes(range(16)))
    yield "frames.png", saved(image, "PNG", save_all=True, append_images=frames)
    yield "gray.jpg", saved(gray, "JPEG", quality=95)
    yield "cmyk.jpg", saved(image.convert("CMYK"), "JPEG", quality=95)
    yield "plain.jpg", saved(image, "JPEG", quality=95)
    yield "progressive.jpg", saved(image, "JPEG", quality=95, progressive=True)
    yield "metadata.jpg", saved(image, "JPEG", quality=95, exif=turned, comment=b"words", icc_profile=b"profile" * 9)
    yield "frames.mpo", saved(image, "MPO", save_all=True, append_images=[image.copy()])
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield f"{compression}.tif", saved(image, "TIFF", compression=compression)
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "I", "F"):
        yield f"{mode}.tif", saved(image.convert("L").convert(mode) if mode in "IF" else image.convert(mode), "TIFF")
    yield "16 bits.tif", saved(Image.fromarray(np.asarray(gray).astype(np.uint16) * 257), "TIFF")
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112], tags[0x010F] = 6, "maker"
    yield "metadata.tif", saved(image, "TIFF", tiffinfo=tags)
    yield "frames.tif", saved(image, "TIFF", save_all=True, append_images=frames)
    yield "lossy.webp", saved(image, "WEBP", quality=95, exif=turned)
    yield "lossless.webp", saved(image.convert("RGBA"), "WEBP", lossless=True)
    yield "frames.webp", saved(image, "WEBP", save_all=True, append_images=frames)
    yield "frames.gif", saved(image, "GIF", save_all=True, append_images=frames)
    yield "x.gif", saved(image.quantize(16), "GIF")
    yield "p.bmp", saved(image.quantize(16), "BMP")
    yield "x.ppm", saved(image, "PPM")
    yield "1.pbm", saved(image.convert("1"), "PPM")
    values = np.asarray(gray).astype(">u2") * 257
    yield "16 bits.pgm", b"P5 %d %d 65535 " % gray.size + values.tobytes()
    yield "f.pfm", saved(gray.convert("F"), "PPM")
    yield "rle.tga", saved(image, "TGA", compression="tga_rle")
    yield "dxt.dds", saved(image.convert("RGBA"), "DDS", pixel_format="DXT5")
    yield "rle.sgi", saved(image.convert("L"), "SGI")
    for form in ("AVIF", "BMP", "DIB", "DDS", "ICO", "IM", "JPEG2000", "PCX", "QOI", "SGI", "TGA"):
        if form in Image.SAVE:  # depends on Pillow's version
            yield f"x.{form.lower()}", saved(picture(16, 16) if form == "ICO" else image, form)
    yield "x.blp", saved(image.quantize(256), "BLP")
    yield "x.msp", saved(image.convert("1"), "MSP")
    yield "x.xbm", saved(image.convert("1"), "XBM")
    yield "x.spider", saved(gray.convert("F"), "SPIDER")


def _by_hand() -> Iterator[tuple[str, bytes]]:
    image = picture()
    rgb, gray = image.tobytes(), image.convert("L").tobytes()
    yield "plain.ppm", b"P3 %d %d 255\n" % (WIDTH, HEIGHT) + b" ".join(b"%d" % v for v in rgb)
    dib = bytearray(saved(image, "DIB"))
    dib[8:12] = struct.pack("<i", 2 * HEIGHT)  # icons store pixels, then a mask
    cursor = struct.pack("<3H4B2H2I", 0, 2, 1, WIDTH, HEIGHT, 0, 0, 0, 0, len(dib), 22)
    yield "x.cur", cursor + bytes(dib) + b"\0" * 4 * HEIGHT
    yield "x.dcx", struct.pack("<3I", 0x3ADE68B1, 12, 0) + saved(image, "PCX")
    cards = [("SIMPLE", "T"), ("BITPIX", "8"), ("NAXIS", "2"), ("NAXIS1", str(WIDTH)), ("NAXIS2", str(HEIGHT))]
    header = "".join(f"{key:8}= {value:>20}".ljust(80) for key, value in cards) + "END".ljust(80)
    yield "x.fits", header.ljust(2880).encode() + gray.ljust(2880, b"\0")
    frame = struct.pack("<IHH8x", 16 + 6 + len(gray), 0xF1FA, 1) + struct.pack("<IH", 6 + len(gray), 16) + gray
    head = struct.pack("<I4H", 128 + len(frame), 0xAF12, 1, WIDTH, HEIGHT) + struct.pack("<2HI", 8, 0, 70)
    yield "x.flc", head.ljust(128, b"\0") + frame
    yield (
        "x.ftc",
        struct.pack("<4s8i", b"FTEX", 1, WIDTH, HEIGHT, 1, 1, 1, 32, 0)[:32] + struct.pack("<i", len(rgb)) + rgb,
    )
    yield "x.gbr", struct.pack(">5I4sI", 32, 2, WIDTH, HEIGHT, 1, b"GIMP", 10) + b"abc\0" + gray
    yield "x.imt", b"*comment\nwidth %d\nheight %d\npixel n8\n\x0c" % (WIDTH, HEIGHT) + gray
    field = lambda record, tag, data: bytes([0x1C, record, tag]) + len(data).to_bytes(2, "big") + data  # noqa: E731
    numbers = ((60, b"\1\0"), (20, bytes([0, WIDTH])), (30, bytes([0, HEIGHT])), (120, b"\1"))
    raw = b"P5 %d %d 255\n" % (WIDTH, HEIGHT) + gray
    yield "x.iim", b"".join(field(3, tag, data) for tag, data in numbers) + field(8, 10, raw)
    area = [0] * 64
    area[1], area[8], area[9], area[10], area[13], area[33] = 4, HEIGHT, WIDTH, 1, 1, 256
    yield "x.mcidas", struct.pack(">64i", *area) + gray
    head = bytearray(1024)
    head[:4] = b"\x80\xe8\0\0"
    head[416:420], head[424:428] = struct.pack("<2H", HEIGHT, WIDTH), struct.pack("<2H", 14, 2)
    yield "x.pxr", bytes(head) + rgb
    planes = np.asarray(image).transpose(2, 0, 1).tobytes()
    png = saved(picture(16, 16), "PNG")
    yield "x.icns", struct.pack(">4sI4sI", b"icns", 16 + len(png), b"icp4", 8 + len(png)) + png
    yield "x.psd", struct.pack(">4sH6xH2I2H3IH", b"8BPS", 1, 3, HEIGHT, WIDTH, 8, 3, 0, 0, 0, 0) + planes
    yield "x.ras", struct.pack(">8I", 0x59A66A95, WIDTH, HEIGHT, 24, len(rgb), 3, 0, 0) + rgb
    rows = b",\n".join(
        b'"' + bytes(b"ab"[v > 128] for v in gray[y * WIDTH : (y + 1) * WIDTH]) + b'"' for y in range(HEIGHT)
    )
    colors = b'"a c #202020",\n"b c #E0E0E0",\n'
    yield "x.xpm", b'/* XPM */\nstatic char *x[] = {\n"%d %d 2 1",\n' % (WIDTH, HEIGHT) + colors + rows + b"};\n"
    yield "x.xv", b"P7 332\n#comment\n%d %d 255\n" % (WIDTH, HEIGHT) + gray


def seeds() -> dict[str, bytes]:
    """Return valid files by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # for formats that Pillow will drop
        return dict(_by_pillow()) | dict(_by_hand())


def mutations(files: dict[str, bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield damaged files.

    Damage changes bits, lengths and numbers, and removes, repeats or splices parts of files.
    """
    rng = np.random.default_rng(seed)
    names = list(files)
    for k in range(count):
        name = names[k % len(names)]
        data = bytearray(files[name])
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            _CHANGES[rng.integers(len(_CHANGES))](data, rng, files[names[rng.integers(len(names))]])
        yield name, bytes(data)


def _offset(data: bytearray, rng: np.random.Generator) -> int:
    """Return a random byte offset, usually within the header."""
    return int(rng.integers(min(len(data), rng.choice([16, 64, 256, 1 << 20])) or 1))


def _flip(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    if data:
        data[_offset(data, rng)] ^= 1 << rng.integers(8)


def _number(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Set 1, 2, 4 or 8 bytes to an extreme or random value."""
    at, size = _offset(data, rng), int(rng.choice([1, 2, 4, 8]))
    values = [b"\0" * size, b"\xff" * size, b"\x7f" + b"\xff" * (size - 1), rng.bytes(size), (1).to_bytes(size, "big")]
    data[at : at + size] = values[rng.integers(len(values))]


def _cut(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    del data[_offset(data, rng) :]


def _delete(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    at = _offset(data, rng)
    del data[at : at + int(rng.integers(1, 40))]


def _repeat(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    a, b = _offset(data, rng), _offset(data, rng)
    data[b:b] = data[a : a + int(rng.integers(1, 200))]


def _splice(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Replace the rest of the file by bytes of another file."""
    at = _offset(data, rng)
    data[at:] = other[int(rng.integers(len(other))) if rng.random() < 0.5 else at :]


def _exif(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Damage two of the first 100 bytes of EXIF data, if present."""
    start = max(data.find(b"Exif"), data.find(b"eXIf"), data.find(b"EXIF"))
    if start >= 0:
        at = start + int(rng.integers(100))
        data[at : at + 2] = rng.bytes(2)


def _magic(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Replace the first bytes by those of another file."""
    size = int(rng.integers(2, 17))
    data[:size] = other[:size]


_CHANGES = (*[_flip] * 5, *[_number] * 3, *[_exif] * 3, _cut, _delete, _repeat, _splice, _magic)
