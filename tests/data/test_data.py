"""Decoding and image folders."""

import errno
import io
import os
import re
import shutil

import numpy as np
import pytest
import simplejpeg
from helpers.common import jpeg
from PIL import Image

from fastbyol.data import open_split
from fastbyol.data.decode import EXTENSIONS, BadImage, decode
from fastbyol.data.folder import index_folder
from fastbyol.data.images import UNLABELED
from fastbyol.errors import InputError

NFC, NFD = "\u00e9", "e\u0301"  # one letter in Unicode's composed and decomposed form


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def color(red: int, green: int, blue: int, size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.new("RGB", size, (red, green, blue))


def test_jpeg_and_png_give_the_same_rgb():
    for data in (saved(color(200, 100, 50), "JPEG", quality=98), saved(color(200, 100, 50), "PNG")):
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
        saved(color(90, 90, 90).quantize(4), "PNG"),
        saved(color(90, 90, 90).convert("CMYK"), "JPEG", quality=98),
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
        (saved(color(1, 2, 3, (300, 300)), "PNG")[:-200], "truncated|broken"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "not an image|broken"),
    ],
    ids=["empty", "text", "cut jpeg", "cut jpeg header", "cut png", "damaged png"],
)
def test_bad_image_reason_is_one_line(data, why):
    with pytest.raises(BadImage, match=f"(?i){why}") as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_rejected_by_its_header():
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
    assert folder.labels.tolist() == [UNLABELED] * 2
    assert folder.classes == []


def test_messages_about_unusable_folders(folder_of, tmp_path):
    with pytest.raises(InputError, match="data.root is not set"):
        open_split(None, "train")
    with pytest.raises(InputError, match=r"data.root=.*nowhere: there is no folder .*nowhere/train"):
        open_split(tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match="no images"):
        open_split(folder_of({"train/a/readme.txt": b""}), "train")
    with pytest.raises(InputError, match=r"mixes images \(2.jpg\) and class folders \(a\)"):
        open_split(folder_of({"train/a/1.jpg": b"", "train/2.jpg": b""}), "train")


def test_images_in_nested_folders_belong_to_the_class(folder_of):
    names = ["a/1.jpg", "a/x/2.jpg", "a/x/y/3.jpg", "b/z/4.jpg", "b/z.jpg", "c.d/1.jpg", "c/1.jpg"]
    folder = open_split(folder_of({f"train/{name}": b"" for name in names}), "train")
    assert folder.classes == ["a", "b", "c", "c.d"]
    assert folder.paths == ["a/1.jpg", "a/x/2.jpg", "a/x/y/3.jpg", "b/z.jpg", "b/z/4.jpg", "c/1.jpg", "c.d/1.jpg"]
    assert folder.labels.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert folder.read(2) == b""
    assert folder.notes == ()


def test_every_extension_that_is_decoded_is_listed(folder_of):
    names = [f"{k:03d}{form(e)}" for k, e in enumerate(EXTENSIONS) for form in (str.lower, str.upper)]
    assert open_split(folder_of(dict.fromkeys(names, b"")), ".").paths == sorted(names)


def test_skipped_files_are_counted_in_notes(folder_of):
    names = [f"a/{i}.jpg" for i in range(3)] + ["a/1.heic", "b/x/2.HEIC", "b/x/labels.csv", "b/README", "notes.txt"]
    root = folder_of({f"train/{name}": b"" for name in names})
    (root / "train/empty/below").mkdir(parents=True)
    folder = open_split(root, "train")
    assert folder.paths == names[:3]
    assert folder.classes == ["a"]
    assert folder.notes == (
        f"{root}/train: left out: 2 .heic, 1 .csv, 1 .txt, 1 without extension; folders without an image: b, empty",
    )
    assert folder.subset(np.array([1])).with_labels(np.array([0]), ["x"]).notes == folder.notes


def test_hidden_files_and_folders_are_skipped_and_counted(folder_of):
    names = [".DS_Store", "a/._1.jpg", "a/.git/2.jpg", "__MACOSX/a/3.jpg", "a/@eaDir/4.jpg/thumb.jpg", ".thumbs/5.jpg"]
    folder = open_split(folder_of({f"train/{name}": b"" for name in ["a/1.jpg", *names]}), "train")
    assert folder.paths == ["a/1.jpg"]
    assert folder.notes == (
        f"{folder.root}: left out: 1 folder @eaDir, 1 folder __MACOSX, 1 hidden folder .git, 1 hidden folder .thumbs",
    )


def test_links_are_followed_once_without_cycles(folder_of):
    base = folder_of({"train/a/1.jpg": b"", "train/b/2.jpg": b"", "elsewhere/y/3.jpg": b""}) / "train"
    (base / "a/up").symlink_to("..")
    (base / "a/self").symlink_to("self")
    (base / "a/link").symlink_to(base / "a")
    (base / "a/out").symlink_to(base / "../elsewhere")
    (base / "a/out again").symlink_to(base / "../elsewhere")
    (base / "a/file.jpg").symlink_to("1.jpg")
    (base / "c").symlink_to("b")
    folder = index_folder(base)
    assert folder.paths == ["a/1.jpg", "a/file.jpg", "a/out/y/3.jpg", "b/2.jpg", "c/2.jpg"]
    assert folder.classes == ["a", "b", "c"]


def test_a_link_to_a_pipe_reads_as_empty_without_blocking(folder_of):
    root = folder_of({"train/a/1.jpg": jpeg(1)})
    os.mkfifo(root / "pipe")
    (root / "train/a/2.jpg").symlink_to(root / "pipe")
    images = open_split(root, "train")
    assert images.read(1) == b""
    assert images.read(0) == jpeg(1)


def test_folders_and_pipes_named_like_images_are_not_images(folder_of):
    root = folder_of({"train/a/1.jpg": b"", "train/a/x.jpg/2.png": b""})
    os.mkfifo(root / "train/a/3.jpg")
    folder = open_split(root, "train")
    assert folder.paths == ["a/1.jpg", "a/x.jpg/2.png"]
    assert folder.notes == (f"{root}/train: left out: 1 pipe, socket or device",)


def test_folders_next_to_the_images_of_a_flat_folder(folder_of):
    root = folder_of({"train/1.jpg": b"", "train/lists/all.txt": b""})
    folder = open_split(root, "train")
    assert (folder.paths, folder.classes) == (["1.jpg"], [])
    assert folder.notes == (f"{root}/train: left out: 1 .txt; folders without an image: lists",)


def test_a_folder_without_images_reports_its_contents(folder_of):
    root = folder_of({"heic/a/1.heic": b"", "heic/a/2.heic": b"", "heic/x.txt": b"", "zip/1.zip": b""})
    (root / "none").mkdir()
    for split, text in [
        ("heic", "they hold 2 .heic, 1 .txt; fastbyol reads JPEG, PNG, .*: convert them"),
        ("zip", "they hold 1 .zip; .* unpack the archives"),
        ("none", "they hold no files; name the folder that holds the images"),
    ]:
        with pytest.raises(InputError, match=f"no images in .*{split} or its folders: {text}"):
            open_split(root, split)


def test_an_unlistable_folder_raises_input_error(folder_of, monkeypatch):
    root, scandir = folder_of({"train/a/1.jpg": b"", "train/b/x/2.jpg": b""}), os.scandir

    def denied(path):
        if path.endswith("/x"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", denied)
        with pytest.raises(InputError, match="cannot list .*/train/b/x: Permission denied"):
            open_split(root, "train")


@pytest.mark.parametrize(
    "names", [("train/a/1.jpg", "val/a/1.jpg"), ("train/1.jpg", "Validation/2.jpg"), ("test2017/1.jpg",)]
)
def test_splits_are_not_classes(folder_of, names):
    with pytest.raises(InputError, match=r"holds splits \(.*\), not classes: name one of them"):
        open_split(folder_of(dict.fromkeys(names, b"")), ".")


def test_a_class_may_have_the_name_of_a_split(folder_of):
    folder = open_split(folder_of({"trainer/1.jpg": b"", "bus/1.jpg": b"", "train/2.jpg": b""}), ".")
    assert folder.classes == ["bus", "train", "trainer"]


def test_names_that_are_not_utf8(folder_of):
    name = os.fsdecode(b"caf\xe9")
    folder = open_split(folder_of({f"train/{name}/{name}/{name}.jpg": b"x", "train/a/1.jpg": b""}), "train")
    assert folder.classes == ["a", name]
    assert folder.read(1) == b"x"
    assert len(folder.fingerprint()) == 2


def test_class_numbers_do_not_depend_on_unicode_normal_form(folder_of):
    """\u00e9 sorts after z, e with a combining accent before it."""
    root = folder_of(
        {f"{split}/{name}/1.jpg": b"" for split, e in (("train", NFD), ("val", NFC)) for name in ("a", e, "z")}
    )
    train, val = open_split(root, "train"), open_split(root, "val")
    assert train.classes == val.classes == ["a", "z", NFC]
    assert train.paths == ["a/1.jpg", f"{NFD}/1.jpg", "z/1.jpg"]  # in the order of the original names
    assert train.labels.tolist() == [0, 2, 1]
    assert val.labels.tolist() == [0, 1, 2]
    both = open_split(folder_of({f"both/{name}/1.jpg": b"" for name in ("a", NFD, NFC)}), "both")
    assert both.classes == ["a", NFC]
    assert both.labels.tolist() == [0, 1, 1]
    assert "names differ only in Unicode's normal form are one class" in both.notes[0]


def test_fingerprint_identifies_the_changed_class(folder_of, tmp_path):
    root = folder_of(
        {f"train/{c}/{i}.jpg": b"" for c in "ab" for i in range(3)} | {"flat/1.jpg": b"", "flat/2.jpg": b""}
    )
    first = open_split(root, "train")
    assert {name: count for name, (count, _) in first.fingerprint().items()} == {"a": 3, "b": 3}
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for _, digest in first.fingerprint().values())
    assert open_split(root, "flat").fingerprint()[""][0] == 2
    assert first.subset(np.array([0, 1, 2, 5, 4, 3])).fingerprint()["b"] != first.fingerprint()["b"]
    shutil.move(root, tmp_path / "moved")
    assert open_split(tmp_path / "moved", "train").fingerprint() == first.fingerprint()
    (tmp_path / "moved/train/b/2.jpg").rename(tmp_path / "moved/train/b/3.jpg")
    renamed = open_split(tmp_path / "moved", "train").fingerprint()
    assert renamed["a"] == first.fingerprint()["a"]
    assert renamed["b"][0] == 3
    assert renamed["b"] != first.fingerprint()["b"]


def test_subsample_keeps_all_classes(folder_of):
    folder = open_split(folder_of({f"{c}/{i}.jpg": b"" for c in "abc" for i in range(10)}), ".")
    part = folder.subsample(6)
    assert len(part) == 6
    assert set(part.labels.tolist()) == {0, 1, 2}
    assert folder.subsample(30) is folder
