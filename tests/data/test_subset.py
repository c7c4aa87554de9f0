"""Selections of a data set: classes, fractions, images per class, lists; and the index of a very
large one.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastbyol.config import DataConfig
from fastbyol.data import find_images, folder, open_split
from fastbyol.data.pack import pack
from fastbyol.errors import InputError

NFC, NFD = "caf\u00e9", "cafe\u0301"  # one word in Unicode's composed and decomposed form


@pytest.fixture
def root(folder_of):
    """Four classes of 40, 40, 40 and 8 images; val with 2 of each. The images are never opened."""
    files = {f"train/{c}/{c}{i:02d}.jpg": b"" for c in "abcd" for i in range(8 if c == "d" else 40)}
    return folder_of(files | {f"val/{c}/{i}.jpg": b"" for c in "abcd" for i in range(2)})


def part(root, split="train", **changes):
    return find_images(DataConfig(root=str(root), **changes), split)


def counts(images):
    return np.bincount(images.labels).tolist()


def test_all_images_by_default(root):
    assert counts(part(root)) == [40, 40, 40, 8]


def test_classes_select_and_renumber_in_both_splits(root):
    train, val = (part(root, split, classes=["d", "b"]) for split in ("train", "val"))
    assert train.classes == val.classes == ["b", "d"]
    assert counts(train) == [40, 8]
    assert counts(val) == [2, 2]
    assert all(train.paths[i].startswith("bd"[train.labels[i]]) for i in range(len(train)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["a", "x"]}, r"data.classes: 'x' is no class of .*train, which has classes like 'a'"),
        ({"classes": ["a", "a"]}, "data.classes: 'a' is named twice"),
        ({"fraction": 0.01}, r"data.fraction=0.01 leaves none of the 40 images of a: raise it to at least 0.0126"),
        ({"images_per_class": 9}, "data.images_per_class=9: d has only 8 images"),
    ],
)
def test_invalid_selections_are_one_line(root, changes, message):
    with pytest.raises(InputError, match=message):
        part(root, **changes)


def test_the_suggested_fraction_is_the_smallest(root):
    assert len(part(root, classes=["a"], fraction=0.0126)) == 1
    with pytest.raises(InputError):
        part(root, classes=["a"], fraction=0.0124)


def test_fractions_and_counts_are_per_class_and_nested(root):
    tenth, half = part(root, fraction=0.1), part(root, fraction=0.5)
    assert counts(tenth) == [4, 4, 4, 1]
    assert counts(half) == [20, 20, 20, 4]
    five, six = part(root, images_per_class=5), part(root, images_per_class=6)
    assert counts(five) == [5] * 4
    assert set(tenth.paths) < set(half.paths)
    assert set(five.paths) < set(six.paths)
    assert half.paths == sorted(half.paths)
    assert part(root, fraction=0.5).paths == half.paths
    assert part(root, fraction=0.5, subset_seed=1).paths != half.paths
    assert len(part(root, "val", fraction=0.1)) == 8


def test_a_flat_folder_has_fractions_but_no_classes(folder_of):
    flat = folder_of({f"train/{i}.jpg": b"" for i in range(50)})
    assert len(part(flat, fraction=0.1)) == 5
    with pytest.raises(InputError, match=r"data.images_per_class=3: .*train has no classes"):
        part(flat, images_per_class=3)
    with pytest.raises(InputError, match=r"data.classes: 'a' is no class of .*train, which has no classes"):
        part(flat, classes=["a"])


def test_selections_are_exclusive():
    with pytest.raises(ValueError, match=r"give only one of data.fraction, data.images_per_class and data.file_list"):
        DataConfig(fraction=0.5, images_per_class=3)
    with pytest.raises(ValueError, match=r"data.fraction=0: must lie in \(0, 1\]"):
        DataConfig(fraction=0)


def test_a_list_of_paths_and_names(root, tmp_path):
    listed = tmp_path / "some.txt"
    listed.write_text("# one percent\nb/b03.jpg\n\na07.jpg\n")
    assert part(root, file_list=str(listed)).paths == ["a/a07.jpg", "b/b03.jpg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/x.jpg", r"data.file_list=.*: 'a/x.jpg' is not in .*train"),
        ("# nothing", "it names no image"),
        ("a00.jpg\na00.jpg", "line 2: 'a00.jpg' names a/a00.jpg again, after line 1"),
        ("a00.jpg\n\na/a00.jpg", "line 3: 'a/a00.jpg' names a/a00.jpg again, after line 1"),
        ("a00.jpg\nx\ny", r"line 2: 'x' is not in .*train \(and 1 more\)"),
    ],
)
def test_invalid_lists(root, tmp_path, text, message):
    listed = tmp_path / "some.txt"
    listed.write_text(text)
    with pytest.raises(InputError, match=message):
        part(root, file_list=str(listed))


def test_a_missing_list_and_an_ambiguous_name(root, tmp_path):
    with pytest.raises(InputError, match=r"data.file_list=.*none.txt: No such file"):
        part(root, file_list=str(tmp_path / "none.txt"))
    listed = tmp_path / "some.txt"
    listed.write_text("0.jpg")
    with pytest.raises(InputError, match=r"'0.jpg' is the name of multiple images of .*: give paths"):
        part(root, train_split="val", file_list=str(listed))


def test_selections_of_a_beton_file_are_the_same(photos, tmp_path):
    pack(open_split(photos, "train"), tmp_path / "train.beton", mode="jpg")
    for changes in ({"fraction": 0.5}, {"images_per_class": 2}, {"classes": ["coffee", "moon"]}):
        a, b = part(photos, **changes), part(tmp_path, **changes)
        assert a.classes == b.classes
        assert a.labels.tolist() == b.labels.tolist()
        assert [a.read(i) for i in range(len(a))] == [b.read(i) for i in range(len(b))]
    (tmp_path / "some.txt").write_text("5\n2\n")
    assert part(tmp_path, file_list=str(tmp_path / "some.txt")).samples.tolist() == [2, 5]


FORMS = {
    "relative": "b/b03.jpg",
    "dot": "./b/b03.jpg",
    "dots": "b/../b//b03.jpg",
    "from the root": "train/b/b03.jpg",
    "from the root, dot": "./train/b/b03.jpg",
    "from the working directory": "{relative}/train/b/b03.jpg",
    "absolute": "{root}/train/b/b03.jpg",
    "through a link": "{link}/train/b/b03.jpg",
    "backslashes": "train\\b\\b03.jpg",
    "spaces": "  b03.jpg\t",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_list_accepts_all_forms_of_paths(root, tmp_path, monkeypatch, form, end):
    link = tmp_path / "link"
    link.symlink_to(root)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    line = FORMS[form].format(root=root, relative=os.path.relpath(root), link=link)
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "list").write_bytes(mark + f"{line}{end}# comment{end}{end}a/a01.jpg{end}".encode())
        for found in (root, link):
            assert part(found, file_list=str(tmp_path / "list")).paths == ["a/a01.jpg", "b/b03.jpg"]
    (tmp_path / "list").write_text(f"{line}\n", encoding="utf-16")
    assert part(root, file_list=str(tmp_path / "list")).paths == ["b/b03.jpg"]


def test_list_accepts_unusual_names(folder_of, tmp_path):
    """Names with backslashes, surrounding spaces, either Unicode normal form, and bytes that are
    not UTF-8.
    """
    latin = os.fsdecode(b"caf\xe9.jpg")
    names = [
        "a/x\\y.jpg",
        "a/ z.jpg",
        f"a/{NFD}.jpg",
        f"b/{NFC}.jpg",
        f"a/{latin}",
        "a/#1.jpg",
        "a/\x85.jpg",
        "a/#2.jpg",
    ]
    root = folder_of({f"train/{name}": b"" for name in names})
    listed = tmp_path / "list"
    listed.write_bytes(
        os.fsencode("\n".join([names[0], names[1], f"a/{NFC}.jpg", f"b/{NFD}.jpg", *names[4:7], "#2.jpg"]))
    )
    assert part(root, file_list=str(listed)).paths == sorted(names)


def test_paths_match_only_their_own_folder(root, tmp_path):
    """A bare b03.jpg is b/b03.jpg, but b03.jpg in another folder is not."""
    for line in ("a/b03.jpg", "x/b03.jpg", f"{root}/train/b03.jpg", "../train/b/b03.jpg", "val/b/0.jpg"):
        (tmp_path / "list").write_text(f"a/a01.jpg\n{line}")
        with pytest.raises(InputError, match=rf"line 2: '{line}' is not in .*train$"):
            part(root, file_list=str(tmp_path / "list"))


@pytest.mark.parametrize("line", ["a/a01.jpg,0", "a/a01.jpg 0", "a/a01.jpg\t1", '"a/a01.jpg"', "a/a01.jpg;cat"])
def test_list_with_extra_columns_gives_a_hint(root, tmp_path, line):
    (tmp_path / "list").write_text(f"{line}\n")
    with pytest.raises(InputError, match=r"line 1: .* is not in .*train: write one path per line, and nothing else$"):
        part(root, file_list=str(tmp_path / "list"))


def test_long_lines_are_shortened_in_messages(root, tmp_path):
    (tmp_path / "list").write_text("x" * 100_000)
    with pytest.raises(InputError, match=r"line 1: 'x{300}\.\.\.' is not in") as caught:
        part(root, file_list=str(tmp_path / "list"))
    assert len(str(caught.value)) < 1000


def test_a_list_may_begin_at_the_home_folder(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    (tmp_path / "list").write_text("~/train/b/b03.jpg\n")
    assert part(root, file_list=str(tmp_path / "list")).paths == ["b/b03.jpg"]


@pytest.mark.parametrize("data", [b"a/a01.jpg\0", b"\xff\xfea", bytes(range(256))])
def test_binary_list_raises_input_error(root, tmp_path, data):
    (tmp_path / "list").write_bytes(data)
    with pytest.raises(InputError, match="data.file_list=.*list: not a text file"):
        part(root, file_list=str(tmp_path / "list"))


def test_classes_match_in_either_unicode_form(folder_of):
    root = folder_of({f"train/{name}/1.jpg": b"" for name in (NFD, "a", "z")})
    for name in (NFC, NFD):
        assert part(root, classes=[name, "a"]).classes == ["a", NFC]
    with pytest.raises(InputError, match="is named twice"):
        part(root, classes=[NFC, NFD])


# --- the index of a large folder ---


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Caches sets of 10 or more images in a temporary folder; the images' folders count as
    settled.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "CACHE_FROM_IMAGES", 10)
    monkeypatch.setattr(folder, "_SETTLED_NS", 0)
    time.sleep(0.02)
    return tmp_path / "cache"


def listings(monkeypatch):
    calls, listing = [], folder._list
    monkeypatch.setattr(folder, "_list", lambda *a: calls.append(1) or listing(*a))
    return calls


def test_the_index_is_cached(root, cached, monkeypatch):
    first, calls = open_split(root, "train"), listings(monkeypatch)
    again = open_split(root, "train")
    assert calls == []
    assert again.paths == first.paths
    assert again.classes == first.classes
    assert again.labels.tolist() == first.labels.tolist()
    assert next((cached / "fastbyol").iterdir()).name.startswith("index-")


KINDS = {
    "flat": ("{}.jpg", "new.jpg"),
    "classes": ("a/{}.jpg", "a/new.jpg"),
    "nested": ("a/x/y/{}.jpg", "a/x/y/new.jpg"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder_is_cached_with_its_notes(folder_of, tmp_path, monkeypatch, kind):
    """With the real settling time; the new image is added to a folder with other images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folder, "CACHE_FROM_IMAGES", 10)
    form, new = KINDS[kind]
    images = [f"train/{form.format(i)}" for i in range(10)]
    root = folder_of(dict.fromkeys([*images, f"train/{form.format('x')}.heic"], b""))
    settle(root / "train")
    first, calls = open_split(root, "train"), listings(monkeypatch)
    again = open_split(root, "train")
    assert calls == []
    assert (again.paths, again.classes, again.labels.tolist()) == (first.paths, first.classes, first.labels.tolist())
    assert again.notes == first.notes == (f"{root}/train: left out: 1 .heic",)
    (root / "train" / new).touch()
    assert len(open_split(root, "train")) == 11
    assert calls == [1]


def settle(base):
    """Set the modification times of all folders to 10 s ago."""
    for path in (base, *base.rglob("*")):
        if path.is_dir():
            os.utime(path, ns=(time.time_ns() - 10**10,) * 2)


def test_a_cache_of_another_format_is_rebuilt(root, cached, monkeypatch):
    monkeypatch.setattr(folder, "_CACHE_FORMAT", "1 .jpg")
    open_split(root, "train")
    monkeypatch.undo()
    monkeypatch.setattr(folder, "CACHE_FROM_IMAGES", 10)
    monkeypatch.setattr(folder, "_SETTLED_NS", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cached))
    calls = listings(monkeypatch)
    for _ in range(2):
        assert len(open_split(root, "train")) == 128
    assert calls == [1]


def test_without_a_home_there_is_no_cache(root, cached, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    calls = listings(monkeypatch)
    for _ in range(2):
        assert len(open_split(root, "train")) == 128
    assert calls == [1, 1]


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "class added", "class removed"])
def test_a_stale_cache_is_detected(root, cached, monkeypatch, change):
    before = open_split(root, "train")
    {
        "added": lambda: (root / "train/a/new.jpg").touch(),
        "removed": lambda: (root / "train/b/b00.jpg").unlink(),
        "renamed": lambda: (root / "train/c/c00.jpg").rename(root / "train/c/zz.jpg"),
        "class added": lambda: ((root / "train/e").mkdir(), (root / "train/e/1.jpg").touch()),
        "class removed": lambda: [*(p.unlink() for p in (root / "train/d").iterdir()), (root / "train/d").rmdir()],
    }[change]()
    calls = listings(monkeypatch)
    assert open_split(root, "train").paths != before.paths
    assert calls == [1]


def test_a_recently_changed_folder_is_not_cached(root, cached, monkeypatch):
    monkeypatch.setattr(folder, "_SETTLED_NS", 10**12)
    open_split(root, "train")
    assert not cached.exists()


def test_a_damaged_cache_is_rebuilt(root, cached):
    first = open_split(root, "train")
    (file,) = (cached / "fastbyol").iterdir()
    whole = file.read_bytes()
    flipped = bytes(byte ^ (i % 37 == 0) for i, byte in enumerate(whole))
    for damaged in (b"", whole[:100], whole[:-200], b"\0" * len(whole), flipped):
        file.write_bytes(damaged)
        assert open_split(root, "train").paths == first.paths
        assert file.read_bytes() == whole


def test_an_unwritable_cache_is_ignored(root, cached, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert len(open_split(root, "train")) == 128


LARGE = """
import os, resource, sys
from itertools import count
from types import SimpleNamespace
from pathlib import Path
from fastbyol.data import folder

numbers = count()
def old():
    return SimpleNamespace(st_mtime_ns=10**18, st_dev=1, st_ino=next(numbers))

listed = []

def fake_scandir(path):
    class Entry:
        def __init__(self, name): self.name = name
        def is_dir(self): return path.endswith("/imagenet")
        def is_file(self, follow_symlinks): return not self.is_dir()
    class Entries(list):
        def __enter__(self): return self
        def __exit__(self, *rest): pass
    listed.append(path)
    if path.endswith("/imagenet"):
        return Entries(Entry(f"n{k:08d}") for k in range(1000))
    return Entries(Entry(f"{Path(path).name}_{i}.JPEG") for i in range(1300))

os.scandir = fake_scandir
real = os.stat
os.stat = lambda path, **kw: old() if "/imagenet/n" in str(path) else real(path, **kw)

base = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
images = folder.index_folder(base)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(images) == 1_300_000 and len(images.classes) == 1000 and images.labels[-1] == 999
print(len(listed), (after - before) / 1024, images.paths[1300])
"""


@pytest.mark.slow
def test_an_index_of_imagenets_size(tmp_path):
    """1.3 million files from a stubbed listing: each folder is listed once, in under 400 MB, and
    never with the cache.
    """
    base = tmp_path / "imagenet"
    base.mkdir()
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin", "HOME": str(tmp_path)}
    subprocess.run(["touch", "-d", "2020-01-01", str(base)], check=True)
    for expected in (1001, 0):
        done = subprocess.run(
            [sys.executable, "-c", LARGE, str(base)], capture_output=True, text=True, env=environment, check=True
        )
        listed, megabytes, path = done.stdout.split()
        assert int(listed) == expected
        assert float(megabytes) < 400
        assert path.startswith("n00000001/n00000001_")
    assert list((tmp_path / "cache" / "fastbyol").iterdir())


def test_list_paths_may_be_relative_to_its_folder(folder_of, tmp_path, monkeypatch):
    root = folder_of({f"set/train/{c}/{k}.jpg": b"" for c in "ab" for k in range(2)})
    (root / "list.txt").write_text("set/train/a/1.jpg\n./set/train/b/0.jpg\n")
    monkeypatch.chdir(tmp_path)  # as a resume from elsewhere does
    data = DataConfig(root=str(root / "set"), file_list=str(root / "list.txt"))
    assert find_images(data, "train").paths == ["a/1.jpg", "b/0.jpg"]
