"""Decoding and image folders."""

import io

import numpy as np
import pytest
import simplejpeg
from conftest import jpeg
from PIL import Image

from fastbyol.data import open_split
from fastbyol.data.decode import BadImage, decode
from fastbyol.data.images import UNLABELLED
from fastbyol.errors import InputError


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(red: int, green: int, blue: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.new("RGB", size, (red, green, blue))


def test_jpeg_and_png_give_the_same_rgb():
    for data in (saved(colour(200, 100, 50), "JPEG", quality=98), saved(colour(200, 100, 50), "PNG")):
        pixels = decode(data)
        assert pixels.shape == (16, 24, 3)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable
        assert np.abs(pixels.astype(int) - [200, 100, 50]).max() <= 2


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.new("L", (24, 16), 90), "JPEG", quality=98),
        saved(Image.new("L", (24, 16), 90), "PNG"),
        saved(Image.new("I;16", (24, 16), 90 * 257), "PNG"),
        saved(Image.new("LA", (24, 16), (90, 10)), "PNG"),
        saved(colour(90, 90, 90).quantize(4), "PNG"),
        saved(colour(90, 90, 90).convert("CMYK"), "JPEG", quality=98),
    ],
    ids=["gray jpeg", "gray png", "16-bit png", "alpha png", "palette png", "cmyk jpeg"],
)
def test_other_modes_become_rgb(data):
    pixels = decode(data)
    assert pixels.shape == (16, 24, 3)
    assert np.abs(pixels.astype(int) - 90).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    pixels = np.zeros((16, 24, 3), dtype=np.uint8)
    pixels[:8, :12] = (255, 0, 0)  # upper left corner red
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = decode(saved(Image.fromarray(pixels), "JPEG", quality=98, exif=exif)).astype(int)
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    assert result.shape == ((24, 16, 3) if orientation >= 5 else (16, 24, 3))
    inner = result[[2, -3]][:, [2, -3]]
    red = (inner[..., 0] > 200) & (inner[..., 1] < 60)
    assert np.argwhere(red).tolist() == [list(corner)]


def test_harmless_bytes_after_a_jpeg_are_tolerated():
    data = jpeg(1)
    assert np.array_equal(decode(data + b"\0" * 100), simplejpeg.decode_jpeg(data))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"these are words, not pixels", "not an image"),
        (jpeg(0)[:-200], "truncated|broken"),
        (jpeg(0)[:30], "not an image|truncated"),
        (saved(colour(1, 2, 3, (300, 300)), "PNG")[:-200], "truncated|broken"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "not an image|broken"),
    ],
    ids=["empty", "text", "cut jpeg", "cut jpeg header", "cut png", "damaged png"],
)
def test_a_bad_image_says_why_in_one_line(data, why):
    with pytest.raises(BadImage, match=f"(?i){why}") as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused_from_its_header():
    bomb = bytearray(jpeg(0))
    frame = bomb.find(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = (65_000).to_bytes(2, "big") * 2
    with pytest.raises(BadImage, match="65000x65000 pixels are more than"):
        decode(bytes(bomb))


def test_index_sorts_and_labels(folder_of):
    root = folder_of(
        {
            "train/b/2.png": b"",
            "train/b/1.JPG": b"",
            "train/a/x.jpeg": b"",
            "train/a/notes.txt": b"",
            "train/.hidden": b"",
        }
    )
    folder = open_split(root, "train")
    assert folder.paths == ["a/x.jpeg", "b/1.JPG", "b/2.png"]
    assert folder.labels.tolist() == [0, 1, 1]
    assert folder.classes == ["a", "b"]


def test_a_flat_folder_has_no_labels(folder_of):
    folder = open_split(folder_of({"2.jpg": b"", "1.jpg": b""}), ".")
    assert folder.paths == ["1.jpg", "2.jpg"]
    assert folder.labels.tolist() == [UNLABELLED] * 2
    assert folder.classes == []


def test_unusable_folders_name_the_key_and_the_path(folder_of, tmp_path):
    with pytest.raises(InputError, match="data.root is not set"):
        open_split(None, "train")
    with pytest.raises(InputError, match=r"data.root=.*nowhere: there is no folder .*nowhere/train"):
        open_split(tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match="no images"):
        open_split(folder_of({"train/a/readme.txt": b""}), "train")
    with pytest.raises(InputError, match="mixes images and class folders"):
        open_split(folder_of({"train/a/1.jpg": b"", "train/2.jpg": b""}), "train")


def test_spread_keeps_all_classes(folder_of):
    folder = open_split(folder_of({f"{c}/{i}.jpg": b"" for c in "abc" for i in range(10)}), ".")
    part = folder.spread(6)
    assert len(part) == 6
    assert set(part.labels.tolist()) == {0, 1, 2}
    assert folder.spread(30) is folder
