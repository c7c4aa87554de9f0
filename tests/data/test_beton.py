"""Reader and writer of .beton files: round trip, compatibility with ffcv in both directions,
damaged files.
"""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
from helpers.common import jpeg, pixels_of
from helpers.ffcv_files import write_with_ffcv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastbyol.data import beton, open_split
from fastbyol.data import pack as pack_module
from fastbyol.data.beton import BadBeton, open_beton
from fastbyol.data.decode import BadImage, decode
from fastbyol.data.folder import index_folder
from fastbyol.data.pack import AUTO_RAW_BYTES, pack
from fastbyol.errors import InputError


@pytest.fixture
def corpus(folder_of, tmp_path):
    """Two classes of JPEGs, large and small, a PNG, a gray JPEG, one with EXIF orientation, one
    CMYK.
    """
    root = folder_of(
        {f"train/{c}/{i}.jpg": jpeg(10 * k + i, 80, 100 + i) for k, c in enumerate("ab") for i in range(4)}
    )
    Image.fromarray(pixels_of(50)).save(root / "train/a/small.png")
    Image.fromarray(pixels_of(51, 90, 120)).save(root / "train/b/large.png")
    (root / "train/b/gray.jpg").write_bytes(
        simplejpeg.encode_jpeg(np.ascontiguousarray(pixels_of(52, 90, 99)[..., :1]), colorspace="GRAY", quality=90)
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels_of(53, 80, 96)).save(root / "train/a/turned.jpg", exif=exif, quality=95)
    Image.fromarray(pixels_of(54, 80, 96)).convert("CMYK").save(root / "train/b/print.jpg", quality=95)
    return root / "train"


def write(folder, out, **options):
    images = index_folder(folder)
    return images, pack(images, out, **options), open_beton(out)


def test_jpegs_are_copied_and_other_images_are_converted(corpus, tmp_path):
    images, text, found = write(corpus, tmp_path / "x.beton", mode="jpg")
    assert "13 images (13 JPEG, 0 raw)" in text
    assert found.labels.tolist() == images.labels.tolist()
    assert found.classes == images.classes == ["a", "b"]
    for i in range(len(images)):
        name, stored = images.name(i), found.read(i)
        if name.endswith(("turned.jpg", "print.jpg", ".png")):
            difference = decode(stored).astype(int) - decode(images.read(i))
            assert np.abs(difference).mean() < 10, name  # coarse colors at quality 90; another image differs by 80
        else:
            assert stored == images.read(i), name
    assert found.shapes[images.paths.index("a/turned.jpg")].tolist() == [96, 80]


def test_raw_mode_stores_the_decoded_pixels(corpus, tmp_path):
    images, text, found = write(corpus, tmp_path / "x.beton", mode="raw")
    assert "(0 JPEG, 13 raw)" in text
    for i in range(len(images)):
        stored = found.read(i)
        assert stored.flags.c_contiguous
        assert stored.flags.writeable
        assert np.array_equal(stored, decode(images.read(i)))


def test_auto_mode_stores_small_images_raw(corpus, tmp_path):
    images, _, found = write(corpus, tmp_path / "x.beton")
    for i in range(len(images)):
        expected = beton.RAW if decode(images.read(i)).nbytes <= AUTO_RAW_BYTES else beton.JPEG
        assert found.modes[i] == expected, images.name(i)
    assert set(found.modes.tolist()) == {beton.RAW, beton.JPEG}


def test_max_side_reduces_only_larger_images(corpus, tmp_path):
    images, _, found = write(corpus, tmp_path / "x.beton", mode="jpg", max_side=100)
    for i in range(len(images)):
        before, after = decode(images.read(i)).shape[:2], decode(found.read(i)).shape[:2]
        assert max(after) == min(max(before), 100)
        assert after == tuple(found.shapes[i])
        if max(before) <= 100 and images.name(i)[2:].startswith(tuple("0123")):
            assert found.read(i) == images.read(i)


def test_quality_of_new_jpegs(corpus, tmp_path):
    sizes = [
        write(corpus, tmp_path / f"{q}.beton", mode="jpg", max_side=64, quality=q)[2].sizes.sum() for q in (30, 95)
    ]
    assert sizes[0] < 0.6 * sizes[1]


def test_pages_grow_to_fit_the_largest_image(folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "PAGE_SIZE", 1 << 12)
    root = folder_of({f"{i}.jpg": jpeg(i, 20 + 10 * i, 30) for i in range(8)})
    _, _, found = write(root, tmp_path / "x.beton", mode="raw")
    page = int(np.fromfile(tmp_path / "x.beton", beton.HEADER, 1)["page_size"][0])
    assert page == 1 << 13
    assert (found.starts // page == (found.starts + found.sizes - 1) // page).all()
    assert all(np.array_equal(found.read(i), pixels_of(i, 20 + 10 * i, 30)) for i in range(8))


def test_a_flat_folder_has_no_label_field(folder_of, tmp_path):
    _, _, found = write(folder_of({f"{i}.jpg": jpeg(i) for i in range(3)}), tmp_path / "x.beton")
    assert found.fields == ("image",)
    assert found.labels.tolist() == [-1] * 3
    assert found.classes == []


def test_a_beton_file_can_be_packed_again(corpus, tmp_path):
    write(corpus, tmp_path / "raw.beton", mode="raw")
    first = open_beton(tmp_path / "raw.beton")
    pack(first, tmp_path / "again.beton", mode="raw")
    assert (tmp_path / "again.beton").read_bytes() == (tmp_path / "raw.beton").read_bytes()


def test_a_subset_keeps_sample_numbers(corpus, tmp_path):
    _, _, found = write(corpus, tmp_path / "x.beton", mode="jpg")
    part = found.subset(np.array([7, 2]))
    assert [part.read(0), part.read(1)] == [found.read(7), found.read(2)]
    assert part.location(0) == f"{tmp_path / 'x.beton'}, sample 7"


def test_bad_images_raise_input_error_or_are_skipped(folder_of, tmp_path):
    root = folder_of({f"a/{i}.jpg": jpeg(i) for i in range(4)} | {"a/9.jpg": b"words", "a/5.jpg": jpeg(5)[:-300]})
    with pytest.raises(InputError, match=r"a/5.jpg: .*truncated.*--skip.bad"):
        pack(index_folder(root), tmp_path / "x.beton")
    assert not list(tmp_path.glob("*.beton")) + list(tmp_path.glob(".x*"))
    text = pack(index_folder(root), tmp_path / "x.beton", skip_bad=True)
    assert "4 images" in text
    assert "2 left out, the first:" in text
    assert len(open_beton(tmp_path / "x.beton")) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_side": 0}, "--max-side 0: must be at least 1"),
        ({"quality": 0}, r"--quality 0: must lie in 1..100"),
    ],
)
def test_invalid_options(corpus, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        pack(index_folder(corpus), tmp_path / "x.beton", **options)


def test_no_overwrite_and_no_partial_file_after_an_interrupt(corpus, tmp_path):
    out = tmp_path / "x.beton"
    out.write_text("mine")
    with pytest.raises(InputError, match="exists; it is not overwritten"):
        pack(index_folder(corpus), out)
    out.unlink()

    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(index_folder(corpus), out, progress=interrupt)
    assert not list(tmp_path.glob("*.beton")) + list(tmp_path.glob(".x*"))


def test_truncation_while_reading_raises_os_error(corpus, tmp_path):
    _, _, found = write(corpus, tmp_path / "x.beton", mode="raw")
    with open(tmp_path / "x.beton", "r+b") as file:
        file.truncate(int(found.starts[3]) + 100)
    assert found.read(0).size
    with pytest.raises(OSError, match="the file ends at byte"):
        found.read(3)


# --- damaged files ---


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A small file with every part: JPEG and raw images, labels, class names; pages of 4 KB."""
    folder = tmp_path_factory.mktemp("betons")
    for c in "ab":
        (folder / "train" / c).mkdir(parents=True)
        for i in range(3):
            (folder / "train" / c / f"{i}.jpg").write_bytes(jpeg(i, 16 + 60 * (i == 2), 20 + 70 * (i == 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_module, "PAGE_SIZE", 1 << 12)
        pack(index_folder(folder / "train"), folder / "x.beton")
    data = (folder / "x.beton").read_bytes()
    found = open_beton(folder / "x.beton")
    return data, [found.read(i) for i in range(len(found))], found.labels.tolist(), folder


def check(data, intact, case):
    """Opening raises BadBeton with the file's name, or every image is readable or raises BadImage
    or OSError.
    """
    _, images, _, folder = intact
    path = folder / "damaged.beton"
    path.write_bytes(data)
    try:
        found = open_beton(path)
    except BadBeton as error:
        assert isinstance(error, ValueError)
        assert str(error).startswith(f"{path}: "), case
        assert "\n" not in str(error)
        return False
    assert len(found) <= len(images)
    for i in range(len(found)):
        assert 0 <= found.starts[i]
        assert found.starts[i] + found.sizes[i] <= len(data), case
        try:
            pixels = decode(found.read(i))
        except (BadImage, OSError):
            continue
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
    return True


def test_the_intact_file_opens(intact):
    assert check(intact[0], intact, "intact")


def test_truncation_at_every_boundary(intact):
    data = intact[0]
    table = struct.unpack("<Q", data[16:24])[0]
    boundaries = {0, 1, 23, 24, 25, 24 + 1041, 24 + 2 * 1041, *range(24 + 2 * 1041, 24 + 2 * 1041 + 7 * 24, 8)}
    boundaries |= set(range(table - 40, len(data))) | set(range(4096, table, 1024))
    for length in sorted(boundaries):
        opened = check(data[:length], intact, f"cut at {length}")
        # A table cut between two entries is detected by its missing images.
        assert not opened, f"a file cut to {length} of {len(data)} bytes was accepted"


def test_every_byte_of_header_rows_and_table_flipped(intact):
    data = intact[0]
    table = struct.unpack("<Q", data[16:24])[0]
    rows = 24 + 2 * 1041
    offsets = [
        *range(24),
        24,
        *range(25, 41),
        24 + 1041,
        *range(24 + 1042, 24 + 1042 + 60),
        *range(rows, rows + 6 * 24),
    ]
    offsets += range(table - 20, len(data))
    for offset in offsets:
        for flip in (0x01, 0x80, 0xFF):
            check(
                data[:offset] + bytes([data[offset] ^ flip]) + data[offset + 1 :], intact, f"byte {offset} ^ {flip:#x}"
            )


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_random_bytes_in_parsed_parts(intact, draws):
    data = bytearray(intact[0])
    table = struct.unpack("<Q", bytes(data[16:24]))[0]
    for _ in range(draws.draw(st.integers(1, 3))):
        start, stop = draws.draw(
            st.sampled_from([(0, 24), (24, 90), (24 + 2 * 1041, 24 + 2 * 1041 + 144), (table - 20, len(data))])
        )
        offset = draws.draw(st.integers(start, stop - 1))
        values = draws.draw(
            st.one_of(
                st.binary(min_size=1, max_size=9),
                st.sampled_from(
                    [struct.pack("<Q", v) for v in (0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, table)]
                ),
            )
        )
        data[offset : offset + len(values)] = values[: len(data) - offset]
    check(bytes(data), intact, "overwritten")


@given(st.binary(max_size=4000))
@settings(max_examples=100, deadline=None)
def test_random_files(intact, data):
    check(data, intact, "random")


def rewritten(intact, tmp_path, change):
    """Copy the file and apply `change` to its header, descriptors, rows and table."""
    data = bytearray(intact[0])
    header = np.frombuffer(data, beton.HEADER, 1)
    n, table = int(header["samples"][0]), int(header["table"][0])
    row = np.dtype([("", beton.IMAGE), ("", "<i8")], align=True)
    parts = {
        "header": header,
        "descriptors": np.frombuffer(data, beton.DESCRIPTOR, 2, 24),
        "rows": np.frombuffer(data, row, n, 24 + 2 * 1041),
        "table": np.frombuffer(data, beton.TABLE, -1, table),
    }
    change(**parts)
    (tmp_path / "changed.beton").write_bytes(data)
    return tmp_path / "changed.beton"


def put(array, field, value, index=0):
    array[field][index] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, **_: put(header, "version", 1), "version 1, only 2 is known"),
        (lambda header, **_: put(header, "fields", 0), "it has no fields"),
        (lambda header, **_: put(header, "fields", 60_000), "field descriptors would need"),
        (lambda header, **_: put(header, "page_size", 3000), "page size 3000 is no power of two"),
        (lambda header, **_: put(header, "samples", 0), "it has no samples"),
        (lambda header, **_: put(header, "samples", 2**63), "rows would need"),
        (lambda header, **_: put(header, "table", 2**64 - 24), "the allocation table cannot start at byte"),
        (lambda header, **_: put(header, "table", header["table"][0] + 1), "the allocation table cannot start at byte"),
        (
            lambda descriptors, **_: put(descriptors, "type", 255),
            "field 'image' has type 255, whose layout is not known",
        ),
        (lambda descriptors, **_: put(descriptors, "type", 0), "no image field among 'image', 'label'"),
        (lambda rows, **_: put(rows["f0"], "mode", 2, 3), "sample 3 is neither JPEG"),
        (lambda rows, **_: put(rows["f0"], "width", 0, 2), "sample 2 has no pixels"),
        (lambda rows, **_: put(rows["f0"], "width", 21, 1), "sample 1: raw, but width, height and bytes disagree"),
        (
            lambda rows, **_: put(rows["f0"], "start", 2**64 - 1, 1),
            "sample 1: the allocation table does not hold its image",
        ),
        (
            lambda rows, **_: put(rows["f0"], "start", rows["f0"]["start"][0], 1),
            "sample 1: the allocation table does not",
        ),
        (lambda rows, **_: put(rows, "f1", -2, 4), "sample 4: its label is not in 0"),
        (lambda rows, **_: put(rows, "f1", 10**15, 4), "sample 4: its label is not in 0"),
        (lambda rows, **_: put(rows, "f1", 2, 4), "its class names are damaged"),
        (lambda table, **_: put(table, "start", 8), "allocation 0 starts before the pages"),
        (lambda table, **_: put(table, "start", 2**64 - 1), "allocation 5 starts after the pages"),
        (lambda table, **_: put(table, "size", 2**64 - 1), "allocation 0 ends after the pages"),
        (lambda table, **_: put(table, "size", table["size"][0] + 1), "allocation 0 overlaps the next"),
        (lambda table, **_: put(table, "sample", 5), "sample 0: the allocation table does not hold its image"),
    ],
)
def test_error_messages_of_damaged_files(intact, tmp_path, change, message):
    path = rewritten(intact, tmp_path, change)
    with pytest.raises(BadBeton, match=message) as caught:
        open_beton(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_class_names_that_are_not_json(intact, tmp_path):
    data = bytearray(intact[0])
    offset = data.index(b'["a", "b"]')
    for damage in (b'["a", 5  ]', b'{"a": "b"}', b'["a", "b" ', b"[" * 10, b'["\xff", ""]'):
        data[offset : offset + 10] = damage.ljust(10)
        (tmp_path / "x.beton").write_bytes(data)
        with pytest.raises(BadBeton, match="its class names are damaged"):
            open_beton(tmp_path / "x.beton")


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(BadBeton, match="No such file"):
        open_beton(tmp_path / "x.beton")
    (tmp_path / "folder.beton").mkdir()
    with pytest.raises(BadBeton, match="Is a directory"):
        open_beton(tmp_path / "folder.beton")


# --- files as splits ---


def test_a_split_is_a_folder_or_a_beton_file(corpus, tmp_path):
    root = corpus.parent
    pack(index_folder(corpus), root / "train.beton", mode="jpg")
    (root / "val.beton").write_bytes((root / "train.beton").read_bytes())
    assert open_split(root, "train").root == root / "train"
    assert open_split(root, "train.beton").root == root / "train.beton"
    assert open_split(root, "val").root == root / "val.beton"
    with pytest.raises(InputError, match=r"there is no folder .*test or file .*test.beton"):
        open_split(root, "test")
    with pytest.raises(InputError, match=r"there is no folder .*test.beton; there is train, train.beton, val.beton$"):
        open_split(root, "test.beton")


# --- compatibility with ffcv ---


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jpg", "raw", "proportion", "smart"])
def test_reading_files_written_by_ffcv(mode, tmp_path):
    path = tmp_path / "ffcv.beton"
    write_with_ffcv(path, mode)
    found = open_beton(path)
    assert len(found) == 30
    assert found.fields[0] == "photo"
    assert found.labels.tolist() == [i % 5 for i in range(30)]
    assert found.classes == list("01234")
    modes = {"jpg": {0}, "raw": {1}}.get(mode, {0, 1})
    assert set(found.modes.tolist()) == modes
    for i in range(30):
        expected, stored = pixels_of(i, 30 + i, 64 + 3 * i), found.read(i)
        if found.modes[i] == beton.RAW:
            assert np.array_equal(stored, expected)
        else:
            assert np.abs(decode(stored).astype(int) - expected).mean() < 10


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jpg", "raw", "auto"])
def test_ffcv_reads_our_files(mode, folder_of, tmp_path):
    height, width = (60, 50) if mode == "auto" else (80, 100)
    root = folder_of({f"{c}/{i}.jpg": jpeg(10 * k + i, height, width) for k, c in enumerate("abc") for i in range(4)})
    gray = np.ascontiguousarray(pixels_of(77, height, width)[..., :1])
    (root / "c/9.jpg").write_bytes(simplejpeg.encode_jpeg(gray, colorspace="GRAY"))
    images, _, found = write(root, tmp_path / "x.beton", mode=mode)
    # In a separate process, since FFCV changes numba's types and torch's number of threads
    # globally.
    command = [sys.executable, "-c", FFCV_READS, str(tmp_path / "x.beton"), str(tmp_path / "read.npz")]
    subprocess.run(command, check=True)
    read = np.load(tmp_path / "read.npz")
    for manager in ("os_cache", "process_cache"):
        assert read[f"{manager}_labels"].tolist() == images.labels.tolist()
        for i in range(13):
            difference = np.abs(read[f"{manager}_pixels"][i].astype(int) - decode(found.read(i)))
            # FFCV uses the fast inverse DCT, which differs by up to 15 at these images' hard edges.
            assert difference.max() <= (0 if found.modes[i] == beton.RAW else 20)
            assert difference.mean() < 2


FFCV_READS = """
import sys
import numpy as np
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader

assert Reader(sys.argv[1]).num_samples == 13
found = {}
for name in ("os_cache", "process_cache"):
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    loader = Loader(
        sys.argv[1], 13, num_workers=1, os_cache=name == "os_cache", pipelines=pipelines, order=OrderOption.SEQUENTIAL
    )
    ((pixels, labels),) = list(loader)
    found[f"{name}_pixels"], found[f"{name}_labels"] = np.array(pixels), np.array(labels)[:, 0]
np.savez(sys.argv[2], **found)
"""


def test_the_header_is_written_last(corpus, tmp_path, monkeypatch):
    """A process killed while writing leaves a hidden file without a valid header."""
    seen = []
    monkeypatch.setattr(os, "replace", lambda a, b: seen.append((a, b)))
    monkeypatch.setattr(pack_module._Writer, "finish", lambda self: self._file.flush() or 0)
    monkeypatch.setattr(pack_module.Path, "unlink", lambda self, missing_ok=False: None)
    pack(index_folder(corpus), tmp_path / "x.beton")
    partial = seen[0][0]
    assert partial.name.startswith(".") and partial.suffix == ".partial"
    with pytest.raises(BadBeton, match="version 0"):
        open_beton(partial)


def test_class_names_survive_as_json(corpus, tmp_path):
    write(corpus, tmp_path / "x.beton")
    data = (tmp_path / "x.beton").read_bytes()
    assert json.dumps(["a", "b"]).encode() in data
