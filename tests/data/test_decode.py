"""`decode` on unusual and damaged files: alone, in `pack`, in training and with every backend."""

import io
import json
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
import torch
from helpers.common import jpeg
from helpers.mutations import HEIGHT, WIDTH, exif, mutations, picture, saved, seeds
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin

from fastbyol.api import train
from fastbyol.config import DataConfig
from fastbyol.data import build_loader, metadata, open_split
from fastbyol.data import decode as module
from fastbyol.data import pack as pack_module
from fastbyol.data.beton import JPEG, open_beton
from fastbyol.data.decode import BadImage, as_stored, decode, decode_reduced, jpeg_size
from fastbyol.data.metadata import without_metadata
from fastbyol.data.pack import pack
from fastbyol.errors import InputError
from fastbyol.evaluation import image_files, voc
from fastbyol.tools.preview import write_preview

UPRIGHT = np.asarray(picture())


def is_turned(pixels, tolerance=12):
    """Return True if these are the pixels of `picture` rotated by orientation 6."""
    expected = np.asarray(picture().transpose(Image.Transpose.ROTATE_270)).astype(int)
    return pixels.shape == expected.shape and np.abs(pixels - expected).mean() < tolerance


def segment(code, content):
    return bytes([0xFF, code]) + (len(content) + 2).to_bytes(2, "big") + content


def ifd(*entries, order="<"):
    """Return EXIF with one directory of entries (tag, type, count, value or offset)."""
    rows = b"".join(
        struct.pack(f"{order}HHI4s", tag, kind, count, value) for tag, kind, count, value in sorted(entries)
    )
    head = b"II*\0" if order == "<" else b"MM\0*"
    end = b"\0" * 4 + b"\xff" * 16
    return b"Exif\0\0" + head + struct.pack(f"{order}IH", 8, len(entries)) + rows + end


TURN = (0x0112, 3, 1, b"\6\0\0\0")
PLAIN = saved(picture(), "JPEG", quality=98, subsampling=0)
JFIF_END = 2 + 2 + int.from_bytes(PLAIN[4:6], "big")


def with_segments(*parts):
    """Return the picture as a JPEG with these bytes after its first segment."""
    return PLAIN[:JFIF_END] + b"".join(parts) + PLAIN[JFIF_END:]


# --- orientation ---


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "TIFF lzw", "WEBP", "AVIF"])
def test_orientation_is_applied_as_by_pillow(form, orientation):
    name, _, compression = form.partition(" ")
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow has no {name}")
    options = {"compression": "tiff_lzw"} if compression else {}
    if (name == "AVIF" or compression) and orientation not in range(1, 9):
        pytest.skip("Pillow writes none but 1..8 there")
    data = saved(picture(), name, exif=exif(orientation), **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    actual = decode(data)
    assert np.array_equal(actual, expected)
    assert actual.flags.c_contiguous
    assert actual.flags.writeable
    assert expected.shape[:2] == ((WIDTH, HEIGHT) if orientation in (5, 6, 7, 8) else (HEIGHT, WIDTH))


@pytest.mark.parametrize(
    "content",
    [
        ifd(TURN, (0x011A, 7, 4, b"abcd")),
        ifd(TURN, (0x011A, 10, 1, b"\x2a\0\0\0"), (0x011B, 5, 1, b"\x2a\0\0\0")),
        ifd(TURN, (0x8769, 4, 1, b"\xff\xff\0\0"), (0x8825, 4, 1, b"\0\0\0\0")),
        ifd(TURN, (0x010F, 2, 0xFFFFFFF, b"\0\0\0\x7f"), (0x0110, 99, 1, b"abcd")),
        ifd((0x0112, 3, 1, b"\0\6\0\0"), order=">"),
        ifd((0x0112, 4, 1, b"\6\0\0\0")),
        b"Exif\0\0" + ifd(TURN),
    ],
    ids=["bytes as rational", "negative rational", "bad pointers", "beyond the end", "big endian", "long", "twice"],
)
def test_orientation_is_read_from_unusual_exif(content):
    jpeg_file = with_segments(segment(0xE1, content))
    png = saved(picture(), "PNG")
    chunk = b"eXIf" + content.removeprefix(b"Exif\0\0")
    png = png[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]
    for data in (jpeg_file, png):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert is_turned(decode(data))


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


RAW_PROFILE = b"\nexif\n%8d\n%s\n" % (len(ifd(TURN)) + 6, (b"Exif\0\0" + ifd(TURN)).hex().encode())


@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after them"])
@pytest.mark.parametrize(
    "text",
    [
        chunk(b"tEXt", b"Raw profile type exif\0" + RAW_PROFILE),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE)),
        chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>'),
    ],
    ids=["text", "compressed text", "XMP"],
)
def test_orientation_is_read_from_png_texts(text, after):
    """As ImageMagick and Adobe's programs write it."""
    plain = saved(picture(), "PNG")
    at = len(plain) - 12 if after else 33
    data = plain[:at] + text + plain[at:]
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert is_turned(expected)
    assert np.array_equal(decode(data), expected)


@pytest.mark.parametrize(
    "content",
    [b"Exif\0\0", b"Exif\0\0II", b"Exif\0\0" + b"\xff" * 30, ifd(TURN)[:20], ifd((0x0112, 2, 2, b"6\0\0\0"))],
    ids=["empty", "cut", "no EXIF", "cut entry", "text"],
)  # fmt: skip
def test_unreadable_exif_means_no_orientation(content):
    for data in (with_segments(segment(0xE1, content)), saved(picture(), "WEBP", lossless=True, exif=content)):
        pixels = decode(data)
        assert pixels.shape == UPRIGHT.shape
        assert np.abs(pixels.astype(int) - UPRIGHT).mean() < 3


def xmp(orientation):
    return b'<rdf:Description tiff:Orientation="%d"/>' % orientation


XMP = b"http://ns.adobe.com/xap/1.0/\0"
PROFILE = segment(0xE2, b"some profile" + b"\xff\xd8\xff\xda\xff\xe1" * 10_000)


@pytest.mark.parametrize(
    ("data", "turned"),
    [
        (with_segments(PROFILE, PROFILE, PROFILE, segment(0xE1, ifd(TURN))), True),
        (with_segments(segment(0xE1, ifd(TURN)[:40]), segment(0xE1, b"Exif\0\0" + ifd(TURN)[40:])), True),
        (with_segments(b"\xff" * 9, segment(0xE1, ifd(TURN))), True),
        (with_segments(b"\0garbage\xff\0\xff\xd3", segment(0xE1, ifd(TURN))), True),
        (PLAIN.replace(b"\xff\xda", segment(0xE1, ifd(TURN)) + b"\xff\xda", 1), True),
        (with_segments(segment(0xE1, XMP + xmp(6))), True),
        (with_segments(segment(0xE1, XMP + xmp(3)), segment(0xE1, ifd(TURN))), True),
        (with_segments(segment(0xE1, XMP + xmp(6)), segment(0xE1, ifd((0x0112, 3, 1, b"\1\0\0\0")))), False),
        (with_segments(segment(0xFE, b"Exif\0\0" + segment(0xE1, ifd(TURN)))), False),
        (with_segments(segment(0xE5, ifd(TURN))), False),
        (PLAIN[:-2] + segment(0xE1, ifd(TURN)) + PLAIN[-2:], False),
        (PLAIN + b"\xff\xd8" + segment(0xE1, ifd(TURN)), False),
    ],
    ids=["behind 64 KB", "in two segments", "fill bytes", "garbage", "behind the frame", "XMP", "EXIF before XMP", "EXIF says 1",
         "in a comment", "in APP5", "behind the scan", "in a second image"],
)  # fmt: skip
def test_orientation_is_read_from_a_jpeg_header(data, turned):
    pixels = decode(data)
    assert is_turned(pixels, 3) == turned
    assert (pixels.shape == UPRIGHT.shape) != turned
    if b"garbage" not in data:  # of which libjpeg warns
        assert (jpeg_size(data) is None) == turned


def test_checked_size_is_the_decoded_size(tmp_path):
    for k, (name, data) in enumerate(seeds().items()):
        file = tmp_path / f"{k}{name}"
        file.write_bytes(data)
        assert image_files.image_size(file) == decode(data).shape[:2], name


# --- metadata ---


@pytest.mark.parametrize("kind", ["text", "many texts", "international text", "profile", "damaged text"])
def test_broken_metadata_do_not_spoil_a_png(kind):
    texts = PngImagePlugin.PngInfo()
    options = {"exif": exif(6)}
    if kind == "profile":
        options["icc_profile"] = bytes(3 << 20)
    elif kind == "many texts":
        for k in range(70):
            texts.add_text(f"k{k}", "x" * (1 << 20), zip=True)
    else:
        (texts.add_itxt if kind == "international text" else texts.add_text)("k", "x" * (5 << 20), zip=True)
    data = saved(picture(), "PNG", pnginfo=texts, **options)
    if kind == "damaged text":
        data = data.replace(b"zTXtk", b"zTXtq")  # and its checksum no longer fits
    assert np.array_equal(decode(data), np.asarray(picture().transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("marker", [0xE0, 0xE2, 0xED, 0xEE, 0xFE])
@pytest.mark.parametrize(
    "content", [b"", b"JFIF\0", b"Adobe", b"MPF\0junk", b"ICC_PROFILE\0", b"Photoshop 3.0\x008BIM\0"]
)
def test_broken_metadata_do_not_spoil_a_jpeg_decoded_by_pillow(marker, content):
    """CMYK and bytes between segments, which are left to Pillow."""
    print_file = saved(picture().convert("CMYK"), "JPEG", quality=95)
    for data in (
        with_segments(b"\0", segment(marker, content)),
        print_file[:2] + segment(marker, content) + print_file[2:],
    ):
        assert np.abs(decode(data).astype(int) - UPRIGHT).mean() < 4


def test_broken_metadata_do_not_spoil_a_tiff():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112], tags[0x8769], tags[0x8825] = 6, 4_000_000_000, 8
    for compression in ("raw", "tiff_lzw"):
        assert is_turned(decode(saved(picture(), "TIFF", tiffinfo=tags, compression=compression)), 0.5)


def test_broken_exif_does_not_spoil_an_avif():
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    data = saved(picture(), "AVIF", quality=95, exif=exif(6, x010F="maker"))
    assert is_turned(decode(data))
    offset = data.rindex(b"maker")
    start = data.rindex(b"\0*", 0, offset) - 2  # big-endian TIFF
    assert is_turned(decode(data[:start] + b"\xff" * 8 + data[start + 8 :]))


def test_removing_metadata_keeps_the_pixels():
    for name, data in seeds().items():
        bare = without_metadata(data)
        assert np.array_equal(as_stored(bare), as_stored(data)), name
        if data.startswith(b"\xff\xd8"):
            assert not any(part in bare for part in (b"Exif", b"ICC_PROFILE", b"words", b"MPF\0"))
    assert without_metadata(PLAIN) is PLAIN


# --- values ---


def gray(values, dtype):
    return Image.fromarray(np.asarray(values, dtype=dtype))


RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (saved(gray(RAMP, np.int32), "TIFF"), RAMP),
        (saved(gray(RAMP * 0.5, np.float32), "TIFF"), RAMP // 2),
        (saved(gray(RAMP * 0, np.float32), "TIFF"), RAMP * 0),
        (saved(gray(RAMP * 257, np.uint16), "TIFF"), RAMP),
        (saved(gray(RAMP // 15 * 256, np.uint16), "TIFF"), RAMP // 15),
        (saved(gray(RAMP * 257, np.uint16), "PNG"), RAMP),
        (b"P5 16 16 65535 " + (RAMP * 257).astype(">u2").tobytes(), RAMP),
        (saved(gray(RAMP, np.uint8).convert("LA"), "TIFF"), RAMP),
        (saved(gray(RAMP > 99, np.bool_), "TIFF"), 255 * (RAMP > 99)),
    ],
    ids=[
        "int32",
        "float",
        "black float",
        "16-bit TIFF",
        "dark 16-bit TIFF",
        "16-bit PNG",
        "16-bit PGM",
        "alpha",
        "1 bit",
    ],
)
def test_other_pixel_types(data, expected):
    assert np.array_equal(decode(data), np.repeat(np.asarray(expected)[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("values", "dtype", "why"),
    [
        (RAMP * 300, np.int32, r"32-bit values lie in 0\.\.76500 and not in 0\.\.255: save it with 8 bits"),
        (RAMP - 9, np.int32, r"-9\.\.246"),
        (RAMP / 255, np.float32, r"0\.\.1 and"),
        (RAMP / 300, np.float32, r"0\.\.0\.85 and"),
        (RAMP > 9, np.int32, r"0\.\.1 and"),
        (RAMP * np.nan, np.float32, "NaN or infinite"),
        (np.where(RAMP, RAMP, np.inf), np.float32, "NaN or infinite"),
        (RAMP * 4, np.uint16, "16-bit values are 1020 at most, so it would be black"),
        (RAMP * 16, np.uint16, "16-bit values are 4080 at most, so it would be black"),
        (RAMP // 2, np.uint16, "16-bit values are 127 at most, so it would be black: save it with 8 bits"),
    ],
    ids=[
        "large",
        "negative",
        "0..1",
        "below 1",
        "0 and 1",
        "NaN",
        "infinite",
        "10 of 16 bits",
        "12 of 16 bits",
        "small 16 bits",
    ],
)
def test_unknown_value_ranges_are_bad_images(values, dtype, why):
    with pytest.raises(BadImage, match=why):
        decode(saved(gray(values, dtype), "TIFF"))


def test_a_12_bit_tiff_is_scaled_by_12_bits():
    values = np.linspace(0, 4095, WIDTH * HEIGHT).astype(int).reshape(HEIGHT, WIDTH)
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1).astype(
        np.uint8
    )
    tags = [
        (256, WIDTH),
        (257, HEIGHT),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, HEIGHT),
        (279, packed.size),
    ]
    rows = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    data = (
        struct.pack("<2sHI", b"II", 42, 8 + packed.size)
        + packed.tobytes()
        + struct.pack("<H", len(tags))
        + rows
        + bytes(4)
    )
    assert np.array_equal(decode(data)[..., 0], values >> 4)


def test_orientation_of_a_16_bit_tiff():
    values = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH) * 170
    data = saved(gray(values, np.uint16), "TIFF", exif=exif(6))
    assert np.array_equal(decode(data)[..., 0], np.rot90(values >> 8, -1))


# --- errors ---


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (struct.error("unpack requires"), "error: unpack requires"),
        (MemoryError(), "MemoryError"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (KeyError(259), "KeyError: 259"),
        (RuntimeError(""), "RuntimeError"),
        (OSError("one\n\x1b[31mtwo"), "one"),
        (ValueError("a\x07b"), "a\\x07b"),
        (Image.DecompressionBombError("large"), "large"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_exception_of_a_decoder_is_a_bad_image(monkeypatch, error, text):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    assert np.abs(decode(PLAIN).astype(int) - UPRIGHT).mean() < 3  # by Pillow
    assert decode_reduced(PLAIN, (HEIGHT, WIDTH), 2).shape == (HEIGHT // 2, WIDTH // 2, 3)
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", fail)
    assert np.abs(decode(PLAIN).astype(int) - UPRIGHT).mean() < 3
    assert jpeg_size(PLAIN) is None
    monkeypatch.setattr(Image, "open", fail)
    for use in (decode, as_stored, lambda data: decode_reduced(data, (HEIGHT, WIDTH), 2)):
        for data in (PLAIN, saved(picture(), "PNG")):
            with pytest.raises(BadImage) as caught:
                use(data)
            assert str(caught.value) == text


def test_an_interrupt_is_not_a_bad_image(monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        decode(saved(picture(), "PNG"))


def test_decoding_suppresses_only_its_own_warnings(monkeypatch, capfd):
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1
    )  # Pillow warns above it, and refuses twice as many
    files = seeds()
    compressed = (files["tiff_adobe_deflate.tif"], files["tiff_lzw.tif"])
    damaged = [data[:20] + b"\xff" * 8 + data[28:] for data in compressed]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        good = [files[name] for name in ("metadata.tif", "transparent.png", "RGB.png", "p.bmp", "frames.mpo")]
        with ThreadPoolExecutor(4) as pool:
            assert all(p.size == 3 * WIDTH * HEIGHT for p in pool.map(decode, 8 * good))
        for data in damaged:
            with pytest.raises(BadImage):
                decode(data)
        with pytest.raises(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(files["RGB.png"]))
    assert caught == []
    assert capfd.readouterr() == ("", "")


def test_a_tiff_with_missing_rows_is_bad():
    data = saved(picture(), "TIFF")
    with Image.open(io.BytesIO(data)) as image:
        kind = image.tag_v2.tagtype[257]
    length = data.index(struct.pack("<HHI", 257, kind, 1)) + 8
    with pytest.raises(BadImage, match="it holds too few strips for its height"):
        decode(data[:length] + struct.pack("<H", 1000) + data[length + 2 :])


def test_a_webp_with_a_huge_canvas_is_bad():
    data = bytearray(seeds()["frames.webp"])
    offset = data.index(b"VP8X") + 12
    data[offset : offset + 3] = b"\x17\0\x80"
    with pytest.raises(BadImage, match="8388632x16 pixels: no frame of a WebP file has longer sides than 16383"):
        decode(bytes(data))


def test_an_image_without_pixels_is_bad():
    with pytest.raises(BadImage, match="no pixels"):
        module._check_size(0, 4)


# --- damaged files ---


def outcome(data):
    """Return the pixels or the reason of BadImage; any other exception is an error."""
    try:
        pixels = decode(data)
    except BadImage as error:
        reason = str(error)
        assert reason.strip()
        assert len(reason.splitlines()) == 1
        assert reason.isprintable()
        return reason
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.size > 0
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    return pixels


def test_the_seeds_cover_all_formats_that_pillow_writes():
    found = set()
    for name, data in seeds().items():
        with metadata.quiet(), Image.open(io.BytesIO(data), formats=module.FORMATS) as image:
            found.add({"MPO": "JPEG"}.get(image.format, image.format.upper()))
        assert 130 < decode(data).mean() < 170, name
    assert set(module.FORMATS) & Image.SAVE.keys() <= found
    assert len(found) > 30


def check_mutations(count, seed):
    results = []
    for _, data in mutations(seeds(), count, seed):
        result = outcome(data)
        full = jpeg_size(data)
        if full is not None:
            try:
                assert decode_reduced(data, full, 2).shape == (-(-full[0] // 2), -(-full[1] // 2), 3)
            except BadImage as error:
                assert str(error).strip()
        results.append(isinstance(result, str))
    assert 0.3 < np.mean(results) < 0.95  # the damage is neither everywhere nor nowhere too large


def test_mutated_files_decode_or_are_bad_images():
    check_mutations(1000, seed=0)


@pytest.mark.slow
def test_many_mutated_files_decode_or_are_bad_images():
    check_mutations(10_000, seed=1)


@pytest.fixture
def mixed(folder_of):
    """40 good JPEGs and 60 mutated files of all formats in two classes, and their decoded
    pixels.
    """
    files = {f"train/{'ab'[k % 2]}/{k:03d}.jpg": jpeg(k) for k in range(40)}
    damaged = mutations(seeds(), 60, seed=5)
    files |= {f"train/{'ab'[k % 2]}/{k + 100}.png": data for k, (_, data) in enumerate(damaged)}
    # The folder's index goes by file names, decoders by content.
    return folder_of(files), {name.removeprefix("train/"): outcome(data) for name, data in files.items()}


def test_pack_skips_and_reports_bad_images(mixed, tmp_path):
    root, expected = mixed
    images = open_split(root, "train")
    good = [i for i in range(len(images)) if not isinstance(expected[images.name(i)], str)]
    bad = [i for i in range(len(images)) if isinstance(expected[images.name(i)], str)]
    assert len(good) >= 45
    assert len(bad) >= 20
    text = pack(images, tmp_path / "x.beton", mode="raw", skip_bad=True)
    name = images.name(bad[0])
    assert f"{len(good)} images" in text
    assert f"{len(bad)} left out, the first: {root}/train/{name}: {expected[name]}" in text
    found = open_beton(tmp_path / "x.beton")
    assert all(np.array_equal(found.read(k), expected[images.name(i)]) for k, i in enumerate(good))
    with pytest.raises(InputError, match="--skip-bad"):
        pack(images, tmp_path / "y.beton", mode="raw")


def test_training_skips_and_reports_bad_images(mixed, make_config, tmp_path, one_thread):
    root, expected = mixed
    data = {"root": str(root), "batch_size": 50, "max_bad_fraction": 0.9}
    config = make_config(data=data, optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0})
    run = train(config).folder
    summary = json.loads((run / "summary.json").read_text())
    bad = {name: reason for name, reason in expected.items() if isinstance(reason, str)}
    assert summary["bad_images"] == bad
    assert np.isfinite(summary["loss"])
    assert str(tmp_path / "p.png") in write_preview(config, tmp_path / "p.png")


def test_dense_evaluations_report_damaged_files_in_one_line(tmp_path):
    file = tmp_path / "x.png"
    for _, data in mutations(seeds(), 150, seed=6):
        file.write_bytes(data)
        for use in (lambda: voc.read_mask(file), lambda: image_files.image_size(file)):
            try:
                use()
            except InputError as error:
                assert str(error).startswith(f"{file}: ")
                assert len(str(error)) > len(f"{file}: ")
    for name in ("nowhere", "a\0b"):
        with pytest.raises(InputError, match="nowhere.png: No such file|null byte"):
            voc.read_mask(tmp_path / f"{name}.png")


def test_metadata_do_not_spoil_a_mask(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("k", "x" * (5 << 20), zip=True)
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(mask).save(tmp_path / "x.png", pnginfo=texts)
    assert np.array_equal(voc.read_mask(tmp_path / "x.png"), mask)


# --- every backend ---


@pytest.fixture
def oriented(folder_of):
    """JPEGs with an orientation in EXIF, after 64 KB, in XMP, or none but broken metadata."""
    parts = [
        [segment(0xE1, ifd(TURN))],
        [PROFILE, PROFILE, segment(0xE1, ifd(TURN, (0x011A, 7, 4, b"abcd")))],
        [segment(0xE1, XMP + xmp(6))],
        [segment(0xE1, b"Exif\0\0" + b"\xff" * 40), segment(0xE2, b"MPF\0junk")],
    ]
    return folder_of({f"train/{k:02d}.jpg": with_segments(*parts[k % 4]) for k in range(16)})


def views_of(root, split, backend):
    config = DataConfig(root=str(root), train_split=split, batch_size=16, image_size_px=16, threads=2, backend=backend)
    images = open_split(root, split)
    loader = build_loader(config, images, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    batches = loader.batches(0, 1)
    batch = next(batches)
    found = [view.clone() for view in batch.views]
    batches.close()
    assert loader.bad == {}
    return found


def is_close(a, b):
    return all((x - y).abs().max() < 3 / 255 / 0.224 for x, y in zip(a, b, strict=True))


def test_native_and_packed_images_are_upright(oriented, tmp_path):
    images = open_split(oriented, "train")
    pack(images, tmp_path / "raw.beton", mode="raw")
    assert is_close(views_of(oriented, "train", "native"), views_of(tmp_path, "raw", "native"))
    pack(images, tmp_path / "jpg.beton", mode="jpg")
    found = open_beton(tmp_path / "jpg.beton")
    assert [is_turned(found.read(k)) if found.modes[k] else is_turned(decode(found.read(k))) for k in range(16)] == 4 * [
        True, True, True, False
    ]  # fmt: skip
    assert found.read(3) == PLAIN  # copied, without metadata


def test_dali_images_are_upright(oriented):
    assert is_close(views_of(oriented, "train", "native"), views_of(oriented, "train", "dali"))


@pytest.mark.slow
def test_ffcv_images_stored_with_exif_are_upright(oriented, tmp_path):
    images = open_split(oriented, "train")
    with open(tmp_path / "x.beton", "w+b") as file:
        writer = pack_module._Writer(file, len(images), [])
        for k in range(len(images)):
            writer.add(pack_module.Sample(JPEG, WIDTH, HEIGHT, images.read(k)), -1)
        writer.finish()
    expected = views_of(oriented, "train", "native")
    assert is_close(expected, views_of(tmp_path, "x", "native"))
    assert is_close(expected, views_of(tmp_path, "x", "ffcv"))


def test_sides_beyond_the_limit_of_libjpeg_are_bad_images(folder_of, tmp_path):
    root = folder_of({"train/1.png": saved(Image.new("L", (65_510, 2)), "PNG"), "train/2.jpg": jpeg(0)})
    text = pack(open_split(root, "train"), tmp_path / "x.beton", mode="jpg", skip_bad=True)
    assert "1.png: 65510x2 pixels: a .beton file holds sides up to 65,500; --max-side reduces them" in text
