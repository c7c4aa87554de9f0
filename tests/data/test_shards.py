"""Tar shards, Parquet files, lists and arrays: the same images as a folder's, from every layout."""

import gzip
import itertools
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.image_sets import CLASSES, contents, write_folder, write_parquet, write_shards, write_tar

from fastbyol.config import DataConfig
from fastbyol.data import build_loader, find_images, open_split, shards
from fastbyol.data.beton import BetonFile
from fastbyol.data.objects import open_npz
from fastbyol.data.pack import pack
from fastbyol.data.parquet import open_parquet
from fastbyol.data.storage import expand_braces, open_local
from fastbyol.errors import InputError

IMAGES = contents(48)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_list(path, separator=",", header=True):
    write_folder(path.parent / "files", IMAGES)
    lines = [separator.join((f"files/{label}/{name}.jpg", label)) for name, _, label in IMAGES]
    path.write_text("\n".join(["image" + separator + "label"] * header + lines) + "\n")


LAYOUTS = {  # name -> writes the layout, and the data.root of it; whether classes have names
    "pattern": (lambda root: write_shards(f"{root}/t-%04d.tar", IMAGES, 3), "t-{0000..0002}.tar", False),
    "wildcard": (lambda root: write_shards(f"{root}/t-%04d.tar", IMAGES, 3), "t-*.tar", False),
    "beside": (lambda root: write_shards(f"{root}/train-%04d.tar", IMAGES, 2), "", False),
    "below": (lambda root: write_shards(f"{root}/train/%d.tar", IMAGES, 2), "", False),
    "one tar": (lambda root: write_shards(f"{root}/train%.0s.tar", IMAGES, 1), "", False),
    "flat shards": (lambda root: write_shards(f"{root}/%05d.tar", IMAGES, 2), "", False),
    "json": (lambda root: write_shards(f"{root}/train-%d.tar", IMAGES, 2, label="json"), "", False),
    "names": (lambda root: write_shards(f"{root}/train-%d.tar", IMAGES, 2, label="name"), "", True),
    "folders": (lambda root: write_shards(f"{root}/train-%d.tar", IMAGES, 2, label="folder"), "", True),
    "parquet": (lambda root: write_parquet(root / "train.parquet", IMAGES), "", True),
    "hub": (lambda root: write_hub(root), "", True),
    "snappy": (lambda root: write_parquet(root / "train.parquet", IMAGES, compression="snappy"), "", True),
    "csv": (lambda root: write_list(root / "train.csv"), "", True),
    "tsv": (lambda root: write_list(root / "train.tsv", "\t", header=False), "train.tsv", True),
}


def write_hub(root):
    for k, part in enumerate((IMAGES[:20], IMAGES[20:])):
        write_parquet(root / "data" / f"train-0000{k}-of-00002.parquet", part)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_images_of_the_folder(layout, tmp_path):
    """Same bytes, order, labels and batches."""
    root = tmp_path / "set"
    root.mkdir()
    write, name, named = LAYOUTS[layout]
    write(root)
    write_folder(tmp_path / "folder" / "train", IMAGES)
    config = DataConfig(root=str(root / name), batch_size=16, image_size_px=32, threads=2)
    found = find_images(config, "train")
    expected = find_images(DataConfig(root=str(tmp_path / "folder")), "train")
    assert [found.read(k) for k in range(len(found))] == [data for _, data, _ in IMAGES]
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.classes == (list(CLASSES) if named else ["0", "1", "2"])
    assert found.location(5).endswith(found.name(5)) and str(root) in found.location(5)
    for ours, theirs in zip(batches(config, found), batches(config, expected), strict=True):
        assert all(map(torch.equal, ours, theirs))
    halves = [find_images(DataConfig(root=str(r), fraction=0.5), "train") for r in (root / name, tmp_path / "folder")]
    assert len(halves[0]) == 24
    assert [halves[0].read(k) for k in range(24)] == [halves[1].read(k) for k in range(24)]


def batches(config, images):
    loader = build_loader(config, images, seed=0, device=CPU, dtype=torch.float32)
    return [(*(v.clone() for v in b.views), b.labels.clone(), b.indices.clone()) for b in loader.batches(2, 6)]


def test_dali_reads_shards(tmp_path):
    write_shards(f"{tmp_path}/train-%d.tar", IMAGES, 2)
    native = DataConfig(root=str(tmp_path), batch_size=16, image_size_px=32, threads=2)
    ours = batches(native, find_images(native, "train"))
    theirs = batches(DataConfig(**{**vars(native), "backend": "dali"}), find_images(native, "train"))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a[3], b[3]) and (a[0] - b[0]).abs().max() < 0.1


CODECS = ("none", "snappy", "zstd", "gzip", "brotli")


@pytest.mark.parametrize(("codec", "version"), itertools.product(CODECS, ("1.0", "2.0")))
def test_parquet_positions_equal_pyarrow(codec, version, tmp_path):
    """Of every codec, encoding, page size and row group, with missing, empty, equal and repetitive
    images.
    """
    rng = np.random.default_rng(0)
    values = [rng.bytes(int(size)) for size in rng.integers(1, 150_000, 15)]
    values += [data * int(rng.integers(1, 40)) for _, data, _ in IMAGES[:20]]
    values[5], values[7] = values[4], b""
    missing = set(rng.choice(35, 7, replace=False).tolist())
    rows = [None if k in missing else value for k, value in enumerate(values)]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    nested = pa.array([None if row is None else {"bytes": row, "path": None} for row in rows], type=struct)
    labels = pa.array([k % 4 for k in range(35)])
    for column, dictionary, group, page in itertools.product(
        (nested, pa.array(rows, type=pa.binary())), (True, False), (13, 1000), (1 << 20, 1 << 14)
    ):
        path = tmp_path / "x.parquet"
        pq.write_table(
            pa.table({"image": column, "label": labels}),
            path,
            compression=codec,
            use_dictionary=dictionary,
            data_page_version=version,
            row_group_size=group,
            data_page_size=page,
        )
        found = open_parquet("x", open_local([path], "x"))
        present = [k for k in range(35) if k not in missing]
        assert found.labels.tolist() == [k % 4 for k in present]
        for index, k in enumerate(present):
            assert found.read(index) == values[k], (dictionary, group, page, k)


def test_a_read_of_snappy_touches_few_blocks(tmp_path):
    """Not the page, and by no means the row group."""
    rng = np.random.default_rng(0)
    images = [(f"{k:04d}", rng.bytes(30_000), "ant") for k in range(100)]
    write_parquet(tmp_path / "x.parquet", images, compression="snappy", row_group_size=100)
    found = open_parquet("x", open_local([tmp_path / "x.parquet"], "x"))
    stored = found.positions[:, 1]
    assert stored.max() <= 30_000 + 2 * 65_536 + 100
    assert np.median(stored) <= 65_536 + 100
    assert found.read(99) == images[99][1]


def test_the_index_is_cached_until_a_file_changes(tmp_path, monkeypatch):
    write_shards(f"{tmp_path}/train-%d.tar", IMAGES, 2)
    first = open_split(tmp_path, "train")
    passes = []
    monkeypatch.setattr(
        shards, "map_in_order", lambda function, files, threads: passes.append(1) or map(function, files)
    )
    again = open_split(tmp_path, "train")
    assert not passes
    assert (again.names, again.labels.tolist(), again.classes) == (first.names, first.labels.tolist(), first.classes)
    assert again.read(7) == first.read(7) and again.fingerprint() == first.fingerprint()
    write_shards(f"{tmp_path}/train-%d.tar", IMAGES[:40], 2)
    assert len(open_split(tmp_path, "train")) == 40
    assert passes


def test_a_damaged_index_is_rebuilt(tmp_path):
    write_shards(f"{tmp_path}/train-%d.tar", IMAGES, 2)
    open_split(tmp_path, "train")
    (cache,) = (tmp_path / "cache" / "fastbyol").glob("shards-*.npz")
    for content in (b"", b"PK\3\4 no zip", cache.read_bytes()[:-30]):
        cache.write_bytes(content)
        assert len(open_split(tmp_path, "train")) == 48


def test_the_image_of_a_sample_is_chosen_by_its_extension(tmp_path):
    a, b, c = (data for _, data, _ in IMAGES[:3])
    members = [("x/1.seg.png", b"mask"), ("x/1.jpg", a), ("x/1.cls", b" 2 "), ("x/.hidden.jpg", b"no")]
    members += [("x/2.JPEG", b), ("x/2.txt", b"a bee"), ("x/3.json", b"[]"), ("x/3.jpg", c), ("x/4.cls", b"1")]
    write_tar(tmp_path / "train.tar", members)
    found = open_split(tmp_path, "train")
    assert found.names == ["x/1.jpg", "x/2.JPEG", "x/3.jpg"]
    assert found.labels.tolist() == [2, -1, -1]
    assert [found.read(k) for k in range(3)] == [a, b, c]


def test_images_are_not_dropped_silently(tmp_path):
    """Files whose names differ after their first dot are images; what is left out is named."""
    members = [(f"photo.{k}.jpg", IMAGES[k][1]) for k in range(3)] + [("b.jpg", IMAGES[3][1]), ("b.png", b"png")]
    write_tar(tmp_path / "train.tar", members)
    with tarfile.open(tmp_path / "train.tar", "a") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "b.jpg"
        archive.addfile(link)
    for _ in range(2):  # from the cache too
        found = open_split(tmp_path, "train")
        assert sorted(found.names) == ["b.jpg", "photo.0.jpg", "photo.1.jpg", "photo.2.jpg"]
        assert "2 links and further images of a sample are left out: link.jpg, b.png" in found.notes[0]


def test_folders_with_braces_and_brackets_in_their_names(tmp_path):
    for name in ("set[1]", "set{v2}", "a*b"):
        root = tmp_path / name
        root.mkdir()
        write_shards(f"{root}/train-%d.tar", IMAGES, 2)
        assert len(open_split(root, "train")) == len(open_split(root / "train-{0..1}.tar", ".")) == 48
        assert len(find_images(DataConfig(root=f"{root}/train-*.tar"), "train")) == 48
        write_folder(root / "val", IMAGES)
        assert len(open_split(root, "val")) == 48


def test_long_names_of_pax_and_gnu_archives(tmp_path):
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "train.tar", "w", format=form) as archive:
            for k in range(3):
                path = tmp_path / f"{k}.jpg"
                path.write_bytes(IMAGES[k][1])
                archive.add(path, f"{'long' * 60}/é{k}.jpg")
        found = open_split(tmp_path, "train")
        assert [found.read(k) for k in range(3)] == [IMAGES[k][1] for k in range(3)]
        assert found.name(2) == f"{'long' * 60}/é2.jpg"


BAD_TARS = {
    "empty": (lambda whole: b"", "not a readable tar archive: empty file"),
    "text": (lambda whole: b"hello" * 500, "not a readable tar archive"),
    "header cut": (lambda whole: whole[:700], "not a readable tar archive: unexpected end of data"),
    "image cut": (lambda whole: whole[: len(whole) // 2 + 700], "not a readable tar archive: unexpected end of data"),
    "compressed": (gzip.compress, "not a readable tar archive: is compressed: unpack it"),
}


@pytest.mark.parametrize("fault", BAD_TARS)
def test_a_damaged_archive_is_one_line(fault, tmp_path):
    write_shards(f"{tmp_path}/train-%d.tar", IMAGES, 2)
    change, text = BAD_TARS[fault]
    path = tmp_path / "train-1.tar"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=f"^{path}: {text}"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ([("1.jpg", b"x"), ("1.cls", b"99999999")], "label 99999999 is not in 0..9999999"),
        ([("1.jpg", b"x"), ("1.json", b"{")], "train.tar, 1.json: not valid JSON"),
        ([("1.jpg", b"x"), ("1.cls", b"\xff\xfe")], "train.tar, 1.cls: .*decode"),
        ([("1.txt", b"x")], "there is no image in its 1 file"),
    ],
)
def test_bad_labels_and_missing_images_are_one_line(members, text, tmp_path):
    write_tar(tmp_path / "train.tar", members)
    with pytest.raises(InputError, match=text) as caught:
        open_split(tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_damaged_parquet_is_one_line_or_a_bad_image(tmp_path):
    """Whatever byte is damaged: no other exception, and no endless loop."""
    for codec in ("none", "snappy"):
        write_parquet(tmp_path / "whole.parquet", IMAGES, compression=codec, use_dictionary=codec == "snappy")
        whole = (tmp_path / "whole.parquet").read_bytes()
        rng, errors = np.random.default_rng(1), 0
        at = np.concatenate([rng.integers(0, len(whole), 60), rng.integers(len(whole) - 3000, len(whole), 60)])
        for k, position in enumerate(at.tolist()):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << k % 8
            path = tmp_path / "x.parquet"
            path.write_bytes(damaged[: position + 1] if k % 10 == 0 else damaged)
            try:
                found = open_parquet("x", open_local([path], "x"))
                for index in range(len(found)):
                    try:
                        found.read(index)
                    except OSError:
                        errors += 1
            except InputError as error:
                errors += 1
                assert "\n" not in str(error)
        assert errors


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (pa.table({"x": [1, 2]}), "no column of images as bytes among x"),
        (
            pa.table(
                {
                    "image": pa.array(
                        [{"bytes": None, "path": "a"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
                    )
                }
            ),
            "column image.bytes holds paths instead of bytes",
        ),
    ],
)
def test_parquet_without_images_is_one_line(table, text, tmp_path):
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(InputError, match=text):
        open_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "names no image"),
        (b"image,label\n", "names no image"),
        (b"\xff\xfe\x00", "not a list in UTF-8"),
        (b"a.jpg,1\n,2\n", "line 2: there is no path in ',2'"),
        (b"a.jpg,123456789\n", "label 123456789 is not in 0..9999999"),
    ],
)
def test_bad_lists_are_one_line(content, text, tmp_path):
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(InputError, match=text):
        open_split(tmp_path, "train")


def test_lists_number_integer_labels_by_value_and_keep_missing_ones(tmp_path):
    (tmp_path / "train.csv").write_text("\ufefffile_name,x,label\na.jpg,,10\n/b.jpg,,2\n\nc.jpg,,\n")
    found = open_split(tmp_path, "train")
    assert found.labels.tolist() == [10, 2, -1]
    assert len(found.classes) == 11
    assert [found.location(k) for k in range(3)] == [f"{tmp_path}/a.jpg", "/b.jpg", f"{tmp_path}/c.jpg"]
    with pytest.raises(OSError, match="No such file"):
        found.read(0)


def test_npz(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 28, 28), dtype=np.uint8)
    labels = np.arange(30)[:, None] % 3
    np.savez(tmp_path / "set.npz", train_images=pixels[:20], train_labels=labels[:20], val_images=pixels[20:])
    config = DataConfig(root=str(tmp_path / "set.npz"))
    train, val = find_images(config, "train"), find_images(config, "val")
    assert (len(train), len(val), train.classes, val.classes) == (20, 10, ["0", "1", "2"], [])
    assert np.array_equal(train.read(3), pixels[3][..., None].repeat(3, 2))
    (tmp_path / "bad.npz").write_bytes((tmp_path / "set.npz").read_bytes()[:-30])
    np.save(tmp_path / "array.npy", pixels)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "one.npz", images=pixels, labels=labels)
    assert len(find_images(DataConfig(root=str(tmp_path / "one.npz")), "train")) == 30
    with pytest.raises(InputError, match="no array of images for 'val'"):  # not the training images again
        find_images(DataConfig(root=str(tmp_path / "one.npz")), "val")
    for name, split, text in (
        ("set.npz", "test", "no array of images for 'test' among train_"),
        ("bad.npz", "x", "not a readable"),
        ("array.npz", "x", "not a readable"),
    ):
        with pytest.raises(InputError, match=text):
            open_npz(tmp_path / name, split)


def test_braces():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{8..10}") == ["8", "9", "10"]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    for pattern, text in (
        ("{3..1}", "counts down"),
        ("{0..9999999}", "stands for"),
        ("{0..9999}{0..9999}", "stands for"),
    ):
        with pytest.raises(InputError, match=text):
            expand_braces(pattern)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train-{0..5}.tar", r"train-2\.tar: No such file"),
        ("none-*.tar", "no file matches .*none-"),
        ("*.jpg", "stands for other files; name .tar or .parquet files"),
    ],
)
def test_bad_patterns_are_one_line(name, text, tmp_path):
    write_shards(f"{tmp_path}/train-%d.tar", IMAGES, 2)
    (tmp_path / "x.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=text):
        find_images(DataConfig(root=str(tmp_path / name)), "train")


def test_pack_takes_shards(tmp_path):
    write_parquet(tmp_path / "train.parquet", IMAGES)
    pack(open_split(tmp_path / "train.parquet", "."), tmp_path / "train.beton", mode="jpg")
    packed = open_split(tmp_path / "train.beton", ".")
    assert isinstance(packed, BetonFile)
    assert packed.classes == list(CLASSES) and len(packed) == 48


def test_many_files_are_not_all_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("fastbyol.data.storage._OPEN_FILES", 1)
    write_shards(f"{tmp_path}/train-%d.tar", IMAGES, 4)
    found = open_split(tmp_path, "train")
    assert [found.read(k) for k in range(48)] == [data for _, data, _ in IMAGES]
    (tmp_path / "train-3.tar").unlink()
    assert found.read(0) == IMAGES[0][1]
    with pytest.raises(OSError, match="No such file"):
        found.read(47)


def test_a_shard_cut_during_the_run_is_a_bad_image(tmp_path):
    write_shards(f"{tmp_path}/train-%d.tar", IMAGES, 2)
    found = open_split(tmp_path, "train")
    with open(tmp_path / "train-1.tar", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(OSError, match="the file ends at byte 2000, .* bytes early"):
        found.read(47)
    assert json.dumps(found.content_hashes()[-1]) == '""'


def test_a_damaged_header_in_the_middle_is_one_line(tmp_path):
    """tarfile takes it for the end, and the images after it would vanish."""
    write_shards(f"{tmp_path}/train-%d.tar", IMAGES, 1)
    path = tmp_path / "train-0.tar"
    with tarfile.open(path) as archive:
        at = archive.getmembers()[10].offset
    with open(path, "r+b") as file:
        file.seek(at + 148)
        file.write(b"x")
    with pytest.raises(InputError, match=f"the header of a member at byte {at} is damaged"):
        open_split(tmp_path, "train")


def test_archives_written_behind_each_other_are_one_line(tmp_path):
    """tarfile stops at the end of the first, and the images of the others would vanish."""
    write_shards(f"{tmp_path}/x-%d.tar", IMAGES, 2)
    whole = b"".join((tmp_path / f"x-{k}.tar").read_bytes() for k in range(2))
    (tmp_path / "train.tar").write_bytes(whole)
    with pytest.raises(InputError, match="another archive follows its end at byte"):
        open_split(tmp_path, "train")


def test_an_archive_without_its_end_is_named(tmp_path, capsys):
    write_shards(f"{tmp_path}/train-%d.tar", IMAGES, 1)
    path = tmp_path / "train-0.tar"
    with tarfile.open(path) as archive:
        end = archive.getmembers()[10].offset
    path.write_bytes(path.read_bytes()[:end])
    assert len(open_split(tmp_path, "train")) == 5
    assert "train-0.tar: the end of the archive is missing" in capsys.readouterr().out
