import errno
import hashlib
import io
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision
from helpers.common import HANG_S
from PIL import Image
from shapes import prepare_shapes

from fastbyol import cli
from fastbyol.config import DataConfig
from fastbyol.data import find_images, open_split
from fastbyol.data.decode import decode
from fastbyol.data.subset import read_class_list
from fastbyol.errors import InputError
from fastbyol.tools import corpora, image_sets, imagenet
from fastbyol.tools.corpora import prepare_fashion_mnist, prepare_photos
from fastbyol.tools.image_sets import prepare_cifar10, prepare_imagenette
from fastbyol.tools.imagenet import prepare_imagenet


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


# --- Archives and folders ---


def jpeg(color):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (color % 256, 40, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(members, mode="w"):
    """Return a tar archive of {name: bytes}; a value may be a TarInfo, of a link for example."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_tree(root, members):
    for name, content in members.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def assert_one_line(tmp_path, prepare, message):
    """The command fails with one line and leaves nothing."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=message) as caught:
        prepare(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == before


# --- CIFAR-10 ---

PER_BATCH = 20  # two images of each class


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(image_sets, "BATCH_IMAGES", PER_BATCH)


def cifar_batches():
    """Return batch name -> (pixels (N, 3072), labels)."""
    rng = np.random.default_rng(3)
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    labels = [k % 10 for k in range(PER_BATCH)]
    return {name: (rng.integers(0, 256, (PER_BATCH, 3072), dtype=np.uint8), labels) for name in names}


def python2_pickle(name, pixels, labels):
    """Return what cPickle of Python 2 wrote, without memo: text and arrays as byte strings."""

    def text(value):
        data = value.encode("latin1")
        return b"U" + bytes([len(data)]) + data

    raw = pixels.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text("b") + b"tR"
        b"(K\x01" + b"(M" + struct.pack("<H", len(pixels)) + b"M\x00\x0ct"
        b"cnumpy\ndtype\n("
        + text("u1")
        + b"K\x00K\x01tR(K\x03"
        + text("|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    files = b"](" + b"".join(text(f"image_{k}.png") for k in range(len(labels))) + b"e"
    items = (
        text("batch_label") + text(name) + text("labels") + numbers + text("data") + array + text("filenames") + files
    )
    return b"\x80\x02}(" + items + b"u."


def python_version(pickled=python2_pickle):
    members = {f"cifar-10-batches-py/{name}": pickled(name, *batch) for name, batch in cifar_batches().items()}
    members = dict(reversed(members.items()))  # the official archive is not sorted
    return {"cifar-10-batches-py/readme.html": b"<a>", **members, "cifar-10-batches-py/batches.meta": b"never read"}


def binary_version():
    members = {"cifar-10-batches-bin/batches.meta.txt": b"airplane\n"}
    for name, (pixels, labels) in cifar_batches().items():
        records = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
        members[f"cifar-10-batches-bin/{name}.bin"] = records.tobytes()
    return members


def image_folders(prefix=""):
    return {
        f"{prefix}{split}/{label}/{k:04d}.jpg": jpeg(10 * c + k)
        for split, count in (("train", PER_BATCH // 2), ("val", PER_BATCH // 10))
        for c, label in enumerate(image_sets.CIFAR10_CLASSES)
        for k in range(count)
    }


def python3_pickle(protocol, keys):
    return lambda name, pixels, labels: pickle.dumps(
        {keys(key): value for key, value in (("data", pixels), ("labels", labels))}, protocol
    )


@pytest.mark.parametrize(
    "members",
    [
        python_version,
        binary_version,
        lambda: python_version(python3_pickle(2, str.encode)),
        lambda: python_version(python3_pickle(4, str)),
    ],
    ids=["python", "binary", "protocol 2 of Python 3", "protocol 4"],
)
@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
def test_cifar10_batches_become_lossless_images(tmp_path, small_batches, members, packed):
    source = tmp_path / "source.tar.gz"
    if packed:
        source.write_bytes(tar(members(), "w:gz"))
    else:
        write_tree(source, members())
    calls = []
    text = prepare_cifar10(tmp_path / "out", source, progress=lambda *numbers: calls.append(numbers))
    assert text == f"CIFAR-10 in {tmp_path / 'out'}: 100 in train/, 20 in val/"
    assert calls == [(k, 120) for k in range(1, 121)]
    for split, first in (("train", "data_batch_1"), ("val", "test_batch")):
        images = open_split(tmp_path / "out", split)
        assert images.classes == image_sets.CIFAR10_CLASSES
        assert set(np.bincount(images.labels)) == {10 if split == "train" else 2}
        pixels, labels = cifar_batches()[first]
        path = tmp_path / "out" / split / image_sets.CIFAR10_CLASSES[labels[7]] / "00007.png"
        assert np.array_equal(decode(path.read_bytes()), pixels[7].reshape(3, 32, 32).transpose(1, 2, 0))
    pixels, labels = cifar_batches()["data_batch_3"]
    image = decode((tmp_path / "out/train/bird/00042.png").read_bytes())
    assert np.array_equal(image, pixels[2].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_cifar10_as_an_archive_of_images_is_kept_byte_for_byte(tmp_path, small_batches, caplog, mode):
    (tmp_path / "c.tar").write_bytes(
        tar({**image_folders("./x/"), "./x/val/cat/._1.jpg": b"by macOS", "x/notes.txt": b""}, mode)
    )
    prepare_cifar10(tmp_path / "out", tmp_path / "c.tar")
    assert tree(tmp_path / "out") == image_folders()
    assert caplog.text == ""


def test_files_of_a_folder_are_hard_linked_and_left_alone(tmp_path, small_batches):
    source = write_tree(tmp_path / "source", image_folders())
    (source / "val").rename(source / "test")  # as in the repository CIFAR-10-images
    (source / "train" / "again").symlink_to(source)  # a circle
    before = tree(source)
    text = prepare_cifar10(tmp_path / "out", source)
    assert text.endswith("100 in train/, 20 in val/ (120 hard-linked)")
    assert tree(tmp_path / "out") == image_folders()
    assert tree(source) == before
    assert (source / "test/cat/0001.jpg").samefile(tmp_path / "out/val/cat/0001.jpg")


def test_files_are_copied_where_no_links_are_possible(tmp_path, small_batches, monkeypatch):
    def no_link(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", no_link)
    source = write_tree(tmp_path / "source", image_folders())
    (source / "val/cat/0001.jpg").rename(tmp_path / "elsewhere.jpg")
    (source / "val/cat/0001.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    assert prepare_cifar10(tmp_path / "out", source).endswith("(120 copied)")
    assert tree(tmp_path / "out") == image_folders()
    assert not (tmp_path / "out/val/cat/0001.jpg").is_symlink()


def test_a_different_number_of_images_is_a_warning(tmp_path, small_batches, caplog):
    members = image_folders()
    del members["val/cat/0001.jpg"]
    prepare_cifar10(tmp_path / "out", write_tree(tmp_path / "source", members))
    assert [record.getMessage() for record in caplog.records] == [
        f"--source {tmp_path / 'source'}: val/cat has 1 images instead of 2"
    ]


def without(members, *words):
    return {name: content for name, content in members.items() if not any(word in name for word in words)}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/fastbyol-was-here",)


def changed(members, name, change):
    return {key: change(content) if name in key else content for key, content in members.items()}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (lambda: without(python_version(), "batch_3", "batch_5"), "data_batch_3, data_batch_5 is missing"),
        (lambda: without(binary_version(), "test_batch"), "test_batch is missing"),
        (
            lambda: {**python_version(), **binary_version()},
            r"holds the (python|binary) version .* and the (python|binary) version .*: name one",
        ),
        (lambda: {"a/cat.jpg": b""}, "holds no version of CIFAR-10"),
        (lambda: without(image_folders(), "val/cat"), "no images of val/cat: it is incomplete"),
        (lambda: without(image_folders(), "val/"), "no images of val/airplane, .*more.: it is incomplete"),
        (lambda: {**image_folders(), "val/orchid/1.jpg": b""}, "val/orchid/1.jpg: orchid is no class of CIFAR-10"),
        (lambda: {**image_folders(), "test/cat/0001.jpg": b""}, "the source has val/cat/0001.jpg twice"),
        (
            lambda: changed(binary_version(), "test_batch", lambda data: data[:-1]),
            r"61459 bytes, but 20 images need 61460",
        ),
        (lambda: changed(binary_version(), "test_batch", lambda data: b"\x0a" + data[1:]), "a label of 10, but"),
        (lambda: changed(python_version(), "batch_2", lambda data: data[:-900]), "batch_2: not a batch .*, or damaged"),
        (lambda: changed(python_version(), "batch_2", lambda data: b"hello"), "batch_2: not a batch of CIFAR-10"),
        (lambda: changed(python_version(), "batch_2", lambda data: pickle.dumps([1])), "expected 20 images and labels"),
        (
            lambda: python_version(
                lambda name, pixels, labels: pickle.dumps({"data": pixels[:, 1:], "labels": labels})
            ),
            "expected 20 images and labels",
        ),
        (
            lambda: changed(python_version(), "batch_2", lambda data: pickle.dumps({"data": Evil(), "labels": []})),
            "batch_2: .*it names posix.mkdir, which no batch needs: not loaded",
        ),
        (
            lambda: changed(python_version(), "batch_2", lambda data: b"c_codecs\nencode\n(U\x01aU\x05rot13tR."),
            "batch_2: .*it encodes text in 'rot13'",
        ),
    ],
)
@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
def test_unusable_cifar10_is_one_line(tmp_path, small_batches, members, message, packed):
    source = tmp_path / "source"
    if packed:
        source.write_bytes(tar(members()))
    else:
        write_tree(source, members())
    assert_one_line(tmp_path, lambda out: prepare_cifar10(out, source), message)
    assert not os.path.exists("/tmp/fastbyol-was-here")


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"../train/cat/9.jpg": b"x"}, "member '../train/cat/9.jpg' has a path that leaves the archive or is invalid"),
        ({"a/../../train/cat/9.jpg": b"x"}, "a path that leaves the archive or is invalid"),
        ({"/train/cat/9.jpg": b"x"}, "a path that leaves the archive or is invalid"),
        ({"train/cat/\u00e9\0.jpg": b"x"}, r"member 'train/cat/.\\x00.jpg' has a path"),
        ({"": special("train/cat/9.jpg", tarfile.SYMTYPE, "/etc/passwd")}, "'train/cat/9.jpg' is a link"),
        ({"": special("train/cat/9.jpg", tarfile.LNKTYPE, "/etc/passwd")}, "is a link, a device or a pipe"),
        ({"": special("train/cat/9.jpg", tarfile.CHRTYPE)}, "is a link, a device or a pipe"),
        ({"": special("train/cat/9.jpg", tarfile.FIFOTYPE)}, "is a link, a device or a pipe"),
    ],
)
def test_archives_with_members_that_are_no_plain_files_are_refused(tmp_path, small_batches, member, message):
    (tmp_path / "c.tar").write_bytes(tar({**image_folders(), **member}))
    assert_one_line(tmp_path, lambda out: prepare_cifar10(out, tmp_path / "c.tar"), message)


def test_an_endless_chain_of_headers_is_one_line(tmp_path, small_batches):
    """Each long name refers to the next header, which tarfile reads recursively."""
    header = special("././@LongLink", tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "c.tar").write_bytes(3000 * header + tar(image_folders()))
    assert_one_line(tmp_path, lambda out: prepare_cifar10(out, tmp_path / "c.tar"), "damaged: maximum recursion depth")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_archives_are_one_line(tmp_path, small_batches, mode, share):
    data = tar(image_folders(), mode)
    (tmp_path / "c.tar").write_bytes(data[: int(share * len(data))])
    assert_one_line(tmp_path, lambda out: prepare_cifar10(out, tmp_path / "c.tar"), "c.tar.*truncated or damaged")


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_an_archive_cut_between_members_or_damaged_there_is_one_line(tmp_path, small_batches, blocks):
    """tarfile alone takes the first header that is missing, cut off or damaged for the end."""
    members = image_folders()
    data, last = tar(members), tar(without(members, "truck"))
    start = len(last.rstrip(b"\0")) // 512 * 512 + 512  # the images have more than 512 bytes
    (tmp_path / "cut.tar").write_bytes(data[: start + 512 * blocks - (blocks > 0) * 99])
    assert_one_line(tmp_path, lambda out: prepare_cifar10(out, tmp_path / "cut.tar"), "truncated or damaged")
    (tmp_path / "damaged.tar").write_bytes(data[:start] + b"?" * 512 + data[start + 512 :])
    assert_one_line(tmp_path, lambda out: prepare_cifar10(out, tmp_path / "damaged.tar"), "truncated or damaged")


def test_a_wrong_checksum_is_noticed(tmp_path, small_batches):
    data = bytearray(tar(image_folders(), "w:gz"))
    data[-5] ^= 1
    (tmp_path / "c.tgz").write_bytes(data)
    assert_one_line(tmp_path, lambda out: prepare_cifar10(out, tmp_path / "c.tgz"), "damaged: CRC check failed")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(5000), b"words\n" * 500])
def test_a_file_that_is_no_archive_is_one_line(tmp_path, small_batches, content):
    (tmp_path / "file").write_bytes(content)
    assert_one_line(tmp_path, lambda out: prepare_cifar10(out, tmp_path / "file"), "file: not a tar archive")


def test_missing_and_unreadable_sources_are_one_line(tmp_path, small_batches):
    assert_one_line(tmp_path, lambda out: prepare_cifar10(out, tmp_path / "no"), "--source .*no: No such file")
    source = write_tree(tmp_path / "source", image_folders())
    (source / "val/cat/9.jpg").symlink_to("gone")
    assert_one_line(tmp_path, lambda out: prepare_cifar10(out, source), "val/cat/9.jpg: cannot be read.*No such file")
    assert_one_line(tmp_path, lambda out: prepare_cifar10(out, Path("/dev/null")), "neither a folder nor a file")


def test_cifar10_is_downloaded_by_default(tmp_path, small_batches, monkeypatch):
    def download(url, root, filename, md5):
        assert (filename, len(md5)) == ("cifar-10-python.tar.gz", 32)
        (root / filename).write_bytes(tar(python_version(), "w:gz"))

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download)
    assert "100 in train/" in prepare_cifar10(tmp_path / "out")

    def offline(*_):
        raise OSError("<urlopen error>\nmore")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", offline)
    message = r"could not be downloaded \(<urlopen error>\): download https://.*cifar-10-python.tar.gz .*--source"
    assert_one_line(tmp_path, lambda out: prepare_cifar10(out.with_name("other")), message)


def test_a_full_disk_leaves_nothing(tmp_path):
    """No file may have more than 1500 bytes."""
    members = image_folders()
    members["val/truck/0000.jpg"] = bytes(2000)
    source = tmp_path / "c.tar"
    source.write_bytes(tar(members))
    code = """
import resource, signal, sys
from fastbyol.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
sys.exit(main(sys.argv[1:]))
"""
    words = ["prepare", "cifar10", "--source", str(source), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.stderr == f"fastbyol: error: --out {tmp_path / 'out'}: File too large; nothing was kept\n"
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [source])


# --- Imagenette ---


def imagenette(prefix=""):
    return {
        f"{prefix}{split}/{label}/{label}_{k}.JPEG": jpeg(k)
        for k_split, split in enumerate(("train", "val"))
        for label, counts in image_sets.IMAGENETTE_COUNTS.items()
        for k in range(counts[k_split])
    }


@pytest.fixture
def small_imagenette(monkeypatch):
    counts = dict.fromkeys(image_sets.IMAGENETTE_COUNTS, (3, 2))
    monkeypatch.setattr(image_sets, "IMAGENETTE_COUNTS", counts)


def test_imagenette_has_the_published_numbers():
    assert tuple(map(sum, zip(*image_sets.IMAGENETTE_COUNTS.values(), strict=True))) == (9469, 3925)


def test_imagenette(tmp_path, small_imagenette, caplog):
    members = imagenette("imagenette2-160/")
    (tmp_path / "i.tgz").write_bytes(tar({**members, "imagenette2-160/noisy_imagenette.csv": b"path"}, "w:gz"))
    text = prepare_imagenette(tmp_path / "packed", tmp_path / "i.tgz")
    assert text == f"Imagenette in {tmp_path / 'packed'}: 30 in train/, 20 in val/"
    source = write_tree(tmp_path / "folder", members)
    assert prepare_imagenette(tmp_path / "linked", source / "imagenette2-160").endswith("(50 hard-linked)")
    assert tree(tmp_path / "packed") == tree(tmp_path / "linked") == imagenette()
    assert caplog.text == ""


def test_an_incomplete_imagenette(tmp_path, small_imagenette, caplog):
    """A missing image is a warning, a missing class or split an error, as is another set."""
    source = write_tree(tmp_path / "source", without(imagenette(), "val/n03417042/n03417042_1"))
    prepare_imagenette(tmp_path / "out", source)
    assert "val/n03417042 has 1 images instead of 2" in caplog.text
    for members, message in (
        (without(imagenette(), "val/n03417042"), "no images of val/n03417042: it is incomplete"),
        (without(imagenette(), "train/"), "no images of train/n01440764, "),
        ({"train/n02093754/1.JPEG": b""}, "n02093754 is no class of Imagenette"),
        ({"x/a.JPEG": b""}, "holds no images train/CLASS"),
    ):
        archive = tmp_path / "bad.tar"
        archive.write_bytes(tar(members))
        assert_one_line(tmp_path, lambda out: prepare_imagenette(out.with_name("other"), archive), message)  # noqa: B023


# --- ImageNet ---

WNIDS = ["n01440764", "n01443537", "n02869837", "n04522168"]
CLASS_OF_VAL = [WNIDS[k] for k in (2, 0, 3, 1, 1, 2, 0, 3)]  # of the images 1 to 8
IDS = {"n02869837": 1, "n01440764": 2, "n04522168": 3, "n01443537": 4}  # ILSVRC2012_ID, an order of its own


@pytest.fixture
def small_imagenet(monkeypatch):
    monkeypatch.setattr(imagenet, "imagenet_wnids", lambda: WNIDS)
    monkeypatch.setattr(imagenet, "TRAIN_IMAGES", 12)
    monkeypatch.setattr(imagenet, "VAL_IMAGES", 8)


def train_images(wnid):
    return {f"{wnid}_{k}.JPEG": jpeg(20 * WNIDS.index(wnid) + k) for k in (7, 12, 10026)}


def val_images():
    return {f"ILSVRC2012_val_{k:08d}.JPEG": jpeg(k + 100) for k in range(1, 9)}


def devkit(ids=IDS, truth=None):
    """Return the kit's files. meta.mat holds a column of structs, also of WordNet's inner nodes."""
    kinds = [(n, object) for n in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")]
    synsets = np.zeros((len(ids) + 1, 1), dtype=[*kinds, ("wordnet_height", object), ("num_train_images", object)])
    rows = [(float(k), wnid, "w", "g", 0.0, np.zeros((1, 0)), 0.0, 3.0) for wnid, k in ids.items()]
    rows.append((float(len(ids) + 1), "n00001740", "entity", "g", 2.0, np.array([[1.0, 2.0]]), 19.0, 0.0))
    for k, row in enumerate(rows):
        synsets[k, 0] = row
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets}, do_compression=True)
    truth = truth or "".join(f"{IDS[wnid]}\n" for wnid in CLASS_OF_VAL)
    root = "ILSVRC2012_devkit_t12"
    return {
        f"{root}/readme.txt": b"",
        f"{root}/data/meta.mat": buffer.getvalue(),
        f"{root}/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }


def official(folder):
    """Write the three official files."""
    folder.mkdir()
    classes = {f"{wnid}.tar": tar(train_images(wnid)) for wnid in WNIDS}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(val_images()))
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar(devkit(), "w:gz"))
    return folder


def expected_imagenet(splits=("train", "val"), wnids=WNIDS):
    found = {}
    if "train" in splits:
        found |= {f"train/{wnid}/{name}": data for wnid in wnids for name, data in train_images(wnid).items()}
    if "val" in splits:
        named = zip(CLASS_OF_VAL, val_images().items(), strict=True)
        found |= {f"val/{wnid}/{name}": data for wnid, (name, data) in named if wnid in wnids}
    return found


def test_imagenet_from_the_official_files(tmp_path, small_imagenet, caplog):
    source, calls = official(tmp_path / "source"), []
    text = prepare_imagenet(tmp_path / "out", [source], progress=lambda *numbers: calls.append(numbers))
    assert text == f"ImageNet, 4 classes, in {tmp_path / 'out'}: 12 in train/, 8 in val/"
    assert tree(tmp_path / "out") == expected_imagenet()
    assert calls == [(k, 20) for k in range(1, 21)]
    assert caplog.text == ""


def test_imagenet_archives_may_be_anywhere(tmp_path, small_imagenet):
    """Also the kit, as the folder of its unpacked files."""
    source = official(tmp_path / "source")
    write_tree(tmp_path / "kit", devkit())
    (source / "ILSVRC2012_img_val.tar").rename(tmp_path / "v.tar")
    archives = [source / "ILSVRC2012_img_train.tar", tmp_path / "v.tar"]
    prepare_imagenet(tmp_path / "out", archives, devkit=tmp_path / "kit")
    assert tree(tmp_path / "out") == expected_imagenet()


@pytest.mark.parametrize("compression", ["", ":gz"])
def test_imagenet_train_alone(tmp_path, small_imagenet, compression):
    classes = {f"{wnid}.tar": tar(train_images(wnid)) for wnid in WNIDS}
    (tmp_path / "t.tar").write_bytes(tar(classes, f"w{compression}"))
    assert prepare_imagenet(tmp_path / "out", [tmp_path / "t.tar"]).endswith("12 in train/, no val/")
    assert tree(tmp_path / "out") == expected_imagenet(["train"])


def test_imagenet_from_unpacked_folders(tmp_path, small_imagenet):
    """train/ as class folders and val/ flat, as Kaggle has them, with other files around."""
    members = {f"Data/train/{wnid}/{name}": data for wnid in WNIDS for name, data in train_images(wnid).items()}
    members |= {f"Data/val/{name}": data for name, data in val_images().items()}
    members |= {"Data/test/ILSVRC2012_test_00000001.JPEG": b"", "Annotations/val/ILSVRC2012_val_00000001.xml": b""}
    source = write_tree(tmp_path / "source", {**members, **devkit()})
    before = tree(source)
    assert prepare_imagenet(tmp_path / "out", [source]).endswith("12 in train/, 8 in val/ (20 hard-linked)")
    assert tree(tmp_path / "out") == expected_imagenet()
    assert tree(source) == before
    again = prepare_imagenet(tmp_path / "again", [tmp_path / "out"])  # val/ in class folders needs no labels
    assert again.endswith("12 in train/, 8 in val/ (20 hard-linked)")
    assert tree(tmp_path / "again") == expected_imagenet()


def test_imagenet_from_a_folder_of_class_archives(tmp_path, small_imagenet):
    write_tree(tmp_path / "source/train", {f"{wnid}.tar": tar(train_images(wnid)) for wnid in WNIDS})
    prepare_imagenet(tmp_path / "out", [tmp_path / "source"])
    assert tree(tmp_path / "out") == expected_imagenet(["train"])


LISTS = {
    "wnid": lambda k, name, wnid: f"{name} {wnid}",
    "index": lambda k, name, wnid: f"{name} {WNIDS.index(wnid)}",
    "tabs": lambda k, name, wnid: f"val/{wnid}/{name}\t{wnid}",
    "commas": lambda k, name, wnid: f"{name}, {WNIDS.index(wnid)}",
    "kaggle": lambda k, name, wnid: f"{name[:-5]},{wnid} 85 1 499 272 {wnid} 131 0 499 254 ",
    "quoted": lambda k, name, wnid: f'"{name}","{wnid}"',
}


@pytest.mark.parametrize("form", LISTS)
def test_imagenet_labels_from_a_list(tmp_path, small_imagenet, form):
    source = official(tmp_path / "source")
    (source / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"not needed")
    lines = ["ImageId,PredictionString"] if form == "kaggle" else ["# by hand", ""]
    lines += [LISTS[form](k, name, wnid) for k, (name, wnid) in enumerate(zip(val_images(), CLASS_OF_VAL, strict=True))]
    (tmp_path / "val.txt").write_text("\r\n".join(lines))
    prepare_imagenet(tmp_path / "out", [source], val_list=tmp_path / "val.txt")
    assert tree(tmp_path / "out") == expected_imagenet()


def test_imagenet_classes(tmp_path, small_imagenet, caplog):
    """Only those are read: the archives of others may be damaged."""
    source = official(tmp_path / "source")
    classes = {f"{wnid}.tar": tar(train_images(wnid)) if wnid in WNIDS[1:3] else b"damaged" for wnid in WNIDS}
    (source / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    (tmp_path / "two.txt").write_text(f"# mine\n{WNIDS[2]}\n\n{WNIDS[1]}\n")
    text = prepare_imagenet(tmp_path / "out", [source], classes=str(tmp_path / "two.txt"))
    assert text.startswith("ImageNet, 2 classes")
    assert tree(tmp_path / "out") == expected_imagenet(wnids=WNIDS[1:3])
    assert caplog.text == ""


def test_imagenet100_is_the_published_list():
    names = list(read_class_list("imagenet100").values())
    assert len(set(names)) == 100
    assert set(names) < set(imagenet.imagenet_wnids())
    digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
    assert digest == "d61d354b64beb3ce2c2c9cf04a874298362dc9fcd589e15ee34c5e4592145746"


def test_imagenet100(tmp_path):
    wnids = read_class_list("imagenet100").values()
    other = "n01440764"
    assert other not in wnids
    members = {f"train/{wnid}/{wnid}_1.JPEG": jpeg(k) for k, wnid in enumerate([*wnids, other])}
    source = write_tree(tmp_path / "source", members)
    assert "100 classes" in prepare_imagenet(tmp_path / "out", [source], classes="imagenet100")
    assert open_split(tmp_path / "out", "train").classes == sorted(wnids)
    config = DataConfig(root=str(source), classes=["imagenet100"])
    assert find_images(config, "train").classes == sorted(wnids)


def test_imagenet_wnids_are_the_sorted_1000():
    wnids = imagenet.imagenet_wnids()
    assert (len(wnids), wnids == sorted(wnids), wnids[0], wnids[-1]) == (1000, True, "n01440764", "n15075141")
    assert set(image_sets.IMAGENETTE_COUNTS) < set(wnids)


def test_other_numbers_of_imagenet_are_a_warning(tmp_path, small_imagenet, caplog):
    members = expected_imagenet()
    members = without(members, f"{WNIDS[1]}_7.JPEG", "val_00000003")
    source = write_tree(tmp_path / "source", members)
    prepare_imagenet(tmp_path / "plain", [source])
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"--source {source}: {n} instead of {m}" for n, m in (("11 train images", 12), ("7 val images", 8))
    ]
    caplog.clear()
    kit = write_tree(tmp_path / "kit", devkit())
    shutil.rmtree(source / "val")
    prepare_imagenet(tmp_path / "counted", [source], devkit=kit)
    assert [record.getMessage() for record in caplog.records] == [
        f"--source {source}: train/{WNIDS[1]} has 2 images instead of 3"
    ]


def bad_list(text):
    return lambda folder: {"val_list": write_tree(folder, {"l.txt": text.encode()}) / "l.txt"}


def bad_kit(members):
    return lambda folder: {"devkit": write_tree(folder / "kit", members())}


def bad_classes(text):
    return lambda folder: {"classes": str(write_tree(folder, {"c.txt": text.encode()}) / "c.txt")}


def replace_train(change):
    def replace(folder):
        path = folder / "source" / "ILSVRC2012_img_train.tar"
        path.write_bytes(change({f"{wnid}.tar": tar(train_images(wnid)) for wnid in WNIDS}))
        return {}

    return replace


def replace_val(change):
    def replace(folder):
        (folder / "source" / "ILSVRC2012_img_val.tar").write_bytes(change(val_images()))
        return {}

    return replace


def remove_kit(folder):
    (folder / "source" / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    return {}


def add_unpacked(folder):
    write_tree(folder / "source", {f"train/{WNIDS[0]}/{WNIDS[0]}_7.JPEG": b"x"})
    return {}


def wrong_folder(folder):
    write_tree(folder / "flat", {f"{WNIDS[0]}/ILSVRC2012_val_00000001.JPEG": b"x"})
    kit = folder / "source" / "ILSVRC2012_devkit_t12.tar.gz"
    return {"source": [folder / "flat"], "devkit": kit}


GOOD = [f"{name} {wnid}" for name, wnid in zip(val_images(), CLASS_OF_VAL, strict=True)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_kit, "val_00000001.JPEG: validation images need their classes: add --devkit"),
        (
            bad_list("\n".join([*GOOD[:3], "x.jpg n01440764", *GOOD[3:], "a", "ILSVRC2012_val_00000001.JPEG 4"])),
            "l.txt: lines 4, 10, 11: expected a name",
        ),
        (bad_list("\n".join([*GOOD, "ILSVRC2012_val_00000001.JPEG n00000000"])), "line 9: expected a name like"),
        (
            bad_list("\n".join([*GOOD, f"ILSVRC2012_val_00000001.JPEG {WNIDS[0]}"])),
            "line 9: .*is listed before, with class n02869837",
        ),
        (bad_list("\n".join(GOOD[:-1])), "val_00000008.JPEG: has no class in --val-list"),
        (
            bad_list("\n".join([*GOOD, f"ILSVRC2012_val_00000009.JPEG {WNIDS[0]}"])),
            "1 of 9 validation images are missing: ILSVRC2012_val_00000009",
        ),
        (bad_list("# none\n"), "lists no images"),
        (bad_list("a\0b"), "l.txt: not a text file"),
        (lambda folder: {"val_list": folder / "no.txt"}, "--val-list .*no.txt: No such file"),
        (lambda folder: {"devkit": folder / "no"}, "--devkit .*no: No such file"),
        (lambda folder: {"devkit": folder, "val_list": folder}, "give only one of them"),
        (bad_kit(lambda: without(devkit(), "meta")), "there is no meta.mat in it"),
        (bad_kit(lambda: without(devkit(), "truth")), "there is no ILSVRC2012_validation_ground_truth.txt in it"),
        (bad_kit(lambda: changed(devkit(), "meta", lambda data: data[:300])), "meta.mat cannot be read: "),
        (bad_kit(lambda: changed(devkit(), "meta", lambda data: b"?" * 500)), "meta.mat cannot be read: "),
        (bad_kit(lambda: devkit(ids={"n01440764": 1})), "meta.mat lists 1 classes, which are not ImageNet's 4"),
        (
            bad_kit(lambda: devkit(truth="1\n2\nx\n5\n1\n1\n1\n1\n")),
            "ground_truth.txt: lines 3, 4: expected a number from 1 to 4",
        ),
        (bad_kit(lambda: devkit(truth="1\n2\n")), "ground_truth.txt has 2 lines instead of 8: truncated"),
        (bad_classes("n01440764\nn00000000\n\ncat"), "--classes .*c.txt: lines 2, 4: expected one wnid of ImageNet"),
        (bad_classes("n01440764\nn01440764"), "names a class twice"),
        (bad_classes("#\n"), "names no class"),
        (lambda folder: {"classes": "imagenet10"}, "--classes imagenet10: No such file"),
        (replace_train(lambda classes: tar(classes)[:5000]), "train.tar.*truncated or damaged"),
        (
            replace_train(lambda classes: tar({**classes, f"{WNIDS[2]}.tar": tar(train_images(WNIDS[2]))[:1500]})),
            f"{WNIDS[2]}.tar: .*truncated or damaged",
        ),
        (
            replace_train(lambda classes: tar(without(classes, WNIDS[1]))),
            f"no images of train/{WNIDS[1]}; --classes FILE prepares only",
        ),
        (
            replace_train(lambda classes: tar({**classes, "n00000000.tar": tar({})})),
            "n00000000.tar: n00000000 is no class of ImageNet-1k",
        ),
        (
            replace_train(lambda classes: tar({**classes, "n01440764.tar": tar({"n00000000_1.JPEG": b""})})),
            "n00000000 is no class",
        ),
        (
            replace_train(
                lambda classes: tar(
                    {**classes, "n01440764.tar": tar({"": special("n01440764_1.JPEG", tarfile.SYMTYPE, "/etc/passwd")})}
                )
            ),
            "n01440764.tar: .*is a link",
        ),
        (
            replace_train(lambda classes: tar({**classes, "x/n01440764.tar": classes["n01440764.tar"]})),
            "the source has train/n01440764/.*twice",
        ),
        (replace_val(lambda images: tar(images)[:-10240]), "val.tar.*truncated or damaged"),
        (
            replace_val(lambda images: tar(without(images, "03", "05"))),
            "2 of 8 validation images are missing: ILSVRC2012_val_00000003.JPEG, ILSVRC2012_val_00000005.JPEG$",
        ),
        (add_unpacked, "train images are in an archive .* and in a folder .*: name only one"),
        (wrong_folder, "is in the folder of n01440764, but its class is n02869837 by --devkit"),
        (lambda folder: {"source": [write_tree(folder / "e", {"a.txt": b""})]}, "holds no images of ImageNet"),
        (lambda folder: {"source": []}, "--source: must not be empty"),
        (lambda folder: {"source": [folder / "no"]}, "--source .*no: No such file"),
    ],
)
def test_unusable_imagenet_is_one_line(tmp_path, small_imagenet, change, message):
    official(tmp_path / "source")
    arguments = {"source": [tmp_path / "source"], **change(tmp_path)}
    assert_one_line(tmp_path, lambda out: prepare_imagenet(out, **arguments), message)


def test_missing_labels_are_noticed_before_anything_is_written(tmp_path, small_imagenet):
    official(tmp_path / "source")
    remove_kit(tmp_path)
    with pytest.raises(InputError, match="validation images need their classes"):
        prepare_imagenet(
            tmp_path / "out", [tmp_path / "source"], progress=lambda *_: pytest.fail("images were written")
        )


def test_commands_prepare_and_never_overwrite(tmp_path, small_imagenet, small_imagenette, small_batches, capsys):
    source = official(tmp_path / "imagenet")
    (tmp_path / "val.txt").write_text("\n".join(GOOD))
    nette = write_tree(tmp_path / "nette", imagenette())
    (tmp_path / "cifar.tgz").write_bytes(tar(python_version(), "w:gz"))
    for name, words, text in (
        (
            "imagenet",
            [
                "--source",
                f"{source}/ILSVRC2012_img_train.tar,{source}/ILSVRC2012_img_val.tar",
                "--val-list",
                str(tmp_path / "val.txt"),
            ],
            "12 in train/, 8 in val/",
        ),
        ("imagenette", ["--source", str(nette)], "30 in train/"),
        ("cifar10", ["--source", str(tmp_path / "cifar.tgz")], "100 in train/"),
    ):
        words = ["prepare", name, "--out", str(tmp_path / f"out-{name}"), *words]
        assert cli.main(words) == 0
        assert text in capsys.readouterr().out
        before = tree(tmp_path)
        assert cli.main(words) == 2
        assert "not overwritten" in capsys.readouterr().err
        assert tree(tmp_path) == before
