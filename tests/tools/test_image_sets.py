"""`fastbyol prepare cifar10` and `prepare imagenette`, and how their sources are read."""

import errno
import os
import pickle
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from helpers.archives import assert_command, assert_one_line, changed, jpeg, special, tar, tree, without, write_tree

from fastbyol.data import open_split
from fastbyol.data.decode import decode
from fastbyol.tools import image_sets
from fastbyol.tools.image_sets import prepare_cifar10, prepare_imagenette

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


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/fastbyol-was-here",)


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


def test_commands_prepare_and_never_overwrite(tmp_path, small_imagenette, small_batches, capsys):
    nette = write_tree(tmp_path / "nette", imagenette())
    (tmp_path / "cifar.tgz").write_bytes(tar(python_version(), "w:gz"))
    assert_command(tmp_path, capsys, "imagenette", ["--source", str(nette)], "30 in train/")
    assert_command(tmp_path, capsys, "cifar10", ["--source", str(tmp_path / "cifar.tgz")], "100 in train/")
