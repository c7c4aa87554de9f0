import hashlib
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.common import HANG_S
from PIL import Image
from shapes import prepare_shapes

from fastbyol.data import open_split
from fastbyol.data.decode import decode
from fastbyol.errors import InputError
from fastbyol.tools import corpora
from fastbyol.tools.corpora import prepare_fashion_mnist, prepare_photos


def digest(root):
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_photos_have_one_class_per_photograph_in_both_splits(photos):
    train, val = open_split(photos, "train"), open_split(photos, "val")
    assert len(train) == 72
    assert len(val) == 18
    assert train.classes == val.classes
    assert len(train.classes) == 18
    assert set(np.bincount(train.labels)) == {4}
    sizes = [max(decode(train.read(i)).shape) for i in range(len(train))]
    assert min(sizes) >= 60
    assert max(sizes) <= 68


def test_default_photos_resemble_imagenet(tmp_path):
    prepare_photos(tmp_path / "p", 72, seed=1)
    files = list((tmp_path / "p/train").rglob("*.jpg"))
    kilobytes = np.array([f.stat().st_size for f in files]) / 1000
    assert 80 <= np.median(kilobytes) <= 110
    assert np.mean((kilobytes > 60) & (kilobytes < 140)) > 0.95
    shapes = np.array([decode(f.read_bytes()).shape[:2] for f in files])
    assert np.median(shapes.max(1)) == pytest.approx(500, abs=10)
    assert np.median(shapes.min(1)) == pytest.approx(375, abs=25)


@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_train_and_val_are_cut_from_disjoint_bands(monkeypatch, tmp_path, shape):
    """In a photograph whose train bands are black and val bands white, brightness tells a pixel's
    origin.
    """

    pixels = np.zeros((*shape, 3), dtype=np.uint8)
    long = pixels if shape[0] > shape[1] else pixels.swapaxes(0, 1)
    long[125:250] = 255
    long[375:] = 255
    monkeypatch.setattr(corpora, "open_photo", lambda path: Image.fromarray(pixels))
    monkeypatch.setattr(corpora, "EXPOSURE_STOPS", 0)
    monkeypatch.setattr(corpora, "WHITE_BALANCE", 0)
    prepare_photos(tmp_path / "p", 144, seed=0, size=32)
    for split, value in (("train", 0), ("val", 255)):
        images = [decode(f.read_bytes()).astype(int) for f in (tmp_path / "p" / split).rglob("*.jpg")]
        assert max(np.abs(image.mean() - value).max() for image in images) < 4


def test_photos_are_a_function_of_the_seed(tmp_path, photos):
    prepare_photos(tmp_path / "same", 72, seed=0, size=64)
    prepare_photos(tmp_path / "other", 72, seed=1, size=64)
    assert digest(tmp_path / "same") == digest(photos)
    assert digest(tmp_path / "other") != digest(photos)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=r"--out .*there exists; it is not overwritten"):
        prepare_photos(tmp_path / "there", 100, seed=0, size=32)
    with pytest.raises(InputError, match="not overwritten"):
        prepare_fashion_mnist(tmp_path / "there")


@pytest.mark.parametrize(("images", "size", "message"), [(71, 64, "at least 72 are needed"), (100, 4, "at least 16")])
def test_invalid_numbers(tmp_path, images, size, message):
    with pytest.raises(InputError, match=message):
        prepare_photos(tmp_path / "p", images, seed=0, size=size)
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_no_files(tmp_path):
    def stop(done, total):
        if done == 10:
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        prepare_photos(tmp_path / "p", 100, seed=0, size=32, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_no_partial_corpus(tmp_path, number):
    command = [sys.executable, "-m", "fastbyol", "prepare", "photos", "--out", str(tmp_path / "p"), "--images", "20000"]

    def heed_interrupts() -> None:
        """A shell that starts this test in the background has its children ignore SIGINT."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    deadline = time.monotonic() + HANG_S
    while not any(tmp_path.glob(".p.partial-*/train/*/*.jpg")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=HANG_S)
    assert not (tmp_path / "p").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert stderr == "fastbyol: error: interrupted\n"
        assert list(tmp_path.iterdir()) == []


# --- Fashion-MNIST ---


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def idx_files(tmp_path):
    rng = np.random.default_rng(0)
    source = tmp_path / "source"
    source.mkdir()
    for prefix, n in (("train", 30), ("t10k", 20)):
        (source / f"{prefix}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)))
        (source / f"{prefix}-labels-idx1-ubyte").write_bytes(idx((np.arange(n) % 10).astype(np.uint8)))
    return source


def test_fashion_mnist_is_lossless(tmp_path, idx_files):
    text = prepare_fashion_mnist(tmp_path / "out", idx_files)
    assert "30 in train/" in text
    train, val = open_split(tmp_path / "out", "train"), open_split(tmp_path / "out", "val")
    assert (len(train), len(val), len(train.classes)) == (30, 20, 10)
    raw = np.frombuffer((idx_files / "train-images-idx3-ubyte").read_bytes()[16:], dtype=np.uint8).reshape(30, 28, 28)
    image = decode((tmp_path / "out/train/sandal/00005.png").read_bytes())
    assert np.array_equal(image, np.repeat(raw[5][..., None], 3, axis=2))


def test_fashion_mnist_limits(tmp_path, idx_files):
    prepare_fashion_mnist(tmp_path / "out", idx_files, images=12, val_images=10)
    assert len(open_split(tmp_path / "out", "train")) == 12
    assert len(open_split(tmp_path / "out", "val")) == 10


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-labels-idx1-ubyte", lambda data: None, "contains neither train-labels-idx1-ubyte nor .*gz"),
        ("train-images-idx3-ubyte", lambda data: data[:-7], "23513 bytes of data where"),
        ("train-images-idx3-ubyte", lambda data: b"words", "not an idx file"),
        ("t10k-labels-idx1-ubyte", lambda data: idx(np.zeros(19, dtype=np.uint8)), "20 t10k images but 19 labels"),
    ],
)
def test_malformed_idx_files(tmp_path, idx_files, name, change, message):
    data = change((idx_files / name).read_bytes())
    if data is None:
        (idx_files / name).unlink()
    else:
        (idx_files / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        prepare_fashion_mnist(tmp_path / "out", idx_files)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not os.path.isdir("/usr/share/datasets/fashion-mnist"), reason="dataset-fashion-mnist not installed"
)
def test_the_debian_package_is_found(tmp_path):
    prepare_fashion_mnist(tmp_path / "out", images=100, val_images=50)
    train = open_split(tmp_path / "out", "train")
    assert (len(train), len(train.classes)) == (100, 10)
    assert decode(train.read(0)).shape == (28, 28, 3)


@pytest.mark.parametrize(
    "prepare", [prepare_fashion_mnist, lambda out: prepare_photos(out, 100, seed=0), lambda out: prepare_shapes(out, 8)]
)
def test_an_existing_folder_is_detected_before_anything_is_read(tmp_path, monkeypatch, prepare):
    """Fashion-MNIST would otherwise be downloaded first."""
    for name in ("_fashion_mnist_source", "photo_paths"):
        monkeypatch.setattr(corpora, name, lambda *_: pytest.fail("something was read"))
    with pytest.raises(InputError, match="not overwritten"):
        prepare(tmp_path)
